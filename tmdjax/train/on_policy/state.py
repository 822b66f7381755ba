"""What an iteration changes, and what all parts of it share."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from tmdjax import envs, models, rl
from tmdjax.core import prng, trees
from tmdjax.core.checks import check_choice, first_few
from tmdjax.core.types import Array, Params
from tmdjax.train.on_policy.settings import (
    ControlMethod,
    ControlSettings,
    PartlyFrozen,
)
from tmdjax.train.state import LearnerCounts, TrainState, create_state


@struct.dataclass
class OnPolicyState(LearnerCounts):
    """Everything an iteration changes.

    Attributes:
        iteration: how many were done, int32 (environment steps overflow int32; count
            them on the host).
        learner: parameters {'policy', 'critic'} and optimiser state.
        learning_rate: float32.
        coefficients: of the method, and 'discount', 'gae_lambda' and, if the critic has
            one of its own, 'critic_learning_rate'; float32 each.
        statistics: of observations, or None for images.
        vector: the environments.
        running_return: float32 [env], of the episodes under way.
        episode_return: mean of the last episodes that ended; NaN before any did.
        reward_scale: sums of rewards so far; None unless rewards are scaled by them.
    """

    iteration: Any
    learner: TrainState
    learning_rate: Any
    coefficients: Any
    statistics: Any
    vector: envs.VectorState
    running_return: Any
    episode_return: Any
    reward_scale: Any = None

    @property
    def numbers(self) -> dict[str, Any]:
        """The coefficients and 'iteration', as a method acts and learns by them."""
        return {**self.coefficients, "iteration": self.iteration}


class Parts(NamedTuple):
    """Environments, networks and rules of a training run.

    Attributes:
        vector: the environments.
        acting: how the policy acts.
        method: the same under the recipe that it is trained under: how it learns.
        settings: everything else.
        critic: the network of the value.
        rule: the optimiser, whose learning rate stands in its state.
    """

    vector: envs.Vector | envs.GymnasiumVector
    acting: ControlMethod
    method: ControlMethod
    settings: ControlSettings
    critic: models.ControlMLP
    rule: optax.GradientTransformation

    @property
    def steps(self) -> int:
        """Transitions an iteration."""
        return self.vector.count * self.settings.unroll

    @property
    def is_image(self) -> bool:
        """Whether observations are pixels."""
        return self.vector.observation.dtype == jnp.uint8

    def prepare(self, statistics: Any, observation: Array) -> Array:
        """Observations as the networks see them."""
        if statistics is None or self.settings.normaliser is None:
            return observation
        return statistics.normalise(observation)

    def value(self, params: Params, observation: Array) -> Array:
        """Values of observations, float32 [batch]."""
        return models.functional(self.critic)(params, observation)[:, 0]

    def values(self, params: Params, observation: Array) -> Array:
        """Values of observations [time, env, ...], float32 [time, env].

        Images are looked at one time step after the other, to bound memory.
        """
        if self.is_image:
            return jax.lax.map(lambda seen: self.value(params, seen), observation)
        flat = observation.reshape(-1, *observation.shape[2:])
        return self.value(params, flat).reshape(observation.shape[:2])


def start(
    parts: Parts,
    key: Any,
    *,
    policy: Mapping[str, Any] | None = None,
    statistics: rl.RunningStatistics | None = None,
    **changes: Any,
) -> OnPolicyState:
    """The state before the first iteration.

    Args:
        parts: environments, networks and rules.
        key: typed key of the run.
        policy: entries of the policy's parameters, such as 'network' of a pretrained
            one, in place of those that the method makes.
        statistics: of observations, to begin with.
        **changes: coefficients, and the learning rates, in place of the configured
            ones.

    Raises:
        ValueError: a coefficient that is unknown or out of range; parameters or
            statistics that do not fit the method's, parameters without an entry that no
            update changes, or statistics where observations are not normalised.
    """
    prng.check_key(key)
    settings, method, vector = parts.settings, parts.method, parts.vector
    owners = dict.fromkeys(method.coefficients, method)
    owners |= dict.fromkeys(("discount", "gae_lambda", "learning_rate"), settings)
    if settings.critic_learning_rate is not None:
        owners["critic_learning_rate"] = settings
    for name in changes:
        check_choice("coefficient", name, owners)
    for owner in (method, settings):  # which checks its own fields, together
        known = {
            name: float(value)
            for name, value in changes.items()
            if owners[name] is owner and not isinstance(value, jax.core.Tracer)
        }
        if known and dataclasses.is_dataclass(owner):
            dataclasses.replace(owner, **known)
    numbers = {
        name: jnp.asarray(changes.get(name, getattr(owner, name)), jnp.float32)
        for name, owner in owners.items()
    }
    # apart from the keys of the iterations, which fold their number in
    policy_key, critic_key, reset_key = jax.random.split(
        jax.random.fold_in(key, np.uint32(2**32 - 1)), 3
    )
    seen = vector.observation
    one = jax.ShapeDtypeStruct((1, *seen.shape), seen.dtype)
    params = {
        "policy": method.init(policy_key, one, vector.action_size),
        "critic": models.init_params(parts.critic, critic_key, one),
    }
    if policy is not None:
        frozen = method.frozen if isinstance(method, PartlyFrozen) else ()
        params["policy"] = _with_entries(params["policy"], policy, frozen)
    fresh = None if parts.is_image else rl.RunningStatistics.start(seen.shape)
    if statistics is not None:
        if fresh is None or settings.normaliser is None:
            raise ValueError(
                f"statistics are given, but observations of {seen.dtype} under "
                f"normalise={settings.normalise!r} are not normalised; leave them out, "
                f"or use 'fixed' or 'running'."
            )
        _check_alike("statistics", statistics, fresh)
    state = OnPolicyState(
        iteration=jnp.zeros((), jnp.int32),
        learner=create_state(params, parts.rule),
        learning_rate=numbers.pop("learning_rate"),
        coefficients=numbers,
        statistics=fresh if statistics is None else statistics,
        vector=vector.reset(reset_key),
        running_return=jnp.zeros(vector.count),
        episode_return=jnp.full((), jnp.nan),
        reward_scale=(
            rl.RewardScale.start(vector.count) if settings.scale_rewards else None
        ),
    )
    # weak types would become strong in the first iteration, and compile it twice; one
    # buffer in two places could not be donated
    return jax.tree.map(lambda x: jnp.array(x, x.dtype, copy=True), state)


def _with_entries(
    drawn: Params, given: Mapping[str, Any], frozen: Sequence[str]
) -> Params:
    """A policy's parameters with some entries given, the frozen ones among them."""
    lacking = first_few(repr(n) for n in frozen if n in drawn and n not in given)
    if lacking:
        raise ValueError(
            f"policy gives {first_few(map(repr, given))} and not {lacking}, which no "
            f"update changes: it would stay as it was drawn. Give it too, as "
            f"method.pretrained(network) does."
        )
    for name, entry in given.items():
        check_choice("entry of the given policy", name, drawn)
        _check_alike(f"policy[{name!r}]", entry, drawn[name])
    return {**drawn, **given}


def _check_alike(what: str, given: Any, own: Any) -> None:
    """Raises ValueError unless two trees have one structure and the same shapes."""
    shapes, owned = (
        {name: tuple(jnp.shape(leaf)) for name, leaf in trees.flatten(tree).items()}
        for tree in (given, own)
    )
    different = [
        f"{name} is {shapes.get(name, 'absent')}, not {owned.get(name, 'absent')}"
        for name in sorted({*shapes, *owned})
        if shapes.get(name) != owned.get(name)
    ]
    if different:
        raise ValueError(
            f"{what} does not fit this run: {first_few(different)}. It comes from "
            f"another method, environment or chunk; give the settings it was made with."
        )
