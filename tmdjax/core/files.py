"""Files that are either whole or not there."""

import argparse
import errno
import functools
import hashlib
import io
import json
import logging
import math
import os
import secrets
import stat
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

_LOGGER = logging.getLogger("tmdjax")


def named_path(text: str) -> Path:
    """The path that an argument of a command names: '' would be the current folder.

    ``~`` is the home folder; after ``--workdir=`` shells leave it as it is.

    Raises:
        ArgumentTypeError: nothing is named.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; name a folder (. is this one)")
    return Path(text).expanduser()


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file so that a reader, or a kill, sees the old or the new one whole.

    Folders are made as needed. The data reach the disk before the name does.

    Raises:
        OSError: the place cannot be written or is full; the old file is intact.
    """
    write_together({Path(path): [data]})


def write_together(
    files: Mapping[Path, Iterable[Any]],
    *,
    remove_before: Iterable[Path] = (),
    remove_after: Iterable[Path] = (),
) -> None:
    """Writes files that belong together; none takes its name before all are written.

    A full disk, a place that cannot be written and an error in the content so leave
    every old file as it was. Folders are made as needed.

    Args:
        files: the content of each as buffers of bytes, taken one at a time. They take
            their names in this order.
        remove_before: files that go once all are on the disk, before any takes its
            name; they may be absent.
        remove_after: files that go when all have their names; they may be absent.

    Raises:
        OSError: the place cannot be written or is full, or a folder has the name of
            one of the files; the old files are intact.
    """
    written: dict[Path, Path] = {}
    path = None
    try:
        for path, buffers in files.items():
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "a folder has that name")
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            with open(temporary, "xb") as file:  # readable to whom the umask says
                written[path] = temporary
                for buffer in buffers:
                    file.write(buffer)
                file.flush()
                os.fsync(file.fileno())
        for path in remove_before:
            path.unlink(missing_ok=True)
        for path in list(written):
            os.replace(written[path], path)
            del written[path]
        for path in remove_after:
            path.unlink(missing_ok=True)
    except BaseException as error:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(
                f"cannot write {path}: {error.strerror or error}. Free space or mend "
                f"permissions, then run the same command to go on."
            ) from error
        raise


def in_native_order(array: Any) -> np.ndarray:
    """The same numbers in the byte order of this machine.

    Bytes on disk are read back in that order; big-endian arrays come from FITS, IDX and
    HDF5 files, as dtypes such as '>f4'.
    """
    array = np.asarray(array)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file in hex digits; large ones are read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_sha256(path: str | os.PathLike[str]) -> str:
    """What a file holds, or a folder: the names and the content of all files below.

    A file is read once a process while its size and time stay. Links are followed. Of a
    folder, names that begin with a dot are left out.

    Returns:
        SHA-256 in hex digits; 'absent' where there is nothing of that name.

    Raises:
        OSError: something there cannot be read.
    """
    path = Path(path)
    if path.is_file():
        return _sha256_of(path.resolve(), *_stamp(path))
    if not path.is_dir():
        return "absent"
    found, walked = {}, {}
    for place, folders, files in os.walk(path, onerror=_raise, followlinks=True):
        real, below = os.path.realpath(place), Path(place).relative_to(path)
        if real in walked:  # a link to what was read, or in a ring
            found[below], folders[:] = f"as {walked[real]}", []
            continue
        walked[real] = below
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and Path(place, name).is_file():
                found[below / name] = content_sha256(Path(place, name))
    digest = hashlib.sha256()
    for below in sorted(found):
        line = f"{below.as_posix()}\0{found[below]}\n"
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _raise(error: OSError) -> None:
    raise error


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@functools.cache
def _sha256_of(path: Path, size: int, modified_ns: int) -> str:
    """Digest of a file; size and time stand in the cache key alone."""
    return sha256(path)


def check_plain(path: str | os.PathLike[str], most: float = math.inf) -> int:
    """The bytes of a file that strangers may have made, once it is safe to open it.

    Args:
        path: of a plain file; reading a pipe or a device might never end.
        most: bytes that it may have.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be looked at.
        ValueError: it is no plain file, or larger.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{os.fspath(path)} is no plain file; give the path of one.")
    if status.st_size > most:
        raise ValueError(
            f"{os.fspath(path)} has {status.st_size} bytes; such a file has at most "
            f"{most}. It is damaged or of another kind."
        )
    return status.st_size


def read_bounded(path: str | os.PathLike[str], most: int = 10**9) -> bytes:
    """Reads a plain file of at most so many bytes; raises as :func:`check_plain`."""
    size = check_plain(path, most)
    with open(path, "rb") as file:
        return file.read(size)  # room for so many is taken at once


def text_of(path: str | os.PathLike[str], most: int = 10**8) -> str:
    """The text of a file in UTF-8, without its byte-order mark; lines end with LF.

    Raises:
        FileNotFoundError, OSError, ValueError: as :func:`check_plain`.
        ValueError: it is not UTF-8; names the file.
    """
    try:
        text = read_bounded(path, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{os.fspath(path)} is not UTF-8 ({error}); save it as UTF-8."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def json_of(path: str | os.PathLike[str], most: int = 10**9) -> Any:
    """The content of a JSON file.

    Raises:
        FileNotFoundError, OSError, ValueError: as :func:`read_bounded`.
        ValueError: it is not JSON, or nested too deeply; names the file.
    """
    text = read_bounded(path, most)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{os.fspath(path)} is not JSON ({error}). Copy or write it again."
        ) from None


def array_of(path: str | os.PathLike[str]) -> np.ndarray:
    """The array of a .npy file, mapped into memory: only what is used is read.

    Raises:
        FileNotFoundError, OSError, ValueError: as :func:`check_plain`.
        ValueError: it is damaged, or does not hold one array of plain values. The
            message says why and leaves the name of the file to the caller.
    """
    check_plain(path)
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except EOFError as error:
        raise ValueError(f"{error}") from error
    if not isinstance(found, np.ndarray):
        found.close()
        raise ValueError("it holds several arrays")
    return found


def cached_array(
    path: str | os.PathLike[str], content: str, make: Callable[[], np.ndarray]
) -> np.ndarray:
    """Reads an array that was made of the same content, or makes and stores it.

    Args:
        path: of the .npz file.
        content: hash of everything the array depends on. A file of other content,
            or a damaged one, is made again; that is logged.
        make: computes the array.
    """
    path = Path(path)
    if path.exists():
        try:
            with np.load(path) as stored:
                found, array = str(stored["content"]), stored["array"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            _LOGGER.warning("%s is damaged (%s); computing it again", path, error)
        else:
            if found == content:
                return array
            _LOGGER.warning(
                "%s holds content %s, not %s (another model, noise or setting); "
                "computing it again",
                path,
                found[:12],
                content[:12],
            )
    array = make()
    buffer = io.BytesIO()
    np.savez(buffer, content=content, array=array)
    write_atomically(path, buffer.getvalue())
    return array
