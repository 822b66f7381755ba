"""Images in folders and arrays in files, as a set that ``data.load`` reads by name.

    python -m tmdjax.data.convert images FOLDER --name=my_set [--size=64]
    python -m tmdjax.data.convert arrays video.npy label.npy text.json --name=my_set

writes array_record files in the layout of TensorFlow Datasets, without TensorFlow,
below ``--data_dir`` (by default where TFDS looks), to be read by ``data.load("tfds",
builder="my_set", test_count=100)``.

``images``: every PNG, JPEG, WebP, BMP, GIF or TIFF file below the folder (of one
picture each), hidden ones left out, turned as its camera says. Where the folder has
folders, these are the classes, in alphabetical order (numbers in theirs); but 'train'
or 'training' alone or beside 'val' or 'test' are splits, with classes in them or not.
A text beside an image, NAME.txt for NAME.png, is its caption. ``--size`` crops the
middle square and resizes it; without it all images must have one size.

``arrays``: arrays whose first axis is the sample, each under the name of its file:
uint8 [n, height, width, channel] called 'image' is stored as PNG, integers [n] called
'label' as classes, a .json list of texts as texts, everything else as it is (a video as
uint8 [n, frame, height, width, channel]).

Samples are written in a random order, the same every time, so that the last ones can be
held out.
"""

import argparse
import contextlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from tmdjax.core.checks import check_batch, check_count, check_range, first_few
from tmdjax.core.failures import exit_with
from tmdjax.core.files import array_of, check_plain, json_of, named_path
from tmdjax.core.optional import import_optional
from tmdjax.data import tfds_sets
from tmdjax.data.image_folders import (
    SUFFIXES,
    caption_of,
    files_below,
    image_splits,
)

_LARGEST_IMAGE = 10**9
_MOST_CLASSES = 10**6


class Column(NamedTuple):
    """One feature of all samples.

    Attributes:
        kind: 'Image', 'ClassLabel', 'Text' or 'Tensor'.
        count: number of samples.
        read: number of a sample -> its value: PNG bytes, a class, a text, or an array.
        shape: of an Image or Tensor.
        dtype: of a Tensor.
        names: of the classes.
    """

    kind: str
    count: int
    read: Callable[[int], Any]
    shape: tuple[int, ...] = ()
    dtype: Any = np.uint8
    names: tuple[str, ...] = ()


def image_columns(
    folder: Path,
    *,
    size: int | None = None,
    channels: int = 3,
    classes: Sequence[str] | None = None,
) -> dict[str, Column]:
    """Images, classes and captions of a folder.

    Args:
        folder: with images, or with one folder of images a class; a text of the same
            name beside an image is its caption.
        size: of the square that each image becomes; None leaves them as they are.
        channels: 1 (grey), 3 or 4 (with transparency).
        classes: names of the classes, in order; None takes those of the folders.

    Raises:
        ValueError: no such folder, no images, images without caption among such with
            one, a file that is no image of one picture or no text in UTF-8, a class
            that is not among those given, splits instead of classes
            (:func:`~tmdjax.data.image_folders.image_splits`), or a size or channels
            out of range. Files are named.
    """
    if image_splits(folder)[0] != folder:
        raise ValueError(
            f"{folder} holds splits, not classes: give {folder / 'train'} and what is "
            f"held out apart, as the command does."
        )
    if size is not None:
        check_count("size", size)
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    if channels not in modes:
        raise ValueError(
            f"channels={channels} must be one of {', '.join(map(str, modes))}."
        )
    files = files_below(folder)
    paths = [p for p in files if p.suffix.lower() in SUFFIXES]
    if not paths:
        raise ValueError(f"{folder} holds no images ({', '.join(SUFFIXES)}).")

    def decoded(i: int) -> Image.Image:
        try:
            check_plain(paths[i], _LARGEST_IMAGE)
            with Image.open(paths[i]) as file:
                frames = getattr(file, "n_frames", 1)
                if frames != 1:
                    raise ValueError(f"it holds {frames} pictures, give one a file")
                upright = ImageOps.exif_transpose(file)
                _check_mode(paths[i], upright, channels)
                image = upright.convert(modes[channels])
        except _Refused:
            raise
        except Exception as error:  # of any kind: struct, zlib, syntax, bombs
            raise ValueError(
                f"{paths[i]} is no image that can be read ({type(error).__name__}: "
                f"{error})."
            ) from error
        if size is None:
            return image
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        square = image.crop((left, top, left + side, top + side))
        return square.resize((size, size), Image.Resampling.LANCZOS)

    width, height = decoded(0).size

    def encoded(i: int) -> bytes:
        image = decoded(i)
        if image.size != (width, height):
            raise ValueError(
                f"{paths[i]} is {image.size[1]} x {image.size[0]}, {paths[0]} "
                f"{height} x {width} (height x width); give --size."
            )
        return _png(image)

    shape = (height, width, channels)
    found = {"image": Column("Image", len(paths), encoded, shape)}
    labels = [p.relative_to(folder).parts[0] for p in paths if p.parent != folder]
    if labels:
        if len(labels) != len(paths):
            raise ValueError(
                f"{folder} holds images both in folders (classes) and beside them; "
                f"move these into a folder too."
            )
        numbers = all(name.isdecimal() for name in labels)
        names = sorted({*labels}, key=lambda n: (int(n), n) if numbers else n)
        unknown = [n for n in names if classes is not None and n not in classes]
        if unknown:
            raise ValueError(
                f"{folder} holds the classes {first_few(unknown)}, which are not among "
                f"those that train: {first_few(classes or ())}."
            )
        names = tuple(names if classes is None else classes)
        label = Column("ClassLabel", len(paths), lambda i: labels[i], names=names)
        found["label"] = label
    beside = {p.with_suffix(""): p for p in files if p.suffix.lower() == ".txt"}
    texts = [beside.get(p.with_suffix("")) for p in paths]
    has = [text is not None for text in texts]
    if any(has):
        if not all(has):
            raise ValueError(
                f"{sum(has)} of {len(has)} images have a caption, "
                f"{paths[has.index(False)]} has none; write the others, or move the "
                f"texts away."
            )
        given = [*filter(None, texts)]
        found["text"] = Column("Text", len(given), lambda i: caption_of(given[i]))
    return found


