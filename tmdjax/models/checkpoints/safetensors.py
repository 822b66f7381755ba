"""The safetensors file format: named arrays behind a JSON header.

Read here rather than by its library so that a damaged file is named with the tensor
and the size that were expected, that 16- and 8-bit floats come as numpy arrays, and
that nothing is read before it is used. What the library refuses is refused here.

References:
    https://huggingface.co/docs/safetensors (format).
"""

import collections
import itertools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tmdjax.core.files import check_plain, in_native_order, write_together

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
_METADATA = "__metadata__"
_LONGEST_HEADER = 100_000_000


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads a file; arrays are views of it, loaded as they are used.

    Returns:
        Read-only arrays by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or cut off; the message names it, the first
            tensor concerned, and the size it should have.
    """
    path = Path(path)
    header, _, start, size = _read_header(path)
    kinds = {name: _check_entry(path, name, entry) for name, entry in header.items()}
    spans = {name: tuple(entry["data_offsets"]) for name, entry in header.items()}
    whole = start + max((end for _, end in spans.values()), default=0)
    last = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != last:
            raise ValueError(
                f"{path}: tensor {name!r} begins at byte {begin} of the data, the one "
                f"before it ends at {last}; tensors leave no gap and share no byte: "
                f"the file is damaged. Copy it again."
            )
        if start + end > size:
            raise ValueError(
                f"{path} is cut off in tensor {name!r}: its {end - begin} bytes end at "
                f"{start + end}, the file has {size} bytes of {whole}. Copy it again."
            )
        last = end
    if size != whole:
        raise ValueError(
            f"{path} has {size} bytes, {size - whole} more than its header tells of. "
            f"Copy it again."
        )
    data = np.memmap(path, np.uint8, "r")[start:]
    return {
        name: data[begin:end].view(dtype).reshape(shape)
        for (name, (dtype, shape)), (begin, end) in zip(kinds.items(), spans.values())
    }


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The strings that a file holds beside its tensors, by name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its header is damaged.
    """
    return _read_header(Path(path))[1]


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, str], int, int]:
    """Entries of the tensors, metadata, where the data start, and the file's size."""
    size = check_plain(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + length > size or length > _LONGEST_HEADER:
            raise ValueError(
                f"{path} is no whole safetensors file: its header should end at byte "
                f"{8 + length if size >= 8 else 8} (of at most {_LONGEST_HEADER}), the "
                f"file has {size}. Copy it again."
            )
        text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_object, parse_int=_whole)
        metadata = header.pop(_METADATA, None)
        words = [*itertools.chain(*(metadata or {}).items())]
        if not all(isinstance(word, str) for word in words):
            raise ValueError(f"{_METADATA} holds other things than strings")
        "".join([*header, *words]).encode()  # refuses half of a surrogate pair
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is no safetensors file: its header is not JSON as it should be "
            f"({error}). Copy it again."
        ) from None
    return header, metadata or {}, 8 + length, size


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, none of whose names stands in it twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"{twice!r} stands in it twice")
    return found


def _whole(digits: str) -> float:
    """A whole number; '-0' is none, as the library has it."""
    return -0.0 if digits == "-0" else int(digits)


def _check_entry(path: Path, name: str, entry: Any) -> tuple[Any, tuple[int, ...]]:
    """Dtype and shape of a tensor whose size fits them."""
    try:
        kind, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{path}: the header entry of tensor {name!r} is damaged: {entry!r}. Copy "
            f"the file again."
        ) from None
    if str(kind) not in _DTYPES:
        raise ValueError(
            f"{path}: tensor {name!r} has dtype {kind!r}; known: {', '.join(_DTYPES)}."
        )
    dtype = np.dtype(_DTYPES[kind])
    expected = math.prod(shape) * dtype.itemsize
    if end - begin != expected:
        raise ValueError(
            f"{path}: tensor {name!r} of shape {list(shape)} and dtype {kind} takes "
            f"{expected} bytes, the header gives it bytes {begin} to {end}: the file "
            f"is damaged. Copy it again."
        )
    return dtype, shape


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Any]) -> None:
    """Writes arrays so that the file is whole or not there.

    Args:
        path: of the file; an old one stays until the new one is whole.
        tensors: arrays by name.

    Raises:
        TypeError: a dtype that the format lacks.
        ValueError: a tensor of the name that the format keeps for itself.
        OSError: the file cannot be written.
    """
    write_together({Path(path): encode_safetensors(tensors)})


def encode_safetensors(tensors: Mapping[str, Any]) -> list[Any]:
    """The content of a file, as buffers of bytes that share memory with the arrays.

    Its metadata name the layout as PyTorch's, which transformers asks for.

    Args:
        tensors: arrays by name, of either byte order.

    Raises:
        TypeError: a dtype that the format lacks.
        ValueError: a tensor of the name that the format keeps for itself.
    """
    arrays = {name: in_native_order(tensor) for name, tensor in tensors.items()}
    if _METADATA in arrays:
        raise ValueError(f"no tensor may be called {_METADATA!r}; rename it.")
    for name, array in arrays.items():
        if array.dtype not in _NAMES:
            raise TypeError(
                f"tensor {name!r} has dtype {array.dtype}; safetensors holds "
                f"{', '.join(str(dtype) for dtype in _NAMES)}."
            )
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    position = 0
    # Wide numbers first: each then lies at a multiple of its size.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    for name in order:
        array = arrays[name]
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    flat = (np.ascontiguousarray(arrays[name]).reshape(-1) for name in order)
    return [len(text).to_bytes(8, "little"), text, *(a.view(np.uint8) for a in flat)]
