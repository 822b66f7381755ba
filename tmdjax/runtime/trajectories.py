"""What became of every request: an account on disk that no kill can falsify.

A request is known by its number. Whatever is said of it twice counts once, so that work
may be handed out again after a crash, and what two workers report is trained on once:

    submitted --> running --> done --> scored --> consumed, by the update of a version
        |            |         |          |
        +------------+---------+----------+-----> discarded, for a reason

The account is a table of SQLite (``trajectories.sqlite``); what is large, such as
tokens and images, stands in files beside it (``arrays/``). A file is whole on the disk
before the table names it, and goes after the table names another: a kill at any moment
leaves the state before or after, never one in between.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tmdjax.core.checks import brief, check_choice, check_count, check_range
from tmdjax.core.files import read_bounded, write_atomically
from tmdjax.runtime.database import Database
from tmdjax.runtime.staleness import Spans, lag

STATES = ("submitted", "running", "done", "scored", "consumed", "discarded")

_KIND = 0x746D646A  # 'tmdj'
_VERSION = 1
_OURS = re.compile(r"\.?\d+-\d+\.npz(\.[0-9a-f]{8})?")
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
    writes INTEGER NOT NULL DEFAULT 0,
    file TEXT,
    digest TEXT,
    state TEXT GENERATED ALWAYS AS (CASE
        WHEN reason IS NOT NULL THEN 'discarded'
        WHEN version IS NOT NULL THEN 'consumed'
        WHEN reward IS NOT NULL THEN 'scored'
        WHEN finished THEN 'done'
        WHEN spans != '[]' THEN 'running'
        ELSE 'submitted' END) VIRTUAL
)"""
_INDEX = "CREATE INDEX trajectories_of_state ON trajectories (state)"
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
                as it is. None keeps the account in memory, without arrays, such as for
                a simulated run.

        Raises:
            OSError: the folder cannot be written or is full.
            RuntimeError: another process, or another store of this one, has it open.
            ValueError: ``trajectories.sqlite`` is damaged, of another version or of
                another program, or absent where arrays lie; all is left as it is.
        """
        self.folder = None if folder is None else Path(folder)
        path = ":memory:"
        if self.folder is not None:
            self._arrays = self.folder / "arrays"
            self._arrays.mkdir(parents=True, exist_ok=True)
            path = str(self.folder / "trajectories.sqlite")
        files = self._files()
        tables = (_TABLE, _INDEX)
        self._base = Database(path, _KIND, _VERSION, tables, make=not files)
        named = {f for (f,) in self._base.rows("SELECT file FROM trajectories")}
        for name in files:
            if name not in named:  # a kill came between file and row
                (self._arrays / name).unlink()

    def _files(self) -> list[str]:
        """Names in the folder of arrays that are as this store gives them."""
        if self.folder is None:
            return []
        names = (path.name for path in self._arrays.iterdir())
        return sorted(name for name in names if _OURS.fullmatch(name))

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
            arrays: numpy arrays by name that hold it; they replace those of before.
                None where the account alone is kept, which then names no arrays.

        Returns:
            Whether it was news. What was finished or has ended stays as it is, and so
            does what was written further before: whoever reports late is not heard.

        Raises:
            OSError: the disk is full; the account is as it was.
            ValueError: an unknown request, malformed spans, or arrays for an account in
                memory.
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
            self._drop_file(number)
            file = digest = None
            if arrays is not None:
                file, digest = self._write_arrays(number, arrays)
            self._base.rows(
                "UPDATE trajectories SET spans = ?, finished = ?, file = ?, "
                "digest = ?, writes = writes + 1 WHERE number = ?",
                json.dumps(spans),
                bool(finished),
                file,
                digest,
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

        Args:
            numbers: of requests that are scored.
            version: of the weights that the update begins with, >= 0.

        Raises:
            ValueError: a request that is not scored, such as one that was consumed
                before, or one with elements of a version above this one; nothing is
                noted then.
        """
        check_count("version", version, 0)
        with self._base.transaction():
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
                    self._drop_file(known.number)
                self._base.rows(
                    "UPDATE trajectories SET spans = ?, finished = 0, score = NULL, "
                    "reward = NULL WHERE number = ?",
                    json.dumps(kept),
                    known.number,
                )

    def forget(self, version: int) -> None:
        """Removes the arrays of what ended before a version; the account stays.

        Args:
            version: of the oldest checkpoint that may still be restored.
        """
        check_count("version", version, 0)
        with self._base.transaction():
            ended = self._base.rows(
                "SELECT number FROM trajectories "
                "WHERE file IS NOT NULL AND version < ?",
                version,
            )
            for (number,) in ended:
                self._drop_file(number)

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
            ValueError: it has none, or their file is absent or damaged.
        """
        self.get(number)
        ((file, digest),) = self._base.rows(
            "SELECT file, digest FROM trajectories WHERE number = ?", number
        )
        if file is None:
            raise ValueError(f"request {number} has no arrays.")
        path = self._arrays / file
        try:
            data = read_bounded(path, most=1 << 40)
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError("its content is not what was written")
            with np.load(io.BytesIO(data), allow_pickle=False) as stored:
                return {name: stored[name] for name in stored.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path}, the arrays of request {number}, cannot be read ({error}). "
                f"Discard the request, or restore a version at which it had not begun: "
                f"it is written anew then."
            ) from error

    def _write_arrays(self, number: int, arrays: Mapping[str, Any]) -> tuple[str, str]:
        """The name of a file that no row names yet, and the digest of its content."""
        if self.folder is None:
            raise ValueError(
                f"request {number} has arrays, but the account is in memory; give "
                f"TrajectoryStore a folder, or arrays=None."
            )
        found = {name: np.asarray(array) for name, array in arrays.items()}
        for name, array in found.items():
            if array.dtype.hasobject:
                raise TypeError(
                    f"the array {name!r} of request {number} is of dtype "
                    f"{array.dtype}; give numbers, or texts as bytes."
                )
        buffer = io.BytesIO()
        np.savez(buffer, **found)  # pyright: ignore
        data = buffer.getvalue()
        ((writes,),) = self._base.rows(
            "SELECT writes FROM trajectories WHERE number = ?", number
        )
        name = f"{number}-{writes}.npz"
        write_atomically(self._arrays / name, data)
        return name, hashlib.sha256(data).hexdigest()

    def _drop_file(self, number: int) -> None:
        """The row names no file; what it named goes once that is on the disk."""
        ((file,),) = self._base.rows(
            "SELECT file FROM trajectories WHERE number = ?", number
        )
        if file is not None:
            self._base.rows(
                "UPDATE trajectories SET file = NULL, digest = NULL WHERE number = ?",
                number,
            )
            path = self._arrays / file
            self._base.afterwards(lambda: path.unlink(missing_ok=True))

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
