"""Advantages over time, and the loss of transitions that have theirs.

Advantages are computed once an iteration (:class:`Once`), or afresh in every minibatch
from the critic as it is by then (:class:`PerMinibatch`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tmdjax import rl
from tmdjax.core import prng
from tmdjax.core.types import Array, Params
from tmdjax.train.on_policy.rollout import Rollout
from tmdjax.train.on_policy.settings import ControlSettings, Samples
from tmdjax.train.on_policy.state import OnPolicyState, Parts

Loss = Callable[[Params, Any, Any], tuple[Array, dict[str, Array]]]


class Targets(NamedTuple):
    """Transitions as a loss takes them, [batch] each.

    Attributes:
        samples: what :meth:`ControlMethod.loss` sees.
        value: of the critic before the update.
        returns: what the value is regressed to.
        weight: float32, 0 where a step was not valid.
    """

    samples: Samples
    value: Array
    returns: Array
    weight: Array


class Unroll(NamedTuple):
    """Transitions [time, env, ...] and the values around them.

    Attributes:
        observation: as the policy saw it.
        record: what :meth:`ControlMethod.act` left.
        step: what the environments answered, without final observations.
        value: of the observations.
        next_value: of what followed each.
        last: the observation that followed the last step, [env, ...].
    """

    observation: Any
    record: Any
    step: Any
    value: Array
    next_value: Array
    last: Any

    def transposed(self) -> "Unroll":
        """Environments before times, or back; 'last' has no time."""
        swapped = jax.tree.map(lambda x: x.swapaxes(0, 1), self._replace(last=None))
        return swapped._replace(last=self.last)


def unroll_of(
    parts: Parts, state: OnPolicyState, rollout: Rollout, statistics: Any
) -> Unroll:
    """A rollout with the values of the critic as it stands.

    Args:
        parts: environments, networks and rules.
        state: before the update.
        rollout: collected with this state.
        statistics: that observations are normalised by.
    """
    step = rollout.step
    final = step.final_observation
    if parts.settings.truncation == "legacy":
        # what the policy saw next, resets and all
        now = rollout.vector.observation[None]
        final = jnp.concatenate([rollout.observation[1:], now])
    seen, final = (parts.prepare(statistics, x) for x in (rollout.observation, final))
    critic = state.learner.params["critic"]
    return Unroll(
        seen,
        rollout.record,
        step._replace(final_observation=None),
        parts.values(critic, seen),
        parts.values(critic, final),
        final[-1],
    )


def targets(unroll: Unroll, settings: ControlSettings, coefficients: Any) -> Targets:
    """Advantages and returns of transitions, as [time * env]."""
    step, value, next_value = unroll.step, unroll.value, unroll.next_value
    truncated = step.truncated
    if settings.truncation == "current":
        next_value = jnp.where(step.truncated, value, next_value)
    elif settings.truncation == "legacy":
        truncated = jnp.zeros_like(truncated)
    advantage, returns = rl.generalised_advantages(
        settings.reward_scale * step.reward,
        value,
        next_value,
        step.terminated,
        truncated,
        discount=coefficients["discount"],
        gae_lambda=coefficients["gae_lambda"],
        valid=step.valid,
    )
    if settings.advantages == "batch":
        advantage = rl.standardise(advantage, step.valid)
    samples = Samples(unroll.observation, unroll.record, advantage)
    return jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]),
        Targets(samples, value, returns, step.valid.astype(jnp.float32)),
    )


def _standardised(given: Targets) -> Targets:
    advantage = rl.standardise(given.samples.advantage, given.weight > 0)
    return given._replace(samples=given.samples._replace(advantage=advantage))


def _value_error(
    value: Array, old: Array, returns: Array, settings: ControlSettings
) -> Array:
    error = (value - returns) ** 2
    if settings.value_clip is None:
        return error
    near = old + jnp.clip(value - old, -settings.value_clip, settings.value_clip)
    clipped = (near - returns) ** 2
    if settings.value_clip_kind == "released":
        return clipped
    return jnp.maximum(error, clipped)


def _loss(
    parts: Parts,
    behaviour: Params,
    coefficients: Mapping[str, Any],
    params: Params,
    value: Array,
    given: Targets,
    keys: Any,
) -> tuple[Array, dict[str, Array]]:
    """Weighted loss and metrics of policy and value, [batch]."""
    settings, method = parts.settings, parts.method
    loss, metrics = method.loss(
        params["policy"], behaviour["policy"], given.samples, keys, coefficients
    )
    if settings.target_kl is not None and "kl" not in metrics:
        raise ValueError(
            f"target_kl={settings.target_kl} adapts the learning rate to the KL, which "
            f"{type(method).__name__} does not report; use target_kl=None."
        )
    error = _value_error(value, given.value, given.returns, settings)
    metrics = {"policy_loss": loss, "value_error": error, **metrics}
    live, weight = given.weight > 0, given.weight
    # where, not a product: what is not finite there must not pass
    metrics = {
        k: jnp.where(live, v, 0) * (1 if k == "ratio_error" else weight)
        for k, v in metrics.items()
    }
    loss = loss + settings.value_coefficient * error
    return jnp.where(live, loss, 0) * weight, metrics


@dataclasses.dataclass(frozen=True)
class Once:
    """Advantages of an iteration, before its update; minibatches of transitions.

    Attributes:
        parts: environments, networks and rules.
    """

    parts: Parts

    @property
    def rows(self) -> int:
        """How many transitions are shuffled into minibatches."""
        return self.parts.steps

    def data(self, unroll: Unroll, given: Targets) -> Any:
        """The transitions to shuffle, [time * env, ...]."""
        del unroll
        return given

    def batch(self, data: Any, rows: Array, scale: Array) -> Any:
        """A minibatch; scale makes a plain mean that over valid steps."""
        given = jax.tree.map(lambda x: x[rows], data)
        if self.parts.settings.advantages == "minibatch":
            given = _standardised(given)
        return given._replace(weight=scale * given.weight)

    def loss(self, behaviour: Params, coefficients: Mapping[str, Any]) -> Loss:
        """The function of loss and metrics of a minibatch's transitions, [batch]."""

        def loss_fn(params: Params, given: Targets, keys: Any) -> Any:
            value = self.parts.value(params["critic"], given.samples.observation)
            return _loss(
                self.parts, behaviour, coefficients, params, value, given, keys
            )

        return loss_fn


