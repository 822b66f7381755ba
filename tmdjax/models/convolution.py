"""Convolutions of channels-last arrays, with zeros or a periodic domain around them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from tmdjax.core.types import Array
from tmdjax.quant import as_recipe


class Convolution(nn.Module):
    """Convolution of [batch, *sizes, channel] in the dtype of a recipe.

    Under 'fp32' no product is TF32. Not ``nn.Conv``: it adds the bias in the compute
    dtype, and its gradient, a sum over all positions, would be taken in 16 bits.

    Attributes:
        features: channels of the result.
        kernel_size: along each size; one to three of them.
        recipe: a :class:`tmdjax.quant.Recipe` or its name; it sets the output dtype.
        strides: along each size, or one for all.
        padding: zeros on both ends of each size, or 'SAME'; 'circular' goes on at the
            other end of a periodic domain (odd kernels, of the size of their input).
        dilation: distance of the points that a kernel sees.
        kernel_init: initialiser of the kernel, float32 [*kernel_size, in, out].
    """

    features: int
    kernel_size: tuple[int, ...]
    recipe: Any = "fp32"
    strides: int | tuple[int, ...] = 1
    padding: int | str = 1
    dilation: int = 1
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [batch, *sizes, in] to [batch, *sizes / strides, features]."""
        recipe, rank = as_recipe(self.recipe), len(self.kernel_size)
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        zeros = nn.initializers.zeros
        bias = self.param("bias", zeros, (self.features,), jnp.float32)
        strides, axes = self.strides, "DHW"[3 - rank :]
        ends = self.padding
        if ends == "circular":
            x, ends = wrapped(x, [self.dilation * (k // 2) for k in shape[:rank]]), 0
        y = jax.lax.conv_general_dilated(
            x.astype(recipe.dtype),
            kernel.astype(recipe.dtype),
            (strides,) * rank if isinstance(strides, int) else strides,
            [(ends, ends)] * rank if isinstance(ends, int) else ends,
            rhs_dilation=(self.dilation,) * rank,
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
            precision=recipe.lax_precision,
        )
        return (y.astype(jnp.float32) + bias).astype(y.dtype)


def wrapped(x: Array, ends: list[int]) -> Array:
    """[batch, *sizes, channel] with so many points of the other end on both ends."""
    return jnp.pad(x, [(0, 0), *((n, n) for n in ends), (0, 0)], mode="wrap")


class Upsampling(nn.Module):
    """Transposed convolution of size 4 that doubles each size, in a recipe's dtype.

    Attributes:
        features: channels of the result.
        dims: sizes, 1 to 3.
        recipe: a :class:`tmdjax.quant.Recipe` or its name; it sets the output dtype.
        circular: the domain is periodic: every result point is made like any other.
            False lets zeros lie beyond the ends, as torch's ConvTranspose(4, 2, 1).
    """

    features: int
    dims: int
    recipe: Any = "fp32"
    circular: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [batch, *sizes, in] to [batch, *(2 sizes), features]."""
        recipe, dims, axes = as_recipe(self.recipe), self.dims, "DHW"[3 - self.dims :]
        shape = (*(4,) * dims, x.shape[-1], self.features)
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, shape, jnp.float32)
        zeros = nn.initializers.zeros
        bias = self.param("bias", zeros, (self.features,), jnp.float32)
        x = wrapped(x, [1] * dims) if self.circular else x
        ends = 0 if self.circular else 2
        y = jax.lax.conv_general_dilated(
            x.astype(recipe.dtype),
            kernel.astype(recipe.dtype),
            (1,) * dims,
            [(ends, ends)] * dims,
            lhs_dilation=(2,) * dims,
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
            precision=recipe.lax_precision,
        )
        return (y.astype(jnp.float32) + bias).astype(y.dtype)
