"""Clip ranges under which arithmetic of few bits clips as often as exact arithmetic.

Rounding spreads the ratios of a policy computed in few bits, so that more of them lie
beyond a clip range than exact arithmetic would put there, and their gradient is lost.
On the host, in float64: it is done once in many iterations.

References:
    Calibrated clipping, arXiv 2609.22870. Its text was not at hand; it is known that
    every 20 steps a pass in bfloat16 gives the fractions that exact arithmetic would
    clip, that the lower bound is set to the same quantile, and that the upper one is
    "re-balanced". Here that is the same rule on the other side.
"""

import math
from typing import Any

import numpy as np

from tmdjax.core.checks import check_range, check_same_shape
from tmdjax.rl.ratios import MAX_LOG_RATIO
from tmdjax.rl.surrogates import ClipRange, check_clip_range


def clipped_shares(
    log_ratio: Any, advantage: Any, clip_range: ClipRange, *, mask: Any = None
) -> tuple[float, float]:
    """Which part of the elements has no gradient, by the sign of the advantage.

    Args:
        log_ratio: any shape; what is not finite does not count.
        advantage: the same shape.
        clip_range: a number or (low, high), for ratios in [1 - low, 1 + high].
        mask: the same shape, or None; False elements do not count.

    Returns:
        The share of elements of negative advantage whose ratio is below 1 - low, and
        that of elements of positive advantage with one above 1 + high, both in [0, 1];
        0 where there are no such elements.

    Raises:
        TypeError, ValueError: shapes that disagree, or a clip range out of range.
    """
    low, high = check_clip_range(clip_range)
    negative, positive = _distances(log_ratio, advantage, mask)
    return _share_above(negative[:, 0], low), _share_above(positive[:, 0], high)


def calibrate_clip_range(
    log_ratio: Any,
    shadow_log_ratio: Any,
    advantage: Any,
    clip_range: ClipRange,
    *,
    current: ClipRange | None = None,
    mask: Any = None,
    most: float = 3.0,
) -> tuple[float, float]:
    """The clip range that clips as often as another would in exact arithmetic.

    Elements of negative advantage lose their gradient below 1 - low. So many of them as
    have a shadow ratio there shall have a ratio below the calibrated bound: it is a
    quantile of their ratios. Elements of positive advantage, which lose theirs above
    1 + high, give the upper bound in the same way. Of all bounds that clip so many, the
    one of ``clip_range`` is kept where it is among them; otherwise the bound is the
    middle between the last ratio that is clipped and the first that is not.

    Where shadow ratios are the ratios, nothing changes.

    Args:
        log_ratio: any shape, of the policy that is trained to the one that is clipped
            around, both in the arithmetic of training; what is not finite does not
            count.
        shadow_log_ratio: the same shape, both in exact arithmetic.
        advantage: the same shape.
        clip_range: a number or (low, high): what one would clip to in exact arithmetic.
        current: the range of the last calibration, whose bound is kept on a side where
            no element says anything; None takes ``clip_range``.
        mask: the same shape, or None; False elements do not count.
        most: > 1; a bound moves at most so many times farther from 1 than that of
            ``clip_range``, or so many times nearer.

    Returns:
        (low, high), positive, low at most 1.

    Raises:
        TypeError, ValueError: shapes that disagree, or options out of range.
    """
    check_same_shape("shadow_log_ratio", shadow_log_ratio, "log_ratio", log_ratio)
    check_range("most", most, 1, math.inf, open_low=True, open_high=True)
    nominal = check_clip_range(clip_range)
    kept = nominal if current is None else check_clip_range(current)
    sides = _distances(log_ratio, advantage, mask, shadow_log_ratio)
    low, high = (
        np.clip(_as_many_above(side, bound), bound / most, bound * most)
        if len(side)
        else before
        for side, bound, before in zip(sides, nominal, kept)
    )
    return min(float(low), 1.0), float(high)


def _distances(
    log_ratio: Any, advantage: Any, mask: Any, *others: Any
) -> tuple[np.ndarray, np.ndarray]:
    """How far ratios are beyond 1 where it costs the gradient, [element, 1 + others].

    1 - ratio of elements of negative advantage, ratio - 1 of those of positive.
    """
    check_same_shape("advantage", advantage, "log_ratio", log_ratio)
    found = np.stack([np.asarray(x, np.float64) for x in (log_ratio, *others)], -1)
    live = np.isfinite(found).all(-1)
    if mask is not None:
        check_same_shape("mask", mask, "log_ratio", log_ratio)
        live &= np.asarray(mask) != 0
    beyond = np.expm1(np.clip(found, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    sign = np.sign(np.asarray(advantage))
    return -beyond[live & (sign < 0)], beyond[live & (sign > 0)]


def _share_above(distance: np.ndarray, bound: float) -> float:
    return float(np.mean(distance > bound)) if len(distance) else 0.0


def _as_many_above(side: np.ndarray, bound: float) -> float:
    """The number nearest to a bound that as many of the first column lie above.

    As many as there are of the second column above the bound itself.
    """
    count = int(np.sum(side[:, 1] > bound))
    falling = np.concatenate([[np.inf], np.sort(side[:, 0])[::-1], [-np.inf]])
    above, below = falling[count], falling[count + 1]  # what is clipped last, and not
    if below <= bound < above:
        return bound
    ends = [end for end in (above, below) if math.isfinite(end)]
    return float(np.mean(ends))
