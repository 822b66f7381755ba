"""The update: epochs of minibatches, and a learning rate that follows the KL."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tmdjax.core.types import Array
from tmdjax.train.on_policy.returns import Once, PerMinibatch
from tmdjax.train.on_policy.settings import ControlSettings
from tmdjax.train.on_policy.state import OnPolicyState, Parts
from tmdjax.train.optimizer import OptimizerConfig, make_optimizer
from tmdjax.train.state import TrainState, make_train_step


def make_rule(settings: ControlSettings) -> optax.GradientTransformation:
    """AdamW whose learning rate is an array in its state."""
    rule = make_optimizer(
        OptimizerConfig(
            name="adamw",
            learning_rate=1.0,
            weight_decay=settings.weight_decay,
            clip_norm=settings.clip_norm,
        )
    )
    scale = optax.inject_hyperparams(optax.scale)(step_size=1.0)
    return optax.chain(rule, scale)


def _with_learning_rate(learner: TrainState, rate: Array) -> TrainState:
    opt_state = optax.tree.set(learner.opt_state, step_size=rate)
    return dataclasses.replace(learner, opt_state=opt_state)


def adapted_learning_rate(
    learning_rate: Any, kl: Any, settings: ControlSettings
) -> Array:
    """Divided by 1.5 where the KL is too large (or NaN), multiplied where too small.

    Args:
        learning_rate: now, scalar.
        kl: mean KL(behaviour || policy) of an epoch.
        settings: target_kl and learning_rate_bounds.

    References:
        The schedule of rsl_rl, which PolicyFlow's code follows.
    """
    assert settings.target_kl is not None
    low, high = settings.learning_rate_bounds
    rate, kl = jnp.asarray(learning_rate), jnp.asarray(kl)
    slower = ~(kl <= 2 * settings.target_kl)
    return jnp.where(
        slower,
        jnp.maximum(rate / 1.5, low),
        jnp.where(kl < settings.target_kl / 2, jnp.minimum(rate * 1.5, high), rate),
    )


def update(
    parts: Parts,
    returns: Once | PerMinibatch,
    state: OnPolicyState,
    data: Any,
    scale: Array,
    key: Any,
) -> tuple[TrainState, Array, dict[str, Array]]:
    """All epochs of minibatches over one rollout.

    Args:
        parts: environments, networks and rules.
        returns: how minibatches are made of the data.
        state: before the update; its policy is the behaviour.
        data: of ``returns``.
        scale: transitions over valid ones.
        key: of the update.

    Returns:
        The learner, the learning rate, and metrics: means over minibatches, but for
        'first_ratio_error' and 'skipped_in_a_row', the largest number of consecutive
        updates that were skipped, whatever followed them.
    """
    settings = parts.settings
    shuffle, noise = jax.random.split(key)
    train_step = make_train_step(
        returns.loss(state.learner.params, state.numbers),
        parts.rule,
        reductions={"ratio_error": jnp.max},
    )

    def minibatch(learner: TrainState, rows: Array) -> tuple[Any, Any]:
        batch = returns.batch(data, rows, scale)
        learner, metrics = train_step(learner, batch, noise)
        return learner, {**metrics, "skipped_in_a_row": learner.skipped_in_a_row}

    def epoch(carry: Any, key: Any) -> tuple[Any, Any]:
        learner, learning_rate = carry
        rows = jax.random.permutation(key, returns.rows)
        learner, metrics = jax.lax.scan(
            minibatch, learner, rows.reshape(settings.minibatches, -1)
        )
        if settings.target_kl is not None:
            learning_rate = adapted_learning_rate(
                learning_rate, metrics["kl"].mean(), settings
            )
            learner = _with_learning_rate(learner, learning_rate)
        return (learner, learning_rate), metrics

    learner = _with_learning_rate(state.learner, state.learning_rate)
    (learner, learning_rate), metrics = jax.lax.scan(
        epoch,
        (learner, state.learning_rate),
        jax.random.split(shuffle, settings.epochs),
    )
    apart = {
        "first_ratio_error": metrics.pop("ratio_error")[0, 0],
        "skipped_in_a_row": metrics.pop("skipped_in_a_row").max(),
    }
    return learner, learning_rate, {k: v.mean() for k, v in metrics.items()} | apart
