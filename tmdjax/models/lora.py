"""Low-rank adapters as a transform of the parameter tree (arXiv 2106.09685).

W' = W + (alpha / rank) a b, with a [in, rank] drawn at random and b [rank, out]
zero, so that training starts at the base. The network does not know of it.
For a convolution a is [kh, kw, in, rank]: the change is a convolution of few
channels followed by one of 1 x 1.
"""

import difflib
import functools
import math
import re
import zlib
from collections.abc import Sequence
from typing import Any, SupportsIndex

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from tmdjax.core.checks import check_count, check_range
from tmdjax.core.prng import check_key
from tmdjax.core.trees import count, flatten, map_with_path
from tmdjax.core.types import ApplyFn, Array, ArrayLike, Params

__all__ = ["apply_fn", "count", "init", "merge"]


def init(
    key: Any,
    params: Params,
    rank: SupportsIndex,
    targets: Sequence[str],
    *,
    stacked: str = r"(^|/)blocks/",
) -> dict[str, Any]:
    """Draws adapters for the kernels whose path matches a target.

    Only leaves named 'kernel' are adapted, of shape [in, out], inside a stack of
    layers [layer, in, out], or outside one [kh, kw, in, out] (a convolution); a
    pattern that also matches biases leaves those alone.
    A leaf's adapter depends on the key and its path, not on which other leaves are
    adapted.

    Args:
        key: typed key.
        params: parameter tree (arrays or shape structs).
        rank: r, at least 1 and at most the smaller side of every target; for a
            convolution that is min(kh kw in, out).
        targets: regular expressions, matched with ``re.search`` against path names
            such as 'blocks/attention/query/kernel'.
        stacked: regular expression of the paths whose leaves carry a leading layer
            axis, one adapter a layer. A kernel of three axes elsewhere ([in, heads,
            head_dim], say) is refused, and so is one of four axes in a stack.

    Returns:
        The tree of ``params`` cut down to the adapted leaves, each replaced by
        ``{'a': [..., in, r], 'b': [..., r, out]}``, of a convolution
        ``{'a': [kh, kw, in, r], 'b': [r, out]}``, float32; a is uniform in
        +-1/sqrt(fan_in), fan_in = in or kh kw in, and b is zero.

    Raises:
        TypeError: the key is not typed, rank is no integer, or targets is one string.
        ValueError: no targets, a pattern that matches no kernel (names the nearest
            paths) or one of another shape, a rank out of range.
    """
    check_key(key)
    rank = check_count("rank", rank)
    if isinstance(targets, str) or not targets:
        raise (TypeError if targets else ValueError)(
            f"targets={targets!r}; give a list of one or more regular expressions."
        )
    kernels = {
        path: leaf
        for path, leaf in flatten(params).items()
        if path.split("/")[-1] == "kernel"
    }
    chosen = set()
    for pattern in targets:
        matched = {path for path in kernels if re.search(pattern, path)}
        if not matched:
            near = difflib.get_close_matches(pattern, kernels, n=3, cutoff=0.0)
            raise ValueError(
                f"target {pattern!r} matches no kernel; the nearest of "
                f"{len(kernels)} are: {', '.join(near)}."
            )
        chosen |= matched
    adapters: dict[str, Any] = {}
    for path in sorted(chosen):
        stack, inputs, fan_out = _split_shape(path, kernels[path], stacked)
        fan_in = math.prod(inputs)
        check_range(f"rank (of {path})", rank, 1, min(fan_in, fan_out))
        bound = 1 / math.sqrt(fan_in)
        adapters[path] = {
            "a": jax.random.uniform(
                jax.random.fold_in(key, zlib.crc32(path.encode())),
                (*stack, *inputs, rank),
                jnp.float32,
                -bound,
                bound,
            ),
            "b": jnp.zeros((*stack, rank, fan_out), jnp.float32),
        }
    return traverse_util.unflatten_dict(adapters, sep="/")


