"""What became of every request: an account on disk that no kill can falsify.

A request is known by its number. Whatever is said of it twice counts once, so that work
may be handed out again after a crash, and what two workers report is trained on once:

    submitted --> running --> done --> scored --> consumed, by the update of a version
        |            |         |          |
        +------------+---------+----------+-----> discarded, for a reason

The account is a database of SQLite (``trajectories.sqlite``): a table of requests, and
one of what is large, such as tokens and images. Both change in one transaction, so that
a kill at any moment leaves the state before or after, never one in between. So does a
loss of power, which may take back the latest reports too, but no consumption and
nothing that came before one: weights are never ahead of the account of what they were
trained on.
"""

import contextlib
import io
import json
import math
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tmdjax.core.checks import brief, check_choice, check_count, check_range
from tmdjax.runtime.database import Database
from tmdjax.runtime.staleness import Spans, lag

STATES = ("submitted", "running", "done", "scored", "consumed", "discarded")

_KIND = 0x746D646A  # 'tmdj'
_VERSION = 2
_LARGEST = 10**9 - 10**6  # bytes of the arrays of a request: SQLite's longest row
_TABLE = """
CREATE TABLE trajectories (
    number INTEGER PRIMARY KEY,
    "group" INTEGER NOT NULL,
    spans TEXT NOT NULL DEFAULT '[]',
    finished INTEGER NOT NULL DEFAULT 0,
    score REAL,
    reward REAL,
    version INTEGER,
    reason TEXT,
    state TEXT GENERATED ALWAYS AS (CASE
        WHEN reason IS NOT NULL THEN 'discarded'
        WHEN version IS NOT NULL THEN 'consumed'
        WHEN reward IS NOT NULL THEN 'scored'
        WHEN finished THEN 'done'
        WHEN spans != '[]' THEN 'running'
        ELSE 'submitted' END) VIRTUAL
)"""
_INDEX = "CREATE INDEX trajectories_of_state ON trajectories (state)"
_ARRAYS = "CREATE TABLE arrays (number INTEGER PRIMARY KEY, content BLOB NOT NULL)"
_FIELDS = 'number, "group", state, spans, score, reward, version, reason'


class Trajectory(NamedTuple):
    """The account of one request.

    Attributes:
        number: of the request.
        group: of the prompt, that its siblings share.
        state: 'submitted', nothing is written; 'running', written in part; 'done';
            'scored'; 'consumed' by an update; 'discarded'.
        spans: ``(version, elements)``: how many elements (tokens of a text, steps of an
            agent) weights of each version wrote, in order.
        score: as the scorer gave it, or None.
        reward: what is learned from, or None.
        version: of the weights that it trained, or at which it was discarded; or None.
        reason: why it was discarded, or None.
    """

    number: int
    group: int
    state: str
    spans: tuple[tuple[int, int], ...]
    score: float | None
    reward: float | None
    version: int | None
    reason: str | None

    @property
    def length(self) -> int:
        """Elements written."""
        return sum(count for _, count in self.spans)


