"""Writing and training side by side: the synchronous loop, kills, and what is refused.

Where nothing else is said, texts have lengths and no content, and a learner without a
network remembers which tokens of which weights it was given.
"""

import dataclasses
import functools
import logging
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import same
from test_quantised_rollouts import (
    KEY,
    PARAMS,
    SETTINGS,
    UNIFIED,
    draw,
    engine_of,
    log_probs,
    low,
    made,
    published,
)

from tmdjax import harness, quant, rl, runtime, train
from tmdjax.harness.stages import StageContext
from tmdjax.runtime import LanguageSettings, LMState, Prompt, Schedule, SimulatedEngine
from tmdjax.runtime.events import read_events, staleness
from tmdjax.runtime.executors import Costs, Message, Simulated, Threads
from tmdjax.runtime.learner import Learner
from tmdjax.runtime.publishing import apart
from tmdjax.systems import grpo, xrpo

SGD = optax.sgd(0.0)
SIZES = LanguageSettings(prompts=4, samples=2, max_new_tokens=400, microbatch=8)
LAGGED = Schedule(
    batch=4, samples=2, max_new_tokens=400, updates=6, eta=2, slots=8, ahead=None
)
BIGRAMS = Schedule(batch=2, samples=4, max_new_tokens=6, updates=3, slots=8)


def clock(learn=0.05):
    decode = {"slot_steps": 0.1, "drawn": 0.02, "prefilled": 1e-3}
    weights = {"prefilled": 1e-3}
    return Simulated(
        Costs(
            {
                "decode": decode,
                "weights": weights,
                "learn": {"tokens": learn},
                "judge": {},
            }
        )
    )


def learner_of_bigrams():
    """The learner of ``made(UNIFIED, 3.0, proximal='behaviour')``."""
    return runtime.make_learner(
        functools.partial(log_probs, UNIFIED.train),
        grpo.preset("grpo"),
        optax.sgd(3.0),
        dataclasses.replace(SETTINGS, proximal="behaviour"),
        length=16,
        generation_params=functools.partial(published, recipe=UNIFIED.rollout),
        precision=UNIFIED,
        exact=False,
    )


def bigrams(number):
    engine = engine_of(UNIFIED)
    engine.abort()
    return engine


def test_areal_1_eta_0_is_the_synchronous_iteration_to_the_bit():
    iterate, state = made(UNIFIED, 3.0, proximal="behaviour")
    bigrams(0)
    expected = []
    for _ in range(3):
        state, metrics = iterate(state, None, KEY)
        expected.append(metrics)
    learner, rows = learner_of_bigrams(), []
    found, finished = runtime.fit_asynchronously(
        learner.init(PARAMS),
        learner,
        bigrams,
        draw,
        low,
        BIGRAMS,
        key=KEY,
        executor=clock(),
        on_metrics=lambda step, row: rows.append(row),
    )
    assert finished
    same(found, state)
    for row, metrics in zip(rows, expected, strict=True):
        assert metrics.pop("groups_left_out") == 0 and row.pop("skipped") == 0
        assert row == metrics and row["first_ratio_error"] < 1e-5
    assert all(0 < row["quantised_moved"] < 1 for row in rows)


def test_no_update_touches_what_generators_hold(tmp_path):
    learner = learner_of_bigrams()
    state = learner.init(PARAMS)
    rollout = made(UNIFIED, proximal="behaviour")[0].collect(state, None, KEY)
    shared = learner.publish(state)
    held = apart(shared, state)
    values = jax.device_get(held)
    prepared = [jax.tree.leaves(tree["kernel"]) for tree in (shared, held)]
    assert all(a is b for a, b in zip(*prepared, strict=True))  # no copies of these
    state, _ = learner.learn(state, rollout.records, KEY)
    assert shared["table"].is_deleted()
    same(held, values)
    # generators write on with them while the trainer updates
    rows = []
    state, finished = runtime.fit_asynchronously(
        learner.init(PARAMS),
        learner,
        bigrams,
        draw,
        low,
        dataclasses.replace(BIGRAMS, updates=6, eta=2),
        key=KEY,
        executor=Threads(longest_step=60),
        folder=tmp_path,
        checkpoints=train.Checkpoints(tmp_path / "checkpoints"),
        checkpoint_every=4,
        on_metrics=lambda step, row: rows.append((step, row)),
    )
    assert train.Checkpoints(tmp_path / "checkpoints").steps() == [4, 6]
    assert finished and [step for step, _ in rows] == list(range(1, 7))
    assert max(row["staleness_max"] for _, row in rows) <= 2
    events = read_events(tmp_path / "events_000.jsonl")
    assert staleness(events).keys() <= {0, 1, 2}
    trained = [n for e in events if e.what == "learn" for n in e.requests]
    assert len(trained) == len(set(trained)) == 6 * 8
    assert not engine_of(UNIFIED)._params["table"].is_deleted()


