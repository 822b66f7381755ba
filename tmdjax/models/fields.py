"""Networks of fields on periodic domains: a dilated ResNet, a Fourier neural operator.

``(x, t, cond) -> field``, as :class:`tmdjax.models.UNet` of design 'modern': x
[batch, *space, channel], t [batch] in [0, 1], cond float [batch, scalars] or None. Both
commute with every shift of the domain, and give 0 when they are new.
"""

import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from tmdjax.core.checks import check_count, check_range
from tmdjax.core.conventions import expand_time
from tmdjax.core.types import Array, Float
from tmdjax.models.convolution import Convolution
from tmdjax.models.layers import (
    Dense,
    ScalarEmbedding,
    check_attributes,
    exact_gelu,
)

_ZEROS = nn.initializers.zeros
DILATIONS = (1, 2, 4, 8, 4, 2, 1)


class FieldNetwork(nn.Module):
    """What networks of fields have in common.

    Attributes:
        width: channels, even.
        layers: how many.
        dims: axes of space, 1 or 2.
        scalars: conditions, ``cond`` float [batch, scalars]; 0 has none.
        out_channels: None for those of x.
        time_scale: what t in [0, 1] is multiplied by before its sinusoids.
        recipe: GEMM recipe of dense layers; of an 8-bit one, those of conditions are
            not quantised (:attr:`tmdjax.quant.Recipe.unquantised`).
    """

    width: int = 64
    layers: int = 4
    dims: int = 1
    scalars: int = 0
    out_channels: int | None = None
    time_scale: float = 1000.0
    recipe: Any = "fp32"

    def __post_init__(self):
        check_attributes(self, "width", "layers", "out_channels")
        check_range("dims", check_count("dims", self.dims), 1, 2)
        check_count("scalars", self.scalars, 0)
        if self.width % 2:
            raise ValueError(f"width={self.width} must be even, for its sinusoids.")
        super().__post_init__()

    def _embedded(self, x: Array, t: Any, cond: Any) -> Array:
        """Time and scalars, [batch, 4 width], once x has so many axes."""
        if x.ndim != self.dims + 2:
            raise ValueError(
                f"x has shape {x.shape}; a network of dims={self.dims} takes "
                f"[batch, {'x' if self.dims == 1 else 'x, y'}, channel]."
            )
        return ScalarEmbedding(
            self.width, self.scalars, self.time_scale, self.recipe, name="embedding"
        )(expand_time(t, len(x)), cond)

    def _modulated(self, h: Array, embedding: Array, i: int) -> Array:
        """Channels scaled and shifted by the embedding, as every layer begins."""
        wide = self.recipe.unquantised
        shift = Dense(2 * self.width, wide, name=f"modulation_{i}")(embedding)
        scale, shift = jnp.split(shift.reshape(len(h), *(1,) * self.dims, -1), 2, -1)
        return h * (1 + scale) + shift


class DilatedResNet(FieldNetwork):
    """Residual convolutions of size 3 that see ever farther and then nearer again.

    Layer i adds conv(gelu(h (1 + scale) + shift)), whose points lie DILATIONS[i % 7]
    apart, scale and shift from the time and the scalars. Seven layers see 45 points.
    Its other attributes are those of :class:`FieldNetwork`.

    Attributes:
        recipe: GEMM recipe of dense layers, all of which are of conditions, so that an
            8-bit one quantises nothing; convolutions run in its compute dtype, the
            first and the last in float32.

    References:
        Stachenfeld et al. 2021, arXiv 2112.15275.
    """

    layers: int = 14

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *space channel"], t: Any, cond: Any = None
    ) -> Float[Array, "batch *space channel_out"]:
        """The field at every point, float32.

        Args:
            x: [batch, *space, channel].
            t: [batch] (or a scalar) in [0, 1].
            cond: float [batch, scalars], or None.

        Raises:
            ValueError: another number of axes, a (concrete) time outside [0, 1], or a
                condition that the network was not built for.
        """
        embedding = self._embedded(x, t, cond)
        size, out = (3,) * self.dims, self.out_channels or x.shape[-1]
        h = Convolution(self.width, size, padding="circular", name="input")(x)
        small = nn.initializers.variance_scaling(
            1 / self.layers, "fan_in", "truncated_normal"
        )
        for i in range(self.layers):
            y = exact_gelu(self._modulated(h, embedding, i))
            y = Convolution(
                self.width,
                size,
                self.recipe,
                padding="circular",
                dilation=DILATIONS[i % len(DILATIONS)],
                kernel_init=small,
                name=f"convolution_{i}",
            )(y)
            h = h + y.astype(jnp.float32)
        last = Convolution(
            out, size, padding="circular", kernel_init=_ZEROS, name="output"
        )
        return last(exact_gelu(h))


