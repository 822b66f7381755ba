"""What policies share that draw an action in several noisy steps."""

import abc
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax.core import prng
from tmdjax.core.checks import check_batch, check_count, check_range, first_few
from tmdjax.core.types import ApplyFn, Array, Params
from tmdjax.flows import initial_noise
from tmdjax.models.build import functional, init_params
from tmdjax.models.control import ControlVelocity


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainPolicy(abc.ABC):
    """A policy whose action is the end of a chain of noisy steps: network and clips.

    Attributes:
        hidden: widths of the network, a :class:`tmdjax.models.ControlVelocity` that is
            residual.
        activation: of the network: 'mish', 'silu', 'elu', 'relu' or 'tanh'.
        recipe: GEMM recipe of the network, or the name of one.
        frequencies: lowest and highest angular frequency of the sinusoids that stand
            for the time, in radians per unit of it, and how many.
        time_hidden: width of the first of two layers that the sinusoids pass.
        steps: K, steps of a chain.
        clip_noise: the noise of a step stays within so many standard deviations; None
            does not clip.
        clip_last: the end of a chain stays within +-clip_last; None does not clip.
        bound: what the end of a chain is multiplied by to give an action.
        clip_range: of the ratio that it is trained with, in (0, 1).
        log_prob_range: log-probs are clipped to it, and have no gradient outside.
    """

    hidden: tuple[int, ...] = (512, 512, 512)
    activation: str = "relu"
    recipe: Any = "fp32"
    frequencies: tuple[float, float, int] = (1e-4, 1.0, 8)
    time_hidden: int = 32
    steps: int = 4
    clip_noise: float | None = 3.0
    clip_last: float | None = 1.0
    bound: float = 1.0
    clip_range: float = 0.01
    log_prob_range: tuple[float, float] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        for name in ("clip_noise", "clip_last", "bound"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 0, open_low=True)
        check_range("clip_range", self.clip_range, 0, 1, open_low=True, open_high=True)
        low, high = self.log_prob_range
        check_range("log_prob_range, upper", high, low, open_low=True)
        self.module(1)  # refuses widths and activations

    @property
    def frozen(self) -> tuple[str, ...]:
        """Entries of the parameters that are copies of 'network' and not trained."""
        return ()

    @property
    def step_size(self) -> float | None:
        """The length of a step, for a network that takes it; None for others."""
        return None

    def module(self, size: int) -> ControlVelocity:
        """The network of actions of a size."""
        return ControlVelocity(
            size,
            self.hidden,
            self.activation,
            self.frequencies,
            recipe=self.recipe,
            residual=True,
            time_hidden=self.time_hidden,
            step_size=self.step_size is not None,
        )

    def init_network(self, key: Any, observation: Any, action_size: int) -> Params:
        """Parameters of the network, from one observation's shape and dtype."""
        point = jax.ShapeDtypeStruct((1, action_size), jnp.float32)
        time = jax.ShapeDtypeStruct((1,), jnp.float32)
        given = point, time, observation, self.step_size
        return init_params(self.module(action_size), key, *given)

    def function(self, network: Params) -> ApplyFn:
        """``apply_fn(network, x, t, observation)`` for these parameters."""
        return functional(self.module(action_size_of(network)))

    def start(self, params: Params, keys: Any) -> Array:
        """Where chains begin: normal noise [batch, action_size], one key a sample.

        Raises:
            TypeError: keys that are not typed.
        """
        prng.check_key(keys, "keys")
        return initial_noise(keys, (action_size_of(params["network"]),))

    def seen(self, network: Params, observation: Array) -> tuple[Array, Array]:
        """What an observation adds to the first layer, and its features, [batch, n].

        Raises:
            ValueError: observations of another size than the network was made for.
        """
        fn = self.function(network)
        features = fn(network, observation, method="features")
        size = network["from_observation"]["kernel"].shape[0]
        if features.shape[-1] != size:
            raise ValueError(
                f"observations have shape {observation.shape}, {features.shape[-1]} "
                f"numbers each; this policy was made for {size}."
            )
        return fn(network, observation, method="embed"), features

    def check_given(self, network: Params, observation: Array, actions: Array) -> None:
        """Raises ValueError for sizes that this policy was not made for.

        Args:
            network: its parameters.
            observation: [batch, ...].
            actions: [batch, ..., action_size].
        """
        jax.eval_shape(self.seen, network, observation)
        check_batch("actions", actions, observation.shape[0])
        if actions.shape[-1] != action_size_of(network):
            raise ValueError(
                f"actions have shape {actions.shape}, {actions.shape[-1]} numbers "
                f"each; this policy was made for {action_size_of(network)} (a chunk of "
                f"actions counts as one)."
            )

    def pretrained(
        self, network: Params, meta: Mapping[str, Any] | None = None, **facts: Any
    ) -> dict[str, Any]:
        """The entries of the parameters to begin with: what was cloned, and copies.

        Args:
            network: parameters of a cloned network; or all that a run exported of a
                policy that was partly frozen (DPPO's 'network' and 'base').
            meta: of the run that left it, from ``tmdjax.load``; None does not compare.
            **facts: of meta, which must have these values: ``chunk=4``, or 'mean' and
                'variance' of the observations' statistics.

        Raises:
            ValueError: the run's policy is of another network, walked otherwise, or has
                another of the facts; names what differs.
        """
        entries = {"network": network, **dict.fromkeys(self.frozen, network)}
        if "network" in network:
            entries = dict(network)
        if meta is not None:
            self._check_origin(entries, meta, facts)
        return entries

    def cloning_loss(
        self, params: Params, observation: Array, action: Array, keys: Any
    ) -> Array:
        """Loss of demonstrated actions, of 'network' alone, [batch].

        Args:
            params: of the policy.
            observation: [batch, ...], as the policy sees it.
            action: [batch, action_size] within +-bound.
            keys: [batch], typed.

        Raises:
            ValueError: sizes that the policy was not made for.
        """
        self.check_given(params["network"], observation, action)
        given = params["network"], observation, action / self.bound, keys
        return self.generative_loss(*given)

    def evaluate(
        self, params: Params, observation: Array, keys: Any, x_0: Any = None
    ) -> Array:
        """Actions [batch, action_size] as deployed, within clip_last times bound.

        Args:
            params: 'network', and the entries that :attr:`frozen` names; others, such
                as a network of the noise of training, are not asked for.
            observation: [batch, ...], as the policy sees it.
            keys: [batch], typed; None where x_0 is given and the walk has no noise.
            x_0: start at t = 1, [batch, action_size]; None draws standard normal noise.

        Raises:
            ValueError: sizes that the policy was not made for.
        """
        x_0 = self.start(params, keys) if x_0 is None else x_0
        self.check_given(params["network"], observation, x_0)
        return self.bound * self.deployed_end(params, observation, keys, x_0)

    @abc.abstractmethod
    def generative_loss(
        self, network: Params, observation: Array, x_data: Array, keys: Any
    ) -> Array:
        """Loss [batch] of the generative model at ends of chains x_data."""

    @abc.abstractmethod
    def deployed_end(
        self, params: Params, observation: Array, keys: Any, x_0: Array
    ) -> Array:
        """The end [batch, action_size] of a chain from x_0, as deployed."""

    @abc.abstractmethod
    def exported(self, params: Params) -> tuple[dict[str, Any], Params, dict[str, Any]]:
        """What a run leaves of a policy: the spec of a network, parameters, facts."""

    def _check_origin(
        self, params: Params, meta: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> None:
        """Raises ValueError unless a run left a policy that is walked as this one."""
        spec, _, walk = self.exported(params)
        own = _without_recipes({**spec, **walk, **facts})
        told = _without_recipes({**meta["spec"], **meta})
        different = [
            f"{name}={told.get(name)!r}, here {value!r}"
            for name, value in own.items()
            if told.get(name) != value
        ]
        if different:
            raise ValueError(
                f"the pretrained policy has {first_few(different)}; give this one the "
                f"same settings, or take its network without 'meta'."
            )


def _without_recipes(facts: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has them, arrays as lists, without the recipes of computation."""
    text = json.dumps(facts, default=lambda array: np.asarray(array).tolist())
    kept = lambda pairs: {k: v for k, v in pairs if k != "recipe"}  # noqa: E731
    return json.loads(text, object_pairs_hook=kept)


def action_size_of(network: Params) -> int:
    """The size of an action, from a network's parameters."""
    return network["out"]["bias"].shape[0]
