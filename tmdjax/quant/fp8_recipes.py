"""Recipes whose three products, forward and backward, have 8-bit operands."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from tmdjax.core.checks import check_choice
from tmdjax.core.types import Array
from tmdjax.quant import hopper_gemm
from tmdjax.quant.fp8 import (
    DTYPES,
    SCALES,
    SMALLEST_OF_GRADIENTS,
    Quantised,
    cast_for_good,
    quantise,
)
from tmdjax.quant.hopper_gemm import block_product
from tmdjax.quant.recipes import RECIPES, Recipe
from tmdjax.quant.self_test import check_rounding, has_fp8, is_hopper


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Granularities of what three products read, each as it is stored.

    Attributes:
        x: activations [token, in] of y = x w.
        w: weights [in, out] of y = x w.
        dy: gradients [token, out] of dx = dy wᵀ.
        w_again: weights [in, out] of dx = dy wᵀ.
        x_again: activations [token, in] of dw = xᵀ dy.
        dy_again: gradients [token, out] of dw = xᵀ dy.
    """

    x: str
    w: str
    dy: str
    w_again: str
    x_again: str
    dy_again: str


SCALINGS = {
    "tensor": Scaling(*["tensor"] * 6),
    "rowwise": Scaling("row", "column", "row", "row", "column", "column"),
    "block": Scaling("1x128", "128x128", "1x128", "128x128", "128x1", "128x1"),
}
"""By name: one scale a tensor; one for each row or column that a product sums over; one
for each 128 of them (DeepSeek-V3, arXiv 2412.19437; Jet-RL, arXiv 2601.14243)."""


KERNELS = ("xla", "hopper")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rules:
    name: str
    scaling: Scaling
    dtype: Any
    gradient_dtype: Any
    scale: str
    differentiable: bool
    kernel: str

    def prepare(self, w: Any) -> Quantised:
        """Quantised from the rounded weight: the copy that others are given too."""
        if not isinstance(w, Quantised):
            w = cast_for_good(jax.lax.stop_gradient(w), self.dtype)
            return quantise(w, self.scaling.w, scale=self.scale)
        if w.granularity != self.scaling.w:
            raise ValueError(
                f"w was quantised by {w.granularity!r} and the recipe {self.name!r} "
                f"takes {self.scaling.w!r}; prepare the weights under the recipe that "
                f"multiplies."
            )
        return w

    def again(self, q: Quantised, granularity: str) -> Quantised:
        """The same numbers by groups that lie along another axis."""
        if q.granularity == granularity:
            return q
        dtype = q.values.dtype
        return quantise(q.dequantise(), granularity, dtype, scale=self.scale)


def multiply(
    a: Quantised, b: Quantised, dtype: Any = None, *, kernel: str = "xla"
) -> Array:
    """The product of two 8-bit matrices, summed in float32.

    Where the terms of a sum share their scales, NVIDIA GPUs multiply the 8-bit values.
    Other products are of the dequantised numbers in float32.

    Args:
        a: [m, k], by groups of any granularity.
        b: [k, n], likewise.
        dtype: that the sums are rounded to; None leaves them in float32.
        kernel: 'xla'; or 'hopper', which on GPUs of compute capability 9.0 is
            :func:`tmdjax.quant.block_product`, and 'xla' on all other devices.

    Returns:
        [m, n].

    Raises:
        ValueError: an unknown kernel; operands that the kernel does not take.
    """
    check_choice("kernel", kernel, KERNELS)

    def by_xla(a: Quantised, b: Quantised) -> Array:
        if a.granularity in ("tensor", "row") and b.granularity in ("tensor", "column"):
            y = jax.lax.platform_dependent(
                a, b, cuda=_product_of_values, default=_product_of_numbers
            )
        else:
            y = _product_of_numbers(a, b)
        return y if dtype is None else cast_for_good(y, dtype)

    if kernel == "xla" or not hopper_gemm.may_run():
        return by_xla(a, b)
    by_kernel = functools.partial(block_product, dtype=dtype or jnp.float32)
    return jax.lax.platform_dependent(a, b, cuda=by_kernel, default=by_xla)


