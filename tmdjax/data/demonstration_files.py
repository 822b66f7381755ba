"""Demonstrations in the files of others: D4RL's HDF5 and the folders of Minari.

What is read is what is understood: entries of the names below, of numbers, stored in
the file itself. Anything else is refused by name, unless it is named in ``ignore``.
Needs h5py: ``pip install 'tmdjax[hdf5]'``.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tmdjax.core.checks import check_count, first_few
from tmdjax.core.files import json_of
from tmdjax.data import hdf5
from tmdjax.data.demonstrations import Demonstrations, read_demonstrations
from tmdjax.data.record_sets import MANIFEST

D4RL = ("observations", "actions", "rewards", "terminals", "timeouts")
D4RL_LEFT_OUT = ("next_observations", "infos", "metadata")
"""Known entries of no use here."""
MINARI = ("observations", "actions", "rewards", "terminations", "truncations")
MINARI_LEFT_OUT = ("infos",)


def load_demonstrations(path: str | os.PathLike[str], **options: Any) -> Demonstrations:
    """Demonstrations of any kind that is understood, told by what lies at a path.

    Args:
        path: a folder of :func:`tmdjax.data.write_demonstrations`, a folder of Minari
            (with data/main_data.hdf5), or a .hdf5 or .h5 file in the layout of D4RL.
        **options: of :func:`read_minari` or :func:`read_d4rl`.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is none of these.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a folder or file.")
    if (path / MANIFEST).is_file():
        return read_demonstrations(path, **options)
    if (path / "data").is_dir():
        return read_minari(path, **options)
    if path.is_file() and path.suffix in (".hdf5", ".h5"):
        return read_d4rl(path, **options)
    raise ValueError(
        f"{path} holds no demonstrations that are understood: a folder with {MANIFEST} "
        f"(tmdjax), a folder with data/main_data.hdf5 (Minari), or a .hdf5 or .h5 file "
        f"(D4RL)."
    )


def read_d4rl(
    path: str | os.PathLike[str],
    *,
    horizon: int | None = None,
    ignore: Sequence[str] = (),
) -> Demonstrations:
    """A file in the layout of D4RL.

    Understood are the datasets observations [step, feature], actions [step, action],
    rewards [step], terminals [step] and timeouts [step]; next_observations, infos and
    metadata are left out. Where the file ends inside an episode, it is cut there.

    Args:
        path: of the file.
        horizon: steps after which an episode was cut, for a file without timeouts
            alone; counted anew after every end.
        ignore: other entries to leave out.

    Raises:
        ImportError: h5py is not installed.
        TypeError: ignore is one text.
        ValueError: the file, or an entry of it, is not as described; named.
    """
    left_out = (*D4RL_LEFT_OUT, *hdf5.listed("ignore", ignore))
    with hdf5.opened(path) as file:
        hdf5.check_names(path, file, D4RL, left_out, optional=D4RL[4:])
        arrays = {name: hdf5.numbers(path, file, name) for name in D4RL if name in file}
    count = len(arrays["actions"])
    terminated = _flags(path, "terminals", arrays["terminals"], count)
    if "timeouts" in arrays:
        if horizon is not None:
            raise ValueError(
                f"{path} has timeouts, which say where episodes were cut; leave out "
                f"horizon={horizon}."
            )
        truncated = _flags(path, "timeouts", arrays["timeouts"], count)
    elif horizon is None:
        raise ValueError(
            f"{path} has no timeouts: where episodes were cut is not known. Give "
            f"horizon=, the steps after which they were."
        )
    else:
        truncated = _cuts(terminated, check_count("horizon", horizon))
    truncated = truncated & ~terminated
    truncated[-1:] |= ~terminated[-1:]
    return Demonstrations(
        observation=_seen(arrays["observations"]),
        action=_floats(arrays["actions"]),
        reward=_floats(_column(path, "rewards", arrays["rewards"], count)),
        terminated=terminated,
        truncated=truncated,
        meta={"source": "D4RL", "file": Path(path).name},
    )


