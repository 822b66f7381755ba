"""The log of a run: read as it was written, and where the time went."""

import dataclasses
import json

import numpy as np
import pytest

from tmdjax.runtime.events import (
    Event,
    EventLog,
    read_events,
    staleness,
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
