"""Flow matching: regress a network onto the conditional velocity."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tmdjax.core import prng, trees
from tmdjax.core.checks import check_output, check_range, check_same_shape, check_time
from tmdjax.core.conventions import time_like
from tmdjax.core.types import ApplyFn, Array, Cond, Data, Params, SampleKeys, Time
from tmdjax.flows.coupling import Coupling
from tmdjax.flows.grids import custom_grid, shift_time
from tmdjax.flows.paths import conditional_velocity, interpolate

TimeSampler = Callable[[SampleKeys], Time]


def uniform_time() -> TimeSampler:
    """Times uniform in [0, 1)."""
    return prng.uniform


def logit_normal_time(mean: float = 0.0, std: float = 1.0) -> TimeSampler:
    """Times sigmoid(mean + std z), z standard normal: more in the middle of the path.

    References:
        Esser et al., arXiv 2403.03206, sec. 3.1.
    """
    check_range("std", std, 0, open_low=True)
    return lambda keys: jax.nn.sigmoid(mean + std * prng.normal(keys, ()))


def beta_time(alpha: float = 1.5, share: float = 0.999) -> TimeSampler:
    """Times 1 - share (1 - b), b from Beta(alpha, 1): more of them near the noise.

    Args:
        alpha: > 0; 1 draws uniformly.
        share: of [0, 1], the times above 1 - share that are drawn; in (0, 1].

    References:
        pi_0, arXiv 2410.24164, appendix B.
    """
    check_range("alpha", alpha, 0, open_low=True)
    check_range("share", share, 0, 1, open_low=True)
    return lambda keys: 1 - share * (1 - prng.uniform(keys) ** (1 / alpha))


def discrete_time(times: Any) -> TimeSampler:
    """Times drawn uniformly from given ones [n] in [0, 1], as for n Euler steps."""
    check_time(times, "times")
    times = jnp.asarray(times, jnp.float32)

    def sample(keys: SampleKeys) -> Time:
        pick = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(times)))
        return times[pick(keys)]

    return sample


def shifted_time(sampler: TimeSampler, shift: float) -> TimeSampler:
    """The times of another sampler, each moved by :func:`~tmdjax.flows.shift_time`."""
    return lambda keys: shift_time(sampler(keys), shift)


def ranged_time(shift: float, low: float = 0.001, high: float = 0.999) -> TimeSampler:
    """Times uniform on [low, high], then shifted, then clipped to [low, high].

    Raises:
        ValueError: shift < 1, or no 0 <= low < high <= 1.
    """
    check_range("shift", shift, 1)
    check_range("time_range[0]", low, 0, high, open_high=True)
    check_range("time_range[1]", high, low, 1)

    def sample(keys: SampleKeys) -> Time:
        t = shift_time(low + (high - low) * prng.uniform(keys), shift)
        return jnp.clip(t, low, high)

    return sample


def noised_start(
    x_data: Data,
    keys: SampleKeys,
    times: Any,
    *,
    t: Time | None = None,
    noise: Data | None = None,
) -> tuple[Data, Time, Data]:
    """Noised data at the start of a random step of a grid: where few steps begin.

    At the first time of the grid the state is t x_noise, without data: there a
    sampler starts from noise alone.

    Args:
        x_data: [batch, *event].
        keys: [batch].
        times: a grid, decreasing to 0; its last time is no start.
        t: starts [batch] that other code drew, instead of keys.
        noise: [batch, *event], the noise that other code drew, instead of keys.

    Returns:
        x_t, t [batch], and the noise.

    Raises:
        ValueError: noise of another shape than x_data, or t outside [0, 1].
    """
    times, keys = custom_grid(times), prng.split(keys)
    if t is None:
        t = discrete_time(times[:-1])(keys[:, 0])
    if noise is None:
        noise = prng.normal(keys[:, 1], x_data.shape[1:], x_data.dtype)
    check_same_shape("noise", noise, "x_data", x_data)
    check_time(t, "t")
    weight = jnp.where(t >= jnp.float32(times[0]), 0.0, 1 - t)
    x_t = time_like(weight, x_data) * x_data + time_like(t, x_data) * noise
    return x_t, t, noise


def drop_condition(keys: SampleKeys, cond: Cond, null_cond: Cond, rate: float) -> Any:
    """Replaces each sample's condition by the null condition with probability rate.

    Args:
        keys: [batch] typed keys.
        cond: pytree of [batch, ...] arrays.
        null_cond: the same tree without batch axis.
        rate: in [0, 1].

    Returns:
        A tree like cond.
    """
    check_range("rate", rate, 0, 1)
    drop = prng.uniform(keys) < rate
    null = trees.in_every_row(null_cond, cond)
    return jax.tree.map(lambda c, n: jnp.where(time_like(drop, c), n, c), cond, null)


def flow_matching_loss(
    params: Params,
    apply_fn: ApplyFn,
    x_data: Data,
    keys: SampleKeys,
    cond: Cond = None,
    *,
    x_noise: Data | None = None,
    coupling: Coupling | None = None,
    time_sampler: TimeSampler | None = None,
    null_cond: Cond = None,
    drop_rate: float = 0.0,
) -> tuple[Array, dict[str, Array]]:
    """Mean squared error to the conditional velocity, per example.

    Args:
        params: nested dict handed to apply_fn.
        apply_fn: ``(params, x_t, t, cond) -> velocity`` [batch, *event].
        x_data: [batch, *event] float32.
        keys: [batch] typed keys: time, noise and dropping are drawn from them.
        cond: conditions of the batch, or None.
        x_noise: [batch, *event], the noise that belongs to each sample; drawn
            independently if None. Pairs made by a sampler give reflow.
        coupling: says which noise goes with which sample of the batch, such as
            :func:`~tmdjax.flows.optimal_coupling`; None leaves them as they are.
        time_sampler: keys -> t [batch]; uniform if None.
        null_cond: the condition that stands for "none".
        drop_rate: how often a sample's condition is replaced by null_cond.

    Returns:
        loss [batch] (mean over event dimensions) and per-example metrics.

    Raises:
        ValueError: drop_rate > 0 without a condition and its null; x_noise of another
            shape than x_data.

    References:
        Lipman et al., arXiv 2210.02747, eq. 14 with the linear path. Reflow: Liu et
        al., arXiv 2209.03003, sec. 2.
    """
    keys = prng.split(keys, 3)
    t = (time_sampler or uniform_time())(keys[:, 0])
    if x_noise is None:
        x_noise = prng.normal(keys[:, 1], x_data.shape[1:], x_data.dtype)
    check_same_shape("x_noise", x_noise, "x_data", x_data)
    if coupling is not None:
        x_noise = coupling(x_data, x_noise, prng.fold_in(keys[:, 1], 0))
    if drop_rate:
        if cond is None or null_cond is None:
            raise ValueError(
                f"drop_rate={drop_rate} needs both cond and null_cond; without a "
                f"condition set drop_rate=0."
            )
        cond = drop_condition(keys[:, 2], cond, null_cond, drop_rate)
    predicted = apply_fn(params, interpolate(x_data, x_noise, t), t, cond)
    check_output(predicted, x_data)
    error = predicted - conditional_velocity(x_data, x_noise)
    loss = jnp.mean(jnp.square(error), axis=tuple(range(1, error.ndim)))
    return loss, _loss_by_time(loss, t)


def _loss_by_time(loss: Array, t: Array) -> dict[str, Any]:
    """The loss of the half near the data and of the half near the noise.

    Each example counts twice or not at all, so that batch means are the loss of
    that half for uniform times.
    """
    near_data = t < 0.5
    return {
        "loss_near_data": 2 * jnp.where(near_data, loss, 0.0),
        "loss_near_noise": 2 * jnp.where(near_data, 0.0, loss),
    }
