"""Shape names, declared once.

Batch comes first everywhere; what a scan stacks carries the scan axis before
it. Annotations cost nothing at run time; the test suite checks them with
beartype.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Array as Array
from jaxtyping import ArrayLike as ArrayLike
from jaxtyping import Bool as Bool
from jaxtyping import Float as Float
from jaxtyping import Int as Int
from jaxtyping import Key as Key

PyTree: TypeAlias = Any
Params: TypeAlias = Mapping[str, Any]

Data: TypeAlias = Float[Array, "batch *event"]
"""One array of samples, any event shape."""

Time: TypeAlias = Float[Array, "batch"]
"""One time a sample, in [0, 1]; 1 is noise, 0 is data."""

PerExample: TypeAlias = Float[Array, "batch"]
SampleKeys: TypeAlias = Key[Array, "batch"]
"""Typed PRNG keys, one a sample."""

Grid: TypeAlias = Float[np.ndarray, "knot"]
"""Host float64 times in the order they are walked: 1 first, 0 last."""

Cond: TypeAlias = Any
"""What a velocity is conditioned on: a pytree of [batch, ...] arrays, or None."""

Velocity: TypeAlias = Callable[[Any, Any, Any], Any]
"""``velocity(x, t, cond) -> v``, x and v [batch, *event], t [batch]."""

ApplyFn: TypeAlias = Callable[..., Any]
"""``apply_fn(params, *inputs) -> outputs``, params a nested dict."""
