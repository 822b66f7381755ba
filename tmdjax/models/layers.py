"""Layers shared by the networks: dense, embeddings, norms, patches."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tmdjax.core.checks import check_batch, check_choice, check_count, check_range
from tmdjax.core.types import Array, Float
from tmdjax.models.attention import IMPLEMENTATIONS, attention
from tmdjax.quant import as_recipe, linear


class Dense(nn.Module):
    """x @ kernel + bias under a GEMM recipe of :mod:`tmdjax.quant`.

    Attributes:
        features: output width.
        recipe: a :class:`tmdjax.quant.Recipe` or its name; it sets the output dtype.
        use_bias: whether a bias is added, in float32 before rounding.
        kernel_init: initialiser of the kernel, float32 [in, out].
    """

    features: int
    recipe: Any = "fp32"
    use_bias: bool = True
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch in_features"]) -> Array:
        """Maps [..., in] to [..., features]."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        y = linear(x, kernel, self.recipe)
        if self.use_bias:
            bias = self.param(
                "bias", nn.initializers.zeros, (self.features,), jnp.float32
            )
            # Broadcast in float32: the bias gradient is a sum over all rows in the
            # dtype of this addition.
            y = (y.astype(jnp.float32) + bias).astype(y.dtype)
        return y


def layer_norm(
    x: Float[Array, "*batch features"], epsilon: float = 1e-6
) -> Float[Array, "*batch features"]:
    """(x - mean) / sqrt(variance + epsilon) over the last axis, in float32.

    Returns:
        float32, whatever the dtype of x: scale and shift it before casting down.
    """
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + epsilon)


def rms_norm(
    x: Float[Array, "*batch features"], scale: Float[Array, "features"], epsilon: float
) -> Float[Array, "*batch features"]:
    """X / sqrt(mean(x²) + epsilon), times a scale, over the last axis.

    The quotient is taken in float32 and rounded to the dtype of x before the scale
    (cast likewise) multiplies it, the order in which checkpoints were trained.

    References:
        arXiv 1910.07467.
    """
    wide = x.astype(jnp.float32)
    square = jnp.square(wide).mean(-1, keepdims=True)
    y = (wide * jax.lax.rsqrt(square + epsilon)).astype(x.dtype)
    return y * scale.astype(x.dtype)


def check_attributes(module: Any, *sizes: str) -> None:
    """Checks what networks have in common, and looks their recipe up.

    Args:
        module: a network or a configuration. Where it has an
            ``attention_implementation``, that is checked; where it has a ``recipe``,
            that becomes a :class:`tmdjax.quant.Recipe`.
        *sizes: names of attributes that are integers of at least 1, or None where that
            is the default.

    Raises:
        TypeError: a size that is not an integer, a recipe that is no name or recipe.
        ValueError: a size below 1, an unknown implementation or recipe.
    """
    for name in sizes:
        value = getattr(module, name)
        if value is not None or getattr(type(module), name, 0) is not None:
            check_count(name, value)
    if hasattr(module, "attention_implementation"):
        name = "attention_implementation"
        check_choice(name, getattr(module, name), IMPLEMENTATIONS)
    if hasattr(module, "recipe"):
        object.__setattr__(module, "recipe", as_recipe(module.recipe))


def check_transformer(module: Any, *sizes: str) -> None:
    """Checks a transformer of patches, and looks its recipe up.

    Args:
        module: with ``hidden``, ``heads``, ``patch_size`` and ``mlp_ratio``; where it
            has an ``image_size``, the patches must fill it.
        *sizes: further sizes, as of :func:`check_attributes`.

    Raises:
        TypeError, ValueError: what :func:`check_attributes` refuses; sizes that do not
            divide each other.
    """
    check_attributes(module, "patch_size", "hidden", "heads", *sizes)
    hidden, heads, ratio = module.hidden, module.heads, module.mlp_ratio
    check_range("mlp_ratio", ratio, 0, open_low=True, open_high=True)
    check_count("int(hidden * mlp_ratio)", int(hidden * ratio))
    side = getattr(module, "image_size", None)
    if side is not None:
        check_patches(side, side, module.patch_size)
    if hidden % heads or hidden % 4:
        raise ValueError(
            f"hidden={hidden} must be a multiple of heads={heads} and of 4 (the "
            f"position embedding)."
        )


