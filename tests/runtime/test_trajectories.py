"""The account of trajectories: nothing lost, nothing counted twice, whatever is killed."""

import collections
import itertools
import os
import shutil
import signal
import sqlite3
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax.runtime import trajectories
from tmdjax.runtime.trajectories import STATES, TrajectoryStore

FILE = "trajectories.sqlite"
LOG = "trajectories.sqlite-wal"


def arrays(spans):
    return {"token": np.concatenate([np.full(n, v) for v, n in spans])}


def states(store):
    return {t.number: t.state for t in store.select()}


def told(store):
    """All that an account says, arrays too."""
    found = []
    for known in store.select():
        try:
            found.append((known, store.arrays(known.number)["token"].tolist()))
        except ValueError as error:
            assert f"request {known.number} has no arrays" in str(error)
            found.append((known, None))
    return found


def finished(store, number, spans=((0, 2),), reward=1.0):
    store.write(number, spans, finished=True)
    store.score(number, reward)


def test_a_trajectory_goes_through_its_states_and_is_found_again(tmp_path):
    with TrajectoryStore(tmp_path) as store:
        store.submit([3, 4, 5], 1)
        store.submit([6], 2)
        assert store.write(3, [(0, 2)], finished=False, arrays=arrays([(0, 2)]))
        spans = [(0, 2), (1, 3)]
        assert store.write(3, spans, finished=True, arrays=arrays(spans))
        assert store.score(3, 0.5, 0.25)
        store.write(4, [(0, 1)], finished=False)
        store.write(5, [], finished=True)  # an empty response is one
        store.discard([6], 1, "stale")
    with TrajectoryStore(tmp_path) as store:
        assert states(store) == {3: "scored", 4: "running", 5: "done", 6: "discarded"}
        found = store.get(3)
        assert found == (3, 1, "scored", ((0, 2), (1, 3)), 0.5, 0.25, None, None)
        assert found.length == 5
        assert store.arrays(3)["token"].tolist() == [0, 0, 1, 1, 1]
        assert store.get(6)[-2:] == (1, "stale")
        store.consume([3], 1)
        assert store.get(3)[2] == "consumed" and store.get(3).version == 1
        assert store.counts() == dict(zip(STATES, (0, 1, 1, 0, 1, 1)))
        store.forget(1)  # a checkpoint of version 1 may still be restored
        assert store.arrays(3)
        store.forget(2)
        with pytest.raises(ValueError, match="request 3 has no arrays"):
            store.arrays(3)
        assert store.get(3).state == "consumed"


def test_arrays_come_back_as_they_were_and_their_space_does_too(tmp_path, refused):
    rng = np.random.default_rng(0)
    given = {
        "file": rng.normal(size=(3, 2)).astype(">f4"),
        "a/b": np.zeros((2, 0), np.int8),
        "allow_pickle": np.array([b"text", b""]),
        "pairs": np.array([(1, 2.5)], [("n", "i4"), ("x", "f8")]),
        "one": np.float64(0.1),
    }
    with TrajectoryStore(tmp_path) as store:
        store.submit(range(40), 0)
        for number in range(40):
            large = {"image": rng.integers(0, 256, 50_000, np.uint8)}
            store.write(number, [(0, 1)], finished=number > 0, arrays=given | large)
            if number:
                store.score(number, 0.0)
        store.consume(range(1, 40), 0)
        found = store.arrays(0)
        assert list(found) == [*given, "image"]
        for name, array in given.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array, strict=True)
        for array in (np.array([None]), np.ones(1, jnp.bfloat16)):
            message = f"the array 'a' of request 0 is of dtype {array.dtype}; give"
            new = {"arrays": {"a": array}, "finished": True}
            refused(message, store.write, 0, [(0, 2)], error=TypeError, **new)
        assert store.get(0).length == 1 and store.arrays(0)["one"] == 0.1
    before = (tmp_path / FILE).stat().st_size
    with TrajectoryStore(tmp_path) as store:
        store.forget(1)
        assert len(store.arrays(0)["image"]) == 50_000
    assert before > 40 * 50_000 and (tmp_path / FILE).stat().st_size < 100_000


def test_what_is_reported_twice_counts_once():
    store = TrajectoryStore(None)
    store.submit([1, 2], 0)
    store.submit([1], 0)
    assert store.write(1, [(0, 2)], finished=False)
    assert not store.write(1, [(0, 2)], finished=False)
    assert not store.write(1, [(0, 1)], finished=False)  # an earlier report, late
    assert store.get(1).spans == ((0, 2),)
    assert store.write(1, [(0, 3)], finished=True)
    assert not store.write(1, [(0, 4)], finished=True)
    assert store.score(1, 1.0) and not store.score(1, 0.0)
    assert (store.get(1).reward, store.get(1).length) == (1.0, 3)
    store.consume([1], 0)
    assert not store.write(1, [(0, 9)], finished=True) and not store.score(1, 0.0)
    store.discard([2], 0, "failed")
    assert not store.write(2, [(0, 9)], finished=True)
    assert states(store) == {1: "consumed", 2: "discarded"}


