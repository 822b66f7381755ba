"""Catch a block that moves about a room, seen in perspective."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tmdjax.core.checks import check_count, check_range
from tmdjax.core.types import Array, Key
from tmdjax.domains.blocks.ray_caster import DIRECTIONS, PALETTE, block_places, render
from tmdjax.domains.blocks.videos import moved
from tmdjax.envs.base import Transition
from tmdjax.models.flow_equivariant.group_actions import FORWARD, LEFT, RIGHT

_ACTIONS = (LEFT, RIGHT, FORWARD)


@struct.dataclass
class BlockRoomState:
    """Agent and blocks, int32.

    Attributes:
        place: cell of the agent, [2].
        heading: 0 .. 3, see :mod:`tmdjax.domains.blocks.ray_caster`.
        start: cells of the blocks at step 0, [block, 2].
        velocity: of the blocks, cells a step, [block, 2].
        steps: so far.
    """

    place: Any
    heading: Any
    start: Any
    velocity: Any
    steps: Any


@dataclasses.dataclass(frozen=True)
class BlockRoom:
    """Block-World: the agent turns or walks, blocks move on out of its sight.

    An action has three numbers, and the largest says what is done: turn left, turn
    right, or walk a cell ahead; a wall stops the agent. Blocks move by a cell a step,
    each along x or y, bounce off the walls, and pass through one another. The episode
    terminates with reward 1 when the agent stands in the cell of the first block, the
    green one; every other step gives 0. It is truncated after ``horizon`` steps.

    Attributes:
        room: cells along each side, at least 2.
        blocks: how many, the green one among them.
        side: height and width of the observation, uint8 [side, side, 3].
        view_degrees: angle of the view, in (0, 180).
        horizon: steps an episode.

    References:
        The world of arXiv 2601.01075, which has no reward.
    """

    room: int = 16
    blocks: int = 6
    side: int = 32
    view_degrees: float = 60.0
    horizon: int = 200
    action_size: int = dataclasses.field(default=3, init=False)
    action_bound: None = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        check_count("room", self.room, 2)
        for name in ("blocks", "side", "horizon"):
            check_count(name, getattr(self, name))
        ends = {"open_low": True, "open_high": True}
        check_range("view_degrees", self.view_degrees, 0, 180, **ends)

    def reset(
        self, key: Key[Array, ""], first: bool = False
    ) -> tuple[BlockRoomState, Array]:
        """Agent and blocks in uniform cells, which may be the same ones."""
        where, turn, start, drift, when = jax.random.split(key, 5)
        way = jax.random.randint(drift, (self.blocks,), 0, 4)
        shape = (self.blocks, 2)
        state = BlockRoomState(
            place=jax.random.randint(where, (2,), 0, self.room),
            heading=jax.random.randint(turn, (), 0, 4),
            start=jax.random.randint(start, shape, 0, self.room),
            velocity=jnp.array(DIRECTIONS, jnp.int32)[way],
            steps=jax.random.randint(when, (), 0, self.horizon if first else 1),
        )
        return state, self.observe(state)

    def step(self, state: BlockRoomState, action: Array, key: Any) -> Transition:
        """Moves agent and blocks, and pays for standing where the green block is.

        The same state and action always lead to the same step; key is not used.
        """
        code = jnp.array(_ACTIONS, jnp.int32)[jnp.argmax(action)]
        place, heading = moved(state.place, state.heading, code, self.room)
        state = dataclasses.replace(
            state, place=place, heading=heading, steps=state.steps + 1
        )
        caught = (self.places(state)[0] == place).all()
        return Transition(
            state=state,
            observation=self.observe(state),
            reward=caught.astype(jnp.float32),
            terminated=caught,
            truncated=state.steps >= self.horizon,
        )

    def places(self, state: BlockRoomState) -> Array:
        """Cells of the blocks, int32 [block, 2]."""
        given = state.start, state.velocity, state.steps
        return block_places(*given, self.room).astype(jnp.int32)

    def observe(self, state: BlockRoomState) -> Array:
        """What the agent sees, uint8 [side, side, 3]."""
        colours = jnp.array([*PALETTE.values()], jnp.float32)
        which = jnp.arange(self.blocks) % len(PALETTE)
        image = render(
            state.place,
            state.heading,
            self.places(state),
            colours[which],
            room=self.room,
            size=self.side,
            view_degrees=self.view_degrees,
        )
        return jnp.round(255 * image).astype(jnp.uint8)