def check_ids(name: str, ids: Any, count: int) -> None:
    """Checks indices of rows before :func:`rows_of` reads these.

    Raises:
        TypeError: not an integer array.
        ValueError: a (concrete) index outside [0, count).
    """
    dtype = getattr(ids, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            f"{name} must be an integer array; got {type(ids).__name__} of dtype "
            f"{dtype}."
        )
    if not isinstance(ids, jax.core.Tracer):
        values = np.asarray(ids)
        for extreme in (values.min(initial=0), values.max(initial=0)):
            check_range(name, int(extreme), 0, count - 1)


def rows_of(table: Float[Array, "row features"], ids: Array) -> Array:
    """Rows of a table by index; a (traced) index outside it gives a row of NaN."""
    return table.at[ids].get(mode="fill", wrap_negative_indices=False)


def timestep_embedding(
    t: Float[Array, "batch"], dim: int, time_scale: float = 1000.0
) -> Float[Array, "batch dim"]:
    """Sinusoids of a time: [cos(s t w_i), sin(s t w_i)], w_i = 10000^(-2i/dim).

    Args:
        t: times [batch] in [0, 1].
        dim: width of the embedding, even.
        time_scale: s, what t is multiplied by. 1000 gives the range of the
            discrete timesteps that published networks were trained on.

    Returns:
        float32 [batch, dim], cosines first.

    Raises:
        ValueError: dim is odd or not positive, or t is not one-dimensional.

    References:
        arXiv 2212.09748 (its code); arXiv 1706.03762, section 3.5.
    """
    if dim < 2 or dim % 2:
        raise ValueError(
            f"dim={dim} must be even and positive: half cosine, half sine."
        )
    if t.ndim != 1:
        raise ValueError(f"t has shape {t.shape}; give one time a sample, [batch].")
    half = dim // 2
    frequencies = np.exp(-math.log(10000.0) * np.arange(half) / half)
    angles = (time_scale * t.astype(jnp.float32))[:, None] * jnp.asarray(
        frequencies, jnp.float32
    )
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


_XAVIER = nn.initializers.xavier_uniform()
# The DiT code draws query, key and value as one Xavier kernel [width, 3 width]; half
# the variance gives three kernels [width, width] the same bound, sqrt(6 / (4 width)).
_FUSED_XAVIER = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")


