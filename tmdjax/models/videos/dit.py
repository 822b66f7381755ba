"""Video diffusion transformer conditioned on text, in the layout of Wan 2.1."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tmdjax.core.checks import check_count, check_range
from tmdjax.core.conventions import expand_time
from tmdjax.core.mesh import cut_by_batch
from tmdjax.core.types import Array, Float
from tmdjax.models.layers import Dense, TimeEmbedding, check_attributes
from tmdjax.models.stack import Stacked, StackedNetwork
from tmdjax.models.videos.layers import (
    XAVIER,
    TextEmbedding,
    VideoBlock,
    VideoOutput,
)
from tmdjax.models.videos.patches import (
    Size,
    check_head_dim,
    patch_grid,
    patchify_video,
    rotary_tables,
    unpatchify_video,
)

WAN_1_3B: dict[str, Any] = {
    "name": "video_dit",
    "patch_size": (1, 2, 2),
    "heads": 12,
    "head_dim": 128,
    "depth": 30,
    "mlp_width": 8960,
    "out_channels": 16,
    "text_width": 4096,
}
"""Spec of the Wan 2.1 text-to-video network with 1.3 B parameters, 16 channels in."""

WAN_14B: dict[str, Any] = WAN_1_3B | {"heads": 40, "depth": 40, "mlp_width": 13824}
"""Spec of the Wan 2.1 text-to-video network with 14 B parameters, 16 channels in."""


class VideoDiT(StackedNetwork):
    """Velocity network ``(x, t, cond) -> velocity`` for videos.

    Each block attends to all positions of the video (rotary positions along frames,
    rows and columns), then to the text, then has an MLP; the time modulates and gates
    the first and the last. The block parameters are stacked on a leading layer axis
    (``params['blocks']``, every leaf [depth, ...]) and run by one ``lax.scan``. The
    last projection starts at zero, so that the first velocity is zero.

    The condition is float [batch, length, text_width], states of a text encoder whose
    rows past the true length are zero. There is no mask: zero rows are looked at too,
    as in the published networks, so keep to one length (theirs is 512).

    The time embedding, norms, tables and gated additions are in float32 under every
    recipe.

    Attributes:
        patch_size: (frames, rows, columns) of a patch.
        heads: attention heads.
        head_dim: width of a head, even; the network is ``heads * head_dim`` wide.
        depth: number of blocks.
        mlp_width: width of the MLP.
        out_channels: channels of the velocity; None means those of x.
        text_width: width of the condition.
        frequency_dim: width of the sinusoids of the time, even.
        cross_attention_norm: whether a layer norm with scale and bias stands before
            the cross-attention.
        rope_length: most patches along an axis.
        epsilon: of every norm.
        recipe: GEMM recipe of every dense layer but those of the time; of an 8-bit one,
            embeddings and the output are not quantised
            (:attr:`tmdjax.quant.Recipe.unquantised`).
        remat: recompute each block in the backward pass.
        attention_implementation: see :func:`tmdjax.models.attention.attention`.
        time_scale: what t in [0, 1] is multiplied by before its sinusoids.

    References:
        arXiv 2503.20314, section 4.2, and its code.
    """

    patch_size: tuple[int, int, int] = (1, 2, 2)
    heads: int = 12
    head_dim: int = 128
    depth: int = 30
    mlp_width: int = 8960
    out_channels: int | None = None
    text_width: int = 4096
    frequency_dim: int = 256
    cross_attention_norm: bool = True
    rope_length: int = 1024
    epsilon: float = 1e-6
    recipe: Any = "fp32"
    remat: bool = True
    attention_implementation: str = "auto"
    time_scale: float = 1000.0

    def __post_init__(self):
        sizes = ("heads", "head_dim", "depth", "mlp_width", "text_width")
        check_attributes(self, *sizes, "frequency_dim", "rope_length", "out_channels")
        if not isinstance(self.patch_size, tuple) or len(self.patch_size) != 3:
            raise ValueError(
                f"patch_size={self.patch_size!r} must be a tuple of three sizes, "
                f"(frames, rows, columns)."
            )
        for size in self.patch_size:
            check_count("patch_size", size)
        if self.frequency_dim % 2:
            raise ValueError(
                f"frequency_dim={self.frequency_dim} must be even: half cosines, half "
                f"sines."
            )
        check_head_dim(self.head_dim)
        check_range("epsilon", self.epsilon, 0, open_low=True)
        super().__post_init__()

    @property
    def width(self) -> int:
        """Features of a position."""
        return self.heads * self.head_dim

    def setup(self):
        """Declares the layers."""
        wide = self.recipe.unquantised
        self.patch_embedding = Dense(self.width, wide, kernel_init=XAVIER)
        # In float32: what the time changes is small, and there is one row a sample.
        self.time_embedding = TimeEmbedding(
            self.width, self.frequency_dim, self.time_scale
        )
        self.time_projection = Dense(6 * self.width, kernel_init=XAVIER)
        self.text_embedding = TextEmbedding(self.width, wide)
        self.stack = self.param("blocks", self._init_stack)
        self.final = VideoOutput(self.epsilon, wide)

    def _blocks(self) -> Stacked:
        block = VideoBlock(
            self.heads,
            self.mlp_width,
            self.cross_attention_norm,
            self.epsilon,
            self.recipe,
            self.attention_implementation,
            parent=None,
        )
        return Stacked(block, self.depth, self.remat)

    def _init_stack(self, key: Array) -> Any:
        """Parameters of all blocks, leaves [depth, ...]."""
        h = jnp.zeros((1, 1, self.width), self.recipe.dtype)
        cos, sin = rotary_tables((1, 1, 1), self.head_dim)
        modulation = jnp.zeros((1, 6, self.width))
        c = {"modulation": modulation, "text": h, "cos": cos, "sin": sin}
        return self._blocks().init(key, h, c)

    def __call__(
        self, x: Float[Array, "batch frame height width channel"], t: Any, cond: Any
    ) -> Float[Array, "batch frame height width out_channel"]:
        """Velocity of x at time t.

        Args:
            x: videos [batch, frame, height, width, channel]; patch_size divides them.
            t: [batch] (or a scalar) in [0, 1]; 1 is noise, 0 is data.
            cond: float [batch, length, text_width], zero past the true length.

        Returns:
            float32 [batch, frame, height, width, out_channels].
        """
        h, c = self.embed(x, t, cond)
        h, _ = self.blocks(h, c)
        return self.output(h, c, x.shape[1:4])

    def velocity_and_features(
        self,
        x: Float[Array, "batch frame height width channel"],
        t: Any,
        cond: Any,
        taps: Sequence[int] = (),
        skip: Sequence[int] = (),
    ) -> tuple[Array, tuple[Array, ...]]:
        """The velocity, and outputs of some blocks as videos.

        Args:
            x: videos [batch, frame, height, width, channel]; patch_size divides them.
            t: [batch] (or a scalar) in [0, 1]; 1 is noise, 0 is data.
            cond: float [batch, length, text_width], zero past the true length.
            taps: layers whose output is wanted, static.
            skip: layers left out, static.

        Returns:
            The velocity, and for each of the taps in turn [batch, frame, height,
            width, width of the network / volume of a patch] in the compute dtype.

        Raises:
            ValueError: features that a patch's volume does not divide, and what
                :meth:`blocks` refuses (a tap that is no layer).
            TypeError: an index that is not a static integer.
        """
        volume = math.prod(self.patch_size)
        if taps and self.width % volume:
            raise ValueError(
                f"a network of width {self.width} cannot spread its features over "
                f"patches of {volume}; choose a width that {volume} divides."
            )
        h, c = self.embed(x, t, cond)
        h, tapped = self.blocks(h, c, taps=taps, skip=skip)
        size = x.shape[1:4]
        features = (unpatchify_video(tapped[i], self.patch_size, size) for i in taps)
        return self.output(h, c, size), tuple(features)

    def embed(
        self, x: Float[Array, "batch frame height width channel"], t: Any, cond: Any
    ) -> tuple[Array, dict[str, Array]]:
        """Hidden state and condition that the blocks run on.

        Args:
            x: videos [batch, frame, height, width, channel].
            t: [batch] or a scalar, in [0, 1].
            cond: float [batch, length, text_width], zero past the true length.

        Returns:
            h [batch, position, width] in the compute dtype, and c, a dict of
            'time' float32 [batch, width], 'modulation' float32 [batch, 6, width],
            'text' [batch, length, width] in the compute dtype, 'cos' and 'sin'
            float32 [position, head_dim / 2].

        Raises:
            ValueError: sizes that patch_size does not divide, or with more than
                rope_length patches along an axis; a (concrete) time outside [0, 1]
                or an array of integers for it; a condition of another batch or width.
        """
        h = self.embed_patches(x)
        batch, *size, _ = x.shape
        time, modulation = self.embed_time(expand_time(floating_time(t), batch))
        text = self.embed_text(cond)
        if text.shape[0] != batch:
            raise ValueError(
                f"cond has shape {cond.shape}; its leading axis must be the batch of "
                f"x, {batch}."
            )
        cos, sin = rotary_tables(self._grid(size), self.head_dim)
        c = cut_by_batch({"time": time, "modulation": modulation, "text": text})
        return h, c | {"cos": cos, "sin": sin}

    def embed_patches(
        self, x: Float[Array, "batch frame height width channel"]
    ) -> Float[Array, "batch position hidden"]:
        """Hidden state of a video: its patches through one dense layer.

        Raises:
            ValueError: sizes that patch_size does not divide, or with more than
                rope_length patches along an axis.
        """
        patches = patchify_video(x, self.patch_size)
        self._grid(x.shape[1:4])
        return self.patch_embedding(patches).astype(self.recipe.dtype)

    def embed_time(self, t: Any) -> tuple[Array, Array]:
        """Embedding of the time, and what modulates the blocks before their tables.

        Args:
            t: [batch] in [0, 1]; a scalar is a batch of one.

        Returns:
            float32 [batch, width], and float32 [batch, 6, width] in the order shift,
            scale, gate of the self-attention, shift, scale, gate of the MLP.

        Raises:
            ValueError: a (concrete) time outside [0, 1], or an array of integers.
        """
        shape = np.shape(floating_time(t))
        time = self.time_embedding(expand_time(t, shape[0] if shape else 1))
        modulation = self.time_projection(nn.silu(time))
        return time, modulation.reshape(-1, 6, self.width)

    def embed_text(self, cond: Any) -> Float[Array, "batch length hidden"]:
        """Text states in the width of the network.

        Args:
            cond: float [batch, length, text_width], zero past the true length.

        Raises:
            ValueError: another number of axes, width or kind of number.
        """
        shape = np.shape(cond)
        if (
            len(shape) != 3
            or shape[2] != self.text_width
            or not jnp.issubdtype(cond.dtype, jnp.floating)
        ):
            raise ValueError(
                f"cond is {getattr(cond, 'dtype', type(cond).__name__)}{list(shape)}; "
                f"give the states of the text encoder, floating numbers [batch, "
                f"length, text_width] = [batch, length, {self.text_width}], zero past "
                f"the true length."
            )
        return self.text_embedding(cond)

    def output(
        self,
        h: Float[Array, "batch position hidden"],
        c: Mapping[str, Any],
        size: Sequence[int],
    ) -> Float[Array, "batch frame height width out_channel"]:
        """Velocity from the last hidden state.

        Args:
            h: hidden state [batch, position, width].
            c: condition from :meth:`embed`; 'time' is read.
            size: (frames, height, width) of the video.

        Returns:
            float32 [batch, frame, height, width, out_channels].

        Raises:
            ValueError: the positions do not fill a video of that size.
        """
        volume = math.prod(self.patch_size)
        y = self.final(h, c["time"], volume * self.output_channels(volume))
        return unpatchify_video(y.astype(jnp.float32), self.patch_size, size)

    def _grid(self, size: Sequence[int]) -> Size:
        grid = patch_grid(size, self.patch_size)
        if max(grid) > self.rope_length:
            raise ValueError(
                f"a video of {' x '.join(map(str, size))} (frames x height x width) "
                f"has {max(grid)} patches along an axis, more than "
                f"rope_length={self.rope_length}."
            )
        return grid


def floating_time(t: Any, name: str = "t") -> Any:
    """Returns t; raises ValueError for an array of integers, traced ones too."""
    if hasattr(t, "dtype") and not jnp.issubdtype(t.dtype, jnp.floating):
        raise ValueError(
            f"{name} has dtype {t.dtype}; times are in [0, 1], 1 noise and 0 data, in "
            f"floating numbers. The network multiplies them by time_scale itself."
        )
    return t