def test_what_holds_under_equal_weights_is_said_of_those_alone(refused):
    learner = learner_of_bigrams()
    bigrams(0)
    state = learner.init(PARAMS)
    rollout = made(UNIFIED, proximal="behaviour")[0].collect(state, None, KEY)
    moved = {**PARAMS, "kernel": 1.5 * PARAMS["kernel"]}

    def learned(records):
        later = dataclasses.replace(learner.init(moved), iteration=jnp.int32(1))
        return learner.learn(later, records, KEY)[1]

    # weights of version 1 are others than those that wrote: a first ratio far from 1
    stale = learned(rollout.records)
    assert stale["ratio_error_max"] > 0.1
    assert not {"first_ratio_error", "mismatch_kl", "mismatch_max"} & stale.keys()
    pretended = [dataclasses.replace(r, versions=[1] * len(r)) for r in rollout.records]
    refused("on the first minibatch", learned, pretended, error=rl.RatioError)
    # of a mixture with what the weights wrote, only these are compared
    half = [a if a.group else b for a, b in zip(rollout.records, pretended)]
    found = learned(half)
    assert found["mismatch_kl"] > 1e-3 and "first_ratio_error" not in found
    late = [dataclasses.replace(r, versions=[2] * len(r)) for r in rollout.records]
    refused("tokens of weights of version 2, but the state is of version 1",
            learned, late)  # fmt: skip


class Killed(BaseException):
    pass


def lengths(number):
    rng = np.random.default_rng([4, number])
    return int(np.clip(np.exp(rng.normal(3.0, 1.0)), 1, 400))


def prompts(iteration, attempt):
    assert attempt == 0
    return [Prompt([1, 2, 3], (iteration, i)) for i in range(4)]


def score(problem, tokens):
    return float(len(tokens) % 3)


def remembering(seen=None, settings=SIZES):
    """A learner whose parameter follows from every token that it was given."""

    def learn(state, records, key):
        told = [(r.number, r.group, tuple(r.versions), r.reward) for r in records]
        if seen is not None:
            seen[int(state.iteration)] = told
        value = 0.5 * state.learner.params["w"] + zlib.crc32(repr(told).encode()) % 997
        trained = dataclasses.replace(state.learner, params={"w": value})
        state = dataclasses.replace(
            state, iteration=state.iteration + 1, learner=trained
        )
        return state, {"w": float(value)}

    return Learner(
        objective=grpo.preset("grpo"),
        settings=settings,
        length=1000,
        init=lambda params: LMState.start(params, SGD),
        learn=learn,
        publish=lambda state: state.learner.params,
    )


def fit(schedule=LAGGED, *, seen=None, learn=0.05, length_of=lengths, **options):
    learner = remembering(seen)
    state = learner.init({"w": jnp.zeros(())})

    def engine(number):
        return SimulatedEngine(length_of, slots=8, steps=16)

    options = {"executor": clock(learn), "generators": 2, "scorers": 2} | options
    given = (state, learner, engine, prompts, score, schedule)
    return runtime.fit_asynchronously(*given, **{"key": KEY, **options})


def account(folder):
    with runtime.TrajectoryStore(folder) as store:
        return store.select()


def consumed(rows):
    return {t.number: t.version for t in rows if t.state == "consumed"}


