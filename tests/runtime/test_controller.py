"""The controller: how stale, how often, how fast; numbers are those of the sheets.

Texts have lengths and no content, but in the test that uses the real engine.
"""

import collections
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from integer_model import VOCAB, integer_model
from simulated_runs import SLOTS, conserved, costs, flat, lognormal, run

from tmdjax import runtime
from tmdjax.generation import Engine, EngineConfig
from tmdjax.rl import TokenRecord
from tmdjax.runtime import LanguageSettings, Prompt, TrajectoryStore
from tmdjax.runtime.control import Controller
from tmdjax.runtime.events import staleness, total, utilisation
from tmdjax.runtime.executors import (
    Costs,
    Message,
    Simulated,
    Threads,
    WorkerDiedError,
)
from tmdjax.runtime.roles import Generator, Judged, Scorer, Trainer
from tmdjax.runtime.schedule import Schedule
from tmdjax.runtime.simulated_engine import SimulatedEngine
from tmdjax.runtime.trajectories import STATES
from tmdjax.runtime.watchdog import Watchdog

SYNC = Schedule(batch=4, samples=2, max_new_tokens=400, updates=6, slots=SLOTS)
ASYNC = dataclasses.replace(SYNC, eta=2)
PARTIAL = dataclasses.replace(SYNC, eta=math.inf, ahead=8, when_full="resume")


