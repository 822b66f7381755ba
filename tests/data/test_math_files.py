import importlib.util
import json
import types

import numpy as np
import pytest

from tmdjax.data.text_tasks import math_files, sample, split_of
from tmdjax.data.text_tasks.math_files import MathProblems, read
from tmdjax.rewards.math import MathVerifier

GSM8K = {
    "question": "Ann has 3 boxes of 1,000 pins and loses 2. How many are left?",
    "answer": "3 * 1,000 = <<3*1000=3000>>3,000.\n3,000 - 2 = 2,998.\n#### 2,998",
}
MATH = {
    "problem": r"Find $\frac{1}{4}+\frac14$.",
    "solution": r"It is $\frac{2}{4}=\boxed{\frac{1}{2}}$.",
    "level": "Level 3",
    "subject": "Prealgebra",
}
DAPO = {
    "prompt": [{"role": "user", "content": "What is 6 * 7? End with 'Answer: n'."}],
    "reward_model": {"ground_truth": "42", "style": "rule"},
    "data_source": "math_dapo",
}
LINES = {"gsm8k": GSM8K, "math": MATH, "dapo": DAPO}


@pytest.fixture
def write(tmp_path):
    def to(*lines):
        path = tmp_path / "problems.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return path

    return to


def test_problems_of_each_layout(write):
    (problem,) = read(write(GSM8K), "gsm8k")
    assert problem.prompt == GSM8K["question"] and problem.answer == "2,998"
    assert problem.response == GSM8K["answer"] and problem.tier == "T1"
    (problem,) = read(write(MATH), "math")
    assert problem.prompt == MATH["problem"] and problem.answer == r"\frac{1}{2}"
    assert problem.tier == "T3" and problem.facts["subject"] == "Prealgebra"
    (problem,) = read(write(DAPO), "dapo")
    assert problem.prompt == DAPO["prompt"][0]["content"] and problem.answer == "42"
    assert problem.facts["messages"] == DAPO["prompt"] and problem.response == ""
    first_release = {k: v for k, v in MATH.items() if k != "subject"}
    (problem,) = read(write({**first_release, "type": "Algebra"}), "math")
    assert problem.facts["subject"] == "Algebra"


@pytest.mark.parametrize("layout", sorted(LINES))
def test_rewards_of_each_layout(write, layout):
    verifier = MathVerifier(symbolic=False)
    task = MathProblems(tuple(read(write(LINES[layout]), layout)), verifier)
    (problem,) = task.problems
    right = problem.response or "so the answer is 42."
    assert task.verify(problem, right) == 1.0
    assert task.verify(problem, right + "\n#### 12345 \\boxed{12345}") == 0.0
    assert task.verify(problem, "") == 0.0
    assert verifier.counts == {"equal": 1, "different": 1, "no answer": 1}


def test_a_file_is_streamed(write, refused):
    problems = read(write(GSM8K, "", GSM8K, "{broken"), "gsm8k")
    assert isinstance(problems, types.GeneratorType)
    assert next(problems) == next(problems)
    refused(r"problems\.jsonl, line 4: no JSON \(Expect", next, problems)


def truth(value):
    return {**DAPO, "reward_model": {"ground_truth": value}}


def test_lines_as_the_published_files_have_them(write):
    for layout, line, answer, tier in (
        ("math", {**MATH, "level": 2}, r"\frac{1}{2}", "T2"),
        ("math", {**MATH, "level": "4"}, r"\frac{1}{2}", "T4"),
        ("math", {**MATH, "level": "level 5", "answer": -0.0}, "-0", "T5"),
        ("math", {**MATH, "level": "3.0", "answer": 1e300}, "1e+300", "T3"),
        ("math", {**MATH, "level": "Level ?", "answer": 10**400}, str(10**400), "T?"),
        ("math", {**MATH, "level": 2.0, "answer": 42.0}, "42", "T2"),
        ("math", {**MATH, "solution": r"so $x = \boxed 9$."}, "9", "T3"),
        ("math", {**MATH, "solution": r"\fbox{$9$}"}, "$9$", "T3"),
        ("math", {**MATH, "solution": r"\boxed 9", "answer": "10"}, "10", "T3"),
        ("math", {**MATH, "solution": "Count.", "answer": 2.5}, "2.5", "T3"),
        ("dapo", truth(34), "34", "T1"),
        ("dapo", truth(0), "0", "T1"),
        ("dapo", truth(-1.5), "-1.5", "T1"),
    ):
        (problem,) = read(write(line), layout)
        assert (problem.answer, problem.tier) == (answer, tier), line


def test_bad_lines_may_be_passed_over_and_are_counted(write):
    path, bad = write(GSM8K, "{broken", {**GSM8K, "answer": "7"}, GSM8K), []
    assert len(list(read(path, "gsm8k", bad_lines=bad))) == 2
    assert len(bad) == 2 and "line 2: no JSON" in bad[0] and "line 3" in bad[1]


