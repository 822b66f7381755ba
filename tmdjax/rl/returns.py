"""Advantages and returns over time, from rewards and values."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from tmdjax.core.checks import check_range, check_same_shape
from tmdjax.core.types import Array
from tmdjax.rl.ratios import at_least_float32


def generalised_advantages(
    reward: Any,
    value: Any,
    next_value: Any,
    terminated: Any,
    truncated: Any,
    *,
    discount: Any,
    gae_lambda: Any,
    valid: Any = None,
) -> tuple[Array, Array]:
    """Generalised advantage estimates and the returns that values are fitted to.

        delta_t = r_t + discount (1 - terminated_t) next_value_t - value_t
        A_t     = delta_t + discount lambda (1 - terminated_t or truncated_t) A_{t+1}
        return  = A_t + value_t

    ``next_value`` is of what really followed: after a truncation the value of the
    episode's last observation, not of the one that a reset put in its place. The sum
    is cut there in both cases.

    Args:
        reward: float32 [time, ...], as are all others.
        value: of the observation that was acted on.
        next_value: of the observation the action led to.
        terminated: bool, nothing followed.
        truncated: bool, something followed that was not seen.
        discount: in [0, 1], may be traced.
        gae_lambda: in [0, 1], may be traced.
        valid: bool, or None if all steps are. A step that is not valid has advantage 0
            and cuts the sum; its own next_value does not matter.

    Returns:
        Advantages and returns, [time, ...], without gradient.

    Raises:
        ValueError: shapes that differ, or a number out of range.

    References:
        arXiv 1506.02438, eq. 16.
    """
    for name, array in (
        ("value", value),
        ("next_value", next_value),
        ("terminated", terminated),
        ("truncated", truncated),
        ("valid", reward if valid is None else valid),
    ):
        check_same_shape(name, array, "reward", reward)
    for name, number in (("discount", discount), ("gae_lambda", gae_lambda)):
        if not isinstance(number, jax.core.Tracer):
            check_range(name, float(number), 0, 1)
    reward, value, next_value = map(at_least_float32, (reward, value, next_value))
    valid = jnp.ones(reward.shape, bool) if valid is None else jnp.asarray(valid)
    ended, cut = jnp.asarray(terminated), jnp.asarray(truncated)
    delta = reward + discount * jnp.where(ended, 0, next_value) - value
    delta = jnp.where(valid, delta, 0)
    carry_on = discount * gae_lambda * jnp.where(ended | cut | ~valid, 0.0, 1.0)

    def backwards(later: Array, step: Any) -> tuple[Array, Array]:
        delta, carry_on = step
        advantage = delta + carry_on * later
        return advantage, advantage

    _, advantage = jax.lax.scan(
        backwards, jnp.zeros_like(delta[0]), (delta, carry_on), reverse=True
    )
    return jax.lax.stop_gradient((advantage, advantage + value))


def standardise(x: Any, valid: Any = None, *, eps: float = 1e-8) -> Array:
    """(x - mean) / (std + eps) over all valid elements; the others are 0.

    Args:
        x: any shape.
        valid: bool of the same shape, or None if all are.
        eps: added to the standard deviation, which is unbiased (n - 1).

    Returns:
        The same shape, float32 or wider.

    Raises:
        ValueError: shapes that differ.
    """
    x = at_least_float32(x)
    valid = jnp.ones(x.shape, bool) if valid is None else jnp.asarray(valid)
    check_same_shape("valid", valid, "x", x)
    count = jnp.sum(valid)
    mean = jnp.sum(x, where=valid) / jnp.maximum(count, 1)
    variance = jnp.sum((x - mean) ** 2, where=valid) / jnp.maximum(count - 1, 1)
    return jnp.where(valid, (x - mean) / (jnp.sqrt(variance) + eps), 0)
