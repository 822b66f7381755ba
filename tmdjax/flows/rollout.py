"""Rollouts: one scan over a coefficient table, with log-probs.

A multi-stage solver replaces the velocity of a row by a weighted sum of its
stages (explicit Runge-Kutta) and leaves the update as it is, a multistep solver by
one that knows the steps before (flows/multistep.py); both need rows without noise.
NFE (number of function evaluations) = steps x stages.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import struct

from tmdjax.core import prng
from tmdjax.core.checks import check_batch, check_choice, check_output, check_same_shape
from tmdjax.core.functions import VelocityWrapper, around
from tmdjax.core.types import Array, Cond, Data, Time, Velocity
from tmdjax.flows.multistep import (
    MULTISTEP,
    multistep_velocity,
    multistep_weights,
    no_past,
)
from tmdjax.flows.table import CoefficientTable
from tmdjax.flows.transition import (
    REDUCTIONS,
    gaussian_log_prob,
    gaussian_transition,
    transition_mean,
)
from tmdjax.flows.velocities import OnGrid, guidance_scale

# Explicit Runge-Kutta tableaus: (stage matrix rows, weights, stage times).
METHODS: dict[str, tuple[tuple[tuple[float, ...], ...], tuple, tuple]] = {
    "euler": (((),), (1.0,), (0.0,)),
    "midpoint": (((), (0.5,)), (0.0, 1.0), (0.0, 0.5)),
    "heun": (((), (1.0,)), (0.5, 0.5), (0.0, 1.0)),
    "rk4": (
        ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
        (0.0, 0.5, 0.5, 1.0),
    ),
}
SOLVERS = (*METHODS, *MULTISTEP)
"""What ``method`` of :func:`rollout` may be: one-step solvers, then multistep ones."""


_START = 1 << 20
"""Folded into a key for the noise at the start; numbers of steps are below it."""


def initial_noise(keys: Any, event_shape: tuple[int, ...]) -> Array:
    """Where rollouts under these keys may start: standard normal [key, *event].

    Independent of the noise that the steps of a rollout draw from the same keys.
    """
    return prng.normal(prng.fold_in(keys, _START), event_shape)


def start_noise(keys: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Data:
    """Noise [samples, *shape] drawn from typed keys [samples], or given in their place.

    Raises:
        ValueError: noise of another shape.
    """
    if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        return prng.normal(keys, shape, dtype)
    check_same_shape("noise", keys, "a start", np.empty((len(keys), *shape)))
    return jnp.asarray(keys, dtype)


@struct.dataclass
class Trajectory:
    """What a rollout leaves behind.

    Attributes:
        states: [step + 1, batch, *event], the first is the start.
        log_prob: [step, batch], log-prob of each transition, 0 where it has none.
        mask: [step] bool, True where a transition has a log-prob.
        x0_hat: [batch, *event], data estimate of the last step.
        guidance: scale of the velocity's classifier-free guidance; None where it is
            not known (:func:`~tmdjax.flows.guidance_scale`).
    """

    states: Any
    log_prob: Any
    mask: Any
    x0_hat: Any
    guidance: float | None = struct.field(pytree_node=False, default=None)


def nfe(table: CoefficientTable, method: str = "euler") -> int:
    """Number of velocity evaluations a sample of one rollout."""
    return len(table) * len(_stage_times(method))


def _stage_times(method: str) -> tuple[float, ...]:
    """Where in a step, from 0 to 1, a solver evaluates the velocity."""
    check_choice("method", method, SOLVERS)
    return METHODS[method][2] if method in METHODS else (0.0,)


def check_times(velocity: Velocity, grid: Any, method: str = "euler") -> None:
    """Tells a velocity that carries facts at which times a solver will ask it.

    Args:
        velocity: ``(x, t, cond) -> v``; a plain function knows nothing and passes.
        grid: times that are walked [step + 1]; traced ones pass.
        method: the solver.

    Raises:
        ValueError: a parametrisation that says nothing at one of the times
            (:func:`~tmdjax.flows.as_velocity`).

    Warns:
        UserWarning: times that a straightened velocity
            (:class:`~tmdjax.flows.OnGrid`) does not know, or a multistep solver, which
            extrapolates from one of its chords to the next.
    """
    if method in MULTISTEP and around(velocity, OnGrid) is not None:
        warnings.warn(
            f"this velocity knows Euler steps of its own grid alone, and "
            f"method={method!r} takes them for the tangents of a curve. Walk the grid "
            f"by method='euler', or take the network without it (flows.without).",
            UserWarning,
            stacklevel=3,
        )
    if not isinstance(velocity, VelocityWrapper) or isinstance(grid, jax.core.Tracer):
        return
    times = {*_stage_times(method)}
    grid = np.asarray(grid, np.float64)
    t, h = grid[:-1], grid[:-1] - grid[1:]
    velocity.check_times(np.concatenate([t - time * h for time in times]))


def solver_velocity(
    velocity: Velocity,
    x: Data,
    t: Array,
    t_next: Array,
    cond: Cond = None,
    method: str = "euler",
    first: Data | None = None,
) -> Data:
    """The mean velocity of one explicit Runge-Kutta step from t to t_next.

    Args:
        velocity: ``(x, t[batch], cond) -> [batch, *event]``.
        x: [batch, *event].
        t: scalar time of the state.
        t_next: scalar time to reach, < t.
        cond: conditions handed to the velocity.
        method: 'euler', 'midpoint', 'heun' or 'rk4'.
        first: the velocity at x and t where it is known already.

    Returns:
        [batch, *event]; x - (t - t_next) times it is the solver's next state.

    Raises:
        TypeError: the velocity is not an array of floats.
        ValueError: its shape is not that of x.
    """
    rows, weights, times = METHODS[method]
    h = t - t_next
    stages: list[Array] = []
    for row, time in zip(rows, times):
        if not stages and first is not None:
            stages.append(first.astype(x.dtype))
            continue
        state = x
        for weight, stage in zip(row, stages):
            if weight:
                state = state - h * weight * stage
        at = t_next if time == 1.0 else t - time * h
        v = check_output(velocity(state, jnp.broadcast_to(at, x.shape[:1]), cond), x)
        stages.append(v.astype(x.dtype))
    return sum(w * s for w, s in zip(weights, stages) if w)  # pyright: ignore


def _check_method(method: str, table: CoefficientTable, g: Any) -> None:
    """Refuses a solver on rows for which it is not defined."""
    check_choice("method", method, SOLVERS)
    if table.stochastic and method != "euler":
        raise ValueError(
            f"method={method!r} needs rows without noise (S = 0); this table adds "
            f"noise. Use 'euler', or split the table into slices."
        )
    if method not in MULTISTEP:
        return
    if g is not None:
        raise ValueError(
            f"method={method!r} takes the states of several steps to be of one flow, "
            f"which a gradient g moves them off. Use 'euler' with g."
        )
    traced = isinstance(table.k, jax.core.Tracer)
    if not traced and not np.array_equal(table.k, table.t_next):
        raise ValueError(
            f"method={method!r} needs rows of the ODE (k = t'); this table has k = "
            f"{np.round(table.k, 4).tolist()}. Use 'euler', or make_table('ode', grid)."
        )


def rollout(
    keys: Any,
    velocity: Velocity,
    x: Any,
    table: CoefficientTable,
    cond: Cond = None,
    *,
    method: str = "euler",
    g: Callable[[Data, Time, Cond], Data] | None = None,
    reduction: str = "mean",
    store: bool = True,
    unroll: int = 1,
    noise: Array | None = None,
) -> Any:
    """Walks a table from the state x.

    Args:
        keys: typed keys [batch], one a sample; None if no row adds noise. The
            noise of step i is drawn from ``fold_in(key, i)``.
        velocity: ``(x, t, cond) -> v`` with x, v [batch, *event] and t [batch].
        x: start, [batch, *event], float32 (or float64 under x64): the time at
            ``table.t[0]``.
        table: coefficient table (or a slice of one), from
            :func:`~tmdjax.flows.make_table`.
        cond: handed to velocity and g.
        method: solver of the rows, static; all but 'euler' need rows without noise.
            One-step solvers are 'euler', 'midpoint', 'heun' and 'rk4'; multistep ones,
            at one evaluation a step, 'dpmpp_2m' (DPM-Solver++ 2M) and 'unipc' (order 2
            with its corrector). These begin every rollout, that of a slice too, with
            a step of Euler's, and the states of 'unipc' are those that the velocity
            was evaluated at, before their correction.
        g: gradient of a reward, ``(x, t, cond) -> [batch, *event]``, weighted by
            the column C.
        reduction: of log-probs over event dimensions, 'mean' or 'sum'.
        store: False keeps no trajectory.
        unroll: rows a turn of the compiled loop; more than one is faster for very small
            networks, and compiles longer.
        noise: standard normal noise of the steps [step, batch, *event], instead of
            keys: to replay what other code drew. Rows without noise ignore theirs.

    Returns:
        A :class:`Trajectory`, or only the final state [batch, *event] if not
        ``store``.

    Raises:
        TypeError: x is narrower than float32 (log-probs of rounded states are
            wrong), or keys are not typed keys.
        ValueError: unknown method or reduction; keys missing or of another batch, or
            noise of another shape;
            a method but 'euler' on noisy rows; a multistep one with a gradient g or
            on rows that are not the ODE's; a velocity of another shape than x; a
            time at which :func:`~tmdjax.flows.as_velocity` would divide by zero.

    Warns:
        UserWarning: times that a :class:`~tmdjax.flows.OnGrid` velocity does not know.

    References:
        Stochastic form: Flow-GRPO, arXiv 2505.05470; see flows/table.py.
    """
    x = jnp.asarray(x)
    _check_method(method, table, g)
    check_choice("reduction", reduction, REDUCTIONS)
    if x.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(
            f"the sampler state is {x.dtype}; give float32 and let the network cast."
        )
    if table.stochastic:
        if keys is None and noise is None:
            raise ValueError("this table adds noise: give keys, one a sample.")
        if noise is None:
            prng.check_key(keys, "keys")
            check_batch("keys", keys, x.shape[0])
    if noise is not None and np.shape(noise) != (len(table), *x.shape):
        raise ValueError(
            f"noise has shape {np.shape(noise)}; give one a step, "
            f"{(len(table), *x.shape)}."
        )
    if not isinstance(table.t, jax.core.Tracer):
        check_times(velocity, np.append(table.t, table.t_next[-1]), method)
    rows = table.rows(slice(None), x.dtype)
    multistep = method in MULTISTEP
    past = None
    if multistep:
        rows, past = rows | multistep_weights(rows), no_past(x)

    def body(carry: Any, given: tuple[dict[str, Array], Any]) -> tuple[Any, Any]:
        (x, _, _, past), (row, z) = carry, given
        t, t_next = row["t"], row["t_next"]
        one_step = "euler" if multistep else method
        v = solver_velocity(velocity, x, t, t_next, cond, one_step)
        if multistep:
            x, v, past = multistep_velocity(method, row, past, x, v)
        pull = None
        if g is not None:
            pull = g(x, jnp.broadcast_to(t, x.shape[:1]), cond)
        mean, x0_hat = transition_mean(row, x, v, pull)
        log_prob = jnp.zeros(x.shape[0], x.dtype)
        x_next = mean
        if table.stochastic:
            if z is None:
                own: Any = keys
                z = prng.normal(prng.fold_in(own, row["step"]), x.shape[1:], x.dtype)
            x_next = gaussian_transition(mean, row["c"] * row["S"], z)
            std = jnp.where(row["mask"], row["log_prob_std"], 1.0)
            density = gaussian_log_prob(x_next, mean, std, reduction)
            log_prob = jnp.where(row["mask"], density, 0.0)
        stacked = (x_next, log_prob) if store else None
        return (x_next, mean, x0_hat, past), stacked

    (sample, mean, x0_hat, _), stacked = jax.lax.scan(
        body, (x, x, x, past), (rows, noise), unroll=min(unroll, len(table))
    )
    last = {"sample": sample, "mean": mean, "x0_hat": x0_hat}[table.final]
    if not store:
        return last
    states, log_prob = stacked
    states = jnp.concatenate([x[None], states[:-1], last[None]])
    return Trajectory(
        states=states,
        log_prob=log_prob,
        mask=rows["mask"],
        x0_hat=x0_hat,
        guidance=guidance_scale(velocity),
    )
