"""The safetensors file format: named arrays behind a JSON header.

Read here rather than by its library so that a damaged file is named with the tensor
and the size that were expected, and so that 16- and 8-bit floats come as numpy arrays.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tmdjax.core.files import write_atomically

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads a file; arrays are views of it, loaded as they are used.

    Returns:
        Read-only arrays by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or cut off; the message names it, the first
            tensor concerned, and the size it should have.

    References:
        https://huggingface.co/docs/safetensors (format).
    """
    path = Path(path)
    size = path.stat().st_size
    header, start = _read_header(path, size)
    kinds = {name: _check_entry(path, name, entry) for name, entry in header.items()}
    spans = {name: tuple(entry["data_offsets"]) for name, entry in header.items()}
    whole = start + max((end for _, end in spans.values()), default=0)
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if start + end > size:
            raise ValueError(
                f"{path} is cut off in tensor {name!r}: its {end - begin} bytes end at "
                f"{start + end}, the file has {size} bytes of {whole}. Copy it again."
            )
    data = np.memmap(path, np.uint8, "r") if size else np.zeros(0, np.uint8)
    return {
        name: data[start + begin : start + end].view(dtype).reshape(shape)
        for (name, (dtype, shape)), (begin, end) in zip(kinds.items(), spans.values())
    }


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The entries, and where the data start."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + length > size:
            raise ValueError(
                f"{path} is no whole safetensors file: its header should end at byte "
                f"{8 + length if size >= 8 else 8}, the file has {size}. Copy it again."
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise ValueError(
            f"{path} is no safetensors file: its header is not JSON ({error}). Copy "
            f"it again."
        ) from None
    header.pop("__metadata__", None)
    return header, 8 + length


def _check_entry(path: Path, name: str, entry: Any) -> tuple[Any, tuple[int, ...]]:
    """Dtype and shape of a tensor whose size fits them."""
    try:
        kind, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{path}: the header entry of tensor {name!r} is damaged: {entry!r}. Copy "
            f"the file again."
        ) from None
    if kind not in _DTYPES:
        raise ValueError(
            f"{path}: tensor {name!r} has dtype {kind!r}; known: {', '.join(_DTYPES)}."
        )
    dtype = np.dtype(_DTYPES[kind])
    expected = math.prod(shape) * dtype.itemsize
    if end - begin != expected or begin < 0:
        raise ValueError(
            f"{path}: tensor {name!r} of shape {list(shape)} and dtype {kind} takes "
            f"{expected} bytes, the header gives it bytes {begin} to {end}: the file "
            f"is damaged. Copy it again."
        )
    return dtype, shape


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes arrays so that the file is whole or not there.

    Args:
        path: of the file.
        tensors: arrays by name.
        metadata: strings by name; None marks the layout as PyTorch's, which
            transformers asks for.

    Raises:
        TypeError: a dtype that the format lacks.
        OSError: the file cannot be written.
    """
    metadata = {"format": "pt"} if metadata is None else dict(metadata)
    arrays = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    for name, array in arrays.items():
        if array.dtype not in _NAMES:
            raise TypeError(
                f"tensor {name!r} has dtype {array.dtype}; safetensors holds "
                f"{', '.join(str(dtype) for dtype in _NAMES)}."
            )
    header: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    # Wide numbers first: each then lies at a multiple of its size.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    for name in order:
        array = arrays[name]
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(np.shape(tensors[name])),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    parts = [len(text).to_bytes(8, "little"), text]
    parts += [arrays[name].tobytes() for name in order]
    write_atomically(path, b"".join(parts))
