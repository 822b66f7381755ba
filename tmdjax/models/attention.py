"""Scaled dot-product attention, the one function every network calls."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.experimental import xla_metadata

from tmdjax.core.checks import check_choice, check_count
from tmdjax.core.types import Array, Bool, Float, Int
from tmdjax.models.block_attention import BLOCK, block_attention

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "blocks")

PLANNED_BLOCK = 64
"""Queries and keys of a tile in plans: as small as those of fused kernels."""

_PLANNED = contextvars.ContextVar("fused attention is planned", default=False)


@contextlib.contextmanager
def fused_attention_planned() -> Iterator[None]:
    """What is traced inside is planned for a device with fused attention.

    Where 'auto' would be 'cudnn' there, 'blocks' stands for it, which any device can
    run. Such traces are cached apart from others.
    """
    token = _PLANNED.set(True)
    try:
        with xla_metadata.set_xla_metadata(planned="fused_attention"):
            yield
    finally:
        _PLANNED.reset(token)


def select_implementation(q: Any, k: Any, *, masked: bool, device: Any = None) -> str:
    """What 'auto' stands for: 'cudnn' where it can run, else 'xla'.

    Float16 on a CPU, which 'xla' cannot do there, is 'blocks'; and under
    :func:`fused_attention_planned` that takes the place of 'cudnn'.

    Args:
        q: queries [batch, position, heads, head_dim], an array or shape struct.
        k: keys [batch, position, heads, head_dim].
        masked: whether a mask is given; cuDNN takes it as a bias. Its gradient needs
            even sequence lengths, with a bias or without; a single query is decoding,
            which has none.
        device: a ``jax.Device``; None means the one that jax puts arrays on,
            ``jax.config.jax_default_device`` where that is set, or the one that is
            planned for.

    Returns:
        'cudnn', 'xla' or 'blocks'.
    """
    head_dim, single = q.shape[-1], q.shape[1] == 1 and not masked
    planned = device is None and _PLANNED.get()
    fused = planned
    if not planned:
        fused = _has_fused_attention(_default_device() if device is None else device)
    fits = (
        fused
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and head_dim <= 128
        and head_dim % 8 == 0
        and (single or not (q.shape[1] % 2 or k.shape[1] % 2))
    )
    if not fits:
        place = (_default_device() if device is None else device).platform
        # on a CPU, XLA has no product of float16 with a float32 sum
        return "blocks" if q.dtype == jnp.float16 and place == "cpu" else "xla"
    return "blocks" if planned else "cudnn"


def _default_device() -> Any:
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(device, str):
        return jax.devices(device)[0]
    return jax.devices()[0] if device is None else device


def _has_fused_attention(device: Any) -> bool:
    """CUDA of compute capability 8.0 or more (ROCm names one like 'gfx90a')."""
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    return device.platform == "gpu" and major.isdecimal() and int(major) >= 8


def attention(
    q: Float[Array, "batch query heads head_dim"],
    k: Float[Array, "batch key key_heads head_dim"],
    v: Float[Array, "batch key key_heads head_dim"],
    *,
    mask: Bool[Array, "..."] | None = None,
    key_lengths: Int[Array, "batch"] | None = None,
    causal: bool = False,
    window: Any = None,
    implementation: str = "auto",
) -> Float[Array, "batch query heads head_dim"]:
    """softmax(q kᵀ / √head_dim) v, with the softmax in float32.

    Float32 inputs are multiplied in full float32 on every backend (no TF32).

    Args:
        q: queries [batch, position, heads, head_dim], any floating dtype.
        k: keys [batch, position, key_heads, head_dim] of the same dtype. Fewer
            heads than q (grouped queries) are allowed where they divide: query
            head n then reads key head n // (heads // key_heads).
        v: values, of the shape and dtype of k.
        mask: bool, True where a query may look: [batch, key] for padding, or
            [batch, heads, query, key] with axes of length 1 broadcast. Every query
            needs one True: without, its output is the mean of all values
            under 'xla' and 'blocks', and undefined under 'cudnn'.
        key_lengths: int32 [batch], at least 1: only keys 0 .. length - 1 of a row
            are looked at. The same as a mask of [batch, key], but cuDNN takes it
            without a bias, so single queries and odd lengths run forward there.
        causal: position i looks at positions <= i only.
        window: with ``causal``, position i looks at itself and the window - 1
            positions before it, as a sliding window of transformers; an integer of at
            least 1, or a traced int32 scalar, which cuDNN takes as a bias like a mask.
        implementation: 'auto', 'xla', 'cudnn' (CUDA of compute capability 8.0
            or more, 16-bit) or 'blocks', which runs everywhere with memory linear in
            the length, in reverse and forward mode; 'auto' is
            :func:`select_implementation`.

    Returns:
        [batch, position, heads, head_dim] in the dtype of q.

    Raises:
        TypeError: a window that is no integer.
        ValueError: unknown implementation; shapes, dtypes or mask that disagree;
            causal attention between sequences of unequal length; a window below 1, or
            one without ``causal``.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    _check_inputs(q, k, v, causal)
    if key_lengths is not None and key_lengths.shape != q.shape[:1]:
        raise ValueError(
            f"key_lengths has shape {key_lengths.shape}; give one a row, "
            f"({q.shape[0]},)."
        )
    if mask is not None:
        mask = _expand_mask(mask, q, k)
    if window is not None:
        window = _check_window(window, causal)
    masked = mask is not None or isinstance(window, jax.core.Tracer)
    if implementation == "auto":
        implementation = select_implementation(q, k, masked=masked)
    if implementation == "blocks":
        return block_attention(
            q,
            k,
            v,
            mask=mask,
            key_lengths=key_lengths,
            causal=causal,
            window=window,
            block=PLANNED_BLOCK if _PLANNED.get() else BLOCK,
        )
    local: Any = None  # the window of a fused kernel
    if window is not None and implementation == "cudnn" and not masked:
        local = (window - 1, 0)
    elif window is not None:
        at = jnp.arange(k.shape[1])
        near = (at > at[:, None] - window)[None, None]
        mask = near if mask is None else near & mask
    if implementation == "cudnn" and mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], q.shape[1], k.shape[1]))
    exact = q.dtype == jnp.float32
    with jax.default_matmul_precision("highest") if exact else contextlib.nullcontext():
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=mask,
            key_value_seq_lengths=(
                None if key_lengths is None else key_lengths.astype(jnp.int32)
            ),
            is_causal=causal,
            local_window_size=local,
            implementation="cudnn" if implementation == "cudnn" else "xla",
        )


