"""Where the forward pass of a decoder stops being finite."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from tmdjax.core.trees import flatten
from tmdjax.core.types import Array, Params
from tmdjax.models.decoder.config import DecoderConfig
from tmdjax.models.decoder.layers import default_positions
from tmdjax.models.decoder.network import Decoder


def first_non_finite(
    config: DecoderConfig,
    params: Params,
    tokens: Array,
    positions: Any = None,
    segments: Any = None,
) -> str | None:
    """The first parameter or layer that is not finite, for a run whose log-probs are.

    Args:
        config: of the decoder, with the recipe under which it happened.
        params: of the decoder.
        tokens: int32 [batch, position] ids of texts that it happened with.
        positions: int32 [batch, position], or None; see :class:`tmdjax.models.Decoder`.
        segments: the same, or None; padding, 0, is not looked at.

    Returns:
        The path of the first parameter, in the order of the tree, with a NaN or an
        infinity, such as 'blocks/mlp/down/kernel'. If all are finite, the first result
        with one: of 'embedding', of the block 'blocks/3', or of the head, 'logits'.
        None if there is none.
    """
    for path, leaf in flatten(params).items():
        if not jnp.isfinite(jnp.asarray(leaf).astype(jnp.float32)).all():
            return path
    finite = _all_finite(config, params, tokens, positions, segments)
    blocks = (f"blocks/{layer}" for layer in range(config.num_layers))
    names = ("embedding", *blocks, "logits")
    return next((name for name, yes in zip(names, finite) if not yes), None)


@functools.partial(jax.jit, static_argnums=0)
def _all_finite(
    config: DecoderConfig, params: Params, tokens: Array, positions: Any, segments: Any
) -> list[Array]:
    layers = range(config.num_layers)

    def walk(network: Decoder) -> list[Array]:
        h = network.embed(tokens)
        at = positions
        if at is None:
            at = default_positions(h.shape[:2], segments)
        end, seen = network.blocks(h, at, segments, taps=tuple(layers))
        logits = network.output(end)[..., : config.num_tokens]  # others are -inf
        return [h, *(seen[layer] for layer in layers), logits]

    found: Any = Decoder(config).apply({"params": params}, method=walk)
    read = True if segments is None else segments != 0
    return [jnp.all(jnp.isfinite(x).all(-1) | ~jnp.asarray(read)) for x in found]
