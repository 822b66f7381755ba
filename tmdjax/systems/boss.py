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

import jax.numpy as jnp
import numpy as np

from tmdjax import flows, train
from tmdjax.core import files, prng
from tmdjax.core.checks import check_choice, check_count, check_range
from tmdjax.core.types import ApplyFn, Cond, Data, Grid, Params, Velocity
from tmdjax.flows import Schedule
from tmdjax.flows.chords import SAME_TIME, WEIGHTS, check_chords
from tmdjax.flows.chords import FineStates as FineStates
from tmdjax.flows.chords import chords as chords
from tmdjax.flows.chords import fine_states as fine_states
from tmdjax.flows.chords import split as split
from tmdjax.flows.chords import straightening_loss as straightening_loss


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
    memory_limit: float = 2e9,
    cache: str | os.PathLike | None = None,
    dtype: Any = jnp.float32,
    guidance_scale: float | None = None,
) -> Search:
    """Finds the Bellman-optimal grids of all budgets from one cost matrix.

    The matrix costs samples times K_max evaluations of the velocity, by default
    100 x 100; the dynamic programme costs microseconds.

    Args:
        velocity: ``(x, t, cond) -> v``; a guided model as it will be sampled.
        keys: typed keys [samples] of the noise, one key to draw them from, or the noise
            itself [samples, *shape], drawn by other code.
        shape: of one sample.
        budgets: K, or several; one number means 1, ..., K.
        cond: pytree of [samples, ...], or None.
        samples: how many, where one key is given.
        knots: number of fine uniform steps K_max, or the fine times themselves.
        metric: per-sample cost of an estimate, ``(estimate, target) -> [batch]``.
        method: solver whose steps are judged; the fine trajectory stays Euler's.
        future_weight: multiplies the cost of all that comes after a jump (GITS takes
            1.15). Costs of the schedules are plain sums all the same.
        polish: follow up with :func:`polish_schedule`.
        micro_batch: trajectories at a time; None takes as many as fit.
        memory_limit: bytes for their states and velocities.
        cache: .npz file that keeps the matrix. It is used again only if model,
            noise, conditions, knots and metric give the same values on a probe.
        dtype: of the states; float64 under x64.
        guidance_scale: of the velocity, kept in the schedules; None takes that of a
            :class:`tmdjax.flows.Guided` one, and of others is unknown.

    Raises:
        ValueError: a budget outside [1, K_max], bad knots (or a table that adds
            noise), bad costs, memory; a velocity of another shape than its state.
        TypeError: a velocity that does not return floats.
    """
    fine = flows.fine_knots(knots)
    several = isinstance(budgets, Iterable)
    wanted = list(budgets) if several else [budgets]
    wanted = [flows.check_budget(budget, len(fine) - 1) for budget in wanted]
    if not wanted:
        raise ValueError("budgets is empty; give one K or more.")
    check_range("future_weight", future_weight, 0, open_low=True)
    check_choice("method", method, flows.METHODS)
    if not getattr(keys, "ndim", 1):
        prng.check_key(keys, "keys")
        keys = prng.sample_keys(keys, check_count("samples", samples))
    count = flows.check_samples(keys, cond)
    options = {"knots": fine, "metric": metric, "method": method, "dtype": dtype}
    batch = flows.fitting_batch(count, shape, fine, micro_batch, memory_limit, dtype)

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
    scale = flows.guidance_scale(velocity) if guidance_scale is None else guidance_scale
    schedules = {}
    for k in wanted if several else range(1, wanted[0] + 1):
        index = paths.index[k - 1]
        found = Schedule(index, fine, flows.path_cost(costs, index), scale)
        if polish:
            noise = flows.start_noise(keys, shape, dtype)
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
    steps, budget = len(schedule.knots) - 1, len(schedule.index) - 1
    starts = [schedule.index, flows.uniform_index(steps, budget)]
    index = flows.descend_on_error(
        velocity, noise, schedule.knots, starts, cond, **options
    )
    cost = flows.path_cost(costs, index)
    return dataclasses.replace(schedule, index=index, cost=cost)


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
        """The velocity with its grid, a :class:`tmdjax.flows.OnGrid`."""
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
        weight: 'unit', every chord alike, or 'width2', by the squared width of its
            interval.
        **options: of :func:`tmdjax.train.fine_tune`.

    Raises:
        ValueError: a chord without width, or of another schedule.
    """
    check_choice("weight", weight, WEIGHTS)
    check_chords(chords, schedule)

    def loss(params: Params, batch: Any, keys: Any, apply_fn: ApplyFn) -> Any:
        del keys
        return straightening_loss(params, apply_fn, batch, weight=weight)

    tuned = train.fine_tune(
        params, loss, chords, constants=flows.as_pytree(apply_fn), **options
    )
    return Straightened(*tuned, schedule.times)


def on_grid(velocity: Velocity, times: Any) -> Velocity:
    """A straightened velocity with the times it knows, for :func:`sample`.

    Args:
        velocity: ``(x, t, cond) -> v``.
        times: a schedule, or times [K + 1] (``meta["grid"]`` of a finished run).
    """
    times = times.times if isinstance(times, Schedule) else times
    times = flows.custom_grid(times)
    return flows.OnGrid(flows.as_pytree(velocity), tuple(times.tolist()))


def sample(
    velocity: Velocity,
    noise: Data,
    grid: Schedule | Grid | None = None,
    cond: Cond = None,
    *,
    allow_grid_mismatch: bool = False,
    method: str = "euler",
    guidance_scale: float | None = None,
) -> Data:
    """Samples on a grid; a straightened model only on the grid it was made for.

    Args:
        velocity: ``(x, t, cond) -> v``, e.g. ``functools.partial(apply_fn, params)``,
            or one that carries its grid (:func:`on_grid`).
        noise: [batch, *event] at t = 1.
        grid: schedule or times; None takes the grid that the velocity carries.
        cond: pytree of [batch, ...], or None.
        allow_grid_mismatch: walk another grid than the velocity's own, or by another
            solver than Euler's, all the same.
        method: solver, one of ``flows.SOLVERS``; 'heun' and 'midpoint' cost two
            evaluations a step, 'dpmpp_2m' and 'unipc' one.
        guidance_scale: of the velocity; None takes that of a
            :class:`tmdjax.flows.Guided` one, and of others is unknown.

    Returns:
        [batch, *event] at t = 0.

    Raises:
        ValueError: no grid, or another grid or solver than the model was trained for.

    Warns:
        UserWarning: guidance at another scale than the schedule was searched at, or
            around a straightened model, which has absorbed its teacher's.
    """
    carried = flows.around(velocity, flows.OnGrid)
    own = None if carried is None else np.array(carried.times)
    if grid is None:
        grid = own
    if grid is None:
        raise ValueError("give a grid: this velocity carries none (see on_grid).")
    times = flows.custom_grid(grid.times if isinstance(grid, Schedule) else grid)
    if own is not None and not allow_grid_mismatch:
        same = len(own) == len(times) and np.abs(own - times).max() <= SAME_TIME
        if not same:
            raise ValueError(
                f"this model was straightened on the times {np.round(own, 4).tolist()} "
                f"and knows no others, but the grid is {np.round(times, 4).tolist()}. "
                f"Leave the grid out, or set allow_grid_mismatch=True."
            )
        if method != "euler":
            raise ValueError(
                f"this model was straightened for Euler steps, and method={method!r} "
                f"takes others than those from {np.round(own[:-1], 4).tolist()}. Leave "
                f"the method out, or set allow_grid_mismatch=True."
            )
    if allow_grid_mismatch:
        velocity = flows.without(velocity, flows.OnGrid)
    scale = flows.guidance_scale(velocity) if guidance_scale is None else guidance_scale
    searched = grid.guidance_scale if isinstance(grid, Schedule) else scale
    if own is not None and flows.guidance_differs(scale, 1.0):
        warnings.warn(
            f"guidance of scale {scale} is wrapped around a straightened model, which "
            f"has absorbed its teacher's; sample it without.",
            UserWarning,
            stacklevel=2,
        )
    elif own is None and flows.guidance_differs(scale, searched):
        warnings.warn(
            f"the schedule was searched at guidance scale {searched}, but the model is "
            f"sampled at {scale} (None is unknown): its step sizes are those of "
            f"another flow. Search again on the guided velocity, or say guidance_scale="
            f" of a function around one.",
            UserWarning,
            stacklevel=2,
        )
    return flows.endpoints(velocity, noise, times, cond, method=method)
