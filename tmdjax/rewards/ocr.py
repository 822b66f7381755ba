"""Reads rendered words with the PP-OCRv4 recogniser, and scores them.

The model is a file of the package ``rapidocr-onnxruntime``, run directly with
``onnxruntime``: neither its detector nor the package itself, which imports OpenCV, is
needed, because the place of the text is known. A scorer for :mod:`tmdjax.rewards.host`:

    reader = ocr.load()
    pending = host.submit(lambda x, words: ocr.score(reader(x), words), images, words)

Share of 200 words of ``data.rendered_text`` (the first of seed 0) that are read
exactly, clean and under Gaussian noise of standard deviation 0.1 and 0.3; the mean
score in brackets:

    size   clean         noise 0.1     noise 0.3
    32     0.93 (0.99)   0.81 (0.95)   0.33 (0.60)
    48     0.98 (1.00)   0.93 (0.98)   0.60 (0.86)
    64     0.99 (1.00)   0.98 (0.99)   0.83 (0.96)

An image takes 8 ms at any of these sizes (batch 16, one thread of a busy 2-core CPU).
What goes wrong on clean images: Q read as O at 32 pixels, a W read twice or lost, and
one of a pair of equal letters lost. No word is left out of the data for that.
"""

import dataclasses
import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tmdjax.core.checks import check_count, check_finite
from tmdjax.core.optional import import_optional
from tmdjax.core.types import ArrayLike, Float

MODEL_FILE = "models/ch_PP-OCRv4_rec_infer.onnx"
"""The recogniser inside the package ``rapidocr_onnxruntime``."""

MODEL_SHA256 = "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b"

SMALLEST = 32

_INPUT_HEIGHT = 48