def test_killed_between_updates_and_gone_on_with_it_is_the_unbroken_run(tmp_path):
    """Where training is the slow part: all that eta allows is written meanwhile."""
    whole, rows = {}, {}

    def kept(step, row, kills=()):
        rows[step] = row
        if kills and step == kills[0]:
            kills.pop(0)
            raise Killed

    state, _ = fit(seen=whole, learn=5.0, on_metrics=kept)
    assert {v for told in whole.values() for r in told for v in r[2]} > {0, 1}
    expected, rows, kills, starts = dict(rows), {}, [1, 3, 4], []
    told: dict = {}

    def resumed(step):
        starts.append(step)
        for later in [s for s in rows if s > step]:
            del rows[later]

    def go_on(**changes):
        return fit(
            dataclasses.replace(LAGGED, **changes),
            seen=told,
            learn=5.0,
            folder=tmp_path,
            checkpoints=train.Checkpoints(tmp_path / "checkpoints"),
            checkpoint_every=2,
            on_metrics=functools.partial(kept, kills=kills),
            on_resume=resumed,
        )

    while kills:
        with pytest.raises(Killed):
            go_on()
    for _ in range(2):  # once it is over it tells the last row again
        found, finished = go_on()
        assert finished and told == whole and rows == expected
        same(found, state)
    assert starts == [0, 0, 2, 2, 5]
    again = account(tmp_path)
    assert consumed(again) == {r[0]: v for v, told in whole.items() for r in told}
    assert len(list(tmp_path.glob("events_*.jsonl"))) == 4
    # of what was trained on before the oldest checkpoint nothing is kept but the account
    oldest = train.Checkpoints(tmp_path / "checkpoints").steps()[0]
    assert oldest == 4
    with runtime.TrajectoryStore(tmp_path) as store:
        for number, version in consumed(again).items():
            if version < oldest:
                with pytest.raises(ValueError, match="has no arrays"):
                    store.arrays(number)
            else:
                assert store.arrays(number)["record"].size
    with pytest.raises(ValueError, match="updates=5, but the weights are of version 6"):
        go_on(updates=5)


def test_killed_while_it_writes_nothing_is_trained_on_twice(tmp_path):
    rng, told, begun = np.random.default_rng(0), {}, []
    checkpoints = train.Checkpoints(tmp_path / "checkpoints")
    while True:
        left = int(rng.integers(12, 40)) if len(begun) < 4 else 10**9

        def length_of(number):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return lengths(number)

        try:
            _, finished = fit(
                seen=told,
                length_of=length_of,
                folder=tmp_path,
                checkpoints=checkpoints,
                on_resume=begun.append,
            )
            break
        except Killed:
            continue
    assert finished and begun == [0, 2, 4]
    rows = account(tmp_path)
    trained = {number: v for v, each in told.items() for number, *_ in each}
    assert consumed(rows) == trained and len(trained) == 6 * 8
    assert max(v - w for v, each in told.items() for r in each for w in r[2]) in (1, 2)


def test_stopped_it_goes_on_with_all_that_was_written(tmp_path):
    asked, begun = iter([False] * 40), []
    given = {"folder": tmp_path, "on_resume": begun.append}
    given["checkpoints"] = train.Checkpoints(tmp_path / "checkpoints")
    state, finished = fit(should_stop=lambda: next(asked, True), **given)
    left = account(tmp_path)
    part = [t for t in left if t.state == "running"]
    assert not finished and 0 < state.iteration < 6 and part
    state, finished = fit(**given)
    assert finished and begun[1] == len({*consumed(left).values()}) < 6
    rows = {t.number: t for t in account(tmp_path)}
    assert len(consumed(rows.values())) == 6 * 8
    went_on = [t for t in part if rows[t.number].state != "discarded"]
    assert went_on
    for t in went_on:  # to the token
        assert rows[t.number].spans[: len(t.spans) - 1] == t.spans[:-1]
        assert rows[t.number].length > t.length


