"""BOSS: Bellman-optimal step sizes for a flow model, then straightening.

Two pieces, for any velocity and any budget of K Euler steps. :func:`search` finds
K + 1 times by dynamic programming over the model's own fine trajectories; no
training. :func:`straighten` then regresses the model, at those times alone, onto
the chords between them, so that K Euler steps land where the fine solver lands.

The paper's time tau runs from noise to data, with velocity u: tau = 1 - t, u = -v.

References:
    Nguyen et al., "Bellman Optimal Stepsize Straightening of Flow-Matching Models",
    ICLR 2024, arXiv 2312.16414.
"""

import dataclasses
import functools
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax import flows, train
from tmdjax.core import files, prng, trees
from tmdjax.core.checks import check_choice, check_count, check_range, check_same_shape
from tmdjax.core.conventions import time_like
from tmdjax.core.types import ApplyFn, Array, Cond, Data, Grid, Params, Velocity

WEIGHTS = ("unit", "width2")


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A time grid found on the knots of a fine trajectory.

    Attributes:
        index: knots walked, int [K + 1], from 0 to the last.
        knots: times of all knots, from 1 to 0.
        cost: sum of its local errors, in the units of the metric.
        guidance_scale: of the velocity that was searched.
    """

    index: np.ndarray
    knots: Grid
    cost: float
    guidance_scale: float = 1.0

    @property
    def times(self) -> Grid:
        """The grid, [K + 1] from exactly 1 to exactly 0."""
        return self.knots[self.index]


class Search(NamedTuple):
    """What a search found.

    Attributes:
        schedules: by budget K.
        costs: [knot, knot], mean local error of each jump.
    """

    schedules: dict[int, Schedule]
    costs: np.ndarray


def search(
    velocity: Velocity,
    keys: Any,
    shape: tuple[int, ...],
    budgets: SupportsIndex | Iterable[SupportsIndex],
    cond: Cond = None,
    *,
    samples: int = 100,
    knots: Any = 100,
    metric: flows.Metric = flows.squared_l2,
    method: str = "euler",
    future_weight: float = 1.0,
    polish: bool = False,
    micro_batch: int | None = None,
    memory_limit: float = 4e9,
    cache: str | os.PathLike | None = None,
    dtype: Any = jnp.float32,
) -> Search:
    """Finds the Bellman-optimal grids of all budgets from one cost matrix.

    The matrix costs samples times K_max evaluations of the velocity, by default
    100 x 100; the dynamic programme costs microseconds.

    Args:
        velocity: ``(x, t, cond) -> v``; a guided model as it will be sampled.
        keys: typed keys [samples] of the noise, or one key to draw them from.
        shape: of one sample.
        budgets: K, or several; one number means 1, ..., K.
        cond: pytree of [samples, ...], or None.
        samples: how many, where one key is given.
        knots: number of fine uniform steps K_max, or the fine times themselves.
        metric: per-sample cost of an estimate, ``(estimate, target) -> [batch]``.
        method: solver whose steps are judged; the fine trajectory stays Euler's.
        future_weight: see :func:`tmdjax.flows.cheapest_paths`. Costs of the schedules
            are plain sums all the same.
        polish: follow up with :func:`polish_schedule`.
        micro_batch: trajectories at a time; None takes as many as fit.
        memory_limit: bytes for them, see :func:`tmdjax.flows.cost_memory`.
        cache: .npz file that keeps the matrix. It is used again only if model,
            noise, conditions, knots and metric give the same values on a probe.
        dtype: of the states; float64 under x64.

    Raises:
        ValueError: a budget outside [1, K_max], bad knots or costs, memory.
        TypeError: a velocity that does not return floats like its state.
        NotImplementedError: knots from a table that adds noise.
    """
    fine = flows.fine_knots(knots)
    several = isinstance(budgets, Iterable)
    wanted = list(budgets) if several else [budgets]
    wanted = [flows.check_budget(budget, len(fine) - 1) for budget in wanted]
    if not wanted:
        raise ValueError("budgets is empty; give one K or more.")
    check_range("future_weight", future_weight, 0, open_low=True)
    check_choice("method", method, flows.METHODS)
    prng.check_key(keys, "keys")
    if not keys.ndim:
        keys = prng.sample_keys(keys, check_count("samples", samples))
    count = flows.check_samples(keys, cond)
    options = {"knots": fine, "metric": metric, "method": method, "dtype": dtype}
    batch = flows.fitting_batch(count, shape, fine, micro_batch, memory_limit, dtype)
    first = trees.take(cond, slice(1))
    flows.check_velocity(velocity, (1, *shape), dtype, first)

    def compute() -> np.ndarray:
        return flows.local_error_costs(
            velocity,
            keys,
            shape,
            cond,
            micro_batch=batch,
            memory_limit=memory_limit,
            **options,
        )

    if cache is None:
        costs = compute()
    else:
        content = flows.costs_fingerprint(velocity, keys, shape, cond, **options)
        costs = files.cached_array(cache, content, compute)
    paths = flows.cheapest_paths(costs, max(wanted), future_weight=future_weight)
    scale = flows.guidance_scale(velocity)
    schedules = {}
    for k in wanted if several else range(1, wanted[0] + 1):
        index = paths.index[k - 1]
        found = Schedule(index, fine, flows.path_cost(costs, index), scale)
        if polish:
            noise = prng.normal(keys, shape, dtype)
            found = polish_schedule(
                velocity, noise, found, costs, cond, micro_batch=batch
            )
        schedules[k] = found
    return Search(schedules, costs)


def polish_schedule(
    velocity: Velocity,
    noise: Data,
    schedule: Schedule,
    costs: Any,
    cond: Cond = None,
    **options: Any,
) -> Schedule:
    """Improves a schedule by the terminal error itself.

    Local errors add up differently than they are counted, and at small K the
    Bellman grid can lose to the uniform one.

    Args:
        velocity: ``(x, t, cond) -> v``.
        noise: [samples, *event], from which errors are measured.
        schedule: where to start; the knots nearest to the uniform grid are the other
            start.
        costs: [knot, knot], to report the cost of the outcome.
        cond: pytree of [samples, ...], or None.
        **options: of :func:`tmdjax.flows.descend_on_error`.

    Returns:
        A schedule whose mean terminal error on these samples is no larger than that
        of either start.
    """
    steps = len(schedule.knots) - 1, len(schedule.index)
    uniform = np.rint(np.linspace(0, steps[0], steps[1])).astype(int)
    starts = [schedule.index, uniform]
    index = flows.descend_on_error(
        velocity, noise, schedule.knots, starts, cond, **options
    )
    cost = flows.path_cost(costs, index)
    return dataclasses.replace(schedule, index=index, cost=cost)


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
        keys: [samples] typed keys, 5,000 in the paper.
        shape: of one sample.
        schedules: on the same knots.
        cond: [samples, ...], or None.
        micro_batch: trajectories at a time.

    The kept states, ``4 * samples * kept * event`` bytes, stay on the host; their
    chords (:func:`chords`, :func:`split`) take up to four times that of one schedule.

    Raises:
        TypeError: a velocity that does not return floats like its state.
        ValueError: no schedule, schedules on different knots, conditions of another
            batch.
    """
    schedules = list(schedules)
    if not schedules:
        raise ValueError("there is no schedule to keep states for; give at least one.")
    knots = schedules[0].knots
    for schedule in schedules:
        _check_knots(schedule, knots)
    index = np.unique(np.concatenate([s.index for s in schedules]))
    count = flows.check_samples(keys, cond)
    size = min(check_count("micro_batch", micro_batch), count)
    parts = []
    for rows, counted in flows.micro_batches(count, size):
        noise = prng.normal(keys[rows], shape)
        kept = flows.states_at(velocity, noise, knots, index, trees.take(cond, rows))
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


