"""U-Net: size, wiring by other layers, conditions, precision, bad inputs.

What it shares with every network stands in test_contract.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from model_helpers import close, draw, flax_attention, flax_dense, jitted, shapes_of
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax.core import trees
from tmdjax.models import UNet, build, functional, init_params, timestep_embedding
from tmdjax.models.convolution import Convolution

BATCH, HEIGHT, WIDTH, CHANNEL = 3, 8, 4, 2
SMALL = dict(width=8, multipliers=(1, 2), blocks=1, attention_levels=(1,), heads=2)


def small(num_classes=4, **options):
    return UNet(num_classes=num_classes, **(SMALL | options))


def inputs():
    x = draw(BATCH, HEIGHT, WIDTH, CHANNEL)
    return x, jnp.array([0.1, 0.5, 1.0]), jnp.array([0, 3, 4])


@functools.cache
def initial():
    return init_params(small(), jax.random.key(0), *inputs())


def count_by_hand(module, channels):
    """Parameters from the paper's list of layers, each by its own formula."""
    width, blocks = module.width, module.blocks
    embedding = 4 * width
    sides = [width * m for m in module.multipliers]

    def dense(fan_in, out):
        return (fan_in + 1) * out

    def convolution(fan_in, out):
        return (9 * fan_in + 1) * out

    def residual(fan_in, out, attention):
        total = 2 * fan_in + convolution(fan_in, out) + dense(embedding, 2 * out)
        total += 2 * out + convolution(out, out)
        total += dense(fan_in, out) if fan_in != out else 0
        return total + (2 * out + 4 * dense(out, out) if attention else 0)

    total = dense(256, embedding) + dense(embedding, embedding)
    total += (module.num_classes + 1) * embedding
    total += convolution(channels, width)
    now, skips = width, [width]
    for level, side in enumerate(sides):
        for _ in range(blocks):
            total += residual(now, side, level in module.attention_levels)
            now = side
            skips.append(now)
        if level < len(sides) - 1:
            total += convolution(now, now)
            skips.append(now)
    total += residual(now, now, True) + residual(now, now, False)
    for level in range(len(sides) - 1, -1, -1):
        for _ in range(blocks + 1):
            attention = level in module.attention_levels
            total += residual(now + skips.pop(), sides[level], attention)
            now = sides[level]
        total += convolution(now, now) if level else 0
    assert not skips
    return total + 2 * now + convolution(now, channels)


@pytest.mark.parametrize(
    ("options", "millions"),
    [
        (dict(), 7.0),
        (dict(blocks=1), 4.8),
        (dict(width=96, multipliers=(1, 2, 2, 2), attention_levels=(2,)), 21.6),
        (dict(width=32, multipliers=(1,), attention_levels=()), 0.2),
    ],
)
def test_parameters_are_those_counted_by_hand(options, millions):
    module = UNet(num_classes=10, **options)
    inputs = jnp.zeros((2, 32, 32, 3)), jnp.zeros(2), jnp.zeros(2, int)
    params = shapes_of(module, *inputs)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert trees.count(params) == count_by_hand(module, 3)
    assert trees.count(params) / 1e6 == pytest.approx(millions, abs=0.1)
    velocity = jax.eval_shape(functional(module), params, *inputs)
    assert velocity.shape == (2, 32, 32, 3) and velocity.dtype == jnp.float32


def test_residual_branches_start_at_zero_and_the_others_do_not():
    leaves = trees.flatten(jax.device_get(initial()))
    zero = {k for k, leaf in leaves.items() if not np.any(leaf)}
    kernels = {k for k in leaves if k.endswith("kernel")}
    silent = ("convolution_2/kernel", "attention/out/kernel")
    silent = {k for k in kernels if k.endswith(silent)} | {"output/kernel"}
    assert zero & kernels == silent
    assert len(zero & kernels) == 1 + 8 + 4