class TrajectoryStore:
    """The account of a run. One process writes, from one thread at a time.

    Every method is one transaction, or a part of that of :meth:`transaction`.
    """

    def __init__(self, folder: str | os.PathLike[str] | None):
        """Opens an account, or begins one.

        Args:
            folder: of the account; it is made if absent, and what else lies there stays
                as it is. None keeps the account in memory.

        Raises:
            OSError: the folder cannot be written or is full.
            RuntimeError: another process, or another store of this one, has it open.
            ValueError: ``trajectories.sqlite`` is damaged, of another version or of
                another program; it is left as it is.
        """
        self.folder = None if folder is None else Path(folder)
        path = ":memory:"
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = str(self.folder / "trajectories.sqlite")
        tables = (_TABLE, _INDEX, _ARRAYS)
        self._base = Database(path, _KIND, _VERSION, tables, check="trajectories")

    def close(self) -> None:
        """Leaves the account to others; it cannot be used any more."""
        self._base.close()

    def __enter__(self) -> "TrajectoryStore":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def transaction(self) -> contextlib.AbstractContextManager[None]:
        """All that is done inside is done at once, or, if anything raises, not at all.

        Raises:
            OSError: the disk is full.
            ValueError: the account is damaged.
        """
        return self._base.transaction()

    def submit(self, numbers: Iterable[int], group: int) -> None:
        """Enters requests; one that is known already stays as it is.

        Args:
            numbers: of the requests, >= 0.
            group: of their prompt, >= 0.

        Raises:
            ValueError: a number is known as of another group.
        """
        check_count("group", group, 0)
        with self._base.transaction():
            for number in numbers:
                check_count("number", number, 0)
                found = self._base.rows(
                    'INSERT INTO trajectories (number, "group") VALUES (?, ?) '
                    'ON CONFLICT DO UPDATE SET number = number RETURNING "group"',
                    number,
                    group,
                )
                if found != [(group,)]:
                    raise ValueError(
                        f"request {number} is one of group {found[0][0]}, not of "
                        f"{group}; number requests without repetition."
                    )

    def write(
        self,
        number: int,
        spans: Spans,
        *,
        finished: bool,
        arrays: Mapping[str, Any] | None = None,
    ) -> bool:
        """Notes what was written for a request so far, from its first element on.

        Args:
            number: of a request that was submitted.
            spans: ``(version, elements)``, in order; versions rise, elements are >= 1.
            finished: whether nothing more will be written.
            arrays: numpy arrays by name that hold it, together less than 1 GB; they
                replace those of before. None where the account alone is kept, which
                then has no arrays.

        Returns:
            Whether it was news. What was finished or has ended stays as it is, and so
            does what was written further before: whoever reports late is not heard.

        Raises:
            OSError: the disk is full; the account is as it was.
            TypeError: an array of a dtype that is not numpy's own, or of objects.
            ValueError: an unknown request, malformed spans, or arrays of 1 GB or more.
        """
        spans = [
            (check_count("version", v, 0), check_count("count", n)) for v, n in spans
        ]
        if spans:
            lag(spans, spans[-1][0])  # refuses versions that do not rise
        with self._base.transaction():
            known = self.get(number)
            longer = sum(n for _, n in spans) > known.length
            if known.state not in ("submitted", "running") or not (finished or longer):
                return False
            self._drop_arrays(number)
            if arrays is not None:
                content = _packed(number, arrays)
                self._base.rows("INSERT INTO arrays VALUES (?, ?)", number, content)
            self._base.rows(
                "UPDATE trajectories SET spans = ?, finished = ? WHERE number = ?",
                json.dumps(spans),
                bool(finished),
                number,
            )
        return True

    def score(self, number: int, score: float, reward: float | None = None) -> bool:
        """Notes score and reward of a request that is done.

        Args:
            number: of the request.
            score: as the scorer gave it, finite.
            reward: what is learned from, finite; None takes the score.

        Returns:
            Whether it was news; what has a reward keeps it.

        Raises:
            ValueError: an unknown request, one that is not done, or a number that is
                not finite.
        """
        reward = score if reward is None else reward
        for name, value in (("score", score), ("reward", reward)):
            finite = {"open_low": True, "open_high": True}
            check_range(f"{name} of {number}", value, -math.inf, math.inf, **finite)
        with self._base.transaction():
            known = self.get(number)
            if known.state in ("scored", "consumed", "discarded"):
                return False
            self._refuse_all_but(("done",), known, "scored")
            self._base.rows(
                "UPDATE trajectories SET score = ?, reward = ? WHERE number = ?",
                float(score),
                float(reward),
                number,
            )
        return True

    def consume(self, numbers: Iterable[int], version: int) -> None:
        """Notes that the update of a version trains on requests: all of them, once.

        From then on no loss of power takes that back: call it before the update.

        Args:
            numbers: of requests that are scored.
            version: of the weights that the update begins with, >= 0.

        Raises:
            OSError: the disk is full, or fails.
            ValueError: a request that is not scored, such as one that was consumed
                before, or one with elements of a version above this one; nothing is
                noted then.
        """
        check_count("version", version, 0)
        with self._base.transaction():
            self._base.make_durable()
            for number in numbers:
                known = self.get(number)
                self._refuse_all_but(("scored",), known, "trained on")
                lag(known.spans, version)  # of no later weights
                self._end(number, version, None)

    def discard(self, numbers: Iterable[int], version: int, reason: str) -> None:
        """Notes that requests will not be trained on.

        Args:
            numbers: of requests that have not ended.
            version: of the weights at that time, >= 0.
            reason: in a word or two, such as 'stale'.

        Raises:
            ValueError: no reason, or a request that was consumed or discarded before,
                or one with elements of a version above this one; nothing is noted then.
        """
        check_count("version", version, 0)
        if not reason:
            raise ValueError("reason is empty; say in a word why it is discarded.")
        with self._base.transaction():
            for number in numbers:
                known = self.get(number)
                self._refuse_all_but(STATES[:4], known, "discarded")
                lag(known.spans, version)  # of no later weights
                self._end(number, version, reason)

    def restore(self, version: int, *, paused: bool = False) -> None:
        """Goes back to where weights of a version had just been made.

        What ended at that version or later has not ended: it is trained on once,
        relative to the weights that training goes on from. What weights of that version
        or later wrote is cut away, as they are gone, or will write it again: a request
        goes on from its last element before them, and its arrays may then hold more
        than its spans say. Requests stay; none is lost.

        Args:
            version: of the weights of a checkpoint, the number of updates behind them.
            paused: the checkpoint was made when everything had been stopped and
                written: what the weights of this very version wrote is kept then.
        """
        check_count("version", version, 0)
        beyond = version + 1 if paused else version
        with self._base.transaction():
            self._base.rows(
                "UPDATE trajectories SET version = NULL, reason = NULL "
                "WHERE version >= ?",
                version,
            )
            for known in self.select(STATES[1:4]):
                kept = [(v, count) for v, count in known.spans if v < beyond]
                if len(kept) == len(known.spans):
                    continue
                if not kept:
                    self._drop_arrays(known.number)
                self._base.rows(
                    "UPDATE trajectories SET spans = ?, finished = 0, score = NULL, "
                    "reward = NULL WHERE number = ?",
                    json.dumps(kept),
                    known.number,
                )

    def forget(self, version: int) -> None:
        """Removes the arrays of what ended before a version; the account stays.

        Their space goes back to the disk. Call it after a checkpoint was written.

        Args:
            version: of the oldest checkpoint that may still be restored.
        """
        check_count("version", version, 0)
        with self._base.transaction():
            self._base.rows(
                "DELETE FROM arrays WHERE (SELECT version FROM trajectories "
                "WHERE trajectories.number = arrays.number) < ?",
                version,
            )

    def get(self, number: int) -> Trajectory:
        """The account of a request.

        Raises:
            ValueError: it was never submitted.
        """
        check_count("number", number, 0)
        found = self._base.rows(
            f"SELECT {_FIELDS} FROM trajectories WHERE number = ?", number
        )
        if not found:
            raise ValueError(
                f"request {number} is not in the account; submit it first."
            )
        return self._trajectory(found[0])

    def select(self, states: Sequence[str] = STATES) -> list[Trajectory]:
        """Accounts of requests in some states, in the order of their numbers.

        Raises:
            ValueError: an unknown state.
        """
        for state in states:
            check_choice("state", state, STATES)
        marks = ", ".join("?" * len(states))
        found = self._base.rows(
            f"SELECT {_FIELDS} FROM trajectories WHERE state IN ({marks}) "
            f"ORDER BY number",
            *states,
        )
        return [self._trajectory(row) for row in found]

    def counts(self) -> dict[str, int]:
        """How many requests are in each state."""
        found: dict[str, int] = dict.fromkeys(STATES, 0)
        found.update(
            self._base.rows("SELECT state, count(*) FROM trajectories GROUP BY state")
        )
        return found

    def arrays(self, number: int) -> dict[str, np.ndarray]:
        """The arrays of a request.

        After :meth:`restore` they may hold more elements than the spans say, of weights
        that are gone: cut them to ``store.get(number).length``.

        Raises:
            ValueError: it has none, or they are damaged.
        """
        self.get(number)
        found = self._base.rows("SELECT content FROM arrays WHERE number = ?", number)
        if not found:
            raise ValueError(f"request {number} has no arrays.")
        try:
            with np.load(io.BytesIO(found[0][0]), allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"the arrays of request {number} in {self.folder} are damaged "
                f"({error}). Discard the request, or restore a version at which it had "
                f"not begun: it is written anew then."
            ) from error

    def _drop_arrays(self, number: int) -> None:
        self._base.rows("DELETE FROM arrays WHERE number = ?", number)

    def _end(self, number: int, version: int, reason: str | None) -> None:
        self._base.rows(
            "UPDATE trajectories SET version = ?, reason = ? WHERE number = ?",
            version,
            reason,
            number,
        )

    def _refuse_all_but(
        self, states: Sequence[str], known: Trajectory, what: str
    ) -> None:
        if known.state not in states:
            raise ValueError(
                f"request {known.number} is {known.state}; one that is to be {what} "
                f"must be {' or '.join(states)}."
            )

    def _trajectory(self, row: Sequence[Any]) -> Trajectory:
        number, group, state, spans, *rest = row
        try:
            spans = tuple((int(v), int(count)) for v, count in json.loads(spans))
        except (TypeError, ValueError) as error:
            raise self._base.damaged(
                f"request {number} has spans {brief(spans)}"
            ) from error
        return Trajectory(number, group, state, spans, *rest)


def _packed(number: int, arrays: Mapping[str, Any]) -> memoryview:
    """Arrays as numpy's .npz, whose checksums tell damage when they are read."""
    found = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in found.items():
        if array.dtype.hasobject or _as_read(array.dtype) != array.dtype:
            raise TypeError(
                f"the array {name!r} of request {number} is of dtype {array.dtype}; "
                f"give one of numpy's own, such as float32 for bfloat16, and texts as "
                f"bytes."
            )
    size = sum(array.nbytes for array in found.values())
    if size > _LARGEST:
        raise ValueError(
            f"the arrays of request {number} have {size} bytes; an account holds at "
            f"most {_LARGEST} of each. Leave out what can be made again, or compress "
            f"it."
        )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, array in found.items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)
    return buffer.getbuffer()


def _as_read(dtype: np.dtype) -> np.dtype:
    """What numpy's files make of a dtype: of bfloat16, bytes without a meaning."""
    return np.lib.format.descr_to_dtype(np.lib.format.dtype_to_descr(dtype))
