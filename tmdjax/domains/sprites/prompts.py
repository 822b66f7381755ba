"""Prompts of moving sprites: one integer, its factors, its words, their vectors.

The factors (colour, shape, motion, ...) are the digits of the integer in mixed radix,
the first the slowest; ``scale.num_prompts``, one past the last, is the null prompt.
"""

import functools
from typing import Any

import jax.core
import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import check_count
from tmdjax.core.types import Array, ArrayLike, Float, Int
from tmdjax.domains.sprites.scenes import (
    COLOURS,
    GAITS,
    GROUNDS,
    MOTIONS,
    SHAPES,
    Scale,
    get_scale,
)

TEXT_WIDTH = 32
"""Numbers that stand for a word."""

_EMBEDDING_SEED = 2601_09881
_NO_WORD = "-"


def check_prompts(prompts: Any, scale: Scale, *, null: bool = False) -> None:
    """Checks prompts where they are concrete.

    Args:
        prompts: integers [batch].
        scale: that they belong to.
        null: whether the null prompt may be among them.

    Raises:
        TypeError: other than integers.
        ValueError: not [batch], or out of range.
    """
    dtype = getattr(prompts, "dtype", None) or np.asarray(prompts).dtype
    if not np.issubdtype(dtype, np.integer):
        raise TypeError(f"prompts are of dtype {dtype}; give int32.")
    if len(np.shape(prompts)) != 1:
        raise ValueError(f"prompts have shape {np.shape(prompts)}; give [batch].")
    if isinstance(prompts, jax.core.Tracer):
        return
    values, most = np.asarray(prompts), scale.num_prompts + null
    bad = (values < 0) | (values >= most)
    if bad.any():
        remark = "" if null else "; the null prompt asks for nothing"
        raise ValueError(
            f"prompts[{int(bad.argmax())}] = {values[bad][0]} is outside "
            f"[0, {most - 1}] of scale {scale.name!r}{remark}."
        )


def prompt_factors(prompts: Any, scale: str | Scale) -> dict[str, Any]:
    """What prompts ask for. Jittable; numpy in, numpy out.

    Args:
        prompts: int [batch] in [0, num_prompts).
        scale: or its name.

    Returns:
        Integers [batch]: 'colour', 'shape', 'motion', 'gait' and 'ground', indices
        into the tables of ``scenes``; 'second_colour' and 'second_shape', -1
        where one sprite is asked for.

    Raises:
        TypeError: other than integers.
        ValueError: concrete prompts out of range.
    """
    scale = get_scale(scale)
    check_prompts(prompts, scale)
    digits, rest = {}, prompts
    for name, radix in reversed(scale.radices.items()):
        digits[name] = rest % radix
        rest = rest // radix
    second = digits.pop("second")
    has_second = second > 0
    step, shape = (second - 1) // scale.shapes + 1, (second - 1) % scale.shapes
    # Where there is no second sprite, whatever the arithmetic gives becomes -1.
    colour = (digits["colour"] + step) % scale.colours
    named = {name: digits[name] for name in reversed(digits)}
    return {
        **named,
        "second_colour": colour * has_second - (1 - has_second),
        "second_shape": shape * has_second - (1 - has_second),
    }


def prompt_words(prompt: int, scale: str | Scale) -> tuple[str, ...]:
    """The words of one prompt, as many as ``scale.length``.

    ``('red', 'square', 'left')``; the large scale adds the gait, the ground, and
    'left of', colour and shape of the second sprite, or 'alone' and two '-'. The
    null prompt is '' in every place.

    Raises:
        ValueError: out of range.
    """
    scale = get_scale(scale)
    prompts = np.array([prompt])
    check_prompts(prompts, scale, null=True)
    if prompt == scale.num_prompts:
        return ("",) * scale.length
    factors = prompt_factors(prompts, scale)
    value = {name: int(array[0]) for name, array in factors.items()}
    words = [
        [*COLOURS][value["colour"]],
        SHAPES[value["shape"]],
        [*MOTIONS][value["motion"]],
    ]
    if scale.gaits > 1:
        words.append([*GAITS][value["gait"]])
    if scale.grounds > 1:
        words.append([*GROUNDS][value["ground"]])
    if scale.pairs and value["second_colour"] < 0:
        words += ["alone", _NO_WORD, _NO_WORD]
    elif scale.pairs:
        colour, shape = value["second_colour"], value["second_shape"]
        words += ["left of", [*COLOURS][colour], SHAPES[shape]]
    return tuple(words)


@functools.cache
def word_ids(scale: Scale) -> tuple[np.ndarray, tuple[tuple[int, str], ...]]:
    """Ids of the words of every prompt, the null prompt last.

    A word has another id in another place (attention to a text sees no order: 'red'
    of the second sprite is not 'red' of the first); the null word has the id 0 in
    every place.

    Returns:
        int32 [num_prompts + 1, length], and (place, word) by id.
    """
    ids: dict[tuple[int, str], int] = {(0, ""): 0}
    rows = []
    for number in range(scale.num_prompts):
        places = enumerate(prompt_words(number, scale))
        rows.append([ids.setdefault(place, len(ids)) for place in places])
    rows.append([0] * scale.length)
    return np.array(rows, np.int32), tuple(ids)


def text_embedding(
    prompts: Int[ArrayLike, "batch"],
    scale: str | Scale = "small",
    width: int = TEXT_WIDTH,
) -> Float[Array, "batch word width"]:
    """Fixed random numbers for each word of a prompt. Jittable.

    Standard normal. The vector of a word depends on the word and its place alone, so
    scales share what they have in common; the null prompt has one vector of its own,
    in every place.

    Args:
        prompts: int [batch] in [0, num_prompts], the last the null prompt.
        scale: or its name.
        width: of a vector, >= 1.

    Returns:
        float32 [batch, length, width].

    Raises:
        TypeError: prompts that are not integers.
        ValueError: concrete prompts out of range.
    """
    scale = get_scale(scale)
    check_prompts(prompts, scale, null=True)
    ids, _ = word_ids(scale)
    table = _word_vectors(scale, check_count("width", width))
    return jnp.asarray(table)[jnp.asarray(ids)[jnp.asarray(prompts)]]


@functools.cache
def _word_vectors(scale: Scale, width: int) -> np.ndarray:
    rows = []
    for place, word in word_ids(scale)[1]:
        rng = np.random.default_rng([_EMBEDDING_SEED, place, *word.encode()])
        rows.append(rng.standard_normal(width))
    return np.stack(rows).astype(np.float32)
