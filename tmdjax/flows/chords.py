"""Straightening data: the chords of fine trajectories between chosen knots.

A chord joins two states of one trajectory, z0 at t0 and z1 at t1 < t0. A velocity
that equals (z0 - z1) / (t0 - t1) at (z0, t0) lands on z1 in one Euler step.

References:
    Nguyen et al., arXiv 2312.16414, eq. 9.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax.core import trees
from tmdjax.core.checks import check_choice, check_count, check_output, check_range
from tmdjax.core.conventions import time_like
from tmdjax.core.functions import as_pytree
from tmdjax.core.types import ApplyFn, Array, Grid, Params, Velocity
from tmdjax.flows.reference import states_at
from tmdjax.flows.rollout import start_noise
from tmdjax.flows.step_search import (
    Schedule,
    check_samples,
    checked,
    micro_batches,
    squared_l2,
)
from tmdjax.flows.velocities import SAME_TIME

WEIGHTS = ("unit", "width2")
"""How the straightening loss weighs chords of different widths."""


class FineStates(NamedTuple):
    """States of fine trajectories at chosen knots.

    Attributes:
        states: [kept, samples, *event] float32, on the host.
        index: the kept knots, int [kept], from 0 to the last.
        knots: times of all knots.
        cond: [samples, ...], or None.
    """

    states: np.ndarray
    index: np.ndarray
    knots: Grid
    cond: Any


def fine_states(
    velocity: Velocity,
    keys: Any,
    shape: tuple[int, ...],
    schedules: Iterable[Schedule],
    cond: Any = None,
    *,
    micro_batch: int = 500,
) -> FineStates:
    """Simulates once, and keeps what the straightening of every schedule needs.

    Args:
        velocity: the pretrained model.
        keys: [samples] typed keys, 5,000 in the paper, or the noise [samples, *shape].
        shape: of one sample.
        schedules: on the same knots.
        cond: [samples, ...], or None.
        micro_batch: trajectories at a time.

    The kept states, ``4 * samples * kept * event`` bytes, stay on the host; their
    chords (:func:`chords`, :func:`split`) take up to four times that of one schedule.

    Raises:
        TypeError: a velocity that does not return floats.
        ValueError: a velocity of another shape than its state; no schedule, schedules
            on different knots, conditions of another batch.
    """
    schedules = list(schedules)
    if not schedules:
        raise ValueError("there is no schedule to keep states for; give at least one.")
    knots = schedules[0].knots
    for schedule in schedules:
        _check_knots(schedule, knots)
    index = np.unique(np.concatenate([s.index for s in schedules]))
    count = check_samples(keys, cond)
    size = min(check_count("micro_batch", micro_batch), count)
    parts = []
    for rows, counted in micro_batches(count, size):
        own_keys, own_cond = trees.take((keys, cond), rows)
        noise = start_noise(own_keys, shape)
        kept = states_at(velocity, noise, knots, index, own_cond)
        parts.append(np.asarray(kept)[:, :counted])
    return FineStates(np.concatenate(parts, 1), index, knots, cond)


def _check_knots(schedule: Schedule, knots: Grid) -> None:
    if not np.array_equal(schedule.knots, knots):
        ours, theirs = (
            f"{len(k) - 1} steps, hash {trees.content_hash(k)[:8]}"
            for k in (schedule.knots, knots)
        )
        raise ValueError(
            f"the schedule lies on other knots ({ours}) than the fine states "
            f"({theirs}); search and simulate with the same knots."
        )


def chords(fine: FineStates, schedule: Schedule) -> dict[str, Any]:
    """The regression set of one schedule: K chords a sample, pooled.

    Returns:
        Arrays [samples * K, ...]: 'x' at time 't', 'x_next' at 't_next' < t, and
        'cond' where there are conditions.

    Raises:
        ValueError: a schedule on other knots, or through one that was not kept.
    """
    _check_knots(schedule, fine.knots)
    missing = np.setdiff1d(schedule.index, fine.index)
    if missing.size:
        raise ValueError(
            f"the schedule passes knot {missing[0]}, of which no states were kept "
            f"(kept: {fine.index.tolist()}); give it to fine_states too."
        )
    place = np.searchsorted(fine.index, schedule.index)
    samples, steps = fine.states.shape[1], len(place) - 1

    def pooled(states: np.ndarray) -> np.ndarray:
        return states.reshape(-1, *states.shape[2:])

    found = {
        "x": pooled(fine.states[place[:-1]]),
        "x_next": pooled(fine.states[place[1:]]),
        "t": np.repeat(schedule.times[:-1], samples).astype(np.float32),
        "t_next": np.repeat(schedule.times[1:], samples).astype(np.float32),
    }
    if fine.cond is not None:
        found["cond"] = np.concatenate([np.asarray(fine.cond)] * steps)
    return found


def check_chords(chords: Mapping[str, Any], schedule: Schedule | None = None) -> None:
    """Checks chords that may come from elsewhere.

    Raises:
        ValueError: a chord without width (a knot given twice), or one that does not
            begin and end at times of the schedule, if one is given.
    """
    flat = np.flatnonzero(np.asarray(chords["t"]) <= np.asarray(chords["t_next"]))
    if flat.size:
        i = int(flat[0])
        raise ValueError(
            f"chord {i} goes from t={chords['t'][i]} to t_next={chords['t_next'][i]}; "
            f"t_next must be smaller. Is a knot in the grid twice?"
        )
    if schedule is None:
        return
    times = schedule.times
    for name, allowed in (("t", times[:-1]), ("t_next", times[1:])):
        found = np.unique(np.asarray(chords[name]))
        other = found[np.abs(found[:, None] - allowed).min(1) > SAME_TIME]
        if other.size:
            raise ValueError(
                f"chords have {name}={other[0]:.6g}, which is not in the schedule "
                f"{np.round(times, 4).tolist()}; make them with chords() of this "
                f"schedule."
            )


def split(
    chords: dict[str, Any], key: Any, eval_fraction: float = 0.1
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Chords for training and for evaluation, drawn at random from the pool.

    Args:
        chords: {name: [n, ...]}, from :func:`chords`.
        key: typed key of the draw.
        eval_fraction: share of the second part, rounded down, in [0, 1).

    Raises:
        ValueError: a share out of range, or a chord without width.
    """
    check_range("eval_fraction", eval_fraction, 0, 1, open_high=True)
    check_chords(chords)
    count = len(chords["t"])
    order = np.asarray(jax.random.permutation(key, count))
    held = int(eval_fraction * count)
    return (
        {name: array[order[held:]] for name, array in chords.items()},
        {name: array[order[:held]] for name, array in chords.items()},
    )


