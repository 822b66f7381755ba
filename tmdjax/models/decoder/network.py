"""Decoder language model: Qwen2, Qwen2.5, Qwen3, Mistral and Llama-type (SmolLM2)."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from tmdjax.core.types import Array, Float, Int
from tmdjax.models.attention import attention
from tmdjax.models.decoder.config import DecoderConfig
from tmdjax.models.decoder.layers import (
    default_positions,
    embed_tokens,
    init_blocks,
    output_logits,
    rotations,
    run_block,
    segment_mask,
)
from tmdjax.models.stack import run_stack

_NORMAL = nn.initializers.normal(0.02)


class Decoder(nn.Module):
    """Language model ``(tokens, positions, segments) -> logits``, causal.

    Block parameters are stacked on a leading layer axis and run by one ``lax.scan``
    (:mod:`tmdjax.models.decoder.layers` shows the tree). Generation with a cache reads
    the same parameters: :func:`tmdjax.models.prefill`, :func:`tmdjax.models.decode`.

    ``segments`` int32 [batch, position] say what belongs together: a position sees
    earlier ones of its own segment alone, 0 is padding. So several texts may be
    packed into a row, and padding may stand anywhere. Without segments a row is one
    text; padding at its end needs none, as no earlier position sees it. The
    ``attention_mask`` of a batch that other code padded on the left is its segments:
    positions then count from the first token, as that code's do.

    Attributes:
        config: a :class:`DecoderConfig`, or its attributes as a mapping.

    References:
        arXiv 2407.10671 (Qwen2), 2505.09388 (Qwen3), 2502.02737 (SmolLM2).
    """

    config: Any

    def __post_init__(self):
        if isinstance(self.config, Mapping):
            self.config = DecoderConfig(**self.config)
        if not isinstance(self.config, DecoderConfig):
            raise TypeError(
                f"config is of type {type(self.config).__name__}; give a "
                f"DecoderConfig, or a mapping with its attributes."
            )
        super().__post_init__()

    def setup(self):
        """Declares the parameters."""
        c = self.config
        ones = nn.initializers.ones
        self.embedding = self.param(
            "embedding", _NORMAL, (c.vocab_size, c.hidden_size), jnp.float32
        )
        self.stack = self.param("blocks", lambda key: init_blocks(c, key))
        self.norm = self.param(
            "norm", lambda key: {"scale": ones(key, (c.hidden_size,))}
        )
        if not c.tied_embedding:
            shape = (c.hidden_size, c.vocab_size)
            self.head = self.param("head", lambda key: {"kernel": _NORMAL(key, shape)})

    @property
    def _params(self) -> dict[str, Any]:
        params = {"embedding": self.embedding, "norm": self.norm}
        return params if self.config.tied_embedding else params | {"head": self.head}

    def __call__(
        self, tokens: Array, positions: Any = None, segments: Any = None
    ) -> Float[Array, "batch position vocab"]:
        """Logits of the token that follows each position.

        Args:
            tokens: int32 [batch, position] ids, or embeddings of any floating dtype
                [batch, position, hidden].
            positions: int32 [batch, position], where each token stands in its text;
                None counts from 0 in each segment.
            segments: int32 [batch, position], equal within a text and 0 at padding;
                None is one text a row.

        Returns:
            float32 [batch, position, vocab]; of padding they mean nothing.

        Raises:
            TypeError: tokens of another dtype.
            ValueError: shapes that disagree, a (concrete) id outside the
                vocabulary.
        """
        return self.output(self.hidden(tokens, positions, segments))

    def hidden(
        self, tokens: Array, positions: Any = None, segments: Any = None
    ) -> Float[Array, "batch position hidden"]:
        """The last hidden state, of which :meth:`output` makes logits.

        It has not been through the final norm. Arguments are those of a call.
        """
        h = self.embed(tokens)
        _check_shapes(h, positions=positions, segments=segments)
        if positions is None:
            positions = default_positions(h.shape[:2], segments)
        return self.blocks(h, positions, segments)[0]

    def embed(self, tokens: Array) -> Float[Array, "batch position hidden"]:
        """Hidden state that the blocks run on, see :func:`embed_tokens`."""
        ndim = 3 if jnp.issubdtype(tokens.dtype, jnp.floating) else 2
        if tokens.ndim != ndim:
            raise ValueError(
                f"tokens have shape {tokens.shape}; give ids [batch, position] or "
                f"embeddings [batch, position, hidden]."
            )
        return embed_tokens(self.config, self._params, tokens)

    def blocks(
        self,
        h: Float[Array, "batch position hidden"],
        positions: Int[Array, "batch position"],
        segments: Any = None,
        start: int = 0,
        stop: int | None = None,
        taps: Sequence[int] = (),
        skip: Sequence[int] = (),
    ) -> tuple[Array, dict[int, Array]]:
        """Runs the blocks ``start .. stop - 1``, see :func:`.stack.run_stack`.

        Args:
            h: hidden state [batch, position, hidden].
            positions: int32 [batch, position].
            segments: int32 [batch, position] or None.
            start: first layer, static.
            stop: one past the last layer, static; None means all.
            taps: layers whose output is returned, static.
            skip: layers left out, static.

        Returns:
            h after the last layer, and ``{layer: output of that layer}`` for taps.

        Raises:
            ValueError: shapes that disagree, an index out of range, or a layer both
                tapped and skipped.
            TypeError: an index that is not a static integer.
        """
        config = self.config
        _check_shapes(h, positions=positions, segments=segments)
        rotation = rotations(config, positions)
        mask = None if segments is None else segment_mask(segments)
        shared, each = config.windows(h.shape[1])

        def block(layer: Any, h: Array) -> Array:
            params, own = layer
            window = shared if own is None else own

            def attend(q: Array, k: Array, v: Array) -> Array:
                return attention(
                    q,
                    k,
                    v,
                    mask=mask,
                    causal=mask is None or window is not None,
                    window=window,
                    implementation=config.attention_implementation,
                )

            return run_block(config, params, h, rotation, attend)

        return run_stack(
            block,
            (self.stack, each),
            h,
            depth=config.num_layers,
            start=start,
            stop=stop,
            taps=taps,
            skip=skip,
            remat=config.remat,
        )

    def output(self, h: Float[Array, "*batch hidden"]) -> Float[Array, "*batch vocab"]:
        """Float32 logits of the last hidden state: final norm and head."""
        return output_logits(self.config, self._params, h)


def _check_shapes(h: Array, **arrays: Any) -> None:
    for name, array in arrays.items():
        if array is not None and array.shape != h.shape[:2]:
            raise ValueError(
                f"{name} have shape {array.shape}; give one a position, {h.shape[:2]}."
            )
