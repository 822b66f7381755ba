"""A database of SQLite that one process writes, with errors that say what to do."""

import contextlib
import errno
import os
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any


class Database:
    """Tables in a file. One process has it open, and uses it from one thread at a time.

    What was committed survives every end of the process. A loss of power may take back
    the latest transactions, each whole: what is left is the state after an earlier one.
    It takes back neither a transaction that called :meth:`make_durable` nor any before
    that: only there the disk is waited for, some milliseconds (SQLite's write-ahead log
    under ``synchronous=NORMAL``).
    """

    def __init__(
        self,
        path: str,
        kind: int,
        version: int,
        tables: Sequence[str],
        *,
        check: str,
    ):
        """Opens it, or makes it.

        Args:
            path: of the file, in a folder that is there; ':memory:' for none.
            kind: number in the header by which its program is known.
            version: of its tables.
            tables: statements that make them.
            check: the table that is looked through at opening, in time that grows with
                its size. Damage of the others is met where it is read.

        Raises:
            OSError: the file cannot be written, or the disk is full.
            RuntimeError: it is open elsewhere.
            ValueError: the file is damaged, of another version or of another program;
                it is left as it is.
        """
        # SQLite follows links and remembers the folder; so does the log beside the file
        self._path = path if path == ":memory:" else os.path.realpath(path)
        self._is_durable = False
        with self._translated():
            self._base = sqlite3.connect(
                self._path, timeout=0, isolation_level=None, check_same_thread=False
            )
            try:
                self._open(kind, version, tables, check)
            except BaseException:
                self._base.close()
                raise

    def _open(self, kind: int, version: int, tables: Sequence[str], check: str) -> None:
        self._base.execute("PRAGMA locking_mode = EXCLUSIVE")
        ((there,),) = self._base.execute("SELECT count(*) FROM sqlite_master")
        ((its_kind,),) = self._base.execute("PRAGMA application_id")
        ((its_version,),) = self._base.execute("PRAGMA user_version")
        if there and its_kind != kind:
            raise ValueError(
                f"{self._path} is of another program: its header has {its_kind:#x}, "
                f"not {kind:#x}. Give another folder."
            )
        if there and its_version != version:
            raise ValueError(
                f"{self._path} has tables of version {its_version}; this tmdjax reads "
                f"version {version}. Go on with the tmdjax that made it, or give "
                f"another folder."
            )
        self._base.execute("PRAGMA auto_vacuum = FULL")  # what is deleted frees space
        self._base.execute("PRAGMA journal_mode = WAL")
        self._base.execute("PRAGMA synchronous = NORMAL")
        with self.transaction():  # takes the lock
            if not there:
                for statement in tables:
                    self._base.execute(statement)
                self._base.execute(f"PRAGMA application_id = {kind}")
                self._base.execute(f"PRAGMA user_version = {version}")
        (found,) = self._base.execute(f"PRAGMA quick_check({check})").fetchone()
        if found != "ok":
            raise self.damaged(found)

    def close(self) -> None:
        """Leaves the file to others; it cannot be used any more."""
        self._base.close()

    def rows(self, statement: str, *given: Any) -> list[Any]:
        """What a statement gives.

        Raises:
            OSError: the disk is full, or fails.
            ValueError: the file is damaged.
            sqlite3.ProgrammingError: it was closed.
        """
        with self._translated():
            return self._base.execute(statement, given).fetchall()

    def make_durable(self) -> None:
        """No loss of power takes back the transaction around it once that ended."""
        self._is_durable = True

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All statements inside are done at once, or, if anything raises, none.

        One that begins inside another is a part of it: it is done when that one is. If
        it raises, and that is caught inside the other, its own statements are undone.

        Raises:
            OSError: the disk is full, or fails.
            ValueError: the file is damaged.
        """
        inside = self._base.in_transaction
        if inside:
            begin, end = "SAVEPOINT part", "RELEASE part"
            undo = ("ROLLBACK TO part", end)
        else:
            begin, end, undo = "BEGIN IMMEDIATE", "COMMIT", ("ROLLBACK",)
            self._is_durable = False
        with self._translated():
            self._base.execute(begin)
            try:
                yield
                self._base.execute(end)
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    for statement in undo:
                        self._base.execute(statement)
                raise
        if not inside and self._is_durable and self._path != ":memory:":
            # what has left the log for the file was synced by SQLite when it did
            with open(f"{self._path}-wal", "rb+") as log:
                os.fsync(log.fileno())

    def damaged(self, how: Any) -> ValueError:
        """The error for content that cannot be."""
        return ValueError(
            f"{self._path} is damaged ({how}). Move it away, and begin the run anew or "
            f"from a copy."
        )

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Errors of SQLite as those that the methods name."""
        try:
            yield
        except sqlite3.ProgrammingError:  # such as after close; the file is all right
            raise
        except sqlite3.Error as error:
            name = getattr(error, "sqlite_errorname", "")
            if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
                raise RuntimeError(
                    f"{self._path} is in use by another run; wait for it, or choose "
                    f"another folder."
                ) from error
            if name.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM")):
                raise OSError(errno.EACCES, f"{error}", self._path) from error
            if name.startswith("SQLITE_FULL"):
                raise OSError(errno.ENOSPC, f"{error}", self._path) from error
            if name.startswith("SQLITE_IOERR"):
                raise OSError(errno.EIO, f"{error}", self._path) from error
            raise self.damaged(error) from error
