"""Velocities that carry facts: the scale of their guidance, the grid they know.

A fact is a static field of a registered dataclass around the velocity: it is there to
be asked for inside compiled programs too, and another value is another program. Around
a plain function nothing is known, and nothing is claimed: a lambda that calls a guided
velocity is one of unknown guidance.
"""

import warnings
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import struct

from tmdjax.core import trees
from tmdjax.core.checks import check_finite, check_output
from tmdjax.core.functions import VelocityWrapper, around, as_pytree
from tmdjax.core.types import Cond, Data, Time, Velocity

SAME_TIME = 1e-6
"""Times that differ by no more are one: float32 and float64 of one knot."""


@struct.dataclass(eq=False)
class Guided(VelocityWrapper):
    """What :func:`classifier_free_guidance` makes of a velocity.

    Attributes:
        velocity: conditional velocity(x, t, cond).
        scale: a number, static; 1 is the conditional velocity, 0 the unconditional one.
        null_cond: pytree like cond without its batch axis.
        freeze_null: no gradient flows through the unconditional velocity.
    """

    scale: float = struct.field(pytree_node=False)
    null_cond: Any
    freeze_null: bool = struct.field(pytree_node=False, default=False)

    def __call__(self, x: Data, t: Time, cond: Cond) -> Data:
        """v_null + scale (v_cond - v_null), both evaluated in one doubled batch."""
        batch = x.shape[0]
        null = trees.in_every_row(self.null_cond, cond)
        both = jax.tree.map(lambda *pair: jnp.concatenate(pair), cond, null)
        twice = jnp.concatenate([x, x])
        v = check_output(self.velocity(twice, jnp.concatenate([t, t]), both), twice)
        conditional, unconditional = v[:batch], v[batch:]
        if self.freeze_null:
            unconditional = jax.lax.stop_gradient(unconditional)
        scale = np.float32(self.scale)
        return unconditional + scale * (conditional - unconditional)


@struct.dataclass(eq=False)
class OnGrid(VelocityWrapper):
    """A velocity that is defined at the times of one grid alone.

    Attributes:
        velocity: velocity(x, t, cond).
        times: the grid, K + 1 numbers decreasing to 0, static: float64 in any program.
    """

    times: tuple[float, ...] = struct.field(pytree_node=False)

    def __call__(self, x: Data, t: Time, cond: Cond = None) -> Data:
        """The velocity itself."""
        return self.velocity(x, t, cond)

    def check_times(self, times: np.ndarray) -> None:
        """Warns of times that are no start of a step of the grid."""
        if not isinstance(self.times, jax.core.Tracer):
            own = np.asarray(self.times)[:-1]
            apart = np.abs(times[:, None] - own).min(1) > SAME_TIME
            if apart.any():
                warnings.warn(
                    f"this velocity knows the starts {np.round(own, 4).tolist()} of "
                    f"Euler steps alone, and is asked at "
                    f"{np.round(times[apart], 4).tolist()[:5]}. Walk its own grid by "
                    f"method='euler', or take the network without its grid.",
                    UserWarning,
                    stacklevel=4,
                )
        super().check_times(times)


def classifier_free_guidance(
    velocity: Velocity, scale: float, null_cond: Cond, *, freeze_null: bool = False
) -> Velocity:
    """Guides a velocity: v_null + scale (v_cond - v_null), in one doubled batch.

    Args:
        velocity: conditional velocity(x, t, cond).
        scale: a finite number, not traced: 1 is the conditional model itself (returned
            unwrapped, no extra cost), 0 the unconditional one, > 1 sharpens.
        null_cond: pytree like cond without its batch axis: the "no condition".
        freeze_null: no gradient flows through v_null (Flow-GRPO trains so).

    Returns:
        A :class:`Guided` velocity(x, t, cond) that costs two evaluations a call.

    Raises:
        TypeError: the scale is not a number, or traced.
        ValueError: it is not finite.

    References:
        Ho and Salimans, arXiv 2207.12598, eq. 6 (their w = scale - 1).
    """
    if isinstance(scale, str | jax.core.Tracer):
        raise TypeError(
            f"the guidance scale is {scale!r}; give a number that is known when the "
            f"program is traced: the scale is a fact that the velocity carries."
        )
    scale = float(scale)
    check_finite(scale, "the guidance scale", "Give a finite number.")
    if scale == 1.0:
        return velocity
    null_cond = jax.tree.map(np.asarray, null_cond)
    return Guided(as_pytree(velocity), scale, null_cond, freeze_null)


def guidance_scale(velocity: Any) -> float | None:
    """The scale of a :class:`Guided` velocity, also through other wrappers.

    Returns:
        None where it is unknown: of any other function, whether it is guided or not.
    """
    guided = around(velocity, Guided)
    return None if guided is None else guided.scale


def guidance_differs(scale: float | None, other: float | None) -> bool:
    """Whether two scales differ, as far as one knows.

    None is unknown, which a velocity without guidance is too: it agrees with another
    unknown scale and with 1.
    """
    return (1.0 if scale is None else scale) != (1.0 if other is None else other)
