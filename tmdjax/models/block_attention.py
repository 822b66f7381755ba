"""Attention in blocks of queries and keys: no more than a tile of scores exists.

The softmax is gathered up over the blocks of keys (online), and derivatives make the
scores anew, so memory is linear in the length both ways. The one rule given is that of
forward mode; reverse mode is its transpose, with the five products of a fused kernel.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from tmdjax.core.types import Array

BLOCK = 512
"""Most queries and keys of a tile."""

TILE = "tile_of_attention"
"""The name of a tile's products in a trace; a fused kernel moves no scores."""

# as under 'xla', where a query that may look nowhere sees the mean of all values
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def block_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None = None,
    key_lengths: Array | None = None,
    causal: bool = False,
    window: Any = None,
    block: int = BLOCK,
) -> Array:
    """Of the shape and dtype of q; softmax and sums in float32.

    Args:
        q: queries [batch, query, heads, head_dim].
        k: keys [batch, key, key_heads, head_dim].
        v: values, like k.
        mask: bool [batch, heads, query, key]; all axes but the last may be 1.
        key_lengths: [batch], how many keys of a row are looked at.
        causal: position i looks at positions <= i only.
        window: position i looks at positions > i - window only; an integer, which may
            be traced.
        block: most queries and keys of a tile.

    References:
        Online softmax: arXiv 1805.02867; in blocks: arXiv 2112.05682, 2205.14135.
    """
    batch, queries, heads, width = q.shape
    keys, key_heads = k.shape[1:3]
    groups = heads // key_heads
    rows, columns = _even(queries, block), _even(keys, block)
    if mask is not None:
        grouped = (key_heads, groups) if mask.shape[1] > 1 else (1, 1)
        mask = mask.reshape(mask.shape[0], *grouped, *mask.shape[2:])
        if mask.shape[3] > 1:
            mask = _blocks(mask, 3, rows)
        mask = _blocks(mask, mask.ndim - 1, columns)
    out, _, _ = _attend(
        causal,
        keys,
        _blocks(q.reshape(batch, queries, key_heads, groups, width), 1, rows),
        _blocks(k, 1, columns),
        _blocks(v, 1, columns),
        mask,
        key_lengths,
        window,
    )
    out = jnp.moveaxis(out, 0, 1).reshape(batch, -1, heads, width)
    return out[:, :queries]


def _even(length: int, block: int) -> int:
    """The size of the fewest blocks of one size."""
    return math.ceil(length / math.ceil(length / block))


def _blocks(x: Array, axis: int, size: int) -> Array:
    """Cuts an axis, padded to a multiple, into blocks; their number comes first."""
    count = math.ceil(x.shape[axis] / size)
    room = [(0, 0)] * x.ndim
    room[axis] = (0, count * size - x.shape[axis])
    x = jnp.pad(x, room)
    return jnp.moveaxis(
        x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :]), axis, 0
    )


def _product(spec: str, a: Array, b: Array, dtype: Any) -> Array:
    """In float32, of operands of the dtype; so are the products of its transpose."""
    precision: Any = None
    if dtype == jnp.float32:
        precision = jax.lax.Precision.HIGHEST
    elif dtype == jnp.bfloat16:
        precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32
    with jax.named_scope(TILE):
        return jnp.einsum(
            spec,
            a.astype(dtype),
            b.astype(dtype),
            precision=precision,
            preferred_element_type=jnp.float32,
        )


def _scores(q: Array, k: Array, dtype: Any) -> Array:
    """[batch, key head, group, query, key] of a tile."""
    found = _product("brkgd,bckd->bkgrc", q, k, dtype)
    return found / math.sqrt(q.shape[-1])


def _weighted(weights: Array, v: Array, dtype: Any) -> Array:
    """[batch, query, key head, group, width] of a tile."""
    return _product("bkgrc,bckd->brkgd", weights, v, dtype)