def check_chords(chords: Mapping[str, Any]) -> None:
    """Raises ValueError where a chord has no width (a knot given twice)."""
    flat = np.flatnonzero(np.asarray(chords["t"]) <= np.asarray(chords["t_next"]))
    if flat.size:
        i = int(flat[0])
        raise ValueError(
            f"chord {i} goes from t={chords['t'][i]} to t_next={chords['t_next'][i]}; "
            f"t_next must be smaller. Is a knot in the grid twice?"
        )


def split(
    chords: dict[str, Any], key: Any, eval_fraction: float = 0.1
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Chords for training and for evaluation, drawn at random from the pool."""
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
        batch: chords, see :func:`chords`.
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
    predicted = apply_fn(params, x, t, batch.get("cond"))
    check_same_shape("the velocity", predicted, "its state x", x)
    error = jnp.square(predicted - chord)
    loss = jnp.mean(error, axis=tuple(range(1, error.ndim)))
    return (loss * width**2 if weight == "width2" else loss), {}


class Straightened(NamedTuple):
    """A network that knows the times of one grid, and no others.

    Attributes:
        params: averaged parameters.
        raw_params: the last ones, not averaged.
        times: the grid, [K + 1].
    """

    params: Params
    raw_params: Params
    times: Grid

    def velocity(self, apply_fn: ApplyFn) -> Velocity:
        """The velocity, bound to its grid; see :func:`on_grid`."""
        return on_grid(functools.partial(apply_fn, self.params), self.times)


def straighten(
    params: Params,
    apply_fn: ApplyFn,
    chords: Mapping[str, Any],
    schedule: Schedule,
    *,
    weight: str = "unit",
    **options: Any,
) -> Straightened:
    """Regresses a network onto chords; it is then defined at their times only.

    The network runs as it is sampled, without dropout (the paper's code trains with
    it). Guidance is absorbed: chords of a guided teacher are met by one evaluation.

    Args:
        params: of the pretrained network, or adapters.
        apply_fn: ``(params, x, t, cond) -> v``; arrays that it holds by
            ``functools.partial``, such as the base of
            :func:`tmdjax.models.lora.apply_fn`, are not compiled in.
        chords: training chords, from :func:`chords` and :func:`split`.
        schedule: that the chords were made for.
        weight: see :func:`straightening_loss`.
        **options: of :func:`tmdjax.train.fine_tune`.

    Raises:
        ValueError: a chord without width, or of another schedule.
    """
    check_choice("weight", weight, WEIGHTS)
    check_chords(chords)
    for name, times in (("t", schedule.times[:-1]), ("t_next", schedule.times[1:])):
        found = np.unique(np.asarray(chords[name]))
        other = found[np.abs(found[:, None] - times).min(1) > _SAME_TIME]
        if other.size:
            raise ValueError(
                f"chords have {name}={other[0]:.6g}, which is not in the schedule "
                f"{np.round(schedule.times, 4).tolist()}; make them with chords() of "
                f"this schedule."
            )

    def loss(params: Params, batch: Any, keys: Any, apply_fn: ApplyFn) -> Any:
        del keys
        return straightening_loss(params, apply_fn, batch, weight=weight)

    tuned = train.fine_tune(
        params, loss, chords, constants=flows.as_pytree(apply_fn), **options
    )
    return Straightened(*tuned, schedule.times)


_SAME_TIME = 1e-6


def on_grid(velocity: Velocity, times: Any) -> Velocity:
    """A straightened velocity with the times it knows, for :func:`sample`.

    Args:
        velocity: ``(x, t, cond) -> v``.
        times: a schedule, or times [K + 1] (``meta["grid"]`` of a finished run).
    """
    times = times.times if isinstance(times, Schedule) else times
    return functools.partial(_on_grid, velocity, flows.custom_grid(times))


def _on_grid(velocity: Velocity, times: Any, x: Data, t: Any, cond: Cond) -> Data:
    del times
    return velocity(x, t, cond)


def _own_times(velocity: Any) -> Grid | None:
    if isinstance(velocity, functools.partial):
        if velocity.func is _on_grid:
            return velocity.args[1]
        inner = (velocity.func, *velocity.args)
        return next((t for v in inner if (t := _own_times(v)) is not None), None)
    return None


def sample(
    velocity: Velocity,
    noise: Data,
    grid: Schedule | Grid | None = None,
    cond: Cond = None,
    *,
    allow_grid_mismatch: bool = False,
    method: str = "euler",
) -> Data:
    """Samples on a grid; a straightened model only on the grid it was made for.

    Args:
        velocity: ``(x, t, cond) -> v``, e.g. ``functools.partial(apply_fn, params)``,
            or one that carries its grid (:func:`on_grid`).
        noise: [batch, *event] at t = 1.
        grid: schedule or times; None takes the grid that the velocity carries.
        cond: pytree of [batch, ...], or None.
        allow_grid_mismatch: walk another grid than the velocity's own all the same.
        method: solver; 'heun' and 'midpoint' cost two evaluations a step.

    Returns:
        [batch, *event] at t = 0.

    Raises:
        ValueError: no grid, or another one than the model was trained on.

    Warns:
        UserWarning: guidance at another scale than the schedule was searched at, or
            around a straightened model, which has absorbed its teacher's.
    """
    own = _own_times(velocity)
    if grid is None:
        grid = own
    if grid is None:
        raise ValueError("give a grid: this velocity carries none (see on_grid).")
    times = flows.custom_grid(grid.times if isinstance(grid, Schedule) else grid)
    if own is not None and not allow_grid_mismatch:
        same = len(own) == len(times) and np.abs(own - times).max() <= _SAME_TIME
        if not same:
            raise ValueError(
                f"this model was straightened on the times {np.round(own, 4).tolist()} "
                f"and knows no others, but the grid is {np.round(times, 4).tolist()}. "
                f"Leave the grid out, or set allow_grid_mismatch=True."
            )
    scale = flows.guidance_scale(velocity)
    searched = grid.guidance_scale if isinstance(grid, Schedule) else scale
    if own is not None and scale != 1:
        warnings.warn(
            f"guidance of scale {scale} is wrapped around a straightened model, which "
            f"has absorbed its teacher's; sample it without.",
            UserWarning,
            stacklevel=2,
        )
    elif own is None and scale != searched:
        warnings.warn(
            f"the schedule was searched at guidance scale {searched}, but the model "
            f"is sampled at {scale}: its step sizes are those of another flow. Search "
            f"again on the guided velocity.",
            UserWarning,
            stacklevel=2,
        )
    return flows.endpoints(velocity, noise, times, cond, method=method)
