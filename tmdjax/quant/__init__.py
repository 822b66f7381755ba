"""Matrix products by precision recipe."""

from tmdjax.quant.linear import linear
from tmdjax.quant.recipes import (
    RECIPES,
    Precision,
    Recipe,
    as_recipe,
    rounding_recipe,
)

__all__ = [
    "RECIPES",
    "Precision",
    "Recipe",
    "as_recipe",
    "linear",
    "rounding_recipe",
]
