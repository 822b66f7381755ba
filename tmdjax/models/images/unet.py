"""U-Net with residual blocks modulated by time and class (arXiv 2105.05233)."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from tmdjax.core.checks import check_count
from tmdjax.core.conventions import expand_time
from tmdjax.core.types import Array, Float
from tmdjax.models.layers import (
    ClassEmbedding,
    Convolution,
    Dense,
    MultiHeadAttention,
    TimeEmbedding,
    check_attributes,
    check_unconditional,
)
from tmdjax.quant import Recipe

_ZEROS = nn.initializers.zeros
_SIZE = (3, 3)


def _group_norm(channels: int, name: str) -> nn.GroupNorm:
    """At most 32 groups of at least four channels; float32 out."""
    groups = math.gcd(32, channels // 4)
    return nn.GroupNorm(
        groups, epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False, name=name
    )


class _Block(nn.Module):
    """Residual block of two convolutions, and self-attention where asked."""

    features: int
    recipe: Recipe
    heads: int | None
    implementation: str

    @nn.compact
    def __call__(self, h: Array, modulation: Array, skip: Array | None = None) -> Array:
        dtype = self.recipe.dtype
        if skip is not None:
            h = jnp.concatenate([h, skip], -1)
        modulation = Dense(2 * self.features, self.recipe, name="modulation")(
            nn.silu(modulation)
        )
        scale, shift = jnp.split(modulation.astype(jnp.float32)[:, None, None], 2, -1)

        x = nn.silu(_group_norm(h.shape[-1], "norm_1")(h))
        x = Convolution(self.features, _SIZE, self.recipe, name="convolution_1")(x)
        x = _group_norm(self.features, "norm_2")(x) * (1 + scale) + shift
        x = Convolution(
            self.features, _SIZE, self.recipe, kernel_init=_ZEROS, name="convolution_2"
        )(nn.silu(x))
        if h.shape[-1] != self.features:
            h = Dense(self.features, self.recipe, name="shortcut")(h)
        h = h + x
        if self.heads is None:
            return h
        x = _group_norm(self.features, "attention_norm")(h).astype(dtype)
        x = x.reshape(len(x), -1, self.features)
        x = MultiHeadAttention(
            self.heads, self.recipe, self.implementation, _ZEROS, name="attention"
        )(x, x)
        return h + x.reshape(h.shape)


class UNet(nn.Module):
    """Velocity network ``(x, t, cond) -> velocity`` for images.

    Level i has width * multipliers[i] channels at 1 / 2^i of the sides. Down the
    levels each runs ``blocks`` residual blocks, then a strided convolution; a
    middle of two blocks with attention between; and up again, ``blocks`` + 1 blocks
    a level, each with one skip from the way down, then nearest upsampling and a
    convolution. The sum of time and class embedding scales and shifts the second
    norm of every block. The second convolution of a block, attention's projection
    and the last convolution start at zero, and so does the velocity.

    The blocks are a Python loop, not a scan: XLA's CPU backend runs gradients of
    convolutions inside loops 50 times slower. Keep training steps out of loops
    there, too.

    Conditions, as in :class:`tmdjax.models.DiT`: without ``num_classes``,
    ``cond=None``; with it, int [batch], where the index ``num_classes`` is the null
    class and ``cond=None`` is the null class in every row.

    Attributes:
        width: channels of level 0, a multiple of 4.
        multipliers: channels of each level over ``width``; their number is the
            number of levels, and 2^(levels - 1) divides the sides of the images.
        blocks: residual blocks a level on the way down.
        attention_levels: levels whose blocks attend to all positions. The middle
            always does.
        heads: attention heads; they divide the channels wherever attention is.
        num_classes: classes, the null class not counted; None without.
        recipe: GEMM recipe of every dense layer; convolutions run in its compute
            dtype.
        remat: recompute each block in the backward pass.
        attention_implementation: see :func:`tmdjax.models.attention.attention`.
        time_scale: what t in [0, 1] is multiplied by before its sinusoids.

    References:
        arXiv 2105.05233, section 3 (ADM); arXiv 2006.11239, appendix B (DDPM).
    """

    width: int = 64
    multipliers: Sequence[int] = (1, 2, 2)
    blocks: int = 2
    attention_levels: Sequence[int] = (1,)
    heads: int = 4
    num_classes: int | None = None
    recipe: Any = "fp32"
    remat: bool = True
    attention_implementation: str = "auto"
    time_scale: float = 1000.0

    def __post_init__(self):
        check_attributes(self, "width", "blocks", "heads", "num_classes")
        # Tuples, so that a module built from JSON lists can be hashed.
        self.multipliers = _integers("multipliers", self.multipliers, 1)
        self.attention_levels = _integers("attention_levels", self.attention_levels, 0)
        levels = len(self.multipliers)
        if not levels:
            raise ValueError(
                "multipliers=() is empty; give one a level, (1, 2, 2) say."
            )
        outside = [level for level in self.attention_levels if level >= levels]
        if outside:
            raise ValueError(
                f"attention_levels holds {outside}, but multipliers={self.multipliers} "
                f"make the levels 0..{levels - 1}."
            )
        if self.width % 4:
            raise ValueError(
                f"width={self.width} must be a multiple of 4, the least channels of a "
                f"group norm's group."
            )
        for level in {*self.attention_levels, levels - 1}:
            channels = self.width * self.multipliers[level]
            if channels % self.heads:
                raise ValueError(
                    f"heads={self.heads} must divide the {channels} channels of level "
                    f"{level}, which has attention."
                )
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channel"], t: Any, cond: Any = None
    ) -> Float[Array, "batch height width channel"]:
        """Velocity of x at time t.

        Args:
            x: images [batch, height, width, channel].
            t: [batch] (or a scalar) in [0, 1]; 1 is noise, 0 is data.
            cond: int [batch] classes, or None.

        Returns:
            float32, of the shape of x.

        Raises:
            ValueError: x is no batch of images, its sides cannot be halved often
                enough, or its channels are not those the network was made with; a
                (concrete) time outside [0, 1]; a condition that is not what the
                network was built for.
            TypeError: classes that are not integers.
        """
        self._check_images(x)
        modulation = self._embed(t, cond, len(x))
        levels = range(len(self.multipliers))
        block_type = nn.remat(_Block) if self.remat else _Block

        def block(name: str, level: int, attends: bool, *inputs: Array) -> Array:
            return block_type(
                self.width * self.multipliers[level],
                self.recipe,
                self.heads if attends else None,
                self.attention_implementation,
                name=name,
            )(*inputs)

        h = Convolution(self.width, _SIZE, self.recipe, name="input")(x)
        skips = [h]
        for level in levels:
            attends = level in self.attention_levels
            if level:
                h = Convolution(
                    h.shape[-1],
                    _SIZE,
                    self.recipe,
                    strides=2,
                    name=f"downsample_{level}",
                )(h)
                skips.append(h)
            for i in range(self.blocks):
                h = block(f"down_{level}_{i}", level, attends, h, modulation)
                skips.append(h)
        h = block("middle_0", levels[-1], True, h, modulation)
        h = block("middle_1", levels[-1], False, h, modulation)
        for level in reversed(levels):
            attends = level in self.attention_levels
            for i in range(self.blocks + 1):
                h = block(f"up_{level}_{i}", level, attends, h, modulation, skips.pop())
            if level:
                h = h.repeat(2, 1).repeat(2, 2)
                h = Convolution(
                    h.shape[-1], _SIZE, self.recipe, name=f"upsample_{level}"
                )(h)
        h = nn.silu(_group_norm(h.shape[-1], "output_norm")(h))
        output = Convolution(
            x.shape[-1], _SIZE, self.recipe, kernel_init=_ZEROS, name="output"
        )
        return output(h).astype(jnp.float32)

    def _check_images(self, x: Array) -> None:
        if x.ndim != 4:
            raise ValueError(
                f"x has shape {x.shape}; give images [batch, height, width, channel]."
            )
        height, width, channels = x.shape[1:]
        halvings = len(self.multipliers) - 1
        if not (height and width) or height % 2**halvings or width % 2**halvings:
            raise ValueError(
                f"x has sides {height} x {width}, which must be multiples of "
                f"2^(levels - 1) = {2**halvings}: give fewer multipliers than "
                f"{len(self.multipliers)}, or pad the images."
            )
        if not self.is_initializing():
            made = self.variables["params"]["input"]["kernel"].shape[2]
            if channels != made:
                raise ValueError(
                    f"x has {channels} channel(s) but the parameters were made for "
                    f"{made}."
                )

    def _embed(self, t: Any, cond: Any, batch: int) -> Array:
        """Sum of time and class embedding, float32 [batch, 4 width]."""
        features = 4 * self.width
        modulation = TimeEmbedding(
            features,
            time_scale=self.time_scale,
            recipe=self.recipe,
            name="time_embedding",
        )(expand_time(t, batch)).astype(jnp.float32)
        if self.num_classes is None:
            check_unconditional(cond)
            return modulation
        classes = ClassEmbedding(self.num_classes, features, name="class_embedding")
        return modulation + classes(cond, batch)


def _integers(name: str, values: Any, low: int) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(
            f"{name}={values!r} is of type {type(values).__name__}; give a tuple or "
            f"list of integers."
        )
    return tuple(check_count(f"{name}[{i}]", v, low) for i, v in enumerate(values))
