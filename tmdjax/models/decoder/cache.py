"""Generation with a cache of keys and values, on the parameters of a Decoder.

A cache is ``{'k', 'v'}``, each [layer, slot, position, kv_head, head_dim]. What
:func:`prefill` returns has the same axes with the batch in place of the slots, so an
engine copies a row of it into a slot with one ``lax.dynamic_update_slice`` each.

Positions count from 0 in every slot. What stands in a slot beyond the position that
is decoded is never read, so neither padding of a prompt nor an earlier text needs
clearing; it must be finite.
"""

from collections.abc import Mapping
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp

from tmdjax.core.checks import check_count
from tmdjax.core.trees import nbytes
from tmdjax.core.types import Array, Float, Int, Params
from tmdjax.models.attention import attention
from tmdjax.models.decoder.config import DecoderConfig
from tmdjax.models.decoder.layers import (
    default_positions,
    embed_tokens,
    output_logits,
    rotations,
    run_block,
)
from tmdjax.models.stack import layer_of
from tmdjax.quant import quantised_values

Cache = dict[str, Array]


def init_cache(
    config: DecoderConfig,
    slots: SupportsIndex,
    length: SupportsIndex,
    dtype: Any = None,
) -> Cache:
    """An empty cache.

    Args:
        config: of the decoder.
        slots: texts generated at a time.
        length: longest text, prompt and response together.
        dtype: None means the dtype the recipe computes in.

    Returns:
        ``{'k', 'v'}``, zeros [layer, slot, position, kv_head, head_dim].

    Raises:
        TypeError: slots or length is not an integer.
        ValueError: one of them is below 1.
    """
    shape = (
        config.num_layers,
        check_count("slots", slots),
        check_count("length", length),
        config.num_kv_heads,
        config.head_dim,
    )
    dtype = config.recipe.dtype if dtype is None else dtype
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)}


def cache_bytes(
    config: DecoderConfig,
    slots: SupportsIndex,
    length: SupportsIndex,
    dtype: Any = None,
) -> int:
    """Bytes of :func:`init_cache`, of which nothing is allocated."""
    return nbytes(jax.eval_shape(lambda: init_cache(config, slots, length, dtype)))