def _split_shape(
    path: str, leaf: Any, stacked: str
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Axes of the stack, of the input (window and channels), and the output."""
    shape = leaf.shape
    if re.search(stacked, path):
        if len(shape) in (2, 3):
            return shape[:-2], shape[-2:-1], shape[-1]
    elif len(shape) in (2, 4):
        return (), shape[:-1], shape[-1]
    raise ValueError(
        f"{path} has shape {shape}; adapters take kernels [in, out], convolutions "
        f"[kh, kw, in, out] or, at paths that match stacked={stacked!r}, [layer, in, "
        f"out]. Narrow the targets, or name the stack."
    )


def _adapted_paths(adapters: Params | None) -> dict[str, None]:
    """Paths of the adapted leaves, in tree order."""
    return dict.fromkeys(path.rpartition("/")[0] for path in flatten(adapters or {}))


def merge(params: Params, adapters: Params | None, alpha: ArrayLike) -> Params:
    """W + (alpha / rank) a b at every adapted leaf; the others are passed on.

    Product and sum are taken in float32 and rounded to the dtype of the leaf. A
    16-bit leaf therefore loses changes below about 2^-9 (bfloat16) or 2^-12
    (float16) of its entries: merge into one to export, not to train.

    Args:
        params: parameter tree.
        adapters: from :func:`init`, any floating dtype; empty or None means none.
        alpha: scale, a number at least 0. Zero, where it is not traced, switches
            adapters off: params come back as they are.

    Returns:
        A tree like params, same dtypes.

    Raises:
        TypeError: alpha is not one number.
        ValueError: an alpha that is negative, infinite or NaN; an adapter whose leaf
            is missing or does not fit.
    """
    off = False
    if not isinstance(alpha, jax.core.Tracer):
        scale = np.asarray(alpha)
        if scale.ndim or not jnp.issubdtype(scale.dtype, jnp.number):
            raise TypeError(f"alpha={alpha!r} must be one number, at least 0.")
        check_range("alpha", scale.item(), 0, math.inf, open_high=True)
        off = scale.item() == 0
    leaves = flatten(adapters or {})
    paths = _adapted_paths(adapters)
    base = flatten(params)
    for path in paths:
        a, b = leaves[f"{path}/a"], leaves[f"{path}/b"]
        if path not in base:
            near = difflib.get_close_matches(path, base, n=1, cutoff=0.0)
            raise ValueError(
                f"the adapter of {path!r} has no parameter; the nearest is {near}. "
                f"Adapters belong to the tree they were made from."
            )
        product = (*a.shape[:-1], b.shape[-1])
        if a.shape[-1] != b.shape[-2] or product != base[path].shape:
            raise ValueError(
                f"the adapter of {path!r}, {a.shape} x {b.shape}, does not fit its "
                f"kernel of shape {base[path].shape}."
            )
    if not paths or off:
        return params

    def add(path: str, kernel: Array) -> Array:
        if path not in paths:
            return kernel
        a, b = (leaves[f"{path}/{name}"].astype(jnp.float32) for name in ("a", "b"))
        delta = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        merged = kernel.astype(jnp.float32) + (alpha / a.shape[-1]) * delta
        return merged.astype(kernel.dtype)

    return map_with_path(add, params)


def apply_fn(base_apply_fn: ApplyFn, base_params: Params, alpha: ArrayLike) -> ApplyFn:
    """``fn(adapters, *inputs, **options)``: the base with adapters merged in.

    The base is held constant (no gradient reaches it), so a loss of ``fn`` trains
    the adapters alone; ``fn({}, ...)`` is the base itself. Call this inside the
    jitted function, with ``base_params`` as its argument, or hand in
    ``flows.as_pytree(fn)``: parameters that a jitted function closes over become
    constants of the program.

    The kernels adapted must be held in float32, or the merge would round small
    changes away. Under the recipe 'bf16' the merged kernel is still rounded to
    bfloat16 at each GEMM: changes far below 2^-9 of the kernel's entries need the
    recipe 'fp32', or adapters that have grown larger.

    Args:
        base_apply_fn: ``apply_fn(params, *inputs, **options)``.
        base_params: its parameters.
        alpha: scale of the adapters, see :func:`merge`.

    Raises:
        TypeError: (when ``fn`` is called) an adapted kernel of fewer than 32 bits.
    """
    return functools.partial(_adapted, base_apply_fn, base_params, alpha)


def _adapted(
    base_apply_fn: ApplyFn,
    base_params: Params,
    alpha: Any,
    adapters: Params | None,
    *inputs: Any,
    **options: Any,
) -> Any:
    _check_wide(base_params, adapters)
    frozen = jax.lax.stop_gradient(base_params)
    return base_apply_fn(merge(frozen, adapters, alpha), *inputs, **options)


def _check_wide(params: Params, adapters: Params | None) -> None:
    base = flatten(params)
    for path in _adapted_paths(adapters):
        # A path that is missing is merge's to report.
        if path in base and jnp.dtype(base[path].dtype).itemsize < 4:
            raise TypeError(
                f"the base kernel {path!r} is {base[path].dtype}, which would round "
                f"small changes by its adapter away; adapted kernels must be float32. "
                f"Keep the base in float32: the GEMM recipe casts it down."
            )
