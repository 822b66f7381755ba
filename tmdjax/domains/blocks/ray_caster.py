"""Pictures of a room with blocks: a ray a pixel, flat colours, no graphics library.

Cells of the room are (x, y), x to the right and y down, as maps are displayed; walls
stand half a cell beyond the outermost ones. Headings count left turns from +x: 0 looks
along +x, 1 along -y, 2 along -x, 3 along +y.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import check_count, check_range
from tmdjax.core.types import Array, Float, Int

BLOCK_WIDTH, BLOCK_HEIGHT = 0.7, 1.5
EYE_HEIGHT, WALL_HEIGHT = 1.5, 2.74
"""Sizes in cells; the eye is level with the tops of blocks."""

PALETTE = {
    "green": (0.0, 1.0, 0.0),
    "red": (1.0, 0.0, 0.0),
    "yellow": (1.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "purple": (0.44, 0.15, 0.76),
    "grey": (0.39, 0.39, 0.39),
}
"""Colours of blocks, by name."""

DIRECTIONS = ((1, 0), (0, -1), (-1, 0), (0, 1))
"""(x, y) of a step forward, by heading."""

# of the sides of a block that face along x and along y
_SIDES = (1.0, 0.75)
# walls at the ends of x and of y, lower end first; floor and ceiling
_WALLS = ((0.75, 0.7, 0.65), (0.65, 0.7, 0.75), (0.6, 0.6, 0.6), (0.7, 0.75, 0.7))
_FLOOR, _CEILING = (0.35, 0.3, 0.25), (0.9, 0.9, 0.9)


def render(
    place: Int[Array, "2"],
    heading: Int[Array, ""],
    blocks: Int[Array, "block 2"],
    colours: Float[Array, "block 3"],
    *,
    room: int,
    size: int,
    view_degrees: float = 60.0,
) -> Float[Array, "size size 3"]:
    """What an agent sees. Pure, jittable; the same numbers in, the same picture out.

    A surface has one colour wherever it is: there is no light that fades. A block that
    the agent stands in is not seen.

    Args:
        place: cell of the agent, integers (x, y) in [0, room).
        heading: 0 .. 3.
        blocks: cells of blocks, whole or not.
        colours: of blocks, in [0, 1].
        room: cells along each side.
        size: height and width of the picture in pixels.
        view_degrees: angle of the view, across as well as up and down, in (0, 180).

    Returns:
        float32 in [0, 1].

    Raises:
        ValueError: a number out of range.
    """
    check_count("room", room)
    check_count("size", size)
    check_range("view_degrees", view_degrees, 0, 180, open_low=True, open_high=True)
    # of a pixel's middle, one cell ahead
    across = (2 * np.arange(size) + 1 - size) / size
    across = (across * math.tan(math.radians(view_degrees) / 2)).astype(np.float32)
    ahead = jnp.array(DIRECTIONS, jnp.float32)[heading]
    side = jnp.stack([-ahead[1], ahead[0]])
    flat = ahead + across[:, None] * side  # [column, 2]
    ray = jnp.concatenate(
        [
            jnp.broadcast_to(flat, (size, size, 2)),
            jnp.broadcast_to(-across[:, None, None], (size, size, 1)),
        ],
        -1,
    )
    eye = jnp.append(place.astype(jnp.float32), EYE_HEIGHT)
    ray = jnp.where(jnp.abs(ray) < 1e-7, 1e-7, ray)  # parallel to a side, almost

    far, colour = _room(eye, ray, room)
    near, which, along_x = _blocks(eye, ray, blocks.astype(jnp.float32))
    shade = jnp.where(along_x, _SIDES[0], _SIDES[1])[..., None]
    return jnp.where((near < far)[..., None], colours[which] * shade, colour)


def _room(eye: Array, ray: Array, room: int) -> tuple[Array, Array]:
    """Distance and colour of walls, floor or ceiling, whichever is met first."""
    low = jnp.array([-0.5, -0.5, 0.0])
    high = jnp.array([room - 0.5, room - 0.5, WALL_HEIGHT])
    upwards = ray > 0
    distance = (jnp.where(upwards, high, low) - eye) / ray
    axis = jnp.argmin(distance, -1)
    ends = jnp.array([*_WALLS, _FLOOR, _CEILING], jnp.float32)
    end = jnp.take_along_axis(upwards, axis[..., None], -1)[..., 0]
    return distance.min(-1), ends[2 * axis + end]


def _blocks(eye: Array, ray: Array, blocks: Array) -> tuple[Array, Array, Array]:
    """Distance of the nearest block, its number, and whether its side faces along x."""
    half = BLOCK_WIDTH / 2
    zeros = jnp.zeros((len(blocks), 1))
    low = jnp.concatenate([blocks - half, zeros], 1)
    high = jnp.concatenate([blocks + half, zeros + BLOCK_HEIGHT], 1)
    one, other = ((ends - eye) / ray[..., None, :] for ends in (low, high))
    enter, leave = jnp.minimum(one, other), jnp.maximum(one, other).min(-1)
    entry = enter.max(-1)  # the ray is inside once it is within all three slabs
    seen = (entry < leave) & (entry > 0)
    distance = jnp.where(seen, entry, jnp.inf)
    which = jnp.argmin(distance, -1)
    at = which[..., None, None]
    side = jnp.argmax(jnp.take_along_axis(enter, at, -2)[..., 0, :], -1)
    return distance.min(-1), which, side == 0


def block_places(
    start: Int[Any, "block 2"], velocity: Int[Any, "block 2"], time: Any, room: int
) -> Int[Array, "block 2"]:
    """Where blocks are at a time: straight on, and back at the walls.

    Along an axis a block that moves is where it was after 2 (room - 1) steps.

    Args:
        start: cells at time 0.
        velocity: cells a step; -1, 0 or 1 along each axis as a rule.
        time: integer, which may be traced.
        room: cells along each side, at least 2.
    """
    last = check_count("room", room, 2) - 1
    wave = (jnp.asarray(start) + time * jnp.asarray(velocity)) % (2 * last)
    return last - jnp.abs(last - wave)
