"""What a solver is told of its equation beside the state, scaled as PDEArena does."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import check_batch
from tmdjax.core.types import Array

RANGES = {"dt": (0.15, 0.25), "dx": (0.2, 0.3), "viscosity": (0.5, 1.5)}
"""Of what :func:`conditions` scales to about 0 .. 10 (viscosity: 0 .. 100)."""


def conditions(
    dt: Any, dx: Any, viscosity: Any = None, *, allow_extrapolation: bool = False
) -> Array:
    """Conditions of a batch, scaled as published.

    (dt - 0.15) 100, (dx - 0.2) 100 and, where it varies, (viscosity - 0.5) 100; dt is
    the time between frames of the data, not the step of the model.

    Args:
        dt: [batch], in [0.15, 0.25].
        dx: [batch], in [0.2, 0.3].
        viscosity: [batch], in [0.5, 1.5], or None.
        allow_extrapolation: lets (concrete) values lie outside.

    Returns:
        float32 [batch, 2 or 3].

    Raises:
        ValueError: a value outside its interval, or other lengths.
    """
    given = {"dt": dt, "dx": dx, "viscosity": viscosity}
    given = {name: value for name, value in given.items() if value is not None}
    columns = []
    for name, value in given.items():
        low, high = RANGES[name]
        check_batch(name, value, len(jnp.atleast_1d(dt)))
        if not isinstance(value, jax.core.Tracer) and not allow_extrapolation:
            array = np.asarray(value)
            outside = array[~((array >= low - 1e-6) & (array <= high + 1e-6))]
            if outside.size:
                raise ValueError(
                    f"{name} has {outside.size} value(s) outside [{low}, {high}], the "
                    f"first is {outside.flat[0]:g}; the network has not seen such. "
                    f"Pass allow_extrapolation=True to scale them all the same."
                )
        columns.append((jnp.asarray(value, jnp.float32) - low) * 100)
    return jnp.stack(columns, -1)
