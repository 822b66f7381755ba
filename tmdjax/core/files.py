"""Files that are either whole or not there."""

import functools
import hashlib
import io
import logging
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

_LOGGER = logging.getLogger("tmdjax")


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file so that a reader, or a kill, sees the old or the new one whole.

    Folders are made as needed. The data reach the disk before the name does.

    Raises:
        OSError: the place cannot be written or is full; the old file is intact.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(
                f"cannot write {path}: {error.strerror or error}. Free space or mend "
                f"permissions, then run the same command to go on."
            ) from error
        raise


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file in hex digits; large ones are read piece by piece."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_sha256(path: str | os.PathLike[str]) -> str:
    """What a file holds, or a folder: the names and the content of all files below.

    A file is read once a process while its size and time stay. Names that begin with a
    dot are left out of a folder.

    Returns:
        SHA-256 in hex digits; 'absent' where there is nothing of that name.
    """
    path = Path(path)
    if path.is_file():
        return _sha256_of(path.resolve(), *_stamp(path))
    if not path.is_dir():
        return "absent"
    digest = hashlib.sha256()
    for file in sorted(path.rglob("[!.]*")):
        below = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in below.parts):
            line = f"{below.as_posix()}\0{content_sha256(file)}\n"
            digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@functools.cache
def _sha256_of(path: Path, size: int, modified_ns: int) -> str:
    """Digest of a file; size and time stand in the cache key alone."""
    return sha256(path)


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
