"""What videos of moving sprites may show: scales, templates, prompts.

A prompt is one integer: its factors (colour, shape, motion, ...) in mixed radix, the
first the slowest; ``scale.num_prompts``, one past the last, is the null prompt.
:mod:`tmdjax.data.moving_sprites` draws such videos and
:mod:`tmdjax.rewards.moving_sprites` checks them.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.core
import numpy as np

from tmdjax.core.checks import check_choice, check_count, check_range

COLOURS = {
    "red": (1.0, -1.0, -1.0),
    "green": (-1.0, 1.0, -1.0),
    "blue": (-1.0, -1.0, 1.0),
    "yellow": (1.0, 1.0, -1.0),
}
"""Colours of sprites, by name."""

SHAPES = ("square", "plus", "ring")
MOTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
"""Direction of the first step, (row, column), by name."""

GROUNDS = {
    "grey": (0.0, 0.0, 0.0),
    "dark": (-0.6, -0.6, -0.6),
    "light": (0.6, 0.6, 0.6),
    "violet": (0.3, -0.4, 0.3),
}
"""Colours of the ground, by name; each differs by more than 0.5 from every sprite."""

GAITS = {
    "straight": (1, False),
    "slow bouncing": (1, True),
    "fast bouncing": (2, True),
}
"""Speed in pixels a frame, and whether the borders are met, by name."""

LEAD = 4
"""Steps that a bouncing sprite makes, at least, before and after its first bounce."""

_NO_WORD = "-"


GAPS = (1, 4)
"""Fewest and most pixels between the boxes of two sprites."""

LIFT = 2
"""Most pixels that the second sprite stands higher or lower than the first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """Size of the videos and what varies in them; any that fits may be made.

    Attributes:
        name: in ``SCALES``, or your own.
        frames: of a video.
        size: height and width in pixels.
        box: side of the square that holds a sprite.
        colours: how many of ``COLOURS``.
        shapes: how many of ``SHAPES``.
        motions: how many of ``MOTIONS``.
        gaits: how many of ``GAITS``; one: straight at 1 pixel a frame.
        grounds: how many of ``GROUNDS``.
        pairs: whether a second sprite, of another colour, may stand right of the
            first; they move as one.
        level: the ground's grey level is off its colour by U[-level, level].

    Raises:
        ValueError: more of something than its table has; or a way that does not fit
            into the image.
    """

    name: str
    frames: int
    size: int
    box: int
    colours: int = 4
    shapes: int = 3
    motions: int = 4
    gaits: int = 1
    grounds: int = 1
    pairs: bool = False
    level: float = 0.3

    def __post_init__(self) -> None:
        tables = {
            "colours": COLOURS,
            "shapes": SHAPES,
            "motions": MOTIONS,
            "gaits": GAITS,
            "grounds": GROUNDS,
        }
        for name, table in tables.items():
            check_count(name, getattr(self, name))
            check_range(name, getattr(self, name), 1, len(table))
        check_count("frames", self.frames, 2)
        check_count("box", self.box, 3)
        check_range("level", self.level, 0, 0.3)
        width = 2 * self.box + GAPS[1] if self.pairs else self.box
        room, steps = self.size - width, self.frames - 1
        if room < steps:
            raise ValueError(
                f"scale {self.name!r}: sprites {width} wide that move {steps} pixels "
                f"in {self.frames} frames need a size of {width + steps}, got "
                f"{self.size}."
            )
        fastest = max(speed for speed, _ in [*GAITS.values()][: self.gaits])
        if self.gaits > 1 and (steps < 2 * LEAD or room < LEAD * fastest):
            raise ValueError(
                f"scale {self.name!r}: to bounce takes {2 * LEAD + 1} frames and "
                f"{LEAD * fastest} pixels beside the sprites, which are {width} wide; "
                f"got {self.frames} frames and a size of {self.size}."
            )

    @property
    def radices(self) -> dict[str, int]:
        """How many values each factor has, slowest first."""
        seconds = 1 + (self.colours - 1) * self.shapes if self.pairs else 1
        return {
            "colour": self.colours,
            "shape": self.shapes,
            "motion": self.motions,
            "gait": self.gaits,
            "ground": self.grounds,
            "second": seconds,
        }

    @property
    def num_prompts(self) -> int:
        """Prompts; the null prompt has this number."""
        return int(np.prod([*self.radices.values()]))

    @property
    def length(self) -> int:
        """Words of a prompt."""
        return 3 + (self.gaits > 1) + (self.grounds > 1) + 3 * self.pairs

    @property
    def event_shape(self) -> tuple[int, int, int, int]:
        """(frame, height, width, channel) of a video."""
        return self.frames, self.size, self.size, 3


