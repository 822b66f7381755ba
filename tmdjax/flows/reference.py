"""Against a fine solution: where solvers end, how far apart, what lies between."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax.core import trees
from tmdjax.core.checks import check_batch, check_count
from tmdjax.core.functions import as_pytree
from tmdjax.core.types import Array, Cond, Data, Float, Grid, Velocity
from tmdjax.flows.rollout import check_times, rollout
from tmdjax.flows.step_search import checked, micro_batches, squared_l2
from tmdjax.flows.table import CoefficientTable, make_table


def endpoints(
    velocity: Velocity,
    noise: Data,
    grid: Grid,
    cond: Cond = None,
    *,
    method: str = "euler",
    micro_batch: int | None = None,
) -> Data:
    """Samples [batch, *event] that a solver reaches, by one compiled program.

    Args:
        velocity: ``(x, t, cond) -> v``; parameters that it holds by
            ``functools.partial`` are arguments of the program.
        noise: [batch, *event].
        grid: times to walk.
        cond: pytree of [batch, ...], or None.
        method: solver, one of ``flows.SOLVERS``.
        micro_batch: samples at a time; None walks them all together.

    Raises:
        TypeError: a velocity that does not return floats.
        ValueError: a velocity of another shape than its state; a bad grid or method,
            or conditions of another batch.
    """
    _check_cond(cond, noise)
    check_times(velocity, grid, method)
    compiled, table = as_pytree(velocity), make_table("ode", grid)
    if micro_batch is None or micro_batch >= len(noise):
        return _walk(compiled, noise, table, cond, method)
    size, parts = check_count("micro_batch", micro_batch), []
    for rows, counted in micro_batches(len(noise), size):
        own_noise, own_cond = trees.take((noise, cond), rows)
        x = _walk(compiled, own_noise, table, own_cond, method)
        parts.append(x[:counted])
    return jnp.concatenate(parts)


def _check_cond(cond: Cond, noise: Data) -> None:
    for leaf in jax.tree.leaves(cond):
        check_batch("cond", leaf, len(noise))


@functools.partial(jax.jit, static_argnums=4)
def _walk(
    velocity: Any, x: Data, table: CoefficientTable, cond: Cond, method: str
) -> Data:
    walk = functools.partial(rollout, method=method, store=False)
    return walk(None, checked(velocity), x, table, cond)


def terminal_errors(
    velocity: Velocity,
    noise: Data,
    reference: Data,
    grids: Sequence[Any],
    cond: Cond = None,
    *,
    method: str = "euler",
    micro_batch: int | None = None,
) -> Float[np.ndarray, "grid batch"]:
    """Squared distance of each grid's samples from the reference.

    What local errors stand for, measured: report its mean with an interval beside
    any objective made of them. Grids of one length share a compiled program.

    Args:
        velocity: ``(x, t, cond) -> v``.
        noise: [batch, *event].
        reference: [batch, *event], the fine solution of this noise.
        grids: [knot] times each, to walk.
        cond: pytree of [batch, ...], or None.
        method: solver of the steps.
        micro_batch: samples at a time; None walks them all together.

    Returns:
        [grid, batch] float64, summed over event dimensions.

    Raises:
        ValueError: another batch in reference, or what :func:`endpoints` refuses.
    """
    check_batch("reference", reference, len(noise))
    options = {"method": method, "micro_batch": micro_batch}
    reached = (endpoints(velocity, noise, grid, cond, **options) for grid in grids)
    return np.stack([np.asarray(_distance(x, reference), np.float64) for x in reached])


_distance = jax.jit(squared_l2)


def states_at(
    velocity: Velocity, noise: Data, knots: Grid, index: Any, cond: Cond = None
) -> Array:
    """States of a fine Euler trajectory at chosen knots; the others are not kept.

    Args:
        velocity: ``(x, t, cond) -> v``.
        noise: [batch, *event].
        knots: times of the fine trajectory, [n + 1].
        index: increasing knot numbers [kept], the first 0.
        cond: pytree of [batch, ...], or None.

    Returns:
        [kept, batch, *event].
    """
    _check_cond(cond, noise)
    index = np.asarray(index)
    if index.ndim != 1 or index[0] != 0 or (np.diff(index) <= 0).any():
        raise ValueError(f"index={index.tolist()} must increase from 0.")
    check_times(velocity, knots)
    times = jnp.asarray(knots, noise.dtype)
    return _states_at(as_pytree(velocity), noise, times, index, cond)


@jax.jit
def _states_at(
    velocity: Any, noise: Data, times: Array, index: Array, cond: Cond
) -> Array:
    velocity = checked(velocity)

    def euler(k: Array, x: Array) -> Array:
        v = velocity(x, jnp.broadcast_to(times[k], x.shape[:1]), cond)
        return x - (times[k] - times[k + 1]) * v.astype(x.dtype)

    def segment(x: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        return (y := jax.lax.fori_loop(*ends, euler, x)), y

    _, kept = jax.lax.scan(segment, noise, (index[:-1], index[1:]))
    return jnp.concatenate([noise[None], kept])


def descend_on_error(
    velocity: Velocity,
    noise: Data,
    knots: Grid,
    starts: Sequence[Any],
    cond: Cond = None,
    *,
    strides: Sequence[int] = (8, 4, 2, 1),
    micro_batch: int | None = None,
) -> np.ndarray:
    """Coordinate descent on the measured terminal error of an Euler grid.

    From the best of the starts, one inner knot after the other moves by each stride
    while that lowers the mean squared distance to the fine solution. A candidate
    costs K evaluations a sample.

    Args:
        velocity: ``(x, t, cond) -> v``.
        noise: [samples, *event], from which errors are measured.
        knots: times of the fine solution, [n + 1].
        starts: increasing knot numbers [K + 1] from 0 to n, of one length.
        cond: pytree of [samples, ...], or None.
        strides: knots to move by, coarse to fine.
        micro_batch: samples at a time; None takes all.

    Returns:
        Knot numbers [K + 1] with a mean error, on these samples, no larger than that
        of any start.
    """
    reference = endpoints(velocity, noise, knots, cond, micro_batch=micro_batch)
    known: dict[tuple[int, ...], float] = {}

    def error(candidates: list[np.ndarray]) -> list[float]:
        new = [c for c in candidates if tuple(c) not in known]
        if new:
            grids = [knots[c] for c in new]
            found = terminal_errors(
                velocity, noise, reference, grids, cond, micro_batch=micro_batch
            )
            known.update((tuple(c), float(e)) for c, e in zip(new, found.mean(1)))
        return [known[tuple(c)] for c in candidates]

    candidates = [np.asarray(start) for start in starts]
    best = candidates[int(np.argmin(error(candidates)))]
    for stride in strides:
        moved = True
        while moved:
            moved = False
            for i in range(1, len(best) - 1):
                step = stride * np.eye(len(best), dtype=int)[i]
                near = [c for c in (best - step, best + step) if (np.diff(c) > 0).all()]
                found = error(near)
                if found and min(found) < known[tuple(best)]:
                    best, moved = near[int(np.argmin(found))], True
    return best
