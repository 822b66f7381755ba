"""What converters of checkpoints share: folders, and tensors one a layer.

A checkpoint is a folder with config.json and ``<stem>.safetensors``, or shards that
``<stem>.safetensors.index.json`` names; transformers calls the stem 'model',
diffusers 'diffusion_pytorch_model'. Everything is on the host, in numpy.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from tmdjax.core.checks import check_count, check_name
from tmdjax.core.files import write_atomically
from tmdjax.core.trees import flatten
from tmdjax.core.types import Params
from tmdjax.models.checkpoints.safetensors import read_safetensors, write_safetensors

Folder = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """A parameter here, and the tensors of a checkpoint that hold it.

    Attributes:
        path: of the parameter, such as 'blocks/attention/query/kernel'.
        names: of the tensors, one a layer if ``stacked``, else one.
        shape: of one tensor in the checkpoint.
        stacked: whether the parameter has a leading layer axis.
        read: one tensor as it stands here.
        write: the inverse of ``read``.
    """

    path: str
    names: Sequence[str]
    shape: tuple[int, ...]
    stacked: bool
    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


def params_from_tensors(
    leaves: Iterable[Leaf],
    tensors: Mapping[str, Any],
    dtype_of: Callable[[Leaf], Any],
    network: str,
    redundant: Callable[[str], bool] = lambda name: False,
) -> dict[str, Any]:
    """Parameters from the tensors of a checkpoint.

    Args:
        leaves: all parameters of the network.
        tensors: arrays by name.
        dtype_of: the dtype of a parameter; None keeps that of its tensors.
        network: what the tensors should fit, for errors: 'a decoder of 2 layers'.
        redundant: names of tensors that are not read.

    Returns:
        A nested dict of numpy arrays.

    Raises:
        ValueError: tensors that are missing, not expected or of another shape, all
            of them by name.
    """
    leaves = list(leaves)
    shapes = {name: leaf.shape for leaf in leaves for name in leaf.names}
    problems = [
        f"{name} is missing, expected {list(shape)}"
        for name, shape in shapes.items()
        if name not in tensors
    ]
    for name, tensor in tensors.items():
        if name in shapes:
            if tuple(tensor.shape) != shapes[name]:
                problems.append(
                    f"{name} has shape {list(tensor.shape)}, expected "
                    f"{list(shapes[name])}"
                )
        elif not redundant(name):
            problems.append(f"{name} {list(tensor.shape)} is not expected")
    if problems:
        raise ValueError(
            f"{len(problems)} tensor(s) do not fit {network}: "
            f"{'; '.join(sorted(problems))}. Take configuration and tensors of one "
            f"checkpoint."
        )
    params: dict[str, Any] = {}
    for leaf in leaves:
        dtype = dtype_of(leaf)
        rows = (np.asarray(tensors[name]) for name in leaf.names)
        first = leaf.read(next(rows))
        kind = first.dtype if dtype is None else dtype
        value = np.empty((len(leaf.names), *first.shape), kind)
        value[0] = first
        for row, tensor in zip(value[1:], rows):
            row[...] = leaf.read(tensor)
        params[leaf.path] = value if leaf.stacked else value[0]
    return traverse_util.unflatten_dict(params, sep="/")


def tensors_from_params(
    leaves: Iterable[Leaf], shapes: Params, params: Params, network: str
) -> dict[str, np.ndarray]:
    """The inverse of :func:`params_from_tensors`, in the dtype of each parameter.

    Args:
        leaves: all parameters of the network.
        shapes: shape structs of the parameters.
        params: arrays.
        network: for errors, 'decoder' say.

    Raises:
        ValueError: parameters that are missing, not expected or of another shape.
    """
    values = flatten(params)
    want = {path: leaf.shape for path, leaf in flatten(shapes).items()}
    have = {path: tuple(np.shape(value)) for path, value in values.items()}
    if want != have:
        wrong = sorted(path for path in want | have if want.get(path) != have.get(path))
        listed = (f"{path}: {have.get(path)}, not {want.get(path)}" for path in wrong)
        raise ValueError(
            f"these are not the parameters of that {network}: {'; '.join(listed)}."
        )
    tensors = {}
    for leaf in leaves:
        value = np.asarray(values[leaf.path])
        rows = value if leaf.stacked else [value]
        for name, row in zip(leaf.names, rows, strict=True):
            tensors[name] = np.ascontiguousarray(leaf.write(row))
    return tensors


def read_weights(folder: Folder, stem: str) -> dict[str, np.ndarray]:
    """Reads ``<stem>.safetensors`` or the shards its index names.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: a damaged file, or a shard without a tensor of the index.
    """
    folder, weights, index = Path(folder), f"{stem}.safetensors", _index(stem)
    if (folder / weights).exists():
        return read_safetensors(folder / weights)
    if not (folder / index).exists():
        raise FileNotFoundError(
            f"{folder} has neither {weights} nor {index}; give the folder of a "
            f"checkpoint in the safetensors format."
        )
    weight_map = read_json(folder / index)["weight_map"]
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(set(weight_map.values())):
        check_name(f"a file of {folder / index}", file)
        names = [name for name, where in weight_map.items() if where == file]
        if not (folder / file).exists():
            raise FileNotFoundError(
                f"{folder / file} is absent; {index} puts {len(names)} tensors into "
                f"it, {names[0]} the first. Copy it beside the others."
            )
        found = read_safetensors(folder / file)
        lost = [name for name in names if name not in found]
        if lost:
            raise ValueError(
                f"{folder / file} lacks {', '.join(lost)}, which {index} puts into "
                f"it. Copy both again."
            )
        tensors |= found
    return tensors


def write_weights(
    folder: Folder, stem: str, tensors: Mapping[str, np.ndarray], max_shard_bytes: int
) -> None:
    """Writes tensors as one file, or as shards and their index.

    Args:
        folder: made if absent. Weights of that stem in it go, once the new ones are
            whole.
        stem: of the files.
        tensors: arrays by name.
        max_shard_bytes: what does not fit a file of this size is cut into several (a
            larger tensor has a file of its own).

    Raises:
        OSError: a file cannot be written.
    """
    folder = Path(folder)
    check_count("max_shard_bytes", max_shard_bytes)
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        write_safetensors(folder / f"{stem}.safetensors", tensors)
        (folder / _index(stem)).unlink(missing_ok=True)
        _remove_shards(folder, stem, ())
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / _index(stem), index)
    (folder / f"{stem}.safetensors").unlink(missing_ok=True)
    _remove_shards(folder, stem, weight_map.values())


def _remove_shards(folder: Path, stem: str, but: Iterable[str]) -> None:
    """Removes the shards of an earlier save; files of other names stay."""
    shard = re.compile(rf"{re.escape(stem)}-\d{{5}}-of-\d{{5}}\.safetensors")
    for path in folder.glob("*.safetensors"):
        if shard.fullmatch(path.name) and path.name not in but:
            path.unlink()


def _index(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is absent; give the folder of a checkpoint in the Hugging Face "
            f"layout."
        )
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}). Copy it again.") from None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object, whole or not at all."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