def test_areal_1_eta_0_is_the_synchronous_loop_to_the_bit():
    """With the engine that language models use, and weights that change."""
    settings = LanguageSettings(prompts=3, samples=3, max_new_tokens=9, microbatch=9)
    config = EngineConfig(slots=3, length=24, steps=2, prefill_rows=2, stop=(4,))

    def params(version):
        return {"salt": jnp.int32(5 + version)}

    def draw(iteration, attempt):
        rng = np.random.default_rng([iteration, attempt])
        sizes = rng.integers(1, 6, settings.prompts)
        return [Prompt(rng.integers(0, VOCAB, n).tolist(), None) for n in sizes]

    def score(problem, tokens):
        return float(np.mean(tokens))

    engine = Engine(integer_model(), params(0), config, jax.random.key(7))
    expected = []
    for version in range(3):
        engine.update_weights(params(version), version)
        before = engine.counts.copy()
        found = runtime.collect(engine, draw, score, settings, version)
        # an engine without a model, of the same lengths, counts the same
        lengths = {r.number: len(r) for r in found.records}
        without = SimulatedEngine(lengths.get, slots=3, steps=2)
        for r in found.records:
            blank = TokenRecord(
                number=r.number, group=0, prompt=r.prompt, status="aborted"
            )
            without.resume(blank, max_new_tokens=9)
        while without.active or without.queued:
            without.advance()
        for name in ("chunks", "slot_steps", "drawn"):
            assert without.counts[name] == engine.counts[name] - before[name]
        expected.append([dataclasses.replace(r, group=0) for r in found.records])

    batches, events = [], []
    schedule = Schedule(batch=3, samples=3, max_new_tokens=9, updates=3)
    control = Controller(
        schedule,
        TrajectoryStore(None),
        lambda group: draw(group // 3, 0)[group % 3],
        ["generate"],
        ["reward"],
    )
    workers = {
        "control": lambda: control,
        "generate": lambda: Generator(engine),
        "reward": lambda: Scorer(lambda r, p: (score(p, r.tokens),) * 2),
        "train": lambda: Trainer(
            lambda: params(len(batches)), lambda batch: batches.append(batch) or {}
        ),
    }
    Simulated(costs()).run(workers, events.append)
    records = [
        [r for group in batch.groups for r in group.records] for batch in batches
    ]
    assert [
        [dataclasses.replace(r, group=0) for r in each] for each in records
    ] == expected
    assert staleness(events) == {0: sum(len(r) for each in expected for r in each)}


def test_areal_2_eta_0_takes_turns():
    found = run(SYNC)
    conserved(found, SYNC)
    for v, numbers in enumerate(found.numbers):
        assert numbers == list(range(8 * v, 8 * v + 8))
    assert found.worst_lag == 0
    learn = [(e.begin, e.end) for e in found.events if e.what == "learn"]
    decode = [(e.begin, e.end) for e in found.events if e.what == "decode"]
    assert all(a <= c or d <= b for b, a in learn for c, d in decode)
    usage = utilisation(found.events)
    assert usage["generate"].waits["throttled"] > 0
    assert usage["train"].waits["straggler"] > 0
    assert set(usage["train"].waits) <= {
        "start",
        "batch not full",
        "straggler",
        "scores",
        "end",
    }


@pytest.mark.parametrize("eta", [1, 2, 4])
def test_areal_3_no_token_is_older_than_eta_whatever_straggles(eta):
    """Request 5 never ends; it is dropped once it could only come too late."""
    for seed in range(6):
        rng = np.random.default_rng([seed, eta])
        own = lognormal(1.0, seed)

        def lengths(number, own=own):
            return 10**6 if number == 5 else own(number)

        schedule = dataclasses.replace(
            SYNC,
            eta=eta,
            updates=8,
            max_new_tokens=10**7,
            slots=int(rng.integers(1, 9)),
        )
        found = run(
            schedule,
            lengths=lengths,
            generators=int(rng.integers(1, 4)),
            learn_cost=float(rng.uniform(0, 0.5)),
            interruptible=True,
        )
        conserved(found, schedule)
        assert len(found.batches) == 8 and found.worst_lag <= eta
        assert found.store.get(5).reason == "stale"
        assert max(staleness(found.events)) == found.worst_lag
        for e in found.events:  # the bound at submission
            if e.worker == "control" and e.version is not None:
                groups = e.notes["groups"]
                trained = schedule.batch * (e.version + ("batch" in e.what))
                most = (eta + 1 + e.version) * schedule.batch
                assert trained + groups["open"] + groups["complete"] <= most


def test_areal_c1_asynchrony_pays_and_most_where_lengths_have_a_long_tail():
    """Four devices: all of them for each phase in turn, or three to write and one to train."""
    seconds = {}
    for sigma in (0.0, 1.0):
        given = {"lengths": lognormal(sigma)}
        schedule = dataclasses.replace(SYNC, batch=16, updates=8)
        sync = run(schedule, generators=4, learn_cost=0.03 / 4, **given)
        overlap = dataclasses.replace(schedule, eta=1)
        one = run(overlap, generators=3, learn_cost=0.03, interruptible=False, **given)
        free = dataclasses.replace(schedule, eta=4)
        some = run(free, generators=3, learn_cost=0.03, **given)
        assert sync.tokens > 0 and {len(r.batches) for r in (sync, one, some)} == {8}
        seconds[sigma] = [r.seconds for r in (sync, one, some)]
    sync, one, some = seconds[1.0]
    assert some < one < sync and sync / some >= 1.5
    even = seconds[0.0]
    assert even[0] / even[2] < sync / some


def test_areal_c2_interruptible_generation_writes_more():
    rates, batch_at = [], []
    for interruptible in (True, False):
        given = {"lengths": lognormal(1.0), "interruptible": interruptible}
        found = run(dataclasses.replace(SYNC, eta=4, updates=8), **given)
        rates.append(total(found.events, "decode", "drawn") / found.seconds)
        # where weights never change there is nothing to interrupt
        once = run(dataclasses.replace(SYNC, batch=16, updates=1), **given)
        batch_at += [e.end for e in once.events if e.what == "batch"]
    assert rates[0] > 1.05 * rates[1]
    assert len(batch_at) == 2 and batch_at[0] == batch_at[1]


def test_april_1_without_more_than_a_batch_it_is_the_synchronous_loop():
    alike = dataclasses.replace(PARTIAL, ahead=PARTIAL.batch)
    sync, found = run(SYNC), run(alike)
    assert found.numbers == sync.numbers and found.seconds == sync.seconds
    assert found.store.counts()["running"] == 0


def test_april_2_3_4_5_8_partial_rollouts_lose_no_token_and_repeat_none():
    for seed in range(6):
        schedule = dataclasses.replace(PARTIAL, ahead=4 + 3 * seed, updates=12)
        found = run(schedule, lengths=lognormal(1.0, seed))
        conserved(found, schedule)
        aside = [t for t in found.store.select() if t.state in STATES[:4]]
        assert not {t.group for t in aside} & {r.group for r in found.records}
        # never more than were over-provisioned, so a full buffer admits nobody
        assert len({t.group for t in aside}) <= schedule.ahead - schedule.batch
        for batch in found.batches:
            for group in batch.groups:
                for r in group.records:
                    assert r.versions == sorted(r.versions)
                    assert len(r) == lognormal(1.0, seed)(r.number)
                    assert len(set(r.versions)) <= r.segments  # rounds it lived
        assert (found.worst_lag > 0) == (seed > 0)
        if seed == 2:  # in turns: how long training takes changes nothing
            given = {"lengths": lognormal(1.0, seed), "learn_cost": 0.0}
            assert run(schedule, **given).batches == found.batches


def test_april_11_a_round_lasts_as_long_as_its_nth_group():
    """With room for all and a second a step, in closed form."""
    lengths = lognormal(1.0, 3)
    ends = sorted(max(lengths(2 * g), lengths(2 * g + 1)) for g in range(8))
    steps = Costs({"decode": {"chunks": 1.0}, "weights": {}, "learn": {}, "judge": {}})
    given = {
        "lengths": lengths,
        "generators": 1,
        "slots": 99,
        "steps": 1,
        "executor": Simulated(steps),
    }
    first = run(dataclasses.replace(PARTIAL, updates=1, slots=99), **given)
    # one chunk is under way while the last message comes and the abort goes
    assert first.seconds - ends[3] in (0, 1)
    sync = run(dataclasses.replace(SYNC, updates=1, slots=99), **given)
    assert sync.seconds == max(
        max(lengths(2 * g), lengths(2 * g + 1)) for g in range(4)
    )
    assert first.seconds <= sync.seconds + 1


def test_april_12_a_group_that_ends_beside_the_last_one_trains_next():
    schedule = dataclasses.replace(PARTIAL, updates=2, slots=16)
    found = run(schedule, lengths=lambda number: 10, generators=1, slots=16)
    assert found.numbers == [list(range(8)), list(range(8, 16))]
    assert {r.versions[0] for r in found.batches[1].groups[0].records} == {0}
    assert found.store.get(8).state == "consumed"


def throughput(found):
    return found.tokens / found.seconds


def test_april_c1_and_c4_gain_grows_with_the_tail_and_staleness_with_the_surplus():
    gains, lengths = {}, {}
    for sigma in (0.0, 0.3, 0.65, 1.0):
        # as many slots as a batch has responses: more of them wait
        given = {"lengths": lognormal(sigma, 1), "learn_cost": 0.0, "slots": 4}
        long = {"updates": 20, "slots": 4}
        sync = run(dataclasses.replace(SYNC, **long), **given)
        found = run(dataclasses.replace(PARTIAL, **long), **given)
        thrown = dataclasses.replace(SYNC, ahead=8, when_full="discard", **long)
        thrown = run(thrown, **given)
        gains[sigma] = throughput(found) / throughput(sync)
        lengths[sigma] = [r.tokens / len(r.records) for r in (sync, found, thrown)]
    assert 0.98 <= gains[0.0] <= 1.02
    assert 1 < gains[0.3] < gains[0.65] < gains[1.0]
    # 7: the first to end are short; those that are kept come back
    sync, kept, thrown = lengths[1.0]
    assert thrown < 0.8 * sync < kept
    shares = []
    for ahead in (4, 8, 16):
        found = run(
            dataclasses.replace(PARTIAL, ahead=ahead, updates=20),
            lengths=lognormal(1.0, 1),
        )
        by_lag = staleness(found.events)
        shares.append(1 - by_lag[0] / sum(by_lag.values()))
    assert shares[0] == 0 < shares[1] < shares[2]


@pytest.mark.parametrize("schedule", [SYNC, ASYNC, PARTIAL])
def test_a_trace_of_threads_trains_on_the_same_under_the_virtual_clock(schedule):
    schedule = dataclasses.replace(schedule, updates=4)
    rng = np.random.default_rng(0)
    given = {"lengths": lognormal(1.0, 2), "steps": 16}
    live = run(schedule, executor=Threads(), jitter=rng, **given)
    conserved(live, schedule)
    again = run(schedule, order=live.events, **given)
    assert again.batches == live.batches
    simulated = run(schedule, **given)
    threads = run(
        schedule, executor=Threads(), jitter=rng, order=simulated.events, **given
    )
    assert threads.batches == simulated.batches


class Killed(BaseException):
    pass


@pytest.mark.parametrize("schedule", [SYNC, ASYNC, PARTIAL])
def test_killed_and_restored_nothing_is_lost_and_nothing_trained_twice(
    schedule, tmp_path
):
    """Checkpoints of every second version; in turns, the same run as without a kill."""
    schedule = dataclasses.replace(schedule, updates=6)
    given = {"lengths": lognormal(1.0, 4), "steps": 16}
    whole = run(schedule, **given)
    rng = np.random.default_rng(0)
    for attempt in range(2):
        folder, version, kept, kills = tmp_path / str(attempt), 0, [], 0
        while True:
            left = int(rng.integers(5, len(whole.events) // 2)) if kills < 3 else 10**9

            def log(event):
                nonlocal left, reached
                left -= 1
                if left < 0:
                    raise Killed
                reached += event.what == "learn"

            batches, reached = [], version
            with TrajectoryStore(folder) as store:
                store.restore(version)
                try:
                    found = run(
                        schedule,
                        store=store,
                        version=version,
                        log=log,
                        learned=batches.append,
                        **given,
                    )
                except Killed:
                    kills += 1
                    saved = max(version, reached - reached % 2)
                    kept += batches[: saved - version]
                    version = saved
                    continue
                kept += batches
                rows = store.select()
                break
        assert found.worst_lag <= schedule.eta and kills == 3
        numbers = [[r.number for g in b.groups for r in g.records] for b in kept]
        assert [b.version for b in kept] == list(range(6))
        consumed = {t.number: t.version for t in rows if t.state == "consumed"}
        assert consumed == {n: v for v, each in enumerate(numbers) for n in each}
        assert sum(map(len, numbers)) == len(consumed) == 6 * 4 * 2
        assert {t.group for t in rows} == set(range(len(rows) // 2))
        if schedule.eta != ASYNC.eta:
            for a, b in zip(kept, whole.batches, strict=True):
                for g, h in zip(a.groups, b.groups, strict=True):
                    for r, s in zip(g.records, h.records, strict=True):
                        assert dataclasses.replace(r, segments=s.segments) == s


@pytest.mark.parametrize("schedule", [SYNC, ASYNC, PARTIAL])
def test_workers_that_die_cost_no_response_but_those_that_were_judged(schedule):
    """Before a step, or after it and before they could say so; a replay knows when."""
    schedule = dataclasses.replace(schedule, updates=4)
    given = {"lengths": lognormal(1.0, 2), "steps": 16}
    for executor in (Simulated(costs(), restarts=99), Threads(restarts=99)):
        rng = np.random.default_rng(0)

        def mortal(name, make, rng=rng):
            def made():
                worker, left = make(), int(rng.integers(3, 30))

                def work(message):
                    nonlocal left
                    left -= 1
                    if left < 0:
                        if rng.random() < 0.5:
                            worker(message)
                        raise WorkerDiedError("killed")
                    return worker(message)

                return work

            return make if name in ("control", "train") else made

        found = run(schedule, executor=executor, around=mortal, **given)
        rows = found.store.select()
        consumed = sorted(t.number for t in rows if t.state == "consumed")
        assert consumed == sorted(flat(found.numbers))
        assert len(set(consumed)) == len(consumed) and found.worst_lag <= schedule.eta
        assert {t.group for t in rows} == set(range(len(rows) // 2))
        assert [b.version for b in found.batches] == list(range(4))
        died = [e for e in found.events if e.what == "died"]
        assert {e.worker.split("/")[0] for e in died} == {"generate", "reward"}
        judging = [e for e in died if e.worker[0] == "r" and e.message is not None]
        reasons = [t.reason for t in rows if t.state == "discarded"]
        unscored = [reason for reason in reasons if reason != "stale"]
        if isinstance(executor, Simulated):
            assert len(unscored) == len(judging)
        else:  # or it was too old, or the run over, when the death was told
            assert len(unscored) <= len(judging)
        assert all("died: killed" in reason for reason in unscored)
        trained = flat(b.groups for b in found.batches)
        assert all(len(r) == given["lengths"](r.number) for r in found.records)
        assert sum(2 - len(g.records) for g in trained) <= len(unscored)
        assert run(schedule, order=found.events, **given).batches == found.batches


def test_stopped_and_gone_on_with_what_was_written_is_kept(tmp_path):
    for executor in (None, Threads()):
        given = {"lengths": lognormal(1.0, 5), "executor": executor}
        folder = tmp_path / str(executor)
        stop = iter([False] * (40 if executor is None else 2) + [True] * 10**4).__next__
        with TrajectoryStore(folder) as store:
            first = run(ASYNC, store=store, should_stop=stop, **given)
            left = {t.number: t for t in store.select()}
        assert len(first.batches) < ASYNC.updates
        with TrajectoryStore(folder) as store:
            version = len(first.batches)
            store.restore(version, paused=True)
            assert {t.number: t for t in store.select()} == left
            second = run(ASYNC, store=store, version=version, **given)
        both = flat(first.numbers + second.numbers)
        assert len(set(both)) == len(both) == 6 * 8
        drawn = [sum(e.counts["drawn"] for e in r.engines) for r in (first, second)]
        rows = sum(t.length for t in left.values())
        assert drawn[0] == rows  # and the second begins where the first has stopped
        assert second.worst_lag <= 2


def test_a_response_that_cannot_be_scored_costs_itself_alone():
    def judge(record, problem):
        if record.number % 7 == 3:
            raise TimeoutError("no answer")
        return (float("nan"), 1.0) if record.number % 7 == 5 else (1.0, 1.0)

    found = run(SYNC, judge=judge)
    lost = [t for t in found.store.select() if t.state == "discarded"]
    assert {t.number % 7 for t in lost} == {3, 5}
    assert lost[0].reason == "no reward: TimeoutError: no answer"
    assert "score nan and reward 1.0 are not finite" in lost[1].reason
    assert not {t.number for t in lost} & set(flat(found.numbers))
    groups = [g for b in found.batches for g in b.groups]
    assert {len(g.records) for g in groups} == {1, 2}
    # where one alone has nothing to be compared with, it is discarded too
    found = run(SYNC, judge=judge, least_scored=2)
    whole = [g for g in range(99) if not {2 * g % 7, (2 * g + 1) % 7} & {3, 5}]
    assert flat(found.numbers) == flat([2 * g, 2 * g + 1] for g in whole[: 6 * 4])
    reasons = collections.Counter(
        t.reason.split(":")[0] for t in found.store.select(["discarded"])
    )
    assert set(reasons) == {"no reward", "too few responses could be scored"}
    assert len(set(reasons.values())) == 1
    # but not where no more were asked for
    alone = dataclasses.replace(SYNC, samples=1)
    assert len(run(alone, least_scored=2).batches) == SYNC.updates
    # both of a pair: that group is none, and another takes its place
    found = run(SYNC, judge=lambda r, p: (1 / (r.group != 2), 1.0))
    assert found.numbers[0] == [0, 1, 2, 3, 6, 7, 8, 9]


class Broken(SimulatedEngine):
    """Every seventh of its responses has a log-prob that is no number."""

    def advance(self):
        ended = super().advance()
        for record in ended:
            if record.number % 7 == 3:
                record.log_probs[-1] = math.nan
        return ended


def test_areal_7_a_log_prob_that_is_not_finite_costs_its_response_alone():
    found = run(ASYNC, engines=Broken)
    rows = found.store.select(["discarded"])
    lost = [t for t in rows if t.reason != "stale"]
    assert lost and {t.number % 7 for t in lost} == {3}
    assert "record 3 has log-prob nan at token" in lost[0].reason
    assert len(found.batches) == ASYNC.updates


@pytest.mark.parametrize("when_full", ["continue", "resume", "discard"])
def test_whatever_is_combined_a_run_ends(when_full):
    """Rules that act at the same time, workers that die among them."""
    for seed in range(8):
        rng = np.random.default_rng([seed, len(when_full)])
        pick = lambda *of, rng=rng: of[rng.integers(len(of))]  # noqa: E731
        own = {"on_stale": pick("drop", "keep", "mask"), "eta": pick(1, 2)}
        if when_full != "continue":
            own |= {"ahead": pick(3, 5), "max_waiting": pick(0, 1, math.inf)}
        if when_full == "resume":
            own |= {"max_resume": pick(None, 1), "priority": pick("oldest", "longest")}
            own |= {"on_exceed": pick("truncate", "drop", "first")}
        schedule = Schedule(
            **{"batch": 3, "samples": 2, "max_new_tokens": 60, "updates": 4},
            **{"slots": pick(2, 8), "when_full": when_full, **own},
            allow_repeats=False,
        )

        def mortal(name, make, rng=rng):
            def made():
                worker, left = make(), int(rng.integers(5, 60))

                def work(message):
                    nonlocal left
                    left -= 1
                    if left < 0:
                        raise WorkerDiedError("killed")
                    return worker(message)

                return work

            return make if name in ("control", "train") else made

        found = run(
            schedule,
            lengths=lognormal(1.0, seed),
            prompt_of=lambda n: Prompt([1, n % 11], n),
            around=mortal if seed % 2 else lambda name, make: make,
            executor=Simulated(costs(), restarts=99),
            interruptible=bool(rng.integers(2)),
        )
        assert [len(b.groups) for b in found.batches] == 4 * [3], (seed, schedule)
        assert len(set(flat(found.numbers))) == len(flat(found.numbers))
        if schedule.on_stale == "drop":
            assert found.worst_lag <= schedule.eta
        if schedule.max_resume is not None:
            assert max(len({*r.versions}) for r in found.records) <= 2


def test_scorers_share_the_work_and_a_late_report_changes_nothing():
    found = run(SYNC, executor=Simulated(costs(judge=3.0)))
    usage = utilisation(found.events)["reward"]
    judged = collections.Counter(e.worker for e in found.events if e.what == "judge")
    assert judged.total() == 48 and min(judged.values()) > 10 and usage.busy == 48 * 3
    assert utilisation(found.events)["train"].waits["scores"] > 0

    store = TrajectoryStore(None)
    control = Controller(
        SYNC, store, lambda n: Prompt([1], n), ["generate/0"], ["reward/0"]
    )
    told = control(Message("train", 0, "weights", (None, 0)))
    (write,) = [send for send in told.sends if send.kind == "write"]
    record = write.body[0][0]
    record.extend([0], [0.0], 0)
    record.status = "stop"
    ended = Message("generate/0", 0, "ended", [record])
    assert [send.kind for send in control(ended).sends] == ["judge"]
    again = control(ended)  # a worker that was taken for dead
    assert again.sends == [] and again.notes["responses"] == told.notes["responses"] - 1
    other = dataclasses.replace(write.body[0][1], tokens=[0], log_probs=[0.0])
    other = dataclasses.replace(other, versions=[0], status="stop")
    unheard = control(Message("generate/1", 0, "ended", [other]))  # not the writer
    assert (
        unheard.sends == [] and unheard.notes["responses"] == again.notes["responses"]
    )
    heard = control(Message("generate/0", 1, "ended", [other]))
    assert [send.kind for send in heard.sends] == ["judge"]


def test_groups_that_may_not_train_give_their_place_back(tmp_path):
    """By scores alone: rewards have penalties, which say nothing of the problem."""
    given = {
        "judge": lambda r, p: (float(r.group % 3 > 0), r.number % 2 - 0.5),
        "accept": min,
    }
    informative = run(SYNC, **given)
    rows = informative.store.select()
    assert {t.group % 3 for t in rows if t.state == "discarded"} == {0}
    assert {t.reason for t in rows} == {None, "not accepted"}
    assert len(informative.batches) == 6
    # once more from a checkpoint: what is not accepted again is so at its version
    store = TrajectoryStore(tmp_path)
    run(SYNC, store=store, **given)
    store.restore(3, paused=True)
    undone = [t for t in store.select(["scored"]) if t.group % 3 == 0]
    again = run(SYNC, store=store, version=3, **given)
    assert undone and {store.get(t.number).version for t in undone} == {3}
    assert again.numbers == informative.numbers[3:]


def test_what_is_stale_is_dropped_kept_or_masked():
    """A straggler ends some versions after its siblings."""
    schedule = dataclasses.replace(SYNC, eta=1, updates=10)
    found = {}
    for on_stale in ("drop", "keep", "mask"):
        changed = dataclasses.replace(schedule, on_stale=on_stale)
        found[on_stale] = run(changed, lengths=lambda n: 90 if n == 5 else 12 + n % 7)
        conserved(found[on_stale], changed)
        assert changed.max_lag == (1 if on_stale == "mask" else math.inf)
    drop, keep, mask = found.values()
    assert drop.store.get(5).reason == "stale" and drop.worst_lag <= 1
    assert keep.store.get(5).state == "consumed" and keep.worst_lag > 1
    assert keep.batches == mask.batches  # the learner tells them apart
    for each in found.values():
        notes = [e.notes["beyond_eta"] for e in each.events if e.what == "batch"]
        for batch, share in zip(each.batches, notes, strict=True):
            records = [r for g in batch.groups for r in g.records]
            lags = [batch.version - v for r in records for v in r.versions]
            assert share == sum(lag > 1 for lag in lags) / len(lags)
        assert (max(notes) > 0) == (each is not drop)


@pytest.mark.parametrize("most", [1, 2])
def test_no_response_is_resumed_more_often_than_it_may_be(most):
    lengths = lognormal(1.0, 6)
    schedule = dataclasses.replace(PARTIAL, updates=12, ahead=12)
    free = run(schedule, lengths=lengths)
    assert max(len(set(r.versions)) for r in free.records) > most + 1
    for on_exceed in ("truncate", "drop", "first"):
        judged = collections.Counter()

        def judge(record, problem, judged=judged):
            judged[record.number] += 1
            return float(record.status == "stop"), 1.0

        changed = dataclasses.replace(schedule, max_resume=most, on_exceed=on_exceed)
        found = run(changed, lengths=lengths, judge=judge)
        conserved(found, changed)
        lived = [len(set(r.versions)) for r in found.records]
        assert max(lived) == most + 1 and set(judged.values()) == {1}
        cut = [r for r in found.records if len(r) < lengths(r.number)]
        assert all(r.status == "length" and r.score == 0 for r in cut)
        assert {len(set(r.versions)) for r in cut} <= {most + 1}
        assert bool(cut) == (on_exceed == "truncate")
        reasons = {t.reason for t in found.store.select(["discarded"])}
        assert reasons == ({"resumed too often"} if on_exceed == "drop" else set())


def test_unfinished_groups_are_handed_out_in_the_order_that_was_asked_for():
    def handed_out(priority, written):
        """Groups that are handed out at version 1, of what version 0 left of each."""
        schedule = Schedule(
            **{"batch": 1, "samples": 1, "max_new_tokens": 9, "updates": 3},
            **{"eta": math.inf, "ahead": 5, "when_full": "resume"},
            priority=priority,
        )
        store = TrajectoryStore(None)
        prompts = lambda n: Prompt([1], n)  # noqa: E731
        control = Controller(schedule, store, prompts, ["generate"], ["reward"])
        for version in (0, 1):
            told = control(Message("train", version, "weights", (None, version)))
            (write,) = [send for send in told.sends if send.kind == "write"]
            records = {record.number: record for record in write.body[0]}
            if version:
                return list(records)
            for number, tokens in {0: 1, **written}.items():
                records[number].extend([0] * tokens, [0.0] * tokens, version)
            records[0].status = "stop"
            control(Message("generate", 0, "ended", [records.pop(0)]))
            control(Message("reward", 0, "judged", Judged(0, 0, 1.0, 1.0, "")))
            control(Message("generate", 1, "aborted", list(records.values())))

    written = {1: 0, 2: 3, 3: 0, 4: 7}
    fresh = [5]  # the one that was trained on gives its place
    assert handed_out("fifo", written) == [1, 2, 3, 4, *fresh]
    assert handed_out("oldest", written) == [2, 4, 1, 3, *fresh]
    assert handed_out("longest", written) == [4, 2, 1, 3, *fresh]


def test_what_a_full_batch_leaves_unfinished_is_bounded():
    schedule = dataclasses.replace(PARTIAL, ahead=20, updates=8)
    for most in (math.inf, 0, 3):
        changed = dataclasses.replace(schedule, max_waiting=most)
        found = run(changed, lengths=lognormal(1.0, 1))
        conserved(found, changed)
        left = [e.notes["groups"]["open"] for e in found.events if e.what == "batch"]
        assert max(left) == most if most < math.inf else max(left) > 3
        assert (found.worst_lag > 0) == (most > 0)


def most_there(found, batch=4):
    """Groups beyond those that the weights of the time were trained on, at most."""
    counts = ("trained", "open", "complete")
    return max(
        sum(e.notes["groups"][name] for name in counts) - batch * e.version
        for e in found.events
        if e.worker == "control" and e.version is not None
    )


def test_a_run_that_gets_nowhere_ends_with_what_is_known(refused):
    def stuck(limit):
        run(SYNC, lengths=lambda n: 390 if n == 11 else 5, log=Watchdog(limit))

    message = (
        r"the trainer has waited 10[0-9.]+ s for a batch, longer than longest_wait=100; "
        r"the controller says 'straggler'. Groups: 8 asked for, 1 open, 3 complete, "
        r"4 trained, 0 capacity; responses under way: 1; the oldest request, 11, was "
        r"first handed out [0-9.]+ s ago and is at generate/[01]"
    )
    refused(message, stuck, 100, error=RuntimeError)
    stuck(10**4)  # it goes on where it may wait for so long
    refused("longest_wait=0 is outside", Watchdog, 0)
    refused(
        r"max_rejected=7 groups in a row .* fifths of \[0, 1\]: \[3, 0, 0, 0, 4\]",
        run,
        dataclasses.replace(SYNC, max_rejected=7),
        judge=lambda record, problem: (float(record.group % 2), 1.0),
        accept=lambda scores: False,
        error=RuntimeError,
    )
    refused(
        r"max_unscored=9 responses in a row could not be scored, at last [0-9]+: "
        r"ZeroDivisionError: ",
        run,
        dataclasses.replace(SYNC, max_unscored=9),
        judge=lambda record, problem: 1 / 0,
        error=RuntimeError,
    )
    few = {"prompt_of": lambda n: Prompt([n % 3], None)}
    run(SYNC, **few)
    message = r"8 groups are complete, but they have 3 different prompts, .*: \(0,\); "
    once = {"allow_repeats": False}
    refused(message, run, dataclasses.replace(SYNC, **once), **few)
    # each twice in a row: the second one waits for a later batch
    given = {"prompt_of": lambda n: Prompt([n // 2], None)}
    for schedule, changes in (
        (ASYNC, {}),
        (ASYNC, once),
        (SYNC, once),
        (PARTIAL, once | {"ahead": 4}),
        (PARTIAL, once | {"max_waiting": 0}),
    ):
        schedule = dataclasses.replace(schedule, **changes)
        found = run(schedule, **given)
        conserved(found, schedule)
        prompts = [[g.records[0].prompt for g in b.groups] for b in found.batches]
        differ = all(len(set(each)) == len(each) for each in prompts)
        assert differ != schedule.allow_repeats
        # seven groups have four prompts; where that many may be ahead, no more are
        assert most_there(found) <= max(schedule.most_ahead, 7)
    # an update that lasts long is no reason to answer one prompt again and again
    message = "^8 groups are complete, but they have 2 different prompts"
    same = {"prompt_of": lambda n: Prompt([min(n, 4)], None), "learn_cost": 5.0}
    refused(message, run, dataclasses.replace(ASYNC, eta=1, **once), **same)


def test_bad_input(refused, tmp_path):
    for message, options in (
        ("eta=-1 is outside", {"eta": -1}),
        ("batch=0 must be at least 1", {"batch": 0}),
        ("ahead=3 is outside", {"ahead": 3}),
        (
            "when_full='resum' is not one of .*Did you mean 'resume'",
            {"when_full": "resum"},
        ),
        ("makes sense for more groups than batch=4 alone", {"when_full": "discard"}),
        ("raise eta", {"when_full": "resume", "ahead": 8}),
        ("'masked' is not one of .*Did you mean 'mask'", {"on_stale": "masked"}),
        ("when_full='continue' resumes nothing", {"max_resume": 2}),
        ("priority='age' is not one of 'fifo'", {"priority": "age"}),
        ("max_waiting=-1 is outside", {"max_waiting": -1}),
        ("max_rejected=0 is outside", {"max_rejected": 0}),
        ("max_unscored=0 is outside", {"max_unscored": 0}),
        ("eta=math.inf none is", {"eta": math.inf, "on_stale": "mask"}),
    ):
        refused(message, dataclasses.replace, SYNC, **options)
    never = {"max_resume": 0, "on_exceed": "first"}
    refused("every batch wait", dataclasses.replace, PARTIAL, **never)
    refused("eta=1.5 is of", dataclasses.replace, SYNC, eta=1.5, error=TypeError)
    prompt = {"prompt_of": lambda n: Prompt([1], None) if n < 3 else None}
    refused(
        "the run is stalled .*'generate': 'no more prompts'",
        run,
        SYNC,
        error=RuntimeError,
        **prompt,
    )
    engine = SimulatedEngine(lambda number: 2, slots=1, steps=1)
    long = TokenRecord(number=7, group=0, prompt=(1,), status="aborted")
    long.extend([0, 0], [0.0, 0.0], 0)
    refused("record 7 has 2 tokens, of 2", engine.resume, long, max_new_tokens=9)
    other = TokenRecord(number=8, group=0, prompt=(1,), status="aborted")
    engine.resume(dataclasses.replace(other), max_new_tokens=9)
    refused("request 8 is already under way", engine.resume, other, max_new_tokens=9)
    refused("name at least one of each", run, SYNC, generators=0)
    refused("least_scored=0 must be at least 1", run, SYNC, least_scored=0)

    def learns(batch):
        raise WorkerDiedError("out of memory")

    refused(
        r"train died \(out of memory\).* were of version 0\. Restore the trainer",
        *(run, SYNC),
        learned=learns,
        error=RuntimeError,
    )
    store = TrajectoryStore(None)
    run(dataclasses.replace(SYNC, updates=2), store=store)
    message = "weights of version 1, but the account says that 8 groups"
    refused(message, run, SYNC, store=store, version=1)
    refused(
        "so not of samples=3 responses",
        run,
        dataclasses.replace(SYNC, samples=3),
        store=store,
    )
    with TrajectoryStore(tmp_path) as store:
        run(dataclasses.replace(ASYNC, updates=2), store=store)
        other = {"prompt_of": lambda n: Prompt([3, n], None)}
        refused(
            "answers .1, 2, 3., but the prompt",
            run,
            ASYNC,
            store=store,
            version=2,
            **other,
        )
        none = {"prompt_of": lambda n: None}
        refused(
            "for which there is no prompt any more", run, ASYNC, store=store, **none
        )
