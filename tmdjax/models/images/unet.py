"""U-Net with residual blocks modulated by time and condition, in one or two dimensions.

Two designs: that of images (ADM, arXiv 2105.05233), and that of fields which solve
equations ('modern' in PDEArena, arXiv 2209.15616).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from tmdjax.core.checks import check_choice, check_count, check_range
from tmdjax.core.conventions import expand_time
from tmdjax.core.types import Array, Float
from tmdjax.models.convolution import Convolution, Upsampling
from tmdjax.models.layers import (
    ClassEmbedding,
    Dense,
    MultiHeadAttention,
    ScalarEmbedding,
    TimeEmbedding,
    check_attributes,
    check_unconditional,
    exact_gelu,
)
from tmdjax.quant import Recipe

_ZEROS = nn.initializers.zeros
DESIGNS = ("adm", "modern")
PADDINGS = ("zeros", "circular", "reference")


def _groups(channels: int) -> int:
    """At most 32 groups of at least four channels."""
    return math.gcd(32, channels // 4)


def _group_norm(groups: int, name: str) -> nn.GroupNorm:
    """Float32 out."""
    return nn.GroupNorm(
        groups, epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False, name=name
    )


class _Block(nn.Module):
    """Residual block of two convolutions, and self-attention where asked."""

    features: int
    recipe: Recipe
    heads: int | None
    implementation: str
    dims: int = 2
    padding: int | str = 1

    @nn.compact
    def __call__(self, h: Array, modulation: Array, skip: Array | None = None) -> Array:
        dtype, size = self.recipe.dtype, (3,) * self.dims
        if skip is not None:
            h = jnp.concatenate([h, skip], -1)
        wide = self.recipe.unquantised
        modulation = Dense(2 * self.features, wide, name="modulation")(
            nn.silu(modulation)
        )
        modulation = _over_space(modulation.astype(jnp.float32), self.dims)
        scale, shift = jnp.split(modulation, 2, -1)

        x = nn.silu(_group_norm(_groups(h.shape[-1]), "norm_1")(h))
        options = {"recipe": self.recipe, "padding": self.padding}
        x = Convolution(self.features, size, name="convolution_1", **options)(x)
        x = _group_norm(_groups(self.features), "norm_2")(x) * (1 + scale) + shift
        x = Convolution(
            self.features, size, kernel_init=_ZEROS, name="convolution_2", **options
        )(nn.silu(x))
        if h.shape[-1] != self.features:
            h = Dense(self.features, self.recipe, name="shortcut")(h)
        h = h + x
        if self.heads is None:
            return h
        x = _group_norm(_groups(self.features), "attention_norm")(h).astype(dtype)
        x = x.reshape(len(x), -1, self.features)
        x = MultiHeadAttention(
            self.heads, self.recipe, self.implementation, _ZEROS, name="attention"
        )(x, x)
        return h + x.reshape(h.shape)


class _FieldBlock(nn.Module):
    """Residual block of two convolutions between which the embedding is added."""

    features: int
    recipe: Recipe
    dims: int
    padding: int | str

    @nn.compact
    def __call__(self, h: Array, embedding: Array, skip: Array | None = None) -> Array:
        if skip is not None:
            h = jnp.concatenate([h, skip], -1)
        size = (3,) * self.dims
        options = {"recipe": self.recipe, "padding": self.padding}
        x = exact_gelu(_group_norm(1, "norm_1")(h))
        x = Convolution(self.features, size, name="convolution_1", **options)(x)
        wide = self.recipe.unquantised
        added = Dense(self.features, wide, name="modulation")(embedding)
        x = x + _over_space(added, self.dims)
        x = Convolution(
            self.features, size, kernel_init=_ZEROS, name="convolution_2", **options
        )(exact_gelu(_group_norm(1, "norm_2")(x)))
        if h.shape[-1] != self.features:
            h = Dense(self.features, self.recipe, name="shortcut")(h)
        return h + x


def _over_space(x: Array, dims: int) -> Array:
    """[batch, features] with an axis of length 1 for each of space."""
    return x.reshape(len(x), *(1,) * dims, x.shape[-1])


class UNet(nn.Module):
    """Velocity network ``(x, t, cond) -> velocity`` for images and fields.

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

    With ``design='modern'`` it is the U-Net of PDEArena, and has no attention unless
    levels are named: group norms over all channels, exact GELU, the embedding added
    between the convolutions of a block, the last block up a level as narrow as the next
    level, a transposed convolution to it, and as conditions ``scalars`` numbers a
    sample, each embedded as the time is.

    Attributes:
        width: channels of level 0, a multiple of 4 (8 for 'modern').
        multipliers: channels of each level over ``width``; their number is the
            number of levels, and 2^(levels - 1) divides the sides of the images.
        blocks: residual blocks a level on the way down.
        attention_levels: levels whose blocks attend to all positions, by default (1,).
            The middle always does. Of 'modern' it is empty.
        heads: attention heads; they divide the channels wherever attention is.
        num_classes: classes, the null class not counted; None without.
        recipe: GEMM recipe of every dense layer; convolutions run in its compute
            dtype, the first and the last of 'modern' in float32: 16 bits would lose
            the small parts of a field that a refiner is to see and to repair. Of an
            8-bit one, attention and shortcuts are quantised, layers of time and
            condition are not (:attr:`tmdjax.quant.Recipe.unquantised`).
        remat: recompute each block in the backward pass.
        attention_implementation: see :func:`tmdjax.models.attention.attention`.
        time_scale: what t in [0, 1] is multiplied by before its sinusoids.
        dims: axes of space, 1 or 2.
        padding: what lies beyond the ends: 'zeros', or 'circular', the other end of a
            periodic domain; a shift of the input by 2^(levels - 1) points then shifts
            the output. 'reference' is PDEArena's code, whose transposed convolutions
            have zeros there though all else is circular.
        design: 'adm' or 'modern'.
        scalars: conditions of 'modern', ``cond`` float [batch, scalars]; 0 has none.
        out_channels: None for those of x; a refiner's x has the last state as well.

    References:
        arXiv 2105.05233, section 3 (ADM); arXiv 2006.11239, appendix B (DDPM);
        arXiv 2209.15616, appendix (U-Net mod).
    """

    width: int = 64
    multipliers: Sequence[int] = (1, 2, 2)
    blocks: int = 2
    attention_levels: Sequence[int] | None = None
    heads: int = 4
    num_classes: int | None = None
    recipe: Any = "fp32"
    remat: bool = True
    attention_implementation: str = "auto"
    time_scale: float = 1000.0
    dims: int = 2
    padding: str = "zeros"
    design: str = "adm"
    scalars: int = 0
    out_channels: int | None = None

    def __post_init__(self):
        check_attributes(
            self, "width", "blocks", "heads", "num_classes", "out_channels"
        )
        check_choice("padding", self.padding, PADDINGS)
        check_choice("design", self.design, DESIGNS)
        check_range("dims", check_count("dims", self.dims), 1, 2)
        check_count("scalars", self.scalars, 0)
        self._check_design()
        if self.attention_levels is None:
            self.attention_levels = (1,) if self.design == "adm" else ()
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
        least = 4 if self.design == "adm" else 8
        if self.width % least:
            raise ValueError(
                f"width={self.width} must be a multiple of {least}, for its group "
                f"norms."
            )
        attending = {*self.attention_levels, levels - 1}
        for level in attending if self.design == "adm" else ():
            channels = self.width * self.multipliers[level]
            if channels % self.heads:
                raise ValueError(
                    f"heads={self.heads} must divide the {channels} channels of level "
                    f"{level}, which has attention."
                )
        super().__post_init__()

    def _check_design(self) -> None:
        """Raises ValueError for settings of the other design."""
        others = (
            {"scalars": 0, "padding": "zeros"}
            if self.design == "adm"
            else {"num_classes": None, "attention_levels": None}
        )
        allowed = {"padding": ("circular",), "attention_levels": ((), [])}
        for name, value in others.items():
            given = getattr(self, name)
            if given != value and given not in allowed.get(name, ()):
                raise ValueError(
                    f"{name}={given!r} is no setting of design={self.design!r}; leave "
                    f"it at {value!r}, or choose the other design."
                )

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *space channel"], t: Any, cond: Any = None
    ) -> Float[Array, "batch *space channel_out"]:
        """Velocity of x at time t.

        Args:
            x: images or fields [batch, *space, channel], with ``dims`` axes of space.
            t: [batch] (or a scalar) in [0, 1]; 1 is noise, 0 is data.
            cond: int [batch] classes, or float [batch, scalars], or None.

        Returns:
            float32, of the shape of x (its channels are ``out_channels``).

        Raises:
            ValueError: x is no batch of images, its sides cannot be halved often
                enough, or its channels are not those the network was made with; a
                (concrete) time outside [0, 1]; a condition that is not what the
                network was built for.
            TypeError: classes that are not integers.
        """
        self._check_images(x)
        modulation = self._embed(t, cond, len(x))
        levels, modern = range(len(self.multipliers)), self.design == "modern"
        widths = [self.width * m for m in self.multipliers]
        attending = self.attention_levels or ()
        size, around = (3,) * self.dims, 1 if self.padding == "zeros" else "circular"
        options = {"recipe": self.recipe, "padding": around}
        kind = _FieldBlock if modern else _Block
        block_type = nn.remat(kind) if self.remat else kind

        def block(name: str, width: int, attends: bool, *inputs: Array) -> Array:
            shape: dict[str, Any] = {"dims": self.dims, "padding": around, "name": name}
            if not modern:
                shape["heads"] = self.heads if attends else None
                shape["implementation"] = self.attention_implementation
            return block_type(width, self.recipe, **shape)(*inputs)

        ends: dict[str, Any] = options | {"recipe": "fp32"} if modern else options
        h = Convolution(self.width, size, name="input", **ends)(x)
        skips = [h]
        for level in levels:
            attends = level in attending
            if level:
                h = Convolution(
                    h.shape[-1], size, strides=2, name=f"downsample_{level}", **options
                )(h)
                skips.append(h)
            for i in range(self.blocks):
                h = block(f"down_{level}_{i}", widths[level], attends, h, modulation)
                skips.append(h)
        h = block("middle_0", widths[-1], True, h, modulation)
        h = block("middle_1", widths[-1], False, h, modulation)
        for level in reversed(levels):
            attends = level in attending
            for i in range(self.blocks + 1):
                width = widths[level]
                if modern and i == self.blocks:
                    width = widths[level - 1] if level else self.width
                name = f"up_{level}_{i}"
                h = block(name, width, attends, h, modulation, skips.pop())
            if level and modern:
                circular = self.padding == "circular"
                h = Upsampling(
                    h.shape[-1],
                    self.dims,
                    self.recipe,
                    circular,
                    name=f"upsample_{level}",
                )(h)
            elif level:
                for axis in range(1, 1 + self.dims):
                    h = h.repeat(2, axis)
                h = Convolution(h.shape[-1], size, name=f"upsample_{level}", **options)(
                    h
                )
        if modern:
            h = exact_gelu(_group_norm(8, "output_norm")(h))
        else:
            h = nn.silu(_group_norm(_groups(h.shape[-1]), "output_norm")(h))
        output = Convolution(
            self.out_channels or x.shape[-1],
            size,
            kernel_init=_ZEROS,
            name="output",
            **ends,
        )
        return output(h).astype(jnp.float32)

    def _check_images(self, x: Array) -> None:
        if x.ndim != self.dims + 2:
            images = "images [batch, height, width, channel]"
            wanted = images if self.dims == 2 else "fields [batch, x, channel]"
            raise ValueError(f"x has shape {x.shape}; give {wanted}.")
        sides, channels = x.shape[1:-1], x.shape[-1]
        unit = 2 ** (len(self.multipliers) - 1)
        if not all(sides) or any(side % unit for side in sides):
            valid = " x ".join(str(max(1, -(-side // unit)) * unit) for side in sides)
            given = " x ".join(map(str, sides))
            raise ValueError(
                f"x has sides {given}, which must be multiples of "
                f"2^(levels - 1) = {unit}: give fewer multipliers than "
                f"{len(self.multipliers)}, or sides of {valid}."
            )
        if not self.is_initializing():
            made = self.variables["params"]["input"]["kernel"].shape[-2]
            if channels != made:
                raise ValueError(
                    f"x has {channels} channel(s) but the parameters were made for "
                    f"{made}."
                )

    def _embed(self, t: Any, cond: Any, batch: int) -> Array:
        """Sum of the embeddings of time and condition, float32 [batch, 4 width]."""
        features = 4 * self.width
        if self.design == "modern":
            return ScalarEmbedding(
                self.width, self.scalars, self.time_scale, self.recipe, name="embedding"
            )(expand_time(t, batch), cond)
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
