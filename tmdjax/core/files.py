"""Files that are either whole or not there."""

import os
import tempfile
from pathlib import Path


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
