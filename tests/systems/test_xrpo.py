"""XRPO on records alone: what is planned, remembered, shown and raised.

Numbers are those of the sheet's invariants; engines write in runtime/test_rounds.py.
"""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import rl
from tmdjax.rl import TokenBatch, TokenRecord
from tmdjax.runtime import (
    Ask,
    Group,
    Planner,
    Prompt,
    Rollout,
    TokenObjective,
    Turn,
    UpdateBatch,
    worked_examples,
)
from tmdjax.systems import grpo, xrpo

METHOD = xrpo.preset("xrpo")
EVEN = xrpo.preset("xrpo", rule="uniform")  # prompts without a right answer get some
PROBLEMS = ["3 7 25 to 46", "3 7 8 to 11", "25 7 46 to 3", "1 2 9 to 12"]
PROMPTS = [Prompt((5, i), problem) for i, problem in enumerate(PROBLEMS)]


def records(group, scores, number=0, **fields):
    return [
        TokenRecord(
            number=number + i, group=group, prompt=(5, group), tokens=[i, 9],
            log_probs=[-0.5 - 0.1 * i] * 2, versions=[0, 0], status="stop",
            score=float(x), reward=float(x), **fields,
        )
        for i, x in enumerate(scores)
    ]  # fmt: skip


def turn(scores, **changes):
    groups = [Group(PROBLEMS[g], records(g, x)) for g, x in enumerate(scores)]
    given = {"number": 1, "iteration": 0, "prompts": PROMPTS, "groups": groups}
    given |= {"samples": 8, "longest": 40, "memory": np.zeros(0, np.uint8)}
    return Turn(**given | changes)


def remembered(*which, iteration=0):
    """The memory after the problems of some prompts were solved."""
    found = [r for g, i in enumerate(which) for r in records(g, [0, 1, 1], 3 * i)]
    found = [dataclasses.replace(r, prompt=(5, which[r.group])) for r in found]
    rollout = Rollout(found, [PROBLEMS[i] for i in which], {})
    return METHOD.remember(np.zeros(0, np.uint8), rollout, iteration)


ROUND = [[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]]


def test_it_is_an_objective_and_a_planner():
    assert isinstance(METHOD, TokenObjective) and isinstance(METHOD, Planner)
    assert not isinstance(grpo.preset("grpo"), Planner)
    for name, base in (("xrpo", "grpo"), ("gspo", "gspo")):
        method, plain = xrpo.preset(name), dataclasses.asdict(grpo.preset(base))
        assert dataclasses.asdict(method) | plain == dataclasses.asdict(method)


@pytest.mark.parametrize("rule", rl.RULES)
def test_4_rounds_spend_the_budget_exactly(rule):
    """Four prompts of 8: 16 in the first round, 8 in each of two more."""
    method = dataclasses.replace(METHOD, rule=rule)
    asks, told = method.plan(turn([], number=0))
    assert asks == [Ask(4, prompt.tokens) for prompt in PROMPTS] and not told
    scores = ROUND
    for number in (1, 2):
        asks, told = method.plan(turn(scores, number=number))
        assert sum(ask.count for ask in asks) == 8
        assert told["time/allocation"] > 0 and told["without_example"] <= 4
        scores = [[*x, *[0] * ask.count] for x, ask in zip(scores, asks)]
    assert sum(map(len, scores)) == 32 and method.plan(turn(scores, number=3)) is None
    if rule == "uniform":
        assert [len(x) for x in scores] == [8] * 4
    if rule == "greedy":  # mixed ones first, and most for the most mixed
        assert len(scores[0]) > len(scores[1]) and len(scores[3]) > len(scores[2])


def test_4_a_remainder_is_spent_in_the_last_round():
    method = dataclasses.replace(METHOD, rounds=4, first_samples=3)
    scores, counts = [[1, 0, 1]] * 4, []
    for number in (1, 2, 3):
        asks, _ = method.plan(turn(scores, number=number))
        counts.append(sum(ask.count for ask in asks))
        scores = [[*x, *[0] * ask.count] for x, ask in zip(scores, asks)]
    assert counts == [6, 7, 7]


