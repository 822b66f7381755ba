import functools
import json

import numpy as np
import pytest

from tmdjax.data.text_tasks import (
    SPLITS,
    ChainSum,
    Countdown,
    ListOperations,
    sample,
    sample_splits,
    split_of,
    vocabulary,
)

TASKS = [ChainSum(), ChainSum(modulus=10, high=14)]
TASKS += [ListOperations(), Countdown(counts=(3,))]
by_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


@functools.cache
def draw(task, count, seed=0):
    rng = np.random.default_rng(seed)
    return [task.problem(rng) for _ in range(count)]


@by_task
def test_gold_is_paid_and_nothing_near_it_is(task):
    rng = np.random.default_rng(1)
    for problem in draw(task, 60):
        response, text = problem.response, problem.prompt + problem.response
        assert task.verify(problem, response) == 1.0
        assert response.endswith(f"#{problem.answer}$")
        assert set(text) <= set(vocabulary.CHARACTERS)
        assert text[0] == ">" and problem.prompt[-1] == "="
        assert json.loads(json.dumps(problem.facts)) == problem.facts
        # the end is needed, and so is every character that is not free work
        paid = response if task.name != "countdown" else problem.answer + "$"
        at = len(response) - len(paid) + int(rng.integers(len(paid)))
        assert task.verify(problem, response[:at]) == 0.0
        changed = response[:at] + "#" + response[at + 1 :]
        assert task.verify(problem, changed) == 0.0 or changed == response


@by_task
def test_any_text_gets_a_reward(task):
    rng = np.random.default_rng(2)
    characters = [*vocabulary.CHARACTERS, vocabulary.PAD, "é", "\n", "\0", " "]
    for problem in draw(task, 20):
        for length in (0, 1, 5, 40):
            text = "".join(rng.choice(characters, length))
            assert task.verify(problem, text) == 0.0
            assert task.verify(problem, "#" + text + "$") in (0.0, 1.0)


@by_task
def test_a_seed_gives_the_same_problems(task):
    again = draw.__wrapped__(task, 10, seed=5)
    assert draw(task, 10, seed=5) == again != draw(task, 10, seed=6)


def test_prompts_of_different_tasks_differ():
    tasks = ChainSum(), ListOperations(), Countdown(counts=(3,))
    prompts = [{p.prompt for p in draw(task, 100)} for task in tasks]
    assert sum(map(len, prompts)) == len(set().union(*prompts))


def test_splits_never_move():
    # Literal: a change of the hash would let evaluation problems into training.
    prompts = (">589=", ">s312=", ">3,7,25:54=", ">11=")
    assert [*map(split_of, prompts)] == ["train", "train", "holdout", "evaluation"]


def test_shares_of_the_splits():
    splits = [split_of(f">{i}=") for i in range(20_000)]
    for split, share in zip(SPLITS, (0.8, 0.1, 0.1)):
        # five standard deviations
        assert abs(splits.count(split) / 20_000 - share) < 5 * (share / 2e4) ** 0.5


@by_task
def test_samples_are_distinct_and_of_their_split(task):
    found = {s: sample(task, s, 12, np.random.default_rng(0)) for s in SPLITS}
    for split, problems in found.items():
        prompts = {p.prompt for p in problems}
        assert len(prompts) == 12 and {*map(split_of, prompts)} == {split}
    again = sample(task, "evaluation", 12, np.random.default_rng(0))
    counts = dict.fromkeys(SPLITS, 12)
    assert sample_splits(task, counts, np.random.default_rng(0)) == found
    assert again == found["evaluation"]


def test_samples_of_a_tier():
    problems = sample(ChainSum(), "train", 50, np.random.default_rng(0), tier="T3")
    assert {p.tier for p in problems} == {"T3"}
    assert all(13 <= len(p.facts["terms"]) <= 24 for p in problems)


def test_a_task_with_too_few_problems_says_so(refused):
    # 10 prompts of one digit; all of those of a split are found before the error
    task, rng = ChainSum(low=1, high=1), np.random.default_rng(0)
    there = [f">{d}=" for d in range(10) if split_of(f">{d}=") == "train"]
    problems = sample(task, "train", len(there), rng)
    assert sorted(p.prompt for p in problems) == there
    message = (
        rf"'chain_sum' gave {len(there)} distinct problems of split 'train', and none "
        r"in 10000 further draws; 10 were asked for\. Ask for fewer, or widen"
    )
    refused(message, sample, task, "train", 10, rng)
    refused("and tier 'T9', and none", sample, task, "train", 1, rng, tier="T9")