def text_band(height: int) -> slice:
    """Rows of an image that hold its text: the middle half."""
    return slice(height // 4, height - height // 4)


def load(
    *,
    threads: int = 1,
    batch_size: int = 16,
    model: str | os.PathLike[str] | None = None,
) -> "Reader":
    """Loads the recogniser.

    Args:
        threads: CPU threads of one call.
        batch_size: images that the network reads at once.
        model: another recogniser of the PP-OCR family in ONNX form, its dictionary in
            the metadata; None for that of the installed package.

    Returns:
        ``reader(images [n, height, width, 3] in [-1, 1]) -> list of n strings``; it
        may be called from several threads.

    Raises:
        FileNotFoundError: no file at ``model``.
        ImportError: onnxruntime or the package with the model is not installed.
        TypeError: threads or batch_size is no integer.
        ValueError: threads or batch_size < 1, a damaged file, or a model without a
            dictionary that fits its output.
    """
    threads = check_count("threads", threads)
    batch_size = check_count("batch_size", batch_size)
    onnxruntime = import_optional("onnxruntime", "reading text", "ocr")
    path = _packaged_model() if model is None else Path(model)
    if not path.is_file():
        raise FileNotFoundError(f"model={str(path)!r} is not a file.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(
        os.fspath(path), options, providers=["CPUExecutionProvider"]
    )
    listed = session.get_modelmeta().custom_metadata_map.get("character", "")
    # Class 0 is CTC's blank, and the space stands behind the dictionary.
    characters = ("", *listed.splitlines(), " ")
    classes = session.get_outputs()[0].shape[-1]
    if len(characters) != classes:
        raise ValueError(
            f"{path} has {classes} classes but a dictionary of {len(characters) - 2} "
            f"characters in its metadata 'character'; a PP-OCR recogniser has two "
            f"classes more than characters."
        )
    return Reader(session=session, characters=characters, batch_size=batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """The loaded recogniser; made by :func:`load`.

    Attributes:
        session: the network, as an inference session of onnxruntime.
        characters: what each class of the network stands for.
        batch_size: images that the network reads at once.
    """

    session: Any
    characters: tuple[str, ...]
    batch_size: int = 16

    def __call__(self, images: ArrayLike) -> list[str]:
        """Reads one line of text in each image, in the rows of :func:`text_band`.

        They are resized to height 48 without a change of aspect (48 x 96 for a square
        image), and what the network says is decoded greedily (CTC: repeats joined,
        blanks dropped).

        Args:
            images: [n, height, width, 3], red first, height and width >= 32,
                floating; values are clipped to [-1, 1].

        Returns:
            n strings, '' where nothing was read.

        Raises:
            TypeError: images that are not floating.
            ValueError: another shape, smaller images, NaN or infinity.
        """
        images = _check_images(images)
        texts = []
        for start in range(0, len(images), self.batch_size):
            batch = network_input(images[start : start + self.batch_size])
            name = self.session.get_inputs()[0].name
            (scores,) = self.session.run(None, {name: batch})
            texts += [self._decode(classes) for classes in scores.argmax(-1)]
        return texts

    def _decode(self, classes: np.ndarray) -> str:
        fresh = np.diff(classes, prepend=0) != 0
        return "".join(self.characters[i] for i in classes[fresh])


def network_input(images: np.ndarray) -> np.ndarray:
    """The band of text in images, as the recogniser takes it.

    Bilinear resizing of 8-bit colours, blue first, scaled to [-1, 1]: as the package
    ``rapidocr-onnxruntime`` does, but not padded to width 320.

    Args:
        images: float32 [n, height, width, 3] in [-1, 1], red first.

    Returns:
        float32 [n, 3, 48, 96 width / height]: the middle half of the rows keeps its
        aspect.
    """
    height, width = images.shape[1:3]
    rows = text_band(height)
    size = (round(2 * _INPUT_HEIGHT * width / height), _INPUT_HEIGHT)
    levels = np.rint((np.clip(images[:, rows], -1, 1) + 1) * 127.5).astype(np.uint8)
    resized = np.stack(
        [
            np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
            for image in levels
        ]
    )
    return np.ascontiguousarray(
        resized[..., ::-1].transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    )


def score(texts: Sequence[str], words: Sequence[str]) -> Float[np.ndarray, "n"]:
    """How near each text comes to its word: max(0, 1 - edit distance / length).

    White space and case do not count.

    Args:
        texts: n strings that were read.
        words: n strings that were asked for.

    Returns:
        float32 [n] in [0, 1].

    Raises:
        TypeError: one string instead of a sequence of them.
        ValueError: sequences of different length, or a word without any character.
    """
    return np.array(
        [
            max(0.0, 1 - edit_distance(text, word) / len(word))
            for text, word in _plain_pairs(texts, words)
        ],
        np.float32,
    )


def exact(texts: Sequence[str], words: Sequence[str]) -> Float[np.ndarray, "n"]:
    """1 where a text is its word, white space and case apart, else 0.

    Args:
        texts: n strings that were read.
        words: n strings that were asked for.

    Returns:
        float32 [n], 0 or 1.

    Raises:
        TypeError, ValueError: the same as of :func:`score`.
    """
    return np.array([a == b for a, b in _plain_pairs(texts, words)], np.float32)


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions from a to b (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            kept = diagonal + (left != right)
            diagonal, row[j] = row[j], min(kept, row[j] + 1, row[j - 1] + 1)
    return row[-1]


def _plain_pairs(texts: Sequence[str], words: Sequence[str]) -> list[tuple[str, str]]:
    for name, strings in (("texts", texts), ("words", words)):
        if isinstance(strings, str):
            raise TypeError(f"{name}={strings!r} is one string; give a list of them.")
    if len(texts) != len(words):
        raise ValueError(
            f"there are {len(texts)} texts but {len(words)} words; give one text "
            f"a word."
        )
    pairs = [(_plain(text), _plain(word)) for text, word in zip(texts, words)]
    for i, (_, word) in enumerate(pairs):
        if not word:
            raise ValueError(
                f"words[{i}]={words[i]!r} has no character to compare with; give words "
                f"that do."
            )
    return pairs


def _plain(text: str) -> str:
    return "".join(text.split()).upper()


def _check_images(images: Any) -> np.ndarray:
    shape = np.shape(images)
    if len(shape) != 4 or shape[-1] != 3 or min(shape[1:3]) < SMALLEST:
        raise ValueError(
            f"images has shape {shape}; give [n, height, width, 3] with height and "
            f"width of at least {SMALLEST}."
        )
    array = np.asarray(images)
    # Extension types of 8 or 16 bits are floating for none of numpy's tests.
    if array.dtype.kind in "biuc":
        raise TypeError(
            f"images has dtype {array.dtype}; give floating values in [-1, 1] "
            f"(levels 0..255 are level / 127.5 - 1)."
        )
    array = array.astype(np.float32)
    check_finite(array, "images", "Look at what generated that image.")
    return array


def _packaged_model() -> Path:
    """The model file, found without importing the package that has it."""
    spec = importlib.util.find_spec("rapidocr_onnxruntime")
    folders = (spec and spec.submodule_search_locations) or ()
    path = next(
        (p for p in (Path(f, MODEL_FILE) for f in folders) if p.is_file()), None
    )
    if path is None:
        raise ImportError(
            f"reading text needs the recogniser inside the package "
            f"rapidocr-onnxruntime, which is not installed. Run: pip install "
            f"'tmdjax[ocr]' (the package is for Python before 3.13; elsewhere unpack "
            f"its wheel and give model=, the path of its {MODEL_FILE})"
        )
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != MODEL_SHA256:
        raise ValueError(
            f"{path} has SHA-256 {actual}, expected {MODEL_SHA256}: it is damaged or "
            f"of another version, which would read otherwise. Run: pip install "
            f"--force-reinstall --no-deps rapidocr-onnxruntime==1.4.4, or give the "
            f"file as model= to use it all the same."
        )
    return path
