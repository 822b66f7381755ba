"""What to watch of the ratio between trained and acting policy."""

from typing import Any

import jax
import jax.numpy as jnp

from tmdjax.core.types import Array
from tmdjax.rl.kl import k3
from tmdjax.rl.ratios import MAX_LOG_RATIO, as_mask, log_ratio
from tmdjax.rl.surrogates import ClipRange, check_clip_range

FIRST_RATIO_SHARE = 0.1


class RatioError(RuntimeError):
    """Before any update, training gives other log-probs than sampling gave."""


def ratio_statistics(
    log_prob: Any, behaviour_log_prob: Any, mask: Any, clip_range: ClipRange
) -> dict[str, Array]:
    """How far the trained policy is from the one that acted.

    With d = log_prob - behaviour and r = exp(d), over live elements:

    * ``clip_fraction_low``, ``clip_fraction_high``: share of r < 1 - low and of
      r > 1 + high, whatever the sign of the advantage;
    * ``log_ratio_abs_mean``, ``log_ratio_abs_max``: of |d|;
    * ``ratio_error_max``: max |r - 1|, for :func:`check_first_ratio`;
    * ``kl_k3``: mean of r - 1 - d, an estimate of KL(behaviour || policy);
    * ``effective_sample_fraction``: (sum r)^2 / (n sum r^2), in [1 / n, 1].

    Args:
        log_prob: any shape.
        behaviour_log_prob: the same shape.
        mask: shape of log_prob or of its first axes, or None if all elements count.
        clip_range: a number or (low, high).

    Returns:
        float32 scalars without gradient, all 0 if no element is live. r is
        clamped to exp(+-20) but in ``effective_sample_fraction``.

    Raises:
        TypeError, ValueError: shapes that disagree, or a clip range out of range.
    """
    low, high = check_clip_range(clip_range)
    d = jax.lax.stop_gradient(log_ratio(log_prob, behaviour_log_prob, mask))
    live = jnp.ones(d.shape, bool) if mask is None else as_mask(mask, d)
    count = jnp.maximum(jnp.sum(live), 1)
    # r - 1, exact for small d; 0 where masked out, because d is.
    error = jnp.expm1(jnp.clip(d, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    relative = jnp.where(live, jnp.exp(d - jnp.max(d, where=live, initial=-jnp.inf)), 0)
    squares = jnp.sum(jnp.square(relative))
    return {
        "clip_fraction_low": jnp.sum(error < -low) / count,
        "clip_fraction_high": jnp.sum(error > high) / count,
        "log_ratio_abs_mean": jnp.sum(jnp.abs(d)) / count,
        "log_ratio_abs_max": jnp.max(jnp.abs(d), initial=0),
        "ratio_error_max": jnp.max(jnp.abs(error), initial=0),
        "kl_k3": jnp.sum(k3(-d)) / count,
        "effective_sample_fraction": jnp.square(jnp.sum(relative))
        / (count * jnp.where(squares > 0, squares, 1)),
    }


def check_first_ratio(max_error: Any, clip_range: ClipRange) -> None:
    """Stops a run whose ratio is not 1 before the first update.

    Nothing was learned yet, so every ratio must be 1 up to rounding. If rounding
    comes near the clip range, it clips at random and the gradient of those samples
    is lost, silently.

    Args:
        max_error: a number, max |ratio - 1| over the first minibatch of the run (the
            entry ``ratio_error_max`` of :func:`ratio_statistics`).
        clip_range: of the loss; the smaller side counts.

    Raises:
        RatioError: max_error is not below 0.1 clip_range (NaN included).
    """
    smaller = min(check_clip_range(clip_range))
    bound = FIRST_RATIO_SHARE * smaller
    error = float(max_error)
    if error < bound:
        return
    raise RatioError(
        f"max |ratio - 1| = {error:.3g} on the first minibatch, before any update; it "
        f"must be below {FIRST_RATIO_SHARE:g} x clip_range = {bound:.3g} (clip_range "
        f"{smaller:g}), or rounding decides what is clipped. Usual causes: states or "
        f"log-probs stored in fewer bits than they were drawn in (store float32); "
        f"times truncated before the network (pass the exact t); another guidance "
        f"scale, temperature or dropout in training than in sampling (use the same "
        f"function for both); another batch shape or GEMM precision (set "
        f"precision.rollout and precision.train alike). If the difference is "
        f"intended, correct it by importance weights against a proximal policy."
    )
