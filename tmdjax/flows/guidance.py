"""Guidance wraps a velocity; training drops conditions to make it possible."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
    null_cond = jax.tree.map(np.asarray, null_cond)
    return functools.partial(_guided, velocity, float(scale), null_cond)


def _guided(
    velocity: Velocity, scale: Any, null_cond: Cond, x: Data, t: Time, cond: Cond
) -> Data:
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


def guidance_scale(velocity: Velocity) -> float:
    """The scale that :func:`classifier_free_guidance` gave a velocity, else 1."""
    if isinstance(velocity, functools.partial):
        if velocity.func is _guided:
            return float(velocity.args[1])
        return guidance_scale(velocity.func)
    return 1.0


def as_pytree(velocity: Velocity) -> Velocity:
    """A velocity that may be an argument of a jitted function.

    Arrays held by (nested) ``functools.partial``, such as parameters, become leaves
    of the pytree: arguments of the compiled program instead of constants in it, so
    that other parameters need no other compilation. Anything else, a closure say,
    stays a static part.

    Args:
        velocity: e.g. ``functools.partial(apply_fn, params)``, guided or not.

    Returns:
        The same function as a ``jax.tree_util.Partial``.
    """
    if not isinstance(velocity, functools.partial):
        return jax.tree_util.Partial(velocity)
    bound = [as_pytree(a) if callable(a) else a for a in velocity.args]
    leaves = jax.tree.leaves((bound, velocity.keywords))
    if not all(isinstance(leaf, jax.Array | np.ndarray | float) for leaf in leaves):
        return jax.tree_util.Partial(velocity)  # an option that jit cannot trace
    return jax.tree_util.Partial(velocity.func, *bound, **velocity.keywords)


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
