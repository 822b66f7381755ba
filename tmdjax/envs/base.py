"""What an environment is, and many of them at once.

An environment is a frozen dataclass with two pure functions of one instance; a batch
of them is made by :class:`Vector`, which also starts finished episodes anew and keeps
what really was the last observation.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tmdjax.core import prng
from tmdjax.core.checks import check_batch, check_choice, check_count
from tmdjax.core.types import Array, Key, PyTree, SampleKeys

RESETS = ("fresh", "first")


class Transition(NamedTuple):
    """One step of one environment.

    Attributes:
        state: pytree of arrays.
        observation: of the new state: float32 [feature], or uint8
            [height, width, channel].
        reward: float32 scalar.
        terminated: bool; the episode ended, nothing follows.
        truncated: bool; it was cut (a time limit), something would have followed.
    """

    state: PyTree
    observation: Array
    reward: Array
    terminated: Array
    truncated: Array


@runtime_checkable
class Environment(Protocol):
    """One instance of an environment; everything may be jitted and vmapped."""

    @property
    def action_size(self) -> int:
        """Length of an action."""
        ...

    @property
    def action_bound(self) -> float | None:
        """Actions beyond +-bound are clipped by the environment; None takes all."""
        ...

    def reset(self, key: Key[Array, ""], first: bool = False) -> tuple[PyTree, Array]:
        """State and observation of a new episode.

        Args:
            key: typed key.
            first: True at the start of a run, where an environment may begin inside an
                episode, so that not all of them end at once.
        """
        ...

    def step(self, state: PyTree, action: Array, key: Key[Array, ""]) -> Transition:
        """One step; no reset. Action is float32 [action_size], of any size."""
        ...


@struct.dataclass
class VectorState:
    """Many environments between two steps.

    Attributes:
        state: of the environments, [env, ...].
        observation: what the policy sees next, [env, ...].
        first: where every environment returns to, (state, observation), if it resets
            to its first state; None otherwise.
    """

    state: Any
    observation: Any
    first: Any = None


class VectorStep(NamedTuple):
    """What a step of many environments leaves for learning.

    Attributes:
        final_observation: [env, ...], of the step itself: where an episode ended it is
            its last one, not the first of the next episode.
        reward: float32 [env].
        terminated: bool [env].
        truncated: bool [env].
        valid: bool [env]; False where the step gave a value that was not finite. There
            reward is 0, final_observation the one before the step, truncated True;
            nothing of it may enter an update.
    """

    final_observation: Any
    reward: Any
    terminated: Any
    truncated: Any
    valid: Any


@dataclasses.dataclass(frozen=True)
class Vector:
    """Many instances of one environment, with automatic reset.

    Attributes:
        environment: any that keeps the protocol :class:`Environment`.
        count: how many instances.
        resets: 'fresh' draws a new start for every episode; 'first' returns each
            instance to where it began (for simulators whose reset is dear).
    """

    environment: Any
    count: int
    resets: str = "fresh"

    def __post_init__(self) -> None:
        check_count("count", self.count)
        check_choice("resets", self.resets, RESETS)
        check_environment(self.environment)

    on_host: ClassVar[bool] = False

    @property
    def action_size(self) -> int:
        """Length of one instance's action."""
        return self.environment.action_size

    @property
    def action_bound(self) -> float | None:
        """Bound of one instance's action, None if it has none."""
        return self.environment.action_bound

    @property
    def observation(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of one observation."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        seen = jax.eval_shape(self.environment.reset, key)[1]
        return jax.ShapeDtypeStruct(seen.shape, seen.dtype)

    def reset(self, key: Key[Array, ""]) -> VectorState:
        """Starts all instances; number i draws from ``sample_keys(key, count)[i]``."""
        keys = prng.sample_keys(key, self.count)
        start = jax.vmap(lambda k: self.environment.reset(k, first=True))(keys)
        keep = None
        if self.resets == "first":  # the same places, at the beginning of an episode
            keep = jax.vmap(self.environment.reset)(keys)
        return VectorState(state=start[0], observation=start[1], first=keep)

    def step(
        self, before: VectorState, action: Array, keys: SampleKeys
    ) -> tuple[VectorState, VectorStep]:
        """One step of all instances; those that ended, or broke, begin anew.

        Args:
            before: from :meth:`reset` or this method.
            action: float32 [env, action_size].
            keys: [env].

        Returns:
            The state after it, and what happened.

        Raises:
            ValueError: another number of actions or keys than environments.
        """
        check_batch("action", action, self.count)
        check_batch("keys", keys, self.count)
        keys = prng.split(keys)
        after = jax.vmap(self.environment.step)(before.state, action, keys[:, 0])
        finite = [jnp.isfinite(after.reward)]
        for leaf in jax.tree.leaves((after.state, after.observation)):
            if jnp.issubdtype(leaf.dtype, jnp.inexact):
                finite.append(jnp.isfinite(leaf.reshape(self.count, -1)).all(1))
        valid = jnp.stack(finite).all(0)
        step = VectorStep(
            final_observation=_where(valid, after.observation, before.observation),
            reward=jnp.where(valid, after.reward, 0).astype(jnp.float32),
            terminated=after.terminated & valid,
            truncated=(after.truncated & ~after.terminated) | ~valid,
            valid=valid,
        )
        start = before.first
        if start is None:
            start = jax.vmap(self.environment.reset)(keys[:, 1])
        ended = step.terminated | step.truncated
        state, observation = _where(ended, start, (after.state, after.observation))
        after = dataclasses.replace(before, state=state, observation=observation)
        return after, step


def _where(which: Array, a: PyTree, b: PyTree) -> PyTree:
    """Rows of ``a`` where ``which`` [env] is True, else of ``b``."""

    def choose(x: Array, y: Array) -> Array:
        return jnp.where(which.reshape(which.shape + (1,) * (x.ndim - 1)), x, y)

    return jax.tree.map(choose, a, b)


def check_environment(environment: Any) -> None:
    """Refuses what is no environment, and observations that no network takes.

    Nothing is computed: the functions are traced.

    Raises:
        TypeError: a method is missing, an observation is not one array, or its dtype
            is neither float32 nor uint8.
    """
    if not isinstance(environment, Environment):
        raise TypeError(
            f"{type(environment).__name__} is no environment: it needs action_size, "
            f"action_bound, reset(key, first) and step(state, action, key); see "
            f"tmdjax.envs.Environment. Simulators have adapters in tmdjax.envs."
        )
    check_count("action_size", environment.action_size)
    key = jax.eval_shape(lambda: jax.random.key(0))
    _, observation = jax.eval_shape(environment.reset, key)
    if isinstance(observation, dict):
        raise TypeError(
            f"the observation is a dict with {', '.join(map(repr, observation))}; a "
            f"policy takes one array: choose an entry, or concatenate them."
        )
    dtype = getattr(observation, "dtype", None)
    if dtype not in (np.float32, np.uint8):
        raise TypeError(
            f"the observation is {dtype or type(observation).__name__}; give a float32 "
            f"vector or a uint8 image."
        )
