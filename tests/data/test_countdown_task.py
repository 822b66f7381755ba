import itertools
from collections import Counter

import numpy as np
import pytest

from tmdjax.data.text_tasks import Countdown
from tmdjax.data.text_tasks.countdown import FEW, Search, write


def solutions_by_pairing(numbers):
    """Trees by value: takes two of what is left and puts their result back.

    A tree is written as nested tuples; operands of + and * are ordered, so that a tree
    found in two orders of pairing is one. Numbers go by their place.
    """
    found = set()

    def walk(rest):
        for value, tree in rest:
            found.add((value, tree))
        for (x, a), (y, b) in itertools.permutations(rest, 2):
            others = [item for item in rest if item not in ((x, a), (y, b))]
            results = [(x - y, ("-", a, b))]
            if y and x % y == 0:
                results.append((x // y, ("/", a, b)))
            if repr(a) < repr(b):
                results += [(x + y, ("+", a, b)), (x * y, ("*", a, b))]
            for value, tree in results:
                if value > 0:
                    walk([*others, (value, tree)])

    walk([(n, (place,)) for place, n in enumerate(numbers)])
    return Counter(value for value, _ in found)


@pytest.mark.parametrize(
    "numbers", [(7,), (4, 6), (3, 7, 25), (1, 2, 3), (2, 4, 8, 9), (1, 5, 6, 24)]
)
def test_solutions_are_those_of_brute_force(numbers):
    expected = solutions_by_pairing(numbers)
    counted = Search(numbers).solutions(200)
    assert counted.tolist() == [expected[value] for value in range(201)]


def test_five_numbers_by_one_pairing_more():
    # What brute force finds for five numbers takes minutes; a part of it: the first
    # pairing by hand, then four numbers by brute force, reaches nothing new.
    numbers = [2, 3, 7, 11, 25]
    reached = set(np.flatnonzero(Search(numbers).solutions(99)))
    for pair in itertools.combinations(numbers, 2):
        four = solutions_by_pairing([sum(pair), *sorted({*numbers} - {*pair})])
        assert {value for value in four if value <= 99} <= reached


def test_all_solutions_are_drawn_equally_often():
    search, rng = Search((2, 5, 20)), np.random.default_rng(0)
    assert search.solutions(10)[10] == 3
    drawn = Counter(write(search.draw(10, rng))[0] for _ in range(300))
    assert set(drawn) == {"20-5*2", "20/2", "5*2"}
    assert all(70 < times < 130 for times in drawn.values())  # 100 +- 3.7 sd


def test_expressions_have_the_value_and_few_brackets():
    task, rng = Countdown(), np.random.default_rng(3)
    for _ in range(30):
        problem = task.problem(rng)
        facts = problem.facts
        assert eval(problem.answer) == facts["target"]
        assert facts["numbers"] == sorted(set(facts["numbers"]))
        assert facts["target"] not in facts["numbers"]
        work = problem.response.split("#")[0]
        for step in work.split(";"):
            left, right = step.split("=")
            assert eval(left) == int(right) > 0
    for tree, text in (
        (("*", ("-", 25, 7), 3), "(25-7)*3"),
        (("-", 25, ("-", 7, 3)), "25-(7-3)"),
        (("+", 25, ("-", 7, 3)), "25+7-3"),
        (("/", 24, ("/", 6, 2)), "24/(6/2)"),
        (("*", 24, ("/", 6, 2)), "24*6/2"),
        (("-", ("*", 24, 6), 2), "24*6-2"),
    ):
        assert write(tree)[0] == text


@pytest.mark.parametrize("count", [3, 4, 5])
def test_few_solutions_are_about_half_of_all(count):
    task, rng = Countdown(counts=(count,)), np.random.default_rng(1)
    problems = [task.problem(rng) for _ in range(80)]
    few = np.array([p.facts["solutions"] <= FEW[count] for p in problems])
    assert 0.4 < few.mean() < 0.75
    tiers = np.where(few, f"T{count - 1}", f"T{count - 2}")  # few are the harder ones
    assert [p.tier for p in problems] == tiers.tolist()


def test_other_right_expressions_are_paid_and_wrong_ones_are_not():
    task, rng = Countdown(counts=(3,)), np.random.default_rng(0)
    problem = task.problem(rng)
    while problem.facts["solutions"] < 2:
        problem = task.problem(rng)
    search = Search(problem.facts["numbers"])
    texts = {write(search.draw(problem.facts["target"], rng))[0] for _ in range(50)}
    assert len(texts) > 1
    for text in texts:
        assert task.verify(problem, f"#{text}$") == 1.0
        assert task.verify(problem, f"#{text}+1-1$") == 0.0
        assert task.verify(problem, f"#{text}") == 0.0
    assert task.verify(problem, f"#{problem.facts['target']}$") == 0.0


def test_bad_options(refused):
    for message, options in (
        (r"counts is empty; give some of \(3, 4, 5\)", {"counts": ()}),
        (r"counts=2 is outside \[3, 5\]", {"counts": (2,)}),
        (r"counts=6 is outside \[3, 5\]", {"counts": (6,)}),
        (r"largest=4 is outside \[5, 99\]", {"largest": 4}),
        (r"largest=100 is outside \[5, 99\]", {"largest": 100}),
        ("largest_target=0 must be at least 1", {"largest_target": 0}),
    ):
        refused(message, Countdown, **options)
    refused("largest='9' is of type str", Countdown, largest="9", error=TypeError)
