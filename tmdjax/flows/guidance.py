"""Guidance wraps a velocity; training drops conditions to make it possible."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from tmdjax.core import prng
from tmdjax.core.checks import check_range
from tmdjax.core.types import Cond, Data, SampleKeys, Time, Velocity


def classifier_free_guidance(
    velocity: Velocity, scale: float, null_cond: Cond, *, freeze_null: bool = False
) -> Velocity:
    """V = v_null + scale (v_cond - v_null), both evaluated in one doubled batch.

    Args:
        velocity: conditional velocity(x, t, cond).
        scale: 1 is the conditional model itself (returned unwrapped, no extra
            cost), 0 the unconditional one, > 1 sharpens.
        null_cond: pytree like cond without its batch axis: the "no condition".
        freeze_null: no gradient flows through v_null (Flow-GRPO trains so).

    Returns:
        A velocity(x, t, cond) that costs two evaluations a call.

    References:
        Ho and Salimans, arXiv 2207.12598, eq. 6 (their w = scale - 1).
    """
    if scale == 1.0:
        return velocity
    null_cond = jax.tree.map(np.asarray, null_cond)
    rule = _guided_frozen_null if freeze_null else _guided
    return functools.partial(rule, velocity, np.float32(scale), null_cond)


def _guided(
    velocity: Velocity, scale: Any, null_cond: Cond, x: Data, t: Time, cond: Cond
) -> Data:
    conditional, unconditional = _both(velocity, null_cond, x, t, cond)
    return unconditional + scale * (conditional - unconditional)


def _guided_frozen_null(
    velocity: Velocity, scale: Any, null_cond: Cond, x: Data, t: Time, cond: Cond
) -> Data:
    conditional, unconditional = _both(velocity, null_cond, x, t, cond)
    unconditional = jax.lax.stop_gradient(unconditional)
    return unconditional + scale * (conditional - unconditional)


def _both(
    velocity: Velocity, null_cond: Cond, x: Data, t: Time, cond: Cond
) -> tuple[Data, Data]:
    batch = x.shape[0]
    both = jax.tree.map(
        lambda c, n: jnp.concatenate(
            [c, jnp.broadcast_to(jnp.asarray(n, c.dtype), c.shape)]
        ),
        cond,
        null_cond,
    )
    v = velocity(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both)
    return v[:batch], v[batch:]


def guidance_scale(velocity: Any) -> float:
    """The scale that :func:`classifier_free_guidance` gave a velocity, else 1."""
    scale = _scale(velocity)
    return 1.0 if scale is None else float(scale)


def known_guidance(velocity: Any) -> float | None:
    """:func:`guidance_scale`, or None where the scale is traced."""
    scale = _scale(velocity)
    if isinstance(scale, jax.core.Tracer):
        return None
    return 1.0 if scale is None else float(scale)


def _scale(velocity: Any) -> Any:
    for rule in (_guided, _guided_frozen_null):
        found = find_partial(velocity, rule)
        if found is not None:
            return found.args[1]
    return None


def find_partial(function: Any, wanted: Callable[..., Any]) -> Any:
    """The ``functools.partial`` of ``wanted`` that a function is or wraps, or None.

    How a velocity carries facts (its guidance, its grid): wrappers are partials of
    named functions, and their arguments are looked through from without to within.
    """
    if not isinstance(function, functools.partial):
        return None
    if function.func is wanted:
        return function
    inner = (find_partial(f, wanted) for f in (function.func, *function.args))
    return next((found for found in inner if found is not None), None)


def as_pytree(function: Callable[..., Any]) -> Any:
    """A velocity (or apply_fn) that may be an argument of a jitted function.

    Arrays held by (nested) ``functools.partial``, such as parameters, become leaves
    of the pytree: arguments of the compiled program instead of constants in it, so
    that other parameters need no other compilation. Everything else stays static:
    options, Python numbers, and whatever a closure holds.

    Args:
        function: e.g. ``functools.partial(apply_fn, params)``, guided or not.

    Returns:
        The same function as a ``jax.tree_util.Partial``.
    """
    if not isinstance(function, functools.partial):
        return jax.tree_util.Partial(function)
    args = [as_pytree(arg) if callable(arg) else arg for arg in function.args]
    leaves, structure = jax.tree.flatten((args, dict(function.keywords)))
    dynamic = [isinstance(x, jax.Array | np.ndarray | np.generic) for x in leaves]
    if all(dynamic):
        return jax.tree_util.Partial(function.func, *args, **function.keywords)
    static = tuple(_ARRAY if d else leaf for d, leaf in zip(dynamic, leaves))
    try:
        hash(static)
    except TypeError:
        return jax.tree_util.Partial(function)
    bound = _Bound(function.func, structure, static)
    return jax.tree_util.Partial(bound, *(x for d, x in zip(dynamic, leaves) if d))


_ARRAY = "an array that is given at the call"


@dataclasses.dataclass(frozen=True)
class _Bound:
    """A function with some bound arguments known, and the arrays among them to come."""

    func: Callable[..., Any]
    structure: Any
    static: tuple[Any, ...]

    def __call__(self, *given: Any) -> Any:
        count = sum(leaf is _ARRAY for leaf in self.static)
        arrays = iter(given[:count])
        leaves = [next(arrays) if x is _ARRAY else x for x in self.static]
        args, keywords = jax.tree.unflatten(self.structure, leaves)
        return self.func(*args, *given[count:], **keywords)


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
