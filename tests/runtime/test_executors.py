"""Workers on a virtual clock and in threads: one order, one result, no silent hang."""

import collections
import dataclasses
import itertools
import threading
import time

import numpy as np
import pytest

from tmdjax.runtime.events import Event, utilisation
from tmdjax.runtime.executors import (
    Costs,
    Message,
    Send,
    Simulated,
    Step,
    Threads,
    WorkerDiedError,
    calibrate,
    load_costs,
)
from tmdjax.runtime.executors.messages import Inbox

COSTS = Costs({"toss": {"units": 1.0}, "think": {"units": 0.25}})
EXECUTORS = [Simulated(COSTS), Threads()]


def players(rounds=3, heard=None, each=True):
    """Control tosses to two players, who think by themselves before they toss back.

    Each plays all its rounds, however slow its thread; or any of them plays them all.
    """
    heard = [] if heard is None else heard

    def player(name):
        thoughts, caught = [0], [0]

        def work(message):
            if message is None:
                if thoughts[0] == 3 * caught[0]:
                    return None
                thoughts[0] += 1
                return Step(what="think", amounts={"units": 1})
            caught[0] += 1
            heard.append((name, message.body, thoughts[0]))
            sends = [Send("control", "toss", message.body + 1)]
            return Step(what="toss", sends=sends, amounts={"units": 1})

        return work

    def control():
        tosses, begun = collections.Counter(), []

        def work(message):
            if message is None:
                if begun:
                    return None
                begun.append(True)
                sends = [Send(f"player/{i}", "toss", 10 * i) for i in range(2)]
                return Step(what="begin", sends=sends)
            if message.kind == "stop":
                return Step(what="stop", last=True)
            heard.append(("control", message.sender, message.body))
            tosses[message.sender] += 1
            back = [Send(message.sender, "toss", message.body)]
            done = each and tosses[message.sender] == rounds
            over = tosses.total() == 2 * rounds
            return Step(what="back", sends=[] if done or over else back, last=over)

        return work

    makers = {f"player/{i}": lambda i=i: player(f"player/{i}") for i in range(2)}
    return {"control": control, **makers}


def run(executor, workers, **options):
    events: list[Event] = []
    seconds = executor.run(workers, events.append, **options)
    return seconds, events


def trace(events):
    """What each worker answered, in its order."""
    found = {}
    for e in sorted(events, key=lambda e: e.step):
        found.setdefault(e.worker, []).append((e.what, e.message, e.version))
    return found


def test_a_simulated_run_is_deterministic_and_takes_what_costs_say():
    first, second = (run(Simulated(COSTS), players()) for _ in range(2))
    assert first == second
    seconds, events = first
    assert all(
        e.end - e.begin == pytest.approx({"toss": 1, "think": 0.25}.get(e.what, 0))
        for e in events
    )
    # a message interrupts no step, and goes before work of its own
    assert trace(events)["player/0"][:2] == [
        ("toss", ("control", 0), None),
        ("think", None, None),
    ]
    for worker in ("player/0", "player/1"):  # one step at a time, in order
        own = [e for e in events if e.worker == worker]
        assert [e.step for e in own] == list(range(len(own)))
        assert all(a.end <= b.begin for a, b in itertools.pairwise(own))
    usage = utilisation(events, players())
    assert usage["player"].seconds == 2 * seconds


@pytest.mark.parametrize("to", EXECUTORS)
@pytest.mark.parametrize("by", EXECUTORS)
def test_a_replay_keeps_the_order_whatever_the_clock_says(by, to):
    """Thoughts between two messages are as many as in the run that is replayed."""
    heard, again = [], []
    _, events = run(by, players(heard=heard))
    _, replayed = run(to, players(heard=again), order=events)
    names = ("control", "player/0", "player/1")
    for name in names:  # between workers there is no order
        one, two = ([h for h in some if h[0] == name] for some in (heard, again))
        count = min(len(one), len(two))  # a player may still catch, or not, at the end
        assert one[:count] == two[:count]
        assert name != "control" or len(one) == len(two) == 6
    recorded = trace(events)
    for name, own in trace(replayed).items():
        count = min(len(own), len(recorded[name]))
        assert own[:count] == recorded[name][:count]
    for first in ("player/0", "player/1"):  # whoever is quicker
        forced = [None, (first, 0), (first, 1), (first, 2)]
        order = [
            Event(worker="control", step=i, what="", begin=0, end=0, message=m)
            for i, m in enumerate(forced)
        ]
        again.clear()
        run(to, players(heard=again), order=order)
        assert [h[1] for h in again if h[0] == "control"][:3] == [first] * 3


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_run_can_be_told_to_stop_and_its_replay_stops_there_too(executor):
    asked = iter([False] * 4)
    _, events = run(executor, players(10**6), should_stop=lambda: next(asked, True))
    last = max((e for e in events if e.worker == "control"), key=lambda e: e.step)
    assert (last.what, last.message) == ("stop", ("executor", 0))
    _, again = run(executor, players(10**6), order=events)
    assert trace(again)["control"] == trace(events)["control"]


