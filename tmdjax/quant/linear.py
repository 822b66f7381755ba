"""The one matrix product that every dense layer calls.

A *recipe* names how the product is computed. Precision arms are pairs of
recipes, one for rollout and one for training. New recipes register here.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tmdjax.core.registry import Registry
from tmdjax.core.types import Array, Float

Matmul = Callable[[Array, Array], Array]

RECIPES: Registry[Matmul] = Registry("GEMM recipe")


def _contract(x: Array, w: Array, **options: Any) -> Array:
    return jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())), **options)


@RECIPES.register("fp32")
def _fp32(x: Array, w: Array) -> Array:
    """Full float32 (no TF32), float32 out."""
    return _contract(
        x.astype(jnp.float32),
        w.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )


@RECIPES.register("bf16")
def _bf16(x: Array, w: Array) -> Array:
    """bfloat16 operands, float32 accumulation, bfloat16 out."""
    return _contract(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))


def linear(
    x: Float[Array, "*batch in_features"],
    w: Float[Array, "in_features out_features"],
    recipe: str = "fp32",
) -> Float[Array, "*batch out_features"]:
    """X @ w under a named recipe.

    Args:
        x: activations, any floating dtype.
        w: weights, kept in float32 by the optimiser; the recipe casts.
        recipe: 'fp32' or 'bf16'.

    Returns:
        The product in the recipe's output dtype (float32 or bfloat16).

    Raises:
        ValueError: unknown recipe, or inner sizes that differ.
    """
    matmul = RECIPES[recipe]
    if x.shape[-1] != w.shape[0]:
        raise ValueError(
            f"x has {x.shape[-1]} features but w has shape {w.shape}; w is stored "
            f"[in, out]."
        )
    return matmul(x, w)


def compute_dtype(recipe: str) -> Any:
    """The dtype in which a network under this recipe carries its activations."""
    RECIPES[recipe]
    return jnp.float32 if recipe == "fp32" else jnp.bfloat16
