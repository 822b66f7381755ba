"""How long a rollout follows the truth, and how its error grows.

Arrays are as a scan stacks them, [time, batch, *field]; all is float64 on the host.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tmdjax.core.checks import check_count, check_range, check_same_shape


class HighCorrelationTime(NamedTuple):
    """When predictions stopped following the truth, of one rollout or of each.

    Attributes:
        time: until the first crossing, in units of dt.
        censored: bool, no crossing was seen: the true time is longer.
        count: how many steps are above the threshold at all (the statistic of
            PDE-Refiner's code, not less than that of the first crossing), in units of
            dt.
    """

    time: Any
    censored: Any
    count: Any


def pearson_correlation(prediction: Any, target: Any, leading: int = 2) -> np.ndarray:
    """Pearson's r of two fields over space and channels.

    Args:
        prediction: [*leading, *field], such as [time, batch, *space, channel].
        target: of the same shape.
        leading: axes that are kept, >= 0.

    Returns:
        float64 [*leading] in [-1, 1]; 0 where a field is constant, and where a value is
        not finite: a rollout that broke agrees with nothing.

    Raises:
        ValueError: other shapes, or no axis that is left to correlate over.
    """
    check_same_shape("prediction", prediction, "target", target)
    product = _standard(prediction, leading) * _standard(target, leading)
    return np.asarray(product.sum(-1))


def ensemble_correlation(ensemble: Any, leading: int = 2) -> np.ndarray:
    """Mean of Pearson's r over all pairs of members: how sure an ensemble is.

    The time at which it falls below a threshold is what an ensemble says of the time
    for which it can be relied on (PDE-Refiner, arXiv 2308.05732, section 4.2).

    Args:
        ensemble: [member, *leading, *field], such as
            [member, time, batch, *space, channel]; at least two members.
        leading: axes after the members that are kept, >= 0.

    Returns:
        float64 [*leading]; a constant or broken member correlates with none.

    Raises:
        ValueError: fewer than two members, or no axis that is left to correlate over.
    """
    unit = _standard(ensemble, leading + 1)
    members = len(unit)
    if members < 2:
        raise ValueError(
            f"the ensemble has {members} member(s), and a pair needs 2; give "
            f"[member, time, batch, *space, channel]."
        )
    own = np.square(unit).sum((0, -1))
    both = np.square(unit.sum(0)).sum(-1)
    return np.asarray((both - own) / (members * (members - 1)))


def high_correlation_time(
    correlation: Any,
    threshold: float = 0.8,
    dt: Any = 1.0,
    *,
    interpolate: bool = False,
) -> HighCorrelationTime:
    """How long a correlation stays above a threshold, from the start.

    The published statistic takes one curve, the mean over rollouts:
    ``high_correlation_time(correlation.mean(1))``; a time of each rollout, for
    intervals and ensembles, takes [time, batch].

    Args:
        correlation: [time] or [time, batch], of the predictions after 1, 2, ... steps.
            NaN is below every threshold.
        threshold: in (-1, 1).
        dt: time between predictions, > 0: a scalar, or [batch] where it differs.
        interpolate: place the crossing on the straight line between two steps (the
            correlation at the start is 1), where it would be that of the step before.

    Returns:
        Three numbers, or three arrays [batch], in units of ``dt``.

    Raises:
        ValueError: a number out of range, other axes, no step, or a ``dt`` of each
            rollout beside one curve (the average of curves with different steps has no
            time).
    """
    r, dt = np.asarray(correlation, np.float64), np.asarray(dt, np.float64)
    check_range("threshold", threshold, -1, 1, open_low=True, open_high=True)
    if r.ndim not in (1, 2) or not len(r):
        raise ValueError(
            f"correlation has shape {r.shape}; give [time] or [time, batch], with at "
            f"least one step."
        )
    if dt.ndim and dt.shape != r.shape[1:]:
        raise ValueError(
            f"dt has shape {dt.shape} and correlation {r.shape}; give one time step, "
            f"or one a rollout beside correlations [time, batch]."
        )
    if not np.all((dt > 0) & np.isfinite(dt)):
        raise ValueError(f"dt={dt} must be positive and finite.")
    above = r > threshold
    censored = above.all(0)
    first = np.where(censored, len(r), np.argmin(above, 0))
    steps = first.astype(np.float64)
    if interpolate:
        padded = np.concatenate([np.ones((1, *r.shape[1:])), r, r[-1:]])
        here = np.take_along_axis(padded, first[None], 0)[0]
        after = np.take_along_axis(padded, first[None] + 1, 0)[0]
        with np.errstate(invalid="ignore", divide="ignore"):
            part = (here - threshold) / (here - after)
        known = ~censored & np.isfinite(after)
        steps = steps + np.where(known, part, 0.0)
    return HighCorrelationTime(steps * dt, censored, above.sum(0) * dt)


def growth(error: Any, early: int, late: int | None = None) -> np.ndarray:
    """Mean error of the last steps over that of the first ones.

    Args:
        error: [time, ...], not negative.
        early: first steps, >= 1.
        late: last steps, >= 1; None takes as many as ``early``.

    Returns:
        float64 [...]; NaN where an error is, as it stands behind a rollout that broke.

    Raises:
        TypeError, ValueError: counts that are no integers, or more steps than there
            are.
    """
    error = np.asarray(error, np.float64)
    early = check_count("early", early)
    late = early if late is None else check_count("late", late)
    for name, count in (("early", early), ("late", late)):
        if not error.ndim or count > len(error):
            raise ValueError(
                f"{name}={count} steps of an error of shape {error.shape}; its first "
                f"axis is the time."
            )
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(error[-late:].mean(0) / error[:early].mean(0))


def horizon_errors(
    errors: Any, horizons: Sequence[tuple[int, int]]
) -> dict[str, float]:
    """Numbers of a table from the errors of steps; broken rollouts are counted.

    Args:
        errors: [time, batch], not negative; NaN from where a rollout broke.
        horizons: (first, one past the last) step of each row of the table; those that
            reach beyond the errors are left out.

    Returns:
        Of each span of steps: 'failed_{span}', the share of rollouts that broke before
        its end; 'mean_{span}' and 'median_{span}' of the errors of the others, averaged
        over its steps, NaN where all broke. Spans are named by their first and last
        step, counted from 1, such as '1_20': the horizons, and all steps; 'early' and
        'late' are the first and the last third of the steps. Of whole rollouts:
        'failed', the share that broke; 'growth', the error of the last third over that
        of the first, of those that did not.
    """
    errors = np.asarray(errors, np.float64)
    time, held = len(errors), np.isfinite(errors)
    third = max(time // 3, 1)
    spans = {
        f"{first + 1}_{last}": (first, last)
        for first, last in [*horizons, (0, time)]
        if last <= time
    }
    spans |= {"early": (0, third), "late": (time - third, time)}
    table = {"failed": float(1 - held.all(0).mean())}
    for name, (first, last) in spans.items():
        whole = held[:last].all(0)
        each = errors[first:last, whole].mean(0)
        table[f"failed_{name}"] = float(1 - whole.mean())
        table[f"mean_{name}"] = float(each.mean()) if each.size else float("nan")
        table[f"median_{name}"] = float(np.median(each)) if each.size else float("nan")
    whole = errors[:, held.all(0)]
    average = whole.mean(1) if whole.size else np.full(time, np.nan)
    table["growth"] = float(growth(average, third))
    return table


def _standard(field: Any, leading: int) -> np.ndarray:
    """Mean 0 and length 1 over all but the leading axes, flat; 0 without a pattern."""
    field = np.asarray(field)
    check_count("leading", leading, 0)
    if field.ndim <= leading:
        raise ValueError(
            f"a field has shape {field.shape}; after {leading} leading axes it has "
            f"none to correlate over."
        )
    flat = field.reshape(*field.shape[:leading], -1).astype(np.float64)
    finite = np.isfinite(flat).all(-1, keepdims=True)
    flat = np.where(finite, flat, 0.0)
    largest = np.abs(flat).max(-1, keepdims=True)
    flat = flat - flat.mean(-1, keepdims=True)
    size = np.sqrt(np.square(flat).sum(-1, keepdims=True))
    # what rounding leaves of a constant is no pattern
    varies = size > 1e-14 * largest * np.sqrt(flat.shape[-1])
    return np.where(varies, flat / np.where(varies, size, 1.0), 0.0)