def _last(x: Array) -> Array:
    """[batch, key head, group, query] as a factor of what _weighted makes."""
    return jnp.moveaxis(x, 3, 1)[..., None]


def _tile_scores(
    causal: bool,
    keys: int,
    q: Array,
    k: Array,
    row: Array,
    column: Array,
    part: Array | None,
    lengths: Array | None,
    window: Any,
) -> tuple[Array, Array]:
    """Masked scores of a tile, and which of them are not masked."""
    at = column * k.shape[1] + jnp.arange(k.shape[1])
    allowed = there = at < keys
    if lengths is not None:
        allowed = allowed & (at < lengths[:, None, None, None, None])
    here = (row * q.shape[1] + jnp.arange(q.shape[1]))[:, None]
    if causal:
        allowed = allowed & (at <= here)
    if window is not None:
        allowed = allowed & (at > here - window)
    if part is not None:
        part = part if part.ndim == 5 else part[row]
        allowed = allowed & part
    scores = jnp.where(allowed, _scores(q, k, q.dtype), _MASKED)
    return jnp.where(there, scores, -jnp.inf), allowed


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _attend(
    causal: bool,
    keys: int,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    lengths: Array | None,
    window: Any,
) -> tuple[Array, Array, Array]:
    """Blocks of outputs, and of largest scores and sums of exponentials in float32."""

    def rows_of(block: Any) -> Any:
        row, q = block

        def step(carry: Any, tile: Any) -> Any:
            out, most, total = carry
            column, k, v, part = tile
            where = row, column, part, lengths, window
            scores, _ = _tile_scores(causal, keys, q, k, *where)
            larger = jnp.maximum(most, scores.max(-1))
            shrink = jnp.exp(most - larger)
            weights = jnp.exp(scores - larger[..., None])
            total = total * shrink + weights.sum(-1)
            out = out * _last(shrink) + _weighted(weights, v, v.dtype)
            return (out, larger, total), None

        sums = jnp.zeros((q.shape[0], *q.shape[2:4], q.shape[1]))
        start = jnp.zeros(q.shape), jnp.full_like(sums, -jnp.inf), sums
        (out, most, total), _ = jax.lax.scan(
            step, start, (jnp.arange(len(k)), k, v, mask)
        )
        return (out / _last(total)).astype(q.dtype), most, total

    return jax.lax.map(rows_of, (jnp.arange(len(q)), q))


@_attend.defjvp
def _(causal: bool, keys: int, primals: Any, tangents: Any) -> Any:
    q, k, v, mask, lengths, window = primals
    # in float32, so that their transposes gather up gradients in it
    dq, dk, dv = [d.astype(jnp.float32) for d in tangents[:3]]
    dtype = q.dtype
    found = out, most, total = _attend(causal, keys, *primals)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def rows_of(block: Any) -> Any:
        row, q, dq, out, most, total = block

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def step(carry: Any, tile: Any) -> Any:
            column, k, dk, v, dv, part = tile
            where = row, column, part, lengths, window
            scores, seen = _tile_scores(causal, keys, q, k, *where)
            weights = jnp.exp(scores - most[..., None]) / total[..., None]
            rise = _scores(dq, k, dtype) + _scores(q, dk, dtype)
            moved = weights * jnp.where(seen, rise, 0.0)
            gain = _weighted(moved, v, dtype) + _weighted(weights, dv, dtype)
            return (carry[0] + gain, carry[1] + moved.sum(-1)), None

        start = jnp.zeros(out.shape), jnp.zeros_like(total)
        (gain, rise), _ = jax.lax.scan(
            step, start, (jnp.arange(len(k)), k, dk, v, dv, mask)
        )
        # outputs do not hang on the largest score, so it may stay where it is
        gain = (gain - out * _last(rise)).astype(dtype)
        return gain, jnp.zeros_like(most), total * rise

    moved = jax.lax.map(rows_of, (jnp.arange(len(q)), q, dq, out, most, total))
    return found, tuple(moved)