def straightening_loss(
    params: Params,
    apply_fn: ApplyFn,
    batch: Mapping[str, Any],
    *,
    weight: str = "unit",
) -> tuple[Array, dict[str, Array]]:
    """Mean squared error of the velocity to the chord (z0 - z1) / (t0 - t1).

    Args:
        params: nested dict.
        apply_fn: ``(params, x, t, cond) -> v``.
        batch: 'x' at time 't', 'x_next' at 't_next' and, if there is one, 'cond', as
            :func:`chords` makes them.
        weight: 'unit', every chord alike, or 'width2', by the squared width of its
            interval: then the loss is the error of the step's landing point.

    Returns:
        loss [batch], mean over event dimensions, and no metrics.

    References:
        arXiv 2312.16414, eq. 9.
    """
    check_choice("weight", weight, WEIGHTS)
    x, t = jnp.asarray(batch["x"]), jnp.asarray(batch["t"])
    width = t - batch["t_next"]
    chord = (x - batch["x_next"]) / time_like(width, x)
    predicted = check_output(apply_fn(params, x, t, batch.get("cond")), x)
    error = jnp.square(predicted - chord)
    loss = jnp.mean(error, axis=tuple(range(1, error.ndim)))
    return (loss * width**2 if weight == "width2" else loss), {}


def landing_errors(velocity: Velocity, chords: Mapping[str, Any]) -> Array:
    """Squared distance [n] between one Euler step along each chord and its end.

    Args:
        velocity: ``(x, t, cond) -> v``.
        chords: 'x' at time 't', 'x_next' at 't_next' and, if there is one, 'cond', as
            :func:`chords` makes them.

    Returns:
        [n] float32, summed over event dimensions.
    """
    return _landing_errors(as_pytree(velocity), dict(chords))


@jax.jit
def _landing_errors(velocity: Any, chords: dict[str, Any]) -> Array:
    x, t = jnp.asarray(chords["x"]), jnp.asarray(chords["t"])
    v = checked(velocity)(x, t, chords.get("cond"))
    return squared_l2(x - time_like(t - chords["t_next"], x) * v, chords["x_next"])
