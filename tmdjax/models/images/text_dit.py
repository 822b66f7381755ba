"""Diffusion transformer conditioned on a text by an encoder of its own."""

from collections.abc import Mapping
from typing import Any, SupportsIndex

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tmdjax.core.checks import check_batch, check_count, check_range
from tmdjax.core.types import Array, Float
from tmdjax.models.images.dit import DiT
from tmdjax.models.layers import (
    Dense,
    MultiHeadAttention,
    check_attributes,
    check_ids,
    layer_norm,
    rows_of,
)
from tmdjax.models.stack import Stacked
from tmdjax.quant import Recipe

_XAVIER = nn.initializers.xavier_uniform()
_ZEROS = nn.initializers.zeros
_RAW, _ENCODED = {"ids", "mask"}, {"tokens", "mask"}


def null_condition(
    length: SupportsIndex, width: SupportsIndex | None = None
) -> dict[str, np.ndarray]:
    """The condition "no text" of one sample: its mask is False everywhere.

    It is what :func:`tmdjax.flows.classifier_free_guidance` and
    :func:`tmdjax.flows.drop_condition` take as ``null_cond``; a network then sees
    the learned null token alone, as with ``cond=None``.

    Args:
        length: positions, those of the conditions it stands beside.
        width: width of encoded tokens; None for raw ids.

    Returns:
        On the host, without batch axis: ``{'ids': int32 [length], 'mask': bool
        [length]}``, or with a width ``{'tokens': float32 [length, width], 'mask'}``.

    Raises:
        TypeError: length or width is not an integer.
        ValueError: length or width below 1.
    """
    length = check_count("length", length)
    mask = np.zeros(length, bool)
    if width is None:
        return {"ids": np.zeros(length, np.int32), "mask": mask}
    width = check_count("width", width)
    return {"tokens": np.zeros((length, width), np.float32), "mask": mask}


class _EncoderBlock(nn.Module):
    """Self-attention and MLP, each after a layer norm."""

    heads: int
    mlp_width: int
    recipe: Recipe
    implementation: str

    @nn.compact
    def __call__(self, h: Array, mask: Array) -> Array:
        x = layer_norm(h).astype(h.dtype)
        # Zero output projections make the block the identity at the start.
        h = h + MultiHeadAttention(
            self.heads, self.recipe, self.implementation, _ZEROS, name="attention"
        )(x, x, mask)
        x = layer_norm(h).astype(h.dtype)
        x = Dense(self.mlp_width, self.recipe, kernel_init=_XAVIER, name="mlp_in")(x)
        x = nn.gelu(x, approximate=True)
        return h + Dense(h.shape[-1], self.recipe, kernel_init=_ZEROS, name="mlp_out")(
            x
        )


