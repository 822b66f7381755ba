"""The block-scaled kernel for Hopper GPUs: interpreted, and lowered for CUDA."""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import quant
from tmdjax.quant import fp8_recipe, hopper_gemm, quantise

RECIPE = fp8_recipe("block_by_kernel", "block", kernel="hopper")
interpreted = functools.partial(quant.block_product, interpret=True)


def drawn(*shape, seed=0):
    return jnp.float32(np.random.default_rng(seed).normal(size=shape))


def operand(shape, granularity, dtype="float8_e4m3fn"):
    """What errors and programs are made of: shapes, and nothing computed."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda x: quantise(x, granularity, dtype), x)


def device(kind, capability, cores=0):
    return SimpleNamespace(
        platform="gpu",
        device_kind=kind,
        compute_capability=capability,
        core_count=cores,
    )


HOPPER, AMPERE = device("NVIDIA H100 PCIe", "9.0", 114), device("NVIDIA A100", "8.0")
BLACKWELL = device("NVIDIA B200", "10.0")


def test_the_kernel_multiplies_known_numbers(monkeypatch):
    """Two tiles of two steps, by one block: ragged, and scales unlike their neighbours.

    The interpreter compiles the kernel anew for each thread of each block.
    """
    monkeypatch.setattr(hopper_gemm, "_MULTIPROCESSORS", 1)
    hopper_gemm.check_kernel(jax.jit(interpreted), (200, 160, 100))


def test_the_check_of_the_kernel_sees_a_forgotten_scale():
    sizes, product = (200, 160, 100), jax.jit(quant.multiply)
    hopper_gemm.check_kernel(product, sizes)

    def forgetful(a, b):
        scale = b.scale.copy()
        scale[1, 0] = 1
        return product(a, dataclasses.replace(b, scale=scale))

    message = r"self-test .* on 'cpu': \d+ of 20000 .* Use kernel='xla'"
    with pytest.raises(RuntimeError, match=message):
        hopper_gemm.check_kernel(forgetful, sizes)


@pytest.mark.slow
def test_the_pipeline_wraps_around_and_walks_every_tile(monkeypatch):
    """More steps than stages, 2 x 3 tiles for 4 blocks, and numbers that round."""
    monkeypatch.setattr(hopper_gemm, "_MULTIPROCESSORS", 4)
    hopper_gemm.check_kernel(interpreted, (200, 840, 330))
    x, w = drawn(70, 300), drawn(300, 140, seed=1)
    cases = ("128x1", jnp.float32, 2e-6), ("128x128", jnp.bfloat16, 2**-8)
    for granularity, dtype, unit in cases:
        a, b = quantise(x, "1x128"), quantise(w, granularity)
        exact = quant.multiply(a, b)  # of the dequantised numbers
        found = np.float32(jax.jit(interpreted, static_argnums=2)(a, b, dtype))
        assert_allclose(found, exact, rtol=unit, atol=2e-6 * np.abs(exact).max())
        assert np.abs(found - x @ w).max() > 0.01  # and these were rounded


@functools.cache
def lowered(platform, recipe=RECIPE):
    """A layer, forward and backward, as text for a platform that is not here."""

    def loss(x, w):
        return quant.linear(x, w, recipe).astype(jnp.float32).sum()

    given = jnp.zeros((200, 160)), jnp.zeros((160, 100))
    traced = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(*given)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_hopper_gpus_multiply_a_layer_by_the_kernel():
    text = lowered("cuda")
    kernels = re.findall(r"custom_call @mosaic_gpu_v2.*\((tensor.*)\) -> (\S+)", text)
    tile = r"tensor<(\w+)xf8E4M3FN>"
    operands = [re.findall(tile, given) for given, _ in kernels]
    assert operands == [  # [m, k] and [n, k], padded
        ["256x256", "128x256"],  # y = x w
        ["256x128", "256x128"],  # dx = dy wT
        ["256x256", "128x256"],  # dw = xT dy
    ]
    assert [y for _, y in kernels] == [
        "tensor<256x128xbf16>", "tensor<256x256xbf16>", "tensor<256x128xf32>"
    ]  # fmt: skip
    instruction = "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"
    assert text.count(instruction) == 3  # a kernel's text stands once in its module
    assert "dot_general" not in text  # nothing is multiplied as dequantised numbers
    stack = jax.jit(jax.vmap(functools.partial(quant.linear, recipe=RECIPE)))
    traced = stack.trace(jnp.zeros((3, 8, 16)), jnp.zeros((3, 16, 4)))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu_v2") == 1 and "dot_general" not in text


def test_other_devices_multiply_as_xla_does(monkeypatch):
    plain = quant.RECIPES["fp8_block"]
    for platform in ("tpu", "cpu"):
        assert "mosaic" not in lowered(platform)
        assert lowered(platform).count("dot_general") == 3
    for others in ([AMPERE], [BLACKWELL], [HOPPER, AMPERE]):
        monkeypatch.setattr(jax, "devices", lambda others=others: others)
        assert not hopper_gemm.may_run()
    monkeypatch.setattr(jax, "devices", lambda: [AMPERE])
    given = operand((2, 3), "1x128"), operand((3, 2), "128x1")
    multiply = jax.jit(functools.partial(quant.multiply, kernel="hopper"))
    text = multiply.trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic" not in text and text.count("dot_general") == 1
    monkeypatch.undo()
    x, w = drawn(3, 8), drawn(8, 4, seed=1)
    product = jax.jit(quant.linear, static_argnums=2)
    assert_array_equal(product(x, w, RECIPE), product(x, w, plain))


def test_hopper_is_known_and_its_kernel_is_tried_before_it_multiplies(monkeypatch):
    assert quant.is_hopper(HOPPER) and quant.has_fp8(HOPPER)
    assert quant.has_fp8(BLACKWELL) and not quant.is_hopper(BLACKWELL)
    assert not any(map(quant.is_hopper, [AMPERE, *jax.devices()]))
    tried = []
    monkeypatch.setattr(hopper_gemm, "check_kernel", lambda: tried.append(1))
    for here, count in ((AMPERE, 0), (HOPPER, 1), (HOPPER, 1)):
        monkeypatch.setattr(jax, "devices", lambda here=here: [here])
        x, w = jnp.ones((3, 4)), jnp.ones((4, 2))
        jax.eval_shape(functools.partial(quant.linear, recipe=RECIPE), x, w)
        assert len(tried) == count


def test_bad_inputs(refused):
    a, b = operand((3, 4), "1x128"), operand((4, 2), "128x128")
    product = quant.block_product
    for wrong in ("row", "128x1"):
        words = f"a.granularity='{wrong}' is not one of '1x128'"
        refused(words, product, operand((3, 4), wrong), b)
    refused("b.granularity='1x128' is not one", product, a, operand((4, 2), "1x128"))
    refused("dtype='int8' is not one of 'float32'", product, a, b, jnp.int8)
    turned = operand((2, 4), "128x128")
    refused(r"a has shape \(3, 4\) and b has shape \(2, 4\)", product, a, turned)
    five = operand((4, 2), "128x128", "float8_e5m2")
    refused("b of float8_e5m2; the kernel .* Quantise both", product, a, five)
    refused(
        "kernel='cutlass' is not one of 'xla'", quant.multiply, a, b, kernel="cutlass"
    )
    refused(
        "kernel='hoper' .*Did you mean 'hopper'",
        fp8_recipe,
        "a",
        "block",
        kernel="hoper",
    )
    by_kernel = functools.partial(fp8_recipe, "a", kernel="hopper")
    refused("scaling='rowwise' .*multiplies under 'block' alone", by_kernel, "rowwise")
    message = "gradient_dtype='float8_e5m2': .* operands of one dtype"
    refused(message, by_kernel, "block", gradient_dtype="float8_e5m2")
