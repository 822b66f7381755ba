"""U-Net: size, wiring by other layers, conditions, precision, bad inputs.

What it shares with every network stands in test_contract.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tmdjax.core import trees
from tmdjax.models import UNet, build, functional, init_params, timestep_embedding
from tmdjax.models.unet import _Convolution

BATCH, HEIGHT, WIDTH, CHANNEL = 3, 8, 4, 2
SMALL = dict(width=8, multipliers=(1, 2), blocks=1, attention_levels=(1,), heads=2)


def small(num_classes=4, **options):
    return UNet(num_classes=num_classes, **(SMALL | options))


def draw():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(BATCH, HEIGHT, WIDTH, CHANNEL)), jnp.float32)
    return x, jnp.array([0.1, 0.5, 1.0]), jnp.array([0, 3, 4])


@functools.cache
def initial():
    return init_params(small(), jax.random.key(0), *draw())


@functools.cache
def jitted(module):
    return jax.jit(functional(module))


@functools.cache
def value_and_gradient(**options):
    """Of mean (v - target)^2 to the parameters."""
    apply_fn = functional(small(**options))
    return jax.jit(
        jax.value_and_grad(
            lambda params, inputs, target: jnp.square(
                apply_fn(params, *inputs) - target
            ).mean()
        )
    )


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(a, b, atol=atol)


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
    if module.num_classes is not None:
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
        (dict(width=32, multipliers=(1,), attention_levels=(), num_classes=None), 0.2),
    ],
)
def test_parameters_are_those_counted_by_hand(options, millions):
    module = UNet(**(dict(num_classes=10) | options))
    shaped = jax.ShapeDtypeStruct
    inputs = [shaped((2, 32, 32, 3), jnp.float32), shaped((2,), jnp.float32)]
    if module.num_classes is not None:
        inputs.append(shaped((2,), jnp.int32))
    params = jax.eval_shape(
        lambda key: init_params(module, key, *inputs), jax.random.key(0)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert trees.count(params) == count_by_hand(module, 3)
    assert trees.count(params) / 1e6 == pytest.approx(millions, abs=0.1)
    velocity = jax.eval_shape(functional(module), params, *inputs)
    assert velocity.shape == (2, 32, 32, 3) and velocity.dtype == jnp.float32


def test_residual_branches_start_at_zero_and_the_others_do_not():
    zero = {k for k, leaf in trees.flatten(initial()).items() if not np.any(leaf)}
    kernels = {k for k in trees.flatten(initial()) if k.endswith("kernel")}
    silent = ("convolution_2/kernel", "attention/out/kernel")
    assert zero & kernels == {k for k in kernels if k.endswith(silent)} | {
        "output/kernel"
    }
    assert len(zero & kernels) == 1 + 8 + 4


def peer(params, x, t, cond):
    """The network ``small()`` written out from flax's own layers."""

    def dense(node, x):
        return nn.Dense(node["kernel"].shape[1]).apply({"params": node}, x)

    def convolution(node, x, stride=1):
        layer = nn.Conv(node["kernel"].shape[3], (3, 3), stride, padding=1)
        return layer.apply({"params": node}, x)

    def norm(node, x):
        groups = {8: 2, 16: 4, 24: 2, 32: 8}[x.shape[-1]]
        return nn.GroupNorm(groups, epsilon=1e-5).apply({"params": node}, x)

    def attend(node, x):
        inner = {
            part: {
                "kernel": node[part]["kernel"].reshape(16, 2, 8),
                "bias": node[part]["bias"].reshape(2, 8),
            }
            for part in ("query", "key", "value")
        }
        inner["out"] = {
            "kernel": node["out"]["kernel"].reshape(2, 8, 16),
            "bias": node["out"]["bias"],
        }
        tokens = x.reshape(len(x), -1, 16)
        y = nn.MultiHeadDotProductAttention(2).apply({"params": inner}, tokens)
        return y.reshape(x.shape)

    def block(name, h):
        node = params[name]
        scale, shift = jnp.split(dense(node["modulation"], nn.silu(c)), 2, -1)
        y = convolution(node["convolution_1"], nn.silu(norm(node["norm_1"], h)))
        y = norm(node["norm_2"], y) * (1 + scale[:, None, None])
        y = convolution(node["convolution_2"], nn.silu(y + shift[:, None, None]))
        h = y + (dense(node["shortcut"], h) if "shortcut" in node else h)
        if "attention" in node:
            h = h + attend(node["attention"], norm(node["attention_norm"], h))
        return h

    def join(h, skip):
        return jnp.concatenate([h, skip], -1)

    time = params["time_embedding"]
    c = dense(time["hidden"], timestep_embedding(t, 256))
    c = dense(time["out"], nn.silu(c)) + params["class_embedding"]["embedding"][cond]
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
    got = jitted(small())(params, *draw())
    assert np.abs(got).max() > 0.5
    np.testing.assert_allclose(
        got, jax.jit(peer)(params, *draw()), rtol=1e-4, atol=1e-4
    )