@dataclasses.dataclass(frozen=True)
class PerMinibatch:
    """Advantages from the critic as it is in each minibatch of whole unrolls.

    Only what a time limit cut off keeps its value from before the update.

    Attributes:
        parts: environments, networks and rules.

    References:
        brax's PPO and the JAX code of FPO.
    """

    parts: Parts

    @property
    def rows(self) -> int:
        """How many environments are shuffled into minibatches."""
        return self.parts.vector.count

    def data(self, unroll: Unroll, given: Targets) -> Any:
        """The unroll to shuffle, [env, time, ...]."""
        del given
        return unroll.transposed()

    def batch(self, data: Any, rows: Array, scale: Array) -> Any:
        """A minibatch; scale makes a plain mean that over valid steps."""
        return jax.tree.map(lambda x: x[rows], data), jnp.full(rows.shape, scale)

    def loss(self, behaviour: Params, coefficients: Mapping[str, Any]) -> Loss:
        """The function of loss and metrics of a minibatch's unrolls, [env]."""
        parts = self.parts

        def loss_fn(params: Params, batch: Any, keys: Any) -> Any:
            unroll, scale = batch
            unroll = unroll.transposed()
            step, critic = unroll.step, params["critic"]
            shape = step.reward.shape
            value = parts.values(critic, unroll.observation)
            fixed = jax.lax.stop_gradient(value)
            end = parts.values(jax.lax.stop_gradient(critic), unroll.last[None])
            following = jnp.concatenate([fixed[1:], end])
            unroll = unroll._replace(
                value=fixed,
                next_value=jnp.where(step.truncated, unroll.next_value, following),
            )
            given = targets(unroll, parts.settings, coefficients)
            if parts.settings.advantages == "minibatch":
                given = _standardised(given)
            given = given._replace(weight=jnp.tile(scale, shape[0]) * given.weight)
            keys = prng.fold_in(keys[None], jnp.arange(shape[0])[:, None]).reshape(-1)
            loss, metrics = _loss(
                parts, behaviour, coefficients, params, value.reshape(-1), given, keys
            )
            metrics = {
                k: getattr(jnp, "max" if k == "ratio_error" else "mean")(
                    v.reshape(shape), 0
                )
                for k, v in metrics.items()
            }
            return loss.reshape(shape).mean(0), metrics

        return loss_fn
