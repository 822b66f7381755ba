"""Functions as values: arguments of compiled programs, wrappers that can be asked."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import struct


@struct.dataclass(eq=False)
class VelocityWrapper:
    """A velocity around another one, of which it keeps the facts.

    Subclasses are pytrees that are called like any velocity; :func:`around` finds one
    through any others, which it does not through a lambda.

    Attributes:
        velocity: the one inside, as :func:`as_pytree` makes it.
    """

    velocity: Any

    def check_times(self, times: np.ndarray) -> None:
        """Raises or warns where a solver is to ask at times that it does not know.

        Args:
            times: all times [n] of a walk, concrete.
        """
        if isinstance(self.velocity, VelocityWrapper):
            self.velocity.check_times(times)


def around(velocity: Any, kind: type) -> Any:
    """The outermost wrapper of a kind around a velocity; None where there is none."""
    while isinstance(velocity, VelocityWrapper):
        if isinstance(velocity, kind):
            return velocity
        velocity = velocity.velocity
    return None


def without(velocity: Any, kind: type) -> Any:
    """The velocity without its wrappers of a kind, other wrappers kept."""
    if not isinstance(velocity, VelocityWrapper):
        return velocity
    inside = without(velocity.velocity, kind)
    if isinstance(velocity, kind):
        return inside
    return dataclasses.replace(velocity, velocity=inside)


def as_pytree(function: Callable[..., Any]) -> Any:
    """A velocity (or apply_fn) that may be an argument of a jitted function.

    Arrays held by (nested) ``functools.partial``, such as parameters, become leaves of
    the pytree: arguments of the compiled program instead of constants in it, so that
    other parameters need no other compilation. Everything else stays static: options,
    Python numbers, and whatever a closure holds. Functions that are pytrees already
    (``jax.tree_util.Partial``, a :class:`VelocityWrapper`) stay what they are.

    Args:
        function: e.g. ``functools.partial(apply_fn, params)``, guided or not.

    Raises:
        TypeError: a bound argument that is neither an array nor hashable.
    """

    def hold(bound: Any) -> Any:
        if isinstance(bound, jax.Array | np.ndarray | np.generic):
            return bound
        if callable(bound):
            return as_pytree(bound)
        try:
            hash(bound)
        except TypeError as error:
            raise TypeError(
                f"a functools.partial holds {bound!r}, which a compiled program can "
                f"neither take as an array nor be told apart by; bind arrays and "
                f"hashable options (numbers, strings, tuples, frozen dataclasses)."
            ) from error
        return _Static(bound)

    def convert(leaf: Any) -> Any:
        if not callable(leaf):
            return leaf
        if not isinstance(leaf, functools.partial):
            return jax.tree_util.Partial(leaf)
        bound = jax.tree.map(hold, (leaf.args, leaf.keywords))
        return jax.tree_util.Partial(_call, as_pytree(leaf.func), *bound)

    return jax.tree.map(convert, function)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    value: Any


def _call(function: Any, args: Any, keywords: Any, *inputs: Any, **options: Any) -> Any:
    args, keywords = jax.tree.map(
        lambda bound: bound.value if isinstance(bound, _Static) else bound,
        (args, keywords),
        is_leaf=lambda bound: isinstance(bound, _Static),
    )
    return function(*args, *inputs, **{**keywords, **options})