def _product_of_values(a: Quantised, b: Quantised) -> Array:
    y = jax.lax.dot(a.values, b.values, preferred_element_type=jnp.float32)
    return y * a.scale * b.scale


def _product_of_numbers(a: Quantised, b: Quantised) -> Array:
    highest = jax.lax.Precision.HIGHEST
    return jax.lax.dot(a.dequantise(), b.dequantise(), precision=highest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(rules: _Rules, frozen: bool, x: Array, w: Any) -> Array:
    """X [token, in] times w [in, out]; ``frozen`` says that w was prepared."""
    return _forward(rules, x, w)[0]


def _forward(rules: _Rules, x: Array, w: Any) -> tuple[Array, Any]:
    # What rounds to 8 bits was rounded to the recipe's dtype before, in every program.
    x = cast_for_good(x, rules.dtype)
    saved = quantise(x, rules.scaling.x, scale=rules.scale), rules.prepare(w)
    return multiply(*saved, rules.dtype, kernel=rules.kernel), saved


def _forward_to_differentiate(
    rules: _Rules, frozen: bool, x: Array, w: Any
) -> tuple[Array, Any]:
    if not rules.differentiable:
        raise ValueError(
            f"the recipe {rules.name!r} is of rollouts alone: its products have no "
            f"gradient. Train under another, such as precision.train='bf16'."
        )
    return _forward(rules, x, w)


def _backward(
    rules: _Rules, frozen: bool, saved: tuple[Quantised, Quantised], dy: Array
) -> tuple[Array, Array | None]:
    """Straight through the quantisers: gradients to what the products read."""
    (x, w), groups = saved, rules.scaling
    dy = cast_for_good(dy, rules.dtype)

    def rounded(granularity: str) -> Quantised:
        return quantise(
            dy,
            granularity,
            rules.gradient_dtype,
            scale=rules.scale,
            smallest=SMALLEST_OF_GRADIENTS,
        )

    left = rounded(groups.dy)
    turned = rules.again(w, groups.w_again).transpose()
    dx = multiply(left, turned, rules.dtype, kernel=rules.kernel)
    if frozen:
        return dx, None
    right = left if groups.dy_again == groups.dy else rounded(groups.dy_again)
    x = rules.again(x, groups.x_again).transpose()
    return dx, multiply(x, right, kernel=rules.kernel)


_product.defvjp(_forward_to_differentiate, _backward)


_OF_HEADS = {"float32": "fp32", "bfloat16": "bf16"}
"""The recipe of the head of a language model, by the dtype of activations."""


def fp8_recipe(
    name: str,
    scaling: str,
    *,
    dtype: Any = jnp.bfloat16,
    gradient_dtype: Any = jnp.float8_e4m3fn,
    scale: str = "fp32",
    differentiable: bool = True,
    kernel: str = "xla",
) -> Recipe:
    """Products of 8-bit operands, which are summed in float32.

    With Q for quantising and back by the granularities of :data:`SCALINGS`::

        y = Q(x) Q(w)      dx = Q(dy) Q(Q(w))ᵀ      dw = Q(Q(x))ᵀ Q(dy)

    The outer Q of a Q(Q(·)) is left out where its granularity is that of the inner one:
    for w under 'block', for x and w under 'tensor'. Operands are rounded to ``dtype``
    first; y and dx are rounded to it, dw stays float32. x and w are kept for the
    backward pass in 8 bits. Gradients go straight through Q: there are none to scales.
    Groups of dy have scales of their own however small they are, so that a loss that is
    divided by a power of two has gradients that are, to the bit.
    ``jax.jvp`` finds no rule for these products.

    NVIDIA GPUs multiply the 8-bit values where a sum has one scale, under 'tensor' and
    'rowwise'; under 'block' Hopper GPUs do where ``kernel`` says so. No GPU has run
    either yet. Elsewhere products are of the dequantised numbers in float32: the same
    up to rounding of a sum, at the price of 'fp32'.

    Args:
        name: of the recipe; it is not registered.
        scaling: a name in :data:`SCALINGS`. Under 'tensor' a row of the product depends
            on the other rows of x. Weights that are joined along their last axis
            (:func:`tmdjax.models.fuse_projections`) are other numbers under 'tensor',
            and under 'block' where a width is no multiple of 128.
        dtype: of activations: float32 or bfloat16.
        gradient_dtype: of dy: float8_e4m3fn, or float8_e5m2, with more range and a bit
            less.
        scale: 'fp32' or 'pow2', see :func:`tmdjax.quant.quantise`.
        differentiable: False refuses gradients, for rollouts of a model that is trained
            under another recipe.
        kernel: of products under 'block': 'xla'; or 'hopper', which on GPUs of compute
            capability 9.0 is :func:`tmdjax.quant.block_product`, and 'xla' on all other
            devices. It is tried on known numbers before its first product. 'xla' stays
            the default until a GPU has passed ``python -m benchmarks.fp8``.

    Raises:
        ValueError: an unknown scaling, dtype, scale or kernel; ``kernel='hopper'``
            under another scaling than 'block', or with gradients of another 8-bit dtype
            than that of weights.
        RuntimeError: when it multiplies, from :func:`tmdjax.quant.check_rounding` and
            :func:`tmdjax.quant.check_kernel`.

    References:
        Jet-RL (arXiv 2601.14243).
    """
    dtype = jnp.dtype(dtype)
    check_choice("scaling", scaling, SCALINGS)
    check_choice("dtype", dtype.name, _OF_HEADS)
    gradient_dtype = jnp.dtype(gradient_dtype)
    check_choice("gradient_dtype", gradient_dtype.name, DTYPES)
    check_choice("scale", scale, SCALES)
    check_choice("kernel", kernel, KERNELS)
    if kernel == "hopper" and (scaling, gradient_dtype) != ("block", jnp.float8_e4m3fn):
        raise ValueError(
            f"kernel='hopper' with scaling={scaling!r} and gradient_dtype="
            f"{gradient_dtype.name!r}: the kernel multiplies under 'block' alone, and "
            f"operands of one dtype, float8_e4m3fn. Change these, or use kernel='xla'."
        )
    rules = _Rules(
        name=name,
        scaling=SCALINGS[scaling],
        dtype=dtype,
        gradient_dtype=gradient_dtype,
        scale=scale,
        differentiable=differentiable,
        kernel=kernel,
    )

    def matmul(x: Array, w: Any) -> Array:
        check_rounding()
        if kernel == "hopper":
            hopper_gemm.check_kernel_once()
        if len(w.shape) != 2:
            raise ValueError(
                f"w has shape {w.shape}; an 8-bit product takes one matrix [in, out]. "
                f"Scan or vmap over a stack of them."
            )
        frozen = isinstance(w, Quantised)
        w = w if frozen else w.astype(jnp.float32)
        rows = x.astype(dtype).reshape(-1, x.shape[-1])
        y: Any = _product(rules, frozen, rows, w)
        return y.reshape(*x.shape[:-1], w.shape[1])

    def in_hardware(device: Any) -> bool:
        if scaling == "block":
            return kernel == "hopper" and is_hopper(device)
        return device.platform != "tpu" and has_fp8(device)

    quantising = jax.jit(rules.prepare)  # one program a shape, not an operation each

    def prepare(w: Any) -> Quantised:
        return (rules.prepare if isinstance(w, Quantised) else quantising)(w)

    return Recipe(
        name=name,
        dtype=dtype,
        matmul=matmul,
        prepare=prepare,
        batch_independent=scaling != "tensor",
        float8=True,
        in_hardware=in_hardware,
        differentiable=differentiable,
        head=RECIPES[_OF_HEADS[dtype.name]],
    )


for _scaling in SCALINGS:
    RECIPES.register(f"fp8_{_scaling}")(fp8_recipe(f"fp8_{_scaling}", _scaling))
RECIPES.register("fp8_rollout_only")(
    fp8_recipe("fp8_rollout_only", "block", differentiable=False)
)
for _scaling in ("tensor", "block"):
    _name = f"fp8_{_scaling}_out_fp32"
    RECIPES.register(_name)(fp8_recipe(_name, _scaling, dtype=jnp.float32))