def test_nothing_is_trained_on_twice_or_before_it_is_scored(refused):
    store = TrajectoryStore(None)
    store.submit(range(4), 0)
    finished(store, 0)
    finished(store, 1, [(3, 1)])
    store.write(2, [(0, 1)], finished=True)
    before = states(store)
    for numbers, version, message in (
        ([0, 2], 3, "request 2 is done; one that is to be trained on must be scored"),
        ([0, 1], 2, "tokens of version 3, but the trainer is at 2"),
        ([0, 9], 3, "request 9 is not in the account"),
        ([0, 0], 3, "request 0 is consumed"),
    ):
        refused(message, store.consume, numbers, version)
        assert states(store) == before  # all of a batch, or none of it
    store.consume([0], 3)
    refused("request 0 is consumed", store.consume, [1, 0], 3)
    assert states(store) == before | {0: "consumed"}


def test_bad_input(refused, monkeypatch):
    monkeypatch.setattr(trajectories, "_LARGEST", 23)
    store = TrajectoryStore(None)
    store.submit([1], 0)
    for message, call, *given in (
        ("request 1 is one of group 0, not of 2", store.submit, [1], 2),
        ("number=-1 must be at least 0", store.submit, [-1], 0),
        ("request 7 is not in the account; submit it first", store.get, 7),
        ("1 is submitted; one that is to be scored must be done", store.score, 1, 0.0),
        ("score of 1=nan is outside", store.score, 1, float("nan")),
        ("reason is empty", store.discard, [1], 0, ""),
        ("state='runing' is not .*Did you mean 'running'", store.select, ["runing"]),
        ("version=-1", store.restore, -1),
    ):
        refused(message, call, *given)
    for message, spans, options in (
        ("versions that do not rise", [(2, 1), (1, 1)], {}),
        ("versions that do not rise", [(1, 1), (1, 1)], {}),
        ("count=0 must be at least 1", [(1, 0)], {}),
        (
            "arrays of request 1 have 24 bytes; an account holds at most 23",
            [(1, 1)],
            {"arrays": {"a": np.zeros(2), "b": np.zeros(1)}},
        ),
    ):
        refused(message, store.write, 1, spans, finished=True, **options)
    assert store.get(1).state == "submitted"
    store.discard([1], 0, "stale")
    refused("1 is discarded; .* must be submitted or", store.discard, [1], 0, "again")
    store.submit([2], 0)
    store.write(2, [(3, 1)], finished=False)
    late = "tokens of version 3, but the trainer is at 2"
    refused(late, store.discard, [2], 2, "stale")
    assert store.get(2).state == "running"


def test_a_transaction_is_whole_or_not_there():
    store = TrajectoryStore(None)
    store.submit([1], 0)
    with pytest.raises(ZeroDivisionError), store.transaction():
        finished(store, 1)
        store.submit([2], 0)
        assert len(store.select()) == 2
        raise ZeroDivisionError
    assert states(store) == {1: "submitted"}
    with store.transaction():
        finished(store, 1)
        with pytest.raises(ZeroDivisionError), store.transaction():
            store.discard([1], 0, "stale")
            raise ZeroDivisionError
        with pytest.raises(ValueError, match="request 1 is one of group 0"):
            store.submit([2, 1], 3)
        store.submit([4], 0)
    assert states(store) == {1: "scored", 4: "submitted"}