def test_switches_of_the_allocation():
    def counts(**changes):
        method = dataclasses.replace(METHOD, **changes)
        return [ask.count for ask in method.plan(turn(ROUND, iteration=3))[0]]

    # what is solved each time waits for all others, which may have eight each
    assert counts(stop_if_right=True, exploration=5.0)[2] == 0
    assert counts(exploration=5.0)[2] == 2
    none = counts(exploration=0.0)
    assert none[1] == none[2] == 0 and counts(exploration=0.0, std_prior=True)[1] > 0
    # log(1 + 4) of the fourth iteration is below log(1 + 16) of 16 responses
    few, many = (counts(trials=t, exploration=0.25) for t in ("iterations", "total"))
    assert few[0] + few[3] > many[0] + many[3]
    assert max(counts(most_samples=7, exploration=0.0)) == 3


def test_8_examples_go_to_prompts_without_a_right_answer_and_to_no_other():
    memory = remembered(0, 1, 2)
    asks, told = EVEN.plan(turn(ROUND, memory=memory, number=2))
    for i, (ask, prompt) in enumerate(zip(asks, PROMPTS)):
        assert (tuple(ask.prompt) == tuple(prompt.tokens)) == (i != 1)
    # the most alike stands last, then the prompt's own ids
    example = asks[1].prompt
    assert example[-2:] == (5, 1) and len(example) == 2 * 4 + 2
    assert example[4:8] == (5, 0, 1, 9)  # '3 7' are shared with it
    assert told["seeded_prompts"] == 1 and told["without_example"] == 0
    # without memory, or with nothing but itself in it: the very bytes of the prompt
    for held in (np.zeros(0, np.uint8), remembered(1)):
        asks, told = EVEN.plan(turn(ROUND, memory=held))
        assert [ask.prompt for ask in asks] == [prompt.tokens for prompt in PROMPTS]
        assert told["seeded_prompts"] == 0 and told["without_example"] == 1
    off = dataclasses.replace(EVEN, examples=0)
    asks, told = off.plan(turn(ROUND, memory=memory))
    assert [ask.prompt for ask in asks] == [prompt.tokens for prompt in PROMPTS]
    assert not any("example" in name for name in told)


def test_8_a_problem_is_no_example_for_itself_in_any_order():
    assert worked_examples.words_of(PROBLEMS[0]) == worked_examples.words_of(
        PROBLEMS[2]
    )
    known = worked_examples.unpack_memory(remembered(0, 2)).solved
    words, order = worked_examples.words_of(PROBLEMS[2]), np.random.default_rng(0)
    assert not worked_examples.retrieve((5, 2), words, known, 2, order)
    other = worked_examples.words_of(PROBLEMS[1])
    assert len(worked_examples.retrieve((5, 1), other, known, 2, order)) == 2


def test_8_examples_that_do_not_fit_are_left_out_whole():
    memory = remembered(0, 2, 3)
    for longest, size, dropped in ((10, 10, 0), (9, 6, 1), (6, 6, 1), (5, 2, 2)):
        asks, told = EVEN.plan(turn(ROUND, memory=memory, longest=longest))
        assert len(asks[1].prompt) == size and told["examples_dropped"] == dropped
        assert told["without_example"] == (size == 2)


def test_8_what_is_remembered_was_solved_once_by_itself_and_survives_a_checkpoint():
    cut = [dataclasses.replace(r, status="length") for r in records(1, [1, 1])]
    seeded = [
        dataclasses.replace(r, prompt=(7, 7, 5, 2), question=(5, 2))
        for r in records(2, [0, 1, 1])
    ]
    found = [*records(0, [0, 0]), *cut, *seeded, *records(3, [1, 1])]
    memory = METHOD.remember(
        np.zeros(0, np.uint8), Rollout(found, PROBLEMS, {}), iteration=4
    )
    known = worked_examples.unpack_memory(memory)
    assert [each.prompt for each in known.solved] == [(5, 2), (5, 3)]
    assert known.solved[0].response == (1, 9) and known.solved[0].iteration == 4
    assert_array_equal(known.pack(), memory)
    assert memory.dtype == np.uint8
    for changes in ({"examples": 0}, {"rounds": 1}):  # nothing will be shown
        off = dataclasses.replace(METHOD, **changes)
        empty, rollout = np.zeros(0, np.uint8), Rollout(found, PROBLEMS, {})
        assert not off.shows_examples and not off.remember(empty, rollout, 4).size