SCALES = {
    "tiny": Scale(name="tiny", frames=4, size=8, box=3, colours=2, shapes=2, motions=2),
    "small": Scale(name="small", frames=6, size=12, box=5),
    "large": Scale(
        name="large",
        frames=16,
        size=32,
        box=6,
        gaits=len(GAITS),
        grounds=len(GROUNDS),
        pairs=True,
        level=0.1,
    ),
}
"""'tiny' has 8 prompts, for wiring; 'small' 48; 'large' 5,760."""


def get_scale(scale: str | Scale) -> Scale:
    """A scale by name, or as it is.

    Raises:
        ValueError: unknown name.
    """
    if isinstance(scale, Scale):
        return scale
    check_choice("scale", scale, SCALES)
    return SCALES[scale]


@functools.cache
def templates(box: int) -> np.ndarray:
    """Masks of ``SHAPES`` in their box, uint8 [shape, box, box] of 0 and 1.

    A square of side box - 1 in the upper left corner; a plus of the box's width with
    arms of 1 pixel (2 in an even box); a ring, the box's outermost pixels.
    """
    square, plus, ring = np.zeros((len(SHAPES), box, box), np.uint8)
    square[:-1, :-1] = 1
    arm = slice((box - 1) // 2, box // 2 + 1)
    plus[arm], plus[:, arm] = 1, 1
    ring[:] = 1
    ring[1:-1, 1:-1] = 0
    masks = np.stack([square, plus, ring])
    masks.flags.writeable = False
    return masks


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
        into the tables of this module; 'second_colour' and 'second_shape', -1 where
        one sprite is asked for.

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


def prompt_index(factors: Mapping[str, Any], scale: str | Scale) -> Any:
    """Inverse of :func:`prompt_factors`.

    Args:
        factors: integers [batch] by name; one that the scale does not vary may be
            left out.
        scale: or its name.

    Returns:
        Integers [batch].

    Raises:
        ValueError: a factor that is missing, out of range (where concrete), unknown
            to the scale, or two sprites of one colour.
    """
    scale = get_scale(scale)
    known = [*[*scale.radices][:-1], "second_colour", "second_shape"]
    missing = {"colour", "shape", "motion"} - set(factors)
    if missing or set(factors) - set(known):
        raise ValueError(
            f"factors are {sorted(factors)}; give colour, shape and motion, and any "
            f"of {', '.join(known[3:])}."
        )
    zero = factors["colour"] * 0
    given = {name: factors.get(name, zero) for name in known[:-2]}
    colour = factors.get("second_colour", zero - 1)
    shape = factors.get("second_shape", zero - 1)
    for name, value in given.items():
        _check_factor(name, value, 0, scale.radices[name])
    _check_factor("second_colour", colour, -1, scale.colours if scale.pairs else 0)
    _check_factor("second_shape", shape, -1, scale.shapes if scale.pairs else 0)
    step = (colour - given["colour"]) % scale.colours
    has_second = (colour >= 0) * 1
    if not isinstance(step, jax.core.Tracer):
        if np.any(has_second * (step == 0)):
            raise ValueError("both sprites have one colour; give two.")
        if np.any((np.asarray(shape) >= 0) != has_second):
            raise ValueError("second_colour and second_shape must be -1 together.")
    given["second"] = has_second * ((step - 1) * scale.shapes + shape + 1)
    prompts = zero
    for name, radix in scale.radices.items():
        prompts = prompts * radix + given[name]
    return prompts


def _check_factor(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, jax.core.Tracer):
        return
    bad = (np.asarray(value) < low) | (np.asarray(value) >= high)
    if bad.any():
        raise ValueError(
            f"{name} has the value {np.asarray(value)[bad].flat[0]}, outside "
            f"[{low}, {high - 1}]."
        )


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


def parse_prompt(words: Sequence[str], scale: str | Scale) -> int:
    """Inverse of :func:`prompt_words`.

    Raises:
        ValueError: words of no prompt of the scale.
    """
    scale = get_scale(scale)
    number = _prompt_numbers(scale).get(tuple(words))
    if number is None:
        raise ValueError(
            f"{tuple(words)} is no prompt of scale {scale.name!r}; one is "
            f"{prompt_words(0, scale)}."
        )
    return number


@functools.cache
def _prompt_numbers(scale: Scale) -> dict[tuple[str, ...], int]:
    return {prompt_words(i, scale): i for i in range(scale.num_prompts + 1)}


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
