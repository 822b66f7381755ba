"""Diagonal Gaussians by the logarithms of their standard deviations."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import check_range, check_same_shape
from tmdjax.core.types import Array


def check_std(initial_std: float, log_std_bounds: tuple[float, float]) -> None:
    """Refuses a start that cannot be learned from.

    Raises:
        ValueError: bounds in the wrong order, or a standard deviation that is not
            inside them: it would have no gradient.
    """
    low, high = log_std_bounds
    check_range("log_std_bounds, lower", low, high=high)
    check_range("initial_std", initial_std, np.exp(low), np.exp(high))


def at_bounds(log_std: Any, bounds: tuple[float, float], like: Any) -> Array:
    """Share of the dimensions at or beyond a bound, where nothing is learned.

    Args:
        log_std: [dim].
        bounds: lowest and highest log_std; beyond them it has no gradient.
        like: an array whose shape the result gets, so that it averages like the other
            metrics of a batch.

    Returns:
        The share, the same number at every element of ``like``.
    """
    low, high = bounds
    share = jnp.mean((log_std <= low) | (log_std >= high))
    return jnp.broadcast_to(share, jnp.shape(like))


def gaussian_entropy(log_std: Any) -> Array:
    """Entropy in nats of N(., diag(std^2)), summed over the last axis."""
    return jnp.sum(0.5 * np.log(2 * np.pi * np.e) + log_std, axis=-1)


def gaussian_kl(shift: Any, log_std: Any, behaviour_log_std: Any) -> Array:
    """KL(behaviour || policy) of diagonal Gaussians, summed over the last axis.

    Args:
        shift: mean of the policy less that of the behaviour, [..., dim].
        log_std: logarithm of the policy's std, broadcast over shift.
        behaviour_log_std: logarithm of the std of the policy that acted, likewise.

    Returns:
        [...] in nats, >= 0; exactly 0 where the two are equal.
    """
    narrower = behaviour_log_std - log_std
    square = jnp.expm1(2 * narrower) + shift**2 * jnp.exp(-2 * log_std)
    return jnp.sum(0.5 * square - narrower, axis=-1)


def shifted_log_ratio(
    delta: Any, shift: Any, log_std: Any, behaviour_log_std: Any
) -> Array:
    """Log N(delta; shift, std^2) / N(delta; 0, behaviour_std^2), over the last axis.

    Exactly 0 where shift is 0 and the two standard deviations are equal, also where the
    compiler fuses a product into a difference: no such product is rounded then.

    Args:
        delta: what was drawn, less the mean of the policy that acted, [..., dim].
        shift: mean of the policy less that of the behaviour, the same shape.
        log_std: logarithm of the policy's std, broadcast over delta.
        behaviour_log_std: logarithm of the std of the policy that acted, likewise.

    Returns:
        [...] in nats, a sum over dim.

    Raises:
        ValueError: delta and shift differ in shape (a ratio of [batch] against
            [batch, 1] would broadcast).
    """
    check_same_shape("delta", delta, "shift", shift)
    narrower = behaviour_log_std - log_std
    scaled = (delta - shift) * jnp.exp(narrower)
    precision = jnp.exp(-2 * behaviour_log_std)
    each = narrower + 0.5 * precision * ((delta - scaled) * (delta + scaled))
    return jnp.sum(each, axis=-1)
