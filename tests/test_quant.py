import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax import quant


def test_fp32_against_float64():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(4, 5, 64)), rng.normal(size=(64, 32))
    got = quant.linear(jnp.float32(x), jnp.float32(w), "fp32")
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, x @ w, rtol=1e-5, atol=1e-5)


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


def test_bf16_rounds_operands_and_accumulates_in_float32():
    # 4096 ones: a bfloat16 accumulator would stop at 256.
    x, w = jnp.ones((1, 4096)), jnp.ones((4096, 1))
    got = quant.linear(x, w, "bf16")
    assert got.dtype == jnp.bfloat16 and float(got[0, 0]) == 4096
    a, b = 1 + 2**-9, 3.0  # a rounds to 1 in bfloat16
    product = quant.linear(jnp.full((1, 1), a), jnp.full((1, 1), b), "bf16")
    assert float(product[0, 0]) == 3


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
def test_gradient_dtype_follows_the_weight(recipe):
    w = jnp.ones((3, 2))
    x, linear = jnp.ones((4, 3)), quant.linear
    grad = jax.grad(lambda w: linear(x, w, recipe).sum().astype(jnp.float32))(w)
    assert grad.dtype == jnp.float32
    np.testing.assert_allclose(grad, 4.0)


def test_bad_inputs(refused):
    x, words = jnp.ones((1, 2)), r"unknown GEMM recipe 'bf61'.*'bf16'"
    refused(words, quant.linear, x, jnp.ones((2, 2)), "bf61")
    refused("w is stored", quant.linear, x, jnp.ones((3, 2)))


def test_compute_dtype():
    assert quant.compute_dtype("fp32") == jnp.float32
    assert quant.compute_dtype("bf16") == jnp.bfloat16
