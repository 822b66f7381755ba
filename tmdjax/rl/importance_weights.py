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
from tmdjax.rl.kl import KINDS, kl_estimate
from tmdjax.rl.ratios import as_mask, fixed_ratio, log_ratio, ratio

REDUCTIONS = ("sum", "mean")
METRICS = ("ratio", *KINDS)
REJECTED_OVER = ("mean", "sum", "max")


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
    _check_positions(target_log_prob)
    difference = log_ratio(target_log_prob, behaviour_log_prob, mask)
    total = _over_sequence(difference, mask, reduction)
    weight = jnp.clip(fixed_ratio(total), low, high)
    return _live(jnp.broadcast_to(weight, difference.shape), mask)


def rejecting_weights(
    target_log_prob: Any,
    behaviour_log_prob: Any,
    mask: Any = None,
    *,
    high: float,
    low: float | None = None,
    metric: str = "ratio",
    reduction: str | None = None,
) -> Array:
    """The ratio target / behaviour where a measure of it is inside bounds, 0 outside.

    By default the measure is the ratio of each element. With d = target - behaviour the
    others are estimates of KL(behaviour || target) from what the behaviour drew:

    * 'k1': -d. Its sign matters to a bound: large where the target gives an element
      less probability than the behaviour did, negative where it gives more;
    * 'k2': d^2 / 2, which is alike on both sides;
    * 'k3': exp(d) - 1 - d, never negative and steeper where the target gives more.

    With a ``reduction`` whole sequences are rejected, by the 'mean', the 'sum' or the
    'max' of the measure over their live positions. Of ratios these are taken of d (a
    mean is geometric), and then each position of a sequence weighs the geometric mean
    of its ratios; under the other measures its own ratio.

    Args:
        target_log_prob: any shape; [batch, position, ...] with a ``reduction``.
        behaviour_log_prob: the same shape.
        mask: shape of target_log_prob or of its first axes, or None.
        high: largest measure that is kept, above ``low``.
        low: smallest measure that is kept, or None for no such bound; >= 0 of ratios.
        metric: the measure: 'ratio', 'k1', 'k2' or 'k3'.
        reduction: None for each element by itself, or 'mean', 'sum' or 'max'.

    Returns:
        Weights of target_log_prob's shape, float32, 0 where rejected or masked out. An
        element whose measure is NaN is rejected.

    Raises:
        ValueError: shapes that disagree or lack a position axis, an unknown metric or
            reduction, or bounds out of range.

    References:
        IcePop (Ring-1T report, 2025): ratios of tokens, both bounds. AReaL, arXiv
        2505.24298, rejects tokens of ratios above 5; its code has all of these
        measures, but computes 'k1' as d and 'k3' as exp(-d) - 1 + d, as if the target
        had drawn the elements.
    """
    check_choice("metric", metric, METRICS)
    least = 0 if metric == "ratio" else -math.inf
    floor = least if low is None else low
    check_range("low", floor, least)
    check_range("high", high, floor, open_low=True)
    if reduction is not None:
        check_choice("reduction", reduction, REJECTED_OVER)
        _check_positions(target_log_prob)
    difference = log_ratio(target_log_prob, behaviour_log_prob, mask)
    weight, measure = fixed_ratio(difference), difference
    if metric != "ratio":
        measure = kl_estimate(behaviour_log_prob, target_log_prob, metric, mask=mask)
    if reduction is not None:
        measure = _over_sequence(measure, mask, reduction)
        if metric == "ratio":
            weight = fixed_ratio(_over_sequence(difference, mask, "mean"))
    if metric == "ratio":
        measure = ratio(measure)
    kept = measure <= high
    if low is not None:
        kept = (measure >= low) & kept
    weight = jnp.broadcast_to(jnp.where(kept, weight, 0), difference.shape)
    return _live(weight, mask)


def _over_sequence(x: Array, mask: Any, reduction: str) -> Array:
    """Of the live positions of each sequence, [batch, 1, ...]; x is 0 at the others."""
    axes = tuple(range(1, x.ndim))
    live = _live(jnp.ones_like(x), mask)
    if reduction == "max":
        x = jnp.where(live != 0, x, -jnp.inf)
        return jnp.max(x, axis=axes, keepdims=True)
    total = jnp.sum(x, axis=axes, keepdims=True)
    if reduction == "mean":
        total = total / jnp.maximum(jnp.sum(live, axis=axes, keepdims=True), 1)
    return total


def _check_positions(target_log_prob: Any) -> None:
    if jnp.ndim(target_log_prob) < 2:
        raise ValueError(
            f"target_log_prob has shape {jnp.shape(target_log_prob)}; a sequence "
            f"weight needs [batch, position]."
        )


def _check_bounds(low: float, high: float) -> None:
    check_range("low", low, 0)
    check_range("high", high, low, math.inf, open_low=True)


def _live(weight: Array, mask: Any) -> Array:
    return weight if mask is None else jnp.where(as_mask(mask, weight), weight, 0)
