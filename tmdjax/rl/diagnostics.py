"""What to watch of the ratio between trained and acting policy."""

from typing import Any

import jax
import jax.numpy as jnp

from tmdjax.core.types import Array, ArrayLike
from tmdjax.quant import Precision
from tmdjax.rl.ratios import MAX_LOG_RATIO
from tmdjax.rl.surrogates import ClipRange, check_clip_range

FIRST_RATIO_SHARE = 0.1
PROXIMAL = ("behaviour", "recompute")
"""Whose log-probs ratios are clipped around: those that the rollout recorded, or those
that training computes before its update."""

_FLOW_CAUSES = (
    "states or log-probs stored in fewer bits than they were drawn in (store float32); "
    "times truncated before the network (pass the exact t); another guidance scale, "
    "temperature or dropout in training than in sampling (use the same function for "
    "both)"
)


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


def check_first_ratio(
    max_error: Any,
    clip_range: ClipRange,
    precision: Precision | None = None,
    causes: str = _FLOW_CAUSES,
) -> None:
    """Stops a run whose ratio is not 1 before the first update.

    Nothing was learned yet, so every ratio must be 1 up to rounding. If rounding
    comes near the clip range, it clips at random and the gradient of those samples
    is lost, silently.

    Args:
        max_error: a number, the largest :func:`ratio_error` in the first minibatch of
            the run.
        clip_range: what the loss clips to; the smaller side counts.
        precision: recipes of rollout and update; the message says where they are the
            reason.
        causes: what is wrong for the most part in a run of this kind, and the setting
            that mends each; by default that of RL on flow models.

    Raises:
        RatioError: max_error is not below 0.1 clip_range (NaN included).
    """
    smaller = min(check_clip_range(clip_range))
    bound = FIRST_RATIO_SHARE * smaller
    error = float(max_error)
    if error < bound:
        return
    why = "" if precision is None else precision.disagreement()
    if why:
        why = (
            f" Here {why}: set both to 'fp32', or proximal='recompute', which clips "
            f"around what precision.train gave before the update; the log-probs of the "
            f"rollout remain the behaviour's."
        )
    raise RatioError(
        f"max |ratio - 1| = {error:.3g} on the first minibatch, before any update; it "
        f"must be below {FIRST_RATIO_SHARE:g} x clip_range = {bound:.3g} (clip_range "
        f"{smaller:g}), or rounding decides what is clipped. Usual causes: {causes}."
        f"{why}"
    )
