"""Flow maps: networks that jump along a flow, from time s to time r < s at once.

Along dy/ds = v(y, s) a map moves by the average velocity between the two times:

    f(y, s, r) = y - (s - r) u(y, s, r),      u(y, s, s) = v(y, s),

and u is the average of v along the flow exactly if the MeanFlow identity holds,

    u + (s - r) du/ds = v,      du/ds = (d/ds + v . grad) u at fixed r.

References:
    MeanFlow, arXiv 2505.13447, eq. 6 (its z_t, t, r are y, s, r here).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import (
    check_choice,
    check_output,
    check_range,
    check_same_shape,
    check_time,
)
from tmdjax.core.conventions import time_like
from tmdjax.core.types import Array, Data, PerExample, Time

AverageVelocity = Callable[[Any, Any, Any], Any]
"""``u(y, s, r) -> [batch, *event]``, y [batch, *event], s and r [batch], r <= s."""

DERIVATIVES = ("jvp", "difference")

# what jax says of an operation that jvp cannot pass
_NO_FORWARD_MODE = ("Differentiation rule for", "forward-mode")


def check_order(s: Any, r: Any) -> None:
    """Raises ValueError where concrete times are outside [0, 1] or r > s."""
    check_time(s, "s")
    check_time(r, "r")
    if isinstance(s, jax.core.Tracer) or isinstance(r, jax.core.Tracer):
        return
    wrong = np.asarray(r) > np.asarray(s)
    if wrong.any():
        raise ValueError(
            f"{int(wrong.sum())} row(s) have r > s; a flow map steps down, from s to "
            f"r <= s."
        )


def apply_map(average_velocity: AverageVelocity, y: Data, s: Time, r: Time) -> Data:
    """f(y, s, r) = y - (s - r) u(y, s, r), [batch, *event].

    Raises:
        TypeError: the average velocity is not an array of floats.
        ValueError: concrete times outside [0, 1], or r > s; an average velocity of
            another shape than y.
    """
    check_order(s, r)
    return y - time_like(s - r, y) * _checked(average_velocity)(y, s, r)


def _checked(average_velocity: AverageVelocity) -> AverageVelocity:
    """The same, refusing what may not be added to y."""
    return lambda y, s, r: check_output(
        average_velocity(y, s, r), y, "the average velocity"
    )


def map_endpoints(
    average_velocity: AverageVelocity, y: Data, times: Array, *, remat: bool = False
) -> Data:
    """Jumps along a grid, from times[0] to times[-1].

    Args:
        average_velocity: ``u(y, s, r)``.
        y: states at times[0], [batch, *event].
        times: decreasing, [steps + 1].
        remat: keep the activations of one jump at a time for the backward pass.

    Returns:
        [batch, *event].
    """

    def jump(y: Data, pair: Any) -> tuple[Data, None]:
        s, r = (jnp.broadcast_to(time, y.shape[:1]) for time in pair)
        return apply_map(average_velocity, y, s, r), None

    jump = jax.checkpoint(jump, prevent_cse=False) if remat else jump
    return jax.lax.scan(jump, y, (times[:-1], times[1:]))[0]


def total_derivative(
    average_velocity: AverageVelocity,
    y: Data,
    s: Time,
    r: Time,
    v: Data,
    *,
    derivative: str = "jvp",
    delta: float = 5e-3,
    time_range: tuple[float, float] = (0.001, 0.999),
) -> Data:
    """du/ds at fixed r, while y moves with velocity v.

    Args:
        average_velocity: ``u(y, s, r)``.
        y: states [batch, *event].
        s: times [batch].
        r: times [batch], at most s.
        v: velocity of y, [batch, *event].
        derivative: 'jvp' is exact; it needs forward mode, which fused attention
            kernels lack. 'difference' is central with step delta, its error
            O(delta^2), and one-sided, O(delta), where a side is barred: above
            the upper end of time_range, below its lower end, or at or below r. Where
            both sides are barred it is 0. Evaluate u in float32: in 16 bits the
            difference drowns (:func:`meanflow_error` takes u for it apart).
        delta: step of the difference, > 0.
        time_range: times at which the network may be evaluated.

    Returns:
        [batch, *event].

    Raises:
        TypeError: the average velocity is not an array of floats.
        ValueError: an unknown derivative; delta not above 0; v or an average velocity
            of another shape than y; 'jvp' of a network that has no forward mode.

    References:
        MeanFlow, arXiv 2505.13447, eq. 8 (jvp); central differences: arXiv
        2601.09881, appendix A.2.
    """
    check_choice("derivative", derivative, DERIVATIVES)
    check_same_shape("v", v, "y", y)
    average_velocity = _checked(average_velocity)
    if derivative == "jvp":
        ones, zeros = jnp.ones_like(s), jnp.zeros_like(r)
        try:
            return jax.jvp(average_velocity, (y, s, r), (v, ones, zeros))[1]
        except (NotImplementedError, TypeError) as error:
            if not any(text in str(error) for text in _NO_FORWARD_MODE):
                raise
            raise ValueError(
                f"derivative='jvp' needs forward mode, and this network holds an "
                f"operation without it, as fused attention is ({error}). Give the loss "
                f"a derivative_apply_fn: the same network with "
                f"attention_implementation='xla'. Or set derivative='difference'."
            ) from error
    check_range("delta", delta, 0, open_low=True)
    low, high = time_range
    above = jnp.where(s + delta <= high, s + delta, s)
    below = jnp.where((s - delta >= low) & (s - delta > r), s - delta, s)
    u_above = average_velocity(y + time_like(above - s, y) * v, above, r)
    u_below = average_velocity(y + time_like(below - s, y) * v, below, r)
    width = time_like(above - below, y)
    # a width of 0 comes with a difference of 0
    return (u_above - u_below) / jnp.where(width > 0, width, 1.0)


def meanflow_error(
    average_velocity: AverageVelocity,
    y: Data,
    s: Time,
    r: Time,
    v: Data,
    *,
    derivative_of: AverageVelocity | None = None,
    **options: Any,
) -> tuple[PerExample, Data]:
    """Squared distance of u to the target of the MeanFlow identity, summed over events.

    The target v - (s - r) du/ds carries no gradient. Where r = s this is flow
    matching.

    Args:
        average_velocity: ``u(y, s, r)`` of the network that is trained.
        y: states [batch, *event].
        s: times [batch].
        r: times [batch], at most s.
        v: velocity at (y, s) [batch, *event]: conditional, marginal, or guided.
        derivative_of: u as du/ds alone evaluates it, say in float32; None is
            average_velocity.
        **options: of :func:`total_derivative`.

    Returns:
        Squared error [batch] and u [batch, *event].

    Raises:
        ValueError: concrete times outside [0, 1], or r > s; what
            :func:`total_derivative` refuses.

    References:
        MeanFlow, arXiv 2505.13447, eq. 9 and 10.
    """
    check_order(s, r)
    u = _checked(average_velocity)(y, s, r)
    moving = average_velocity if derivative_of is None else derivative_of
    slope = total_derivative(moving, y, s, r, v, **options)
    target = jax.lax.stop_gradient(v - time_like(s - r, y) * slope)
    return jnp.sum(jnp.square(u - target), axis=tuple(range(1, u.ndim))), u


def normalised_loss(squared_error: PerExample, constant: float) -> PerExample:
    """E / (sg(e) + c): each example's gradient is scaled by its own error.

    Args:
        squared_error: [batch], summed over event dimensions.
        constant: c > 0.

    Returns:
        [batch], in [0, 1).

    References:
        MeanFlow, arXiv 2505.13447, appendix B.2 with p = 1.
    """
    check_range("constant", constant, 0, open_low=True)
    return squared_error / (jax.lax.stop_gradient(squared_error) + constant)


def floor_to_grid(s: Time, grid: Any) -> Array:
    """The largest time of a (decreasing) grid that is at most s, [batch].

    Raises:
        ValueError: the grid does not end at 0, so that some s has none below it.
    """
    times = np.asarray(grid)
    if times.ndim != 1 or times[-1] != 0:
        raise ValueError(f"grid={times.tolist()} must be times that end at 0.")
    times = jnp.asarray(np.sort(times), s.dtype)
    return times[jnp.searchsorted(times, s, side="right") - 1]