def peer(params, x, t, cond):
    """The network ``small()`` written out from flax's own layers."""

    def convolution(node, x, stride=1):
        layer = nn.Conv(node["kernel"].shape[3], (3, 3), stride, padding=1)
        return layer.apply({"params": node}, x)

    def norm(node, x):
        groups = {8: 2, 16: 4, 24: 2, 32: 8}[x.shape[-1]]
        return nn.GroupNorm(groups, epsilon=1e-5).apply({"params": node}, x)

    def attend(node, x):
        tokens = x.reshape(len(x), -1, 16)
        return flax_attention(node, tokens, tokens).reshape(x.shape)

    def block(name, h):
        node = params[name]
        scale, shift = jnp.split(flax_dense(node["modulation"], nn.silu(c)), 2, -1)
        y = convolution(node["convolution_1"], nn.silu(norm(node["norm_1"], h)))
        y = norm(node["norm_2"], y) * (1 + scale[:, None, None])
        y = convolution(node["convolution_2"], nn.silu(y + shift[:, None, None]))
        h = y + (flax_dense(node["shortcut"], h) if "shortcut" in node else h)
        if "attention" in node:
            h = h + attend(node["attention"], norm(node["attention_norm"], h))
        return h

    def join(h, skip):
        return jnp.concatenate([h, skip], -1)

    time = params["time_embedding"]
    c = flax_dense(time["hidden"], timestep_embedding(t, 256))
    classes = params["class_embedding"]["embedding"]
    c = flax_dense(time["out"], nn.silu(c)) + classes[cond]
    a = convolution(params["input"], x)
    b = block("down_0_0", a)
    d = convolution(params["downsample_1"], b, 2)
    e = block("down_1_0", d)
    h = block("middle_1", block("middle_0", e))
    h = block("up_1_1", join(block("up_1_0", join(h, e)), d))
    h = jax.image.resize(h, (*b.shape[:3], h.shape[-1]), "nearest")
    h = convolution(params["upsample_1"], h)
    h = block("up_0_1", join(block("up_0_0", join(h, b)), a))
    return convolution(params["output"], nn.silu(norm(params["output_norm"], h)))


def test_network_equals_flax_layers(stir):
    params = stir(initial())
    got = jitted(small())(params, *inputs())
    assert np.abs(got).max() > 0.5
    assert_allclose(got, jax.jit(peer)(params, *inputs()), rtol=1e-4, atol=1e-4)


def test_unconditional_differs_by_the_class_table_alone(stir):
    params, (x, t, _) = stir(initial()), inputs()
    table = params.pop("class_embedding")["embedding"]
    shapes = shapes_of(small(None), x, t)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    blank = {"class_embedding": {"embedding": jnp.zeros_like(table)}}
    want = jitted(small())(params | blank, x, t, None)
    close(jitted(small(None))(params, x, t), want)


def test_every_pixel_sees_every_other(stir):
    """The middle attends, whatever the levels that do."""
    module, (x, t, cond) = small(attention_levels=()), inputs()
    shapes = shapes_of(module, x, t, cond)
    names = [name.split("/") for name in trees.flatten(shapes)]
    assert {name[0] for name in names if "attention" in name} == {"middle_0"}
    # Parameters of attention that this network lacks are not read.
    params = stir(initial())
    apply_fn = functional(module)
    corner = jax.grad(lambda x: apply_fn(params, x, t, cond)[0, 0, 0, 0])
    gradient = jax.jit(corner)(x)
    assert np.abs(gradient[0]).max(-1).min() > 0
    assert_array_equal(gradient[1:], 0.0)


@pytest.mark.parametrize("size", [(28, 28), (4, 12)])
def test_sides_that_halve_twice(size):
    module = UNet(width=8, blocks=1, heads=2)
    x, t = jax.ShapeDtypeStruct((2, *size, 1), jnp.float32), jnp.float32(0.5)
    params = shapes_of(module, x, t)
    assert jax.eval_shape(functional(module), params, x, t).shape == (2, *size, 1)


def test_convolutions_are_unrolled_and_recomputed_once(equations):
    """A loop around a convolution's gradient is what the CPU runs slowly."""
    arguments = initial(), *inputs()

    def gradient(**options):
        apply_fn = functional(small(**options))
        return jax.grad(lambda *inputs: jnp.square(apply_fn(*inputs)).sum())

    fns = functional(small()), gradient(remat=False), gradient()
    forward, plain, rematted = (equations(fn, *arguments) for fn in fns)
    # Eight blocks of two; input, down, up and output.
    assert forward["conv_general_dilated"] == 8 * 2 + 4
    # Backward each has two, but the first has no input to pass a gradient to.
    assert plain["conv_general_dilated"] == 3 * 20 - 1
    # The last convolution of a block need not be run again where nothing in the
    # block follows it.
    assert 8 <= rematted["conv_general_dilated"] - 59 <= 16
    for counted in (forward, plain, rematted):
        assert not {"scan", "while"} & set(counted)
    assert not any("remat" in name or "checkpoint" in name for name in plain)


