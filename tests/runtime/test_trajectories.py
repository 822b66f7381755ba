"""The account of trajectories: nothing lost, nothing counted twice, whatever is killed."""

import collections
import pathlib
import shutil
import sqlite3

import numpy as np
import pytest

from tmdjax.core import files
from tmdjax.runtime import trajectories
from tmdjax.runtime.trajectories import STATES, TrajectoryStore


def arrays(spans):
    return {"token": np.concatenate([np.full(n, v) for v, n in spans])}


def states(store):
    return {t.number: t.state for t in store.select()}


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
        assert len(list((tmp_path / "arrays").iterdir())) == 1
        assert store.get(6)[-2:] == (1, "stale")
        store.consume([3], 1)
        assert store.get(3)[2] == "consumed" and store.get(3).version == 1
        assert store.counts() == dict(zip(STATES, (0, 1, 1, 0, 1, 1)))
        store.forget(1)  # a checkpoint of version 1 may still be restored
        assert store.arrays(3)
        store.forget(2)
        with pytest.raises(ValueError, match="request 3 has no arrays"):
            store.arrays(3)
        assert not list((tmp_path / "arrays").iterdir())


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


def test_bad_input(refused):
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
        ("the account is in memory; give", [(1, 1)], {"arrays": {"a": np.zeros(1)}}),
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
    assert states(store) == {1: "scored"}


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
        assert len(list((tmp_path / "arrays").iterdir())) == 1
        store.write(0, [(0, 2), (1, 3)], finished=True, arrays=arrays([(0, 2), (1, 3)]))
        assert len(list((tmp_path / "arrays").iterdir())) == 1


def test_killed_at_any_moment_it_is_as_before_or_after(tmp_path, monkeypatch):
    """The folder is copied whenever a file is about to appear or go, and after."""
    here, copies = tmp_path / "here", []

    def copy():
        copies.append(tmp_path / f"copy{len(copies)}")
        shutil.copytree(here, copies[-1])

    def watched(real):
        def call(*given, **options):
            copy()
            real(*given, **options)
            copy()

        return call

    unlink = pathlib.Path.unlink
    monkeypatch.setattr(
        trajectories, "write_atomically", watched(files.write_atomically)
    )
    monkeypatch.setattr(pathlib.Path, "unlink", watched(unlink))
    with TrajectoryStore(here) as store:
        store.submit([1], 0)
        for n in (1, 2, 3):
            spans = [(0, n)]
            store.write(1, spans, finished=n == 3, arrays=arrays(spans))
            copy()
        store.score(1, 1.0)
        store.consume([1], 0)
        store.forget(1)
    monkeypatch.setattr(pathlib.Path, "unlink", unlink)
    seen = []
    for folder in copies:
        (folder / "arrays" / "mine.npz").write_text("not of this store")
        (folder / "arrays" / ".1-7.npz.0123abcd").write_text("torn")
        with TrajectoryStore(folder) as store:
            found = store.get(1)
            seen.append((found.state, found.length))
            left = {path.name for path in (folder / "arrays").iterdir()} - {"mine.npz"}
            assert len(left) == (0 < found.length and found.state != "consumed")
            if left:
                assert len(store.arrays(1)["token"]) == found.length
    assert seen == sorted(seen, key=lambda s: (STATES.index(s[0]), s[1]))
    assert len(set(seen)) == 5 and len(seen) >= 12


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


def test_damaged_and_foreign_files_are_named_and_left_alone(tmp_path, refused):
    def folder(name, data=b""):
        path = tmp_path / name
        path.mkdir()
        (path / "trajectories.sqlite").write_bytes(data)
        return path

    whole = tmp_path / "whole"
    with TrajectoryStore(whole) as store:
        store.submit(range(300), 0)
        store.write(0, [(0, 4)], finished=True, arrays=arrays([(0, 4)]))
        store.write(1, [(0, 4)], finished=True, arrays=arrays([(0, 4)]))
        one, two = sorted((whole / "arrays").iterdir())
        one.write_bytes(one.read_bytes()[:-9])
        two.unlink()
        refused(
            f"{one.name}, the arrays of request 0, .*not what was written",
            store.arrays,
            0,
        )
        refused(f"{two.name}, .*cannot be read .*Discard the request", store.arrays, 1)
    data = (whole / "trajectories.sqlite").read_bytes()
    for name, content, message in (
        ("text", b"a diary" * 1000, "trajectories.sqlite is damaged .*not a database"),
        ("cut", data[: len(data) // 2], "is damaged .*begin the run anew"),
        (
            "later",
            data[:60] + b"\0\0\0\7" + data[64:],
            "its header has .* version 7, not .* 1",
        ),
    ):
        path = folder(name, content)
        refused(message, TrajectoryStore, path)
        assert (path / "trajectories.sqlite").read_bytes() == content
    other = folder("other") / "trajectories.sqlite"
    with sqlite3.connect(other) as base:
        base.execute("CREATE TABLE photographs (name TEXT)")
    base.close()
    refused("is of another program or version", TrajectoryStore, other.parent)
    lost = folder("lost")
    (lost / "arrays").mkdir()
    (lost / "arrays" / "3-0.npz").write_text("all that is left")
    for _ in range(2):  # asked twice, it still takes nothing for its own
        refused("is absent or empty, but files .* lie beside it", TrajectoryStore, lost)
    assert (lost / "arrays" / "3-0.npz").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        TrajectoryStore(tmp_path / "file")
