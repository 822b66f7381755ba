"""The one matrix product that every dense layer calls."""

from typing import Any

from tmdjax.core.types import Array, Float
from tmdjax.quant.recipes import Recipe, as_recipe


def linear(
    x: Float[Array, "*batch in_features"], w: Any, recipe: str | Recipe = "fp32"
) -> Float[Array, "*batch out_features"]:
    """X @ w under a recipe.

    Args:
        x: activations, any floating dtype.
        w: weights [in_features, out_features], kept in float32 by the optimiser; or
            what the recipe's ``prepare`` made of them.
        recipe: a :class:`Recipe`, or the name of one.

    Returns:
        The product in the recipe's dtype.

    Raises:
        ValueError: unknown recipe, or inner sizes that differ.
    """
    recipe = as_recipe(recipe)
    if x.shape[-1] != w.shape[0]:
        raise ValueError(
            f"x has {x.shape[-1]} features but w has shape {w.shape}; w is stored "
            f"[in, out]."
        )
    return recipe.matmul(x, w)
