"""Exponential time differencing of stiff periodic equations, at fourth order.

    dv/dt = linear v + nonlinear(v)        for Fourier modes v, linear one number a mode

The linear part is solved exactly, however stiff; the rest by a Runge-Kutta scheme.

References:
    Cox and Matthews 2002, eqs. 26-29. Coefficients as means over a circle: Kassam and
    Trefethen 2005.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from tmdjax.core.checks import check_batch, check_count, check_finite, check_range
from tmdjax.core.types import Array

_CIRCLE = 16  # points of a half circle, which a real linear part is enough for


class Coefficients(NamedTuple):
    """Weights of one step, [batch, *mode] each (batch 1 where all have the same)."""

    whole: Any  # exp(linear dt)
    half: Any  # exp(linear dt / 2)
    stage: Any
    first: Any
    middle: Any
    last: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """An equation on a periodic domain, by its Fourier modes (those of a real field).

    Attributes:
        name: what it is called in manifests.
        linear: float64 [batch, *mode], the rate of each mode; batch 1 serves all.
        nonlinear: ``(modes [batch, *mode], factors) -> [batch, *mode]``, a function of
            a module (programs are compiled once for each).
        factors: arrays [batch or 1, *mode] that it needs.
        points: of a side of the grid, even.
        dims: axes of space.
    """

    name: str
    linear: np.ndarray
    nonlinear: Callable[[Array, Mapping[str, Any]], Array]
    factors: Mapping[str, np.ndarray]
    points: int
    dims: int


def etdrk4_coefficients(linear: np.ndarray, dt: Any) -> Coefficients:
    """Weights of a step, on the host in float64.

    Args:
        linear: real, [batch, *mode].
        dt: of a step, > 0: a scalar or [batch].

    Returns:
        Arrays [batch, *mode].

    Raises:
        ValueError: a step that is not positive, or no scalar and not [batch].
    """
    linear, dt = np.asarray(linear, np.float64), np.asarray(dt, np.float64)
    check_range("dt", float(dt.min()), 0, open_low=True)
    if dt.ndim:
        check_batch("dt", dt, len(linear) if len(linear) > 1 else len(dt))
        dt = dt.reshape(-1, *(1,) * (linear.ndim - 1))
    z = linear * dt
    means = [np.zeros(z.shape) for _ in range(4)]
    for angle in np.pi * (np.arange(_CIRCLE) + 0.5) / _CIRCLE:
        r = z + np.exp(1j * angle)
        e, cube = np.exp(r), r**3
        parts = (
            (np.exp(r / 2) - 1) / r,
            (-4 - r + e * (4 - 3 * r + r**2)) / cube,
            2 * (2 + r + e * (r - 2)) / cube,
            (-4 - 3 * r - r**2 + e * (4 - r)) / cube,
        )
        for mean, part in zip(means, parts):
            mean += part.real / _CIRCLE
    return Coefficients(np.exp(z), np.exp(z / 2), *(dt * mean for mean in means))


def etdrk4_step(
    v: Array, weights: Coefficients, nonlinear: Callable[[Array], Array]
) -> Array:
    """Modes one step later; it can be traced and differentiated, in any precision.

    Args:
        v: complex [batch, *mode].
        weights: of :func:`etdrk4_coefficients`.
        nonlinear: ``modes -> modes``.

    Returns:
        Complex [batch, *mode].
    """
    n_v = nonlinear(v)
    a = weights.half * v + weights.stage * n_v
    n_a = nonlinear(a)
    b = weights.half * v + weights.stage * n_a
    n_b = nonlinear(b)
    c = weights.half * a + weights.stage * (2 * n_b - n_v)
    v = weights.whole * v + weights.first * n_v + weights.middle * (n_a + n_b)
    return v + weights.last * nonlinear(c)


@struct.dataclass
class Stepper:
    """A solver's step as a pure function of a field, to be used inside programs.

    It is a pytree, so that programs can be given it as an argument. In float32, on few
    points or in long steps it is the coarse solver beside which a network corrects;
    data come from :func:`solve`.

    Attributes:
        weights: :class:`Coefficients` of one solver step, leaves [batch, *mode]; batch
            1 serves all fields.
        factors: of the equation, arrays [batch or 1, *mode].
        nonlinear: of the equation.
        points: of a side of the solver's grid.
        substeps: solver steps of a call.
    """

    weights: Any
    factors: Any
    nonlinear: Callable[[Array, Mapping[str, Any]], Array] = struct.field(
        pytree_node=False
    )
    points: int = struct.field(pytree_node=False)
    substeps: int = struct.field(pytree_node=False)

    def __call__(self, field: Array) -> Array:
        """The field [batch, *space, 1] a call later, in its own dtype.

        Where it has another number of points than the solver, its modes are taken to
        the solver's grid and back; those that the coarser grid lacks are 0 then.

        Raises:
            ValueError: another number of axes or channels, sides that differ, or
                another batch than that of the coefficients.
        """
        axes, side = self._check(field), field.shape[1]
        weights, factors = jax.tree.map(
            lambda a: _in_precision(a, field.dtype), (self.weights, dict(self.factors))
        )
        v = _resampled(jnp.fft.rfftn(field[..., 0], axes=axes), side, self.points)
        v = _advanced(v, weights, factors, self.nonlinear, self.substeps)
        v = _resampled(v, self.points, side)
        u = jnp.fft.irfftn(v, field.shape[1:-1], axes=axes)
        return u[..., None].astype(field.dtype)

    def _check(self, field: Array) -> tuple[int, ...]:
        """The axes of space, once the field is one that the solver is set up for."""
        count, *modes = self.weights.whole.shape
        shape, dims = field.shape, len(modes)
        if len(shape) != dims + 2 or len({*shape[1:-1]}) > 1 or shape[-1] != 1:
            space = ("x", "x, y")[dims - 1]
            raise ValueError(
                f"the field has shape {shape}; this solver takes [batch, {space}, 1], "
                f"as many points along each axis: give it one channel at a time."
            )
        if count not in (1, shape[0]):
            raise ValueError(
                f"the field has a batch of {shape[0]}, and the solver's coefficients "
                f"are those of {count} fields; take some of them by rows()."
            )
        return tuple(range(1, dims + 1))

    def rows(self, rows: Any) -> "Stepper":
        """The step of some fields of the batch, int [n], which may be traced."""
        return jax.tree.map(lambda a: a if len(a) == 1 else jnp.asarray(a)[rows], self)


def stepper(equation: Equation, dt: Any, substeps: int = 1) -> Stepper:
    """A :class:`Stepper` of an equation, its coefficients float64 on the host.

    Args:
        equation: of batch 1, or of the batch of the fields.
        dt: time that a call advances by, > 0: a scalar or [batch].
        substeps: solver steps in that time.

    Raises:
        TypeError, ValueError: a number out of range, or a dt of another batch.
    """
    substeps = check_count("substeps", substeps)
    return Stepper(
        weights=etdrk4_coefficients(equation.linear, np.asarray(dt) / substeps),
        factors=dict(equation.factors),
        nonlinear=equation.nonlinear,
        points=equation.points,
        substeps=substeps,
    )


def _advanced(v, weights, factors, nonlinear, substeps):
    """Modes so many solver steps later."""

    def step(_, v):
        return etdrk4_step(v, weights, lambda v: nonlinear(v, factors))

    return lax.fori_loop(0, substeps, step, v)


def _in_precision(array: Any, dtype: Any) -> Array:
    """A factor in the precision of a field, complex where it is complex."""
    wave = np.iscomplexobj(array)
    return jnp.asarray(array, jnp.result_type(dtype, jnp.complex64) if wave else dtype)


def solve(
    equation: Equation,
    initial: Any,
    dt: Any,
    frames: int,
    *,
    substeps: int = 4,
    skip: int = 0,
    points: int | None = None,
) -> np.ndarray:
    """Trajectories in float64, whatever the precision of the process.

    Args:
        equation: of batch 1, or of the batch of the fields.
        initial: real fields [batch, *space] at time 0.
        dt: time between frames, > 0: a scalar or [batch].
        frames: how many are returned, the first of them at time ``skip * dt``.
        substeps: solver steps between frames.
        skip: frames that pass before the first one is returned, >= 0.
        points: of a side of the returned fields, even; the spectrum is cut there. None
            returns all.

    Returns:
        float64 [frame, batch, *space].

    Raises:
        TypeError, ValueError: shapes or numbers that do not fit, or values that are not
            finite in the initial fields.
        FloatingPointError: a trajectory that is not finite; names it, and its frame.
    """
    check_count("frames", frames)
    check_count("substeps", substeps)
    check_count("skip", skip, 0)
    initial = np.asarray(initial, np.float64)
    side = (equation.points,) * equation.dims
    if initial.shape[1:] != side or not len(initial):
        raise ValueError(
            f"initial fields have shape {initial.shape}; {equation.name} has been set "
            f"up for [batch, {', '.join(map(str, side))}]."
        )
    check_finite(initial, "initial")
    kept = equation.points if points is None else check_count("points", points, 2)
    if kept % 2 or kept > equation.points:
        raise ValueError(
            f"points={kept} must be even and at most {equation.points}, the solver's."
        )
    weights = etdrk4_coefficients(equation.linear, np.asarray(dt) / substeps)
    if len(weights.whole) not in (1, len(initial)):
        raise ValueError(
            f"{equation.name} was set up for {len(weights.whole)} trajectories (its "
            f"coefficients and dt), and {len(initial)} initial fields were given."
        )
    with jax.enable_x64(True):
        solved = _solve(
            jnp.asarray(initial),
            jax.tree.map(jnp.asarray, weights),
            jax.tree.map(jnp.asarray, dict(equation.factors)),
            substeps,
            skip,
            nonlinear=equation.nonlinear,
            frames=frames,
            points=kept,
        )
        solved = np.asarray(solved)
    finite = np.isfinite(solved).reshape(*solved.shape[:2], -1).all(-1)
    if not finite.all():
        frame, row = (int(i) for i in np.argwhere(~finite)[0])
        raise FloatingPointError(
            f"trajectory {row} of {equation.name} is not finite from frame "
            f"{frame + skip} on; use more than substeps={substeps}, or a finer grid."
        )
    return solved


@functools.partial(jax.jit, static_argnames=("nonlinear", "frames", "points"))
def _solve(initial, weights, factors, substeps, skip, *, nonlinear, frames, points):
    axes = tuple(range(1, initial.ndim))
    v = jnp.fft.rfftn(initial, axes=axes)

    def frame(v):
        return _advanced(v, weights, factors, nonlinear, substeps)

    def field(v):
        sizes = (points,) * len(axes)
        v = _resampled(v, initial.shape[1], points)
        return jnp.fft.irfftn(v, sizes, axes=axes)

    v = lax.fori_loop(0, skip, lambda _, v: frame(v), v)
    return lax.scan(lambda v, _: (frame(v), field(v)), v, None, frames)[1]


def _resampled(v: Array, side: int, points: int) -> Array:
    """The modes of another grid, scaled for it; the coarser one's highest is left out.

    Args:
        v: modes [batch, *mode] of a real field with ``side`` points along each axis.
        side: at least 2.
        points: of each side of the other grid, at least 2.
    """
    if points == side:
        return v
    dims, half = v.ndim - 1, min(side, points) // 2
    for axis in range(1, dims):  # of both signs
        low = lax.slice_in_dim(v, 0, half, axis=axis)
        high = lax.slice_in_dim(v, side - half + 1, side, axis=axis)
        shape = list(v.shape)
        shape[axis] = points - 2 * half + 1
        v = jnp.concatenate([low, jnp.zeros(shape, v.dtype), high], axis)
    ends = [(0, 0)] * dims + [(0, points // 2 + 1 - half)]
    return jnp.pad(v[..., :half], ends) * (points / side) ** dims
