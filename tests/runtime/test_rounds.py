"""Rounds that a planner decides on, by engines (XRPO's sheet; invariants numbered)."""

import dataclasses

import numpy as np
import optax
import pytest
from checks import same
from integer_model import VOCAB
from test_interruption import DYNAMIC, ENGINES, SETTINGS, after
from test_lm_rl import KEY, PARAMS, draw, engine, log_probs, run
from test_lm_rl import SETTINGS as SIZES

from tmdjax import rl, runtime
from tmdjax.runtime import Ask, LMState, Prompt
from tmdjax.systems import xrpo

METHOD = xrpo.preset("xrpo", first_samples=2, rule="uniform", success_threshold=0.9)
SHORT = dataclasses.replace(SETTINGS, max_new_tokens=6)


def problems(iteration, attempt):
    rng = np.random.default_rng([iteration, attempt])
    found = rng.integers(0, VOCAB, (SHORT.prompts, 3)).tolist()
    return [Prompt(tokens, tuple(tokens)) for tokens in found]


def even_last(problem, tokens):
    return float(tokens[-1] % 3 == 0)


def memory():
    """Of an iteration in which something was solved by itself."""
    rollout = runtime.collect(ENGINES[0], problems, even_last, SHORT, 5)
    solved = [
        dataclasses.replace(r, status="stop", reward=1.0, score=1.0)
        for r in rollout.records
    ]
    held = METHOD.remember(np.zeros(0, np.uint8), rollout._replace(records=solved), 5)
    assert held.size
    return held


def collect(settings=SHORT, engine=ENGINES[0], iteration=2, **options):
    given = (engine, problems, even_last, settings, iteration)
    return runtime.collect(*given, **options)


def test_a_planner_of_one_round_asks_what_is_asked_without_one():
    plain = collect()
    assert plain == collect(planner=dataclasses.replace(METHOD, rounds=1))
    assert plain.metrics["responses"] == 9
    assert plain.metrics["tokens"] == sum(map(len, plain.records))


def test_8_seeded_prompts_are_written_scored_and_told_from_the_question():
    held = memory()
    found = collect(planner=METHOD, memory=held)
    assert len(found.records) == 9
    assert sorted(r.number for r in found.records) == list(range(18, 27))
    seeded = [r for r in found.records if r.question is not None]
    assert 0 < len(seeded) and found.metrics["seeded_prompts"] > 0
    asked = [tuple(p.tokens) for p in problems(2, 0)]
    for record in found.records:
        own = asked[record.group]
        assert record.own_prompt == own and record.prompt[-3:] == own
        assert record.score == even_last(None, record.tokens)
        assert (len(record.prompt) > 3) == (record.question is not None)
        # the first round has no examples: its responses are the first six
        assert record.question is None or record.number >= 18 + 6
    first = [r for r in found.records if r.number < 24]
    solved = {r.group for r in first if r.score == 1}
    assert solved and not solved & {r.group for r in seeded}
    assert rl.unpack_records(rl.pack_records(found.records)) == found.records

    def arrays(iteration, attempt):
        return [Prompt(np.array(p.tokens), p.problem) for p in problems(2, attempt)]

    given = (ENGINES[0], arrays, even_last, SHORT, 2)
    again = runtime.collect(*given, planner=METHOD, memory=held).records
    assert rl.unpack_records(rl.pack_records(again)) == found.records


@pytest.mark.parametrize(
    "settings", [SHORT, dataclasses.replace(DYNAMIC, max_new_tokens=6)]
)
def test_a_planner_that_is_interrupted_goes_on_with_the_same_rounds(settings):
    given = {"planner": METHOD, "memory": memory(), "settings": settings}
    whole = collect(**given)
    pending, times = [], 0
    while True:
        stop = after(1 if times < 20 else 1000)
        options = {"engine": ENGINES[times % 2], "should_stop": stop}
        found, times = collect(pending=pending, **options, **given), times + 1
        if found.records:
            break
        pending = rl.unpack_records(rl.pack_records(found.pending))
    assert times > 3
    for a, b in zip(found.records, whole.records, strict=True):
        assert a == dataclasses.replace(b, segments=a.segments, log_probs=a.log_probs)
    same = [name for name in whole.metrics if not name.startswith("time/")]
    assert [found.metrics[n] for n in same] == [whole.metrics[n] for n in same]


