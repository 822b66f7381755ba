"""Diffusion transformer with adaptive layer norm (arXiv 2212.09748)."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from tmdjax.core.conventions import expand_time
from tmdjax.core.mesh import cut_by_batch
from tmdjax.core.types import Array, Float
from tmdjax.models.layers import (
    ClassEmbedding,
    Dense,
    MultiHeadAttention,
    TimeEmbedding,
    check_transformer,
    check_unconditional,
    layer_norm,
    patchify,
    position_embedding_2d,
    unpatchify,
)
from tmdjax.models.stack import Stacked, StackedNetwork
from tmdjax.quant import Recipe

_XAVIER = nn.initializers.xavier_uniform()
_ZEROS = nn.initializers.zeros


def _modulate(x: Array, shift: Array, scale: Array, recipe: Recipe) -> Array:
    """Layer norm, then scale and shift in float32; out in the compute dtype."""
    y = layer_norm(x) * (1 + scale) + shift
    return y.astype(recipe.dtype)


def _by_token(modulation: Array) -> Array:
    """[batch, 1, width] of one for all tokens; of one for each as it is."""
    return modulation if modulation.ndim == 3 else modulation[:, None]


class AdaptiveBlock(nn.Module):
    """Attention and MLP, each modulated and gated by the condition.

    ``c['modulation']`` is [batch, width], or [batch, position, width] where every token
    has a condition of its own.
    """

    heads: int
    mlp_width: int
    recipe: Recipe
    implementation: str

    @nn.compact
    def __call__(self, h: Array, c: Mapping[str, Array]) -> Array:
        """Maps [batch, position, width] to the same."""
        hidden = h.shape[-1]
        modulation = Dense(
            6 * hidden, self.recipe.unquantised, kernel_init=_ZEROS, name="modulation"
        )(nn.silu(c["modulation"]))
        modulation = _by_token(modulation.astype(jnp.float32))
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = jnp.split(
            modulation, 6, -1
        )

        x = _modulate(h, shift, scale, self.recipe)
        x = MultiHeadAttention(
            self.heads, self.recipe, self.implementation, name="attention"
        )(x, x)
        h = h + (gate * x).astype(h.dtype)
        if "tokens" in c:
            x = layer_norm(h).astype(h.dtype)
            # A zero output projection keeps the block the identity at the start.
            h = h + MultiHeadAttention(
                self.heads,
                self.recipe,
                self.implementation,
                _ZEROS,
                name="cross_attention",
            )(x, c["tokens"], c["mask"])
        x = _modulate(h, mlp_shift, mlp_scale, self.recipe)
        x = Dense(self.mlp_width, self.recipe, kernel_init=_XAVIER, name="mlp_in")(x)
        x = nn.gelu(x, approximate=True)
        x = Dense(hidden, self.recipe, kernel_init=_XAVIER, name="mlp_out")(x)
        return h + (mlp_gate * x).astype(h.dtype)


class AdaptiveOutput(nn.Module):
    """Layer norm modulated by the condition, and the last projection."""

    recipe: Recipe

    @nn.compact
    def __call__(self, h: Array, modulation: Array, features: int) -> Array:
        """Maps [batch, position, width] to [batch, position, features]."""
        y = Dense(2 * h.shape[-1], self.recipe, kernel_init=_ZEROS, name="modulation")(
            nn.silu(modulation)
        )
        shift, scale = jnp.split(_by_token(y.astype(jnp.float32)), 2, -1)
        h = _modulate(h, shift, scale, self.recipe)
        return Dense(features, self.recipe, kernel_init=_ZEROS, name="projection")(h)


class DiT(StackedNetwork):
    """Velocity network ``(x, t, cond) -> velocity`` for images.

    The block parameters are stacked on a leading layer axis (``params['blocks']``,
    every leaf [depth, ...]) and run by one ``lax.scan``, so forty layers compile
    like two. Gates and the last projection start at zero: every block is the
    identity and the velocity is zero.

    Conditions:

    * neither ``num_classes`` nor ``token_width``: ``cond=None``;
    * ``num_classes``: int [batch]; the index ``num_classes`` is the null class, and
      ``cond=None`` is the null class in every row;
    * ``token_width``: ``dict(tokens=[batch, length, token_width], mask=[batch,
      length])`` with mask bool, True at real tokens. They enter by cross-attention,
      not in context: the hidden state then holds image positions alone, so taps,
      splits and skips mean the same with and without text, and cost is linear in
      the length. A learned null token stands before them and is never masked;
      the null condition is a mask of False everywhere, or ``cond=None``. Pad to an
      odd length on a GPU: with the null token it is even, as cuDNN's masked
      attention wants it.

    Attributes:
        patch_size: side of a square patch.
        hidden: width, a multiple of 4 and of ``heads``.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: width of the MLP over ``hidden``; the product is rounded down.
        num_classes: classes, the null class not counted; None without.
        token_width: width of condition tokens; None without.
        out_channels: channels of the velocity; None means those of x.
        recipe: GEMM recipe of every dense layer; of an 8-bit one, attention and MLPs
            are quantised, and embeddings, modulations and the output are not
            (:attr:`tmdjax.quant.Recipe.unquantised`).
        remat: recompute each block in the backward pass.
        attention_implementation: see :func:`tmdjax.models.attention.attention`.
        time_scale: what t in [0, 1] is multiplied by before its sinusoids.

    References:
        arXiv 2212.09748; cross-attention as in arXiv 2310.00426, section 2.3.
    """

    patch_size: int = 2
    hidden: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    num_classes: int | None = None
    token_width: int | None = None
    out_channels: int | None = None
    recipe: Any = "fp32"
    remat: bool = True
    attention_implementation: str = "auto"
    time_scale: float = 1000.0

    def __post_init__(self):
        sizes = ("depth", "num_classes", "token_width", "out_channels")
        check_transformer(self, *sizes)
        if self.num_classes is not None and self.token_width is not None:
            raise ValueError(
                f"num_classes={self.num_classes} and token_width={self.token_width} "
                f"are both given; a network is conditioned on classes or on tokens."
            )
        super().__post_init__()

    def setup(self):
        """Declares the layers."""
        wide = self.recipe.unquantised
        self.patch_embedding = Dense(self.hidden, wide, kernel_init=_XAVIER)
        self.time_embedding = TimeEmbedding(
            self.hidden, time_scale=self.time_scale, recipe=self.recipe
        )
        if self.num_classes is not None:
            self.class_embedding = ClassEmbedding(self.num_classes, self.hidden)
        if self.token_width is not None:
            self.token_projection = Dense(self.hidden, wide, kernel_init=_XAVIER)
            self.null_token = self.param(
                "null_token",
                nn.initializers.normal(0.02),
                (self.hidden,),
                jnp.float32,
            )
        self.stack = self.param("blocks", self._init_stack)
        self.final = AdaptiveOutput(wide)

    def _mlp_width(self) -> int:
        return int(self.hidden * self.mlp_ratio)

    def _blocks(self) -> Stacked:
        block = AdaptiveBlock(
            self.heads,
            self._mlp_width(),
            self.recipe,
            self.attention_implementation,
            parent=None,
        )
        return Stacked(block, self.depth, self.remat)

    def _init_stack(self, key: Array) -> Any:
        """Parameters of all blocks, leaves [depth, ...]."""
        h = jnp.zeros((1, 1, self.hidden), self.recipe.dtype)
        c = {"modulation": jnp.zeros((1, self.hidden))}
        if self.token_width is not None:
            c |= {"tokens": h, "mask": jnp.ones((1, 1), bool)}
        return self._blocks().init(key, h, c)

    def __call__(
        self, x: Float[Array, "batch height width channel"], t: Any, cond: Any = None
    ) -> Float[Array, "batch height width out_channel"]:
        """Velocity of x at time t.

        Args:
            x: images [batch, height, width, channel]; patch_size divides the sides.
            t: [batch] (or a scalar) in [0, 1]; 1 is noise, 0 is data.
            cond: int [batch] classes, a dict of 'tokens' and 'mask', or None.

        Returns:
            float32 [batch, height, width, out_channels].
        """
        h, c = self.embed(x, t, cond)
        h, _ = self.blocks(h, c)
        return self.output(h, c, (x.shape[1], x.shape[2]))

    def embed(
        self, x: Float[Array, "batch height width channel"], t: Any, cond: Any = None
    ) -> tuple[Array, dict[str, Array]]:
        """Hidden state and condition that the blocks run on.

        Args:
            x: images [batch, height, width, channel].
            t: [batch] or a scalar, in [0, 1].
            cond: int [batch] classes, a dict of 'tokens' and 'mask', or None.

        Returns:
            h [batch, position, hidden] in the compute dtype, and c, a dict of
            'modulation' float32 [batch, hidden] and, under token conditions,
            'tokens' [batch, 1 + length, hidden] and 'mask' bool [batch, 1 + length].

        Raises:
            ValueError: sides that patch_size does not divide; a (concrete) time
                outside [0, 1]; a condition that is not what the network was built
                for.
            TypeError: classes that are not integers, tokens without their mask.
        """
        patches = patchify(x, self.patch_size)
        batch, height, width, _ = x.shape
        modulation = self.time_embedding(expand_time(t, batch)).astype(jnp.float32)
        c = {"modulation": modulation}
        if self.num_classes is not None:
            c["modulation"] = modulation + self.class_embedding(cond, batch)
        elif self.token_width is not None:
            c |= self._embed_tokens(cond, batch)
        else:
            check_unconditional(cond)
        positions = position_embedding_2d(
            height // self.patch_size, width // self.patch_size, self.hidden
        )
        h = self.patch_embedding(patches) + positions
        return h.astype(self.recipe.dtype), cut_by_batch(c)

    def _embed_tokens(self, cond: Any, batch: int) -> dict[str, Array]:
        dtype = self.recipe.dtype
        null = jnp.broadcast_to(self.null_token, (batch, 1, self.hidden)).astype(dtype)
        always = jnp.ones((batch, 1), bool)
        if cond is None:
            # The projection is traced all the same, so that initialising with
            # cond=None makes all parameters.
            cond = {
                "tokens": jnp.zeros((batch, 0, self.token_width or 0), dtype),
                "mask": jnp.zeros((batch, 0), bool),
            }
        if not isinstance(cond, Mapping) or set(cond) != {"tokens", "mask"}:
            given = sorted(cond) if isinstance(cond, Mapping) else type(cond).__name__
            raise TypeError(
                f"cond must be a dict with the keys 'tokens' and 'mask' or None, got "
                f"{given}."
            )
        tokens, mask = cond["tokens"], cond["mask"]
        if tokens.ndim != 3 or (tokens.shape[0], tokens.shape[2]) != (
            batch,
            self.token_width,
        ):
            raise ValueError(
                f"cond['tokens'] has shape {tokens.shape}; give [batch, length, "
                f"token_width] = ({batch}, length, {self.token_width})."
            )
        if mask.shape != tokens.shape[:2] or mask.dtype != jnp.bool_:
            raise ValueError(
                f"cond['mask'] is {mask.dtype}{list(mask.shape)}; give booleans of "
                f"shape {tokens.shape[:2]}, True at real tokens."
            )
        tokens = self.token_projection(tokens).astype(dtype)
        return {
            "tokens": jnp.concatenate([null, tokens], 1),
            "mask": jnp.concatenate([always, mask], 1),
        }

    def output(
        self,
        h: Float[Array, "batch position hidden"],
        c: Mapping[str, Any],
        size: tuple[int, int],
    ) -> Float[Array, "batch height width out_channel"]:
        """Velocity from the last hidden state.

        Args:
            h: hidden state [batch, position, hidden].
            c: condition from :meth:`embed`.
            size: (height, width) of the image in pixels.

        Returns:
            float32 [batch, height, width, out_channels].

        Raises:
            ValueError: the positions do not fill an image of that size.
        """
        patch_area = self.patch_size**2
        features = patch_area * self.output_channels(patch_area)
        y = self.final(h, c["modulation"], features)
        return unpatchify(y.astype(jnp.float32), self.patch_size, *size)