def test_null_class_is_no_condition(stir):
    params, (x, t, cond) = stir(initial()), draw()
    apply_fn = jitted(small())
    dropped = apply_fn(params, x, t, None)
    np.testing.assert_array_equal(apply_fn(params, x, t, jnp.full(3, 4)), dropped)
    given = apply_fn(params, x, t, cond)
    close(given[2], dropped[2])  # the last row asks for the null class
    assert np.abs(given[0] - dropped[0]).max() > 1e-3


def test_unconditional_differs_by_the_class_table_alone(stir):
    params, (x, t, _) = stir(initial()), draw()
    table = params.pop("class_embedding")["embedding"]
    shapes = jax.eval_shape(lambda: init_params(small(None), jax.random.key(0), x, t))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    blank = {"embedding": jnp.zeros_like(table)}
    close(
        jitted(small(None))(params, x, t),
        jitted(small())(params | {"class_embedding": blank}, x, t, None),
    )


def test_every_pixel_sees_every_other(stir):
    """The middle attends, whatever the levels that do."""
    module, (x, t, cond) = small(attention_levels=()), draw()
    shapes = jax.eval_shape(lambda: init_params(module, jax.random.key(0), x, t, cond))
    names = [name.split("/") for name in trees.flatten(shapes)]
    assert {name[0] for name in names if "attention" in name} == {"middle_0"}
    # Parameters of attention that this network lacks are not read.
    params = stir(initial())
    gradient = jax.jit(
        jax.grad(lambda x: functional(module)(params, x, t, cond)[0, 0, 0, 0])
    )(x)
    assert np.abs(gradient[0]).max(-1).min() > 0
    np.testing.assert_array_equal(gradient[1:], 0.0)


@pytest.mark.parametrize("size", [(28, 28), (4, 12)])
def test_sides_that_halve_twice(size):
    module = UNet(width=8, blocks=1, heads=2)
    x, t = jax.ShapeDtypeStruct((2, *size, 1), jnp.float32), jnp.float32(0.5)
    params = jax.eval_shape(lambda: init_params(module, jax.random.key(0), x, t))
    assert jax.eval_shape(functional(module), params, x, t).shape == (2, *size, 1)


def test_convolutions_are_unrolled_and_recomputed_once(equations):
    """A loop around a convolution's gradient is what the CPU runs slowly."""
    arguments = jax.eval_shape(lambda: (initial(), draw(), 0.0))
    forward = equations(functional(small()), arguments[0], *arguments[1])
    plain = equations(value_and_gradient(remat=False), *arguments)
    rematted = equations(value_and_gradient(), *arguments)
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
    ("recipe", "dtype", "precise"),
    [("fp32", jnp.float32, True), ("bf16", jnp.bfloat16, False)],
)
def test_products_run_in_the_compute_dtype(recipe, dtype, precise):
    params, inputs = jax.eval_shape(lambda: (initial(), draw()))
    apply_fn = functional(small(recipe=recipe, remat=False))
    convolutions = [
        equation
        for equation in jax.make_jaxpr(apply_fn)(params, *inputs).jaxpr.eqns
        if equation.primitive.name == "conv_general_dilated"
    ]
    assert len(convolutions) == 20
    for equation in convolutions:
        assert {v.aval.dtype for v in equation.invars} == {jnp.dtype(dtype)}
        assert ("HIGHEST" in str(equation.params["precision"])) is precise


def test_bfloat16_gradients_over_many_pixels():
    """4096 pixels a sum: a bfloat16 sum over them stalls at 256."""
    module = _Convolution(4, "bf16")
    x = jnp.ones((16, 16, 16, 2))
    params = init_params(module, jax.random.key(0), x)
    gradient = jax.jit(jax.grad(lambda p: functional(module)(p, x).sum()))(params)
    np.testing.assert_array_equal(gradient["bias"], 4096.0)
    np.testing.assert_array_equal(gradient["kernel"][1, 1], 4096.0)
    # The padding: an outer row or column of the window misses 16 pixels an image.
    np.testing.assert_array_equal(gradient["kernel"][0, 1], 4096.0 - 16 * 16)


