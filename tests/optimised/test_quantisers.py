"""8-bit numbers as users compile them: fused or not, the same bits."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_array_equal

from tmdjax import quant

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"


def drawn(*shape, seed=0):
    return jnp.float32(np.random.default_rng(seed).normal(size=shape))


def test_one_program_multiplies_what_many_do():
    """Producer, quantisers, product and consumer fused, or each compiled alone."""
    recipe = quant.fp8_recipe("exact", "block", dtype=jnp.float32)
    granularities = quant.SCALINGS["block"]
    x, w = drawn(150, 200), drawn(200, 136, seed=1)

    @jax.jit
    def fused(x, w):
        return 1 + quant.linear(jnp.sin(x), w, recipe)

    @jax.jit
    def multiply(x, w):
        return jax.lax.dot(x, w, precision=jax.lax.Precision.HIGHEST)

    operands = (  # operation by operation
        quant.quantise(jnp.sin(x), granularities.x).dequantise(),
        quant.quantise(w, granularities.w).dequantise(),
    )
    assert_array_equal(fused(x, w), 1 + multiply(*operands))
    text = fused.lower(x, w).compile().as_text()
    assert text.count("= f8e4m3fn[150,200]") and text.count("= f8e4m3fn[200,136]")


def test_rounding_to_16_bits_is_kept_before_8_bits_are_cut():
    """Quantised from the published copy of a weight, as whoever receives it does."""
    w = drawn(200, 136) * jnp.float32(1 + 2**-9)
    prepare = quant.RECIPES["fp8_block"].prepare
    published = np.asarray(w.astype(jnp.bfloat16))
    found, received = jax.jit(prepare)(w), jax.jit(prepare)(published)
    assert_array_equal(found.scale, received.scale)
    assert_array_equal(found.values, received.values)
    exact = quant.quantise(w, "128x128")
    assert (np.asarray(exact.scale) != np.asarray(found.scale)).any()


def test_the_casts_of_deepgemm_bit_for_bit():
    """Inputs as in tests/goldens/make_fp8.py."""
    shapes = {"1x128": (7, 200), "128x1": (256, 5), "128x128": (150, 136)}
    given = {}
    for granularity, shape in shapes.items():
        random = np.random.RandomState(0)
        x = random.standard_normal(shape) * 2.0 ** random.randint(-8, 4, shape)
        x[3, 4], x[:, :1], x[128:, :] = 3e4, 0, 1e-5 * x[128:, :]
        given[granularity] = np.float32(x)

    @jax.jit
    def each(given):
        return {
            f"{granularity}/{scale}": quant.quantise(x, granularity, scale=scale)
            for granularity, x in given.items()
            for scale in ("fp32", "pow2")
        }

    with np.load(GOLDENS / "fp8.npz") as stored:
        for case, found in each(given).items():
            codes = np.asarray(found.values).view(np.uint8)
            assert_array_equal(codes, stored[f"{case}/codes"])
            assert_array_equal(found.scale, stored[f"{case}/scale"])
