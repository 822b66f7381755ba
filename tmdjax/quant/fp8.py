"""Arrays in 8 bits: values of a float8 dtype, and scales that give them their size."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tmdjax.core.checks import check_choice, check_range
from tmdjax.core.types import Array, Float, PyTree

GRANULARITIES: dict[str, tuple[int | None, int | None]] = {
    "tensor": (None, None),
    "row": (1, None),
    "column": (None, 1),
    "1x128": (1, 128),
    "128x1": (128, 1),
    "128x128": (128, 128),
}
"""How many rows and columns of a matrix share a scale; None is all of them.

Of activations [token, feature] a row is a token; of weights [in, out] a column is an
output channel.
"""

DTYPES = ("float8_e4m3fn", "float8_e5m2")
SCALES = ("fp32", "pow2")

SMALLEST = 1e-4
"""Least largest magnitude of a group of weights or activations, as in DeepGEMM."""

SMALLEST_OF_GRADIENTS = 2.0**-100
"""The same of gradients, which shrink with the number of tokens that a loss is a mean
over: for DeepGEMM's, e4m3 has no number but 0 below 2e-10."""


def cast_for_good(x: Array, dtype: Any) -> Array:
    """``x.astype(dtype)``, a rounding that XLA must not leave out.

    Where a cast to fewer bits is followed by a cast back in one program, XLA may drop
    both ("excess precision"; it does on GPUs, not on CPUs): results are then those of
    no rounding at all. A barrier between the two casts keeps them.
    :func:`tmdjax.quant.check_rounding` tries it on the device at hand.
    """
    return jax.lax.optimization_barrier(x.astype(dtype))


@struct.dataclass
class Quantised:
    """A matrix, or a stack of them, in 8 bits.

    Attributes:
        values: float8_e4m3fn or float8_e5m2, [*stack, row, column].
        scale: float32 [*stack, row group, column group]; a value times the scale of its
            group is the number it stands for.
        granularity: which elements are a group, a name in :data:`GRANULARITIES`. The
            last group of an axis may be smaller than the others.
    """

    values: Any
    scale: Any
    granularity: str = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return self.values.shape

    def dequantise(self) -> Array:
        """The numbers it stands for, float32 [*stack, row, column]."""
        scale = _spread(self.scale, self.granularity, self.shape)
        return self.values.astype(jnp.float32) * scale

    def transpose(self) -> "Quantised":
        """Rows and columns exchanged: of values, of scales, and of the granularity."""
        tile = GRANULARITIES[self.granularity][::-1]
        (name,) = (name for name, other in GRANULARITIES.items() if other == tile)
        return Quantised(self.values.mT, self.scale.mT, name)


def quantise(
    x: Float[Array, "*stack row column"],
    granularity: str,
    dtype: Any = jnp.float8_e4m3fn,
    *,
    scale: str = "fp32",
    smallest: float = SMALLEST,
) -> Quantised:
    """Rounds to 8 bits, groups of elements each with a scale of their own.

    The scale of a group is its largest magnitude (at least ``smallest``) over the
    largest number of the dtype (448, or 57344), and elements are multiplied by 1 /
    scale, clipped to the dtype's range, and rounded to nearest, ties to even. A group
    sees its own elements alone. The arithmetic is that of DeepGEMM's casts, bit for
    bit.

    The scale of a group with a NaN or an infinity is NaN, and so is the whole group
    when it is dequantised: what was not finite never becomes a number.

    Args:
        x: any floating dtype, taken as float32. No gradient flows through.
        granularity: a name in :data:`GRANULARITIES`.
        dtype: float8_e4m3fn or float8_e5m2.
        scale: 'fp32', or 'pow2', the next power of two that is not smaller.
        smallest: a group below it has its scale, and so fewer bits, or none: what lies
            below 2^-19 of it is 0 in e4m3. At least 2^-100, so that 1 / scale is
            finite.

    Raises:
        ValueError: x has no rows and columns; an unknown granularity, dtype or scale;
            ``smallest`` out of range.

    References:
        DeepSeek-V3 (arXiv 2412.19437), section 3.3; power-of-two scales are UE8M0 of
        the OCP microscaling formats.
    """
    dtype = jnp.dtype(dtype)
    check_choice("granularity", granularity, GRANULARITIES)
    check_choice("dtype", dtype.name, DTYPES)
    check_choice("scale", scale, SCALES)
    check_range("smallest", smallest, SMALLEST_OF_GRADIENTS, math.inf, open_high=True)
    if x.ndim < 2:
        raise ValueError(
            f"x has shape {x.shape}; give [..., row, column]: groups are cut of both."
        )
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    largest = float(jnp.finfo(dtype).max)
    found = _largest_magnitudes(x, granularity, smallest)
    # A division by a constant XLA would make a product with its rounded reciprocal,
    # which ends in another bit: hence a divisor that depends on the data.
    step = found / jnp.where(jnp.isfinite(found), largest, jnp.nan)
    if scale == "pow2":
        step = _power_of_two_from(step)
    step, inverse = jax.lax.optimization_barrier((step, 1 / step))
    scaled = x * _spread(inverse, granularity, x.shape)
    # A cast makes NaN or infinity of what lies beyond the range, whatever 1 / scale was
    # rounded to on a device.
    values = cast_for_good(jnp.clip(scaled, -largest, largest), dtype)
    return Quantised(values, step, granularity)


