"""Registry of data sources: where each comes from and how to get it.

Nothing here downloads. A source names files of an installed package with their
SHA-256; a loader reads those files or the error says what to install. A new
source is one entry of ``SOURCES``.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tmdjax.core.registry import Registry, suggestion
from tmdjax.data import digits, procedural
from tmdjax.data.dataset import Dataset


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where a data set comes from.

    Attributes:
        name: in the registry.
        package: that holds the files.
        install: exact command that brings the package.
        licence: as the package states it.
        description: one line.
        loader: ``(files, **options) -> Dataset``, files being paths by the names
            below; its keyword arguments are the options of :func:`load`.
        root: returns the folder of the installed package, None where it is
            absent.
        files: SHA-256 (hex) by path below the root; empty for a procedural set.
    """

    name: str
    package: str
    install: str
    licence: str
    description: str
    loader: Callable[..., Dataset]
    root: Callable[[], Path | None] = lambda: None
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)


SOURCES: Registry[Source] = Registry("data source")


def load(name: str, **options: Any) -> Dataset:
    """Loads a data set by name.

    Args:
        name: a key of ``SOURCES``.
        **options: of the source's loader, such as ``train_count`` or ``seed``.

    Returns:
        The data set, in host memory, free of non-finite values.

    Raises:
        ValueError: unknown name or option, a file that differs from the one
            named, or damaged content.
        FileNotFoundError: the package is not installed; the message has the
            command.
    """
    source = SOURCES[name]
    known = list(inspect.signature(source.loader).parameters)[1:]
    for option in options:
        if option not in known:
            raise ValueError(
                f"data source {name!r} has no option {option!r}; it has: "
                f"{', '.join(known) or 'none'}.{suggestion(option, known)}"
            )
    return source.loader(find_files(source), **options)


def find_files(source: Source) -> dict[str, Path]:
    """Finds the source's files and verifies their checksums (once a process).

    Returns:
        Paths by the names in ``source.files``.

    Raises:
        FileNotFoundError: package or file absent.
        ValueError: a checksum differs.
    """
    root = source.root()
    found = {}
    for name, expected in source.files.items():
        path = None if root is None else root / name
        if path is None or not path.is_file():
            what = f"package {source.package!r}" if path is None else f"file {path}"
            raise FileNotFoundError(
                f"data source {source.name!r}: {what} is not installed. Run: "
                f"{source.install}"
            )
        stat = path.stat()
        actual = _sha256(path, stat.st_size, stat.st_mtime_ns)
        if actual != expected:
            raise ValueError(
                f"data source {source.name!r}: {path} has SHA-256 {actual}, expected "
                f"{expected}: it is damaged or of another version of "
                f"{source.package!r}. Install it again: {source.install}"
            )
        found[name] = path
    return found


@functools.cache
def _sha256(path: Path, size: int, modified_ns: int) -> str:
    """Digest of a file; size and time stand in the cache key alone."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _python_package(module: str) -> Path | None:
    """Folder of a Python package, found without importing it."""
    spec = importlib.util.find_spec(module)
    folders = spec.submodule_search_locations if spec else None
    return Path(folders[0]) if folders else None


def _built_in(name: str, description: str, loader: Callable[..., Dataset]) -> Source:
    return Source(
        name=name,
        package="tmdjax",
        install="nothing to install",
        licence="Apache-2.0",
        description=description,
        loader=loader,
    )


for _source in (
    Source(
        name="digits",
        package="scikit-learn",
        install="pip install 'tmdjax[demo]'",
        licence="BSD-3-Clause",
        description="1,797 handwritten digits, 8x8 grey",
        loader=digits.load_digits,
        root=functools.partial(_python_package, "sklearn"),
        files={
            digits.FILE: (
                "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
            )
        },
    ),
    _built_in(
        "sprites",
        "one coloured shape of eight on a plain background",
        procedural.load_sprites,
    ),
    _built_in(
        "checkerboard", "2-D points on eight squares", procedural.load_checkerboard
    ),
    _built_in("two_moons", "2-D points on two half circles", procedural.load_two_moons),
    _built_in("rings", "2-D points on three circles", procedural.load_rings),
):
    SOURCES.register(_source.name)(_source)
