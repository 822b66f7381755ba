"""The log of a run: read as it was written, and where the time went."""

import dataclasses
import json

import numpy as np
import pytest

from tmdjax.runtime import Activity
from tmdjax.runtime.events import (
    Event,
    EventLog,
    lengths,
    rate,
    read_events,
    read_run,
    staleness,
    timelines,
    total,
    utilisation,
)


def event(worker, step, begin, end, **fields):
    what = fields.pop("what", "work")
    return Event(worker=worker, step=step, what=what, begin=begin, end=end, **fields)


def waits(step, at, **reasons):
    return event("control", step, at, at, notes={"waits": reasons})


def test_a_log_is_read_as_it_was_written(tmp_path, refused, caplog):
    written = [
        event("generate/0", 0, 0.0, 0.1 + 0.2, amounts={"drawn": 3}, requests=(4, 5)),
        event("control", 0, 1.5, 1.5, message=("generate/0", 7), version=2),
        event("train", 0, 2, 3, notes={"lags": {"0": 3}, "metrics": {"loss": 0.25}}),
    ]
    path = tmp_path / "folder" / "events.jsonl"
    with EventLog(path) as log:
        for each in written:
            log(each)
            assert (
                len(read_events(path)) == written.index(each) + 1
            )  # it is on the disk
    assert read_events(path) == written
    with pytest.raises(FileExistsError):
        EventLog(path)
    text = path.read_text()
    path.write_text(text + text.splitlines()[0][:-9])  # killed in the middle of a line
    assert read_events(path) == written
    assert "its last line was cut off" in caplog.text
    good = json.loads(text.splitlines()[1])
    for changes, message in (
        ({"worker": 3}, "a field is of another type"),
        ({"step": 1.0}, "a field is of another type"),
        ({"amounts": {"drawn": "3"}}, "a field is of another type"),
        ({"message": ["a"]}, "values to unpack"),
        ({"end": 0.0}, "a number is out of range"),
        ({"requests": [-1]}, "a number is out of range"),
        ({"begin": float("nan")}, "a number is out of range"),
        ({"colour": 1}, "unexpected keyword argument 'colour'"),
    ):
        path.write_text(text + json.dumps(good | changes) + "\n")
        refused(f"line 4 of .*{message}", read_events, path)
    path.write_text("a diary\n" + text)
    refused("line 1 of .* is no event .*Remove it", read_events, path)


def test_where_the_time_went():
    """By hand: two generators and a trainer for 10 s."""
    events = [
        waits(0, 0.0, generate="weights", train="batch not full"),
        event("generate/0", 0, 2, 6),
        waits(1, 3.0, generate="throttled"),
        event("generate/0", 1, 7, 8),
        event("generate/1", 0, 0, 1),
        waits(2, 5.0, train="straggler"),
        event("train", 0, 8, 30),  # still busy when the run ends
        waits(3, 10.0, generate="end"),
    ]
    names = ("generate/0", "generate/1", "generate/2", "train", "control")
    for order in (events, events[::-1]):
        found = utilisation(order, names)
        usage = found["generate"]
        assert (usage.workers, usage.seconds, usage.busy) == (3, 30, 4 + 1 + 1)
        assert usage.share == pytest.approx(0.2)
        # 0: 2 s and 1 + 2 s; 1: 2 s and 7 s; 2, which never did anything: 3 s and 7 s
        assert usage.waits == {"weights": 2 + 2 + 3, "throttled": 3 + 7 + 7}
        assert found["train"].waits == {"batch not full": 5, "straggler": 3}
        assert found["train"].busy == 2 and found["train"].share == 0.2
    rng = np.random.default_rng(0)
    for _ in range(30):  # seconds are neither lost nor doubled
        ends = np.sort(rng.uniform(0, 9, 20)).reshape(-1, 2)
        some = [event("reward/0", i, *each) for i, each in enumerate(ends)]
        told = np.sort(rng.uniform(0, 10, 5))
        some += [waits(i, t, reward=str(i % 2)) for i, t in enumerate(told)]
        usage = utilisation(some)["reward"]
        assert usage.busy + sum(usage.waits.values()) == pytest.approx(usage.seconds)
        assert usage.seconds == told[-1]
    assert utilisation([]) == {}


