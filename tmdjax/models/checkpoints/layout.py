"""What converters of checkpoints share: folders, and tensors one a layer.

A checkpoint is a folder with config.json and ``<stem>.safetensors``, or shards that
``<stem>.safetensors.index.json`` names; transformers calls the stem 'model',
diffusers 'diffusion_pytorch_model'. Everything is on the host, in numpy.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from tmdjax.core.checks import check_count, check_name, first_few
from tmdjax.core.files import in_native_order, json_of, write_together
from tmdjax.core.trees import flatten
from tmdjax.core.types import Params
from tmdjax.models.checkpoints.safetensors import encode_safetensors, read_safetensors

Folder = str | os.PathLike[str]
_LONGEST_JSON = 100_000_000
CONFIG = "config.json"
_PICKLED = "load it with its own library and save it there with safe_serialization=True"
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
# What files of weights that are not read call for, by their ending.
_FOREIGN = {
    ".bin": _PICKLED,
    ".pt": _PICKLED,
    ".pth": _PICKLED,
    ".ckpt": _PICKLED,
    ".h5": _PICKLED,
    ".msgpack": _PICKLED,
    ".gguf": "models.load_gguf reads it",
    ".safetensors": "rename it if it is the whole checkpoint under another name",
}


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
        dtype_of: the dtype of a parameter; None keeps that of its tensors, and where
            those of a stack differ takes float32, which holds the numbers of each
            (float64 where one of them is).
        network: what the tensors should fit, for errors: 'a decoder of 2 layers'.
        redundant: names of tensors that are not read.

    Returns:
        A nested dict of numpy arrays.

    Raises:
        ValueError: tensors that are missing, not expected, of another shape or no
            floating numbers, all of them by name; numbers that the dtype cannot hold.
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
            elif not jnp.issubdtype(_numpy_dtype(tensor), jnp.floating):
                problems.append(f"{name} is {tensor.dtype}, expected floating numbers")
        elif not redundant(name):
            problems.append(f"{name} {list(tensor.shape)} is not expected")
    if problems:
        raise ValueError(
            f"{len(problems)} tensor(s) do not fit {network}: "
            f"{first_few(sorted(problems))}. {_prefix_remedy(shapes, tensors)}Take "
            f"configuration and tensors of one checkpoint."
        )
    params: dict[str, Any] = {}
    for leaf in leaves:
        dtype = dtype_of(leaf)
        rows = [in_native_order(tensors[name]) for name in leaf.names]
        if dtype is None:
            dtype = _common_dtype({row.dtype for row in rows})
        value = np.empty((len(rows), *leaf.read(rows[0]).shape), dtype)
        for i, (name, row) in enumerate(zip(leaf.names, rows)):
            value[i] = leaf.read(cast_tensor(name, row, value.dtype))
        params[leaf.path] = value if leaf.stacked else value[0]
    return traverse_util.unflatten_dict(params, sep="/")


def _numpy_dtype(tensor: Any) -> np.dtype:
    """Of an array; what knows its own is not read for it."""
    known = tensor.dtype
    return known if isinstance(known, np.dtype) else np.asarray(tensor).dtype


def _prefix_remedy(expected: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """A sentence on names that differ from those expected by what they begin with."""

    def prefix(longer: Iterable[str], shorter: Mapping[str, Any]) -> str | None:
        for name in longer:
            cuts = (i + 1 for i, letter in enumerate(name) if letter == ".")
            for cut in cuts:
                if name[cut:] in shorter:
                    return name[:cut]
        return None

    if expected.keys() & given.keys():
        return ""
    more, less = prefix(given, expected), prefix(expected, given)
    if more is not None:
        return f"The names begin with {more!r}; save the tensors without it. "
    if less is not None:
        return f"The names lack {less!r} in front; save the tensors with it. "
    return ""


def _common_dtype(dtypes: set[Any]) -> Any:
    if len(dtypes) == 1:
        return dtypes.pop()
    return np.float64 if np.dtype(np.float64) in dtypes else np.float32


def cast_tensor(name: str, tensor: np.ndarray, dtype: Any) -> np.ndarray:
    """A tensor of floating numbers in a dtype whose range holds them.

    Args:
        name: of the tensor.
        tensor: floating numbers; those that are infinite or NaN stay so.
        dtype: of the result; the tensor itself comes back where it is of that dtype.

    Raises:
        ValueError: a finite number beyond the largest of the dtype.
    """
    most = jnp.finfo(dtype).max
    if most < jnp.finfo(tensor.dtype).max:
        wide = np.float64 if tensor.dtype == np.float64 else np.float32
        sizes = np.abs(tensor[np.isfinite(tensor)].astype(wide))
        if sizes.max(initial=0) > float(most):
            raise ValueError(
                f"{name} has {np.count_nonzero(sizes > float(most))} number(s) beyond "
                f"{float(most):g}, the largest of {np.dtype(dtype)} (up to "
                f"{sizes.max():g}); give dtype 'bfloat16' or 'float32'."
            )
    return tensor.astype(dtype, copy=False)


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
        listed = [f"{path}: {have.get(path)}, not {want.get(path)}" for path in wrong]
        raise ValueError(
            f"these are not the parameters of that {network}: {first_few(listed)}."
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
        ValueError: a damaged file; a shard without a tensor of the index; an index
            beside a single file that it does not name, as either may be the newer.
    """
    folder, weights, index = Path(folder), f"{stem}.safetensors", _index(stem)
    if not (folder / index).exists():
        if (folder / weights).exists():
            return read_safetensors(folder / weights)
        raise FileNotFoundError(
            f"{folder} has neither {weights} nor {index}; give the folder of a "
            f"checkpoint in the safetensors format.{_other_weights(folder)}"
        )
    weight_map = _weight_map(folder / index)
    if (folder / weights).exists() and weights not in weight_map.values():
        raise ValueError(
            f"{folder} holds two checkpoints, {weights} and the files that {index} "
            f"names; transformers reads the first of them, diffusers the second. "
            f"Remove {weights}, or {index}, whichever is the older."
        )
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
                f"{folder / file} lacks {first_few(lost, separator=', ')}, which "
                f"{index} puts into it. Copy both again."
            )
        # a tensor that the index puts into another file is not read from this one
        tensors |= {k: v for k, v in found.items() if weight_map.get(k, file) == file}
    return tensors