class MultiHeadAttention(nn.Module):
    """Attention of x to a context: projections query, key, value and out.

    Attributes:
        heads: a divisor of the width of x.
        recipe: GEMM recipe of the projections.
        implementation: of :func:`tmdjax.models.attention`.
        out_init: initialiser of the last projection's kernel.
    """

    heads: int
    recipe: Any
    implementation: str
    out_init: Callable[..., Any] = _XAVIER

    @nn.compact
    def __call__(
        self,
        x: Array,
        context: Array,
        mask: Array | None = None,
        values: Array | None = None,
    ) -> Array:
        """Returns [batch, position, width] in the recipe's dtype.

        Args:
            x: [batch, position, width].
            context: [batch, context position, any width], x itself for
                self-attention.
            mask: bool, broadcastable to [batch, heads, position, context position].
            values: what values are projected from, [batch, context position, any
                width]; None for the context, of which the keys are.
        """
        width = x.shape[-1]

        def project(y: Array, name: str) -> Array:
            y = Dense(width, self.recipe, kernel_init=_FUSED_XAVIER, name=name)(y)
            return y.reshape(*y.shape[:-1], self.heads, width // self.heads)

        y = attention(
            project(x, "query"),
            project(context, "key"),
            project(context if values is None else values, "value"),
            mask=mask,
            implementation=self.implementation,
        )
        y = y.reshape(x.shape)
        return Dense(width, self.recipe, kernel_init=self.out_init, name="out")(y)


class TimeEmbedding(nn.Module):
    """Sinusoids of the time through two dense layers.

    Attributes:
        features: output width.
        frequency_dim: width of the sinusoidal embedding, even.
        time_scale: what t is multiplied by before the sinusoids.
        recipe: GEMM recipe; of an 8-bit one that which is not quantised.
        gelu: the exact GELU between the layers, and not SiLU.
    """

    features: int
    frequency_dim: int = 256
    time_scale: float = 1000.0
    recipe: Any = "fp32"
    gelu: bool = False

    @nn.compact
    def __call__(self, t: Float[Array, "batch"]) -> Array:
        """Maps times [batch] in [0, 1] to [batch, features]."""
        recipe, init = as_recipe(self.recipe).unquantised, nn.initializers.normal(0.02)
        y = timestep_embedding(t, self.frequency_dim, time_scale=self.time_scale)
        y = Dense(self.features, recipe, kernel_init=init, name="hidden")(y)
        y = exact_gelu(y) if self.gelu else nn.silu(y)
        return Dense(self.features, recipe, kernel_init=init, name="out")(y)


def exact_gelu(x: Array) -> Array:
    """X times the normal distribution function of x, by erf."""
    return nn.gelu(x, approximate=False)


class ScalarEmbedding(nn.Module):
    """A time and further scalars, each by sinusoids and two layers, summed.

    Attributes:
        width: of the sinusoids, even; the sum has 4 * width features.
        scalars: how many there are beside the time.
        time_scale: what t is multiplied by; scalars come scaled (0 to 10 or so, where
            the sinusoids tell them apart).
        recipe: GEMM recipe; of an 8-bit one that which is not quantised.

    References:
        PDEArena (Gupta and Brandstetter, arXiv 2209.15616) and its code.
    """

    width: int
    scalars: int = 0
    time_scale: float = 1000.0
    recipe: Any = "fp32"

    @nn.compact
    def __call__(self, t: Float[Array, "batch"], scalars: Any = None) -> Array:
        """Returns float32 [batch, 4 width].

        Args:
            t: [batch].
            scalars: float [batch, scalars], or None where there are none.

        Raises:
            ValueError: scalars that the network was not built for, or None where it
                was built for some.
        """
        found = jnp.shape(scalars) if scalars is not None else None
        wanted = (len(t), self.scalars) if self.scalars else None
        if found != wanted:
            raise ValueError(
                f"cond has shape {found}, and a network of scalars={self.scalars} "
                f"takes {wanted}: dt, dx and the like side by side, or None."
            )
        settings = {"recipe": self.recipe, "gelu": True, "frequency_dim": self.width}
        total = TimeEmbedding(
            4 * self.width,
            time_scale=self.time_scale,
            name="time_embedding",
            **settings,
        )(t).astype(jnp.float32)
        columns = () if scalars is None else jnp.unstack(scalars, axis=1)
        for i, column in enumerate(columns):
            total += TimeEmbedding(
                4 * self.width, time_scale=1.0, name=f"scalar_embedding_{i}", **settings
            )(column).astype(jnp.float32)
        return total


class ClassEmbedding(nn.Module):
    """A learned vector a class; index ``num_classes`` is the null class.

    Attributes:
        num_classes: number of classes, the null class not counted.
        features: output width.
    """

    num_classes: int
    features: int

    @nn.compact
    def __call__(self, cond: Any, batch: int) -> Float[Array, "batch features"]:
        """Looks classes up.

        Args:
            cond: int [batch] in 0..num_classes, or None for the null class in
                every row.
            batch: the batch size.

        Returns:
            float32 [batch, features].

        Raises:
            TypeError: cond is not an integer array.
            ValueError: cond has another shape, or a (concrete) class out of range.
                A traced class out of range, negative too, gives a row of NaN.
        """
        table = self.param(
            "embedding",
            nn.initializers.normal(0.02),
            (self.num_classes + 1, self.features),
            jnp.float32,
        )
        if cond is None:
            cond = jnp.full((batch,), self.num_classes, jnp.int32)
        check_ids("cond (classes)", cond, self.num_classes + 1)
        if cond.ndim != 1:
            raise ValueError(
                f"cond has shape {cond.shape}; give one class a sample, ({batch},)."
            )
        check_batch("cond", cond, batch)
        return rows_of(table, cond)


def check_unconditional(cond: Any) -> None:
    """Raises ValueError if a network built without conditions is given one."""
    if cond is not None:
        raise ValueError(
            "this network was built unconditional but got cond; pass cond=None, or "
            "build it with num_classes."
        )


def patchify(
    x: Float[Array, "batch height width channel"], patch_size: int
) -> Float[Array, "batch position features"]:
    """Cuts images into square patches, row by row.

    Args:
        x: images [batch, height, width, channel].
        patch_size: side of a patch; it divides height and width.

    Returns:
        [batch, height/p * width/p, p * p * channel]; inside a patch the order is
        row, column, channel.

    Raises:
        ValueError: x is no batch of images or patch_size does not divide its sides.
    """
    if x.ndim != 4:
        raise ValueError(
            f"x has shape {x.shape}; give images [batch, height, width, channel]."
        )
    batch, height, width, channel = x.shape
    check_patches(height, width, patch_size)
    rows, columns = height // patch_size, width // patch_size
    x = x.reshape(batch, rows, patch_size, columns, patch_size, channel)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * columns, patch_size * patch_size * channel)