def failing(message):
    if message is not None:
        raise ZeroDivisionError("of mine")


def silent(message):
    if message is not None:
        return Step(what="nothing", notes={"why": "throttled"})


@pytest.mark.parametrize("executor", EXECUTORS)
def test_faults_end_a_run_and_say_who(executor, refused):
    before = threading.active_count()
    endless = 10**6  # threads that are slow to start must not miss the run

    def refuses(message, changes, error=ValueError, **options):
        refused(
            message, run, executor, players(endless) | changes, error=error, **options
        )

    with pytest.raises(ZeroDivisionError, match="of mine") as found:
        run(executor, players(endless) | {"player/1": lambda: failing})
    assert found.value.__notes__ == ["in step 0 of player/1, at 'toss'"]
    stalled = (
        r"the run is stalled after .*player/1 waits for a message \('nothing' ended "
        r".* with \{'why': 'throttled'\}"
    )
    refuses(
        stalled, {"player/0": lambda: silent, "player/1": lambda: silent}, RuntimeError
    )

    def lost(message):
        return Step(what="x", sends=[Send("plyer/0", "toss")])

    refuses(
        "sent 'toss' to 'plyer/0'.*Did you mean 'player/0'", {"control": lambda: lost}
    )
    refuses(
        "gave 3 for",
        {"player/0": lambda: lambda m: None if m is None else 3},
        TypeError,
    )

    def unmade():
        raise OSError("no device")

    refuses("no device", {"player/0": unmade}, OSError)
    stranger = Event(worker="judge", step=0, what="x", begin=0, end=0)
    refuses("the order has steps of 'judge'", {}, order=[stranger])
    waits = Event(
        worker="control", step=0, what="x", begin=0, end=0, message=("player/1", 9)
    )
    refuses(
        "control waits for message 9 of player/1, as in the order it replays",
        {},
        RuntimeError,
        order=[waits],
    )
    idle = [
        Event(worker="player/0", step=i, what="think", begin=0, end=0) for i in range(1)
    ]
    refuses("nothing to do where it had", {}, RuntimeError, order=idle)
    for thread in threading.enumerate():
        if thread.name in players():
            thread.join(5)
    assert threading.active_count() <= before


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_worker_that_dies_is_made_anew_once_the_controller_says_so(executor, refused):
    """What is sent to it before that is dropped, and none of it answered."""

    def throws(deadly, lost, births=()):
        births = iter(births)

        def control():
            begun, again = [], [Send("player/0", "again")]

            def work(message):
                if message is None:
                    if begun:
                        return None
                    begun.append(True)
                    sends = [Send("player/0", "go", i) for i in range(5)]
                    return Step(what="begin", sends=sends)
                if message.kind == "done":
                    return Step(what="done", last=message.body == 9)
                lost.append(message.body)
                return Step(what="lost", sends=[*again, Send("player/0", "go", 9)])

            return work

        def player():
            if next(births, False):
                raise WorkerDiedError("born dead")

            def work(message):
                if message is not None and message.body in deadly:
                    raise WorkerDiedError("out of memory")
                if message is not None:
                    sends = [Send("control", "done", message.body)]
                    return Step(what="go", sends=sends)

            return work

        return {"control": control, "player/0": player}

    lost, again = [], []
    _, events = run(executor, throws({1}, lost, [True, True]))
    ((message, why),) = lost
    assert (message.sender, message.number, message.body) == ("control", 1, 1)
    assert why == "out of memory"
    does = [what for what, _, _ in trace(events)["player/0"]]
    assert does == ["go", "died", "drop", "drop", "drop", "restart", "go"]
    _, replayed = run(executor, throws((), again), order=events)
    assert trace(replayed) == trace(events)
    assert again == [(message, "as in the run that is replayed")]
    refused(
        r"player/0 died 4 times, more often than restarts=3 .* so: out of memory\. Mend",
        *(run, executor, throws({1, 9}, [])),
        error=RuntimeError,
    )
    refused(
        "player/0 died 4 times.*born dead",
        *(run, executor, throws((), [], [True] * 4)),
        error=RuntimeError,
    )


