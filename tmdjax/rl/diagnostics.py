"""What to watch of the ratio between trained and acting policy."""

from typing import Any

import jax
import jax.numpy as jnp

from tmdjax.core.types import Array, ArrayLike
from tmdjax.rl.ratios import MAX_LOG_RATIO
from tmdjax.rl.surrogates import ClipRange, check_clip_range

FIRST_RATIO_SHARE = 0.1


class RatioError(RuntimeError):
    """Before any update, training gives other log-probs than sampling gave."""


def ratio_error(log_ratio: ArrayLike) -> Array:
    """|r - 1| of ratios r = exp(log_ratio), elementwise and without gradient.

    Exact for small ones; r is clamped to exp(+-20). Its largest value before any update
    is what :func:`check_first_ratio` looks at.
    """
    return jnp.abs(_less_one(log_ratio))


def beyond_clip(log_ratio: ArrayLike, clip_range: ClipRange) -> tuple[Array, Array]:
    """Whether ratios lie below 1 - low and above 1 + high, elementwise bool.

    Their means are the clip fractions, whatever the sign of the advantage.

    Args:
        log_ratio: any shape.
        clip_range: a number or (low, high).

    Raises:
        TypeError, ValueError: a clip range out of range.
    """
    low, high = check_clip_range(clip_range)
    error = _less_one(log_ratio)
    return error < -low, error > high


def _less_one(log_ratio: ArrayLike) -> Array:
    d = jnp.clip(jnp.asarray(log_ratio), -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return jax.lax.stop_gradient(jnp.expm1(d))


def check_first_ratio(max_error: Any, clip_range: ClipRange) -> None:
    """Stops a run whose ratio is not 1 before the first update.

    Nothing was learned yet, so every ratio must be 1 up to rounding. If rounding
    comes near the clip range, it clips at random and the gradient of those samples
    is lost, silently.

    Args:
        max_error: a number, the largest :func:`ratio_error` in the first minibatch of
            the run.
        clip_range: what the loss clips to; the smaller side counts.

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