def without(line, key):
    return {name: value for name, value in line.items() if name != key}


def test_malformed_lines_are_named(write, refused):
    for layout, line, message in (
        ("gsm8k", "[1]", "a JSON list; expected a JSON object"),
        ("gsm8k", without(GSM8K, "question"), "'question'; expected 'question', a"),
        ("gsm8k", {**GSM8K, "question": 7}, "key 'question' is '7'; expected"),
        ("gsm8k", without(GSM8K, "answer"), "no key 'answer'; .* ends with '#### 42'"),
        ("gsm8k", {**GSM8K, "answer": "7"}, "'answer' has no '####'; expected a text"),
        ("gsm8k", {**GSM8K, "answer": "#### "}, "'answer' has no '####'"),
        ("math", without(MATH, "solution"), r"no key 'solution'; .* in \\boxed\{\}"),
        ("math", {**MATH, "solution": "it is 5"}, r"no complete \\boxed\{\}"),
        ("math", {**MATH, "solution": r"\boxed{5"}, r"no complete \\boxed\{\}"),
        ("math", without(MATH, "level"), "no key 'level'; expected 'level', 'Level 1'"),
        ("math", without(MATH, "subject"), r"no key 'subject'; .* \(or 'type'\)"),
        ("dapo", without(DAPO, "prompt"), "no key 'prompt'; expected 'prompt', a list"),
        ("dapo", {**DAPO, "prompt": "What?"}, "key 'prompt' is 'What\\?'; expected"),
        ("dapo", {**DAPO, "prompt": []}, r"key 'prompt' is '\[\]'"),
        ("dapo", {**DAPO, "prompt": [{"role": "user"}]}, "a message is .*'content'"),
        ("dapo", without(DAPO, "reward_model"), "no key 'reward_model'; expected"),
        ("dapo", {**DAPO, "reward_model": {}}, "key 'reward_model' is '.}'; expected"),
        ("dapo", {**DAPO, "reward_model": []}, "key 'reward_model' is '.]'; expected"),
        ("dapo", truth(" \n"), r"key 'reward_model\.ground_truth' is ' "),
        ("dapo", truth(None), r"'reward_model\.ground_truth' is 'None'; .* a number"),
        ("dapo", truth(True), r"'reward_model\.ground_truth' is 'True'"),
        ("dapo", truth(float("nan")), r"'reward_model\.ground_truth' is nan"),
        ("math", {**MATH, "answer": " "}, "key 'answer' is ' '; expected 'answer'"),
        ("math", {**MATH, "solution": r"\boxed{ }"}, r"no complete \\boxed"),
        ("math", {**MATH, "level": True}, "key 'level' is 'True'"),
        ("math", {**MATH, "level": "hard"}, "key 'level' is 'hard'; expected 'level'"),
        ("math", {**MATH, "level": 6}, "key 'level' is '6'; .* 'Level 1' to"),
        ("math", {**MATH, "level": 10**400}, "key 'level' is '10+'"),
        ("gsm8k", {**GSM8K, "question": " "}, "key 'question' is ' '"),
    ):
        problems = read(write(LINES[layout], line), layout)
        refused(rf"problems\.jsonl, line 2: .*{message}", list, problems)


def test_bad_input(tmp_path, refused):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"question": "\xff"}\n')
    refused(r"bad\.jsonl, line 1: no JSON", list, read(path, "gsm8k"))
    path.write_bytes(b'{"question": ' + 10**7 * b'"')
    refused(r"bad\.jsonl, line 1 is longer than 10000000", list, read(path, "gsm8k"))
    refused("unknown layout 'gsm'.*mean 'gsm8k'", read, tmp_path / "x", "gsm")
    absent = "x is not a file; .* layout 'math'"
    refused(absent, read, tmp_path / "x", "math", error=FileNotFoundError)
    refused("problems is empty", MathProblems, (), MathVerifier(symbolic=False))
    assert sorted(math_files.LAYOUTS) == ["dapo", "gsm8k", "math"]


def test_samples_of_a_file_find_every_problem(write):
    lines = [{**GSM8K, "question": f"Question {i}?"} for i in range(300)]
    problems = tuple(read(write(*lines), "gsm8k"))
    task = MathProblems(problems, MathVerifier(symbolic=False))
    there = [p for p in problems if split_of(p.prompt) == "train"]
    found = sample(task, "train", len(there), np.random.default_rng(0))
    assert sorted(p.prompt for p in found) == sorted(p.prompt for p in there)


@pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None,
    reason="math-verify is absent (pip install 'tmdjax[math]')",
)
def test_symbols_of_a_math_file(write):
    (problem,) = read(write({**MATH, "solution": r"\boxed{2\sqrt{2}}"}), "math")
    task = MathProblems((problem,), MathVerifier())
    assert task.verify(problem, r"\boxed{\sqrt{8}}") == 1.0
    assert task.verify(problem, r"\boxed{\sqrt{7}}") == 0.0
    task.verifier.close()