def _check_inputs(q: Array, k: Array, v: Array, causal: bool) -> None:
    for name, array in (("q", q), ("k", k), ("v", v)):
        if array.ndim != 4:
            raise ValueError(
                f"{name} has shape {array.shape}; give [batch, position, heads, "
                f"head_dim]."
            )
    if k.shape != v.shape:
        raise ValueError(f"k has shape {k.shape} but v has shape {v.shape}.")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q has shape {q.shape} and k {k.shape}; batch and head_dim must agree."
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} heads and k has {k.shape[2]}; the heads of k must "
            f"divide those of q."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k and v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; cast them to one."
        )
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"causal attention needs as many queries as keys, got {q.shape[1]} and "
            f"{k.shape[1]}; pass a mask that says which position each query has."
        )


def _check_window(window: Any, causal: bool) -> Any:
    if not causal:
        raise ValueError(
            f"window={window} is of causal attention; set causal=True, or say in mask "
            f"who looks where."
        )
    if isinstance(window, jax.core.Tracer):
        return window
    return check_count("window", window)


def _expand_mask(mask: Array, q: Array, k: Array) -> Array:
    if mask.dtype != jnp.bool_:
        raise ValueError(
            f"mask has dtype {mask.dtype}; give booleans, True where a query may look."
        )
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    full = (batch, heads, queries, keys)
    if mask.shape == (batch, keys):
        return mask[:, None, None, :]
    if mask.ndim != 4 or any(
        size not in (1, want) for size, want in zip(mask.shape, full)
    ):
        raise ValueError(
            f"mask has shape {mask.shape}; give [batch, key] = {(batch, keys)} or "
            f"[batch, heads, query, key] = {full} with axes of length 1 broadcast."
        )
    return jnp.broadcast_to(mask, (*mask.shape[:3], keys))
