"""Log-ratios of two policies and the shapes that go with them."""

from typing import Any

import jax
import jax.numpy as jnp

from tmdjax.core.checks import check_same_shape
from tmdjax.core.types import Array

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-MAX_LOG_RATIO before exp; outside, no gradient."""


def log_ratio(log_prob: Any, other_log_prob: Any, mask: Any = None) -> Array:
    """log_prob - other_log_prob in float32 (float64 stays), 0 where masked out.

    Args:
        log_prob: any shape, any float dtype.
        other_log_prob: the same shape.
        mask: None, or the shape of log_prob or of its leading axes. A position that
            is masked out has no value and no gradient, even where its log-probs
            are not finite.

    Returns:
        The difference, of log_prob's shape, not clamped.

    Raises:
        ValueError: shapes that disagree.
    """
    check_same_shape("log_prob", log_prob, "the other log_prob", other_log_prob)
    return masked(log_prob, mask) - masked(other_log_prob, mask)


def masked(x: Any, mask: Any) -> Array:
    """The array in float32 at least, 0 and without gradient where masked out."""
    x = at_least_float32(x)
    return x if mask is None else jnp.where(as_mask(mask, x), x, 0)


def ratio(difference: Array) -> Array:
    """The exponential of a log-ratio clamped to +-MAX_LOG_RATIO."""
    return jnp.exp(jnp.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def fixed_ratio(difference: Array) -> Array:
    """:func:`ratio` as a constant: it weighs a loss and has no gradient."""
    return jax.lax.stop_gradient(ratio(difference))


def at_least_float32(x: Any) -> Array:
    """Half precision, integers and booleans become float32; float64 stays."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def as_mask(mask: Any, like: Array) -> Array:
    """A mask of booleans, or of numbers (0 is False), with like's shape."""
    return jnp.broadcast_to(over_leading_axes("mask", mask, like), like.shape) != 0


def over_leading_axes(name: str, array: Any, like: Array) -> Array:
    """An array to broadcast over ``like``, whose first axes it shares.

    Raises:
        ValueError: the array is neither a scalar, nor of like's shape, nor of its
            first axes (perhaps followed by axes of length 1). NumPy would broadcast
            some of those silently along the wrong axis.
    """
    array = jnp.asarray(array)
    shape, target = array.shape, like.shape
    shared = 0
    while shared < min(len(shape), len(target)) and shape[shared] == target[shared]:
        shared += 1
    rest = shape[shared:]
    if len(shape) > len(target) or any(n != 1 for n in rest) or (shape and not shared):
        raise ValueError(
            f"{name} has shape {shape} but log_prob has shape {target}; give that "
            f"shape, or one value for each entry of its first axes, "
            f"{target[:1]} say."
        )
    return array.reshape(shape + (1,) * (len(target) - len(shape)))
