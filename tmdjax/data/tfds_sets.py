"""Sets that TensorFlow Datasets (TFDS) or :mod:`tmdjax.data.convert` prepared on disk.

Nothing here downloads or prepares: a set is read from its folder, through TFDS's
random-access reader, without its code and without TensorFlow. Reading needs the package
``tensorflow-datasets`` alone; sets of the catalogue are prepared with TensorFlow, which
may be done in another environment, or on another machine and copied.
"""

import importlib.util
import math
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tmdjax.core.checks import check_choice, check_range
from tmdjax.core.files import json_of
from tmdjax.core.optional import import_optional
from tmdjax.core.registry import suggestion
from tmdjax.data.dataset import Dataset, count_up_to

FOLDER_VARIABLE = "TFDS_DATA_DIR"
"""Environment variable of TFDS: the folder with all prepared sets."""

_BUILDER = re.compile(r"([a-z]\w*(?:/[\w.+-]+)?)(?::(\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_METADATA = ("dataset_info.json", "features.json")
_CHUNK = 64
_MOST_TEXT = 8 * 10**9


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
        data_dir: folder with all prepared sets; None for that of the environment, or
            TFDS's own.

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


def files_of(
    *,
    builder: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    **options: Any,
) -> tuple[Path, ...]:
    """The folder that :func:`load_tfds` reads with these options, if it is there."""
    folder = None if builder is None else find_prepared(builder, data_dir)
    return () if folder is None else (folder,)


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


def load_tfds(
    files: Mapping[str, Path],
    *,
    builder: str | None = None,
    name: str | None = None,
    keys: Mapping[str, str] | None = None,
    test_split: str | None = None,
    manual: str = "",
    data_dir: str | os.PathLike[str] | None = None,
    train_count: int | None = None,
    test_count: int | None = None,
    memory_limit_gb: float = 8.0,
) -> Dataset:
    """Reads a prepared set into memory.

    Files keep the order that TFDS gave them when it prepared the set: shuffled, by a
    hash of each sample's key, the same on every machine. So the last samples of a
    split are a random part of it.

    Args:
        files: none; a set is found by its name.
        builder: TFDS's name, 'set', 'set/config' or either with ':1.2.3'; there is no
            default.
        name: of the data set that is returned; None for the builder.
        keys: {name of an array: name of the set's feature}. A feature is an Image
            (uint8, one size), a ClassLabel, a Text, or a Tensor or Scalar of numbers
            with a fixed shape, such as a video in uint8. None takes all features
            under their own names.
        test_split: TFDS's name of the test split; None holds out the last
            ``test_count`` samples of 'train'.
        manual: file that TFDS does not fetch by itself, for messages; '' if there is
            none.
        data_dir: folder with all prepared sets; None for $TFDS_DATA_DIR or, where
            that is not set, ~/tensorflow_datasets.
        train_count: the first so many training samples in file order; None for all.
        test_count: of the samples of ``test_split`` the first so many, or all for
            None; without a test split, how many to hold out.
        memory_limit_gb: bytes / 1e9 that the decoded arrays may take together, texts
            apart.

    Returns:
        By name: images float32 [n, height, width, channel], their bytes 0..255 mapped
        to [-1, 1]; classes int32 [n]; texts as uint8 [n, longest of all], UTF-8 with
        zeros behind it (:func:`decode_texts`); tensors as stored, but for 64-bit
        numbers, which become 32-bit. 'label' stands for the classes of the set; where
        ``keys`` names none, it is 0 everywhere.

    Raises:
        FileNotFoundError: the set is not prepared in that folder.
        ImportError: tensorflow-datasets is not installed.
        TypeError: a count that is not an integer.
        ValueError: no builder, a bad name or count, a feature of another kind, a set of
            another format, samples that take too much memory, or damaged files.
    """
    if builder is None:
        raise ValueError(
            "data source 'tfds' needs builder=, the name of a prepared set, such as "
            "'my_set' or 'my_set/config:1.0.0'."
        )
    name = builder if name is None else name
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
    tfds = import_optional("tensorflow_datasets", f"data source {name!r}", "tfds")
    keys = _check_kinds(name, folder, keys)
    reader: Any = _open(name, folder, tfds)
    features, splits = reader.info.features, reader.info.splits
    columns = {
        ours: _column(name, folder, theirs, features[theirs])
        for ours, theirs in keys.items()
    }
    if test_split == "train":
        raise ValueError(
            "test_split='train' would test on what trains; leave test_split out, and "
            "the last test_count= samples of 'train' are held out."
        )
    for split in filter(None, ("train", test_split)):
        check_choice("split", split, splits)

    total = splits["train"].num_examples
    if test_split is None:
        if test_count is None:
            raise ValueError(
                f"data source {name!r} has no test split; give test_count=, how many "
                f"samples of 'train' to hold out."
            )
        test_count = count_up_to("test_count", test_count, total - 1)
        total -= test_count
        test_start = total
    else:
        test_count = count_up_to(
            "test_count", test_count, splits[test_split].num_examples
        )
        test_start = 0
    train_count = count_up_to("train_count", train_count, total)
    _check_memory(name, columns, train_count, test_count, memory_limit_gb)

    try:
        sources = reader.as_data_source()
    except NotImplementedError as error:
        raise ValueError(
            f"data source {name!r}: {folder} holds {reader.info.file_format.value} "
            f"files, which have no random access. Convert them: tfds convert_format "
            f"--dataset_version_dir={shlex.quote(str(folder))} "
            f"--out_file_format=array_record"
        ) from error

    def read(split: str, rows: range) -> dict[str, Any]:
        try:
            arrays = _read(sources[split], rows, keys, columns)
        except ImportError as error:
            raise _needs(name, folder, error) from error
        except (
            AttributeError,
            KeyError,
            OSError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
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

    classes = features[keys["label"]] if "label" in keys else None
    meta: dict[str, Any] = {"tfds": f"{_parse(builder)[0]}:{folder.name}"}
    if classes is not None:
        meta["class_names"] = tuple(classes.names)
    train = read("train", range(train_count))
    test = read(test_split or "train", range(test_start, test_start + test_count))
    for key in (key for key in keys if columns[key].shape is None):
        both = encode_texts([*train[key], *test[key]])  # of one length
        train[key], test[key] = both[:train_count], both[train_count:]
    return Dataset(
        name=name,
        train=train,
        test=test,
        num_classes=1 if classes is None else classes.num_classes,
        meta=meta,
    )


def encode_texts(texts: Sequence[str]) -> np.ndarray:
    """Texts as uint8 [n, bytes of the longest]: UTF-8, filled up with zeros.

    Raises:
        ValueError: a text with the character NUL or half of a surrogate pair, which
            could not be read again; or texts that take more than 8 GB, as all are as
            long as the longest.
    """
    rows = [text.encode(errors="surrogatepass") for text in texts]
    for i, row in enumerate(rows):
        odd = re.search(rb"\0|\xed[\xa0-\xbf]", row)
        if odd:
            what = "NUL" if odd[0] == b"\0" else "half of a surrogate pair"
            raise ValueError(f"text {i}, {texts[i][:80]!r}, holds {what}; remove it.")
    lengths = [len(row) for row in rows]
    length = max([1, *lengths])
    if length * len(rows) > _MOST_TEXT:
        raise ValueError(
            f"{len(rows)} texts filled up to {length} bytes, the longest, take more "
            f"than {_MOST_TEXT} bytes; shorten text {lengths.index(length)}."
        )
    joined = b"".join(row.ljust(length, b"\0") for row in rows)
    return np.frombuffer(joined, np.uint8).reshape(len(rows), length).copy()


def decode_texts(rows: np.ndarray) -> list[str]:
    """Inverse of :func:`encode_texts`: uint8 [n, length] to n texts."""
    return [bytes(row).rstrip(b"\0").decode() for row in np.asarray(rows, np.uint8)]


KINDS = ("Image", "ClassLabel", "Text", "Tensor", "Scalar")
"""Classes of TFDS's features that can be read."""


def _kinds(folder: Path) -> dict[str, str]:
    """Classes of a set's features, by feature."""
    found = json_of(folder / "features.json")["featuresDict"]
    return {
        key: feature["pythonClassName"].rpartition(".")[2]
        for key, feature in found["features"].items()
    }


def _check_kinds(
    name: str, folder: Path, keys: Mapping[str, str] | None
) -> dict[str, str]:
    """What to read, once the metadata says that it can be."""
    try:
        kinds = _kinds(folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"data source {name!r}: {folder}/features.json is damaged or no dict of "
            f"features ({error!r}). Delete that folder and prepare the set again."
        ) from error
    keys = {key: key for key in kinds} if keys is None else dict(keys)
    readable = [key for key in kinds if kinds[key] in KINDS]
    for ours, theirs in keys.items():
        if theirs not in kinds:
            raise ValueError(
                f"keys[{ours!r}]={theirs!r} is no feature of {folder}; it has "
                f"{', '.join(kinds)}.{suggestion(theirs, kinds)}"
            )
        if kinds[theirs] not in KINDS:
            raise ValueError(
                f"data source {name!r}: feature {theirs!r} of {folder} is of kind "
                f"{kinds[theirs]}, which needs TensorFlow or has no fixed shape; only "
                f"{', '.join(KINDS)} are read. Leave it out: give keys= of "
                f"{', '.join(readable) or 'another set'}."
            )
    if "label" in keys and kinds[keys["label"]] != "ClassLabel":
        raise ValueError(
            f"keys['label']={keys['label']!r} is of kind {kinds[keys['label']]}; "
            f"'label' stands for classes, give a ClassLabel or another name."
        )
    if not keys:
        raise ValueError(f"data source {name!r}: keys={{}} asks for no feature.")
    return keys


def _open(name: str, folder: Path, tfds: Any) -> Any:
    try:
        # From its folder the builder has no code that could download.
        return tfds.builder_from_directory(folder)
    except ImportError as error:
        raise _needs(name, folder, error) from error


def _needs(name: str, folder: Path, error: ImportError) -> ValueError:
    """The refusal of a set with features that need another package."""
    kinds = _kinds(folder).items()
    others = [f"{key} ({kind})" for key, kind in kinds if kind not in KINDS]
    return ValueError(
        f"data source {name!r}: {folder} cannot be read without the package "
        f"{error.name}: it has {', '.join(others)}. Prepare the set without that."
    )


class _Column(NamedTuple):
    """Shape and dtype of a feature's rows in memory; a text has no shape."""

    shape: tuple[int, ...] | None
    stored: np.dtype[Any]
    dtype: np.dtype[Any]
    is_image: bool = False


_NARROW = {"int64": "int32", "uint64": "uint32", "float64": "float32"}


def _column(name: str, folder: Path, key: str, feature: Any) -> _Column:
    kind = type(feature).__name__
    if kind == "Text":
        return _Column(None, np.dtype(np.uint8), np.dtype(np.uint8))
    if kind == "ClassLabel":
        return _Column((), np.dtype(np.int64), np.dtype(np.int32))
    shape, stored = tuple(feature.shape), np.dtype(feature.np_dtype)
    where = f"data source {name!r}: feature {key!r} of {folder} has shape {shape} and"
    if kind == "Image":
        if None in shape or stored != np.uint8:
            raise ValueError(
                f"{where} dtype {stored}; only uint8 images of one size can be read. "
                f"Use a config of the set with a fixed size."
            )
        return _Column(shape, stored, np.dtype(np.float32), is_image=True)
    if None in shape or stored.kind not in "biuf":
        raise ValueError(
            f"{where} dtype {stored}; only numbers of a fixed shape can be read. Leave "
            f"it out with keys=."
        )
    return _Column(shape, stored, np.dtype(_NARROW.get(stored.name, stored.name)))


def _read(
    source: Sequence[Any],
    rows: range,
    keys: Mapping[str, str],
    columns: Mapping[str, _Column],
) -> dict[str, Any]:
    """Decodes rows, a chunk at a time, into arrays that exist once; texts as a list."""
    arrays = {
        name: np.empty((len(rows), *column.shape), column.dtype)
        for name, column in columns.items()
        if column.shape is not None
    }
    texts: dict[str, list[str]] = {n: [] for n, c in columns.items() if c.shape is None}
    for start in range(0, len(rows), _CHUNK):
        chunk = list(rows[start : start + _CHUNK])
        examples = source.__getitems__(chunk)  # pyright: ignore
        for place, example in enumerate(examples, start):
            for name, values in texts.items():
                values.append(example[keys[name]].decode())
            for name, array in arrays.items():
                value = np.asarray(example[keys[name]])
                if value.shape != array.shape[1:]:
                    raise ValueError(
                        f"{keys[name]!r} of sample {rows[place]} has shape "
                        f"{value.shape}, not {array.shape[1:]}"
                    )
                array[place] = value
                if array.dtype.kind in "iu" and (array[place] != value).any():
                    raise ValueError(
                        f"{keys[name]!r} of sample {rows[place]} does not fit "
                        f"{array.dtype}"
                    )
    for name, column in columns.items():
        if column.is_image:
            arrays[name] /= 127.5
            arrays[name] -= 1
    found = {name: texts.get(name, arrays.get(name)) for name in columns}
    return {"label": np.zeros(len(rows), np.int32)} | found


def _check_memory(
    name: str, columns: Mapping[str, _Column], train: int, test: int, limit_gb: float
) -> None:
    check_range("memory_limit_gb", limit_gb, 0, open_low=True)
    sized = [column for column in columns.values() if column.shape is not None]
    each = sum(c.dtype.itemsize * math.prod(c.shape or ()) for c in sized)
    needed = each * (train + test)
    if needed > limit_gb * 1e9:
        fits = int(limit_gb * 1e9 // each) - test
        remedy = (
            f"train_count={fits}"
            if fits > 0
            else "smaller train_count= and test_count="
        )
        shapes = ", ".join(f"{list(c.shape or ())} {c.dtype}" for c in sized)
        raise ValueError(
            f"data source {name!r}: {train} + {test} samples of {shapes} take "
            f"{needed:,} bytes, more than memory_limit_gb={limit_gb:g}. "
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