def test_8_a_full_memory_keeps_every_problem_alike_often():
    def solved(i, iteration=0):
        words = collections.Counter([str(i)])
        return worked_examples.Solved((i,), (i,), words, iteration)

    held = np.zeros(20)
    for seed in range(400):
        memory, order = worked_examples.Memory(), np.random.default_rng(seed)
        for i in range(0, 20, 4):  # as they come in, four at a time
            new = [solved(j) for j in range(i, i + 4)]
            memory = worked_examples.remember(memory, new, 5, order)
        assert len({each.prompt for each in memory.solved}) == 5 and memory.seen == 20
        for each in memory.solved:
            held[each.prompt[0]] += 1
    assert_allclose(held / 400, 0.25, atol=4 * np.sqrt(0.25 * 0.75 / 400))
    newer = worked_examples.remember(
        memory, [solved(memory.solved[2].prompt[0], 7)], 5, np.random.default_rng(0)
    )
    assert newer.solved[2].iteration == 7 and newer.seen == 20


SIZES = [[1, 0], [0, 0, 0, 1, 1], [1, 1, 1], [0, 1, 0, 0]]
WRITTEN = [r for g, x in enumerate(SIZES) for r in records(g, x, 10 * g)]


def test_6_without_its_parts_the_advantages_are_grpos_to_the_bit():
    plain = grpo.preset("grpo").advantages(WRITTEN)
    for changes in ({"novelty": 0.0}, {"most_novelty": 0.0}):
        method = xrpo.preset("xrpo", rounds=1, **changes)
        assert_array_equal(method.advantages(WRITTEN), plain)
    # the control: with sharpening they are others
    assert (np.asarray(METHOD.advantages(WRITTEN)) != plain).any()
    equal = [r for g in range(3) for r in records(g, [0, 1, 1])]
    method = xrpo.preset("xrpo", novelty=0.0, equal_prompts=True)
    same = grpo.preset("grpo").advantages(equal)
    assert_array_equal(method.advantages(equal), same)


def test_7_and_10_unequal_groups_are_normalised_and_raised_one_by_one():
    found, at = np.asarray(METHOD.advantages(WRITTEN)), 0
    for scores in SIZES:
        x, s = np.array(scores), -0.5 - 0.1 * np.arange(len(scores))
        a = (x - x.mean()) / (x.std(ddof=1) + 1e-6) if x.std() else 0 * s
        bonus = np.clip(2.5 * (1 - np.exp(s - s.mean())), 0, np.abs(a) / 2)
        expected = np.where((x == 1) & (a > 0), a + bonus, a)
        assert_allclose(found[at : at + len(x)], expected, rtol=1e-5, atol=1e-7)
        at += len(x)
    # prompts that count alike do so with what was raised
    weighed = xrpo.preset("xrpo", equal_prompts=True).advantages(WRITTEN)
    size = np.repeat([2, 5, 3, 4], [2, 5, 3, 4])
    assert_allclose(weighed, found * 3.5 / size, rtol=1e-6)


