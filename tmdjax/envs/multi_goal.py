"""A point that may go to any of six goals: does a policy find all of them?

References:
    The environment released with PolicyFlow, arXiv 2602.01156 (its shipped settings).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tmdjax.core.checks import check_count, check_range
from tmdjax.core.types import Array, Key
from tmdjax.envs.base import Transition


@struct.dataclass
class MultiGoalState:
    """Position and velocity, float32 [2] each, and steps since the start, int32."""

    position: Any
    velocity: Any
    steps: Any


@dataclasses.dataclass(frozen=True)
class MultiGoal:
    """A point mass in a square with goals on a circle, all equally good.

    The position moves by the old velocity; then the velocity by the action, clipped to
    +-5. The observation is (position, velocity), the reward

        r = 0.1 (exp(-0.3 D) + exp(-0.1 D)) - action_cost |a|^2,

    D the squared distance of the new position to the nearest goal and a the action as
    given, not clipped. Leaving the square terminates; after ``horizon`` steps the next
    one truncates.

    Attributes:
        goals: how many, on a circle about 0, the first at angle 0.
        radius: of the circle of goals.
        start: positions begin uniform in +-start, at rest.
        wall: |coordinate| above which the episode ends.
        horizon: the step after so many truncates.
        dt: seconds a step.
        action_cost: what the reward loses for each unit of the squared action.
    """

    goals: int = 6
    radius: float = 5.0
    start: float = 7.0
    wall: float = 8.0
    horizon: int = 50
    dt: float = 0.1
    action_cost: float = 0.001
    action_size: int = dataclasses.field(default=2, init=False)
    action_bound: float = dataclasses.field(default=5.0, init=False)

    def __post_init__(self) -> None:
        check_count("goals", self.goals)
        check_count("horizon", self.horizon)
        for name in ("radius", "start", "wall", "dt"):
            check_range(name, getattr(self, name), 0, open_low=True)
        check_range("action_cost", self.action_cost, 0)

    @property
    def goal_positions(self) -> np.ndarray:
        """float64 [goal, 2]."""
        angle = 2 * np.pi * np.arange(self.goals) / self.goals
        return self.radius * np.stack([np.cos(angle), np.sin(angle)], 1)

    def reset(
        self, key: Key[Array, ""], first: bool = False
    ) -> tuple[MultiGoalState, Array]:
        """Position uniform, velocity 0; the first time also a random step count."""
        where, when = jax.random.split(key)
        position = jax.random.uniform(
            where, (2,), minval=-self.start, maxval=self.start
        )
        steps = jax.random.randint(when, (), 0, self.horizon) if first else 0
        return self.at(position, steps=steps)

    def at(
        self, position: Any, velocity: Any = (0.0, 0.0), steps: Any = 0
    ) -> tuple[MultiGoalState, Array]:
        """The state at a given place, such as the middle for evaluation."""
        state = MultiGoalState(
            position=jnp.asarray(position, jnp.float32),
            velocity=jnp.asarray(velocity, jnp.float32),
            steps=jnp.asarray(steps, jnp.int32),
        )
        return state, jnp.concatenate([state.position, state.velocity])

    def step(self, state: MultiGoalState, action: Array, key: Any) -> Transition:
        """Moves the point, then changes its velocity by the action.

        The same state and action always lead to the same step; key is not used.
        """
        position = state.position + self.dt * state.velocity
        push = jnp.clip(action, -self.action_bound, self.action_bound)
        new, observation = self.at(
            position, state.velocity + self.dt * push, state.steps + 1
        )
        distance = self.distance(position).min()
        near = jnp.exp(-0.3 * distance**2) + jnp.exp(-0.1 * distance**2)
        return Transition(
            state=new,
            observation=observation,
            reward=0.1 * near - self.action_cost * jnp.sum(action**2),
            terminated=jnp.any(jnp.abs(position) > self.wall),
            truncated=new.steps > self.horizon,
        )

    def distance(self, position: Array) -> Array:
        """Distance of positions [..., 2] to every goal, [..., goal]."""
        goals = jnp.asarray(self.goal_positions, position.dtype)
        return jnp.linalg.norm(position[..., None, :] - goals, axis=-1)


def goal_counts(
    environment: MultiGoal, last: Any, inside: Any, reach: float = 2.0
) -> np.ndarray:
    """How many agents ended at which goal.

    Args:
        environment: its goals.
        last: [agent, 2], final positions.
        inside: bool [agent], False for those that left the square on the way.
        reach: distance within which a goal counts as reached.

    Returns:
        int [goal]; agents that reached none are in no count.
    """
    distance = np.asarray(environment.distance(jnp.asarray(last)))
    nearest = distance.argmin(1)
    reached = np.asarray(inside) & (distance.min(1) <= reach)
    return np.bincount(nearest[reached], minlength=environment.goals)


def goal_entropy(counts: Any) -> float:
    """Entropy of the goals reached over its largest value, log(goals); 0 if none."""
    counts = np.asarray(counts, np.float64)
    if counts.sum() == 0:
        return 0.0
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum() / np.log(len(counts)))
