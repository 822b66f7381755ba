"""Randomness with explicit typed keys, one a sample.

A sample's key depends on its global position alone, never on the microbatch or
device that holds it, so the same noise bits appear under every layout.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from tmdjax.core.types import Array, ArrayLike, Float, Key, SampleKeys


def check_key(key: Any, name: str = "key") -> None:
    """Raises TypeError for anything but a typed key (``jax.random.key``)."""
    if not (hasattr(key, "dtype") and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(
            f"{name} must be a typed key from jax.random.key(seed), got "
            f"{type(key).__name__} of dtype {getattr(key, 'dtype', None)}; wrap raw "
            f"key data with jax.random.wrap_key_data."
        )


def sample_keys(
    key: Key[Array, ""], count: int, start: int | ArrayLike = 0
) -> SampleKeys:
    """Keys for samples ``start .. start + count - 1`` of one experiment.

    Args:
        key: typed key.
        count: how many samples.
        start: global position of the first one.

    Returns:
        Typed keys ``[count]``; slices of a larger call are equal to it.
    """
    check_key(key)
    if key.shape:
        raise ValueError(
            f"key has shape {key.shape}; give one key, and each sample gets its own."
        )
    _check_numbers(start)
    return _numbered(key, count, start)


# Outside jit these are one program each, and not one an operation.
@functools.partial(jax.jit, static_argnames="count", inline=True)
def _numbered(key, count, start):
    return fold_in(key, jnp.arange(count) + start)


@functools.partial(jax.jit, inline=True)
def _folded(keys, data):
    keys, data = jnp.broadcast_arrays(keys, jnp.asarray(data, jnp.uint32))
    flat = jax.vmap(jax.random.fold_in)(keys.reshape(-1), data.reshape(-1))
    return flat.reshape(keys.shape)


def _check_numbers(data) -> None:
    if not jnp.issubdtype(jnp.result_type(data), jnp.integer):
        raise TypeError(
            f"only integers fold into a key, got {jnp.result_type(data)}; give a "
            f"step or a sample number."
        )
    if not isinstance(data, jax.core.Tracer) and np.any(np.asarray(data) < 0):
        raise ValueError(f"data={data} folded into a key must not be negative.")


def fold_in(keys: Key[Array, "..."], data: ArrayLike) -> Key[Array, "..."]:
    """``jax.random.fold_in`` with both arguments broadcast together.

    Raises:
        TypeError: data are not integers (a time in [0, 1] would fold in as 0).
        ValueError: concrete data are negative.
    """
    _check_numbers(data)
    if not isinstance(data, jax.Array):
        data = np.asarray(data, np.uint32)
    return _folded(keys, data)


def split(keys: SampleKeys, count: int = 2) -> Key[Array, "batch part"]:
    """``jax.random.split`` of each sample's key: keys [batch, count]."""
    return jax.vmap(lambda key: jax.random.split(key, count))(keys)


def normal(
    keys: SampleKeys, event_shape: Sequence[int], dtype: Any = jnp.float32
) -> Float[Array, "batch *event"]:
    """Standard normal noise ``[batch, *event_shape]``, one key a sample."""
    return jax.vmap(lambda k: jax.random.normal(k, tuple(event_shape), dtype))(keys)


def uniform(keys: SampleKeys, dtype: Any = jnp.float32) -> Float[Array, "batch"]:
    """Uniform numbers in [0, 1), one a sample."""
    return jax.vmap(lambda k: jax.random.uniform(k, (), dtype))(keys)