def prefill(
    config: DecoderConfig,
    params: Params,
    tokens: Array,
    lengths: Int[Array, "batch"],
    dtype: Any = None,
) -> tuple[Float[Array, "batch vocab"], Cache]:
    """Runs prompts and keeps their keys and values.

    Args:
        config: of the decoder.
        params: of the decoder, or from :func:`fuse_projections`.
        tokens: int32 [batch, length] ids, or embeddings [batch, length, hidden];
            prompts start at position 0 and are padded at their end, with any id.
        lengths: int32 [batch], in 1..length.
        dtype: of the keys and values; None means the dtype the recipe computes in.

    Returns:
        Float32 logits [batch, vocab] of the token that follows each prompt, and
        ``{'k', 'v'}`` [layer, batch, length, kv_head, head_dim].

    Raises:
        TypeError: tokens that are neither ids nor embeddings.
        ValueError: shapes that disagree, a (concrete) id outside the vocabulary.
    """
    h = embed_tokens(config, params, tokens)
    if h.ndim != 3 or lengths.shape != h.shape[:1]:
        raise ValueError(
            f"tokens have shape {tokens.shape} and lengths {lengths.shape}; give ids "
            f"[batch, length] or embeddings [batch, length, hidden], and one length "
            f"a row."
        )
    dtype = config.recipe.dtype if dtype is None else dtype
    rotation = rotations(config, default_positions(h.shape[:2]))
    shared, each = config.windows(h.shape[1])

    def body(h: Array, inputs: Any) -> tuple[Array, Cache]:
        layer, own = inputs
        kept: Cache = {}

        def attend(q: Array, k: Array, v: Array) -> Array:
            kept.update(k=k.astype(dtype), v=v.astype(dtype))
            return attention(
                q,
                k,
                v,
                causal=True,
                window=shared if own is None else own,
                implementation=config.attention_implementation,
            )

        return run_block(config, layer, h, rotation, attend), kept

    h, cache = jax.lax.scan(body, h, (params["blocks"], each))
    last = jnp.take_along_axis(h, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return output_logits(config, params, last), cache


def decode(
    config: DecoderConfig,
    params: Params,
    cache: Cache,
    tokens: Array,
    positions: Int[Array, "slot"],
) -> tuple[Float[Array, "slot vocab"], Cache]:
    """One token in every slot: writes its key and value, and looks at those before it.

    A layer with a window looks at that of them; the cache keeps all.

    The cache is carried through the scan over layers and updated in place: donate it
    (``jax.jit(..., donate_argnums=...)``) or carry it in an outer scan, and no copy
    of it is made.

    Args:
        config: of the decoder.
        params: of the decoder, or from :func:`fuse_projections`.
        cache: ``{'k', 'v'}`` [layer, slot, position, kv_head, head_dim].
        tokens: int32 [slot] ids, or embeddings [slot, hidden]. An idle slot needs an
            id of the vocabulary too.
        positions: int32 [slot], where each token stands, in 0..length - 1. A slot at
            another position writes nothing and its logits mean nothing: so an idle
            one is left as it is.

    Returns:
        Float32 logits [slot, vocab] of the next token, and the cache.

    Raises:
        TypeError: tokens that are neither ids nor embeddings.
        ValueError: shapes that disagree, a (concrete) id outside the vocabulary.
    """
    h = embed_tokens(config, params, tokens)
    slots, length = cache["k"].shape[1:3]
    if h.shape[:-1] != (slots,) or positions.shape != (slots,):
        raise ValueError(
            f"tokens have shape {tokens.shape} and positions {positions.shape}; the "
            f"cache has {slots} slots: give one of each a slot."
        )
    h = h[:, None]
    rotation = rotations(config, positions[:, None])
    slot = jnp.arange(slots)
    seen = jnp.clip(positions + 1, 1, length)
    shared, each = config.windows(length)

    def body(carry: tuple[Array, Cache], inputs: Any) -> tuple[Any, None]:
        h, cache = carry
        index, layer, own = inputs
        window = shared if own is None else own
        written: Cache = {}

        def attend(q: Array, k: Array, v: Array) -> Array:
            for name, new in (("k", k), ("v", v)):
                at = cache[name].at[index, slot, positions]
                new = new[:, 0].astype(cache[name].dtype)
                written[name] = at.set(
                    new, mode="drop", unique_indices=True, wrap_negative_indices=False
                )
            k, v = (layer_of(written[name], index).astype(q.dtype) for name in "kv")
            near = None
            if window is not None:
                near = jnp.arange(length) >= seen[:, None] - window
            return attention(
                q,
                k,
                v,
                mask=near,
                key_lengths=seen,
                implementation=config.attention_implementation,
            )

        h = run_block(config, layer, h, rotation, attend)
        return (h, written), None

    layers = jnp.arange(config.num_layers)
    inputs = layers, params["blocks"], each
    (h, cache), _ = jax.lax.scan(body, (h, dict(cache)), inputs)
    return output_logits(config, params, h[:, 0]), cache


def fuse_projections(params: Params) -> dict[str, Any]:
    """Parameters for generation: fewer, wider products.

    Query, key and value become one product, gate and up another: two in place of
    five a layer, of the same numbers (but under recipes whose scales span the joined
    axis, see :func:`tmdjax.quant.fp8_recipe`). :func:`prefill` and :func:`decode` take
    the result like the original; the module does not. Fuse after adapters are merged
    and before weights are prepared (:func:`prepare_weights`).

    Args:
        params: of a Decoder.

    Returns:
        The tree with ``attention/qkv`` in place of query, key and value, and
        ``mlp/gate_up`` in place of gate and up.

    Raises:
        ValueError: weights that are quantised already.
    """
    blocks = params["blocks"]
    if quantised_values(blocks):
        raise ValueError(
            "the weights are quantised, and joined ones would have other scales; give "
            "fuse_projections the weights as they are trained, and prepare_weights "
            "what it returns."
        )

    def joined(parts: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
        return {
            leaf: jnp.concatenate([parts[name][leaf] for name in names], -1)
            for leaf in parts[names[0]]
        }

    def replaced(part: str, name: str, names: tuple[str, ...]) -> dict[str, Any]:
        rest = {key: value for key, value in blocks[part].items() if key not in names}
        return rest | {name: joined(blocks[part], names)}

    return dict(params) | {
        "blocks": dict(blocks)
        | {
            "attention": replaced("attention", "qkv", ("query", "key", "value")),
            "mlp": replaced("mlp", "gate_up", ("gate", "up")),
        }
    }


def prepare_weights(params: Params, config: DecoderConfig) -> dict[str, Any]:
    """Weights as the recipes of a decoder read them, made once for many tokens.

    No result changes by a bit. Under 'bf16' a token then reads half as many bytes.

    Args:
        params: of a Decoder, or from :func:`fuse_projections`.
        config: of the decoder.

    Returns:
        The tree with prepared kernels, for :func:`prefill` and :func:`decode`.
    """
    head = config.output_recipe

    def prepared(path: Any, leaf: Array) -> Any:
        *parents, name = (entry.key for entry in path)
        if name == "kernel":
            return (head if parents == ["head"] else config.recipe).prepare(leaf)
        if name == "embedding":  # rows are looked up in it, and a tied head multiplies
            return leaf.astype(jnp.promote_types(config.recipe.dtype, head.dtype))
        return leaf

    return jax.tree_util.tree_map_with_path(
        prepared, params, is_leaf=lambda leaf: hasattr(leaf, "shape")
    )
