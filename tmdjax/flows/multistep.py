"""Multistep solvers: steps that also use the data estimates of the steps before.

In the data estimate x0_hat = x - t v the ODE of the linear path is semi-linear, and
its step is exactly

    x' = (t'/t) x + (1 - t'/t) D,

where D is a mean of x0_hat over the step. Euler's step takes x0_hat at its start for D;
a multistep solver extrapolates from it and the one before, along half the log of the
signal-to-noise ratio, log((1 - t) / t), at no further evaluation. Steps from t = 1 and
to t = 0 are infinitely long on that axis, and are Euler's. So errors fall with the step
size h as h^2 (h^3 for UniPC) where steps shrink towards both ends, and as
h^2 log(1 / h) on uniform grids.

The solvers differ from Euler's in nothing but the velocity (x - D) / t that the row of
the coefficient table is given; UniPC also corrects the state that it comes from.
"""

from typing import Any

import jax.numpy as jnp
from flax import struct

from tmdjax.core.types import Array, Data

MULTISTEP = ("dpmpp_2m", "unipc")
"""DPM-Solver++(2M) and UniPC (order 2, B(h) = exp(h) - 1), both in data prediction."""


@struct.dataclass
class Past:
    """What a step needs to know of the two before it.

    Attributes:
        x: [batch, *event], the state that the last step went from.
        x0_hat: [batch, *event], the data estimate there.
        x0_hat_before: [batch, *event], the data estimate a step earlier.
    """

    x: Any
    x0_hat: Any
    x0_hat_before: Any


def no_past(x: Data) -> Past:
    """The past of a rollout that begins at x: none, so its first step is Euler's."""
    zero = jnp.zeros_like(x)
    return Past(x, zero, zero)


def multistep_weights(rows: dict[str, Array]) -> dict[str, Array]:
    """What each row weighs its past with, from the columns of consecutive rows.

    Args:
        rows: columns 't', 't_next' and 'log_snr_step' of a table, [steps] each.

    Returns:
        Columns [steps]. 'ahead' is the weight of x0_hat - x0_hat_last in D. The
        corrected state, where a past is known, is kept x_last + (1 - kept) D with
        D = x0_hat_last + newer (x0_hat - x0_hat_last)
        + older (x0_hat_before - x0_hat_last). The first row knows no past.

    References:
        UniPC, arXiv 2302.04867, eq. 9 and appendix E.
    """
    size = rows["log_snr_step"]
    zero = jnp.zeros(1, size.dtype)
    # Steps over the one before; 0 where either is infinite, or the other unknown.
    finite = jnp.where(jnp.isfinite(size), size, 0)
    growth = jnp.concatenate([zero, finite[1:] / size[:-1]])
    kept = jnp.concatenate([zero + 1, rows["t_next"][:-1] / rows["t"][:-1]])
    h = jnp.concatenate([zero + 1, size[:-1]])
    last_growth = jnp.concatenate([zero, growth[:-1]])
    # coth(h / 2) - 2 / h, by its series where the two would cancel.
    near = jnp.minimum(h, 1.0)
    series = near / 6 - near**3 / 360 + near**5 / 15120
    excess = jnp.where(h < 1, series, 1 / jnp.tanh(h / 2) - 2 / h)
    slope = excess / h * last_growth / (1 + last_growth)
    newer = (1 + excess) / 2 - slope
    # The first correction knows one estimate before, and takes the plain mean.
    newer = newer.at[:2].set(0.5)
    older = -last_growth * slope
    return {"ahead": growth / 2, "kept": kept, "newer": newer, "older": older}


def multistep_velocity(
    method: str, row: dict[str, Array], past: Past, x: Data, v: Data
) -> tuple[Data, Data, Past]:
    """The state that a step goes from, the velocity that makes it one of the solver.

    Args:
        method: 'dpmpp_2m' or 'unipc'.
        row: the time 't' and the row's :func:`multistep_weights`, scalars.
        past: of the rollout so far.
        x: [batch, *event], the state at t.
        v: [batch, *event], the velocity there.

    Returns:
        The state, for 'unipc' corrected by what v says of the step that led to x; the
        velocity (state - D) / t; and the past for the next step.

    References:
        DPM-Solver++, arXiv 2211.01095, algorithm 2; UniPC, arXiv 2302.04867,
        algorithm 1.
    """
    t = row["t"]
    x0_hat = x - t * v
    change = x0_hat - past.x0_hat
    state = x
    if method == "unipc":
        before = past.x0_hat_before - past.x0_hat
        mean = past.x0_hat + row["newer"] * change + row["older"] * before
        state = row["kept"] * past.x + (1 - row["kept"]) * mean
    velocity = v + (state - x - row["ahead"] * change) / t
    return state, velocity, Past(state, x0_hat, past.x0_hat)
