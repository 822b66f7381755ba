"""What to watch of the ratio between trained and acting policy."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tmdjax.core.types import Array, ArrayLike
from tmdjax.quant import Precision
from tmdjax.rl.kl import k3
from tmdjax.rl.ratios import MAX_LOG_RATIO, as_mask, log_ratio
from tmdjax.rl.surrogates import ClipRange, check_clip_range

FIRST_RATIO_SHARE = 0.1
PROXIMAL = ("auto", "behaviour", "recompute")
"""Whose log-probs ratios are clipped around: those that the rollout recorded, or those
that training computes before its update; 'auto' leaves the choice to the iteration."""

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


def mismatch_terms(
    train_log_prob: Any, rollout_log_prob: Any, mask: Any
) -> dict[str, Array]:
    """What :func:`mismatch` takes means of, token by token and without gradient.

    Args:
        train_log_prob: [..., sequence, token] of responses.
        rollout_log_prob: the same shape.
        mask: bool, the same shape: the tokens of each response, which stand first in
            its row.

    Returns:
        float32 arrays of that shape, 0 where masked out. With d = train_log_prob -
        rollout_log_prob: 'mismatch_kl', exp(d) - 1 - d, which is never negative;
        'mismatch_mean', |d|; 'mismatch_early' and 'mismatch_late', |d| of the first and
        the last third of a response (of n tokens the first and last n / 3, rounded up),
        0 elsewhere; and what these are counted by: 'mismatch_tokens', 1, and
        'mismatch_third', 1 in the first third, 0 elsewhere.
    """
    d = jax.lax.stop_gradient(log_ratio(train_log_prob, rollout_log_prob, mask))
    live = as_mask(mask, d)
    at, length = jnp.arange(d.shape[-1]), live.sum(-1, keepdims=True)
    early = live & (3 * at < length)
    late = live & (3 * (length - 1 - at) < length)
    distance = jnp.abs(d)
    return {
        "mismatch_kl": k3(-d),
        "mismatch_mean": distance,
        "mismatch_early": jnp.where(early, distance, 0),
        "mismatch_late": jnp.where(late, distance, 0),
        "mismatch_tokens": live.astype(d.dtype),
        "mismatch_third": early.astype(d.dtype),
    }


def mismatch_of(terms: Mapping[str, Any]) -> dict[str, Any]:
    """Means of :func:`mismatch_terms` over the tokens that count.

    Args:
        terms: sums over tokens, all of the same ones, or these divided by one number;
            beside those of :func:`mismatch_terms` there may be others, such as
            'mismatch_max', which are passed on.

    Returns:
        The same names without those that count; all 0 where no token counts.
    """
    found = dict(terms)
    tokens, third = (found.pop(f"mismatch_{name}") for name in ("tokens", "third"))
    for name in ("kl", "mean"):
        found[f"mismatch_{name}"] /= tokens + (tokens == 0)
    for name in ("early", "late"):
        found[f"mismatch_{name}"] /= third + (third == 0)
    return found


def mismatch(train_log_prob: Any, rollout_log_prob: Any, mask: Any) -> dict[str, Array]:
    """How far two computations of one policy are apart: of training, of rollouts.

    Under the same weights a rollout in fewer bits, or only in other batches, gives
    other log-probs than training. With d = train_log_prob - rollout_log_prob over the
    tokens of responses that the rollout drew:

    * 'mismatch_kl': mean of exp(d) - 1 - d, an estimate of KL(rollout || train) in nats
      a token; never negative. Above 1e-3 training is in danger.
    * 'mismatch_mean', 'mismatch_max': mean and largest |d|.
    * 'mismatch_early', 'mismatch_late': mean |d| in the first and in the last third of
      the positions of a response. Errors that add up along a text make the latter the
      larger one.

    Args:
        train_log_prob: [..., sequence, token] of responses.
        rollout_log_prob: the same shape.
        mask: bool, the same shape: the tokens of each response, which stand first in
            its row.

    Returns:
        float32 scalars, 0 where no token counts.

    References:
        Jet-RL (arXiv 2601.14243); the estimator is k3, see
        :func:`tmdjax.rl.kl_estimate`.
    """
    terms = mismatch_terms(train_log_prob, rollout_log_prob, mask)
    largest = terms["mismatch_mean"].max(initial=0)
    sums = {name: term.sum() for name, term in terms.items()}
    return mismatch_of(sums) | {"mismatch_max": largest}


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
            f" Here {why}: set both to 'fp32', or proximal='recompute' (as 'auto' "
            f"does), which clips around what precision.train gave before the update; "
            f"the log-probs of the rollout remain the behaviour's."
        )
    raise RatioError(
        f"max |ratio - 1| = {error:.3g} on the first minibatch, before any update; it "
        f"must be below {FIRST_RATIO_SHARE:g} x clip_range = {bound:.3g} (clip_range "
        f"{smaller:g}), or rounding decides what is clipped. Usual causes: {causes}."
        f"{why}"
    )