def test_workers_may_live_in_other_processes(tmp_path):
    """They are moved there as they are made: of what the caller has, by copies."""
    cloudpickle = pytest.importorskip("cloudpickle")

    class Elsewhere:
        def run(self, workers, log, **options):
            moved = cloudpickle.loads(cloudpickle.dumps(workers))
            return clock().run(moved, log, **options)

    state, _ = fit()
    given = {"executor": Elsewhere(), "folder": tmp_path}
    checkpoints = train.Checkpoints(tmp_path / "checkpoints")
    found, finished = fit(checkpoints=checkpoints, checkpoint_every=5, **given)
    assert finished and checkpoints.steps() == [5, 6]
    same(found, state)
    with pytest.raises(RuntimeError, match="in another process and saved nothing"):
        fit(executor=Elsewhere())
    learner = cloudpickle.loads(cloudpickle.dumps(learner_of_bigrams()))
    assert learner.settings.proximal == "behaviour"  # its programs travel too
    own = quant.rounding_recipe("own", "float32")  # registered nowhere
    pair = cloudpickle.loads(cloudpickle.dumps({"known": UNIFIED.train, "own": own}))
    assert pair["known"] is UNIFIED.train and pair["own"].dtype == own.dtype


def test_a_stage_runs_it_with_rows_checkpoints_and_pauses(tmp_path):
    def stage(stops):
        asked = iter([False] * stops)
        context = StageContext("rl", 0, {}, tmp_path, lambda: next(asked, True))
        learner = remembering()
        loop = functools.partial(
            runtime.fit_asynchronously,
            learner.init({"w": jnp.zeros(())}),
            learner,
            lambda number: SimulatedEngine(lengths, slots=8, steps=16),
            prompts,
            score,
            LAGGED,
            executor=clock(),
            folder=tmp_path / "trajectories",
        )
        return context, functools.partial(context.run_loop, loop, num_steps=6)

    context, run = stage(40)
    with pytest.raises(harness.stages.Paused):
        run()
    early = context.rows()
    assert 0 < len(early) < 6
    context, run = stage(10**6)
    state = run()
    rows = context.rows()
    assert [row["step"] for row in rows] == list(range(1, 7)) and rows[
        : len(early)
    ] == early
    assert rows[-1]["w"] == state.learner.params["w"] and state.iteration == 6
    assert {"score", "length_median", "staleness_max", "skipped"} <= rows[-1].keys()
    with pytest.raises(RuntimeError, match="trains a second time"):
        run()


