"""Intervals: Student t over seeds, paired for two arms; bootstrap over samples."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

from tmdjax.core.checks import check_choice, check_count, check_finite, check_range

STATISTICS = ("difference", "ratio")


class Interval(NamedTuple):
    """A value with its interval; both bounds are None when there is one seed."""

    value: float
    low: float | None
    high: float | None


def t_interval(values: Sequence[float] | Any, level: float = 0.95) -> Interval:
    """Mean over seeds with its two-sided Student t interval.

    mean ± t_{n-1} s / sqrt(n), s the sample standard deviation (ddof 1).

    Args:
        values: one finite number a seed, [n] with n >= 1.
        level: coverage, inside (0, 1).

    Returns:
        ``(mean, low, high)``; low and high are None for n = 1, where the spread
        is unknown.

    Raises:
        ValueError: no value, more than one axis, a non-finite value, or a level
            outside (0, 1).
    """
    check_range("level", level, 0, 1, open_low=True, open_high=True)
    x = _per_seed(values, "values")
    mean = float(x.mean())
    if x.size == 1:
        return Interval(mean, None, None)
    t = float(stdtrit(x.size - 1, 0.5 + level / 2))
    half = t * float(x.std(ddof=1)) / x.size**0.5
    return Interval(mean, mean - half, mean + half)


def finite_interval(values: Sequence[float]) -> Interval:
    """The 95 % :func:`t_interval` where all values are finite, else their mean alone.

    Args:
        values: one a seed, at least one; NaN and infinity may be among them.
    """
    if all(map(math.isfinite, values)):
        return t_interval(values)
    return Interval(sum(values) / len(values), None, None)


def paired_interval(
    ours: Sequence[float] | Any,
    baseline: Sequence[float] | Any,
    statistic: str,
    level: float = 0.95,
) -> Interval:
    """Compares two arms run on the same seeds, entry i of both being seed i.

    * ``'difference'``: mean of ours - baseline, with its t interval.
    * ``'ratio'``: geometric mean of ours / baseline; the t interval is taken on
      the log ratio and exponentiated, so swapping the arms inverts it.

    Args:
        ours: one number a seed, [n].
        baseline: the same seeds of the other arm, [n].
        statistic: 'difference' or 'ratio'.
        level: coverage, inside (0, 1).

    Returns:
        ``(value, low, high)``; low and high are None for n = 1.

    Raises:
        ValueError: unknown statistic, unequal lengths, a non-finite value, or a
            value that is not positive where a ratio is asked for.
    """
    check_choice("statistic", statistic, STATISTICS)
    a, b = _per_seed(ours, "ours"), _per_seed(baseline, "baseline")
    if a.size != b.size:
        raise ValueError(
            f"ours has {a.size} seed(s) but baseline has {b.size}; a paired interval "
            f"needs both arms on the same seeds. Drop the seeds that only one has."
        )
    if statistic == "difference":
        return t_interval(a - b, level)
    for name, x in (("ours", a), ("baseline", b)):
        if (x <= 0).any():
            raise ValueError(
                f"{name} holds {x[x <= 0][0]:g}; a ratio needs positive values. Use "
                f"statistic='difference' for values that can be zero or negative."
            )
    value, low, high = t_interval(np.log(a) - np.log(b), level)
    if low is None or high is None:
        return Interval(math.exp(value), None, None)
    return Interval(math.exp(value), math.exp(low), math.exp(high))


def paired_p_value(
    ours: Sequence[float] | Any, baseline: Sequence[float] | Any
) -> float | None:
    """Two-sided p-value of Student's paired t test.

    Args:
        ours: one number a seed, [n].
        baseline: the same seeds of the other arm, [n].

    Returns:
        In [0, 1]; None for one seed, or where all differences are equal (up to
        rounding), so that their spread is unknown or nothing.

    Raises:
        ValueError: unequal lengths, or a non-finite value.

    References:
        Student 1908, "The probable error of a mean".
    """
    difference = paired_interval(ours, baseline, "difference")
    a, b = _per_seed(ours, "ours"), _per_seed(baseline, "baseline")
    x = a - b
    rounding = 8 * np.finfo(np.float64).eps * max(np.abs(a).max(), np.abs(b).max())
    if x.size == 1 or np.ptp(x) <= rounding:
        return None
    t = abs(difference.value) / (float(x.std(ddof=1)) / x.size**0.5)
    return float(2 * stdtr(x.size - 1, -t))


def adjusted_p_values(p_values: Sequence[float] | Any) -> list[float]:
    """Holm's adjustment for several tests.

    Where all hypotheses whose adjusted p-value is below a level are rejected, the
    chance of one false rejection or more stays below that level.

    Args:
        p_values: each in [0, 1], in any order.

    Returns:
        In the given order, each at least the given one, at most 1.

    Raises:
        ValueError: one outside [0, 1].

    References:
        Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    for p in p_values:
        check_range("p-value", p, 0, 1)
    order = np.argsort(p_values, kind="stable")
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * float(p_values[i])))
        adjusted[i] = highest
    return adjusted


def bootstrap_interval(
    statistic: Callable[..., Any],
    *samples: Any,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """A number made of samples, with its interval over redrawn samples.

    Every set is redrawn, with replacement and on its own, as often as it is long. The
    interval holds the middle ``level`` of the redrawn numbers, moved so that their
    mean is the value itself: redrawing repeats samples, which shifts a distance
    between sets upward, and the shift is no uncertainty. It says how far the value
    would be from itself with other samples; not how far off it is (a distance between
    finite sets is biased), nor how training seeds differ.

    Args:
        statistic: ``(*samples) -> number``, such as ``np.mean`` or
            ``sliced_wasserstein``; called ``resamples + 1`` times.
        *samples: arrays [n, ...], one or more, each of its own length.
        level: coverage, inside (0, 1).
        resamples: >= 2; 100 give the bounds to about a tenth of their distance.
        seed: of the random numbers that redraw.

    Returns:
        ``(value, low, high)``.

    Raises:
        ValueError: no set, an empty one, a number that is not finite, or a level or
            count out of range.

    References:
        Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    check_range("level", level, 0, 1, open_low=True, open_high=True)
    check_count("resamples", resamples, 2)
    sets = [np.asarray(array) for array in samples]
    if not sets or any(array.ndim == 0 or not len(array) for array in sets):
        raise ValueError(
            f"samples have the shapes {[array.shape for array in sets]}; give one set "
            f"or more, [n, ...] with n >= 1."
        )
    value = float(statistic(*sets))
    rng = np.random.default_rng(seed)
    redrawn = np.array(
        [
            float(statistic(*(a[rng.integers(len(a), size=len(a))] for a in sets)))
            for _ in range(resamples)
        ]
    )
    check_finite(np.array([value, *redrawn]), "the statistic (its redrawn values last)")
    tail = (1 - level) / 2
    low, high = np.quantile(redrawn, [tail, 1 - tail]) - redrawn.mean()
    return Interval(value, value + float(low), value + float(high))


def _per_seed(values: Any, name: str) -> np.ndarray:
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(
            f"{name} has shape {x.shape}; give a list with one number a seed, at "
            f"least one."
        )
    check_finite(x, name, "A seed that diverged must be reported, not averaged.")
    return x
