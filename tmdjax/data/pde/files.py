"""Trajectories of others: files of PDEArena (HDF5) and of APEBench (.npy and JSON).

What is understood is read; anything else is refused by name, unless ``ignore`` has it.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tmdjax.core.checks import check_choice, check_range
from tmdjax.core.files import array_of, json_of
from tmdjax.data import hdf5
from tmdjax.data.pde.trajectories import Trajectories

_ONE_FIELD = re.compile(r"pde_\d+-\d+")
_SMOKE = ("u", "vx", "vy", "dt", "dx", "dy")
_COORDINATES = ("t", "x", "y")
_PARAMETERS = {"v": "viscosity", "buo_y": "buoyancy"}


def read_pdearena(
    path: str | os.PathLike[str], split: str = "train", *, ignore: Sequence[str] = ()
) -> Trajectories:
    """A file in a layout of PDEArena: a group a split, a row a trajectory.

    Understood are one field in one dimension, pde_FRAMES-POINTS [row, frame, x], as the
    Kuramoto-Sivashinsky sets have it, and smoke in two, u, vx and vy [row, frame, x, y]
    (channels in this order), as the Navier-Stokes sets have it; beside them dt, dx (and
    dy, which must equal dx), and v (viscosity) or buo_y (buoyancy) [row]. Coordinates
    t, x and y are left out.

    Args:
        path: of the file.
        split: 'train', 'valid' or 'test', the name of the group.
        ignore: other entries to leave out.

    Raises:
        ImportError: h5py is not installed.
        FileNotFoundError: the file is not there.
        ValueError: the file, or an entry of it, is not as described; named.
    """
    with hdf5.opened(path) as file:
        check_choice(f"split of {path}", split, list(file))
        group, where = hdf5.entry(path, file, split), f"{path}: {split}"
        if not isinstance(group, Mapping):
            raise ValueError(f"{where} is a dataset; it must be a group.")
        fields = [n for n in group if _ONE_FIELD.fullmatch(n) and n not in ignore]
        if len(fields) > 1:
            raise ValueError(
                f"{where} has {', '.join(fields)}; name all but one resolution in "
                f"ignore=."
            )
        names = (*fields, "dt", "dx") if fields else _SMOKE
        known = (*_COORDINATES, *_PARAMETERS, *ignore)
        hdf5.check_names(where, group, names, known)
        arrays = {name: hdf5.numbers(where, group, name) for name in names}
        parameters = {
            plain: np.asarray(hdf5.numbers(where, group, name), np.float64).reshape(-1)
            for name, plain in _PARAMETERS.items()
            if name in group
        }
    columns = {
        name: np.asarray(arrays[name], np.float64).reshape(-1)
        for name in ("dt", "dx", "dy")
        if name in arrays
    }
    if "dy" in columns and not np.allclose(columns["dx"], columns["dy"]):
        raise ValueError(f"{where}: dx and dy differ; only square cells are read.")
    parts = [arrays[name] for name in (fields or _SMOKE[:3])]
    axes = 3 if fields else 4
    for name, part in zip(fields or _SMOKE[:3], parts):
        if part.ndim != axes or part.shape != parts[0].shape:
            raise ValueError(
                f"{where}/{name} has shape {part.shape}; it needs {axes} axes, and "
                f"fields have one shape."
            )
    return Trajectories(
        states=np.stack([np.asarray(part, np.float32) for part in parts], -1),
        dt=columns["dt"],
        dx=columns["dx"],
        parameters=parameters,
        equation="kuramoto_sivashinsky" if fields else "navier_stokes_smoke",
        meta={"source": "PDEArena", "file": Path(path).name, "split": split},
    )


def read_apebench(path: str | os.PathLike[str]) -> Trajectories:
    """A file that ``apebench.scraper`` wrote: NAME_train.npy or NAME_test.npy.

    Fields are [row, frame, channel, *space] there. NAME.json beside it, where it is,
    tells the domain and the step of scenarios in physical units; others have neither,
    and then the domain has length 1 and frames are 1 apart.

    Args:
        path: of the .npy file.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it is not as described.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, or is no file.")
    try:
        found = array_of(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is no .npy file of numbers ({error}).") from error
    if found.dtype.kind != "f":
        raise ValueError(f"{path} holds no array of floats; give NAME_train.npy.")
    if not 4 <= found.ndim <= 6:
        raise ValueError(
            f"{path} has shape {found.shape}; fields of APEBench are "
            f"[row, frame, channel, *space]."
        )
    name = re.sub(r"_(train|test)$", "", path.stem)
    described: Any = {}
    if (beside := path.with_name(f"{name}.json")).is_file():
        described = json_of(beside)
        if not isinstance(described, dict) or "info" not in described:
            raise ValueError(f"{beside} has no 'info'; copy it again, or remove it.")
        described = described["info"]
    length, dt = (float(described.get(k) or 1.0) for k in ("domain_extent", "dt"))
    check_range(f"domain_extent of {beside}", length, 0, open_low=True)
    rows, points = len(found), found.shape[-1]
    return Trajectories(
        states=np.moveaxis(np.asarray(found, np.float32), 2, -1),
        dt=np.full(rows, dt),
        dx=np.full(rows, length / points),
        equation=name,
        meta={"source": "APEBench", "file": path.name},
    )
