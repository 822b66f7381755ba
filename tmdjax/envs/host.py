"""Environments that run on the host: vectors of gymnasium.

They stand where a :class:`tmdjax.envs.Vector` does, but every step calls back into
Python, in order. So they cannot be vmapped or cut over devices, and they cannot be
saved: a run that is continued starts its episodes anew.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from tmdjax.core.checks import check_batch
from tmdjax.core.optional import import_optional
from tmdjax.core.types import Array, Key, SampleKeys
from tmdjax.envs.base import VectorState, VectorStep


class GymnasiumVector:
    """A vector environment of gymnasium (``pip install 'tmdjax[gymnasium]'``).

    A policy's actions in [-1, 1] are mapped onto the bounds of the action space, beyond
    them clipped; a space without bounds takes them as they are. Environments receive
    them in the dtype of the space, never outside it. Float observations
    become float32. Where an action or a step's result is not finite, that instance is
    reset and the step marked (through the option reset_mask of gymnasium).

    Attributes:
        count: how many instances.
        action_size: length of an action, flattened.
        action_bound: 1, or None without bounds.
        observation: shape and dtype of one observation.
        on_host: True.
    """

    on_host = True

    def __init__(self, make: Callable[[], Any]):
        """Builds the instances.

        Args:
            make: gives a gymnasium.vector.VectorEnv with automatic reset SAME_STEP:
                ``functools.partial(gymnasium.make_vec, 'Pendulum-v1', num_envs=8,
                vector_kwargs={'autoreset_mode': gymnasium.vector.AutoresetMode
                .SAME_STEP})``.

        Raises:
            ImportError: gymnasium is not installed.
            TypeError: actions are not continuous, observations not one array.
            ValueError: another autoreset mode; an action space bounded on some sides
                only.
        """
        self._environment = environment = make()
        self._check_mode()
        space = environment.single_observation_space
        kind = getattr(space, "dtype", None)
        if hasattr(space, "spaces"):
            names = space.spaces if isinstance(space.spaces, dict) else ()
            raise TypeError(
                f"observations are {type(space).__name__} with "
                f"{', '.join(map(repr, names)) or 'several parts'}; a policy takes one "
                f"array: wrap each instance to choose or concatenate them, as by "
                f"make_vec(..., wrappers=[gymnasium.wrappers.FlattenObservation])."
            )
        if kind is None or not (
            np.issubdtype(kind, np.floating) or np.dtype(kind) == np.uint8
        ):
            raise TypeError(
                f"observations are {type(space).__name__} of {kind}; give a float "
                f"vector or a uint8 image."
            )
        actions = environment.single_action_space
        if not hasattr(actions, "low") or not np.issubdtype(actions.dtype, np.floating):
            raise TypeError(
                f"actions are {type(actions).__name__}; policies here are continuous "
                f"and need a Box of floats."
            )
        self._low, self._high = (
            np.asarray(x, np.float64).reshape(-1) for x in (actions.low, actions.high)
        )
        self._action_dtype = actions.dtype
        finite = np.isfinite(self._low) & np.isfinite(self._high)
        if finite.any() != finite.all():
            raise ValueError(
                f"the action space is bounded in some dimensions only (low "
                f"{self._low.tolist()}, high {self._high.tolist()}); wrap each "
                f"instance, as by make_vec(..., wrappers=[gymnasium.wrappers."
                f"ClipAction]), which takes any action and clips it."
            )
        self._shape = actions.shape
        self.count = int(environment.num_envs)
        self.action_size = int(np.prod(actions.shape))
        self.action_bound = 1.0 if finite.all() else None
        dtype = np.uint8 if np.dtype(kind) == np.uint8 else np.float32
        self.observation = jax.ShapeDtypeStruct(space.shape, dtype)
        self._steps = -1  # since the reset; what the state says must agree

    def _check_mode(self) -> None:
        vector = import_optional("gymnasium.vector", "GymnasiumVector", "gymnasium")
        mode = self._environment.metadata.get("autoreset_mode")
        if mode != vector.AutoresetMode.SAME_STEP:
            raise ValueError(
                f"the vector environment has autoreset_mode={mode}; it must be "
                f"AutoresetMode.SAME_STEP, so that no step is spent on a reset: "
                f"make_vec(..., vector_kwargs={{'autoreset_mode': "
                f"AutoresetMode.SAME_STEP}})."
            )

    def reset(self, key: Key[Array, ""]) -> VectorState:
        """Starts all instances, seeded by the key."""
        seed = jax.random.randint(key, (), 0, np.iinfo(np.int32).max)
        observation = io_callback(self._reset, self._observations(), seed, ordered=True)
        return VectorState(jnp.zeros((), jnp.int32), observation)

    def step(
        self, before: VectorState, action: Array, keys: SampleKeys
    ) -> tuple[VectorState, VectorStep]:
        """One step of all instances, as :meth:`tmdjax.envs.Vector.step` does it.

        Where the state is not the one the instances are in (a run that was continued),
        all begin anew and the step is marked as broken: nothing of it is learned.
        """
        check_batch("action", action, self.count)
        check_batch("keys", keys, self.count)
        seed = jax.random.randint(keys[0], (), 0, np.iinfo(np.int32).max)
        flags = jax.ShapeDtypeStruct((self.count,), bool)
        reward = jax.ShapeDtypeStruct((self.count,), np.float32)
        seen, final, reward, terminated, truncated, valid = io_callback(
            self._step,
            (self._observations(), self._observations(), reward, flags, flags, flags),
            before.state,
            action,
            before.observation,
            seed,
            ordered=True,
        )
        after = dataclasses.replace(before, state=before.state + 1, observation=seen)
        return after, VectorStep(final, reward, terminated, truncated, valid)

    def _observations(self) -> jax.ShapeDtypeStruct:
        shape = (self.count, *self.observation.shape)
        return jax.ShapeDtypeStruct(shape, self.observation.dtype)

    def _reset(self, seed: Any) -> np.ndarray:
        observation, _ = self._environment.reset(seed=int(seed))
        self._steps = 0
        return np.asarray(observation, self.observation.dtype)

    def _scaled(self, action: np.ndarray) -> np.ndarray:
        """Actions as the space has them, in its dtype and never outside it."""
        if self.action_bound is None:
            widest = np.finfo(self._action_dtype)
            return np.clip(action, widest.min, widest.max).astype(self._action_dtype)
        share = (np.clip(action, -1, 1).astype(np.float64) + 1) / 2
        # a mean of both ends: their difference may be beyond any float
        scaled = self._low * (1 - share) + self._high * share
        return np.clip(scaled, self._low, self._high).astype(self._action_dtype)

    def _step(self, steps: Any, action: Any, before: Any, seed: Any) -> Any:
        before = np.asarray(before)
        action = np.asarray(action).reshape(self.count, -1)
        if int(steps) != self._steps:
            seen = self._reset(seed)
            self._steps = int(steps) + 1
            no, zero = np.zeros(self.count, bool), np.zeros(self.count, np.float32)
            return seen, before, zero, no, ~no, no
        valid = np.isfinite(action).all(1)
        action = np.where(valid[:, None], action, np.float32(0))
        seen, reward, terminated, truncated, info = self._environment.step(
            self._scaled(action).reshape(self.count, *self._shape)
        )
        self._steps += 1
        seen = np.array(seen, self.observation.dtype)
        final = seen.copy()
        for i in np.flatnonzero(terminated | truncated):
            final[i] = info["final_obs"][i]
        reward = np.asarray(reward, np.float32)
        valid &= np.isfinite(final.reshape(self.count, -1)).all(1) & np.isfinite(reward)
        if not valid.all():
            before_reset = seen
            seen, _ = self._environment.reset(options={"reset_mask": ~valid})
            seen = np.array(seen, self.observation.dtype)
            if not np.array_equal(seen[valid], before_reset[valid]):
                valid = np.zeros_like(valid)  # it does not know masks: all began anew
        rows = valid.reshape(-1, *(1,) * (final.ndim - 1))
        return (
            seen,
            np.where(rows, final, before),
            np.where(valid, reward, np.float32(0)),
            terminated & valid,
            (truncated & ~terminated) | ~valid,
            valid,
        )
