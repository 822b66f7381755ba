"""Surrogate losses of a policy: elementwise, lower is better.

An element is whatever was drawn: a token [batch, position], a denoising step
[batch, step] or [transition], a motor command [time, env]. All maths is float32
at least. Aggregation, importance weights and KL terms are functions of their own
that compose with these by products and sums:

    loss = clipped_surrogate(log_prob, proximal, advantage, clip_range=0.2)
    loss = loss * truncated_weights(proximal, behaviour, mask=mask)
    loss = aggregate(loss + beta * kl_estimate(log_prob, reference), mask, "token-mean")
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp

from tmdjax.core.checks import check_choice, check_range
from tmdjax.core.types import Array
from tmdjax.rl.ratios import (
    as_mask,
    at_least_float32,
    fixed_ratio,
    log_ratio,
    over_leading_axes,
    ratio,
)

ClipRange = float | tuple[float, float]


def check_clip_range(
    clip_range: ClipRange, reduction: str | None = None
) -> tuple[float, float]:
    """The clip range as a pair (low, high): ratios stay in [1 - low, 1 + high].

    Args:
        clip_range: one number for both sides, or the pair.
        reduction: how log-probs were reduced over the dimensions of one event,
            'mean' or 'sum'; None if an element is a single number, a token say. A
            ratio of means is the D-th root of the joint ratio, so its clip range is
            about D times smaller (1e-4 is usual for images).

    Returns:
        (low, high).

    Raises:
        TypeError: neither a number nor a pair.
        ValueError: a side is not positive, low is above 1 (a ratio is never
            negative; 1 means no lower bound), or reduction is unknown.

    Warns:
        UserWarning: a side is 0.5 or more with reduction 'mean'.
    """
    pair = clip_range if isinstance(clip_range, tuple | list) else (clip_range,) * 2
    if len(pair) != 2 or any(isinstance(x, str | bool) for x in pair):
        raise TypeError(
            f"clip_range={clip_range!r} must be a number or a pair (low, high)."
        )
    low, high = (float(x) for x in pair)
    check_range("clip_range low", low, 0, 1, open_low=True)
    check_range("clip_range high", high, 0, open_low=True)
    if reduction is not None:
        check_choice("reduction", reduction, ("mean", "sum"))
    if reduction == "mean" and max(low, high) >= 0.5:
        warnings.warn(
            f"clip_range={clip_range} with reduction='mean': no clipping will ever "
            f"happen, because a ratio of mean log-probs stays near 1. Divide the range "
            f"by about the number of dimensions of an event (1e-4 for images).",
            stacklevel=2,
        )
    return low, high


def clipped_surrogate(
    log_prob: Any,
    behaviour_log_prob: Any,
    advantage: Any,
    *,
    clip_range: ClipRange,
    dual_clip: float | None = None,
    proximal_log_prob: Any = None,
    mask: Any = None,
) -> Array:
    """The clipped policy loss: PPO and its family.

    loss = max(-A r, -A clip(r, 1 - low, 1 + high)),   r = exp(log_prob - behaviour).

    * ``dual_clip=c``: where A < 0 the loss is at most -c A.
    * ``proximal_log_prob``: clips around another policy than the one that acted
      (decoupled PPO): r = exp(log_prob - proximal), and the loss is multiplied by
      the constant exp(proximal - behaviour). For a truncated or masked weight,
      pass the proximal policy as behaviour and multiply by one of
      :mod:`tmdjax.rl.importance_weights`.
    * With ``behaviour_log_prob=log_prob`` it is REINFORCE: value -A, gradient
      -A grad log_prob.

    Only log_prob has a gradient. Log-ratios are clamped to +-20.

    Args:
        log_prob: of the trained policy, any shape.
        behaviour_log_prob: of the policy that acted, the same shape.
        advantage: the same shape, or that of the first axes ([batch] or [batch, 1]
            for [batch, position]), or a scalar.
        clip_range: a number or (low, high), in units of the log-probs' reduction,
            see :func:`check_clip_range`.
        dual_clip: > 1, or None.
        proximal_log_prob: of the trained policy at the start of this training step,
            the same shape, or None.
        mask: shape of log_prob or of its first axes; where False the loss is 0 and
            has no gradient, even if log-probs are not finite there.

    Returns:
        The loss of each element, of log_prob's shape, float32.

    Raises:
        TypeError, ValueError: shapes that disagree, or options out of range.

    References:
        PPO: arXiv 1707.06347 eq. 7. Clip-higher: DAPO, arXiv 2503.14476. Dual
        clip: arXiv 1912.09729. Decoupled: arXiv 2110.00641 sec. 3, 2505.24298.
    """
    low, high = check_clip_range(clip_range)
    if dual_clip is not None:
        check_range("dual_clip", dual_clip, 1, open_low=True)
    anchor = behaviour_log_prob if proximal_log_prob is None else proximal_log_prob
    r = ratio(log_ratio(log_prob, jax.lax.stop_gradient(anchor), mask))
    a = _advantage(advantage, r, mask)
    loss = jnp.maximum(-a * r, -a * jnp.clip(r, 1 - low, 1 + high))
    if dual_clip is not None:
        loss = jnp.where(a < 0, jnp.minimum(loss, -dual_clip * a), loss)
    if proximal_log_prob is not None:
        loss = loss * fixed_ratio(
            log_ratio(proximal_log_prob, behaviour_log_prob, mask)
        )
    return loss


def _advantage(advantage: Any, like: Array, mask: Any) -> Array:
    """The advantage as a constant over ``like``, 0 where masked out."""
    advantage = at_least_float32(over_leading_axes("advantage", advantage, like))
    if mask is not None:
        advantage = jnp.where(as_mask(mask, like), advantage, 0)
    return jax.lax.stop_gradient(advantage)
