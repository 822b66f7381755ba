"""Matrix products by named precision recipe."""

from tmdjax.quant.linear import RECIPES, compute_dtype, linear

__all__ = ["RECIPES", "compute_dtype", "linear"]
