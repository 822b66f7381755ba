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
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax import flows, train
from tmdjax.core import files, prng, trees
from tmdjax.core.checks import check_choice, check_count, check_range
from tmdjax.core.conventions import time_like
from tmdjax.core.types import ApplyFn, Array, Cond, Data, Grid, Params, Velocity

WEIGHTS = ("unit", "width2")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A time grid found on the knots of a fine trajectory.

    Attributes:
        index: knots walked, int [K + 1], from 0 to the last.
        knots: times of all knots, from 1 to 0.
        cost: sum of local errors along it, in the units of the metric.
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
    budgets: int | Iterable[int],
    cond: Cond = None,
    *,
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

    The matrix costs ``len(keys) * K_max`` evaluations of the velocity (an order of
    100 x 100), the dynamic programme microseconds.

    Args:
        velocity: ``(x, t, cond) -> v``; a guided model as it will be sampled.
        keys: typed keys [samples] of the noise, about 100.
        shape: of one sample.
        budgets: K, or several; one number means 1, ..., K.
        cond: pytree of [samples, ...], or None.
        knots: number of fine uniform steps K_max, or the fine times themselves.
        metric: per-sample cost of an estimate, ``(estimate, target) -> [batch]``.
        method: solver whose steps are judged; the fine trajectory stays Euler's.
        future_weight: see :func:`tmdjax.flows.cheapest_paths`.
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
    wanted = [budgets] if isinstance(budgets, int) else list(budgets)
    for budget in wanted:
        flows.check_budget(budget, len(fine) - 1)
    if isinstance(budgets, int):
        wanted = range(1, budgets + 1)
    check_range("future_weight", future_weight, 0, open_low=True)

    def compute() -> np.ndarray:
        return flows.local_error_costs(
            velocity,
            keys,
            shape,
            cond,
            knots=fine,
            metric=metric,
            method=method,
            micro_batch=micro_batch,
            memory_limit=memory_limit,
            dtype=dtype,
        )

    if cache is None:
        costs = compute()
    else:
        flows.check_velocity(velocity, (1, *shape), dtype, _first(cond))
        content = _fingerprint(velocity, keys, shape, cond, fine, metric, method, dtype)
        costs = files.cached_array(cache, content, compute)
    paths = flows.cheapest_paths(costs, max(wanted), future_weight=future_weight)
    scale = flows.guidance_scale(velocity)
    schedules = {
        k: Schedule(paths.index[k - 1], fine, float(paths.cost[k - 1]), scale)
        for k in wanted
    }
    if polish:
        noise = prng.normal(keys, shape, dtype)
        schedules = {
            k: polish_schedule(velocity, noise, schedule, costs, cond)
            for k, schedule in schedules.items()
        }
    return Search(schedules, costs)


def _first(cond: Cond) -> Cond:
    return jax.tree.map(lambda c: c[:1], cond)


def _fingerprint(
    velocity: Velocity,
    keys: Any,
    shape: tuple[int, ...],
    cond: Cond,
    knots: Grid,
    metric: flows.Metric,
    method: str,
    dtype: Any,
) -> str:
    """Hash of the inputs, and of what velocity and metric give at every knot."""
    rows = np.arange(len(knots) - 1) % len(keys)
    probe = (keys[rows], jnp.asarray(knots[:-1], dtype), trees.take(cond, rows))

    @jax.jit
    def evaluate(velocity: Any, probe: Any) -> tuple[Array, Array]:
        def one(item: Any) -> tuple[Array, Array]:
            key, t, c = jax.tree.map(lambda leaf: leaf[None], item)
            x = prng.normal(key, shape, dtype)
            v = velocity(x, t, c)
            return v, metric(x - v.astype(dtype), x)

        return jax.lax.map(one, probe)

    values = evaluate(flows.as_pytree(velocity), probe)
    inputs = {
        "values": values,
        "keys": jax.random.key_data(keys),
        "cond": cond,
        "knots": knots,
        "method": np.frombuffer(method.encode(), np.uint8),
    }
    return trees.content_hash(inputs)


