"""Videos of a walk through a room with blocks that move and bounce off its walls.

"Block-World": the agent sees a part of the room; the blocks move on out of its sight.

References:
    Lillemark et al., "Flow Equivariant World Models", arXiv 2601.01075, whose videos
    are drawn by a simulator; these are by :mod:`tmdjax.domains.blocks.ray_caster`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from tmdjax.core import prng
from tmdjax.core.checks import check_count, check_range
from tmdjax.core.types import Array, Int, Key, SampleKeys
from tmdjax.domains.blocks.ray_caster import (
    DIRECTIONS,
    PALETTE,
    block_places,
    render,
)
from tmdjax.models.flow_equivariant.group_actions import FORWARD, LEFT, REST, RIGHT

LOOKS = 5
"""Frames for which the agent stands at a wall and looks into the room."""

PERSISTENCE = (0.85, 0.92)
"""Probability of another step along a wall, uniform in this range for each video."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockWorld:
    """Sizes of a room, and what moves in it; the defaults are the published ones.

    Attributes:
        room: cells along each side, at least 2.
        blocks: how many.
        moving: whether blocks move by a cell a frame, each along x or y, one way; else
            they stand.
        image_size: height and width of frames in pixels.
        view_degrees: angle of the view, in (0, 180).
        context: frames that a model may see, at least 1.
        predicted: frames after those, at least 1.

    Raises:
        TypeError: a size that is no integer.
        ValueError: one out of range.
    """

    room: int = 16
    blocks: int = 6
    moving: bool = True
    image_size: int = 128
    view_degrees: float = 60.0
    context: int = 50
    predicted: int = 90

    def __post_init__(self) -> None:
        check_count("room", self.room, 2)
        for name in ("blocks", "image_size", "context", "predicted"):
            check_count(name, getattr(self, name))
        span = {"open_low": True, "open_high": True}
        check_range("view_degrees", self.view_degrees, 0, 180, **span)

    @property
    def frames(self) -> int:
        """Frames of a video."""
        return self.context + self.predicted


def block_videos(keys: SampleKeys, *, world: BlockWorld) -> dict[str, Array]:
    """Random videos. Pure and jittable; sample i depends on key i alone.

    Agent and blocks start in uniform cells, the agent with heading 0; blocks have the
    colours of the palette in random order (again from its start where there are more)
    and pass through one another and the agent. The agent walks as :func:`walk` says.

    Args:
        keys: typed keys [batch].
        world: sizes.

    Returns:
        'frames' float32 [batch, frame, size, size, 3] in [0, 1]; 'actions' int32
        [batch, frame], which led from the frame before to this one: 0 left, 1 right, 2
        forward, 4 rest, as of :class:`tmdjax.models.EgocentricMap` (the first is rest);
        and the state, int32: 'place' [batch, frame, 2] and 'heading' [batch, frame] of
        the agent, 'blocks' [batch, frame, block, 2], 'colour' [batch, block], an index
        of the palette.

    Raises:
        TypeError: raw keys.
    """
    prng.check_key(keys, "keys")
    palette = jnp.array([*PALETTE.values()], jnp.float32)
    draw = functools.partial(
        render, room=world.room, size=world.image_size, view_degrees=world.view_degrees
    )

    def sample(key: Key[Array, ""]) -> dict[str, Array]:
        where, which, drift, what, steps = jax.random.split(key, 5)
        shape = (world.blocks, 2)
        start = jax.random.randint(where, shape, 0, world.room, jnp.int32)
        way = jax.random.randint(drift, (world.blocks,), 0, 4)
        velocity = jnp.array(DIRECTIONS, jnp.int32)[way] * world.moving
        times = jnp.arange(world.frames)
        blocks = jax.vmap(lambda t: block_places(start, velocity, t, world.room))(times)
        order = jax.random.permutation(what, len(PALETTE))
        colour = order[jnp.arange(world.blocks) % len(PALETTE)]
        place = jax.random.randint(which, (2,), 0, world.room, jnp.int32)
        places, headings, actions = walk(steps, place, world.frames, world.room)

        def frame(given: Any) -> Array:
            place, heading, blocks = given
            return draw(place, heading, blocks, palette[colour])

        return {
            "frames": jax.lax.map(frame, (places, headings, blocks)),
            "actions": actions,
            "place": places,
            "heading": headings,
            "blocks": blocks.astype(jnp.int32),
            "colour": colour.astype(jnp.int32),
        }

    return jax.vmap(sample)(keys)


