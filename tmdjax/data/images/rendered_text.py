"""Images of one word of 3 to 6 capital letters, with the word as condition.

Words are random letters: 26^3 + ... + 26^6 of them, so a generator learns to spell,
not a list. An eighth of all words, chosen by a hash, is held out. The prompt is 'a sign
that says "WORD"'; a network is conditioned on the word's letters as ids.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tmdjax.core.checks import check_count
from tmdjax.core.prng import check_key, fold_in, sample_keys
from tmdjax.core.types import Array, ArrayLike, Float, Int, Key, SampleKeys
from tmdjax.data.dataset import Dataset

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""Id i stands for letter i - 1; id 0 is padding."""

SHORTEST = 3
LONGEST = 6

_SMALLEST = 32
_HELD_OUT_ONE_IN = 8
_SUPERSAMPLING = 4
_WIDEST = 31 / 32
_CAPITAL_HEIGHT = 0.69  # of the font's size
_LUMA = (0.299, 0.587, 0.114)
_LEAST_CONTRAST = 0.8
# Streams of one sample's key.
_COLOURS, _WORDS = 0, 1


def is_held_out(word: str) -> bool:
    """Says whether a word belongs to the test split: one in eight does."""
    digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _HELD_OUT_ONE_IN == 0


def sample_words(keys: SampleKeys, held_out: bool = False) -> list[str]:
    """Draws a word of one split from each key; word i depends on key i alone.

    Lengths 3 to 6 are equally likely, and so are the letters.

    Args:
        keys: typed keys [n].
        held_out: draw from the test split instead of the training split.

    Returns:
        n words, with repeats.

    Raises:
        TypeError: raw keys.
    """
    check_key(keys, "keys")
    words: list[str | None] = [None] * len(keys)
    attempt = 0
    while None in words:
        # All are drawn again, though few are missing: one shape, one compilation.
        ids = np.asarray(_draw_ids(keys, attempt))
        missing = [i for i, word in enumerate(words) if word is None]
        for i, word in zip(missing, decode(ids[missing])):
            if is_held_out(word) == held_out:
                words[i] = word
        attempt += 1
    return [word for word in words if word is not None]


@jax.jit
def _draw_ids(keys: SampleKeys, attempt: ArrayLike) -> Int[Array, "n position"]:
    def one(key: Key[Array, ""]) -> Array:
        share = jax.random.uniform(key, (1 + LONGEST,))
        length = SHORTEST + jnp.floor(share[0] * (LONGEST - SHORTEST + 1))
        ids = 1 + jnp.floor(share[1:] * len(LETTERS)).astype(jnp.int32)
        return jnp.where(jnp.arange(LONGEST) < length, ids, 0)

    return jax.vmap(one)(fold_in(fold_in(keys, _WORDS), attempt))


def encode(words: Sequence[str]) -> dict[str, np.ndarray]:
    """Words as what a network is conditioned on.

    Args:
        words: n words of 3 to 6 letters A to Z.

    Returns:
        'ids' int32 [n, 6], 1 to 26 and 0 behind the word; 'mask' bool [n, 6], True
        on letters.

    Raises:
        TypeError: one string instead of a sequence of them.
        ValueError: a word of another length or with other characters.
    """
    check_words(words)
    ids = np.zeros((len(words), LONGEST), np.int32)
    for row, word in zip(ids, words):
        row[: len(word)] = [1 + LETTERS.index(letter) for letter in word]
    return {"ids": ids, "mask": ids > 0}


def decode(ids: ArrayLike) -> list[str]:
    """The words of ids, padding dropped: undoes :func:`encode`.

    Args:
        ids: int [n, 6] in [0, 26].

    Returns:
        n strings.

    Raises:
        ValueError: an id that stands for no letter.
    """
    rows = np.asarray(ids)
    wrong = rows[(rows < 0) | (rows > len(LETTERS))]
    if wrong.size:
        raise ValueError(
            f"ids has {wrong.size} value(s) outside [0, {len(LETTERS)}], the first is "
            f"{wrong[0]}; 0 is padding and 1 to {len(LETTERS)} are letters."
        )
    return ["".join(LETTERS[i - 1] for i in row if i) for row in rows]


def check_words(words: Sequence[str]) -> None:
    """Raises TypeError or ValueError unless all are words that can be rendered."""
    if isinstance(words, str):
        raise TypeError(f"words={words!r} is one string; give a list of words.")
    for i, word in enumerate(words):
        if not SHORTEST <= len(word) <= LONGEST:
            raise ValueError(
                f"words[{i}]={word!r} has {len(word)} characters; give {SHORTEST} to "
                f"{LONGEST}."
            )
        if not set(word) <= set(LETTERS):
            raise ValueError(
                f"words[{i}]={word!r} has other characters than the capital letters A "
                f"to Z."
            )