class _Refused(ValueError):
    """An image that can be read, but not be stored."""


def _check_mode(path: Path, image: Image.Image, channels: int) -> None:
    """Raises ValueError for what 8 bits in so many channels cannot show."""
    if image.mode.startswith("I") or image.mode == "F":
        raise _Refused(
            f"{path} has more than 8 bits a channel (mode {image.mode}); scale it to "
            f"8, or give it as an array."
        )
    if channels != 4 and image.has_transparency_data:
        if np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
            raise _Refused(
                f"{path} has transparent pixels; give --channels=4, or put it on a "
                f"background."
            )


def array_columns(paths: Sequence[Path]) -> dict[str, Column]:
    """Arrays of files, by the names of the files; .npy files are memory-mapped.

    Raises:
        ValueError: a file that is no array or list of texts, two of one name, arrays of
            different length, or values that cannot be stored.
    """
    found: dict[str, Column] = {}
    for path in paths:
        if path.stem in found:
            raise ValueError(f"two files are called {path.stem!r}; rename one.")
        found[path.stem] = _column(path.stem, _load(path), path)
    count = next(iter(found.values())).count
    for name, column in found.items():
        if column.count != count:
            raise ValueError(
                f"{name} has {column.count} samples, {next(iter(found))} has {count}; "
                f"all need as many."
            )
    return found


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".json":
            return json_of(path)
        if path.suffix != ".npy":
            raise ValueError("its name ends in neither .npy nor .json")
        return array_of(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is no array of numbers or JSON ({error}).") from error


def _column(name: str, values: Any, path: Path) -> Column:
    if not isinstance(values, list | np.ndarray):
        raise ValueError(f"{path} holds no single array and no list of texts.")
    if isinstance(values, list):
        if name == "label":
            raise ValueError(
                f"{path} holds texts; classes are integers in label.npy, and texts "
                f"have another name."
            )
        if not values or not all(isinstance(value, str) for value in values):
            raise ValueError(f"{path} must hold a list of texts, at least one.")
        tfds_sets.encode_texts(values)  # refuses what could not be read again
        return Column("Text", len(values), values.__getitem__)
    if not values.ndim or not len(values) or values.dtype.kind not in "biuf":
        raise ValueError(
            f"{path} has shape {values.shape} and dtype {values.dtype}; give numbers "
            f"[n, ...], n at least 1."
        )
    shape, dtype = values.shape[1:], values.dtype.newbyteorder("=")
    if name == "label":
        if shape or dtype.kind not in "iu" or values.min() < 0:
            raise ValueError(f"{path} must hold integers [n] from 0, one class each.")
        check_range(f"greatest label of {path}", int(values.max()), 0, _MOST_CLASSES)
        names = tuple(str(i) for i in range(int(values.max()) + 1))
        return Column("ClassLabel", len(values), lambda i: int(values[i]), names=names)
    if name == "image" and dtype == np.uint8 and len(shape) == 2:
        values, shape = values[..., None], (*shape, 1)
    if name == "image" and dtype == np.uint8 and shape[2:] in ((1,), (3,), (4,)):

        def encoded(i: int) -> bytes:
            pixels = np.asarray(values[i])
            return _png(Image.fromarray(pixels[..., 0] if shape[2] == 1 else pixels))

        return Column("Image", len(values), encoded, shape)
    if name == "image":
        raise ValueError(
            f"{path} has shape {values.shape} and dtype {dtype}; an 'image' is uint8 "
            f"[n, height, width] or [n, height, width, 1, 3 or 4]. Give other arrays "
            f"another name."
        )
    return Column(
        "Tensor", len(values), lambda i: np.asarray(values[i], dtype), shape, dtype
    )


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_tfds(
    name: str,
    columns: Mapping[str, Column],
    *,
    held_out: Mapping[str, Column] | None = None,
    data_dir: Path | None = None,
    version: str = "1.0.0",
) -> Path:
    """Writes a set with the split 'train', and 'test' where something is held out.

    Args:
        name: lower-case letters, digits and underscores.
        columns: by name, all of one length.
        held_out: the same columns of the samples of 'test'; None makes none.
        data_dir: folder with all prepared sets, see
            :func:`tmdjax.data.tfds_sets.data_folder`.
        version: 'major.minor.patch'.

    Returns:
        The folder of the set.

    Raises:
        FileExistsError: there is a set of that name and version.
        ImportError: tensorflow-datasets is not installed.
        ValueError: a bad name or version, columns of different length, or other columns
            or shapes in what is held out.
    """
    if not re.fullmatch(r"[a-z]\w*", name) or not re.fullmatch(
        r"\d+\.\d+\.\d+", version
    ):
        raise ValueError(
            f"name={name!r} and version={version!r} must be like 'my_set' (lower-case "
            f"letters, digits, underscores) and '1.0.0'."
        )
    root = tfds_sets.data_folder(data_dir)
    folder = root / name / version
    if tfds_sets.find_prepared(f"{name}:{version}", root) or folder.exists():
        raise FileExistsError(
            f"{folder} is there; give another --name or --version, or delete it."
        )
    tfds = import_optional("tensorflow_datasets", "writing a set", "tfds")
    splits = {"train": columns} | ({} if held_out is None else {"test": held_out})
    layout = {k: (c.kind, c.shape, c.names) for k, c in columns.items()}
    for split, there in splits.items():
        count = next(iter(there.values())).count
        for key, column in there.items():
            check_batch(f"{split}[{key!r}]", np.empty(column.count), count)
        found = {k: (c.kind, c.shape, c.names) for k, c in there.items()}
        if found != layout:
            raise ValueError(
                f"what is held out has the columns {found}, what trains {layout}; both "
                f"need the same (--size makes images alike)."
            )
    features = {key: _feature(tfds.features, c) for key, c in columns.items()}

    class Written(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore
        VERSION = tfds.core.Version(version)
        code_path = None  # no checksums of downloads stand beside this code

        def _info(self) -> Any:
            info = tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,  # in the order given: `order` is random
            )
            # else it asks the network for facts on a set of the catalogue of this name,
            # and leaves a temporary folder
            info.initialize_from_bucket = lambda: None
            return info

        def _split_generators(self, dl_manager: Any) -> Any:
            return {
                split: self._generate_examples(there) for split, there in splits.items()
            }

        def _generate_examples(self, there: Mapping[str, Column]) -> Any:
            count = next(iter(there.values())).count
            order = np.random.default_rng(0).permutation(count)
            for place, row in enumerate(order.tolist()):
                yield place, {k: _value(c, row) for k, c in there.items()}

    Written.name = name
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # it speaks of downloads
        Written(data_dir=root, file_format="array_record").download_and_prepare()
    return folder


def _feature(features: Any, column: Column) -> Any:
    if column.kind == "Image":
        return features.Image(shape=column.shape, encoding_format="png")
    if column.kind == "ClassLabel":
        return features.ClassLabel(names=column.names)
    if column.kind == "Text":
        return features.Text()
    return features.Tensor(shape=column.shape, dtype=np.dtype(column.dtype))


def _value(column: Column, row: int) -> Any:
    value = column.read(row)
    return io.BytesIO(value) if column.kind == "Image" else value


def main(arguments: Sequence[str]) -> int:
    """Parses and converts; returns the exit status."""
    flags = argparse.ArgumentParser(
        prog="tmdjax.data.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = flags.add_subparsers(dest="kind", required=True)
    images, arrays = kinds.add_parser("images"), kinds.add_parser("arrays")
    images.add_argument("folder", type=named_path)
    images.add_argument("--size", type=int, help="height and width")
    images.add_argument("--channels", type=int, default=3, help="1, 3 or 4")
    arrays.add_argument("files", type=named_path, nargs="+", help=".npy or .json")
    for each in (images, arrays):
        each.add_argument("--name", required=True, help="of the set")
        each.add_argument("--version", default="1.0.0")
        each.add_argument(
            "--data_dir", type=named_path, help="default: where TFDS looks"
        )
    given = flags.parse_args(arguments)
    held_out = None
    if given.kind == "images":
        options = {"size": given.size, "channels": given.channels}
        trains, held = image_splits(given.folder)
        columns = image_columns(trains, **options)
        if held is not None:
            names = columns["label"].names if "label" in columns else None
            held_out = image_columns(held, classes=names, **options)
    else:
        columns = array_columns(given.files)
    folder = write_tfds(
        given.name,
        columns,
        held_out=held_out,
        data_dir=given.data_dir,
        version=given.version,
    )
    count = next(iter(columns.values())).count
    print(f"wrote {count} samples of {', '.join(columns)} to {folder}")
    place = f', data_dir="{given.data_dir}"' if given.data_dir else ""
    print(
        f'read it by data.load("tfds", builder="{given.name}"{place}, '
        f"{'test_count=...' if held_out is None else 'test_split=' + repr('test')})"
    )
    return 0


if __name__ == "__main__":
    exit_with(main)