def test_9_behind_the_plain_prompt_the_corrected_gradient_is_unbiased():
    """Every answer of one token, as often as the policy with examples writes it."""
    rng = np.random.default_rng(0)
    logits, behaviour = rng.normal(size=(2, 6))
    advantage = jnp.asarray(rng.normal(size=6), jnp.float32)
    mu = np.asarray(jax.nn.log_softmax(jnp.asarray(behaviour, jnp.float32)))[:, None]
    proximal = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))[:, None]
    texts = TokenBatch(*[None] * 5, np.ones((6, 1), bool), mu, None, None, None)
    batch = UpdateBatch(texts, advantage, None, proximal, None, None, None)

    def loss(logits, most):
        given = {"correction": "truncate", "max_weight": most}
        own = jax.nn.log_softmax(logits)[:, None]
        each, metrics = xrpo.preset("xrpo", **given).loss(own, batch)
        return jnp.sum(jnp.exp(mu) * each), metrics["behaviour_weight"]

    def value(logits):
        return -jnp.sum(jax.nn.softmax(logits) * advantage)

    start = np.float32(logits)
    slope = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    (found, weight), (other, bounded) = (
        map(np.asarray, slope(start, most)) for most in (1e9, 1.2)
    )
    assert_allclose(found, jax.jit(jax.grad(value))(start), rtol=1e-4, atol=1e-6)
    assert weight.max() > 1.2 and bounded.max() == pytest.approx(1.2)
    assert np.abs(other - found).max() > 1e-3  # what the bound costs


def test_adaptive_counts_leave_the_sign_of_the_gradient():
    """Bernoulli policies that are paid for their action; 3 sigma, 400 prompts."""
    rng = np.random.default_rng(1)
    p = np.repeat([0.2, 0.5], 200)
    method = dataclasses.replace(METHOD, examples=0, novelty=0.0)
    actions = (rng.random((400, 32)) < p[:, None]).astype(int)
    scores = [list(x[:4]) for x in actions]
    prompts = [Prompt((5, i), "") for i in range(400)]
    for number in (1, 2):
        asks, _ = method.plan(turn_of(scores, prompts, number))
        scores = [
            list(x[: len(s) + ask.count]) for x, s, ask in zip(actions, scores, asks)
        ]
    assert sum(map(len, scores)) == 3200 and max(map(len, scores)) > 8
    found = [r for g, x in enumerate(scores) for r in records(g, x)]
    a, group = method.advantages(found), np.array([r.group for r in found])
    slope = np.asarray(a) * (np.concatenate(scores) - p[group])
    each = np.bincount(group, slope, 400) / np.bincount(group)
    for half in (each[:200], each[200:]):
        assert half.mean() > 3 * half.std() / np.sqrt(200)


def turn_of(scores, prompts, number):
    groups = [Group("", records(g, x)) for g, x in enumerate(scores)]
    return turn([], prompts=prompts, groups=groups, number=number)


def test_bad_inputs(refused):
    for changes, message in (
        ({"first_samples": 1}, "first_samples=1 must be at least 2"),
        ({"alpha": 1.0}, r"alpha=1.0 is outside \(0, 1\)"),
        ({"exploration": -0.1}, "exploration=-0.1"),
        ({"most_novelty": -1.0}, "most_novelty=-1.0"),
        ({"novelty": -1.0}, "novelty=-1.0"),
        ({"rule": "uniformly"}, "rule='uniformly'.*mean 'uniform'"),
        ({"trials": "steps"}, "trials='steps'"),
        ({"average": "all"}, "average='all'"),
        ({"rounds": 0}, "rounds=0 must be at least 1"),
        ({"memory_size": 0}, "memory_size=0"),
        ({"clip_range": 0.0}, "clip_range low"),
    ):
        refused(message, xrpo.preset, "xrpo", **changes)
    for samples in (3, 4):  # with 4, later rounds would have nothing to plan
        refused(
            f"first_samples=4 responses to each prompt leave nothing of the "
            f"samples={samples} .*use rounds=1",
            METHOD.plan,
            turn([], number=0, samples=samples),
        )
    once = dataclasses.replace(METHOD, rounds=1)
    assert once.plan(turn([], number=0, samples=4))[0][0].count == 4
    few = xrpo.preset("xrpo", most_samples=5)
    refused("most_samples=5 is below the samples=8", few.plan, turn([], number=0))
    half = [[1, 0.5, 0, 0], *ROUND[1:]]
    refused(
        "response 1 has score 0.5; .* set success_threshold", METHOD.plan, turn(half)
    )
    assert xrpo.preset("xrpo", success_threshold=0.5).plan(turn(half))
    nan = records(2, [1, float("nan")])
    refused("response 1 to prompt 2 has score nan", METHOD.is_right, nan[1])