def render(
    words: Sequence[str], keys: SampleKeys, size: int = 64
) -> Float[np.ndarray, "n size size 3"]:
    """Draws words in a random colour on a plain ground of another.

    Each word is as large as the image's width allows, at most half the image's height
    in font size, and centred; so it lies inside ``rewards.ocr.text_band``. Colour and
    ground are uniform in RGB, given that their luma differs by at least 0.8 (of the 2
    between black and white). The font is the scalable one inside Pillow.

    Args:
        words: n words of 3 to 6 letters A to Z.
        keys: typed keys [n]; image i depends on word i and key i alone.
        size: height and width, at least 32.

    Returns:
        float32 [n, size, size, 3] in [-1, 1].

    Raises:
        TypeError: raw keys, one string for words, or a size that is no integer.
        ValueError: a word that cannot be rendered, size < 32, or another number of
            keys than of words.
    """
    check_words(words)
    check_key(keys, "keys")
    check_count("size", size, _SMALLEST)
    if keys.shape != (len(words),):
        raise ValueError(
            f"keys has shape {keys.shape}; give one key a word, ({len(words)},)."
        )
    colours = np.asarray(_draw_colours(keys))
    images = np.empty((len(words), size, size, 3), np.float32)
    for image, word, (ground, colour) in zip(images, words, colours):
        image[:] = ground + _coverage(word, size)[..., None] * (colour - ground)
    return images


@jax.jit
def _draw_colours(keys: SampleKeys) -> Float[Array, "n 2 3"]:
    """Ground and colour of each image, drawn again until they differ enough."""

    def draw(key: Any) -> Array:
        return jax.random.uniform(key, (2, 3), jnp.float32, minval=-1)

    def too_near(state: Any) -> Array:
        ground, colour = state[1] @ jnp.asarray(_LUMA)
        return jnp.abs(colour - ground) < _LEAST_CONTRAST

    def again(state: Any) -> tuple[Any, Array]:
        key, _ = jax.random.split(state[0])
        return key, draw(key)

    def one(key: Key[Array, ""]) -> Array:
        return jax.lax.while_loop(too_near, again, (key, draw(key)))[1]

    return jax.vmap(one)(fold_in(keys, _COLOURS))


def _coverage(word: str, size: int) -> Float[np.ndarray, "size size"]:
    """Share of each pixel that the letters cover, [size, size] in [0, 1]."""
    fine = size * _SUPERSAMPLING
    fitting = 100 * _WIDEST * fine / ImageFont.load_default(100).getlength(word)
    font_size = min(fitting, fine / 2)
    canvas = Image.new("L", (fine, fine))
    ImageDraw.Draw(canvas).text(
        (fine / 2, (fine + _CAPITAL_HEIGHT * font_size) / 2),
        word,
        fill=255,
        font=ImageFont.load_default(font_size),
        anchor="ms",
    )
    return np.asarray(canvas.reduce(_SUPERSAMPLING), np.float32) / 255


def load_rendered_text(
    files: Mapping[str, Path],
    *,
    train_count: int = 8192,
    test_count: int = 1024,
    seed: int = 0,
    size: int = 64,
) -> Dataset:
    """A fixed set of rendered words; no word of the test split is in the training one.

    A larger count extends a split without changing it. Host memory: 12 size² bytes
    an image.

    Returns:
        'image' [n, size, size, 3], float32 in [-1, 1]; 'label' int32 [n], the word's
        length - 3; 'ids' int32 [n, 6] and 'mask' bool [n, 6] as of :func:`encode`.

    Raises:
        TypeError: a count or the size is no integer.
        ValueError: a count < 1 or size < 32.
    """
    check_count("train_count", train_count)
    check_count("test_count", test_count)
    check_count("size", size, _SMALLEST)
    root = jax.random.key(seed)

    def split(index: int, count: int) -> dict[str, np.ndarray]:
        keys = sample_keys(fold_in(root, index), count)
        words = sample_words(keys, held_out=bool(index))
        encoded = encode(words)
        label = encoded["mask"].sum(1, dtype=np.int32) - SHORTEST
        return {"image": render(words, keys, size), "label": label, **encoded}

    return Dataset(
        name="rendered_text",
        train=split(0, train_count),
        test=split(1, test_count),
        num_classes=LONGEST - SHORTEST + 1,
        meta={
            "class_names": tuple(
                f"{length} letters" for length in range(SHORTEST, LONGEST + 1)
            ),
            "seed": seed,
        },
    )
