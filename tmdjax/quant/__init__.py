"""Matrix products by precision recipe."""

from tmdjax.quant.linear import linear as linear
from tmdjax.quant.recipes import RECIPES as RECIPES
from tmdjax.quant.recipes import Precision as Precision
from tmdjax.quant.recipes import Recipe as Recipe
from tmdjax.quant.recipes import as_recipe as as_recipe
from tmdjax.quant.recipes import rounding_recipe as rounding_recipe
