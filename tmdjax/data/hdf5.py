"""HDF5 files of others: what is understood of them is read, and nothing else.

Needs h5py: ``pip install 'tmdjax[hdf5]'``.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tmdjax.core.checks import first_few
from tmdjax.core.optional import import_optional

_FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32", 32000: "lzf"}
_MOST_BYTES = 2**36


def opened(path: str | os.PathLike[str]) -> Any:
    """A file, to be read inside ``with``.

    Raises:
        ImportError: h5py is not installed.
        FileNotFoundError: it is not there.
        ValueError: it is no HDF5 file.
    """
    h5py = import_optional("h5py", "reading HDF5", "hdf5")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist, or is no file.")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} is no HDF5 file ({error}); copy it again.") from error


def listed(option: str, names: Sequence[str]) -> tuple[str, ...]:
    """Names as a tuple; TypeError for one text, whose letters would be the names."""
    if isinstance(names, str):
        raise TypeError(f"{option}={names!r} is one name; give ({names!r},).")
    return tuple(names)


def check_names(
    where: Any,
    group: Any,
    names: Sequence[str],
    left_out: Sequence[str],
    optional: Sequence[str] = (),
) -> None:
    """Raises ValueError unless a group has the names, and no others."""
    missing = [n for n in names if n not in group and n not in optional]
    unknown = sorted({*group} - {*names, *left_out})
    if missing or unknown:
        raise ValueError(
            f"{where}: {first_few(missing) or 'nothing'} is missing and "
            f"{first_few(map(repr, unknown)) or 'nothing'} is not understood; add the "
            f"former, and name the latter in ignore= to leave it out."
        )


def entry(where: Any, group: Any, name: str) -> Any:
    """A group or dataset that lies in the file itself."""
    h5py = import_optional("h5py", "reading HDF5", "hdf5")
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ValueError(
            f"{where}/{name} is a link; write the file anew with the data in it."
        )
    return group[name]


def numbers(where: Any, group: Any, name: str) -> np.ndarray:
    """A dataset of numbers, stored in the file by filters that are known."""
    found = entry(where, group, name)
    if not hasattr(found, "dtype"):
        raise ValueError(f"{where}/{name} is a group; it must be a dataset.")
    if found.dtype.kind not in "biuf" or not found.shape:
        raise ValueError(
            f"{where}/{name} is {found.dtype} {found.shape}; it must be an array of "
            f"numbers."
        )
    stored = found.id.get_create_plist()
    codes = [stored.get_filter(i)[0] for i in range(stored.get_nfilters())]
    odd = [code for code in codes if code not in _FILTERS]
    if odd or found.is_virtual or found.external:
        what = f"filter {odd[0]}" if odd else "data outside the file"
        raise ValueError(
            f"{where}/{name} has {what}; write it anew, contiguous or with "
            f"{', '.join(_FILTERS.values())}."
        )
    if found.nbytes > _MOST_BYTES:
        raise ValueError(
            f"{where}/{name} is said to have {found.nbytes} bytes; {_MOST_BYTES} are "
            f"read at most. Split the file."
        )
    return found[()]
