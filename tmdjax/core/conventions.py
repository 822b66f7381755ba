"""Time and direction, fixed once.

t in [0, 1]; t = 1 is noise and t = 0 is data:

    x_t = (1 - t) x_data + t x_noise,      v = d x_t / d t = x_noise - x_data.

Samplers walk t downwards. Some papers use tau = 1 - t (0 is noise) with
velocity u = x_data - x_noise = -v. The bridge below is the only place where the
two meet; it is its own inverse.
"""

from typing import Any

import jax.numpy as jnp
from flax import struct

from tmdjax.core.checks import check_time
from tmdjax.core.functions import VelocityWrapper, as_pytree
from tmdjax.core.types import Array, ArrayLike, Velocity


def flip_time(t: Any) -> Any:
    """Tau = 1 - t, and back: applied twice it is the identity (up to rounding)."""
    return 1 - t


def flip_velocity(velocity: Velocity) -> Velocity:
    """v(x, t) = -u(x, 1 - t), and back.

    Args:
        velocity: ``(x, t, cond) -> [batch, *event]`` in either convention.

    Returns:
        The same field in the other convention.
    """
    return _Flipped(as_pytree(velocity))


@struct.dataclass(eq=False)
class _Flipped(VelocityWrapper):
    def __call__(self, x: Any, t: Any, cond: Any = None) -> Any:
        return -self.velocity(x, flip_time(t), cond)

    def check_times(self, times: Any) -> None:
        """Those of the field inside."""
        super().check_times(flip_time(times))


def expand_time(t: ArrayLike, batch: int, dtype: Any = jnp.float32) -> Array:
    """Returns t as ``[batch]``; a scalar is broadcast (once, at the entrance).

    Raises:
        ValueError: t is neither a scalar nor of shape [batch], or a concrete value
            lies outside [0, 1].
    """
    check_time(t)
    t = jnp.asarray(t, dtype)
    if t.ndim == 0:
        return jnp.broadcast_to(t, (batch,))
    if t.shape != (batch,):
        raise ValueError(
            f"t has shape {t.shape}; give a scalar or one time a sample, ({batch},)."
        )
    return t


def time_like(t: Array, x: Array) -> Array:
    """Reshapes per-sample values [batch] to broadcast over x [batch, *event]."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))
