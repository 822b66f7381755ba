"""What the video transformer is made of: rotary tables, patches, one block."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tmdjax.core.types import Array, Float
from tmdjax.models.attention import attention
from tmdjax.models.decoder_layers import rms_norm
from tmdjax.models.layers import Dense, layer_norm
from tmdjax.quant import compute_dtype

Size = tuple[int, int, int]
"""Frames, rows and columns."""

XAVIER = nn.initializers.xavier_uniform()


def table_initializer(width: int) -> nn.initializers.Initializer:
    """Normal of variance 1 / width, for tables of shifts, scales and gates."""
    return nn.initializers.normal(width**-0.5)


def rotary_tables(
    grid: Sequence[int], head_dim: int
) -> tuple[Float[Array, "position angle"], Float[Array, "position angle"]]:
    """Cosines and sines of the rotary angles of a grid of patches.

    Of the ``head_dim / 2`` angles of a position, columns and rows have
    ``head_dim // 6`` each and frames, which come first, the others. Angle i of an
    axis with d features is p 10000^(-2i / d), p the index of the patch along it.

    Args:
        grid: patches along (frames, rows, columns).
        head_dim: width of a head, even and at least 6.

    Returns:
        Two float32 arrays [position, head_dim / 2], columns running fastest; angles
        are taken in float64 on the host, one axis at a time.

    Raises:
        ValueError: a head_dim that leaves an axis without a whole pair.

    References:
        arXiv 2104.09864; three axes as in arXiv 2503.20314.
    """
    check_head_dim(head_dim)
    side = 2 * (head_dim // 6)
    tables: list[list[Array]] = [[], []]
    for axis, (count, width) in enumerate(
        zip(grid, (head_dim - 2 * side, side, side), strict=True)
    ):
        frequencies = 10000.0 ** (-np.arange(0, width, 2) / width)
        angles = np.arange(count)[:, None] * frequencies
        shape = [1, 1, 1, width // 2]
        shape[axis] = count
        for table, values in zip(tables, (np.cos(angles), np.sin(angles))):
            # Spread on the device: a program then holds one axis, not the grid.
            along = jnp.asarray(values.astype(np.float32)).reshape(shape)
            table.append(jnp.broadcast_to(along, (*grid, width // 2)))
    cos, sin = (jnp.concatenate(t, -1).reshape(-1, head_dim // 2) for t in tables)
    return cos, sin


def check_head_dim(head_dim: int) -> None:
    """Raises ValueError unless each of the three axes gets whole pairs."""
    if head_dim % 2 or head_dim < 6:
        raise ValueError(
            f"head_dim={head_dim} must be even and at least 6: rotary positions turn "
            f"pairs of features, at least one pair for each of frames, rows and "
            f"columns."
        )


def rotate_pairs(
    x: Float[Array, "batch position heads head_dim"],
    cos: Float[Array, "position angle"],
    sin: Float[Array, "position angle"],
) -> Float[Array, "batch position heads head_dim"]:
    """Rotates the neighbouring pairs (2k, 2k + 1) by angle k, in float32."""
    x = x.astype(jnp.float32)
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None, :], sin[:, None, :]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return turned.reshape(x.shape)


def patchify_video(
    x: Float[Array, "batch frame height width channel"], patch_size: Sequence[int]
) -> Float[Array, "batch position features"]:
    """Cuts videos into boxes, frame by frame and row by row.

    Args:
        x: videos [batch, frame, height, width, channel].
        patch_size: (frames, rows, columns) of a box; they divide those of x.

    Returns:
        [batch, position, p_f p_h p_w channel]; inside a box the order is frame, row,
        column, channel, the channel fastest.

    Raises:
        ValueError: x is no batch of videos, or patch_size does not divide its sizes.
    """
    if x.ndim != 5:
        raise ValueError(
            f"x has shape {x.shape}; give videos [batch, frame, height, width, "
            f"channel]."
        )
    batch, *size, channel = x.shape
    boxes = patch_grid(size, patch_size)
    split = [n for pair in zip(boxes, patch_size) for n in pair]
    x = x.reshape(batch, *split, channel).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(batch, np.prod(boxes), np.prod(patch_size) * channel)


def unpatchify_video(
    tokens: Float[Array, "batch position features"],
    patch_size: Sequence[int],
    size: Sequence[int],
) -> Float[Array, "batch frame height width channel"]:
    """The inverse of :func:`patchify_video`.

    Args:
        tokens: [batch, position, p_f p_h p_w channel].
        patch_size: (frames, rows, columns) of a box.
        size: (frames, height, width) of the videos.

    Raises:
        ValueError: the boxes do not fill a video of that size.
    """
    boxes = patch_grid(size, patch_size)
    batch, positions, features = tokens.shape
    if positions != np.prod(boxes) or features % np.prod(patch_size):
        raise ValueError(
            f"tokens have shape {tokens.shape}; a video of {_times(size)} (frames x "
            f"height x width) in patches of {_times(patch_size)} needs "
            f"{np.prod(boxes)} positions and a multiple of {np.prod(patch_size)} "
            f"features."
        )
    x = tokens.reshape(batch, *boxes, *patch_size, -1)
    return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, *size, -1)


def patch_grid(size: Sequence[int], patch_size: Sequence[int]) -> Size:
    """Patches along (frames, rows, columns) of a video of that size.

    Raises:
        ValueError: patch_size does not divide it.
    """
    if any(n % p for n, p in zip(size, patch_size, strict=True)):
        raise ValueError(
            f"patch_size={_times(patch_size)} does not divide a video of "
            f"{_times(size)} (frames x height x width)."
        )
    frames, rows, columns = (n // p for n, p in zip(size, patch_size))
    return frames, rows, columns


def _times(size: Sequence[int]) -> str:
    return " x ".join(str(n) for n in size)


def modulate(x: Array, shift: Array, scale: Array, epsilon: float) -> Array:
    """Layer norm, then scale and shift, in float32; out in the dtype of x."""
    return (layer_norm(x, epsilon) * (1 + scale) + shift).astype(x.dtype)


class RMSNorm(nn.Module):
    """:func:`tmdjax.models.decoder_layers.rms_norm` with its scale, in float32."""

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
    recipe: str
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
    recipe: str
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
    recipe: str

    @nn.compact
    def __call__(self, text: Array) -> Array:
        """Maps [batch, length, text width] to [batch, length, width]."""
        init = nn.initializers.normal(0.02)
        y = Dense(self.width, self.recipe, kernel_init=init, name="hidden")(text)
        y = nn.gelu(y, approximate=True)
        y = Dense(self.width, self.recipe, kernel_init=init, name="out")(y)
        return y.astype(compute_dtype(self.recipe))


class VideoOutput(nn.Module):
    """Final norm modulated by the time, and the projection to patches.

    Attributes:
        epsilon: of the norm.
        recipe: GEMM recipe.
    """

    epsilon: float
    recipe: str

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
