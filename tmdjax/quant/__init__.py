"""Matrix products by precision recipe."""

from tmdjax.quant.fp8 import GRANULARITIES as GRANULARITIES
from tmdjax.quant.fp8 import Quantised as Quantised
from tmdjax.quant.fp8 import cast_for_good as cast_for_good
from tmdjax.quant.fp8 import quantise as quantise
from tmdjax.quant.fp8 import quantised_values as quantised_values
from tmdjax.quant.fp8 import share_floored as share_floored
from tmdjax.quant.fp8 import share_moved as share_moved
from tmdjax.quant.fp8 import share_padded as share_padded
from tmdjax.quant.fp8_recipes import SCALINGS as SCALINGS
from tmdjax.quant.fp8_recipes import fp8_recipe as fp8_recipe
from tmdjax.quant.fp8_recipes import multiply as multiply
from tmdjax.quant.hopper_gemm import block_product as block_product
from tmdjax.quant.hopper_gemm import check_kernel as check_kernel
from tmdjax.quant.linear import linear as linear
from tmdjax.quant.recipes import RECIPES as RECIPES
from tmdjax.quant.recipes import Precision as Precision
from tmdjax.quant.recipes import Recipe as Recipe
from tmdjax.quant.recipes import as_recipe as as_recipe
from tmdjax.quant.recipes import rounding_recipe as rounding_recipe
from tmdjax.quant.self_test import check_device as check_device
from tmdjax.quant.self_test import check_precision as check_precision
from tmdjax.quant.self_test import check_rounding as check_rounding
from tmdjax.quant.self_test import has_fp8 as has_fp8
from tmdjax.quant.self_test import is_hopper as is_hopper