class TextEncoder(nn.Module):
    """Bidirectional transformer over word ids: ``cond -> tokens``.

    Learned word and position embeddings, pre-norm blocks stacked on a leading layer
    axis (``params['blocks']``, every leaf [depth, ...]; absent at depth 0) and run
    by one ``lax.scan``, a final layer norm. The norms have no scale and shift of
    their own: each stands before a dense layer that holds them.

    Padding (False in the mask) is not read: no real position looks at it, whatever
    its ids, and its own tokens come out as zeros.

    Attributes:
        vocabulary: number of words.
        max_length: longest text, in positions.
        width: width of the tokens, a multiple of ``heads``.
        depth: number of blocks; 0 leaves normed embeddings.
        heads: attention heads.
        mlp_ratio: width of the MLP over ``width``; the product is rounded down.
        recipe: GEMM recipe of every dense layer.
        remat: recompute each block in the backward pass.
        attention_implementation: see :func:`tmdjax.models.attention.attention`.
            With 'cudnn' the length must be even for a gradient.

    References:
        arXiv 1706.03762, without its decoder; norms before the layers as in
        arXiv 2002.04745.
    """

    vocabulary: int
    max_length: int
    width: int = 128
    depth: int = 2
    heads: int = 4
    mlp_ratio: float = 4.0
    recipe: Any = "fp32"
    remat: bool = True
    attention_implementation: str = "auto"

    def __post_init__(self):
        _check_sizes(self)
        check_range("mlp_ratio", self.mlp_ratio, 0, open_low=True, open_high=True)
        check_count("int(width * mlp_ratio)", self._mlp_width())
        super().__post_init__()

    def setup(self):
        """Declares the parameters."""
        # Of unit size, words and positions alike: the blocks add to them.
        normal = nn.initializers.normal(1.0)
        self.words = self.param(
            "word_embedding", normal, (self.vocabulary, self.width), jnp.float32
        )
        self.positions = self.param(
            "position_embedding", normal, (self.max_length, self.width), jnp.float32
        )
        if self.depth:
            self.stack = self.param("blocks", self._init_stack)

    def _mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)

    def _blocks(self) -> Stacked:
        block = _EncoderBlock(
            self.heads,
            self._mlp_width(),
            self.recipe,
            self.attention_implementation,
            parent=None,
        )
        return Stacked(block, self.depth, self.remat)

    def _init_stack(self, key: Array) -> Any:
        """Parameters of all blocks, leaves [depth, ...]."""
        h = jnp.zeros((1, 1, self.width), self.recipe.dtype)
        mask = jnp.ones((1, 1, 1, 1), bool)
        return self._blocks().init(key, h, mask)

    def __call__(self, cond: Mapping[str, Any]) -> dict[str, Array]:
        """Encodes texts.

        Args:
            cond: ``{'ids': int [batch, length] in 0..vocabulary - 1, 'mask': bool
                [batch, length]}``, mask True at real words. Padding holds any id in
                the vocabulary.

        Returns:
            ``{'tokens': float32 [batch, length, width], 'mask': bool [batch,
            length]}``: the mask is passed on, tokens are zero where it is False.

        Raises:
            TypeError: cond is no such dict, or ids are not integers.
            ValueError: a shape that does not fit, a length above max_length, a mask
                that is not boolean, or a (concrete) id out of range. A traced id out
                of range, negative too, makes tokens of its text NaN.
        """
        ids, mask = self._check_condition(cond)
        # What is padding cannot be NaN then, which a weight of zero would spread.
        ids = jnp.where(mask, ids, 0)
        words = rows_of(self.words, ids)
        length = ids.shape[1]
        h = (words + self.positions[:length]).astype(self.recipe.dtype)
        if self.depth:
            # Padding looks at itself, so that no row of the softmax is empty.
            seen = mask[:, None, None, :] | jnp.eye(length, dtype=bool)
            h, _ = self._blocks().run(self.stack, h, seen)
        tokens = jnp.where(mask[:, :, None], layer_norm(h), 0.0)
        return {"tokens": tokens, "mask": mask}

    def _check_condition(self, cond: Any) -> tuple[Array, Array]:
        if _keys(cond) != _RAW:
            raise TypeError(
                f"a text must be a dict with the keys 'ids' and 'mask', got "
                f"{_describe(cond)}."
            )
        ids, mask = cond["ids"], cond["mask"]
        check_ids("cond['ids'] (words)", ids, self.vocabulary)
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= self.max_length:
            raise ValueError(
                f"cond['ids'] has shape {ids.shape}; give [batch, length] with a "
                f"length of 1 to max_length={self.max_length}: cut the texts, or "
                f"build the encoder with a larger max_length."
            )
        dtype = getattr(mask, "dtype", None)
        if dtype != jnp.bool_ or mask.shape != ids.shape:
            raise ValueError(
                f"cond['mask'] is {dtype}{list(np.shape(mask))}; give booleans of "
                f"shape {ids.shape}, True at real words."
            )
        return jnp.asarray(ids), jnp.asarray(mask)


