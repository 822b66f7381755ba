"""Image sets that TensorFlow Datasets (TFDS) prepared, read from local disk.

Nothing here downloads or prepares: a set is read from the folder that ``tfds build``
left, through TFDS's random-access reader. Reading needs the package
``tensorflow-datasets`` alone; preparing also needs TensorFlow, so it may be done in
another environment, or on another machine and copied.
"""

import importlib.util
import math
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tmdjax.core.checks import check_choice, check_count, check_range
from tmdjax.data.dataset import Dataset

FOLDER_VARIABLE = "TFDS_DATA_DIR"
"""Environment variable of TFDS: the folder with all prepared sets."""

_BUILDER = re.compile(r"([a-z]\w*(?:/[\w.+-]+)?)(?::(\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_METADATA = ("dataset_info.json", "features.json")
_CHUNK = 64


def data_folder(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder with all prepared sets: given, of the environment, or TFDS's own."""
    given = data_dir or os.environ.get(FOLDER_VARIABLE) or "~/tensorflow_datasets"
    return Path(given).expanduser()


def find_prepared(
    builder: str, data_dir: str | os.PathLike[str] | None = None
) -> Path | None:
    """Finds the folder of a prepared set, without importing TFDS.

    Args:
        builder: TFDS's name, 'set', 'set/config' or either with ':1.2.3'.
        data_dir: see :func:`data_folder`.

    Returns:
        The folder of the version named, or of the highest; None if there is none.

    Raises:
        ValueError: not a name of that form.
    """
    name, version = _parse(builder)
    folder = data_folder(data_dir) / name
    if version:
        versions = [version]
    else:
        found = [path.name for path in folder.glob("*.*.*")]
        versions = sorted(filter(_VERSION.fullmatch, found), key=_numbers, reverse=True)
    for version in versions:
        if all((folder / version / file).is_file() for file in _METADATA):
            return folder / version
    return None


def is_present(builder: str) -> bool:
    """Says whether the set is prepared where it is looked for, and TFDS installed."""
    package = importlib.util.find_spec("tensorflow_datasets")
    return package is not None and find_prepared(builder) is not None


def how_to_prepare(
    builder: str, data_dir: str | os.PathLike[str] | None = None, manual: str = ""
) -> str:
    """The commands that prepare a set so that it can be read here.

    Args:
        builder: TFDS's name of the set.
        data_dir: folder with all prepared sets; None leaves it to TFDS, which takes
            that of :func:`data_folder`.
        manual: file that TFDS does not fetch by itself; '' if there is none.
    """
    place = f"{data_dir or '~/tensorflow_datasets'}/downloads/manual"
    option = f" --data_dir={shlex.quote(str(data_dir))}" if data_dir else ""
    return (
        f"{f'place {manual} in {place}; ' if manual else ''}"
        f"pip install tensorflow-datasets tensorflow && tfds build {builder} "
        f"--file_format=array_record{option}"
    )


def load_tfds_images(
    name: str,
    builder: str,
    *,
    image_key: str = "image",
    label_key: str | None = None,
    test_split: str | None = None,
    manual: str = "",
    data_dir: str | os.PathLike[str] | None = None,
    train_count: int | None = None,
    test_count: int | None = None,
    memory_limit_gb: float = 8.0,
) -> Dataset:
    """Reads a prepared set of images; the bytes 0..255 map to [-1, 1].

    Files keep the order that TFDS gave them when it prepared the set: shuffled, by a
    hash of each sample's key, the same on every machine. So the last samples of a
    split are a random part of it.

    Args:
        name: of the data set that is returned.
        builder: TFDS's name, 'set', 'set/config' or either with ':1.2.3'.
        image_key: of the images, all uint8 and of one size.
        label_key: of the class; None gives every image the label 0 of one class.
        test_split: TFDS's name of the test split; None holds out the last
            ``test_count`` samples of 'train'.
        manual: see :func:`how_to_prepare`.
        data_dir: folder with all prepared sets; None for $TFDS_DATA_DIR or, where
            that is not set, ~/tensorflow_datasets.
        train_count: the first so many training samples in file order; None for all.
        test_count: of the samples of ``test_split`` the first so many, or all for
            None; without a test split, how many to hold out.
        memory_limit_gb: bytes / 1e9 that the decoded images may take together.

    Returns:
        'image' float32 [n, height, width, channel] and 'label' int32 [n].

    Raises:
        FileNotFoundError: the set is not prepared in that folder.
        ImportError: tensorflow-datasets is not installed.
        TypeError: a count that is not an integer.
        ValueError: a bad name or count, a set of another layout or format, images
            that take too much memory, or damaged files.
    """
    root = data_folder(data_dir)
    prepare = how_to_prepare(builder, root, manual)
    folder = find_prepared(builder, root)
    if folder is None:
        raise FileNotFoundError(
            f"data source {name!r}: {builder!r} is not prepared (looked in "
            f"{root / _parse(builder)[0]}), and nothing is downloaded here. Prepare "
            f"it, in this environment or another: {prepare}. Or name the folder that "
            f"holds all prepared sets: data_dir= or {FOLDER_VARIABLE}."
        )
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"data source {name!r} needs the package tensorflow-datasets ({error}). "
            f"Run: pip install 'tmdjax[tfds]'"
        ) from error
    # From its folder the builder has no code that could download.
    reader: Any = tfds.builder_from_directory(folder)
    features, splits = reader.info.features, reader.info.splits
    shape = _check_features(name, folder, features, image_key, label_key)
    for split in filter(None, ("train", test_split)):
        check_choice("split", split, splits)

    total = splits["train"].num_examples
    if test_split is None:
        if test_count is None:
            raise ValueError(
                f"data source {name!r} has no test split; give test_count=, how many "
                f"samples of 'train' to hold out."
            )
        test_count = _count("test_count", test_count, total - 1)
        total -= test_count
        test_start = total
    else:
        test_count = _count("test_count", test_count, splits[test_split].num_examples)
        test_start = 0
    train_count = _count("train_count", train_count, total)
    _check_memory(name, shape, train_count, test_count, memory_limit_gb)

    try:
        sources = reader.as_data_source()
    except NotImplementedError as error:
        raise ValueError(
            f"data source {name!r}: {folder} holds {reader.info.file_format.value} "
            f"files, which have no random access. Convert them: tfds convert_format "
            f"--dataset_version_dir={shlex.quote(str(folder))} "
            f"--out_file_format=array_record"
        ) from error

    def read(split: str, rows: range) -> dict[str, np.ndarray]:
        try:
            arrays = _read(sources[split], rows, image_key, shape, label_key)
        except (AttributeError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"data source {name!r}: {folder} is damaged ({error}). Delete that "
                f"folder and prepare it again: {prepare}"
            ) from error
        if arrays["label"].min() < 0:  # TFDS writes -1 where a label is withheld
            raise ValueError(
                f"data source {name!r}: samples of the split {split!r} have no label; "
                f"choose another test_split= for this source."
            )
        return arrays

    classes = None if label_key is None else features[label_key]
    meta: dict[str, Any] = {"tfds": f"{_parse(builder)[0]}:{folder.name}"}
    if classes is not None:
        meta["class_names"] = tuple(classes.names)
    return Dataset(
        name=name,
        train=read("train", range(train_count)),
        test=read(test_split or "train", range(test_start, test_start + test_count)),
        num_classes=1 if classes is None else classes.num_classes,
        meta=meta,
    )


def _check_features(
    name: str, folder: Path, features: Any, image_key: str, label_key: str | None
) -> tuple[int, ...]:
    """Checks the layout of a set; returns the shape of its images."""
    import tensorflow_datasets as tfds

    def named(kind: type) -> list[str]:
        return [key for key, value in features.items() if isinstance(value, kind)]

    check_choice("image_key", image_key, named(tfds.features.Image))
    if label_key is not None:
        check_choice("label_key", label_key, named(tfds.features.ClassLabel))
    image = features[image_key]
    if None in image.shape or image.np_dtype != np.uint8:
        raise ValueError(
            f"data source {name!r}: the images of {folder} have shape {image.shape} "
            f"and dtype {np.dtype(image.np_dtype)}; only uint8 images of one size can "
            f"be read. Use a config of the set with a fixed size."
        )
    return image.shape


def _read(
    source: Sequence[Any],
    rows: range,
    image_key: str,
    shape: tuple[int, ...],
    label_key: str | None,
) -> dict[str, np.ndarray]:
    """Decodes rows, a chunk at a time, into arrays that exist once."""
    image = np.empty((len(rows), *shape), np.float32)
    label = np.zeros(len(rows), np.int32)
    for start in range(0, len(rows), _CHUNK):
        chunk = list(rows[start : start + _CHUNK])
        examples = source.__getitems__(chunk)  # pyright: ignore
        for place, example in enumerate(examples, start):
            pixels = example[image_key]
            if pixels.shape != shape:
                raise ValueError(
                    f"sample {rows[place]} has shape {pixels.shape}, not {shape}"
                )
            image[place] = pixels
            if label_key is not None:
                label[place] = example[label_key]
    image /= 127.5
    image -= 1
    return {"image": image, "label": label}


def _count(name: str, value: int | None, high: int) -> int:
    """A count in [1, high]; None is ``high``."""
    count = check_count(name, high if value is None else value)
    check_range(name, count, 1, high)
    return count


def _check_memory(
    name: str, shape: tuple[int, ...], train: int, test: int, limit_gb: float
) -> None:
    check_range("memory_limit_gb", limit_gb, 0, open_low=True)
    each = 4 * math.prod(shape)
    needed = each * (train + test)
    if needed > limit_gb * 1e9:
        fits = int(limit_gb * 1e9 // each) - test
        remedy = (
            f"train_count={fits}"
            if fits > 0
            else "smaller train_count= and test_count="
        )
        raise ValueError(
            f"data source {name!r}: {train} + {test} images of {list(shape)} take "
            f"{needed:,} bytes as float32, more than memory_limit_gb={limit_gb:g}. "
            f"Give {remedy}, or a higher memory_limit_gb= if this machine has the "
            f"memory."
        )


def _parse(builder: str) -> tuple[str, str | None]:
    match = _BUILDER.fullmatch(builder)
    if not match:
        raise ValueError(
            f"builder={builder!r} is not a name of TFDS; give 'set' or 'set/config', "
            f"with ':1.2.3' for one version."
        )
    return match[1], match[2]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
