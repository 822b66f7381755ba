"""Guidance wraps a velocity; training drops conditions to make it possible."""

from typing import Any

import jax
import jax.numpy as jnp

from tmdjax.core import prng
from tmdjax.core.checks import check_range
from tmdjax.core.types import Cond, Data, SampleKeys, Time, Velocity


def classifier_free_guidance(
    velocity: Velocity, scale: float, null_cond: Cond
) -> Velocity:
    """V = v_null + scale (v_cond - v_null), both evaluated in one doubled batch.

    Args:
        velocity: conditional velocity(x, t, cond).
        scale: 1 is the conditional model itself (returned unwrapped, no extra
            cost), 0 the unconditional one, > 1 sharpens.
        null_cond: pytree like cond without its batch axis: the "no condition".

    Returns:
        A velocity(x, t, cond) that costs two evaluations a call.

    References:
        Ho and Salimans, arXiv 2207.12598, eq. 6 (their w = scale - 1).
    """
    if scale == 1.0:
        return velocity

    def guided(x: Data, t: Time, cond: Cond) -> Data:
        batch = x.shape[0]
        both = jax.tree.map(
            lambda c, n: jnp.concatenate(
                [c, jnp.broadcast_to(jnp.asarray(n, c.dtype), c.shape)]
            ),
            cond,
            null_cond,
        )
        v = velocity(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both)
        conditional, unconditional = v[:batch], v[batch:]
        return unconditional + scale * (conditional - unconditional)

    return guided


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
    return jax.tree.map(
        lambda c, n: jnp.where(
            drop.reshape(drop.shape + (1,) * (c.ndim - 1)), jnp.asarray(n, c.dtype), c
        ),
        cond,
        null_cond,
    )