def test_a_scorer_that_hangs_costs_one_response(tmp_path):
    """And groups whose scores are equal may be passed over."""

    def slow(problem, tokens):
        if problem == (0, 1):
            time.sleep(1.0)
        return float(len(tokens) % 2) if problem[1] else 0.0

    settings = dataclasses.replace(SIZES, score_timeout=0.2, dynamic_sampling=True)
    seen = {}
    learner = remembering(seen, settings)
    runtime.fit_asynchronously(
        learner.init({"w": jnp.zeros(())}),
        learner,
        lambda number: SimulatedEngine(lambda n: 1 + n % 2, slots=8, steps=16),
        prompts,
        slow,
        dataclasses.replace(LAGGED, updates=1),
        key=KEY,
        executor=clock(),
        folder=tmp_path,
    )
    rows = account(tmp_path)
    reasons = {t.number: t.reason for t in rows if t.state == "discarded"}
    assert {0, 1} <= reasons.keys() and reasons[0] == "not accepted"
    assert all("did not answer within 0.2 s" in reasons[n] for n in (2, 3))
    trained = {r[0] // 2 for r in seen[0]}
    assert len(trained) == 4 and not any(group % 4 == 0 for group in trained)


def test_a_group_that_lost_too_many_responses_gives_its_place():
    """Group g loses g % 4 of 4; at least two are left, and all minibatches are full."""

    def length_of(number):
        return 1 if number % 4 < number // 4 % 4 else 3

    def fails(problem, tokens):
        assert len(tokens) > 1
        return float(len(tokens))

    sizes = {"samples": 4, "microbatch": 1}
    for minibatches, expected in ((1, {2, 3, 4}), (16, {4})):
        settings = dataclasses.replace(SIZES, minibatches=minibatches, **sizes)
        seen = {}
        learner = remembering(seen, settings)
        _, finished = runtime.fit_asynchronously(
            learner.init({"w": jnp.zeros(())}),
            learner,
            lambda number: SimulatedEngine(length_of, slots=8, steps=16),
            prompts,
            fails,
            dataclasses.replace(LAGGED, samples=4),
            key=KEY,
            executor=clock(),
        )
        assert finished and len(seen) == 6
        found = [np.bincount([r[1] for r in told]) for told in seen.values()]
        assert {len(counts) for counts in found} == {4}
        assert {n for counts in found for n in counts} == expected


def test_what_does_not_fit_together_is_refused(refused, caplog, tmp_path):
    changed = functools.partial(dataclasses.replace, LAGGED)
    for message, schedule in (
        ("batch=3, but the settings of the learner have prompts=4", changed(batch=3)),
        ("samples=3, but", changed(samples=3)),
        ("max_new_tokens=90, but", changed(max_new_tokens=90)),
        ("max_lag=2, but .* max_lag=inf; make", changed(on_stale="mask")),
    ):
        refused(message, fit, schedule)
    refused("generators=0 must be at least 1", fit, generators=0)
    refused("scorers=0 must be at least 1", fit, scorers=0)
    refused("checkpoint_every=0 must be", fit, checkpoint_every=0)
    message = "the trainer has waited .* for a batch, longer than longest_wait=1;"
    refused(message, fit, longest_wait=1, error=RuntimeError)
    error = train.NonFiniteError
    refused("consecutive updates up to step 1", fit, max_skipped=0, error=error)
    store = train.Checkpoints(tmp_path)
    refused("checkpoints without folder=", fit, checkpoints=store)

    def other(state=None, **changes):
        learner = dataclasses.replace(remembering(), **changes)
        state = state or learner.init({"w": jnp.zeros(())})
        given = (state, learner, None, prompts, score, LAGGED)
        return runtime.fit_asynchronously(*given, key=KEY)

    refused("max_new_tokens=400 leaves no room for a prompt", other, length=400)
    refused("3 rounds, more than rounds=1", other, objective=xrpo.preset("xrpo"))
    state = remembering().init({"w": jnp.zeros(())})
    pending = dataclasses.replace(state, pending=np.zeros(3, np.uint8))
    refused("stopped while it collected", other, pending)
    short = lambda *which: prompts(*which)[:3]  # noqa: E731
    learner = remembering()
    engine = lambda number: SimulatedEngine(lengths, slots=8, steps=16)  # noqa: E731
    given = (learner.init({"w": jnp.zeros(())}), learner, engine, short, score, LAGGED)
    message = "the draw gave 3 prompts; the schedule has batch=4"
    refused(message, runtime.fit_asynchronously, *given, key=KEY, executor=clock())
    settings = dataclasses.replace(SIZES, dynamic_sampling=True, max_attempts=3)
    learner = remembering(None, settings)
    equal = (prompts, lambda problem, tokens: 1.0, LAGGED)
    given = (learner.init({"w": jnp.zeros(())}), learner, engine, *equal)
    options = {"key": KEY, "executor": clock(), "error": RuntimeError}
    refused("max_rejected=12 groups", runtime.fit_asynchronously, *given, **options)
    # engines that could not be trained on are refused where they are made
    learner = dataclasses.replace(learner_of_bigrams(), length=17)
    given = (learner.init(PARAMS), learner, bigrams, draw, low, BIGRAMS)
    message = "length=17 is above the 16 of the engine's"
    refused(message, runtime.fit_asynchronously, *given, key=KEY, executor=clock())
    with caplog.at_level(logging.WARNING):
        fit(changed(updates=1, eta=0, slots=9))
    assert "the schedule lets 8 responses be ahead of training" in caplog.text
    assert "generators=2 with slots=9 have place for 18" in caplog.text


def test_weights_of_another_layout_name_the_first_paths(refused):
    generator = runtime.Generator(SimulatedEngine(lengths, slots=1, steps=1))
    recipe = quant.RECIPES["fp8_block"]
    weights = {"a": jnp.zeros((2, 3)), "b": {"c": recipe.prepare(np.ones((128, 2)))}}

    def take(weights, version):
        return generator(Message("control", version, "weights", (weights, version)))

    assert take(weights, 0).what == take(weights, 1).what == "weights"
    message = r"version 2 are another tree .*a float32\[2, 3\]; a float32\[3, 2\]"
    refused(message, take, weights | {"a": jnp.zeros((3, 2))}, 2)
    refused("b/c", take, weights | {"b": {"c": jnp.ones((128, 2))}}, 2)
