"""Plans: bytes that the compiler takes, closed forms of FLOPs, and the mesh search.

Every plan compiles in a process of its own, so few are made.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from tmdjax import train
from tmdjax.harness.report import text_table
from tmdjax.models.attention import attention
from tmdjax.train.planning.flops import count_work

Struct = jax.ShapeDtypeStruct
KEY = jax.eval_shape(lambda: jax.random.key(0))


def flops(fn, *args):
    return count_work(jax.make_jaxpr(fn)(*args)).flops


def dot(x, w):
    return x @ w


def test_flops_of_products():
    x, w = Struct((64, 128), jnp.float32), Struct((128, 32), jnp.float32)
    assert flops(dot, x, w) == {"float32": 2 * 64 * 128 * 32}
    gradient = jax.grad(lambda x, w: dot(x, w).sum(), argnums=(0, 1))
    assert flops(gradient, x, w) == {"float32": 2 * 2 * 64 * 128 * 32}
    halves = [Struct(s.shape, jnp.bfloat16) for s in (x, w)]
    work = count_work(jax.make_jaxpr(dot)(*halves))
    assert list(work.flops) == ["bfloat16"]
    assert work.moved == 2 * (64 * 128 + 128 * 32 + 64 * 32)
    assert flops(lambda x, w: (dot(x, w), x)[1], x, w) == {}  # nobody reads it


def layers(remat, dtype=jnp.float32):
    """A loss of a scanned stack that draws, chooses and looks numbers up."""
    table = jnp.linspace(0.0, 1.0, 32).astype(dtype)

    def loss(stack, x, key):
        x = x + jax.random.normal(key, x.shape, dtype) * table

        def body(h, w):
            return jax.lax.cond(w[0, 0] > 2, jnp.cos, jnp.sin, h @ w), None

        if remat:
            body = jax.checkpoint(body, prevent_cse=False)
        h = jax.lax.scan(body, x, stack)[0]
        return jnp.square(h.astype(jnp.float32)).sum().astype(dtype)

    return jax.grad(loss)


def stack_of(dtype=jnp.float32, depth=10, batch=4096, width=32):
    return Struct((depth, width, width), dtype), Struct((batch, width), dtype), KEY


def test_a_scan_counts_once_a_step():
    one = 2 * 4096 * 32 * 32
    # Forward, and two products backward; remat repeats the first.
    assert flops(layers(False), *stack_of()) == {"float32": 3 * 10 * one}
    assert flops(layers(True), *stack_of()) == {"float32": 4 * 10 * one}


def test_flops_of_convolutions():
    def convolve(x, w, stride=1):
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x, w = Struct((2, 16, 16, 8), jnp.float32), Struct((3, 3, 8, 4), jnp.float32)
    one = 2 * 2 * 16 * 16 * 9 * 8 * 4
    assert flops(convolve, x, w) == {"float32": one}
    half = functools.partial(convolve, stride=2)
    assert flops(half, x, w) == {"float32": one / 4}
    for stride, forward in ((1, one), (2, one / 4)):
        step = functools.partial(convolve, stride=stride)
        gradient = jax.grad(lambda x, w, s=step: s(x, w).sum(), argnums=(0, 1))
        assert flops(gradient, x, w) == {"float32": 2 * forward}


def test_flops_of_branches_and_open_loops():
    def branch(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x)

    def loop(x, w):
        return jax.lax.while_loop(lambda h: h[0, 0] > 0, lambda h: h @ w, x)

    args = Struct((8, 16), jnp.float32), Struct((16, 16), jnp.float32)
    assert flops(branch, *args) == {"float32": 2 * 2 * 8 * 16 * 16}
    work = count_work(jax.make_jaxpr(loop)(*args))
    assert (work.flops, work.open_loops) == ({"float32": 2 * 8 * 16 * 16}, 1)


@pytest.fixture(scope="module")
def stacked():
    """Plans of the scanned stack: plain, with remat, and that in 16 bits."""
    half = jnp.bfloat16
    return [
        train.plan(layers(False), *stack_of()),
        train.plan(layers(True), *stack_of()),
        train.plan(layers(True, half), *stack_of(half)),
    ]


def test_bytes_are_the_compilers(stacked):
    """Two arrays a layer wait for the backward pass, or with remat one."""
    plain, remat, _ = stacked
    activation = 4 * 4096 * 32
    assert 2 * 10 <= plain.temporary / activation < 2 * 10 + 6
    assert 10 <= remat.temporary / activation < 10 + 6
    key = 2 * 4
    assert remat.arguments == 4 * (10 * 32 * 32 + 4096 * 32) + key
    assert remat.outputs == 4 * 10 * 32 * 32
    assert remat.constants == 4 * 32
    held = remat.arguments + remat.outputs + remat.constants
    assert (remat.aliased, remat.total) == (0, held + remat.temporary)


def test_16_bits_take_half_the_room_of_32(stacked):
    """Though the compiler that is asked makes float32 of them."""
    _, whole, half = stacked
    assert half.arguments == (whole.arguments + 8) / 2
    # half of what waits for the backward pass; noise is drawn in float32 in both
    saved = whole.temporary - half.temporary
    assert saved == pytest.approx(10 * 2 * 4096 * 32, rel=0.01)
    assert set(half.flops) == {"bfloat16"}


def test_a_plan_for_a_device_with_fused_attention_makes_no_scores():
    shape = (2, 4096, 8, 64)
    q = Struct(shape, jnp.bfloat16)
    inner = jax.jit(attention)
    gradient = jax.grad(lambda *a: inner(*a).astype(jnp.float32).sum(), (0, 1, 2))
    scores = 2 * 8 * 4096 * 4096
    products = 2 * scores * 64
    there = train.plan(gradient, q, q, q, device="h100")
    assert there.temporary < scores / 2
    # two products forward and five backward, like a fused kernel
    assert there.flops == {"bfloat16": 7 * products}
    assert there.seconds("h100") == 7 * products / 989.4e12
    # products of tiles move nothing beyond the chip
    assert there.moved == there.arguments + there.outputs
    # traces made for the plan are not taken for others
    here = flops(gradient, q, q, q)
    assert sum(here.values()) == 6 * products


def decoder_like(tokens=512):
    """(step, shapes): AdamW on a scanned stack, state, batch and key."""
    optimizer = train.make_optimizer(train.OptimizerConfig())

    def loss(params, batch, keys):
        def body(h, w):
            return jnp.tanh(h @ w["up"]) @ w["down"], None

        h = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), batch, params)[0]
        return jnp.square(h).mean(-1), {}

    def init():
        params = {"up": jnp.zeros((4, 128, 256)), "down": jnp.zeros((4, 256, 128))}
        return train.create_state(params, optimizer)

    batch = Struct((tokens, 128), jnp.float32)
    return train.make_train_step(loss, optimizer), (jax.eval_shape(init), batch, KEY)


PARAMETERS = 4 * 2 * 128 * 256


@pytest.fixture(scope="module")
def cut():
    """A train step on one device and on eight."""
    step, args = decoder_like()
    on = functools.partial(train.plan, step, *args, donate_argnums=0)
    return on(), on(mesh=train.abstract_mesh(fsdp=8))


def test_a_mesh_divides_state_batch_and_products(cut):
    one, eight = cut
    assert one.mesh == {} and one.devices == 1
    assert eight.mesh == {"data": 1, "fsdp": 8, "tensor": 1} and eight.devices == 8
    assert eight.flops["float32"] == one.flops["float32"] / 8
    for plan, ways in ((one, 1), (eight, 8)):
        # parameters and two moments, float32, written over in place; a few counters
        assert 0 <= plan.aliased - 12 * PARAMETERS // ways < 64
        assert plan.arguments - plan.aliased - 512 * 128 * 4 // ways < 64
        assert 0 <= plan.outputs - plan.aliased < 64
    assert one.temporary / 8 <= eight.temporary < one.temporary / 2


def test_the_smallest_mesh_is_found_and_named(cut):
    one, eight = cut
    # with a margin of 10 % eight devices fit just so, and four do not
    small = train.Device(
        name="small", memory=eight.total / 0.89, bandwidth=1e9, peak={"float32": 1e9}
    )
    with pytest.raises(ValueError) as refused:
        train.check_fits(one, small)
    assert (
        f"needs {one.total / 1e9:.4g} GB a device on the mesh of one device, but small "
        f"has {0.9 * small.memory / 1e9:.4g} GB"
    ) in str(refused.value)
    assert (
        f"The smallest mesh that fits is data=1 x fsdp=8 x tensor=1 (8 devices, "
        f"{eight.total / 1e9:.4g} GB each)"
    ) in str(refused.value)
    train.check_fits(eight, small)
    # what arguments take alone needs no compiler
    tiny = train.Device(name="tiny", memory=1e5, bandwidth=1, peak={"float32": 1})
    with pytest.raises(ValueError, match="no mesh of up to 1024 x tiny holds the step"):
        train.check_fits(eight, tiny)
    with pytest.raises(ValueError, match="margin=1 is outside"):
        train.check_fits(eight, small, margin=1)


def test_rows_say_what_a_call_takes(stacked):
    plan = stacked[2]
    rows = {r["a device and call"]: r["value"] for r in plan.rows("h100")}
    assert rows["total, GB"] == plan.total / 1e9
    assert rows["bfloat16 TFLOP"] == plan.flops["bfloat16"] / 1e12
    assert rows["memory of h100, GB"] == 80
    assert rows["roofline, s"] == plan.moved / 3.35e12  # bound by memory
    open_ended = dataclasses.replace(plan, open_loops=1)
    assert "loops of unknown length" in text_table(open_ended.rows())


def test_bad_inputs(as_shipped):
    x = Struct((6, 6), jnp.float32)
    mesh = train.abstract_mesh(4)
    with pytest.raises(ValueError, match="a batch of 6 does not divide over 4"):
        train.plan(dot, x, x, mesh=mesh)
    with pytest.raises(ValueError, match="unknown device 'h10'.*'h100'"):
        train.plan(dot, x, x, device="h10")
    with pytest.raises(ValueError, match="donate_argnums has 2, but there are 2"):
        train.plan(dot, x, x, donate_argnums=2)
    with pytest.raises(ValueError, match="fsdp=0 must be at least 1"):
        train.abstract_mesh(fsdp=0)
    with pytest.raises(ValueError, match="'float32' must be there"):
        train.Device(name="x", memory=1, bandwidth=1, peak={"bfloat16": 1})
    with pytest.raises(ValueError, match="memory=0 is outside"):
        train.Device(name="x", memory=0, bandwidth=1, peak={"float32": 1})