def walk(
    key: Key[Array, ""], place: Int[Array, "2"], frames: int, room: int
) -> tuple[Int[Array, "frame 2"], Int[Array, "frame"], Int[Array, "frame"]]:
    """A walk that looks into the room from its walls. Pure and jittable.

    The agent walks on until a wall is ahead, turns about and looks for ``LOOKS``
    frames, turns along the wall, left or right, and crawls there: each further step has
    one probability of ``PERSISTENCE``; where it stops, or at a corner, it turns inward
    and crosses the room.

    Args:
        key: typed key.
        place: first cell, with heading 0.
        frames: how many.
        room: cells along each side.

    Returns:
        Places, headings and the actions that led there, int32: LEFT, RIGHT, FORWARD or
        REST of ``models.flow_equivariant.group_actions`` (the first is REST).
    """
    low, high = PERSISTENCE
    rate, key = jax.random.split(key)
    persistence = jax.random.uniform(rate, (), minval=low, maxval=high)
    directions = jnp.array(DIRECTIONS, jnp.int32)
    # crawling; turns still to make, and which; looks still to take; the turn inward
    plan = (jnp.array(False), jnp.int32(0), jnp.int32(LEFT), jnp.int32(0), jnp.int32(0))

    def step(carry: Any, key: Any) -> Any:
        place, heading, (crawls, turns, turn, looks, inward) = carry
        ahead = place + directions[heading]
        wall = ((ahead < 0) | (ahead >= room)).any()
        side_key, stop_key = jax.random.split(key)
        side = jax.random.randint(side_key, (), LEFT, RIGHT + 1)
        stops = wall | (jax.random.uniform(stop_key) > persistence)

        turning, looking = turns > 0, (turns == 0) & (looks > 0)
        free = ~turning & ~looking
        meets, leaves = free & ~crawls & wall, free & crawls & stops
        action = jnp.where(turning, turn, jnp.where(looking, REST, FORWARD))
        action = jnp.where(meets, LEFT, jnp.where(leaves, inward, action))
        begins = looking & (looks == 1)  # to crawl, from the next frame on
        after = (
            (crawls | begins) & ~leaves,
            jnp.where(meets | begins, 1, turns - turning),
            jnp.where(meets, LEFT, jnp.where(begins, side, turn)),
            jnp.where(meets, LOOKS, looks - looking),
            jnp.where(begins, LEFT + RIGHT - side, inward),
        )
        place, heading = moved(place, heading, action, room)
        carry = (
            place,
            heading,
            jax.tree.map(lambda a, b: a.astype(b.dtype), after, plan),
        )
        return carry, (place, heading, action.astype(jnp.int32))

    start = place, jnp.int32(0), plan
    _, (places, headings, actions) = jax.lax.scan(
        step, start, jax.random.split(key, frames - 1)
    )
    first = place[None], jnp.zeros(1, jnp.int32), jnp.full(1, REST, jnp.int32)
    return tuple(
        jnp.concatenate([a, b]) for a, b in zip(first, (places, headings, actions))
    )  # pyright: ignore[reportReturnType]


def moved(
    place: Int[Array, "2"], heading: Int[Array, ""], action: Int[Array, ""], room: int
) -> tuple[Int[Array, "2"], Int[Array, ""]]:
    """Where an agent stands and looks after an action; a wall stops it.

    Args:
        place: its cell.
        heading: 0 .. 3.
        action: LEFT, RIGHT or FORWARD; any other is rest.
        room: cells along each side.
    """
    ahead = jnp.array(DIRECTIONS, jnp.int32)[heading]
    turned = jnp.where(action == LEFT, 1, jnp.where(action == RIGHT, -1, 0))
    place = place + jnp.where(action == FORWARD, ahead, 0)
    return jnp.clip(place, 0, room - 1), (heading + turned) % 4
