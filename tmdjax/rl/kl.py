"""Estimators of the KL divergence to a reference policy, one number an element."""

from typing import Any

import jax
import jax.numpy as jnp

from tmdjax.core.checks import check_choice
from tmdjax.core.types import Array
from tmdjax.rl.ratios import MAX_LOG_RATIO, log_ratio, ratio

KINDS = ("k1", "k2", "k3")


def kl_estimate(
    log_prob: Any,
    reference_log_prob: Any,
    kind: str = "k3",
    *,
    behaviour_log_prob: Any = None,
    mask: Any = None,
) -> Array:
    """An estimate of KL(policy || reference) from elements the policy drew.

    With d = log_prob - reference_log_prob:

    * 'k1': d, unbiased, of either sign;
    * 'k2': d^2 / 2, biased; its gradient is that of the KL in expectation;
    * 'k3': exp(-d) - 1 + d, unbiased, >= 0, of low variance.

    If another policy drew the elements, or if the gradient too should be unbiased
    for 'k1' and 'k3', give ``behaviour_log_prob`` (log_prob itself when it was this
    policy): the estimate is multiplied by exp(log_prob - behaviour), whose gradient
    counts.

    Args:
        log_prob: of the trained policy, any shape.
        reference_log_prob: the same shape; a constant.
        kind: 'k1', 'k2' or 'k3'.
        behaviour_log_prob: the same shape; a constant; or None.
        mask: shape of log_prob or of its first axes; False elements are 0.

    Returns:
        The estimate of each element, of log_prob's shape, float32. In k3, d is
        clamped to >= -20.

    Raises:
        ValueError: unknown kind, or shapes that disagree.

    References:
        Schulman, "Approximating KL divergence", 2020. The multiplied form:
        DeepSeek-V3.2 report, 2025.
    """
    check_choice("kind", kind, KINDS)
    d = log_ratio(log_prob, jax.lax.stop_gradient(reference_log_prob), mask)
    estimate = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": k3}[kind](d)
    if behaviour_log_prob is not None:
        behaviour_log_prob = jax.lax.stop_gradient(behaviour_log_prob)
        estimate = estimate * ratio(log_ratio(log_prob, behaviour_log_prob, mask))
    return estimate


def k3(d: Array) -> Array:
    """exp(-d) - 1 + d without cancellation: ratios of images differ by 1e-5.

    Args:
        d: log-ratio, any shape; clamped to >= -20.

    Returns:
        The same shape, >= 0.
    """
    d = jnp.maximum(d, -MAX_LOG_RATIO)
    series = d * d * (1 / 2 - d * (1 / 6 - d * (1 / 24 - d / 120)))
    return jnp.where(jnp.abs(d) < 0.02, series, jnp.expm1(-d) + d)