def read_minari(
    folder: str | os.PathLike[str],
    *,
    entries: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> Demonstrations:
    """A data set of Minari (0.5) whose data are HDF5.

    Understood are groups episode_0, episode_1 and so on of data/main_data.hdf5, each
    with observations [step + 1, ...], actions [step, action], rewards, terminations and
    truncations [step]; infos are left out. The last observation of an episode, after
    its last action, is not kept. An episode that nothing ended is cut at its last step.

    Args:
        folder: of the data set, in which 'data' lies.
        entries: of observations that are a dict, [step + 1] or [step + 1, feature],
            concatenated in this order.
        ignore: other entries of episodes to leave out.

    Raises:
        ImportError: h5py is not installed.
        FileNotFoundError: the folder has no such file.
        TypeError: entries or ignore is one text.
        ValueError: the file, or an entry of it, is not as described; named.
    """
    entries = hdf5.listed("entries", entries)
    left_out = (*MINARI_LEFT_OUT, *hdf5.listed("ignore", ignore))
    path = Path(folder, "data", "main_data.hdf5")
    described: Any = {}
    if (told := path.with_name("metadata.json")).is_file():
        described = json_of(told)
        kind = described.get("data_format") if isinstance(described, dict) else None
        if kind not in (None, "hdf5"):
            raise ValueError(
                f"{told} says data_format={kind!r}, and 'hdf5' is read; convert it, as "
                f"by minari.DataCollector(..., data_format='hdf5')."
            )
    parts = []
    with hdf5.opened(path) as file:
        names = [f"episode_{i}" for i in range(len(file))]
        if not names or {*names} != {*file}:
            odd = first_few(sorted({*file} - {*names})) or "no group"
            raise ValueError(f"{path} has {odd}; it needs episode_0, episode_1, ...")
        for name in names:
            group = hdf5.entry(path, file, name)
            where = f"{path}: {name}"
            if not isinstance(group, Mapping):
                raise ValueError(f"{where} is a dataset; it must be a group.")
            hdf5.check_names(where, group, MINARI, left_out)
            parts.append(_episode(where, group, entries))
    arrays = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
    known = ("dataset_id", "minari_version", "algorithm_name", "author")
    told = {k: described[k] for k in known if k in described}
    return Demonstrations(**arrays, meta={"source": "Minari", **told})


def _episode(where: str, group: Any, entries: tuple[str, ...]) -> dict[str, np.ndarray]:
    arrays = {name: hdf5.numbers(where, group, name) for name in MINARI[1:]}
    steps = len(arrays["actions"])
    seen = hdf5.entry(where, group, "observations")
    if isinstance(seen, Mapping):
        if not entries or not {*entries} <= {*seen}:
            raise ValueError(
                f"{where}: observations are a dict of {', '.join(map(repr, seen))}, "
                f"entries={entries}; name those to concatenate."
            )
        parts = [
            _part(f"{where}/observations", seen, name, steps + 1) for name in entries
        ]
        observation = np.concatenate(parts, axis=1)
    elif entries:
        raise ValueError(
            f"{where}: observations are one array, and entries={entries} names parts "
            f"of a dict; leave it out."
        )
    else:
        observation = _seen(hdf5.numbers(where, group, "observations"))
    if len(observation) != steps + 1:
        raise ValueError(
            f"{where}: {len(observation)} observations and {steps} actions; there is "
            f"one observation more than actions."
        )
    terminated = _flags(where, "terminations", arrays["terminations"], steps)
    truncated = _flags(where, "truncations", arrays["truncations"], steps)
    truncated &= ~terminated
    if (terminated | truncated)[:-1].any():
        raise ValueError(f"{where} goes on after its end; split it there.")
    truncated[-1:] |= ~terminated[-1:]
    return {
        "observation": observation[:-1],
        "action": _floats(arrays["actions"]),
        "reward": _floats(_column(where, "rewards", arrays["rewards"], steps)),
        "terminated": terminated,
        "truncated": truncated,
    }


def _part(where: str, group: Any, name: str, count: int) -> np.ndarray:
    """One entry of observations that are a dict, float32 [count, feature]."""
    array = hdf5.numbers(where, group, name)
    if array.ndim > 2 or len(array) != count:
        raise ValueError(
            f"{where}/{name} has shape {array.shape}; parts of an observation are "
            f"[{count}, feature], one row more than actions."
        )
    return _floats(array).reshape(count, -1)


def _seen(array: np.ndarray) -> np.ndarray:
    """Images in uint8 as they are, anything else as float32."""
    return array if array.dtype == np.uint8 and array.ndim == 4 else _floats(array)


def _floats(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float32)


def _column(where: Any, name: str, array: np.ndarray, count: int) -> np.ndarray:
    """One number a step, [step], which others also store as [step, 1]."""
    if array.shape not in ((count,), (count, 1)):
        raise ValueError(
            f"{where}/{name} has shape {array.shape}; it needs one number for each of "
            f"the {count} actions."
        )
    return array.reshape(count)


def _flags(where: Any, name: str, array: np.ndarray, count: int) -> np.ndarray:
    """Bool [step] of flags that others store as bytes or floats."""
    array = _column(where, name, array, count)
    if not np.isin(array, (0, 1)).all():
        raise ValueError(f"{where}/{name} has values other than 0 and 1.")
    return array.astype(bool)


def _cuts(terminated: np.ndarray, horizon: int) -> np.ndarray:
    """Where episodes of at most ``horizon`` steps were cut, bool [step]."""
    cuts, length = np.zeros_like(terminated), 0
    for i, ended in enumerate(terminated):
        length += 1
        cuts[i] = length == horizon and not ended
        length = 0 if ended or cuts[i] else length
    return cuts