def polish_schedule(
    velocity: Velocity,
    noise: Data,
    schedule: Schedule,
    costs: Any,
    cond: Cond = None,
    *,
    strides: Sequence[int] = (8, 4, 2, 1),
) -> Schedule:
    """Coordinate descent on the measured terminal error.

    Local errors add up differently than they are counted, and at small K the
    Bellman grid can lose to the uniform one. Starting from the better of the two,
    one inner knot after the other moves by each stride while that helps. A
    candidate costs K evaluations a sample.

    Args:
        velocity: ``(x, t, cond) -> v``.
        noise: [samples, *event], from which the errors are measured.
        schedule: where to start.
        costs: [knot, knot], to report the objective of the outcome.
        cond: pytree of [samples, ...], or None.
        strides: knots to move by, coarse to fine.

    Returns:
        A schedule whose mean terminal error on these samples is no larger than that
        of the given one and of the uniform one.
    """
    n, k = len(schedule.knots) - 1, len(schedule.index) - 1
    reference = flows.endpoints(velocity, noise, schedule.knots, cond)
    uniform = np.rint(np.linspace(0, n, k + 1)).astype(int)
    known: dict[tuple[int, ...], float] = {}

    def error(candidates: list[np.ndarray]) -> list[float]:
        new = [c for c in candidates if tuple(c) not in known]
        if new:
            padded = (new * 2)[:2]  # always two: one compilation
            grids = [schedule.knots[c] for c in padded]
            errors = flows.terminal_errors(velocity, noise, reference, grids, cond)
            found = errors.mean(1)
            known.update((tuple(c), float(e)) for c, e in zip(padded, found))
        return [known[tuple(c)] for c in candidates]

    candidates = [np.asarray(schedule.index), uniform]
    best = candidates[int(np.argmin(error(candidates)))]
    for stride in strides:
        moved = True
        while moved:
            moved = False
            for i in range(1, k):
                steps = stride * np.eye(k + 1, dtype=int)[i]
                near = [best - steps, best + steps]
                near = [c for c in near if (np.diff(c) > 0).all()]
                found = error(near)
                if found and min(found) < known[tuple(best)]:
                    best, moved = near[int(np.argmin(found))], True
    cost = flows.path_cost(costs, best)
    return dataclasses.replace(schedule, index=best, cost=cost)


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

    Raises:
        ValueError: no schedule, or schedules on different knots.
    """
    schedules = list(schedules)
    if not schedules:
        raise ValueError("there is no schedule to keep states for; give at least one.")
    knots = schedules[0].knots
    for schedule in schedules:
        _check_knots(schedule, knots)
    index = np.unique(np.concatenate([s.index for s in schedules]))
    size = min(check_count("micro_batch", micro_batch), len(keys))
    parts = []
    for rows, counted in flows.micro_batches(len(keys), size):
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
    error = jnp.square(predicted - chord)
    loss = jnp.mean(error, axis=tuple(range(1, error.ndim)))
    return (loss * width**2 if weight == "width2" else loss), {}


def straighten(
    params: Params,
    apply_fn: ApplyFn,
    chords: Mapping[str, Any],
    *,
    weight: str = "unit",
    **options: Any,
) -> train.FineTuned:
    """Regresses a network onto chords; it is then defined at their times only.

    For LoRA hand in adapters and :func:`tmdjax.models.lora.apply_fn` of the network.

    Args:
        params: of the pretrained network, or adapters.
        apply_fn: ``(params, x, t, cond) -> v``.
        chords: training chords, from :func:`chords` and :func:`split`.
        weight: see :func:`straightening_loss`.
        **options: of :func:`tmdjax.train.fine_tune`.

    Raises:
        ValueError: a chord without width.
    """
    check_choice("weight", weight, WEIGHTS)
    check_chords(chords)

    def loss(params: Params, batch: Any, keys: Any) -> Any:
        del keys
        return straightening_loss(params, apply_fn, batch, weight=weight)

    return train.fine_tune(params, loss, chords, **options)


def sample(
    velocity: Velocity,
    noise: Data,
    grid: Schedule | Grid | None = None,
    cond: Cond = None,
    *,
    trained_on: Any = None,
    allow_grid_mismatch: bool = False,
    method: str = "euler",
) -> Data:
    """Samples on a grid; a straightened model only on the grid it was made for.

    Args:
        velocity: ``(x, t, cond) -> v``, e.g. ``functools.partial(apply_fn, params)``.
        noise: [batch, *event] at t = 1.
        grid: schedule or times; None takes ``trained_on``.
        cond: pytree of [batch, ...], or None.
        trained_on: times that a straightened model was trained at, as its checkpoint
            carries them (``meta["grid"]``); None for any other model.
        allow_grid_mismatch: walk another grid all the same.
        method: solver; 'heun' and 'midpoint' cost two evaluations a step.

    Returns:
        [batch, *event] at t = 0.

    Raises:
        ValueError: no grid, or another one than the model was trained on.

    Warns:
        UserWarning: the schedule was searched under another guidance scale.
    """
    if grid is None:
        grid = trained_on
    if grid is None:
        raise ValueError("give a grid, or the times that the model was trained_on.")
    times = flows.custom_grid(grid.times if isinstance(grid, Schedule) else grid)
    if trained_on is not None and not allow_grid_mismatch:
        if not np.array_equal(times, np.asarray(trained_on)):
            raise ValueError(
                f"this model was straightened on the times "
                f"{np.round(trained_on, 4).tolist()} and knows no others, but the grid "
                f"is {np.round(times, 4).tolist()}. Leave the grid out, or set "
                f"allow_grid_mismatch=True."
            )
    if isinstance(grid, Schedule):
        scale = flows.guidance_scale(velocity)
        if scale != grid.guidance_scale:
            warnings.warn(
                f"the schedule was searched at guidance scale {grid.guidance_scale}, "
                f"but the model is sampled at {scale}: its step sizes are those of "
                f"another flow. Search again on the guided velocity.",
                UserWarning,
                stacklevel=2,
            )
    return flows.endpoints(velocity, noise, times, cond, method=method)
