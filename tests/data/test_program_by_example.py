import json

import numpy as np
import pytest

from experiments import grpo, language_tasks
from tmdjax.data.text_tasks import (
    SPLITS,
    ProgramByExample,
    sample,
    sample_splits,
    vocabulary,
)
from tmdjax.harness import load_config


@pytest.fixture(scope="module")
def task():
    task = language_tasks.build({"name": "program_by_example", "operations": 3})
    yield task
    task.close()


def test_gold_has_the_values_and_no_other_function_has_the_prompt(task):
    rng, values = np.random.default_rng(0), {}
    for _ in range(3000):
        problem = task.problem(rng)
        inputs, outputs = problem.facts["inputs"], problem.facts["outputs"]
        assert [eval(problem.answer, {"k": k}) for k in inputs] == outputs
        assert inputs[:5] == [0, 1, 2, 3, 4] and len(set(inputs)) == len(inputs) == 9
        shown = ",".join(map(str, outputs[:5]))
        assert problem.prompt == f">k{shown}="
        assert problem.response == f"#{problem.answer}$"
        assert set(problem.prompt + problem.response) <= set(vocabulary.CHARACTERS)
        assert len(problem.response) <= 14 and len(problem.prompt) <= 27
        assert problem.tier == f"T{sum(problem.answer.count(x) for x in '+-*')}"
        assert json.loads(json.dumps(problem.facts)) == problem.facts
        # so a function is in one split, whatever it is written as
        assert values.setdefault(problem.prompt, outputs) == outputs
    assert len(values) > 500


def test_any_right_expression_is_paid_and_a_table_is_not(task):
    rng = np.random.default_rng(1)
    problem = task.problem(rng)
    while problem.tier != "T3":
        problem = task.problem(rng)
    gold, table = problem.answer, problem.facts["outputs"][:5]
    for answer, reward in (
        (gold, 1.0),
        (f"({gold})*6/2-2*({gold})", 1.0),
        (f"sum([{gold}])", 1.0),
        (f"{table}[k]", 0.0),
        (f"{gold}+1", 0.0),
        ("k/0", 0.0),
        ("9**9**9", 0.0),
        (")", 0.0),
    ):
        assert task.verify(problem, f"#{answer}$") == reward, answer
    counted = {"passed": 3, "error": 2, "wrong answer": 2, "timeout": 1}
    assert task.counts == counted
    # no answer, no end: nothing is run
    for response in ("", gold, f"#{gold}", f"{gold}$", "#$", "# $", "$#"):
        assert task.verify(problem, response) == 0.0
    assert task.counts == counted


def test_the_share_of_values_may_be_paid(task):
    shares = ProgramByExample(all_or_nothing=False)
    object.__setattr__(shares, "_verifier", type(task._verifier)(timeout=1.0))
    problem = task.problem(np.random.default_rng(2))
    table = problem.facts["outputs"][:5]
    assert shares.verify(problem, f"#{table}[k] if 0 <= k < 5 else None$") == 5 / 9
    shares.close()


def test_splits_are_disjoint_and_repeat(task):
    counts = dict.fromkeys(SPLITS, 40)
    found = sample_splits(task, counts, np.random.default_rng(0))
    prompts = [{p.prompt for p in problems} for problems in found.values()]
    assert len(set.union(*prompts)) == 120
    assert sample(task, "holdout", 40, np.random.default_rng(0)) == found["holdout"]
    assert {p.tier for p in found["train"]} == {"T1", "T2", "T3"}


def test_it_is_a_task_of_a_config():
    config = load_config("configs/grpo.py:smoke")
    with config.unlocked():
        task = {"name": "program_by_example", "operations": 3}
        config.arms.chain_sum = {"task": task, "rl": {"max_new_tokens": 16}}
    assert "chain_sum" in str(grpo.describe(config))
    given = grpo.resolved(config, "chain_sum")
    task = language_tasks.build(given["task"])
    language = language_tasks.language(given)
    problem = task.problem(np.random.default_rng(0))
    score = language_tasks.scorer(task, language)
    assert score(problem, language.encode(problem.response)) == 1.0
    assert score(problem, language.encode("#" + problem.response)) == 1.0
    task.close()


def test_bad_options(refused):
    refused(r"operations=7 is outside \[1, 6\]", ProgramByExample, operations=7)
    refused("operations=0 must be at least 1", ProgramByExample, operations=0)
    refused(r"timeout=-1\.0 is outside", ProgramByExample, timeout=-1.0)
    kind = "operations='3' is of type str"
    refused(kind, ProgramByExample, operations="3", error=TypeError)