def test_a_message_that_comes_while_a_worker_finds_nothing_to_do_wakes_it():
    inbox = Inbox()
    assert inbox.is_ready and inbox.take() is None
    inbox.put(Message("control", 0, "write", None))  # before it said so, in a thread
    inbox.rest()
    assert inbox.take().kind == "write"
    assert inbox.is_ready  # there may be work of its own now
    inbox.rest()
    assert not inbox.is_ready


def test_a_thread_that_hangs_is_named(refused, caplog):
    free = threading.Event()

    def hangs(message):
        if message is not None:
            free.wait(60)
            return Step(what="late")

    # the others rest, so that a busy machine makes no step of theirs as long
    workers = players() | {"player/0": lambda: hangs, "player/1": lambda: silent}
    begin = time.monotonic()
    refused(
        "player/0 has been in one step for more than longest_step=1 s",
        run,
        Threads(longest_step=1.0),
        workers,
        error=RuntimeError,
    )
    assert time.monotonic() - begin < 30
    # so is one whose step hangs whoever logs it
    refused(
        "control has been in the log of a step for more than longest_step=1 s",
        *(Threads(longest_step=1.0, grace=0.1).run, players(), lambda e: free.wait(60)),
        error=RuntimeError,
    )
    # one that hangs where the run needs it no more holds nobody up
    workers = players(each=False) | {"player/0": lambda: hangs}
    seconds, events = run(Threads(grace=0.1), workers)
    assert seconds < 30 and "player/0 did not end the step" in caplog.text
    free.set()
    for thread in threading.enumerate():
        if thread.name == "player/0":
            thread.join(30)
            assert not thread.is_alive()
    assert "late" not in [event.what for event in events]  # its log may be closed
    refused("longest_step=0 is outside", Threads, 0)
    for executor in (Threads(), Simulated(COSTS)):
        refused("restarts=-1 must be", dataclasses.replace, executor, restarts=-1)


def test_costs_are_data(tmp_path, refused):
    costs = Costs({"decode": {"slot_steps": 0.5, "drawn": 0.25}, "weights": {}}, "cpu")
    amounts = {"slot_steps": 4, "drawn": 2, "prefilled": 9}
    assert costs.seconds("decode", amounts) == 2.5
    assert costs.seconds("weights", {"swaps": 1}) == costs.seconds("control", {}) == 0
    path = tmp_path / "costs.json"
    costs.save(path)
    assert load_costs(path) == costs
    for message, what, given in (
        ("no costs of 'learn', only of decode, weights", "learn", {"tokens": 1}),
        (
            "a rate for 'drawn', but its amounts are slot_steps",
            "decode",
            {"slot_steps": 1},
        ),
    ):
        refused(message, costs.seconds, what, given)
    for rate in (-1.0, float("inf"), float("nan"), "1"):
        refused("the rate of 'a' in 'x' is", Costs, {"x": {"a": rate}})
    for text in (
        "[]",
        '{"rates": {}}',
        '{"rates": 3, "source": ""}',
        '{"rates": {}, "source": "", "x": 1}',
    ):
        path.write_text(text)
        refused("holds no costs", load_costs, path)
    path.write_text("{")
    refused("is not JSON", load_costs, path)


def test_costs_are_found_again_from_a_run(refused):
    rng = np.random.default_rng(0)
    true = Costs(
        {"decode": {"slot_steps": 2e-3, "drawn": 3e-6}, "learn": {"tokens": 1e-4}}
    )
    events, now = [], 0.0
    for i in range(60):
        what = ("decode", "learn")[i % 2]
        drawn = int(rng.integers(0, 9000))
        amounts = (
            {"slot_steps": 64, "drawn": drawn, "idle": 7}
            if i % 2 == 0
            else {"tokens": drawn}
        )
        noise = 1 + 0.01 * rng.normal()
        end = now + noise * true.seconds(what, amounts)
        events.append(
            Event(worker="w", step=i, what=what, begin=now, end=end, amounts=amounts)
        )
        now = end
    found = calibrate(events, "cpu, 2 cores")
    assert found.source == "cpu, 2 cores"
    for e in events:
        assert found.seconds(e.what, e.amounts) == pytest.approx(
            e.end - e.begin, rel=0.05
        )
    assert found.rates["learn"]["tokens"] == pytest.approx(1e-4, rel=0.01)
    refused("no step has amounts", calibrate, [], "cpu")
