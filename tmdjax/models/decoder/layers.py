"""What a decoder language model is made of: pure functions of its parameters.

Training (:class:`tmdjax.models.Decoder`) and cached generation
(:mod:`tmdjax.models.decoder.cache`) share them. The parameters are::

    embedding                                    [vocab, hidden]
    blocks/attention_norm/scale                  [layer, hidden]
    blocks/attention/{query,key,value}/kernel    [layer, hidden, heads * head_dim]
    blocks/attention/{query,key,value}/bias      [layer, heads * head_dim], qkv_bias
    blocks/attention/{query_norm,key_norm}/scale [layer, head_dim], qk_norm
    blocks/attention/out/kernel                  [layer, heads * head_dim, hidden]
    blocks/attention/out/bias                    [layer, hidden], out_bias
    blocks/mlp_norm/scale                        [layer, hidden]
    blocks/mlp/{gate,up}/kernel                  [layer, hidden, intermediate]
    blocks/mlp/down/kernel                       [layer, intermediate, hidden]
    norm/scale                                   [hidden]
    head/kernel                                  [hidden, vocab], unless tied
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tmdjax.core.types import Array, Float, Int, Params
from tmdjax.models.decoder.config import DecoderConfig
from tmdjax.models.layers import check_ids, rms_norm, rows_of
from tmdjax.quant import Recipe, linear

Attend = Callable[[Array, Array, Array], Array]
"""``attend(q, k, v)``, arrays [batch, position, heads, head_dim], output like q."""


def rotations(
    config: DecoderConfig, positions: Int[Array, "batch position"]
) -> tuple[Array, Array]:
    """Cosines and sines of the rotary angles, position times frequency.

    Frequencies are θ^(-2i / head_dim), slowed down by ``config.rope_scaling``, whose
    scale both are multiplied by.

    Returns:
        Two float32 arrays [batch, position, 1, head_dim / 2].

    References:
        arXiv 2104.09864.
    """
    frequencies = jnp.asarray(config.rotary_frequencies(), jnp.float32)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    scale = 1.0 if config.rope_scaling is None else config.rope_scaling.scale
    return (cos, sin) if scale == 1 else (scale * cos, scale * sin)


def _rotate(x: Array, rotation: tuple[Array, Array]) -> Array:
    """Rotates the pairs (i, i + head_dim / 2), in float32."""
    cos, sin = rotation
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def _dense(params: Params, x: Array, recipe: Recipe) -> Array:
    y = linear(x, params["kernel"], recipe)
    if "bias" in params:  # added in float32, see models.Dense
        bias = params["bias"].astype(jnp.float32)
        y = (y.astype(jnp.float32) + bias).astype(y.dtype)
    return y


def _queries_keys_values(
    config: DecoderConfig, params: Params, x: Array
) -> tuple[Array, Array, Array]:
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if "qkv" in params:  # from decoder.cache.fuse_projections
        joined = _dense(params["qkv"], x, config.recipe)
        joined = joined.reshape(*x.shape[:-1], heads + 2 * kv_heads, config.head_dim)
        q, k, v = jnp.split(joined, (heads, heads + kv_heads), -2)
    else:
        q, k, v = (
            _dense(params[name], x, config.recipe).reshape(
                *x.shape[:-1], count, config.head_dim
            )
            for name, count in (
                ("query", heads),
                ("key", kv_heads),
                ("value", kv_heads),
            )
        )
    if config.qk_norm:
        q = rms_norm(q, params["query_norm"]["scale"], config.rms_norm_eps)
        k = rms_norm(k, params["key_norm"]["scale"], config.rms_norm_eps)
    return q, k, v


def _feed_forward(config: DecoderConfig, params: Params, x: Array) -> Array:
    if "gate_up" in params:  # from decoder.cache.fuse_projections
        gate, up = jnp.split(_dense(params["gate_up"], x, config.recipe), 2, -1)
    else:
        gate = _dense(params["gate"], x, config.recipe)
        up = _dense(params["up"], x, config.recipe)
    return _dense(params["down"], jax.nn.silu(gate) * up, config.recipe)


def run_block(
    config: DecoderConfig,
    params: Params,
    h: Float[Array, "batch position hidden"],
    rotation: tuple[Array, Array],
    attend: Attend,
) -> Float[Array, "batch position hidden"]:
    """One block: h += attention(norm(h)); h += mlp(norm(h)).

    Args:
        config: sizes.
        params: of one layer.
        h: hidden state, in the compute dtype.
        rotation: from :func:`rotations`.
        attend: takes rotated queries and keys, and values; it decides what each
            query sees, and where keys and values are kept.
    """
    x = rms_norm(h, params["attention_norm"]["scale"], config.rms_norm_eps)
    q, k, v = _queries_keys_values(config, params["attention"], x)
    y = attend(_rotate(q, rotation), _rotate(k, rotation), v)
    y = y.reshape(*h.shape[:-1], config.num_heads * config.head_dim)
    h = h + _dense(params["attention"]["out"], y, config.recipe)
    x = rms_norm(h, params["mlp_norm"]["scale"], config.rms_norm_eps)
    return h + _feed_forward(config, params["mlp"], x)


def embed_tokens(config: DecoderConfig, params: Params, tokens: Array) -> Array:
    """Token ids int [...] or embeddings [..., hidden] to [..., hidden].

    Raises:
        TypeError: neither integers nor floating numbers.
        ValueError: embeddings of another width, or a (concrete) id outside the
            vocabulary. A traced id outside it, negative too, gives NaN.
    """
    dtype = config.recipe.dtype
    if jnp.issubdtype(tokens.dtype, jnp.floating):
        if tokens.shape[-1] != config.hidden_size:
            raise ValueError(
                f"embeddings have shape {tokens.shape}; their last axis must be "
                f"hidden_size={config.hidden_size}."
            )
        return tokens.astype(dtype)
    check_ids(
        "tokens (ids, or embeddings of a floating dtype)", tokens, config.vocab_size
    )
    return rows_of(params["embedding"], tokens).astype(dtype)


def output_logits(
    config: DecoderConfig, params: Params, h: Float[Array, "*batch hidden"]
) -> Float[Array, "*batch vocab"]:
    """Final norm and head: float32 logits [..., vocab], -inf from num_tokens on."""
    x = rms_norm(h, params["norm"]["scale"], config.rms_norm_eps)
    kernel = (
        params["embedding"].T if config.tied_embedding else params["head"]["kernel"]
    )
    logits = linear(x, kernel, config.output_recipe).astype(jnp.float32)
    if config.num_tokens is None or config.num_tokens == config.vocab_size:
        return logits
    return jnp.where(
        jnp.arange(config.vocab_size) < config.num_tokens, logits, -jnp.inf
    )


def init_blocks(config: DecoderConfig, key: Array) -> dict[str, Any]:
    """Draws the stacked parameters of all blocks, float32.

    Kernels have a standard deviation of 0.02, the two that add to the hidden state
    0.02 / √(2 num_layers); biases are 0, scales 1.

    References:
        The initialisation of GPT-2.
    """
    layers, hidden, dim = config.num_layers, config.hidden_size, config.head_dim
    widths = dict(
        query=config.num_heads * dim,
        key=config.num_kv_heads * dim,
        value=config.num_kv_heads * dim,
    )
    keys = iter(jax.random.split(key, 7))
    residual = 0.02 / (2 * layers) ** 0.5

    def dense(inputs: int, outputs: int, std: float = 0.02) -> dict[str, Array]:
        shape = (layers, inputs, outputs)
        return {"kernel": std * jax.random.normal(next(keys), shape)}

    def scale(size: int) -> dict[str, Array]:
        return {"scale": jnp.ones((layers, size))}

    heads = {name: dense(hidden, width) for name, width in widths.items()}
    if config.qkv_bias:
        for name, width in widths.items():
            heads[name]["bias"] = jnp.zeros((layers, width))
    if config.qk_norm:
        heads |= {"query_norm": scale(dim), "key_norm": scale(dim)}
    inner = config.intermediate_size
    out = dense(widths["query"], hidden, residual)
    if config.out_bias:
        out["bias"] = jnp.zeros((layers, hidden))
    return {
        "attention_norm": scale(hidden),
        "attention": heads | {"out": out},
        "mlp_norm": scale(hidden),
        "mlp": {
            "gate": dense(hidden, inner),
            "up": dense(hidden, inner),
            "down": dense(inner, hidden, residual),
        },
    }


def default_positions(
    shape: tuple[int, ...], segments: Int[Array, "batch position"] | None = None
) -> Int[Array, "batch position"]:
    """Positions counted from 0 in each run of one segment; int32."""
    index = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
    if segments is None:
        return index
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts = jnp.where(segments != before, index, 0)
    return index - jax.lax.cummax(starts, axis=1)


def segment_mask(segments: Int[Array, "batch position"]) -> Array:
    """Who sees whom: earlier positions of the same segment, and itself.

    Returns:
        bool [batch, 1, query, key]. Padding (segment 0) sees itself alone, so that no
        row is empty.
    """
    length = segments.shape[1]
    same = (segments[:, :, None] == segments[:, None, :]) & (segments != 0)[:, :, None]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return ((same & causal) | jnp.eye(length, dtype=bool))[:, None]
