"""Training of flow maps from data: who jumps, who drops its condition, to which target.

References:
    MeanFlow, arXiv 2505.13447, algorithm 1 and sec. 4.2. Shortcut models: arXiv
    2410.12557.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tmdjax.core import prng, trees
from tmdjax.core.checks import check_choice, check_count, check_output, check_range
from tmdjax.core.conventions import time_like
from tmdjax.core.types import Array, Bool, Cond, Data, PerExample, SampleKeys, Time
from tmdjax.flows.flow_maps import (
    DERIVATIVES,
    AverageVelocity,
    apply_map,
    meanflow_error,
    normalised_loss,
)
from tmdjax.flows.matching import TimeSampler, ranged_time
from tmdjax.flows.paths import conditional_velocity, interpolate


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMapConfig:
    """Settings of a flow map's loss.

    Attributes:
        map_rate: of examples that learn a jump, r < s; the others learn r = s, which
            is flow matching.
        guidance: scale of the guidance in the velocity target; 1 is none.
        drop_rate: of examples trained under the null condition, with r = s and
            without guidance.
        shift: of the times, >= 1.
        time_range: of the times, before and after the shift.
        derivative: how du/ds is had: exactly, 'jvp', or by a 'difference'.
        delta: of the difference.
        loss_constant: c of the normalised loss over the number of elements.
    """

    map_rate: float = 0.25
    guidance: float = 1.0
    drop_rate: float = 0.1
    shift: float = 3.0
    time_range: tuple[float, float] = (0.001, 0.999)
    derivative: str = "jvp"
    delta: float = 5e-3
    loss_constant: float = 1.0

    def __post_init__(self) -> None:
        check_range("drop_rate", self.drop_rate, 0, 1)
        check_range("map_rate", self.map_rate, 0, 1)
        if self.drop_rate + self.map_rate > 1:
            raise ValueError(
                f"drop_rate={self.drop_rate} and map_rate={self.map_rate} are shares "
                f"of one batch; together they must not exceed 1."
            )
        check_range("guidance", self.guidance, 0)
        self.times()
        check_choice("derivative", self.derivative, DERIVATIVES)
        check_range("delta", self.delta, 0, open_low=True)
        check_range("loss_constant", self.loss_constant, 0, open_low=True)

    def times(self) -> TimeSampler:
        """Draws times: uniform on time_range, shifted, clipped to it."""
        return ranged_time(self.shift, *self.time_range)


def draw_roles(
    keys: SampleKeys, config: FlowMapConfig
) -> tuple[Bool[Array, "batch"], Bool[Array, "batch"]]:
    """Which examples drop their condition, and which jump; never both."""
    z = prng.uniform(keys)
    drops = z < config.drop_rate
    return drops, ~drops & (z < config.drop_rate + config.map_rate)


def guided_target(
    velocity: Callable[[Cond], Data],
    v: Data,
    cond: Cond,
    drops: Bool[Array, "batch"],
    null_cond: Cond,
    config: FlowMapConfig,
) -> tuple[Cond, Data]:
    """The condition and the velocity that an example is trained with.

    v_null + guidance (v - v_null) under its own condition; v itself under the null
    condition, where that is dropped.

    Args:
        velocity: the network's own velocity at the example's state under a condition;
            no gradient flows through it.
        v: conditional velocity of the path [batch, *event].
        cond: pytree of [batch, ...], or None.
        drops: [batch].
        null_cond: a pytree like a row of the condition.
        config: settings.

    Raises:
        ValueError: guidance or dropping without null_cond; a velocity of another shape
            than v.
    """
    if null_cond is None:
        if config.guidance != 1 or config.drop_rate:
            raise ValueError(
                f"guidance={config.guidance} and drop_rate={config.drop_rate} need "
                f"null_cond, the negative condition; give it, or set guidance=1 and "
                f"drop_rate=0."
            )
        return cond, v
    null = trees.in_every_row(null_cond, cond)
    if config.guidance != 1:
        negative = jax.lax.stop_gradient(check_output(velocity(null), v))
        guided = negative + config.guidance * (v - negative)
        v = jnp.where(time_like(drops, v), v, guided)
    mixed = jax.tree.map(lambda n, c: jnp.where(time_like(drops, c), n, c), null, cond)
    return mixed, v


def flow_map_loss(
    average_velocity: AverageVelocity,
    y: Data,
    s: Time,
    r: Time,
    v: Data,
    config: FlowMapConfig,
    *,
    derivative_of: AverageVelocity | None = None,
) -> tuple[PerExample, dict[str, Array]]:
    """The normalised error of the MeanFlow identity, [batch] in [0, 1), and metrics.

    Args:
        average_velocity: ``u(y, s, r)`` of the network that is trained.
        y: states [batch, *event].
        s: times [batch].
        r: times [batch], at most s.
        v: velocity at (y, s) [batch, *event].
        config: settings.
        derivative_of: u as du/ds alone evaluates it; None is average_velocity.

    Raises:
        ValueError: what :func:`tmdjax.flows.meanflow_error` refuses.
    """
    error, _ = meanflow_error(
        average_velocity,
        y,
        s,
        r,
        v,
        derivative_of=derivative_of,
        derivative=config.derivative,
        delta=config.delta,
        time_range=config.time_range,
    )
    count = math.prod(y.shape[1:])
    loss = normalised_loss(error, config.loss_constant * count)
    return loss, {"squared_error": error / count}


def shortcut_target(
    average_velocity: AverageVelocity, y: Data, s: Time, r: Time
) -> Data:
    """The average velocity from s to r as two jumps of half the length have it.

    Args:
        average_velocity: ``u(y, s, r)``; no gradient flows through it.
        y: states [batch, *event] at s.
        s: times [batch].
        r: times [batch], at most s; the jumps meet at (s + r) / 2.

    Returns:
        [batch, *event], the mean of u over the two jumps. A map along the straight line
        to one point answers with its own u(y, s, r).

    Raises:
        TypeError, ValueError: what :func:`tmdjax.flows.apply_map` refuses.

    References:
        Shortcut models, arXiv 2410.12557, eq. 4 (its step size d is s - r).
    """
    middle = (s + r) / 2
    first = check_output(average_velocity(y, s, middle), y, "the average velocity")
    half = apply_map(lambda *given: first, y, s, middle)
    second = check_output(average_velocity(half, middle, r), y, "the average velocity")
    return jax.lax.stop_gradient((first + second) / 2)


def shortcut_loss(
    average_velocity: AverageVelocity,
    x_data: Data,
    keys: SampleKeys,
    *,
    rate: float = 0.25,
    levels: int = 7,
    target_of: AverageVelocity | None = None,
) -> PerExample:
    """Flow matching, and for a share of examples agreement with two half jumps.

    An example that jumps does so over d = 2^-b, b uniform in 0, ..., levels - 1, from a
    time on the grid of d; the others learn the velocity, s = r, at a uniform time.

    Args:
        average_velocity: ``u(y, s, r)`` of the network that is trained.
        x_data: [batch, *event] float32.
        keys: [batch] typed keys.
        rate: share of examples that jump, in [0, 1].
        levels: how many step sizes 1, 1/2, 1/4, ... are trained, at least 1.
        target_of: the map that the half jumps are asked of, such as an average of
            parameters; None is average_velocity.

    Returns:
        [batch], squared errors as means over event dimensions.

    Raises:
        TypeError, ValueError: numbers out of range, or an average velocity of another
            kind or shape than x_data.

    References:
        Shortcut models, arXiv 2410.12557, algorithm 1; the noise of 1e-5 that stays in
        the data is that of its code.
    """
    check_range("rate", rate, 0, 1)
    check_count("levels", levels)
    keys = prng.split(keys, 5)
    jumps = prng.uniform(keys[:, 0]) < rate
    integer = jax.vmap(lambda key, high: jax.random.randint(key, (), 0, high))
    count = 2 ** integer(keys[:, 1], jnp.full(len(keys), levels))  # of steps of size d
    d = 1 / count.astype(x_data.dtype)
    end = integer(keys[:, 2], count) * d
    s = jnp.where(jumps, end + d, prng.uniform(keys[:, 3], x_data.dtype))
    r = jnp.where(jumps, end, s)
    noise = prng.normal(keys[:, 4], x_data.shape[1:], x_data.dtype)
    x_data = x_data + 1e-5 * noise
    y, v = interpolate(x_data, noise, s), conditional_velocity(x_data, noise)
    target = shortcut_target(target_of or average_velocity, y, s, r)
    target = jnp.where(time_like(jumps, y), target, v)
    u = check_output(average_velocity(y, s, r), y, "the average velocity")
    return jnp.mean(jnp.square(u - target), axis=tuple(range(1, y.ndim)))
