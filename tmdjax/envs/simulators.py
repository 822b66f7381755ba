"""Adapters of physics simulators; each needs its extra.

Compiling a simulator's step takes a minute on a CPU, so give :class:`Vector`
``resets="first"``: a fresh start every step would cost as much as the step.
"""

import abc
import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tmdjax.core.checks import check_choice, check_count
from tmdjax.core.optional import import_optional
from tmdjax.core.types import Array, Key
from tmdjax.envs.base import Transition


class _Simulated(abc.ABC):
    """What the adapters share: clipped actions, and a limit of steps an episode.

    The state is that of the simulator and the steps so far.
    """

    name: str
    horizon: int
    action_bound: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        check_count("horizon", self.horizon)

    @property
    @abc.abstractmethod
    def simulator(self) -> Any:
        """The simulator's own environment."""

    @property
    def action_size(self) -> int:
        """Length of an action."""
        return int(self.simulator.action_size)

    def reset(self, key: Key[Array, ""], first: bool = False) -> tuple[Any, Any]:
        """The simulator's own start; the first time at a random step count."""
        start, when = jax.random.split(key)
        state = self.simulator.reset(start)
        steps = jax.random.randint(when, (), 0, self.horizon if first else 1)
        return (state, steps), self._seen(state.obs)

    def step(self, state: Any, action: Array, key: Any) -> Transition:
        """The simulator's own step; its ``done`` terminates, ``horizon`` truncates."""
        inner, steps = state
        inner = self.simulator.step(inner, jnp.clip(action, -1, 1))
        steps = steps + 1
        return Transition(
            state=(inner, steps),
            observation=self._seen(inner.obs),
            reward=inner.reward,
            terminated=inner.done > 0,
            truncated=steps >= self.horizon,
        )

    def _seen(self, observation: Any) -> Any:
        return observation


@dataclasses.dataclass(frozen=True)
class Brax(_Simulated):
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

    @property
    def simulator(self) -> Any:
        """Brax's own environment."""
        return _brax(self.name, self.backend)


@dataclasses.dataclass(frozen=True)
class Playground(_Simulated):
    """An environment of MuJoCo Playground (``pip install 'tmdjax[playground]'``).

    Actions are clipped to +-1. ``done`` terminates, ``horizon`` steps truncate.

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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.implementation is not None:
            check_choice("implementation", self.implementation, ("jax", "warp"))

    @property
    def simulator(self) -> Any:
        """Playground's own environment."""
        return _playground(self.name, self.implementation)

    def _seen(self, observation: Any) -> Any:
        if not isinstance(observation, dict):
            return observation
        if self.observation not in observation:
            raise ValueError(
                f"{self.name} observes {', '.join(map(repr, observation))}, not "
                f"observation={self.observation!r}; choose one of them."
            )
        return observation[self.observation]


@functools.lru_cache(maxsize=8)
def _brax(name: str, backend: str) -> Any:
    module = import_optional("brax.envs", "envs.Brax", "brax")
    return module.get_environment(name, backend=backend)


@functools.lru_cache(maxsize=8)
def _playground(name: str, implementation: str | None) -> Any:
    module = import_optional("mujoco_playground", "envs.Playground", "playground")
    registry = module.registry
    config = registry.get_default_config(name)
    if "impl" in config:
        chosen = "warp" if jax.default_backend() == "gpu" else "jax"
        config.impl = implementation or chosen
    return registry.load(name, config=config)
