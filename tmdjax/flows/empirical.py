"""A finite set of samples as data: the exact velocity of its flow.

A model that needs no training: its marginal velocity, guidance included, is known in
closed form, so whatever is distilled from it can be compared with the truth.
"""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import check_batch, check_finite
from tmdjax.core.types import Array, Cond, Data, Float, Int, Time, Velocity

LEAST_TIME = 1e-4
"""Earlier times count as this one: the velocity grows as 1 / t off the samples."""

# Conditional samples at a time: each looks at a group of its own.
_CHUNK = 8
_EXACT = jax.lax.Precision.HIGHEST


def empirical_flow(bank: Any) -> Velocity:
    """The flow from noise to samples that are equally likely.

    v(x, t) = (x - x0_hat) / t with x0_hat = sum_k w_k X_k, the mean of the samples
    under w = softmax_k(-|x - (1 - t) X_k|^2 / (2 t^2)); k runs over the samples of the
    group that the condition names, or over all groups.

    At t = 1 that is x minus the mean. Towards t = 0 the weights become those of the
    nearest sample: v = 0 on a sample, and large elsewhere; times below ``LEAST_TIME``
    count as ``LEAST_TIME``, so v is finite everywhere.

    A half of the batch in which every condition names a group costs batch x n x dim
    operations; where one asks for all groups, that half is multiplied with the whole
    bank. Its squared distances are exact to a few 1e-7 of the samples' squared norms:
    samples that are nearer to each other than that are not told apart.

    Args:
        bank: [group, n, *event] finite floats.

    Returns:
        ``velocity(x, t, cond=None)`` for x [batch, *event], t [batch] in [0, 1] and
        cond int32 [batch] in [0, group], where ``group`` (one past the last) and None
        stand for all groups: the null condition. The result is in the dtype of x. It is
        a ``jax.tree_util.Partial`` that holds the bank, so a compiled program can take
        it as an argument.

    Raises:
        ValueError: a bank of fewer axes, without samples or with a value that is not
            finite; at the call, an x of another event shape, or a condition of another
            batch or (where concrete) out of range.
    """
    bank = jnp.asarray(bank)
    if bank.ndim < 3 or not bank.size:
        raise ValueError(
            f"bank has shape {bank.shape}; give [group, n, *event] with at least one "
            f"sample."
        )
    check_finite(bank, "bank")
    # A common offset would cost digits where squared norms cancel.
    mean = bank.mean((0, 1))
    return jax.tree_util.Partial(_velocity, bank - mean, mean)


def _velocity(
    bank: Float[Array, "group n *event"],
    mean: Float[Array, "*event"],
    x: Data,
    t: Time,
    cond: Cond = None,
) -> Data:
    """Velocity at x; the bank has ``mean`` subtracted."""
    batch, groups = len(x), len(bank)
    if x.shape[1:] != mean.shape:
        raise ValueError(
            f"x has shape {x.shape}; the bank's samples need [batch, "
            f"{', '.join(map(str, mean.shape))}]."
        )
    time = jnp.maximum(t.astype(x.dtype), LEAST_TIME)[:, None]
    samples = bank.astype(x.dtype).reshape(*bank.shape[:2], -1)
    flat_mean = mean.astype(x.dtype).reshape(-1)
    centred = x.reshape(batch, -1) - (1 - time) * flat_mean
    if cond is None:
        x0_hat = _mean_of_all(samples, centred, time)
    else:
        cond = _checked(cond, batch, groups)
        # Guidance puts the null conditions into a half of their own: the other half
        # is spared the products with the whole bank.
        halves = (slice(0, batch // 2), slice(batch // 2, batch))
        parts = [
            _mean(samples, centred[half], time[half], cond[half])
            for half in halves
            if half.start < half.stop
        ]
        x0_hat = jnp.concatenate(parts)
    v = (x.reshape(batch, -1) - flat_mean - x0_hat) / time
    return v.reshape(x.shape)


def _checked(cond: Any, batch: int, groups: int) -> Int[Array, "batch"]:
    check_batch("cond", cond, batch)
    if np.ndim(cond) != 1 or not jnp.issubdtype(jnp.result_type(cond), jnp.integer):
        raise ValueError(
            f"cond has shape {np.shape(cond)} and dtype {jnp.result_type(cond)}; give "
            f"one int32 a sample, the number of its group."
        )
    if not isinstance(cond, jax.core.Tracer):
        values = np.asarray(cond)
        if ((values < 0) | (values > groups)).any():
            raise ValueError(
                f"cond holds {values.min()} to {values.max()}; groups are 0 to "
                f"{groups - 1}, and {groups} stands for all."
            )
    return jnp.asarray(cond)


def _mean_of_group(
    samples: Float[Array, "n dim"],
    x: Float[Array, "dim"],
    t: Float[Array, "1"],
) -> Float[Array, "dim"]:
    distances = jnp.square((x - (1 - t) * samples) / t).sum(-1)
    return jnp.matmul(jax.nn.softmax(-distances / 2), samples, precision=_EXACT)


def _mean_of_groups(samples: Array, x: Array, t: Array, cond: Array) -> Array:
    """Each sample against its own group; the null condition counts as the last."""

    def one(args: tuple[Array, Array, Array]) -> Array:
        point, time, group = args
        return _mean_of_group(samples[group], point, time)

    group = jnp.minimum(cond, len(samples) - 1)
    return jax.lax.map(one, (x, t, group), batch_size=_CHUNK)


def _mean_of_all(samples: Array, x: Array, t: Array) -> Array:
    """By two matrix products: [batch, group * n] logits, then the mean."""
    samples = samples.reshape(-1, samples.shape[-1])
    # |x|^2 is common to all logits of a point.
    product = jnp.matmul((1 - t) * x, samples.T, precision=_EXACT)
    squares = (1 - t) ** 2 * jnp.square(samples).sum(-1)
    weights = jax.nn.softmax((product - squares / 2) / t**2, axis=-1)
    return jnp.matmul(weights, samples, precision=_EXACT)


def _mean(samples: Array, x: Array, t: Array, cond: Array) -> Array:
    """Each sample against what its condition names."""
    null = cond == len(samples)
    conditional = _mean_of_groups(samples, x, t, cond)
    unconditional = jax.lax.cond(
        jnp.any(null), _mean_of_all, lambda _, x, t: x, samples, x, t
    )
    return jnp.where(null[:, None], unconditional, conditional)
