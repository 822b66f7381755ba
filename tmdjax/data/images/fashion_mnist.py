"""Fashion-MNIST from Debian's package: 70,000 photographs of clothes, 28x28 grey."""

import gzip
import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tmdjax.data.dataset import Dataset, count_up_to

FILES = {
    "train-images-idx3-ubyte.gz": (
        "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7"
    ),
    "train-labels-idx1-ubyte.gz": (
        "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056"
    ),
    "t10k-images-idx3-ubyte.gz": (
        "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa"
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05"
    ),
}
"""SHA-256 of each file by its name."""

CLASS_NAMES = (
    *("T-shirt/top", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)


def load_fashion_mnist(
    files: Mapping[str, Path],
    *,
    train_count: int | None = None,
    test_count: int | None = None,
) -> Dataset:
    """Reads the two splits as published; the grey levels 0..255 map to [-1, 1].

    Args:
        files: paths of the package's ``FILES``.
        train_count: the first so many of 60,000 in file order; None for all.
        test_count: the first so many of 10,000; None for all.

    Returns:
        'image' float32 [n, 28, 28, 1] and 'label' int32 [n].

    Raises:
        TypeError: a count that is not an integer.
        ValueError: a count out of range, or a damaged file.

    References:
        Xiao, Rasul and Vollgraf, arXiv:1708.07747.
    """

    def split(stem: str, count: int | None, name: str) -> dict[str, np.ndarray]:
        image = read_idx(files[f"{stem}-images-idx3-ubyte.gz"], 3)
        label = read_idx(files[f"{stem}-labels-idx1-ubyte.gz"], 1)
        count = count_up_to(name, count, len(image))
        return {
            "image": image[:count, ..., None].astype(np.float32) / 127.5 - 1,
            "label": label[:count].astype(np.int32),
        }

    return Dataset(
        name="fashion_mnist",
        train=split("train", train_count, "train_count"),
        test=split("t10k", test_count, "test_count"),
        num_classes=len(CLASS_NAMES),
        meta={"class_names": CLASS_NAMES},
    )


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Reads a gzipped idx file of bytes.

    Args:
        path: of the file.
        ndim: axes the array must have.

    Returns:
        uint8, read-only.

    Raises:
        ValueError: a file that is truncated, not gzip, or not an idx file of bytes
            with ``ndim`` axes.
    """
    remedy = "Install its package again."
    try:
        with gzip.open(path) as file:
            magic = file.read(4)
            # Two zeros, 8 for unsigned bytes, the number of axes.
            expected = bytes((0, 0, 8, ndim))
            if magic != expected:
                raise ValueError(
                    f"{path} starts with the bytes {magic.hex()}, but an idx file of "
                    f"bytes with {ndim} axes with {expected.hex()}. {remedy}"
                )
            shape = struct.unpack(f">{ndim}I", file.read(4 * ndim))
            content = file.read()  # to the end: gzip then verifies its own checksum
    except (EOFError, gzip.BadGzipFile, zlib.error, struct.error) as error:
        raise ValueError(f"{path} is damaged ({error}). {remedy}") from error
    if len(content) != math.prod(shape):
        raise ValueError(
            f"{path} holds {len(content)} bytes of data, but its header says "
            f"{math.prod(shape)}. {remedy}"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)