def _quantised(tree: PyTree) -> list[Quantised]:
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, Quantised))
    return [leaf for leaf in leaves if isinstance(leaf, Quantised)]


def quantised_values(tree: PyTree) -> list[Array]:
    """The 8-bit values of all :class:`Quantised` leaves, in the order of the tree."""
    return [leaf.values for leaf in _quantised(tree)]


def share_padded(tree: PyTree) -> float:
    """Which part of 8-bit arrays is padding once their groups are whole, in [0, 1).

    Kernels multiply whole groups of 128 x 128; products of the dequantised numbers, by
    which 8 bits are emulated, have no padding.

    Args:
        tree: its :class:`Quantised` leaves are looked at; 0 where there are none.
    """
    size = whole = 0
    for leaf in _quantised(tree):
        (down, height), (across, width) = _tiles(leaf.granularity, leaf.shape)
        size += math.prod(leaf.shape)
        whole += math.prod(leaf.shape[:-2]) * down * height * across * width
    return 1 - size / whole if whole else 0.0


def share_floored(tree: PyTree, smallest: float = SMALLEST) -> float:
    """Which part of the groups of 8-bit arrays has the least scale, in [0, 1].

    Their numbers are at most ``smallest`` in magnitude (of e4m3: up to a fifteenth
    above it, the next power of two of the scale) and keep fewer bits, or none.

    Args:
        tree: its :class:`Quantised` leaves are looked at; 0 where there are none.
        smallest: that :func:`quantise` was given.
    """
    at = count = 0
    for leaf in _quantised(tree):
        least = smallest / float(jnp.finfo(leaf.values.dtype).max)
        at += int(jnp.sum(leaf.scale <= 2.0 ** math.ceil(math.log2(least))))
        count += leaf.scale.size
    return at / count if count else 0.0


def share_moved(before: Sequence[Array], after: Sequence[Array]) -> Array:
    """Which part of 8-bit values is another than before, float32 scalar in [0, 1].

    An update smaller than half a step of the 8 bits moves none: what is computed with
    the quantised weights then stays the same.

    Args:
        before: from :func:`quantised_values`, at least one.
        after: the same shapes, later.

    References:
        QuRL has the metric: an update may be too small to reach quantised rollouts.
    """

    def moved(a: Array, b: Array) -> Array:
        return jnp.mean(a.view(jnp.uint8) != b.view(jnp.uint8)) * a.size

    total = sum(values.size for values in before)
    return jnp.stack(list(map(moved, before, after))).sum() / total


def _tiles(granularity: str, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Of rows and of columns: how many groups there are, and their size."""
    sizes = [
        max(length, 1) if size is None else size
        for size, length in zip(GRANULARITIES[granularity], shape[-2:])
    ]
    return [(-(-length // size), size) for size, length in zip(sizes, shape[-2:])]


def _largest_magnitudes(x: Array, granularity: str, smallest: float) -> Array:
    """Of each group, at least the smallest: [*stack, row group, column group].

    Magnitudes are compared by their bits, integers of the same order with NaN above
    all: XLA's maximum of floats may lose a NaN on a CPU.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(2**31 - 1)
    *stack, rows, columns = x.shape
    (down, height), (across, width) = _tiles(granularity, x.shape)
    missing = (0, down * height - rows), (0, across * width - columns)
    bits = jnp.pad(bits, [(0, 0)] * len(stack) + list(missing))
    bits = bits.reshape(*stack, down, height, across, width)
    largest = bits.max((-3, -1), initial=np.float32(smallest).view(np.uint32))
    return jax.lax.bitcast_convert_type(largest, jnp.float32)


def _spread(scale: Array, granularity: str, shape: tuple[int, ...]) -> Array:
    """A number a group to a number an element."""
    *stack, rows, columns = shape
    (down, height), (across, width) = _tiles(granularity, shape)
    wide = (*stack, down, height, across, width)
    each = jnp.broadcast_to(scale[..., :, None, :, None], wide)
    return each.reshape(*stack, down * height, across * width)[..., :rows, :columns]


def _power_of_two_from(x: Array) -> Array:
    """The smallest power of two that is not below x > 0; not finite as it is."""
    below = np.uint32(2**23 - 1)  # the mantissa's bits
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + below) & ~below
    return jnp.where(
        jnp.isfinite(x), jax.lax.bitcast_convert_type(bits, jnp.float32), x
    )
