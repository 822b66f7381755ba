import importlib.util

import numpy as np
import pytest

from tmdjax.data.text_tasks import ReasoningGym, sample
from tmdjax.data.text_tasks.reasoning_gym import INSTRUCTION, extract_answer

needs_reasoning_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None,
    reason="reasoning-gym is absent (pip install 'tmdjax[reasoning_gym]')",
)


@pytest.fixture
def make():
    tasks = []

    def one(generator, **settings):
        tasks.append(ReasoningGym(generator=generator, **settings))
        return tasks[-1]

    yield one
    for task in tasks:
        task.close()


def test_extraction():
    for response, answer in {
        "I think <answer> 42\n</answer>.": "42",
        "<answer>1</answer> no, <answer>2</answer>": "2",
        "<answer>1</answer> and <answer>2": "1",
        "<answer>a\nb</answer>": "a\nb",
        "<answer></answer>": "",
        "</answer><answer>": None,
        "42": None,
    }.items():
        assert extract_answer(response) == answer, response


def test_without_the_package_the_error_names_the_extra(monkeypatch, refused):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    extra = r"'tmdjax\[reasoning_gym\]'"
    refused(extra, ReasoningGym, generator="chain_sum", error=ImportError)


@needs_reasoning_gym
@pytest.mark.parametrize(
    "generator", ["chain_sum", "gsm_symbolic", "spell_backward", "number_sorting"]
)
def test_gold_is_paid_and_another_answer_is_not(make, generator):
    task, rng = make(generator), np.random.default_rng(0)
    for _ in range(3):
        problem = task.problem(rng)
        assert problem.prompt == f"{problem.facts['question']}\n{INSTRUCTION}"
        assert task.verify(problem, f"hm. {problem.response}") == 1.0
        assert task.verify(problem, "<answer>zebra</answer>") < 0.5
        assert task.verify(problem, problem.answer) == 0.0
    assert task.counts == {"scored": 6, "no answer": 3}


@needs_reasoning_gym
def test_answers_are_those_of_arithmetic(make):
    task = make("chain_sum", options={"min_terms": 2, "max_terms": 2})
    for problem in sample(task, "train", 5, np.random.default_rng(0)):
        expression = problem.facts["question"].split(":")[1].rstrip("= ")
        assert int(problem.answer) == eval(expression)


@needs_reasoning_gym
def test_a_seed_gives_the_same_problems_in_another_process(make):
    tasks = [make("family_relationships") for _ in range(2)]
    drawn = [[t.problem(np.random.default_rng(s)) for s in range(3)] for t in tasks]
    assert drawn[0] == drawn[1]


@needs_reasoning_gym
def test_an_answer_that_hangs_or_breaks_the_scorer_earns_nothing(make):
    task = make("countdown", timeout=1.0)
    problem = task.problem(np.random.default_rng(0))
    assert task.verify(problem, "<answer>9**9**9**9</answer>") == 0.0
    assert task.counts == {"timed out": 1}
    assert task.verify(problem, problem.response) == 1.0  # in a new process
    factors = make("prime_factorization")
    problem = factors.problem(np.random.default_rng(0))
    assert factors.verify(problem, "<answer>x</answer>") == 0.0
    assert factors.counts == {"failed": 1}


@needs_reasoning_gym
def test_bad_input(make, refused):
    refused("no generator 'chainsum'.*mean 'chain_sum'", make, "chainsum")
    least, unknown = {"options": {"min_terms": -3}}, {"options": {"terms": 3}}
    refused(r"refuses options=\{'min_terms': -3\}: min_te", make, "chain_sum", **least)
    refused("unexpected keyword argument 'terms'", make, "chain_sum", **unknown)