def unpatchify(
    tokens: Float[Array, "batch position features"],
    patch_size: int,
    height: int,
    width: int,
) -> Float[Array, "batch height width channel"]:
    """The inverse of :func:`patchify`.

    Raises:
        ValueError: the patches do not make an image of that height and width.
    """
    check_patches(height, width, patch_size)
    rows, columns = height // patch_size, width // patch_size
    batch, positions, features = tokens.shape
    if positions != rows * columns or features % patch_size**2:
        raise ValueError(
            f"tokens have shape {tokens.shape}; an image of {height} x {width} in "
            f"patches of {patch_size} needs {rows * columns} positions and a multiple "
            f"of {patch_size**2} features."
        )
    x = tokens.reshape(batch, rows, columns, patch_size, patch_size, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, -1)


def check_patches(height: int, width: int, patch_size: int) -> None:
    """Raises ValueError unless patches of that side fill an image."""
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"patch_size={patch_size} does not divide an image of {height} x {width}."
        )


def position_embedding_2d(rows: int, columns: int, dim: int) -> np.ndarray:
    """Fixed sine-cosine embedding of a grid of patches.

    A quarter of the features each: sin and cos of the column, sin and cos of the
    row, at frequencies 10000^(-4 i / dim), i < dim / 4.

    Args:
        rows: patches along the height.
        columns: patches along the width.
        dim: features, a multiple of 4.

    Returns:
        float32 [rows * columns, dim] on the host, rows first as in
        :func:`patchify`.

    Raises:
        ValueError: dim is not a positive multiple of 4.

    References:
        arXiv 2111.06377 and 2212.09748 (their code).
    """
    if dim < 4 or dim % 4:
        raise ValueError(f"dim={dim} must be a positive multiple of 4.")
    quarter = dim // 4
    frequencies = 10000.0 ** (-np.arange(quarter) / quarter)
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    parts = []
    for position in (column, row):
        angles = position.reshape(-1, 1) * frequencies
        parts += [np.sin(angles), np.cos(angles)]
    return np.concatenate(parts, axis=1).astype(np.float32)
