"""Adapters of physics simulators; each needs its extra.

Compiling a simulator's step takes a minute on a CPU, so give :class:`Vector`
``resets="first"``: a fresh start every step would cost as much as the step.
"""

import dataclasses
import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp

from tmdjax.core.checks import check_choice, check_count
from tmdjax.core.types import Array, Key
from tmdjax.envs.base import Transition


@dataclasses.dataclass(frozen=True)
class Brax:
    """An environment of brax (``pip install 'tmdjax[brax]'``).

    Actions are clipped to +-1. ``done`` terminates, ``horizon`` steps truncate.

    Attributes:
        name: such as 'hopper'.
        backend: 'generalized', 'positional', 'spring' or 'mjx'.
        horizon: steps an episode.
    """

    name: str
    backend: str = "generalized"
    horizon: int = 1000
    action_bound: float = dataclasses.field(default=1.0, init=False)

    def __post_init__(self) -> None:
        check_count("horizon", self.horizon)

    @property
    def simulator(self) -> Any:
        """Brax's own environment."""
        return _brax(self.name, self.backend)

    @property
    def action_size(self) -> int:
        """Of the environment."""
        return int(self.simulator.action_size)

    def reset(self, key: Key[Array, ""], first: bool = False) -> tuple[Any, Any]:
        """Brax's own start; the first time at a random step count."""
        return _start(self.simulator, key, first, self.horizon)

    def step(self, state: Any, action: Array, key: Any) -> Transition:
        """Brax's own step."""
        return _step(self.simulator, state, action, self.horizon)


@dataclasses.dataclass(frozen=True)
class Playground:
    """An environment of MuJoCo Playground (``pip install 'tmdjax[playground]'``).

    Attributes:
        name: such as 'CheetahRun'.
        horizon: steps an episode.
        observation: which entry is observed, where there are several.
        implementation: 'jax' or 'warp'; None is 'warp' where there is a CUDA device,
            else 'jax'.
    """

    name: str
    horizon: int = 1000
    observation: str = "state"
    implementation: str | None = None
    action_bound: float = dataclasses.field(default=1.0, init=False)

    def __post_init__(self) -> None:
        check_count("horizon", self.horizon)
        if self.implementation is not None:
            check_choice("implementation", self.implementation, ("jax", "warp"))

    @property
    def simulator(self) -> Any:
        """Playground's own environment."""
        return _playground(self.name, self.implementation)

    @property
    def action_size(self) -> int:
        """Of the environment."""
        return int(self.simulator.action_size)

    def reset(self, key: Key[Array, ""], first: bool = False) -> tuple[Any, Any]:
        """Its own start; the first time at a random step count."""
        found = _start(self.simulator, key, first, self.horizon)
        return found[0], self._seen(found[1])

    def step(self, state: Any, action: Array, key: Any) -> Transition:
        """Its own step."""
        found = _step(self.simulator, state, action, self.horizon)
        return found._replace(observation=self._seen(found.observation))

    def _seen(self, observation: Any) -> Array:
        if not isinstance(observation, dict):
            return observation
        if self.observation not in observation:
            raise ValueError(
                f"{self.name} observes {', '.join(map(repr, observation))}, not "
                f"observation={self.observation!r}; choose one of them."
            )
        return observation[self.observation]


def _start(simulator: Any, key: Any, first: bool, horizon: int) -> tuple[Any, Any]:
    start, when = jax.random.split(key)
    state = simulator.reset(start)
    steps = jax.random.randint(when, (), 0, horizon if first else 1)
    return (state, steps), state.obs


def _step(simulator: Any, state: Any, action: Array, horizon: int) -> Transition:
    inner, steps = state
    inner = simulator.step(inner, jnp.clip(action, -1, 1))
    steps = steps + 1
    return Transition(
        state=(inner, steps),
        observation=inner.obs,
        reward=inner.reward,
        terminated=inner.done > 0,
        truncated=steps >= horizon,
    )


@functools.lru_cache(maxsize=8)
def _brax(name: str, backend: str) -> Any:
    return _module("brax.envs", "brax").get_environment(name, backend=backend)


@functools.lru_cache(maxsize=8)
def _playground(name: str, implementation: str | None) -> Any:
    registry = _module("mujoco_playground", "playground").registry
    config = registry.get_default_config(name)
    if "impl" in config:
        chosen = "warp" if jax.default_backend() == "gpu" else "jax"
        config.impl = implementation or chosen
    return registry.load(name, config=config)


def _module(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} is not installed: pip install 'tmdjax[{extra}]'."
        ) from error
