"""One step of a table: its mean, and the Gaussian transition around it.

The only place where a noisy step happens, and the only place where it is scored.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import check_choice, check_output, check_same_shape
from tmdjax.core.conventions import time_like
from tmdjax.core.types import Array, Data, PerExample

REDUCTIONS = ("mean", "sum")


def _std_like(std: Any, x: Array) -> Array:
    """A scalar, [batch] or [batch, *event] standard deviation, to broadcast over x."""
    std = jnp.asarray(std, x.dtype)
    return std.reshape(std.shape + (1,) * (x.ndim - std.ndim)) if std.ndim else std


def transition_mean(
    rows: Mapping[str, Array], x: Data, v: Data, g: Data | None = None
) -> tuple[Data, Data]:
    """The mean (1 - t') x0_hat + k e_hat + C g of a step, and x0_hat.

    Args:
        rows: columns of a coefficient table, scalars or [batch].
        x: [batch, *event], the state at t.
        v: [batch, *event], the velocity there.
        g: [batch, *event], gradient of a reward; None means none.

    Returns:
        Mean and x0_hat = x - t v, both [batch, *event].

    Raises:
        TypeError: v or g is not an array of floats.
        ValueError: v or g has another shape than x.
    """
    check_output(v, x)
    t, t_next, k = (time_like(rows[name], x) for name in ("t", "t_next", "k"))
    x0_hat = x - t * v
    e_hat = x + (1 - t) * v
    mean = (1 - t_next) * x0_hat + k * e_hat
    if g is not None:
        check_output(g, x, "the gradient g")
        mean = mean + time_like(rows["C"], x) * g
    return mean, x0_hat


def gaussian_transition(mean: Data, std: Any, z: Data) -> Data:
    """Draws the next state, mean + std z.

    Args:
        mean: [batch, *event].
        std: scalar, [batch], or [batch, *event]; 0 makes the step deterministic.
        z: standard normal noise, [batch, *event].

    Returns:
        The next state, [batch, *event].

    Raises:
        ValueError: z has another shape than the mean.
    """
    check_same_shape("z", z, "mean", mean)
    return mean + _std_like(std, mean) * z


def gaussian_log_density(x: Data, mean: Data, std: Any) -> Data:
    """Log N(x; mean, std^2) of every event dimension by itself.

    Args:
        x: [batch, *event], float32 or wider.
        mean: [batch, *event].
        std: scalar, [batch] or [batch, *event], > 0.

    Returns:
        [batch, *event] in nats.

    Raises:
        TypeError: x has fewer bits than mean: a rounded state has another density.
        ValueError: a mean of another shape than x.
    """
    check_same_shape("mean", mean, "x", x)
    if jnp.finfo(x.dtype).bits < jnp.finfo(mean.dtype).bits:
        raise TypeError(
            f"x is {x.dtype} but its transition was computed in {mean.dtype}; store "
            f"sampler states in {mean.dtype}, or log-probs belong to other states."
        )
    std = _std_like(std, mean)
    z = (x - mean) / std
    return -0.5 * z * z - jnp.log(std) - 0.5 * np.log(2 * np.pi)


def gaussian_log_prob(
    x: Data, mean: Data, std: Any, reduction: str = "mean"
) -> PerExample:
    """Log N(x; mean, std^2), reduced over the event dimensions.

    Args:
        x: [batch, *event], float32 or wider.
        mean: [batch, *event].
        std: scalar, [batch] or [batch, *event], > 0.
        reduction: 'mean' or 'sum' over event dimensions. The two differ by the
            factor D (event size), so a clip range belongs to one of them.

    Returns:
        [batch] in nats (per dimension for 'mean').

    Raises:
        TypeError: x has fewer bits than mean: a rounded state has another density.
        ValueError: unknown reduction, or a mean of another shape than x.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    density = gaussian_log_density(x, mean, std)
    axes = tuple(range(1, x.ndim))
    return (jnp.mean if reduction == "mean" else jnp.sum)(density, axis=axes)