class Wrong:
    """A planner that asks for something else than there is to write."""

    def __init__(self, *counts):
        self.counts = counts

    def plan(self, turn):
        if turn.number:
            return None
        return [Ask(n, p.tokens) for n, p in zip(self.counts, turn.prompts)], {}


def test_a_planner_must_spend_what_there_is(refused):
    for counts, message in (
        ((3, 3, 2), "asked for 8 responses to 3 prompts; it must spend .* = 9 exactly"),
        ((3, 3, 4), "asked for 10 responses"),
        ((9, 0, 0), "a response to every prompt"),
        ((3, 3), "gave 2 entries in round 0; give one Ask for each of the 3 prompts"),
        ((6, -3, 6), "count of prompt 1 in round 0=-3 must be at least 0"),
    ):
        refused(message, collect, planner=Wrong(*counts))
    message = "count of prompt 2 in round 0=3.0 is of type float"
    refused(message, collect, planner=Wrong(3, 3, 3.0), error=TypeError)


def test_6_one_round_without_sharpening_is_grpo_to_the_bit():
    plain, metrics = run(2)
    method = xrpo.preset("xrpo", rounds=1, novelty=0.0)
    state, found = run(2, objective=method)
    same(plain, state)
    assert metrics == found


ANY = xrpo.preset("xrpo", first_samples=2, novelty=0.1)


def seven(problem, tokens):
    return float(7 in tokens)


@pytest.mark.parametrize("train_prompt", ["sampled", "question"])
def test_9_seeded_responses_train_behind_their_examples_or_behind_the_question(
    train_prompt, refused
):
    """The first ratio is 1 either way; the weights of the correction tell them apart.

    A text that is trained on has room for an example and the response, 10 + 6 tokens, or
    has no example; where none is read, the engine's room decides, and 9 are enough.
    """

    def seeded(rollout):
        return [len(r.prompt) for r in rollout.records if r.question is not None]

    settings = dataclasses.replace(SIZES, train_prompt=train_prompt)
    corrected = train_prompt == "question"
    method = ANY
    if corrected:
        method = dataclasses.replace(ANY, correction="truncate", max_weight=1.5)
    optimizer = optax.sgd(0.1)
    given = (engine(), log_probs, method, optimizer, settings, draw, seven)
    iterate, shorter = (
        runtime.make_iteration(*given, length=length)  # the objective plans
        for length in (9 if corrected else 16, 15)
    )
    state = LMState.start(PARAMS, optimizer)
    for _ in range(4):
        rollout = iterate.collect(state, None, KEY)
        if found := seeded(rollout):
            assert set(found) == {10}
            assert seeded(shorter.collect(state, None, KEY)) == found * corrected
        state, metrics = iterate.learn(state, rollout, KEY)
        assert metrics["first_ratio_error"] < 1e-4
        if found:
            break
    assert metrics["seeded_prompts"] > 0
    assert state.memory.size and state.skipped == 0
    if not corrected:
        assert metrics["behaviour_log_ratio_max"] < 1e-4
        return
    assert metrics["behaviour_log_ratio_max"] > 0.01  # with examples, without them
    assert metrics["behaviour_weight"] <= 1.5
    # and what the prompts make of it is no mismatch of rollout and training
    assert 0 < metrics["mismatch_max"] < 1e-4
    uncorrected = (engine(), log_probs, ANY, optimizer, settings, draw, seven)
    message = "train_prompt='question' trains on .*correction='truncate'"
    refused(message, runtime.make_iteration, *uncorrected, length=32, planner=ANY)
