"""A stand-in for fused attention, for plans made where no such kernel can be traced.

The XLA form makes all scores, [batch, heads, query, key]; a fused kernel makes none. A
plan for a device that has one is traced with two operations of known size in its place,
which nothing can run.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
from jax.experimental import xla_metadata
from jax.interpreters import batching

from tmdjax.core.types import Array

_PLANNED = contextvars.ContextVar("fused attention is planned", default=False)

_FORWARD = jex.Primitive("fused_attention")
_FORWARD.multiple_results = True
_BACKWARD = jex.Primitive("fused_attention_gradient")
_BACKWARD.multiple_results = True


@contextlib.contextmanager
def fused_attention_planned() -> Iterator[None]:
    """What is traced inside is planned for a device with fused attention.

    It can be read but not run: such traces are cached apart from others.
    """
    token = _PLANNED.set(True)
    try:
        with xla_metadata.set_xla_metadata(planned="fused_attention"):
            yield
    finally:
        _PLANNED.reset(token)


def is_planned() -> bool:
    """Whether the code runs under :func:`fused_attention_planned`."""
    return _PLANNED.get()


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def planned_attention(q: Array, k: Array, v: Array, causal: bool) -> Array:
    """Of the shape and dtype of q, [batch, position, heads, head_dim]."""
    return _FORWARD.bind(q, k, v, causal=causal)[0]


def _forward(q: Array, k: Array, v: Array, causal: bool) -> Any:
    out, log_sum = _FORWARD.bind(q, k, v, causal=causal)
    return out, (q, k, v, out, log_sum)


def _backward(causal: bool, kept: Any, gradient: Array) -> Any:
    return tuple(_BACKWARD.bind(*kept, gradient, causal=causal))


planned_attention.defvjp(_forward, _backward)


@_FORWARD.def_abstract_eval
def _(q: Any, k: Any, v: Any, *, causal: bool) -> Any:
    log_sum = jax.core.ShapedArray(q.shape[:-1], jnp.dtype("float32"))
    return jax.core.ShapedArray(q.shape, q.dtype), log_sum


@_BACKWARD.def_abstract_eval
def _(q: Any, k: Any, v: Any, *rest: Any, causal: bool) -> Any:
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in (q, k, v)]


def _batched(primitive: Any, values: Any, axes: Any, *, causal: bool) -> Any:
    size = next(x.shape[a] for x, a in zip(values, axes) if a is not None)
    values = [batching.bdim_at_front(x, a, size) for x, a in zip(values, axes)]
    out = primitive.bind(*values, causal=causal)
    return out, [0] * len(out)


for _primitive in (_FORWARD, _BACKWARD):
    batching.primitive_batchers[_primitive] = functools.partial(_batched, _primitive)
