"""Against a fine solution: where solvers end, how far apart, what lies between."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax.core import trees
from tmdjax.core.checks import check_batch, check_count
from tmdjax.core.types import Array, Cond, Data, Float, Grid, Velocity
from tmdjax.flows.guidance import as_pytree
from tmdjax.flows.rollout import rollout
from tmdjax.flows.step_search import micro_batches, squared_l2
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
        method: solver, see :func:`~tmdjax.flows.rollout`.
        micro_batch: samples at a time; None walks them all together.
    """
    compiled, table = as_pytree(velocity), make_table("ode", grid)
    if micro_batch is None or micro_batch >= len(noise):
        return _walk(compiled, noise, table, cond, method)
    size, parts = check_count("micro_batch", micro_batch), []
    for rows, counted in micro_batches(len(noise), size):
        x = _walk(compiled, noise[rows], table, trees.take(cond, rows), method)
        parts.append(x[:counted])
    return jnp.concatenate(parts)


@functools.partial(jax.jit, static_argnums=4)
def _walk(
    velocity: Any, x: Data, table: CoefficientTable, cond: Cond, method: str
) -> Data:
    return rollout(None, velocity, x, table, cond, method=method, store=False)


def terminal_errors(
    velocity: Velocity,
    noise: Data,
    reference: Data,
    grids: Sequence[Grid],
    cond: Cond = None,
    *,
    method: str = "euler",
) -> Float[np.ndarray, "grid batch"]:
    """Squared distance of each grid's samples from the reference.

    What local errors stand for, measured: report its mean with an interval beside
    any objective made of them.

    Args:
        velocity: ``(x, t, cond) -> v``.
        noise: [batch, *event].
        reference: [batch, *event], the fine solution of this noise.
        grids: grids of one length.
        cond: pytree of [batch, ...], or None.
        method: solver of the steps.

    Returns:
        [grid, batch] float64, summed over event dimensions.

    Raises:
        ValueError: another batch in reference, or grids of different lengths.
    """
    check_batch("reference", reference, len(noise))
    if len({len(grid) for grid in grids}) != 1:
        raise ValueError(
            f"grids have {[len(grid) for grid in grids]} knots; give one or more of "
            f"one length."
        )
    tables = [make_table("ode", grid) for grid in grids]
    stacked = jax.tree.map(lambda *rows: np.stack(rows), *tables)
    found = _errors(as_pytree(velocity), noise, reference, stacked, cond, method)
    return np.asarray(found, np.float64)


@functools.partial(jax.jit, static_argnums=5)
def _errors(
    velocity: Any, noise: Data, reference: Data, tables: Any, cond: Cond, method: str
) -> Array:
    def one(table: CoefficientTable) -> Array:
        reached = _walk(velocity, noise, table, cond, method)
        return squared_l2(reached, reference)

    return jax.lax.map(one, tables)


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
    index = np.asarray(index)
    if index.ndim != 1 or index[0] != 0 or (np.diff(index) <= 0).any():
        raise ValueError(f"index={index.tolist()} must increase from 0.")
    times = jnp.asarray(knots, noise.dtype)
    return _states_at(as_pytree(velocity), noise, times, index, cond)


@jax.jit
def _states_at(
    velocity: Any, noise: Data, times: Array, index: Array, cond: Cond
) -> Array:
    def euler(k: Array, x: Array) -> Array:
        v = velocity(x, jnp.broadcast_to(times[k], x.shape[:1]), cond)
        return x - (times[k] - times[k + 1]) * v.astype(x.dtype)

    def segment(x: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        return (y := jax.lax.fori_loop(*ends, euler, x)), y

    _, kept = jax.lax.scan(segment, noise, (index[:-1], index[1:]))
    return jnp.concatenate([noise[None], kept])