def test_restored_it_is_as_when_the_weights_were_made():
    """Random traces, restored to every version: what the weights saw, once; no loss."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        store, made, number = TrajectoryStore(None), [], 0
        for version in range(5):
            made.append({t.number: t for t in store.select()})
            for _ in range(12):
                open_ = store.select(STATES[:2])
                done, scored = (store.select([s]) for s in ("done", "scored"))
                kind = rng.integers(5)
                if kind == 0:
                    store.submit([number], number // 2)
                    number += 1
                elif kind == 1 and open_:
                    t = open_[rng.integers(len(open_))]
                    own = collections.Counter(dict(t.spans))
                    own[version] += int(rng.integers(1, 4))
                    ends = bool(rng.integers(2))
                    store.write(t.number, sorted(own.items()), finished=ends)
                elif kind == 2 and done:
                    store.score(done[0].number, float(rng.normal()))
                elif kind == 3 and scored:
                    store.consume([scored[0].number], version)
                elif kind == 4 and open_:
                    store.discard([open_[-1].number], version, "stale")
        for version in reversed(range(5)):
            store.restore(version)
            then, now = made[version], {t.number: t for t in store.select()}
            assert set(now) == set(range(number)) >= set(then)
            for t in now.values():
                known = then.get(t.number)
                assert t.spans == (() if known is None else known.spans)
                assert t.version is None or t.version < version
                if known is not None:
                    assert STATES.index(t.state) >= STATES.index(known.state)
                    assert known.version is None or t == known
        assert set(states(store).values()) <= {"submitted"}


def test_a_pause_keeps_what_the_present_weights_wrote(tmp_path):
    with TrajectoryStore(tmp_path) as store:
        store.submit(range(3), 0)
        for number, spans in enumerate(([(0, 2), (1, 3)], [(1, 2)], [(1, 2)])):
            finished_ = number == 2
            store.write(number, spans, finished=finished_, arrays=arrays(spans))
        store.score(2, 1.0)
        store.consume([2], 1)  # the update that was under way is not in the weights
        store.restore(1, paused=True)
        assert [t.length for t in store.select()] == [5, 2, 2]
        assert store.get(2).state == "scored"
        store.restore(1)
        assert [t.spans for t in store.select()] == [((0, 2),), (), ()]
        # its arrays say more: of weights that are gone
        assert store.arrays(0)["token"][: store.get(0).length].tolist() == [0, 0]
        assert [content for _, content in told(store)[1:]] == [None, None]
        store.write(0, [(0, 2)], finished=True)  # the account alone is kept from now on
        assert [content for _, content in told(store)] == [None] * 3


def test_whatever_is_cut_off_it_is_as_before_or_after(tmp_path, monkeypatch):
    """A kill leaves a part of the log; a loss of power what was synced, and parts more."""
    here, log = tmp_path / "here", tmp_path / "here" / LOG
    synced, seen = [], []  # sizes of the log; those after each step, with what was told
    real = os.fsync

    def fsync(file):
        real(file)
        synced.append(log.stat().st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    with TrajectoryStore(here) as store:

        def note():
            seen.append((log.stat().st_size, told(store)))

        note()
        store.submit([1, 2], 0)
        note()
        for n in (1, 2, 3000):
            spans = [(0, n)]
            store.write(1, spans, finished=n > 2, arrays=arrays(spans))
            note()
        store.score(1, 1.0)
        note()
        assert not synced
        with store.transaction():
            store.consume([1], 0)
            assert not synced  # not before it has ended
            store.submit([3], 1)
        note()
        durable = seen[-1][0]
        assert synced == [durable]
        store.write(2, [(0, 9)], finished=True, arrays=arrays([(0, 9)]))
        note()
        with pytest.raises(ValueError, match="request 2 is done"):
            store.consume([2], 1)
        store.discard([2], 1, "stale")
        note()
        store.forget(1)
        note()
        assert synced == [durable]
        shutil.copytree(here, tmp_path / "copy")
    monkeypatch.setattr(os, "fsync", real)
    whole = (tmp_path / "copy" / LOG).read_bytes()
    ends = [size for size, _ in seen]
    assert ends == sorted(set(ends)) and len(whole) == ends[-1]
    left = [(end, whole[:end]) for end in ends]
    left += [(end - 1, whole[: end - 1]) for end in ends[1:]]
    left += [((a + b) // 2, whole[: (a + b) // 2]) for a, b in itertools.pairwise(ends)]
    for end in ends[:-1]:
        if end >= durable:  # a block did not reach the disk, and later ones did
            left.append((end, whole[:end] + bytes(512) + whole[end + 512 :]))
    assert len(left) == 3 * len(ends) - 2 + 3
    for number, (end, rest) in enumerate(left):
        folder = shutil.copytree(tmp_path / "copy", tmp_path / str(number))
        (folder / LOG).write_bytes(rest)
        with TrajectoryStore(folder) as store:
            expected = [what for size, what in seen if size <= end][-1]
            assert told(store) == expected
            assert end < durable or store.get(1).state == "consumed"


def step(store, number):
    """One of an endless row of reports, about four requests at a time."""
    group, what = divmod(number, 8)
    own = range(4 * group, 4 * group + 4)
    if what == 0:
        store.submit(own, group)
    elif what < 5:
        for length, ends in ((what, False), (900 * what, True)):
            spans = [(group, length)]
            one = own[what - 1]
            store.write(one, spans, finished=ends, arrays=arrays(spans))
    elif what == 5:
        with store.transaction():
            for one in own:
                store.score(one, float(one))
    elif what == 6:
        store.consume(own, group)
    else:
        store.forget(group)


@pytest.mark.slow
def test_killed_by_the_system_it_has_all_that_was_done(tmp_path):
    """kill -9 at random moments; every life goes on where the one before was killed."""
    code = (
        "import sys, itertools\n"
        f"sys.path[:0] = [{os.path.dirname(__file__)!r}]\n"
        "from test_trajectories import TrajectoryStore, step\n"
        "store = TrajectoryStore(sys.argv[1])\n"
        "for number in itertools.count(int(sys.argv[2])):\n"
        "    step(store, number)\n"
        "    print(number, flush=True)\n"
    )
    rng, done, model = np.random.default_rng(0), 0, TrajectoryStore(None)
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), str(done)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        for _ in range(int(rng.integers(1, 200))):
            process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
        rest = process.stdout.read().split("\n")[:-1]  # said before it was killed
        process.wait()
        said = int(rest[-1]) + 1 if rest else None
        before = done
        with TrajectoryStore(tmp_path) as store:
            found = told(store)
        while told(model) != found:  # what was said is done, and at most a step more
            step(model, done)
            done += 1
            assert said is None or done <= said + 1
        assert done >= (said or before)


def test_errors_of_the_disk_are_no_damage():
    store = TrajectoryStore(None)
    for name, kind, message in (
        ("SQLITE_IOERR_WRITE", OSError, "Errno 5"),
        ("SQLITE_FULL", OSError, "Errno 28"),
        ("SQLITE_READONLY_DIRECTORY", OSError, "Errno 13"),
        ("SQLITE_BUSY_SNAPSHOT", RuntimeError, "is in use by another run"),
        ("SQLITE_CORRUPT_VTAB", ValueError, "is damaged"),
    ):
        error = sqlite3.OperationalError("as the disk says")
        error.sqlite_errorname = name
        with pytest.raises(kind, match=message), store.transaction():
            store.submit([1], 0)
            raise error
        assert not store.select()


def test_one_process_writes(tmp_path, refused):
    with TrajectoryStore(tmp_path) as store:
        store.submit([1], 0)
        refused(
            "is in use by another run", TrajectoryStore, tmp_path, error=RuntimeError
        )
        store.submit([2], 0)
    refused(
        "closed database", store.submit, [3], 0, error=sqlite3.ProgrammingError
    )  # which damages nothing
    with TrajectoryStore(tmp_path) as store:
        assert store.counts()["submitted"] == 2


def test_links_and_relative_paths_are_those_of_the_beginning(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trajectories.sqlite").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    with TrajectoryStore("run") as store:
        store.submit([1], 0)
        finished(store, 1)
        monkeypatch.chdir("/")
        store.consume([1], 0)  # waits for the disk, so finds the log
    with TrajectoryStore(tmp_path / "run") as store:
        assert store.get(1).state == "consumed"


def test_damaged_and_foreign_files_are_named_and_left_alone(tmp_path, refused):
    def folder(name, data=b""):
        path = tmp_path / name
        path.mkdir()
        (path / FILE).write_bytes(data)
        return path

    whole = tmp_path / "whole"
    with TrajectoryStore(whole) as store:
        store.submit(range(300), 0)
        store.write(0, [(7777, 4)], finished=True, arrays=arrays([(7777, 4)]))
    data = (whole / FILE).read_bytes()
    array = np.full(4, 7777).tobytes()
    assert data.count(array) == 1
    with TrajectoryStore(folder("flipped", data.replace(array, array[::-1]))) as store:
        message = (
            "arrays of request 0 in .*flipped are damaged .*CRC.*Discard the request"
        )
        refused(message, store.arrays, 0)
    for name, content, message in (
        ("text", b"a diary" * 1000, "trajectories.sqlite is damaged .*not a database"),
        ("cut", data[: len(data) // 2], "is damaged .*begin the run anew"),
        (
            "later",
            data[:60] + b"\0\0\0\7" + data[64:],
            "has tables of version 7; this tmdjax reads version 2. Go on with the tmdjax",
        ),
    ):
        path = folder(name, content)
        refused(message, TrajectoryStore, path)
        assert (path / FILE).read_bytes() == content
    other = folder("other") / "trajectories.sqlite"
    with sqlite3.connect(other) as base:
        base.execute("CREATE TABLE photographs (name TEXT)")
    base.close()
    refused("is of another program: its header has 0x0", TrajectoryStore, other.parent)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        TrajectoryStore(tmp_path / "file")