def test_sums_over_a_log():
    one = event("control", 0, 0, 0, notes={"lags": {"0": 3, "2": 1}})
    two = event("control", 1, 0, 0, notes={"lags": {"2": 4}})
    assert staleness([one, two, event("train", 0, 0, 1)]) == {0: 3, 2: 5}
    decode = event("generate/0", 0, 0, 1, what="decode", amounts={"drawn": 5})
    other = dataclasses.replace(decode, what="weights")
    assert total([decode, decode, other, one], "decode", "drawn") == 10


def test_where_the_time_went_by_periods():
    """By hand: two generators for 8 s, in periods of 2 s; reasons change within one."""
    events = [
        event("generate/0", 0, 1, 4),
        waits(0, 3.0, generate="throttled"),
        event("generate/1", 0, 5, 6.5),
        waits(1, 5.5, generate="training"),
        waits(2, 8.0, generate="end"),
    ]
    found = timelines(events, periods=4)
    usage = found["generate"]
    assert usage.workers == 2 and usage.edges.tolist() == [0, 2, 4, 6, 8]
    assert usage.busy.tolist() == [1, 2, 1, 0.5]
    # both wait for 1 s, then one does; the reason changes at 3 and at 5.5
    expected = {
        "start": [3, 1, 0, 0],
        "throttled": [0, 1, 2 + 0.5, 0],
        "training": [0, 0, 0.5, 1.5 + 2],
    }
    assert {k: v.tolist() for k, v in usage.waits.items()} == expected
    shares = np.sum(list(usage.shares.values()), axis=0)
    np.testing.assert_allclose(shares, 1, rtol=1e-15)
    assert usage.shares["busy"].tolist() == [0.25, 0.5, 0.25, 0.125]
    assert found["control"].waits["idle"].tolist() == [2, 2, 2, 2]
    by = timelines(events, ["generate/2"], periods=4, by="worker")
    assert by["generate/0"].busy.tolist() == [1, 2, 0, 0]
    assert by["generate/1"].busy.tolist() == [0, 0, 1, 0.5]
    assert by["generate/2"].busy.tolist() == [0, 0, 0, 0]
    assert by["generate/2"].waits["throttled"].tolist() == [0, 1, 1.5, 0]


def test_periods_lose_no_second_however_many_workers(refused):
    rng = np.random.default_rng(1)
    events = [waits(i, t, work=str(i % 3)) for i, t in enumerate(range(10))]
    for worker in range(300):
        ends = np.sort(rng.uniform(0, 9, 8)).reshape(-1, 2)
        events += [event(f"work/{worker}", i, *each) for i, each in enumerate(ends)]
    whole, parts = (timelines(events, periods=n)["work"] for n in (1, 7))
    each = timelines(events, periods=7, by="worker")
    spent = parts.busy + sum(parts.waits.values())
    np.testing.assert_allclose(spent, 300 * 9 / 7, rtol=1e-12)
    for name in ("0", "1", "2"):
        alone = sum(found.waits.get(name, 0) for found in each.values())
        np.testing.assert_allclose(parts.waits[name], alone, rtol=1e-9, atol=1e-9)
        assert parts.waits[name].sum() == pytest.approx(whole.waits[name].item())
    assert all(seconds.min() >= 0 for seconds in parts.waits.values())
    refused("periods=0", timelines, events, periods=0)
    refused("by='task' is not one of 'role', 'worker'", timelines, events, by="task")
    assert timelines([]) == {}
    (nothing,) = timelines([event("work", 0, 0, 0)]).values()  # and no warning
    assert nothing.shares == {"busy": [0]}


