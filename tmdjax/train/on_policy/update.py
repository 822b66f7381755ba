"""The update: epochs of minibatches, and a learning rate that follows the KL."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tmdjax.core import trees
from tmdjax.core.types import Array
from tmdjax.train.on_policy.returns import Once, PerMinibatch
from tmdjax.train.on_policy.settings import ControlSettings
from tmdjax.train.on_policy.state import OnPolicyState, Parts
from tmdjax.train.optimizer import OptimizerConfig, make_optimizer
from tmdjax.train.state import TrainState, make_train_step


def make_rule(
    settings: ControlSettings, frozen: Sequence[str] = ()
) -> optax.GradientTransformation:
    """AdamW of policy and critic, whose learning rates are arrays in its state.

    Args:
        settings: decay and clipping.
        frozen: entries of the policy's parameters that are left as they are.
    """
    rule = make_optimizer(
        OptimizerConfig(
            name="adamw",
            learning_rate=1.0,
            weight_decay=settings.weight_decay,
            clip_norm=settings.clip_norm,
        )
    )

    def scaled_policy(policy_rate: Any) -> optax.GradientTransformation:
        return optax.scale(policy_rate)

    def scaled_critic(critic_rate: Any) -> optax.GradientTransformation:
        return optax.scale(critic_rate)

    scales: dict[Any, Any] = {
        "policy": optax.inject_hyperparams(scaled_policy)(policy_rate=1.0),
        "critic": optax.inject_hyperparams(scaled_critic)(critic_rate=1.0),
    }
    if frozen:
        scales["frozen"] = optax.set_to_zero()

    def labels(params: Any) -> Any:
        policy: Any = "policy"
        if frozen:
            policy = {k: "frozen" if k in frozen else policy for k in params["policy"]}
        return {"policy": policy, "critic": "critic"}

    return optax.chain(rule, optax.multi_transform(scales, labels))


def learning_rates(
    settings: ControlSettings, state: OnPolicyState, learning_rate: Array
) -> dict[str, Array]:
    """What the updates of an iteration are multiplied by, float32 scalars.

    Args:
        settings: learning_rate_cycle, critic_cycle_share and critic_warmup.
        state: its iteration, and the critic's learning rate if it has one of its own.
        learning_rate: of the policy.

    Returns:
        'policy_rate' and 'critic_rate'.
    """
    policy: Any = learning_rate
    critic: Any = state.coefficients.get("critic_learning_rate", policy)
    if settings.learning_rate_cycle is not None:
        cycle, warmup, share = settings.learning_rate_cycle

        def factor(share: float) -> Any:
            wave = optax.warmup_cosine_decay_schedule(share, 1.0, warmup, cycle, share)
            return wave(state.iteration % cycle)

        own = settings.critic_cycle_share
        policy = factor(share) * policy
        critic = factor(share if own is None else own) * critic
    if settings.critic_warmup:
        policy = jnp.where(state.iteration < settings.critic_warmup, 0.0, policy)
    return {"policy_rate": policy, "critic_rate": critic}


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
        'first_ratio_error', 'learning_rate' of the policy's last update, and
        'skipped_in_a_row', the largest number of consecutive updates that were skipped,
        whatever followed them.
    """
    settings = parts.settings
    limit = jnp.inf if settings.target_kl is None else settings.target_kl
    adapts, stops = (
        settings.target_kl is not None and settings.kl_rule == rule
        for rule in ("adapt", "stop")
    )
    shuffle, noise = jax.random.split(key)
    train_step = make_train_step(
        returns.loss(state.learner.params, state.numbers),
        parts.rule,
        reductions={"ratio_error": jnp.max},
    )

    def with_rates(learner: TrainState, learning_rate: Array) -> TrainState:
        rates = learning_rates(settings, state, learning_rate)
        opt_state = optax.tree.set(learner.opt_state, **rates)
        return dataclasses.replace(learner, opt_state=opt_state)

    def minibatch(carry: Any, rows: Array) -> tuple[Any, Any]:
        before, stopped = carry
        batch = returns.batch(data, rows, scale)
        learner, metrics = train_step(before, batch, noise)
        if stops:
            stopped |= metrics["kl"] > limit
            learner = trees.select(stopped, before, learner)
            metrics["stopped_fraction"] = stopped.astype(jnp.float32)
        metrics["skipped_in_a_row"] = learner.skipped_in_a_row
        return (learner, stopped), metrics

    def epoch(carry: Any, key: Any) -> tuple[Any, Any]:
        learner, stopped, learning_rate = carry
        rows = jax.random.permutation(key, returns.rows)
        (learner, stopped), metrics = jax.lax.scan(
            minibatch, (learner, stopped), rows.reshape(settings.minibatches, -1)
        )
        if adapts:
            adapted = adapted_learning_rate(
                learning_rate, metrics["kl"].mean(), settings
            )
            if settings.critic_warmup:  # in which the policy has no KL to go by
                warm = state.iteration < settings.critic_warmup
                adapted = jnp.where(warm, learning_rate, adapted)
            learning_rate, learner = adapted, with_rates(learner, adapted)
        return (learner, stopped, learning_rate), metrics

    (learner, _, learning_rate), metrics = jax.lax.scan(
        epoch,
        (
            with_rates(state.learner, state.learning_rate),
            jnp.array(False),
            state.learning_rate,
        ),
        jax.random.split(shuffle, settings.epochs),
    )
    rates = learning_rates(settings, state, learning_rate)
    apart = {
        "first_ratio_error": metrics.pop("ratio_error")[0, 0],
        "skipped_in_a_row": metrics.pop("skipped_in_a_row").max(),
        "learning_rate": rates["policy_rate"],
    }
    return learner, learning_rate, {k: v.mean() for k, v in metrics.items()} | apart