class FNO(FieldNetwork):
    """Fourier neural operator: products with the lowest modes, and with every point.

    Layer i maps h to gelu(irfft(weights rfft(h)) + dense(h (1 + scale) + shift)), with
    weights for ``modes`` wavenumbers along each axis; higher ones pass through the
    dense part alone. Any resolution fits that has so many. Unlike the published code it
    is not given the coordinates, so that it commutes with shifts. Its other
    attributes are those of :class:`FieldNetwork`.

    Attributes:
        modes: wavenumbers from 0 on, along each axis, of both signs where there are.
        recipe: GEMM recipe of dense layers; Fourier transforms are float32.

    References:
        Li et al. 2020, arXiv 2010.08895.
    """

    modes: int = 16

    def __post_init__(self):
        check_count("modes", self.modes)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *space channel"], t: Any, cond: Any = None
    ) -> Float[Array, "batch *space channel_out"]:
        """The field at every point, float32.

        Args:
            x: [batch, *space, channel], sides of at least 2 * modes.
            t: [batch] (or a scalar) in [0, 1].
            cond: float [batch, scalars], or None.

        Raises:
            ValueError: another number of axes, too few points, a (concrete) time
                outside [0, 1], or a condition that the network was not built for.
        """
        embedding = self._embedded(x, t, cond)
        sides = x.shape[1:-1]
        if min(sides) < 2 * self.modes:
            raise ValueError(
                f"x has sides {' x '.join(map(str, sides))}, too few for modes="
                f"{self.modes}: give at least {2 * self.modes} points, or fewer modes."
            )
        h = Dense(self.width, name="input")(x)
        for i in range(self.layers):
            near = Dense(self.width, self.recipe, name=f"dense_{i}")(
                self._modulated(h, embedding, i)
            )
            far = self._spectral(h, i)
            h = exact_gelu(near.astype(jnp.float32) + far)
        out = self.out_channels or x.shape[-1]
        return Dense(out, kernel_init=_ZEROS, name="output")(h)

    def _spectral(self, h: Array, i: int) -> Array:
        """Products of the lowest modes with a matrix each."""
        sides, modes = h.shape[1:-1], self.modes
        shape = (*(2 * modes,) * (self.dims - 1), modes, self.width, self.width, 2)
        init = nn.initializers.normal(math.sqrt(0.5 / self.width))
        pair = self.param(f"spectral_{i}", init, shape, jnp.float32)
        weights = pair[..., 0] + 1j * pair[..., 1]
        axes = tuple(range(1, 1 + self.dims))
        v = jnp.fft.rfftn(h.astype(jnp.float32), axes=axes)
        if self.dims == 2:  # both signs along the first axis
            v = jnp.concatenate([v[:, :modes], v[:, -modes:]], 1)
        v = jnp.einsum("b...i,...io->b...o", v[..., :modes, :], weights)
        if self.dims == 2:
            empty = jnp.zeros((len(v), sides[0] - 2 * modes, *v.shape[2:]), v.dtype)
            v = jnp.concatenate([v[:, :modes], empty, v[:, modes:]], 1)
        rest = sides[-1] // 2 + 1 - modes
        v = jnp.pad(v, [(0, 0)] * self.dims + [(0, rest), (0, 0)])
        return jnp.fft.irfftn(v, sides, axes=axes)
