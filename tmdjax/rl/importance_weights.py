"""Weights that correct for another policy having acted: constants, no gradient.

They multiply a loss that is already clipped around the target policy, usually the
trained policy at the start of the step against the one that sampled (older
weights, or another precision). A weight of 0 rejects an element; the denominators
of :mod:`tmdjax.rl.aggregation` still count it, or gradients would grow by the
share rejected.
"""

import math
from typing import Any

import jax.numpy as jnp

from tmdjax.core.checks import check_choice, check_range
from tmdjax.core.types import Array
from tmdjax.rl.ratios import as_mask, fixed_ratio, log_ratio

REDUCTIONS = ("sum", "mean")


def truncated_weights(
    target_log_prob: Any,
    behaviour_log_prob: Any,
    mask: Any = None,
    *,
    high: float = 2.0,
    low: float = 0.0,
) -> Array:
    """The ratio target / behaviour of each element, clipped to [low, high].

    Args:
        target_log_prob: any shape.
        behaviour_log_prob: the same shape.
        mask: shape of target_log_prob or of its first axes, or None.
        high: upper bound; ``math.inf`` for none (log-ratios stay within +-20).
        low: lower bound, >= 0, below high.

    Returns:
        Weights of target_log_prob's shape, float32, 0 where masked out.

    Raises:
        ValueError: shapes that disagree, or bounds out of range.

    References:
        Truncated importance sampling of tokens, bound 2; DART uses 1.
    """
    _check_bounds(low, high)
    difference = log_ratio(target_log_prob, behaviour_log_prob, mask)
    return _live(jnp.clip(fixed_ratio(difference), low, high), mask)


def sequence_weights(
    target_log_prob: Any,
    behaviour_log_prob: Any,
    mask: Any = None,
    *,
    high: float = 2.0,
    low: float = 0.0,
    reduction: str = "sum",
) -> Array:
    """One truncated weight a sequence, at each of its live positions.

    Args:
        target_log_prob: [batch, position, ...].
        behaviour_log_prob: the same shape.
        mask: the same shape, or [batch], or None.
        high: upper bound; ``math.inf`` for none.
        low: lower bound, >= 0, below high.
        reduction: 'sum' of the log-ratios, the weight of the whole sequence
            (unbiased until truncated, of high variance), or their 'mean', the
            geometric mean of the positions' ratios.

    Returns:
        Weights of target_log_prob's shape, float32, 0 where masked out.

    Raises:
        ValueError: shapes that disagree or lack a position axis, unknown reduction,
            or bounds out of range.
    """
    _check_bounds(low, high)
    check_choice("reduction", reduction, REDUCTIONS)
    if jnp.ndim(target_log_prob) < 2:
        raise ValueError(
            f"target_log_prob has shape {jnp.shape(target_log_prob)}; a sequence "
            f"weight needs [batch, position]."
        )
    difference = log_ratio(target_log_prob, behaviour_log_prob, mask)
    axes = tuple(range(1, difference.ndim))
    total = jnp.sum(difference, axis=axes, keepdims=True)
    if reduction == "mean":
        live = _live(jnp.ones_like(difference), mask)
        total = total / jnp.maximum(jnp.sum(live, axis=axes, keepdims=True), 1)
    weight = jnp.clip(fixed_ratio(total), low, high)
    return _live(jnp.broadcast_to(weight, difference.shape), mask)


def rejecting_weights(
    target_log_prob: Any,
    behaviour_log_prob: Any,
    mask: Any = None,
    *,
    low: float,
    high: float,
) -> Array:
    """The ratio target / behaviour inside [low, high], 0 outside.

    Args:
        target_log_prob: any shape.
        behaviour_log_prob: the same shape.
        mask: shape of target_log_prob or of its first axes, or None.
        low: smallest ratio that is kept, >= 0.
        high: largest ratio that is kept, above low.

    Returns:
        Weights of target_log_prob's shape, float32, 0 where rejected or masked out.

    Raises:
        ValueError: shapes that disagree, or bounds out of range.

    References:
        IcePop (Ring-1T report, 2025). AReaL rejects above 5 (low = 0).
    """
    _check_bounds(low, high)
    weight = fixed_ratio(log_ratio(target_log_prob, behaviour_log_prob, mask))
    return _live(jnp.where((weight >= low) & (weight <= high), weight, 0), mask)


def _check_bounds(low: float, high: float) -> None:
    check_range("low", low, 0)
    check_range("high", high, low, math.inf, open_low=True)


def _live(weight: Array, mask: Any) -> Array:
    return weight if mask is None else jnp.where(as_mask(mask, weight), weight, 0)
