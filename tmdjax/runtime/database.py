"""A database of SQLite that one process writes, with errors that say what to do."""

import contextlib
import errno
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from typing import Any


class Database:
    """Tables in a file. One process has it open, and uses it from one thread at a time.

    What was committed is on the disk: neither a kill nor a loss of power takes it back.
    """

    def __init__(
        self,
        path: str,
        kind: int,
        version: int,
        tables: Sequence[str],
        *,
        make: bool = True,
    ):
        """Opens it, or makes it.

        Args:
            path: of the file, in a folder that is there; ':memory:' for none.
            kind: number in the header by which its program is known.
            version: of its tables.
            tables: statements that make them.
            make: whether it may be made; False where it must be there already.

        Raises:
            OSError: the file cannot be written, or the disk is full.
            RuntimeError: it is open elsewhere.
            ValueError: the file is damaged, of another version or of another program,
                or has nothing and must not be made; it is left as it is.
        """
        self._path = path
        self._inside = False
        self._afterwards: list[Callable[[], Any]] = []
        with self._translated():
            self._base = sqlite3.connect(
                path, timeout=0, isolation_level=None, check_same_thread=False
            )
            try:
                self._open(kind, version, tables, make)
            except BaseException:
                self._base.close()
                raise

    def _open(self, kind: int, version: int, tables: Sequence[str], make: bool) -> None:
        self._base.execute("PRAGMA locking_mode = EXCLUSIVE")
        ((there,),) = self._base.execute("SELECT count(*) FROM sqlite_master")
        ((its_kind,),) = self._base.execute("PRAGMA application_id")
        ((its_version,),) = self._base.execute("PRAGMA user_version")
        if not there and not make:
            raise ValueError(
                f"{self._path} is absent or empty, but files that it should know lie "
                f"beside it; give another folder, or move them away."
            )
        if there and (its_kind, its_version) != (kind, version):
            raise ValueError(
                f"{self._path} is of another program or version: its header has "
                f"{its_kind:#x} and version {its_version}, not {kind:#x} and "
                f"{version}. Give another folder."
            )
        self._base.execute("PRAGMA journal_mode = WAL")
        self._base.execute("PRAGMA synchronous = FULL")
        with self.transaction():  # takes the lock
            if not there:
                for statement in tables:
                    self._base.execute(statement)
                self._base.execute(f"PRAGMA application_id = {kind}")
                self._base.execute(f"PRAGMA user_version = {version}")
        ((found,),) = self._base.execute("PRAGMA quick_check(1)")
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

    def afterwards(self, call: Callable[[], Any]) -> None:
        """Calls something once the transaction is on the disk, and not if it fails."""
        self._afterwards.append(call)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All statements inside are done at once, or, if anything raises, none.

        One that begins inside another is a part of it.
        """
        if self._inside:
            yield
            return
        self._inside = True
        try:
            with self._translated():
                self._base.execute("BEGIN IMMEDIATE")
                try:
                    yield
                    self._base.execute("COMMIT")
                except BaseException:
                    self._afterwards.clear()
                    with contextlib.suppress(sqlite3.Error):
                        self._base.execute("ROLLBACK")
                    raise
        finally:
            self._inside = False
        while self._afterwards:
            self._afterwards.pop(0)()

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