def _other_weights(folder: Path) -> str:
    """A sentence on weights of other formats in a folder, and how to turn them."""
    found = sorted(
        path.name
        for path in (folder.iterdir() if folder.is_dir() else ())
        if path.suffix in _FOREIGN and not path.name.startswith(_NO_WEIGHTS)
    )
    if not found:
        return ""
    return f" It holds {first_few(found, 3, ', ')}: {_FOREIGN[Path(found[0]).suffix]}."


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise ValueError(
            f"{index} lacks 'weight_map', the file of each tensor. Copy it again."
        )
    return weight_map


def write_checkpoint(
    folder: Folder,
    stem: str,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    max_shard_bytes: int,
) -> None:
    """Writes tensors as one file, or as shards and their index, and config.json.

    Everything is checked and lies on the disk before any file takes its name, so a
    save that fails leaves the old checkpoint as it was.

    Args:
        folder: made if absent. Of an older checkpoint in it, ``<stem>.safetensors``,
            the index and what that index names go in the end; all other files stay.
        stem: of the files.
        tensors: arrays by name.
        config: content of config.json.
        max_shard_bytes: what does not fit a file of this size is cut into several (a
            larger tensor has a file of its own).

    Raises:
        TypeError: a dtype that safetensors lacks, or a setting that JSON lacks.
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
    single, index = f"{stem}.safetensors", _index(stem)
    names = [single]
    if len(shards) > 1:
        total = len(shards)
        names = [
            f"{stem}-{number:05d}-of-{total:05d}.safetensors"
            for number in range(1, total + 1)
        ]
    content = {name: encode_safetensors(shard) for name, shard in zip(names, shards)}
    if len(shards) > 1:
        where = {key: name for name, shard in zip(names, shards) for key in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        listing = {"metadata": {"total_size": total}, "weight_map": where}
        content[index] = [encode_json(listing)]
    content[CONFIG] = [encode_json(config)]
    files = {folder / name: parts for name, parts in content.items()}
    # The index goes first, so that nobody reads shards of two checkpoints by a name
    # of the one and the content of the other.
    shared = set(_old_shards(folder / index)) & set(names)
    write_together(
        files,
        remove_before=[folder / index] if shared else (),
        remove_after=older_weights(folder, stem, files),
    )


def older_weights(folder: Path, stem: str, files: Iterable[Path]) -> list[Path]:
    """The weights of a checkpoint in a folder that are not among its new files.

    Args:
        folder: may be absent.
        stem: of ``<stem>.safetensors``, of the index, and of what the index names.
        files: the new ones.
    """
    index = folder / _index(stem)
    names = (index.name, f"{stem}.safetensors", *_old_shards(index))
    new = {*files}
    return [folder / name for name in names if folder / name not in new]


def _old_shards(index: Path) -> list[str]:
    """Files in the folder of an index that it names; none where it is no index."""
    try:
        files = sorted(set(_weight_map(index).values()))
    except (FileNotFoundError, ValueError):
        return []
    return [f for f in files if f.endswith(".safetensors") and Path(f).name == f]


def _index(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """Reads a JSON object; an empty one where the file is optional and absent.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON object, no plain file, or above 100 MB.
    """
    if not path.exists():
        if optional:
            return {}
        raise FileNotFoundError(
            f"{path} is absent; give the folder of a checkpoint in the Hugging Face "
            f"layout."
        )
    found = json_of(path, _LONGEST_JSON)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, no JSON object.")
    return found


def check_depth(depth: int, tensors: Mapping[str, Any]) -> None:
    """Refuses more layers than tensors, before names are made of them all."""
    if depth > len(tensors):
        raise ValueError(
            f"the configuration has {depth} layers, the checkpoint {len(tensors)} "
            f"tensors; take both of one checkpoint."
        )


def encode_json(content: Mapping[str, Any]) -> bytes:
    """A JSON object as the text of a file."""
    return (json.dumps(content, indent=2) + "\n").encode()
