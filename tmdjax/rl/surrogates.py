"""Surrogate losses of a policy: elementwise, lower is better.

An element is whatever was drawn: a token [batch, position], a denoising step
[batch, step] or [transition], a motor command [time, env]. All maths is float32
at least. Aggregation, importance weights and KL terms are functions of their own
that compose with these by products and sums:

    loss = clipped_surrogate(log_prob, proximal, advantage, clip_range=0.2)
    loss = loss * truncated_weights(proximal, behaviour, mask)
    loss = aggregate(loss + beta * kl_estimate(log_prob, reference), mask, "token-mean")
"""

import math
import warnings
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from tmdjax.core.checks import check_choice, check_range
from tmdjax.core.types import Array
from tmdjax.rl.ratios import (
    as_mask,
    at_least_float32,
    fixed_ratio,
    log_ratio,
    masked,
    over_leading_axes,
    ratio,
)

ClipRange = Any
"""A number or a pair (low, high) of numbers; they may be traced."""


def check_clip_range(
    clip_range: ClipRange, reduction: str | None = None
) -> tuple[Any, Any]:
    """The clip range as a pair (low, high): ratios stay in [1 - low, 1 + high].

    Args:
        clip_range: one number for both sides, or the pair; infinity does not clip.
        reduction: how log-probs were reduced over the dimensions of one event,
            'mean' or 'sum'; None if an element is a single number, a token say. A
            ratio of means is the D-th root of the joint ratio, so its clip range is
            about D times smaller (1e-4 is usual for images).

    Returns:
        (low, high); traced ones are not checked.

    Raises:
        TypeError: neither a number nor a pair.
        ValueError: a side is not positive, low is above 1 (a ratio is never
            negative; 1 means no lower bound), or reduction is unknown.

    Warns:
        UserWarning: a side is 0.5 or more with reduction 'mean'.
    """
    pair = clip_range if isinstance(clip_range, tuple | list) else (clip_range,) * 2
    if isinstance(clip_range, float) and clip_range == math.inf:
        return 1.0, math.inf
    if len(pair) != 2 or any(isinstance(x, str | bool) for x in pair):
        raise TypeError(
            f"clip_range={clip_range!r} must be a number or a pair (low, high)."
        )
    if any(isinstance(x, jax.core.Tracer) for x in pair):
        return pair[0], pair[1]  # an array of the state: checked where it was given
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


def sequence_log_ratio(
    log_prob: Any,
    behaviour_log_prob: Any,
    mask: Any = None,
    *,
    max_log_ratio: float = 10.0,
) -> Array:
    """The sequence's mean log-ratio at every position, with per-position gradients.

    log s_i = mean_t (log_prob - behaviour) over the sequence's live positions; the
    value at (i, t) is log s_i and its gradient that of log_prob at (i, t):

    log r_it = log_prob - sg(log_prob) + sg(log s_i).

    Hand it to a surrogate as a log-prob whose behaviour is 0, with a clip range
    for a geometric mean (about 1e-4), and aggregate by 'seq-mean-token-mean':

        log_ratio = sequence_log_ratio(log_prob, behaviour, mask)
        loss = clipped_surrogate(log_ratio, jnp.zeros_like(log_ratio), advantage, ...)

    Args:
        log_prob: [batch, position, ...].
        behaviour_log_prob: the same shape.
        mask: the same shape, False at positions that do not count; None if all do.
        max_log_ratio: > 0; log r is clamped to it from above, without gradient
            beyond.

    Returns:
        log r, of log_prob's shape, float32; 0 where masked out.

    Raises:
        ValueError: shapes that disagree, or a log_prob without a position axis.

    References:
        GSPO: arXiv 2507.18071, its per-token form.
    """
    check_range("max_log_ratio", max_log_ratio, 0, open_low=True)
    if jnp.ndim(log_prob) < 2:
        raise ValueError(
            f"log_prob has shape {jnp.shape(log_prob)}; a sequence ratio needs "
            f"[batch, position]."
        )
    difference = log_ratio(log_prob, jax.lax.stop_gradient(behaviour_log_prob), mask)
    live = jnp.ones_like(difference) if mask is None else as_mask(mask, difference)
    axes = tuple(range(1, difference.ndim))
    count = jnp.maximum(jnp.sum(live, axis=axes, keepdims=True), 1)
    mean = jnp.sum(difference, axis=axes, keepdims=True) / count
    per_position = difference + jax.lax.stop_gradient(mean - difference)
    return jnp.where(live, jnp.minimum(per_position, max_log_ratio), 0)


def clipped_policy_gradient(
    log_prob: Any,
    behaviour_log_prob: Any,
    advantage: Any,
    *,
    clip_range: ClipRange,
    mask: Any = None,
) -> Array:
    """REINFORCE with a clipped importance weight: every element keeps a gradient.

    loss = -sg(clip(r, 1 - low, 1 + high)) A log_prob.

    Args:
        log_prob: of the trained policy, any shape.
        behaviour_log_prob: of the policy that acted, the same shape.
        advantage: the same shape, or that of the first axes, or a scalar.
        clip_range: a number or (low, high); low = 1 is no lower bound.
        mask: shape of log_prob or of its first axes; False elements are 0.

    Returns:
        The loss of each element, of log_prob's shape, float32. Only its gradient
        means something.

    Raises:
        TypeError, ValueError: shapes that disagree, or a clip range out of range.

    References:
        CISPO: MiniMax-M1, arXiv 2506.13585.
    """
    low, high = check_clip_range(clip_range)
    weight = jnp.clip(
        fixed_ratio(log_ratio(log_prob, behaviour_log_prob, mask)), 1 - low, 1 + high
    )
    a = _advantage(advantage, weight, mask)
    return -weight * a * masked(log_prob, mask)


def sigmoid_surrogate(
    log_prob: Any,
    behaviour_log_prob: Any,
    advantage: Any,
    *,
    positive_temperature: float = 1.0,
    negative_temperature: float = 1.05,
    mask: Any = None,
) -> Array:
    """A soft gate in place of clipping.

    loss = -A (4 / tau) sigmoid(tau (r - 1)), tau by the sign of A. At r = 1 the
    gradient is the policy gradient -A grad log_prob; it fades smoothly on both
    sides, the faster the larger tau.

    Args:
        log_prob: of the trained policy, any shape.
        behaviour_log_prob: of the policy that acted, the same shape.
        advantage: the same shape, or that of the first axes, or a scalar.
        positive_temperature: > 0, tau where A > 0.
        negative_temperature: > 0, tau where A <= 0.
        mask: shape of log_prob or of its first axes; False elements are 0.

    Returns:
        The loss of each element, of log_prob's shape, float32.

    Raises:
        ValueError: shapes that disagree, or a temperature that is not positive.

    References:
        SAPO: arXiv 2511.20347.
    """
    check_range("positive_temperature", positive_temperature, 0, open_low=True)
    check_range("negative_temperature", negative_temperature, 0, open_low=True)
    r = ratio(log_ratio(log_prob, jax.lax.stop_gradient(behaviour_log_prob), mask))
    a = _advantage(advantage, r, mask)
    tau = jnp.where(a > 0, positive_temperature, negative_temperature)
    return -a * (4 / tau) * jax.nn.sigmoid(tau * (r - 1))