@pytest.mark.parametrize(
    ("recipe", "dtype"), [("fp32", "float32"), ("bf16", "bfloat16")]
)
def test_products_run_in_the_compute_dtype(recipe, dtype):
    arguments = initial(), *inputs()
    apply_fn = functional(small(recipe=recipe, remat=False))
    equations = jax.make_jaxpr(apply_fn)(*arguments).jaxpr.eqns
    convolutions = [e for e in equations if e.primitive.name == "conv_general_dilated"]
    assert len(convolutions) == 20
    for equation in convolutions:
        assert {v.aval.dtype for v in equation.invars} == {jnp.dtype(dtype)}
        assert ("HIGHEST" in str(equation.params["precision"])) is (recipe == "fp32")


def test_bfloat16_gradients_over_many_pixels():
    """4096 pixels a sum: a bfloat16 sum over them stalls at 256."""
    module = Convolution(4, (3, 3), "bf16")
    x = jnp.ones((16, 16, 16, 2))
    params = init_params(module, jax.random.key(0), x)
    gradient = jax.jit(jax.grad(lambda p: functional(module)(p, x).sum()))(params)
    assert_array_equal(gradient["bias"], 4096.0)
    assert_array_equal(gradient["kernel"][1, 1], 4096.0)
    # The padding: an outer row or column of the window misses 16 pixels an image.
    assert_array_equal(gradient["kernel"][0, 1], 4096.0 - 16 * 16)


def test_lists_build_the_same_module():
    spec = dict(SMALL, name="unet", multipliers=[1, 2], attention_levels=[1])
    module = build(spec | {"num_classes": 4})
    assert module == small() and hash(module) == hash(small())
    assert module.multipliers == (1, 2) and module.attention_levels == (1,)
    assert module.clone(blocks=2).multipliers == (1, 2)


def test_bad_attributes(refused):
    refused("width=6 must be a multiple of 4", small, width=6)
    refused("heads=3 must divide the 16 channels of level 1", small, heads=3)
    first = dict(heads=16, attention_levels=(0,))
    refused("heads=16 must divide the 8 channels of level 0", small, **first)
    refused(r"multipliers=\(\) is empty", small, multipliers=())
    refused(r"multipliers\[1\]=0 must be at least 1", small, multipliers=(1, 0))
    refused(r"holds \[2\], .*the levels 0\.\.1", small, attention_levels=(0, 2))
    refused(r"levels\[0\]=-1 must be at least 0", small, attention_levels=(-1,))
    for name, value, message in (
        ("width", "32", "width='32' is of type str; give an integer"),
        ("heads", True, "heads=True is of type bool"),
        ("multipliers", 2, "multipliers=2 is of type int; give a tuple or list"),
        ("multipliers", "12", "multipliers='12' is of type str; give a tuple"),
        ("multipliers", (1, 1.5), r"multipliers\[1\]=1\.5 is of type float"),
        ("attention_levels", {1}, "attention_levels=.1. is of type set; give a"),
    ):
        refused(message, small, error=TypeError, **{name: value})


def test_bad_inputs(refused):
    x, t, cond = inputs()
    apply_fn = functools.partial(functional(small()), initial())
    message = r"sides 7 x 4, .* multiples of 2\^\(levels - 1\) = 2: give fewer"
    refused(message, apply_fn, x[:, 1:], t, cond)
    refused("give images", apply_fn, x[0], t, cond)
    refused("sides 8 x 5", apply_fn, jnp.zeros((3, 8, 5, 2)), t, cond)
    refused("sides 0 x 4", apply_fn, x[:, :0], t, cond)
    refused(r"1 channel.* were made for 2", apply_fn, x[..., :1], t, cond)
