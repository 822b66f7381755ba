"""What the video transformer is made of: norms, attention, a block, both ends."""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import linen as nn

from tmdjax.core.types import Array
from tmdjax.models.attention import attention
from tmdjax.models.layers import Dense, layer_norm, rms_norm
from tmdjax.models.videos.patches import rotate_pairs
from tmdjax.quant import Recipe

XAVIER = nn.initializers.xavier_uniform()


def table_initializer(width: int) -> nn.initializers.Initializer:
    """Normal of variance 1 / width, for tables of shifts, scales and gates."""
    return nn.initializers.normal(width**-0.5)


def modulate(x: Array, shift: Array, scale: Array, epsilon: float) -> Array:
    """Layer norm, then scale and shift, in float32; out in the dtype of x."""
    return (layer_norm(x, epsilon) * (1 + scale) + shift).astype(x.dtype)


class RMSNorm(nn.Module):
    """:func:`tmdjax.models.layers.rms_norm` with its scale, in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [..., features] to float32 of the same shape."""
        ones, shape = nn.initializers.ones, (x.shape[-1],)
        scale = self.param("scale", ones, shape, jnp.float32)
        return rms_norm(x.astype(jnp.float32), scale, self.epsilon)


class LayerNorm(nn.Module):
    """:func:`tmdjax.models.layer_norm` with scale and bias, in float32."""

    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps [..., features] to float32 of the same shape."""
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        return layer_norm(x, self.epsilon) * scale + bias


class VideoAttention(nn.Module):
    """Attention whose queries and keys are normed over all heads jointly.

    Attributes:
        heads: number of heads.
        recipe: GEMM recipe of the projections.
        implementation: of :func:`tmdjax.models.attention`.
        epsilon: of the norms.
    """

    heads: int
    recipe: Recipe
    implementation: str
    epsilon: float

    @nn.compact
    def __call__(
        self, x: Array, context: Array, rotation: tuple[Array, Array] | None = None
    ) -> Array:
        """Returns [batch, position, width] in the dtype of the recipe.

        Args:
            x: [batch, position, width].
            context: [batch, context position, width].
            rotation: from :func:`rotary_tables`, where positions of x and of the
                context are those of one grid.
        """
        width = x.shape[-1]

        def project(y: Array, name: str, features: int = width) -> Array:
            return Dense(features, self.recipe, kernel_init=XAVIER, name=name)(y)

        def split(y: Array) -> Array:
            return y.reshape(*y.shape[:-1], self.heads, width // self.heads)

        def norm(y: Array, name: str) -> Array:
            z = split(RMSNorm(self.epsilon, name=name)(y))
            z = z if rotation is None else rotate_pairs(z, *rotation)
            return z.astype(y.dtype)

        y = attention(
            norm(project(x, "query"), "query_norm"),
            norm(project(context, "key"), "key_norm"),
            split(project(context, "value")),
            implementation=self.implementation,
        )
        return project(y.reshape(x.shape), "out")


class VideoBlock(nn.Module):
    """Self-attention, cross-attention to the text, MLP.

    The first and the last are modulated and gated by the time, through a table of
    the block's own; the text enters without a gate.

    Attributes:
        heads: attention heads.
        mlp_width: width of the MLP.
        cross_attention_norm: whether a layer norm with scale and bias stands before
            the cross-attention.
        epsilon: of every norm.
        recipe: GEMM recipe.
        implementation: of :func:`tmdjax.models.attention`.
    """

    heads: int
    mlp_width: int
    cross_attention_norm: bool
    epsilon: float
    recipe: Recipe
    implementation: str

    @nn.compact
    def __call__(self, h: Array, c: Mapping[str, Array]) -> Array:
        """Maps h [batch, position, width]; c as of ``VideoDiT.embed``."""
        width = h.shape[-1]
        table = self.param(
            "scale_shift_table", table_initializer(width), (6, width), jnp.float32
        )
        modulation = table.astype(jnp.float32) + c["modulation"]
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = jnp.split(modulation, 6, 1)

        x = modulate(h, shift, scale, self.epsilon)
        y = self._attention("attention")(x, x, (c["cos"], c["sin"]))
        h = (h.astype(jnp.float32) + gate * y).astype(h.dtype)
        x = h
        if self.cross_attention_norm:
            x = LayerNorm(self.epsilon, name="cross_norm")(h).astype(h.dtype)
        h = h + self._attention("cross_attention")(x, c["text"])
        x = modulate(h, mlp_shift, mlp_scale, self.epsilon)
        y = Dense(self.mlp_width, self.recipe, kernel_init=XAVIER, name="mlp_in")(x)
        y = nn.gelu(y, approximate=True)
        y = Dense(width, self.recipe, kernel_init=XAVIER, name="mlp_out")(y)
        return (h.astype(jnp.float32) + mlp_gate * y).astype(h.dtype)

    def _attention(self, name: str) -> VideoAttention:
        return VideoAttention(
            self.heads, self.recipe, self.implementation, self.epsilon, name=name
        )


class TextEmbedding(nn.Module):
    """Text states through two dense layers to the width of the network."""

    width: int
    recipe: Recipe

    @nn.compact
    def __call__(self, text: Array) -> Array:
        """Maps [batch, length, text width] to [batch, length, width]."""
        init = nn.initializers.normal(0.02)
        y = Dense(self.width, self.recipe, kernel_init=init, name="hidden")(text)
        y = nn.gelu(y, approximate=True)
        y = Dense(self.width, self.recipe, kernel_init=init, name="out")(y)
        return y.astype(self.recipe.dtype)


class VideoOutput(nn.Module):
    """Final norm modulated by the time, and the projection to patches.

    Attributes:
        epsilon: of the norm.
        recipe: GEMM recipe.
    """

    epsilon: float
    recipe: Recipe

    @nn.compact
    def __call__(self, h: Array, time: Array, features: int) -> Array:
        """Maps [batch, position, width] to [batch, position, features]."""
        width = h.shape[-1]
        table = self.param(
            "scale_shift_table", table_initializer(width), (2, width), jnp.float32
        )
        shift, scale = jnp.split(table.astype(jnp.float32) + time[:, None, :], 2, 1)
        x = modulate(h, shift, scale, self.epsilon)
        zeros = nn.initializers.zeros
        return Dense(features, self.recipe, kernel_init=zeros, name="projection")(x)