class TextDiT(nn.Module):
    """Velocity network ``(x, t, cond) -> velocity`` for images described by texts.

    A :class:`TextEncoder` and a :class:`tmdjax.models.DiT` that attends to its
    tokens. The parameters are ``{'encoder': ..., 'dit': ...}``, each what the module
    of that kind takes alone, so that the encoder trains along with the velocity
    and may then be frozen::

        encoded = functional(network)(params, cond, method="encode")
        velocity = functional(network.dit_module())(params["dit"], x, t, encoded)

    encodes once a prompt instead of once a solver step, and leaves ``params['dit']``
    to be trained; splits, taps and skips are those of the DiT.

    Conditions: ``{'ids', 'mask'}`` (see :class:`TextEncoder`); ``{'tokens',
    'mask'}``, encoded already; None, no text. A mask of False everywhere is no text
    too: :func:`null_condition`.

    Attributes:
        vocabulary: number of words.
        max_length: longest text, in positions.
        text_width: width of the encoder, a multiple of ``text_heads``.
        text_depth: blocks of the encoder, at least 0.
        text_heads: attention heads of the encoder.
        patch_size: side of a square patch.
        hidden: width of the DiT, a multiple of 4 and of ``heads``.
        depth: blocks of the DiT.
        heads: attention heads of the DiT.
        mlp_ratio: width of an MLP over the width of its stack, in both.
        out_channels: channels of the velocity; None means those of x.
        recipe: GEMM recipe of every dense layer, in both.
        remat: recompute each block in the backward pass, in both.
        attention_implementation: of the DiT, see
            :func:`tmdjax.models.attention.attention`. Under 'cudnn' the encoder
            takes 'auto': the odd length that suits the DiT's null token on a GPU
            does not suit the encoder.
        time_scale: what t in [0, 1] is multiplied by before its sinusoids.
    """

    vocabulary: int
    max_length: int
    text_width: int = 128
    text_depth: int = 2
    text_heads: int = 4
    patch_size: int = 2
    hidden: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    out_channels: int | None = None
    recipe: Any = "fp32"
    remat: bool = True
    attention_implementation: str = "auto"
    time_scale: float = 1000.0

    def __post_init__(self):
        _check_sizes(self, "text_")
        # They check what they are given.
        self.dit_module()
        self._encoder_module()
        super().__post_init__()

    def setup(self):
        """Declares the two networks."""
        self.encoder = self._encoder_module()
        self.dit = self.dit_module()

    @nn.nowrap
    def dit_module(self) -> DiT:
        """The network that takes ``params['dit']`` and encoded conditions."""
        return DiT(
            patch_size=self.patch_size,
            hidden=self.hidden,
            depth=self.depth,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            token_width=self.text_width,
            out_channels=self.out_channels,
            recipe=self.recipe,
            remat=self.remat,
            attention_implementation=self.attention_implementation,
            time_scale=self.time_scale,
            parent=None,
        )

    @nn.nowrap
    def _encoder_module(self) -> TextEncoder:
        implementation = self.attention_implementation
        return TextEncoder(
            vocabulary=self.vocabulary,
            max_length=self.max_length,
            width=self.text_width,
            depth=self.text_depth,
            heads=self.text_heads,
            mlp_ratio=self.mlp_ratio,
            recipe=self.recipe,
            remat=self.remat,
            attention_implementation=(
                "auto" if implementation == "cudnn" else implementation
            ),
            parent=None,
        )

    def __call__(
        self, x: Float[Array, "batch height width channel"], t: Any, cond: Any = None
    ) -> Float[Array, "batch height width out_channel"]:
        """Velocity of x at time t.

        Args:
            x: images [batch, height, width, channel]; patch_size divides the sides.
            t: [batch] (or a scalar) in [0, 1]; 1 is noise, 0 is data.
            cond: a dict of 'ids' and 'mask', one of 'tokens' and 'mask', or None.

        Returns:
            float32 [batch, height, width, out_channels].

        Raises:
            TypeError: a condition that is none of the three, ids that are not
                integers.
            ValueError: shapes, ids or times out of range; see :class:`TextEncoder`
                and :class:`tmdjax.models.DiT`.
        """
        if _keys(cond) == _RAW:
            check_batch("cond['ids']", cond["ids"], x.shape[0])
        if self.is_initializing() and _keys(cond) != _RAW:
            # So that initialising without ids makes all parameters.
            self.encoder(jax.tree.map(lambda leaf: leaf[None], null_condition(1)))
        return self.dit(x, t, self.encode(cond))

    def encode(self, cond: Any) -> Any:
        """The condition as the DiT takes it.

        Args:
            cond: a dict of 'ids' and 'mask', one of 'tokens' and 'mask', or None.

        Returns:
            ``{'tokens': float32 [batch, length, text_width], 'mask': bool [batch,
            length]}`` of ids; tokens and None are passed on as they are.

        Raises:
            TypeError: a condition that is none of the three.
            ValueError: see :class:`TextEncoder`.
        """
        if cond is None or _keys(cond) == _ENCODED:
            return cond
        if _keys(cond) != _RAW:
            raise TypeError(
                f"cond must be a dict with the keys 'ids' and 'mask' (words), or "
                f"'tokens' and 'mask' (encoded), or None; got {_describe(cond)}."
            )
        return self.encoder(cond)


def _keys(cond: Any) -> set[Any] | None:
    return set(cond) if isinstance(cond, Mapping) else None


def _describe(cond: Any) -> str:
    if isinstance(cond, Mapping):
        return f"the keys {sorted(map(str, cond))}"
    return f"a value of type {type(cond).__name__}"


def _check_sizes(module: Any, prefix: str = "") -> None:
    """Checks the attributes of a text encoder, named with their prefix."""
    check_attributes(
        module, "vocabulary", "max_length", f"{prefix}width", f"{prefix}heads"
    )
    check_count(f"{prefix}depth", getattr(module, f"{prefix}depth"), 0)
    width, heads = (getattr(module, f"{prefix}{name}") for name in ("width", "heads"))
    if width % heads:
        raise ValueError(
            f"{prefix}width={width} must be a multiple of {prefix}heads={heads}."
        )