def test_an_amount_is_spread_over_its_step():
    steps = [
        event("generate/0", 0, 1, 5, what="decode", amounts={"drawn": 8}),
        event("generate/1", 0, 4, 4, what="decode", amounts={"drawn": 3}),
        event("generate/1", 1, 4, 9, what="weights", amounts={"swaps": 1}),
        event("train", 0, 0, 9, what="learn", amounts={"drawn": 100}),
    ]
    edges = [0, 2, 4, 5, 8]
    found = rate(steps, "decode", "drawn", edges)
    np.testing.assert_allclose(found, [1, 2 + 1.5, 2, 0], rtol=1e-12)
    assert found @ np.diff(edges) == pytest.approx(total(steps, "decode", "drawn"))
    assert rate([], "decode", "drawn", edges).tolist() == [0, 0, 0, 0]


def judge(number, tokens, step=0):
    amounts = {"responses": 1, "tokens": tokens}
    return event(
        "reward/0", step, 1, 2, what="judge", requests=(number,), amounts=amounts
    )


def test_lengths_of_what_was_written_and_what_trained():
    learn = event("train", 0, 3, 4, what="learn", requests=(5, 3, 9))
    found = lengths([judge(5, 7), judge(3, 2), judge(4, 9), learn])
    assert found["written"].tolist() == [2, 9, 7]  # by number; 9 was not judged here
    assert found["trained"].tolist() == [2, 7]
    assert all(each.dtype == np.int64 for each in found.values())
    assert [each.size for each in lengths([]).values()] == [0, 0]


def test_starts_of_a_run_follow_each_other(tmp_path, refused):
    first = [waits(0, 1.0, train="scores"), event("train", 0, 2, 4)]
    second = [
        event("train", 0, 1, 2, message=("control", 0)),
        waits(0, 2.5, train="straggler"),
        waits(1, 3.0, train="end"),
    ]
    for i, events in ((0, first), (1, []), (1000, second)):
        with EventLog(tmp_path / f"events_{i:03d}.jsonl") as log:
            for each in events:
                log(each)
    found = read_run(tmp_path)
    assert [e.step for e in found if e.worker == "train"] == [0, 1]
    assert [e.step for e in found if e.worker == "control"] == [0, 1, 2, 3]
    usage = utilisation(found)["train"]
    assert (usage.seconds, usage.busy) == (4 + 3, 2 + 1)
    # until the controller says why, each start waits for it: 1 s, then 1 s and 0.5 s
    assert usage.waits == {"start": 1 + 1 + 0.5, "scores": 1, "straggler": 0.5}
    assert read_run(tmp_path / "events_000.jsonl") == first
    refused(
        "no events_.*jsonl; name the folder", read_run, tmp_path / "..", error=OSError
    )


def test_activity_counts_what_the_log_has(tmp_path):
    """Beside a log on disk; its shares are those that are read from there."""
    activity, path = Activity(), tmp_path / "events.jsonl"
    assert activity.rows() == []
    groups = {"asked for": 9, "open": 3, "complete": 2}
    notes = {"waits": {"generate": "throttled", "train": "scores"}, "groups": groups}
    events = [
        event("generate/0", 0, 0, 6, what="decode", amounts={"drawn": 30}, version=0),
        event("generate/1", 0, 2, 4, what="decode", amounts={"drawn": 10}, version=1),
        event("train", 0, 5, 7, what="learn", amounts={"updates": 1, "tokens": 60}),
        event("control", 0, 8, 8, notes=notes, version=1),
    ]
    with EventLog(path) as log:
        for each in events:
            for one in (log, activity):
                one(each)
    rows = {row["role"]: row for row in activity.rows()}
    assert list(rows["generate"].values()) == [
        "generate", 2, 50, "throttled", 1, 5.0, None
    ]  # fmt: skip
    assert list(rows["train"].values()) == [
        "train", 1, 25, "scores", None, 7.5, None
    ]  # fmt: skip
    assert rows["control"]["groups"] == "3 open, 2 complete"
    for role, usage in utilisation(read_events(path)).items():
        assert rows[role]["busy %"] == round(100 * usage.share)
        assert rows[role]["workers"] == usage.workers
