import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import same
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import quant
from tmdjax.quant import RECIPES, Precision, Recipe, as_recipe, rounding_recipe

HALF = rounding_recipe("half", jnp.float16)
ROUNDING = pytest.mark.parametrize("recipe", ["fp32", "bf16", HALF], ids=str)
EVERY = pytest.mark.parametrize("recipe", [*RECIPES, HALF], ids=str)
TRAINED = pytest.mark.parametrize(
    "recipe", [r for r in (*RECIPES, HALF) if as_recipe(r).differentiable], ids=str
)
product = jax.jit(quant.linear, static_argnums=2)


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@ROUNDING
def test_product_against_float64(recipe):
    """Operands and result are rounded once each; the sum between them is not."""
    found = as_recipe(recipe)
    x, w = drawn(4, 5, 64), drawn(64, 32, seed=1)
    got = quant.linear(jnp.float32(x), jnp.float32(w), recipe)
    assert got.dtype == found.dtype
    unit = float(jnp.finfo(found.dtype).eps) / 2
    size = np.abs(x) @ np.abs(w)  # what relative errors of the operands add up to
    exact = x @ w
    error = np.abs(np.float64(got) - exact)
    assert (error <= 2.1 * unit * size + unit * np.abs(exact) + 1e-5 * size).all()
    if not found.exact:  # and it did round
        assert error.max() > unit * size.max() / 20
    rounded = [np.asarray(jnp.asarray(a).astype(found.dtype), float) for a in (x, w)]
    # products of rounded operands, summed exactly: within the rounding of the result
    sums = rounded[0] @ rounded[1]
    assert_allclose(np.float64(got), sums, rtol=1.1 * unit, atol=2e-6 * size.max())


@EVERY
def test_prepared_weights_change_no_bit(recipe):
    """Neither of one layer nor of a stack, nor when they are prepared twice."""
    found, x = as_recipe(recipe), jnp.float32(drawn(3, 8))
    stack, prepare = jnp.float32(drawn(2, 8, 4, seed=1)), jax.jit(found.prepare)
    once = prepare(stack)
    same(prepare(once), once)
    for i, w in enumerate(stack):
        prepared = jax.tree.map(operator.itemgetter(i), once)
        assert_array_equal(product(x, w, found), product(x, prepared, found))


@EVERY
def test_rows_do_not_meet_where_a_recipe_says_so(recipe):
    found, x = as_recipe(recipe), jnp.float32(drawn(3, 8))
    w = jnp.float32(drawn(8, 4, seed=1))
    loud = x.at[1:].multiply(1e4)
    bad = x.at[1, 3].set(np.nan).at[2, 5].set(np.inf)
    first, other = (np.float32(product(rows, w, found)[0]) for rows in (x, loud))
    whole, *others = np.float32(product(bad, w, found))
    assert not np.isfinite(others).any()  # what is not finite never becomes a number
    assert found.batch_independent == ("tensor" not in found.name)
    if found.batch_independent:
        assert_array_equal(first, other)
        assert_array_equal(first, whole)
    else:  # what the flag is there for
        assert np.abs(first - other).max() > 0.05 and np.isnan(whole).all()


def test_fp32_is_not_tf32_forward_or_backward():
    x, w = jnp.ones((2, 4)), jnp.ones((4, 3))

    def products(fn):
        jaxpr = jax.make_jaxpr(fn)(x, w).jaxpr
        return [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]

    highest = jax.lax.Precision.HIGHEST
    gradient = jax.grad(lambda x, w: quant.linear(x, w, "fp32").sum(), argnums=(0, 1))
    for fn, count in ((lambda x, w: quant.linear(x, w, "fp32"), 1), (gradient, 3)):
        found = products(fn)
        # The gradient of a sum needs no product forward: it may have been dropped.
        assert max(1, count - 1) <= len(found) <= count
        assert all(e.params["precision"] == (highest, highest) for e in found)


def test_bf16_accumulates_in_float32():
    # 4096 ones: a bfloat16 accumulator would stop at 256.
    got = quant.linear(jnp.ones((1, 4096)), jnp.ones((4096, 1)), "bf16")
    assert got.dtype == jnp.bfloat16 and float(got[0, 0]) == 4096


def test_results_in_float32_are_sums_that_nothing_rounded():
    x, w = jnp.float32(drawn(3, 64)), jnp.float32(drawn(64, 5, seed=1))
    narrow, wide = (product(x, w, recipe) for recipe in ("bf16", "bf16_out_fp32"))
    assert wide.dtype == jnp.float32
    assert_array_equal(wide.astype(jnp.bfloat16), narrow)
    operands = (np.float64(a.astype(jnp.bfloat16)) for a in (x, w))
    assert_allclose(wide, np.matmul(*operands), rtol=1e-5)
    assert (wide != np.float32(narrow)).any()


@TRAINED
def test_gradient_dtype_follows_the_weight(recipe):
    w = jnp.ones((3, 2))
    x = jnp.ones((4, 3))
    loss = jax.grad(lambda w: product(x, w, recipe).sum().astype(jnp.float32))
    grad = jax.jit(loss)(w)
    assert grad.dtype == jnp.float32
    assert_allclose(grad, 4.0, rtol=1e-6)


def test_bad_inputs(refused):
    x, words = jnp.ones((1, 2)), r"unknown GEMM recipe 'bf61'.*'bf16'"
    refused(words, quant.linear, x, jnp.ones((2, 2)), "bf61")
    refused("w is stored", quant.linear, x, jnp.ones((3, 2)))
    refused(
        "dtype='float8_e4m3fn' is not one of", rounding_recipe, "a", "float8_e4m3fn"
    )
    refused("recipe=16 is of type int.*bf16, .*fp32", as_recipe, 16, error=TypeError)


def test_a_pair_resolves_its_names_and_says_where_it_disagrees(refused):
    pair = Precision(rollout="bf16", train=HALF)
    assert pair == Precision(rollout=RECIPES["bf16"], train=HALF)
    assert "rollout='bf16' and updates under precision.train='half'" in (
        pair.disagreement()
    )
    assert Precision().disagreement() == ""
    assert "both 'bf16'" in Precision(rollout="bf16", train="bf16").disagreement()
    apart = dataclasses.replace(RECIPES["fp32"], batch_independent=False)
    assert "both 'fp32'" in Precision(rollout=apart, train=apart).disagreement()
    assert hash(pair) == hash(Precision(rollout="bf16", train=HALF))
    message = "precision.train: unknown GEMM recipe 'fp23'.*Did you mean 'fp32'"
    refused(message, Precision, train="fp23")


def test_a_recipe_shows_its_name():
    assert repr(HALF) == "Recipe('half')" and isinstance(HALF, Recipe)
