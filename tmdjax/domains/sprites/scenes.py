"""What videos of moving sprites may show: colours, shapes, motions, and scales.

:mod:`tmdjax.data.videos.moving_sprites` draws such videos,
:mod:`tmdjax.domains.sprites.checks` checks them, and
:mod:`tmdjax.domains.sprites.prompts` says in words what they show.
"""

import dataclasses
import functools

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


GAPS = (1, 4)
"""Fewest and most pixels between the boxes of two sprites."""

LIFT = 2
"""Most pixels that the second sprite stands higher or lower than the first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """Size of the videos and what varies in them; any that fits may be made.

    Attributes:
        name: a key of ``SCALES``, or a name of your own.
        frames: frames of a video.
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
        # Beyond, the level of one ground could be that of another.
        check_range("level", self.level, 0, 0.3 if self.grounds == 1 else 0.2)
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
    "tiny": Scale(name="tiny", frames=4, size=6, box=3, colours=2, shapes=2, motions=2),
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