def test_the_alphabet_is_small_and_has_each_character_once():
    every = vocabulary.PAD + vocabulary.CHARACTERS
    assert len(every) == len(set(every)) == 28 and every.startswith("_>#$")


def sum_text(digits, sums):
    return "".join(f"{d}{s:02d}" for d, s in zip(digits, sums)) + f"#{sums[-1]:02d}$"


def guess_each_sum(terms, rng):
    return sum_text(terms, rng.integers(97, size=len(terms)))


def guess_each_rise(terms, rng):
    """Knows the first sum, and that each next one is 0 to 9 more."""
    rises = rng.integers(10, size=len(terms) - 1)
    return sum_text(terms, np.cumsum([terms[0], *rises]) % 97)


def guess_the_answer_alone(terms, rng):
    return f"#{rng.integers(97):02d}$"


@pytest.mark.parametrize(
    "guess", [guess_each_sum, guess_each_rise, guess_the_answer_alone]
)
def test_guessing_earns_less_than_1_1_percent(guess):
    task, rng = ChainSum(), np.random.default_rng(0)
    for tier in ("T1", "T2"):
        problems = [p for p in draw(task, 8_000) if p.tier == tier]
        paid = [task.verify(p, guess(p.facts["terms"], rng)) for p in problems]
        assert np.mean(paid) < 0.011, tier


def test_lengths_are_log_normal_and_clipped():
    problems = draw(ChainSum(), 8_000)
    lengths = np.array([len(p.facts["terms"]) for p in problems])
    assert lengths.min() == 3 and lengths.max() == 40
    assert abs(np.median(lengths) - np.exp(2.2)) < 0.6
    inside = np.log(lengths[(lengths > 3) & (lengths < 40)])
    assert abs(inside.mean() - 2.2) < 0.1
    # Shares of the tiers by the normal distribution: n <= 6 is n < 6.5, and so on.
    tiers = [p.tier for p in problems]
    for tier, share in (("T1", 0.307), ("T2", 0.371), ("T3", 0.256), ("T4", 0.066)):
        assert abs(tiers.count(tier) / 8_000 - share) < 0.04


def test_options_of_chain_sum():
    (problem,) = draw(ChainSum(modulus=10, low=4, high=4), 1)
    assert len(problem.prompt) == 6 and len(problem.response) == 11
    (problem,) = draw(ChainSum(log_mean=9.0, log_std=0.0, high=14), 1)
    assert len(problem.facts["terms"]) == 14 and problem.tier == "T3"


def test_bad_input(refused):
    refused(r"modulus=98 is not one of \(10, 97\)", ChainSum, modulus=98)
    refused("low=0 must be at least 1", ChainSum, low=0)
    refused("high=8 must be at least 9", ChainSum, low=9, high=8)
    refused(r"log_std=-1\.0 is outside \[0, inf\]", ChainSum, log_std=-1.0)
    refused("high=2 must be at least 5", ListOperations, low=5, high=2)
    task, rng = ChainSum(), np.random.default_rng(0)
    refused("split='eval' is not one of 'train'", sample, task, "eval", 1, rng)
    refused("count=0 must be at least 1", sample, task, "train", 0, rng)
    kind = r"count=2\.5 is of type float"
    refused(kind, sample, task, "train", 2.5, rng, error=TypeError)


def test_tiers_and_operations_of_lists():
    problems = draw(ListOperations(), 3000)
    operations = [p.facts["operation"] for p in problems]
    for operation in ("sort", "reverse", "dedup", "largest"):
        assert abs(operations.count(operation) / 3000 - 0.25) < 0.04
    tiers = [p.tier for p in problems]
    for tier, share in (("T1", 3 / 11), ("T2", 2 / 11), ("T3", 3 / 11), ("T4", 3 / 11)):
        assert abs(tiers.count(tier) / 3000 - share) < 0.04
    lengths = [len(p.response) for p in problems]
    assert np.percentile(lengths, 95) > 3 * np.median(lengths)  # the long tail
    of_twenty = draw(ListOperations(low=20, high=20), 200)
    assert max(p.facts["rank"] for p in of_twenty) == 9


def test_the_rank_is_asked_for_with_the_largest_alone():
    for problem in draw(ListOperations(), 200):
        digits = "".join(map(str, problem.facts["items"]))
        asked = problem.facts["operation"] == "largest"
        given = f"{problem.facts['rank']}:{digits}" if asked else digits
        assert (":" in problem.prompt) == asked and given in problem.prompt
