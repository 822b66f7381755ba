"""Tiny environments whose optimum is known: each one tests one thing a learner needs.

``optimum`` is the mean reward a step of the best policy.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from tmdjax.core.checks import check_count
from tmdjax.core.types import Array, Key
from tmdjax.envs.base import Transition


@struct.dataclass
class ProbeState:
    """What was drawn or done, float32, and steps so far, int32."""

    memory: Any
    steps: Any


def _at(memory: Any, steps: Any = 0) -> ProbeState:
    return ProbeState(jnp.asarray(memory, jnp.float32), jnp.asarray(steps, jnp.int32))


class _Probe:
    """One number seen, one number done; the observation is 0 where nothing is seen."""

    action_size: ClassVar[int] = 1
    action_bound: ClassVar[None] = None
    optimum: ClassVar[float] = 0.0

    def reset(
        self, key: Key[Array, ""], first: bool = False
    ) -> tuple[ProbeState, Array]:
        """Observation 0, step 0."""
        return _at(jnp.zeros(1)), jnp.zeros(1)


def _last(state: ProbeState, seen: Array, reward: Array) -> Transition:
    """The end of an episode of one step."""
    return Transition(state, seen, reward, jnp.array(True), jnp.array(False))


@dataclasses.dataclass(frozen=True)
class Target(_Probe):
    """One step, nothing to see: reward -(a - target)^2. The policy's gradient."""

    target: float = 0.7

    def step(self, state: ProbeState, action: Array, key: Any) -> Transition:
        """Ends at once."""
        return _last(state, jnp.zeros(1), -jnp.sum((action - self.target) ** 2))


@dataclasses.dataclass(frozen=True)
class Follow(_Probe):
    """One step, the answer depends on what is seen: reward -(a - s / 2)^2."""

    def reset(
        self, key: Key[Array, ""], first: bool = False
    ) -> tuple[ProbeState, Array]:
        """Observation uniform in +-2."""
        seen = jax.random.uniform(key, (1,), minval=-2.0, maxval=2.0)
        return _at(seen), seen

    def step(self, state: ProbeState, action: Array, key: Any) -> Transition:
        """Ends at once."""
        reward = -jnp.sum((action - state.memory / 2) ** 2)
        return _last(state, state.memory, reward)


@dataclasses.dataclass(frozen=True)
class Delayed(_Probe):
    """The first action is paid for at the last step: credit over time.

    Steps are numbered in the observation; the reward of the last of ``horizon`` steps
    is -(a_first - 0.7)^2 and that of all others 0. The first action is not seen later,
    so only returns carry it.
    """

    horizon: int = 3

    def __post_init__(self) -> None:
        check_count("horizon", self.horizon, 2)

    def step(self, state: ProbeState, action: Array, key: Any) -> Transition:
        """Remembers the first action."""
        memory = jnp.where(state.steps == 0, action, state.memory)
        state = _at(memory, state.steps + 1)
        last = state.steps >= self.horizon
        reward = jnp.where(last, -jnp.sum((memory - 0.7) ** 2), 0.0)
        seen = state.steps.astype(jnp.float32)[None] / self.horizon
        return Transition(state, seen, reward, last, jnp.array(False))


@dataclasses.dataclass(frozen=True)
class Endless(_Probe):
    """Reward 1 - (a - 0.7)^2 for ever, cut after ``horizon`` steps.

    The value of the best policy is 1 / (1 - discount) at every step, the last one
    included: a learner that takes the cut for an end learns less.
    """

    horizon: int = 10
    optimum: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        check_count("horizon", self.horizon)

    def reset(
        self, key: Key[Array, ""], first: bool = False
    ) -> tuple[ProbeState, Array]:
        """Observation 0; the first time at a random step."""
        steps = jax.random.randint(key, (), 0, self.horizon if first else 1)
        return _at(0, steps), jnp.zeros(1)

    def step(self, state: ProbeState, action: Array, key: Any) -> Transition:
        """Never terminates."""
        state = _at(0, state.steps + 1)
        reward = 1 - jnp.sum((action - 0.7) ** 2)
        cut = state.steps >= self.horizon
        return Transition(state, jnp.zeros(1), reward, jnp.array(False), cut)


@dataclasses.dataclass(frozen=True)
class TwoPeaks(_Probe):
    """One step, two equally good answers: reward exp(-(|a| - 1)^2 / 0.08).

    A Gaussian policy must choose a side; a flow policy need not.
    """

    optimum: ClassVar[float] = 1.0

    def step(self, state: ProbeState, action: Array, key: Any) -> Transition:
        """Ends at once."""
        reward = jnp.exp(-jnp.sum((jnp.abs(action) - 1) ** 2) / 0.08)
        return _last(state, jnp.zeros(1), reward)


PROBES = {
    "target": Target(),
    "follow": Follow(),
    "delayed": Delayed(),
    "endless": Endless(),
    "two_peaks": TwoPeaks(),
}
"""All five, by name."""
