"""Collecting that is stopped in between: no token is lost, none is drawn twice."""

import dataclasses

import jax
import numpy as np
import pytest
from checks import same
from integer_model import PARAMS, VOCAB, integer_model
from test_lm_rl import ENGINE, OBJECTIVE, iteration, made
from test_lm_rl import KEY as RUN
from test_lm_rl import PARAMS as START
from test_lm_rl import SETTINGS as SIZES

from tmdjax import rl, runtime, train
from tmdjax.generation import Engine, EngineConfig
from tmdjax.runtime import LanguageSettings, Prompt

CONFIG = EngineConfig(slots=3, length=24, steps=2, prefill_rows=2, stop=(4,))
ENGINES = [
    Engine(integer_model(), PARAMS, config, jax.random.key(7), version=2)
    for config in (CONFIG, dataclasses.replace(CONFIG, slots=5, steps=3))
]
SETTINGS = LanguageSettings(prompts=3, samples=3, max_new_tokens=9, microbatch=9)
DYNAMIC = dataclasses.replace(SETTINGS, dynamic_sampling=True, overlong_buffer=3)
JUDGED = []


def draw(iteration, attempt):
    """The first problem of every batch is one that all answers solve alike."""
    rng = np.random.default_rng([iteration, attempt])
    lengths = rng.integers(1, 6, SETTINGS.prompts)
    return [
        Prompt(rng.integers(0, VOCAB, n).tolist(), i > 0) for i, n in enumerate(lengths)
    ]


def score(problem, tokens):
    JUDGED.append(tuple(tokens))
    return float(np.mean(tokens)) / VOCAB if problem else 0.5


def collect(settings, engine=ENGINES[0], **options):
    """A rollout, how many tokens were drawn for it, and what was judged."""
    JUDGED.clear()
    before = engine.counts["drawn"]
    found = runtime.collect(engine, draw, score, settings, 2, **options)
    assert not engine.active and not engine.queued
    return found, engine.counts["drawn"] - before, sorted(JUDGED)


def after(chunks):
    """False so often, then True."""
    asked = iter([False] * chunks)
    return lambda: next(asked, True)


@pytest.mark.parametrize("settings", [SETTINGS, DYNAMIC])
@pytest.mark.parametrize("chunks", [0, 1, 4])
def test_interrupted_again_and_again_it_is_the_same_rollout(settings, chunks):
    """By two engines of unlike sizes in turn, some chunks each."""
    whole, count, judged = collect(settings)
    drawn, seen, pending, times = 0, [], [], 0
    while True:
        stop = after(chunks if times < (20 if chunks else 2) else 1000)
        options = {"engine": ENGINES[times % 2], "should_stop": stop}
        found, more, heard = collect(settings, pending=pending, **options)
        drawn, seen, times = drawn + more, seen + heard, times + 1
        if found.records:
            break
        pending = rl.unpack_records(rl.pack_records(found.pending))
        assert pending == found.pending and sum(map(len, pending)) == drawn
        assert len({r.number for r in pending}) == len(pending) >= 9
    assert times > 2 and drawn == count and sorted(seen) == judged
    assert found.problems == whole.problems and found.metrics == whole.metrics
    for a, b in zip(found.records, whole.records, strict=True):
        a.check()
        assert a == dataclasses.replace(b, segments=a.segments, log_probs=a.log_probs)
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-6)
    assert max(r.segments for r in found.records) > 1


def test_what_cannot_be_gone_on_with(refused):
    pending = collect(SETTINGS, should_stop=after(1))[0].pending
    given = (ENGINES[0], draw, score, SETTINGS)
    message = "pending response 18 is none of iteration 3, .* are 27 to 35"
    refused(message, runtime.collect, *given, 3, pending=pending)
    other = lambda *which: draw(*which)[::-1]  # noqa: E731
    given = (ENGINES[0], other, score, SETTINGS)
    refused("but the draw now gives", runtime.collect, *given, 2, pending=pending)


def test_a_run_that_is_stopped_within_an_iteration_goes_on_from_its_checkpoint(
    tmp_path,
):
    settings = dataclasses.replace(SIZES, minibatches=2)
    whole, optimizer = iteration(OBJECTIVE, settings)

    def fit(iterate, **options):
        rows = []
        note = lambda step, row: rows.append(row)  # noqa: E731
        state, data = iterate.init(START), train.NoData()
        given = {"key": RUN, "num_steps": 3, "log_every": 1, "on_metrics": note}
        return train.fit(state, iterate, data, **given, **options), rows

    expected, rows = fit(whole)
    stopped = made(OBJECTIVE, optimizer, settings, should_stop=after(7))
    checkpoints = train.Checkpoints(tmp_path)
    first, early = fit(stopped, checkpoints=checkpoints)
    assert not first.finished and len(early) == first.state.iteration > 0
    under_way = rl.unpack_records(first.state.pending)
    assert any(r.tokens and not r.finished for r in under_way)
    # a new process: arrays from the disk, an engine of another past
    ENGINE.update_weights(START, 40)
    second, late = fit(whole, checkpoints=checkpoints)
    assert second.finished and not second.state.pending.size
    # what a prefix leaves in the cache is rounded otherwise when it is read anew
    same(second.state, expected.state, atol=1e-4)
    for a, b in zip(early + late, rows, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
        for name in ("score", "length_median", "length_max", "staleness_max"):
            assert a[name] == b[name]


def test_what_a_rollout_leaves_over_stands_in_the_next_state():
    iterate, _ = iteration(OBJECTIVE, dataclasses.replace(SIZES, minibatches=2))
    state = iterate.init(START)
    rollout = iterate.collect(state, None, RUN)
    left = [dataclasses.replace(r, status="aborted") for r in rollout.records[:2]]
    state, _ = iterate.learn(state, rollout._replace(pending=left), RUN)
    assert rl.unpack_records(state.pending) == left and state.iteration == 1
