"""A disc that is pushed through a maze: PointMaze without MuJoCo.

Free flight is MuJoCo's to rounding; walls are hard and inelastic, where MuJoCo's are
soft, so tables call it PointMaze-lite.

References:
    PointMaze_Medium_Diverse_GDense-v3 of gymnasium-robotics.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tmdjax.core.checks import check_count
from tmdjax.core.types import Array, Key
from tmdjax.envs.base import Transition

MEDIUM = (
    "11111111",
    "1r011001",
    "100100g1",
    "11000111",
    "10010001",
    "1g100101",
    "10001g01",
    "11111111",
)
"""Rows from the top: 1 is a wall, r where episodes begin, g where goals are."""

_MASS = 4.18879 + 0.01 * 1.0  # of the disc, and damping x dt: implicit in the damping
_GEAR, _DT, _MAX_SPEED = 100.0, 0.01, 5.0
_RADIUS, _NOISE, _REACH = 0.1, 0.25, 0.45


@struct.dataclass
class PointMazeState:
    """Position, velocity and goal, float32 [2] each, and steps so far, int32."""

    position: Any
    velocity: Any
    goal: Any
    steps: Any


@dataclasses.dataclass(frozen=True)
class PointMaze:
    """A disc of radius 0.1 in a maze of unit cells; force as action, in +-1.

    The observation is (position, velocity, goal), float32 [6]. The reward is
    exp(-distance to the goal) every step; the episode goes on at the goal, which stays,
    and is truncated after ``horizon`` steps.

    Attributes:
        maze: rows from the top, all of one length, walled in.
        horizon: steps an episode.
    """

    maze: tuple[str, ...] = MEDIUM
    horizon: int = 600
    action_size: int = dataclasses.field(default=2, init=False)
    action_bound: float = dataclasses.field(default=1.0, init=False)

    def __post_init__(self) -> None:
        check_count("horizon", self.horizon)
        if len({len(row) for row in self.maze}) != 1:
            raise ValueError(f"rows of maze={self.maze} differ in length.")
        border = self.maze[0] + self.maze[-1]
        border += "".join(row[0] + row[-1] for row in self.maze)
        if set(border) != {"1"}:
            raise ValueError(
                f"maze={self.maze} is open at its border; wall it in with 1."
            )
        for letter, what in (("r", "a start"), ("g", "a goal")):
            if not any(letter in row for row in self.maze):
                raise ValueError(f"maze={self.maze} has no {letter!r}, {what}.")

    @property
    def walls(self) -> np.ndarray:
        """Bool [row, column]."""
        return np.array([[cell == "1" for cell in row] for row in self.maze])

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.maze), len(self.maze[0])

    def cells(self, letters: str) -> np.ndarray:
        """Centres [cell, 2] (x, y) of the cells with one of these letters."""
        rows, columns = self.shape
        return np.array(
            [
                (j + 0.5 - columns / 2, rows / 2 - (i + 0.5))
                for i, row in enumerate(self.maze)
                for j, cell in enumerate(row)
                if cell in letters
            ]
        )

    def cell_of(self, position: Any) -> tuple[Array, Array]:
        """Row and column, int32 [...], of positions [..., 2]."""
        rows, columns = self.shape
        row = jnp.floor(rows / 2 - position[..., 1]).astype(jnp.int32)
        column = jnp.floor(position[..., 0] + columns / 2).astype(jnp.int32)
        return jnp.clip(row, 0, rows - 1), jnp.clip(column, 0, columns - 1)

    def reset(
        self, key: Key[Array, ""], first: bool = False
    ) -> tuple[PointMazeState, Array]:
        """At a start cell, at rest; the first time also a random step count."""
        start, goal, when = jax.random.split(key, 3)
        state = PointMazeState(
            position=_near(start, self.cells("r")),
            velocity=jnp.zeros(2),
            goal=_near(goal, self.cells("g")),
            steps=jax.random.randint(when, (), 0, self.horizon if first else 1),
        )
        return state, _observe(state)

    def step(self, state: PointMazeState, action: Array, key: Any) -> Transition:
        """Pushes the disc for 0.01 s by the force; walls stop it.

        The same state and action always lead to the same step; key is not used.
        """
        force = jnp.clip(action, -self.action_bound, self.action_bound)
        velocity = jnp.clip(state.velocity, -_MAX_SPEED, _MAX_SPEED)
        velocity = velocity + _DT * (_GEAR * force - velocity) / _MASS
        position, walls = state.position, jnp.asarray(self.walls)
        for axis in (0, 1):
            moved = position.at[axis].add(_DT * velocity[axis])
            position, hit = self._clear(moved, axis, velocity[axis], walls)
            velocity = velocity.at[axis].set(jnp.where(hit, 0.0, velocity[axis]))
        state = PointMazeState(
            position=position,
            velocity=velocity,
            goal=state.goal,
            steps=state.steps + 1,
        )
        return Transition(
            state=state,
            observation=_observe(state),
            reward=jnp.exp(-jnp.linalg.norm(position - state.goal)),
            terminated=jnp.array(False),
            truncated=state.steps >= self.horizon,
        )

    def _clear(
        self, position: Array, axis: int, speed: Array, walls: Array
    ) -> tuple[Array, Array]:
        """The position out of a wall ahead along an axis, and whether there was one.

        The disc is held as the square around it; a step is shorter than its radius.
        """
        ahead = position.at[axis].add(jnp.sign(speed) * _RADIUS)
        side = jnp.zeros(2).at[1 - axis].set(_RADIUS - 1e-5)
        hit = jnp.array(False)
        for corner in (ahead - side, ahead + side):
            hit |= walls[self.cell_of(corner)]
        # cell borders lie at whole numbers from the middle of an even maze
        offset = (self.shape[1], self.shape[0])[axis] % 2 / 2
        border = jnp.where(
            speed > 0,
            jnp.floor(ahead[axis] + offset) - _RADIUS,
            jnp.ceil(ahead[axis] + offset) + _RADIUS,
        )
        cleared = position.at[axis].set(border - offset)
        return jnp.where(hit, cleared, position), hit

    def success(self, state: PointMazeState) -> Array:
        """Whether the disc is within 0.45 of its goal."""
        return jnp.linalg.norm(state.position - state.goal, axis=-1) <= _REACH


def _near(key: Any, centres: np.ndarray) -> Array:
    pick, noise = jax.random.split(key)
    chosen = jnp.asarray(centres, jnp.float32)[
        jax.random.randint(pick, (), 0, len(centres))
    ]
    return chosen + jax.random.uniform(noise, (2,), minval=-_NOISE, maxval=_NOISE)


def _observe(state: PointMazeState) -> Array:
    return jnp.concatenate([state.position, state.velocity, state.goal])