def test_lists_build_the_same_module():
    spec = dict(SMALL, name="unet", multipliers=[1, 2], attention_levels=[1])
    module = build(spec | {"num_classes": 4})
    assert module == small() and hash(module) == hash(small())
    assert module.multipliers == (1, 2) and module.attention_levels == (1,)
    assert module.clone(blocks=2).multipliers == (1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(width=0), "width=0 must be at least 1"),
        (dict(width=6), "width=6 must be a multiple of 4"),
        (dict(blocks=0), "blocks=0 must be at least 1"),
        (dict(heads=0), "heads=0 must be at least 1"),
        (dict(heads=3), "heads=3 must divide the 16 channels of level 1"),
        (
            dict(heads=16, attention_levels=(0,)),
            "heads=16 must divide the 8 channels of level 0",
        ),
        (dict(num_classes=0), "num_classes=0 must be at least 1"),
        (dict(multipliers=()), r"multipliers=\(\) is empty"),
        (dict(multipliers=(1, 0)), r"multipliers\[1\]=0 must be at least 1"),
        (
            dict(attention_levels=(0, 2)),
            r"attention_levels holds \[2\], .*the levels 0\.\.1",
        ),
        (dict(attention_levels=(-1,)), r"attention_levels\[0\]=-1 must be at least 0"),
        (dict(recipe="fp23"), "unknown GEMM recipe 'fp23'.*Did you mean"),
        (dict(attention_implementation="flash"), "is not one of 'auto', 'xla'"),
    ],
)
def test_bad_attributes(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(width="32"), "width='32' is of type str; give an integer"),
        (dict(blocks=2.0), r"blocks=2\.0 is of type float"),
        (dict(heads=True), "heads=True is of type bool"),
        (dict(num_classes=4.0), r"num_classes=4\.0 is of type float"),
        (dict(multipliers=2), "multipliers=2 is of type int; give a tuple or list"),
        (dict(multipliers="12"), "multipliers='12' is of type str; give a tuple"),
        (dict(multipliers=(1, 1.5)), r"multipliers\[1\]=1\.5 is of type float"),
        (dict(attention_levels={1}), "attention_levels=.1. is of type set; give a"),
    ],
)
def test_attributes_of_the_wrong_type(as_shipped, options, message):
    with pytest.raises(TypeError, match=message):
        small(**options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=jnp.zeros((3, 8, 4))), ValueError, "give images"),
        (
            dict(x=jnp.zeros((3, 7, 4, 2))),
            ValueError,
            r"sides 7 x 4, which must be multiples of 2\^\(levels - 1\) = 2: give fewer",
        ),
        (dict(x=jnp.zeros((3, 8, 5, 2))), ValueError, "sides 8 x 5"),
        (dict(x=jnp.zeros((3, 0, 4, 2))), ValueError, "sides 0 x 4"),
        (dict(x=jnp.zeros((3, 8, 4, 1))), ValueError, r"1 channel.* were made for 2"),
        (dict(t=jnp.zeros(2)), ValueError, "t has shape .* one time a sample"),
        (dict(t=1.5), ValueError, r"t has 1 value\(s\) outside \[0, 1\]"),
        (dict(cond=jnp.array([0, 1, 5])), ValueError, r"=5 is outside \[0, 4\]"),
        (dict(cond=jnp.zeros(2, int)), ValueError, "must be the batch, 3"),
        (dict(cond=jnp.zeros((3, 1), int)), ValueError, "give one class a sample"),
        (dict(cond=jnp.ones(3)), TypeError, "integer array of classes"),
        (dict(cond={"tokens": 0}), TypeError, "integer array of classes"),
    ],
)
def test_bad_inputs(as_shipped, change, error, message):
    x, t, cond = draw()
    inputs = dict(x=x, t=t, cond=cond) | change
    with pytest.raises(error, match=message):
        functional(small())(initial(), *inputs.values())


def test_an_unconditional_network_takes_no_class(as_shipped):
    with pytest.raises(ValueError, match="built unconditional but got cond"):
        functional(small(None))(initial(), *draw())
