"""8-bit quantisers and products; numbers in names are invariants of Jet-RL's sheet."""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from checks import same
from flax import linen as nn
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import models, quant
from tmdjax.models import layers
from tmdjax.quant import Quantised, fp8_recipe, fp8_recipes, quantise, self_test
from tmdjax.train import count_flops

SHAPE = (2, 150, 200)  # groups of 128 are ragged along both axes
TILES = {
    "tensor": SHAPE[1:],
    "row": (1, SHAPE[2]),
    "column": (SHAPE[1], 1),
    "1x128": (1, 128),
    "128x1": (128, 1),
    "128x128": (128, 128),
}
CASES = [
    *((name, "float8_e4m3fn", "fp32") for name in TILES),
    ("1x128", "float8_e4m3fn", "pow2"),
    ("128x128", "float8_e5m2", "fp32"),
]
UNIT = {"float8_e4m3fn": (2**-4, 2**-6), "float8_e5m2": (2**-3, 2**-14)}
LARGEST = {"float8_e4m3fn": 448, "float8_e5m2": 57344}


@functools.cache
def program(granularity, dtype="float8_e4m3fn", scale="fp32"):
    """Codes, scales and dequantised numbers of an array, on the host."""

    @jax.jit
    def quantised(x):
        q = quantise(x, granularity, dtype, scale=scale)
        return q.values, q.scale, q.dequantise()

    return lambda x: jax.device_get(quantised(jnp.float32(x)))


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request):
    return request.param


def drawn(*shape, seed=0):
    random = np.random.default_rng(seed)
    return np.float32(random.normal(size=shape) * 2.0 ** random.integers(-6, 3, shape))


def bits(values):
    return values.view(np.uint8)


def groups(granularity, places=SHAPE):
    """The number of its group for each element, [stack, row, column]."""
    height, width = TILES[granularity]
    stack, row, column = np.indices(places)
    return (stack * 1000 + row // height) * 1000 + column // width


def test_1_codes_are_finite_of_one_sign_and_zero_stays_zero(case):
    _, dtype, _ = case
    x = drawn(*SHAPE)
    x[0, 0, 0], x[1, 140, 190], x[0, 7, 3] = 1e30, -3e38, 1e-30
    values, scale, _ = program(*case)(x)
    assert (np.abs(np.float32(values)) <= LARGEST[dtype]).all()
    assert np.isfinite(scale).all() and (scale > 0).all()
    opposite = program(*case)(-x)
    assert_array_equal(np.float32(opposite[0]), -np.float32(values))
    assert_array_equal(opposite[1], scale)
    nothing = program(*case)(0 * x)
    assert not np.float32(nothing[0]).any() and (nothing[1] > 0).all()


def test_1_what_is_quantised_quantises_to_itself(case):
    values, scale, numbers = program(*case)(drawn(*SHAPE))
    again = program(*case)(numbers)
    if case[2] == "fp32":
        assert_array_equal(bits(again[0]), bits(values))
        assert np.abs(np.float32(values)).max() == LARGEST[case[1]]
        assert_allclose(again[1], scale, rtol=2e-7)
    else:  # a largest magnitude that is rounded down to half the range halves the scale
        assert_array_equal(again[2], numbers)


def test_1_powers_of_two_move_the_scale_alone(case):
    x = drawn(*SHAPE) + 1  # no group is below the smallest magnitude
    values, scale, _ = program(*case)(x)
    for factor in (2.0**-5, 2.0**60):
        moved = program(*case)(factor * x)
        assert_array_equal(bits(moved[0]), bits(values))
        assert_array_equal(moved[1], factor * scale)


def test_1_relative_error_of_normal_numbers(case):
    granularity, dtype, _ = case
    x = drawn(*SHAPE)
    _, scale, numbers = program(*case)(x)
    unit, smallest = UNIT[dtype]
    _, number = np.unique(groups(granularity), return_inverse=True)
    error, each = np.abs(numbers - x), scale.ravel()[number.reshape(SHAPE)]
    normal = np.abs(x) >= each * smallest
    assert normal.mean() > 0.5
    assert (error <= unit * np.abs(x) * (1 + 1e-6))[normal].all()
    assert (error <= unit * smallest * each * (1 + 1e-6))[~normal].all()
    assert error.max() > 0.5 * unit * np.abs(x[error == error.max()]).min()


def test_1_a_group_sees_its_own_elements_alone(case):
    number = groups(case[0])
    x, at = drawn(*SHAPE), (1, 140, 190)
    own = number == number[at]
    before = program(*case)(x)
    x[at] = 1e3
    after = program(*case)(x)
    assert_array_equal(bits(after[0])[~own], bits(before[0])[~own])
    assert (after[1] != before[1]).sum() == 1
    for bad in (np.nan, np.inf):  # and what is not finite is no number afterwards
        x[at] = bad
        assert_array_equal(np.isnan(program(*case)(x)[2]), own)


def test_12_scales_are_the_next_powers_of_two():
    x = drawn(*SHAPE)
    x[0, 0, :128] = 448  # the scale is a power of two already
    exact, rounded = (program("1x128", scale=s)(x)[1] for s in ("fp32", "pow2"))
    assert (np.frexp(rounded)[0] == 0.5).all()
    assert (rounded >= exact).all() and (rounded < 2 * exact).all()
    assert rounded[0, 0, 0] == exact[0, 0, 0] == 1


def test_2_transposes_commute_and_3_padding_is_by_zeros():
    x = jnp.asarray(drawn(*SHAPE))
    pairs = {"1x128": "128x1", "128x128": "128x128", "row": "column"}

    @jax.jit
    def each(x):
        padded = jnp.pad(x, ((0, 0), (0, 106), (0, 56)))
        return {
            granularity: (
                quantise(x, granularity),
                quantise(x.mT, other).transpose(),
                quantise(padded, granularity),
            )
            for granularity, other in pairs.items()
        }

    for plain, turned, padded in each(x).values():
        same(plain, turned)
        assert plain.granularity == turned.granularity
        assert_array_equal(padded.values[:, : SHAPE[1], : SHAPE[2]], plain.values)
        rows, columns = plain.scale.shape[1:]
        assert_array_equal(padded.scale[:, :rows, :columns], plain.scale)


# of x, w (y = x w), dy, w (dx = dy wT), x, dy (dw = xT dy)
READ = {
    "tensor": ("tensor",) * 6,
    "rowwise": ("row", "column", "row", "row", "column", "column"),
    "block": ("1x128", "128x128", "1x128", "128x128", "128x1", "128x1"),
}


def products(recipe, x, w, dy, remat=lambda layer: layer):
    """Y, and the gradients to x and w."""
    y, pull = jax.vjp(remat(functools.partial(quant.linear, recipe=recipe)), x, w)
    return y, *pull(dy)


@pytest.mark.parametrize("scaling", READ)
def test_4_and_5_products_are_of_dequantised_operands(scaling):
    recipe = fp8_recipe(
        "exact", scaling, dtype=jnp.float32, gradient_dtype="float8_e5m2"
    )
    x, w, dy = drawn(3, 50, 200), drawn(200, 136, seed=1), drawn(3, 50, 136, seed=2)

    @jax.jit
    def operands(x, w, dy):
        def back(x, granularity, dtype="float8_e4m3fn"):
            return quantise(x, granularity, dtype).dequantise()

        of_x, of_w, of_dy, w_again, x_again, dy_again = READ[scaling]
        x, w, dy = back(x, of_x), back(w, of_w), dy
        again = back(x, x_again) if x_again != of_x else x
        turned = back(w, w_again) if w_again != of_w else w
        five = "float8_e5m2"
        return x, w, back(dy, of_dy, five), turned, again, back(dy, dy_again, five)

    flat = x.reshape(-1, 200), w, dy.reshape(-1, 136)
    q_x, q_w, q_dy, w_again, x_again, dy_again = (
        np.float64(a) for a in operands(*flat)
    )

    @jax.jit
    def each(*given):
        return [products(recipe, *given, **o) for o in ({}, {"remat": jax.checkpoint})]

    found, again = each(x, w, dy)
    same(found, again)  # what is computed again is quantised as it was
    wanted = q_x @ q_w, q_dy @ w_again.T, x_again.T @ dy_again
    for ours, exact in zip(found, wanted, strict=True):
        size = np.abs(exact).max()
        assert_allclose(np.reshape(ours, exact.shape), exact, atol=1e-5 * size)
    x, dy = (np.reshape(a, (-1, a.shape[-1])) for a in (x, dy))
    for ours, exact in zip(found, (x @ w, dy @ w.T, x.T @ dy)):  # and they were rounded
        error = np.abs(np.reshape(ours, exact.shape) - exact).max()
        assert 1e-3 < error / np.abs(exact).max() < 0.2


@pytest.mark.parametrize("scaling", READ)
def test_5_numbers_of_few_bits_are_multiplied_exactly(scaling):
    """Powers of two under scales that are some: nothing rounds, forward or backward."""
    random = np.random.default_rng(0)

    def few(*shape):
        return jnp.float32(random.choice([-4, -1, -0.5, 0, 1, 2, 8], shape))

    given = few(6, 130), few(130, 5), few(6, 5)
    recipe = fp8_recipe("exact", scaling, dtype=jnp.float32, scale="pow2")

    @jax.jit
    def each(x, w, dy):
        prepared = recipe.prepare(w)
        y, pull = jax.vjp(lambda x: quant.linear(x, prepared, recipe), x)
        of_frozen = y, *pull(dy), *pull(dy * 2.0**-60)
        return products(recipe, x, w, dy), products("fp32", x, w, dy), of_frozen

    found, wanted, of_frozen = each(*given)
    same(found, wanted)
    small = wanted[1] * 2.0**-60  # the mean of a loss over many tokens
    same(of_frozen, (*wanted[:2], small))
    few_tokens, many = each(*given[:2], given[2] * 2.0**-60)[:2]
    same(few_tokens, many)


def test_10_and_11_between_layers_16_bits_are_carried_and_8_are_kept():
    x, w = jnp.zeros((256, 512), jnp.bfloat16), jnp.zeros((512, 384))

    def kept(recipe):
        def both(x, w):
            y, pull = jax.vjp(functools.partial(quant.linear, recipe=recipe), x, w)
            return (y, *pull(y)), pull

        (y, dx, dw), pull = jax.eval_shape(both, x, w)
        assert (y.dtype, dx.dtype, dw.dtype) == ("bfloat16", "bfloat16", "float32")
        leaves = jax.tree.leaves(pull)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves), leaves

    narrow, leaves = kept("fp8_block")
    assert {str(a.dtype) for a in leaves if a.ndim == 2 and a.size > 1e4} == {
        "float8_e4m3fn"
    }
    assert narrow < 0.55 * kept("bf16")[0]


def test_9_dense_kernels_of_the_blocks_are_quantised_and_nothing_else():
    config = models.DecoderConfig(
        vocab_size=13, hidden_size=8, intermediate_size=12, num_layers=3, num_heads=2,
        num_kv_heads=1, head_dim=6, qkv_bias=True, recipe="fp8_block",
    )  # fmt: skip
    network = models.Decoder(config)
    tokens = jnp.zeros((1, 4), int)
    key = jax.random.key(0)
    params = jax.eval_shape(lambda: models.init_params(network, key, tokens))
    prepare = functools.partial(models.prepare_weights, config=config)
    found = jax.eval_shape(prepare, params)
    assert jax.eval_shape(prepare, found) == found
    quantised = lambda leaf: isinstance(leaf, Quantised)  # noqa: E731
    table = {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{leaf.granularity} {leaf.values.dtype} {leaf.scale.dtype}"
            if quantised(leaf)
            else str(leaf.dtype)
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(found, quantised)
    }
    inner = [f"attention/{n}" for n in ("query", "key", "value", "out")]
    inner += [f"mlp/{n}" for n in ("gate", "up", "down")]
    biases = [f"blocks/attention/{n}/bias" for n in ("query", "key", "value")]
    norms = ["blocks/attention_norm/scale", "blocks/mlp_norm/scale", "norm/scale"]
    assert table == {
        **{f"blocks/{n}/kernel": "128x128 float8_e4m3fn float32" for n in inner},
        **dict.fromkeys(["head/kernel", "embedding"], "bfloat16"),
        **dict.fromkeys([*biases, *norms], "float32"),
    }
    cache = jax.eval_shape(lambda: models.init_cache(config, 2, 4))
    assert cache["k"].dtype == "bfloat16"
    for weights in (params, found):  # and decoding takes both
        idle = jnp.zeros(2, jnp.int32)
        step = functools.partial(models.decode, config)
        assert jax.eval_shape(step, weights, cache, idle, idle)[0].dtype == "float32"
    exact = models.DecoderConfig(**{**vars(config), "head_recipe": "fp32"})
    assert exact.output_recipe.name == "fp32" and config.output_recipe.name == "bf16"


NETWORKS = {
    "dit": ({"num_classes": 4}, (4, 4, 3), "class"),
    "text_dit": (
        {"vocabulary": 5, "max_length": 3, "text_width": 8, "text_heads": 2},
        (4, 4, 3),
        "text",
    ),
    "unet": ({"width": 8, "multipliers": (1, 2), "heads": 2}, (4, 4, 3), None),
    "mlp": ({}, (2,), None),
    "control": ({"hidden": (8, 8, 8), "time_hidden": 4}, (2,), "vector"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_9_what_is_quantised_of_velocity_networks(name):
    """Attention, MLPs and other layers over positions, inside; by what is multiplied."""
    sizes, shape, kind = NETWORKS[name]
    if "dit" in name:
        sizes |= {"hidden": 8, "depth": 2, "heads": 2}
    found, narrow, where = {}, quant.RECIPES["fp8_block"], []

    def watched(recipe, **changes):
        def matmul(x, w):
            found.setdefault(recipe.name, set()).add("/".join(where[-1]))
            return recipe.matmul(x, w)

        return dataclasses.replace(recipe, matmul=matmul, **changes)

    def within(call, arguments, options, context):
        if not isinstance(context.module, layers.Dense):
            return call(*arguments, **options)
        where.append(context.module.path)
        try:
            return call(*arguments, **options)
        finally:
            where.pop()

    if name == "control":
        network = models.ControlVelocity(2, **sizes, recipe="fp8_block")
    else:
        network = models.build({"name": name, **sizes, "recipe": "fp8_block"})
    network = models.with_recipe(network, watched(narrow, head=watched(narrow.head)))
    cond = {
        None: None,
        "class": jnp.zeros(2, jnp.int32),
        "vector": jnp.zeros((2, 3)),
        "text": {"ids": jnp.zeros((2, 3), jnp.int32), "mask": jnp.ones((2, 3), bool)},
    }[kind]
    with nn.intercept_methods(within):
        jax.eval_shape(
            lambda key: network.init(key, jnp.zeros((2, *shape)), jnp.zeros(2), cond),
            jax.random.key(0),
        )
    projections = {f"attention/{n}" for n in ("query", "key", "value", "out")}
    time = {"time_embedding/hidden", "time_embedding/out"}
    if name == "mlp":
        inside, ends = {"hidden_0", "hidden_1", "hidden_2"}, {"in", "out"}
        ends |= {"time/hidden", "time/out"}
    elif name == "control":
        inside, ends = {"layers_0", "layers_1"}, {"time_in", "time_out", "out"}
        ends |= {"from_action", "from_time", "from_observation"}
    elif name == "unet":
        ends = time | {key for key in found["bf16"] if key.endswith("/modulation")}
        attending = ("down_1_0", "down_1_1", "middle_0", "up_1_0", "up_1_1", "up_1_2")
        inside = {key for key in found["fp8_block"] if key.endswith("/shortcut")}
        inside |= {f"{block}/{key}" for block in attending for key in projections}
        assert len(ends) == len(time) + 12 and "down_1_0/shortcut" in inside
    else:
        inside = projections | {"mlp_in", "mlp_out"}
        ends = time | {"patch_embedding", "modulation"}
        ends |= {"final/modulation", "final/projection"}
        if name == "text_dit":
            ends = {k if k == "modulation" else f"dit/{k}" for k in ends}
            ends |= {"dit/token_projection"}
            inside |= {
                key.replace("attention", "cross_attention") for key in projections
            }
    assert found == {"fp8_block": inside, "bf16": ends}


RAGGED = models.DecoderConfig(
    vocab_size=13, hidden_size=136, intermediate_size=144, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=34, recipe="fp8_block", remat=False,
)  # fmt: skip
TOKENS = jnp.zeros((1, 4), int)


def trained(params):
    """What training sums up of a decoder in 8 bits."""
    return models.functional(models.Decoder(RAGGED))(params, TOKENS).sum()


def random_weights():
    shapes = jax.eval_shape(
        lambda: models.init_params(models.Decoder(RAGGED), jax.random.key(0), TOKENS)
    )
    return jax.tree.map(lambda leaf: jnp.asarray(drawn(*leaf.shape)), shapes)


def test_7_published_arrays_are_those_of_the_training_forward():
    """Values and scales, to the bit; and publishing is quantising alone."""
    params = random_weights()
    publish = functools.partial(models.prepare_weights, config=RAGGED)
    published = jax.jit(publish)(params)
    kept = jax.tree.leaves(jax.jit(lambda p: jax.vjp(trained, p)[1])(params))

    def is_kept(array):
        alike = (x for x in kept if (x.dtype, x.shape) == (array.dtype, array.shape))
        return any(bool((x == array).all()) for x in alike)

    names = [("attention", n) for n in ("query", "key", "value", "out")]
    names += [("mlp", n) for n in ("gate", "up", "down")]
    unrounded = []
    for part, name in names:
        q = published["blocks"][part][name]["kernel"]
        assert q.values.shape[0] == 2 and is_kept(q.values) and is_kept(q.scale), name
        other = quantise(params["blocks"][part][name]["kernel"], "128x128")
        unrounded.append(is_kept(other.values) and is_kept(other.scale))
    assert not any(unrounded)  # of the float32 master they would be others
    assert count_flops(publish, params) == {}  # no product: no calibration

    def operations(fn, given):
        return len(jax.make_jaxpr(fn)(given).eqns)

    each = (params["blocks"][part][name]["kernel"] for part, name in names)
    quantising = sum(operations(RAGGED.recipe.prepare, kernel) for kernel in each)
    assert operations(publish, params) == quantising + 2  # casts: embedding and head


def test_10_between_layers_of_a_decoder_nothing_has_8_bits():
    def scans(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "scan":
                yield equation
            for inner in jax.core.jaxprs_in_params(equation.params):
                yield from scans(inner)

    def narrow(variables):
        return [v for v in variables if "float8" in str(v.aval.dtype)]

    params = jax.eval_shape(random_weights)
    program = jax.make_jaxpr(jax.value_and_grad(trained))(params)
    forward, backward = scans(program.jaxpr)
    for loop in (forward, backward):
        assert not narrow(loop.outvars[: loop.params["num_carry"]])
    assert len(narrow(forward.outvars)) == 14  # kept for later: x and w of 7 products
    assert not narrow(backward.outvars) and not narrow(program.jaxpr.outvars)
    assert narrow(backward.invars)


def test_0_every_rounding_stands_behind_a_barrier_on_gpus_and_tpus():
    """Without one XLA may drop it, and nothing is quantised."""

    def loss(x, w):
        recipes = ("fp8_block", "fp8_rowwise", "fp8_tensor")
        return sum(quant.linear(x, w, r).astype(jnp.float32).sum() for r in recipes)

    given = jnp.zeros((3, 200)), jnp.zeros((200, 136))
    for platform in ("cuda", "tpu"):
        exporter = jax.export.export(
            jax.jit(jax.value_and_grad(loss, (0, 1))), platforms=[platform]
        )
        text = exporter(*given).mlir_module()
        narrow = r"tensor<[\dx]*f8E4M3FN>"
        rounded = re.findall(rf"(%\w+) = stablehlo.convert .*-> {narrow}", text)
        guarded = re.findall(rf"optimization_barrier (%\w+) : {narrow}", text)
        assert sorted(rounded) == sorted(guarded) and len({*rounded}) > 9
        # GPUs multiply 8-bit values where the terms of a sum share their scales
        products = re.findall(r"dot_general .*: \(tensor<\w+>, tensor<\w+>\)", text)
        values = [found for found in products if "f8E4M3FN" in found]
        assert (len(products), len(values)) == (9, 6 if platform == "cuda" else 0)


def test_4_products_of_values_are_those_of_dequantised_numbers():
    @jax.jit
    def each(x, w):
        found = []
        for rows, columns in (("row", "column"), ("tensor", "tensor")):
            for dtype in UNIT:
                pair = quantise(x, rows, dtype), quantise(w, columns)
                found.append(fp8_recipes._product_of_values(*pair))
                found.append(fp8_recipes._product_of_numbers(*pair))
        return found

    found = each(drawn(30, 200), drawn(200, 136, seed=1))
    for values, numbers in zip(found[::2], found[1::2], strict=True):
        assert_allclose(values, numbers, atol=2e-6 * np.abs(numbers).max())


def test_0_the_self_test_fails_where_a_rounding_is_left_out():
    quant.check_rounding()
    found = {name: np.float32(rows) for name, rows in self_test._ROUNDED.items()}
    self_test._compare(found, "here")
    for name in found:
        message = (
            rf"backend 'here': .* in {name} came back .*xla_allow_excess_precision"
        )
        with pytest.raises(RuntimeError, match=message):
            self_test._compare({**found, name: np.float32(self_test._GIVEN)}, "here")
    assert {*found} == {"float8_e4m3fn", "float8_e5m2", "bfloat16"}


def test_devices_without_float8_are_named(refused):
    def device(platform, kind, capability=None):
        return SimpleNamespace(
            platform=platform, device_kind=kind, compute_capability=capability
        )

    able = [
        device("gpu", "NVIDIA H100 80GB HBM3", "9.0"),
        device("gpu", "NVIDIA L4", "8.9"),
        device("gpu", "NVIDIA B200", "10.0"),
        device("tpu", "TPU7x"),
    ]
    unable = [
        device("gpu", "NVIDIA A100-SXM4-80GB", "8.0"),
        device("gpu", "AMD Instinct MI300X", "gfx942"),
        device("tpu", "TPU v5 lite"),
        device("tpu", "TPU v6 lite"),
        device("cpu", "cpu"),
        device("METAL", "Apple M3"),
    ]
    for each in able:
        assert quant.has_fp8(each)
        quant.check_device(each)
    for each in unable:
        assert not quant.has_fp8(each)
        message = f"'{each.device_kind}' .platform '{each.platform}'. has no float8"
        refused(f"{message}.*'bf16', or allow_emulation=True", quant.check_device, each)
        quant.check_device(each, allow_emulation=True)
    refused("'cpu' .* has no float8 products", quant.check_device)
    # the hardware has them, and a recipe uses them or not
    by_kernel = fp8_recipe("by_kernel", "block", kernel="hopper")
    table = {"fp8_rowwise": (0, 0, 0, 1), "fp8_tensor": (0, 0, 0, 1)}
    table |= {"fp8_block": (1, 1, 1, 1), by_kernel: (0, 1, 1, 1), "bf16": (0, 0, 0, 0)}
    for recipe, emulated in table.items():
        pair = quant.Precision(rollout="fp32", train=recipe)
        assert emulated == tuple(quant.check_precision(pair, each) for each in able)


def test_bad_inputs(refused):
    x, w = jnp.ones((3, 4)), jnp.ones((4, 2))
    refused("granularity='token' is not one of 'tensor', 'row'", quantise, x, "token")
    refused("dtype='int8' is not one of 'float8_e4m3fn'", quantise, x, "row", "int8")
    refused("scale='bf16' is not one of", quantise, x, "row", scale="bf16")
    refused("smallest=0 is outside", quantise, x, "row", smallest=0)
    refused(r"x has shape \(3,\); give", quantise, x[:, 0], "row")
    refused("scaling='blocks' is not.*Did you mean 'block'", fp8_recipe, "a", "blocks")
    message = "dtype='float16' is not one of"
    refused(message, fp8_recipe, "a", "block", dtype=jnp.float16)
    message = "gradient_dtype='bfloat16' is not one of"
    refused(message, fp8_recipe, "a", "block", gradient_dtype="bfloat16")
    refused("scale='e8' is not one of", fp8_recipe, "a", "block", scale="e8")
    stack = r"w has shape \(4, 2, 5\).*Scan or vmap"
    refused(stack, quant.linear, x, jnp.ones((4, 2, 5)), "fp8_block")
    other = jax.jit(quant.RECIPES["fp8_rowwise"].prepare)(w)
    assert isinstance(other, Quantised)
    message = "w was quantised by 'column' and the recipe 'fp8_block' takes '128x128'"
    refused(message, quant.linear, x, other, "fp8_block")
    prepared = {"blocks": {"attention": {"query": {"kernel": other}}}}
    refused("are quantised.*give fuse_proj", models.fuse_projections, prepared)


def test_a_recipe_of_rollouts_alone_refuses_gradients(refused):
    x, w = jnp.float32(drawn(3, 4)), jnp.float32(drawn(4, 2))
    only, block = (quant.RECIPES[f"fp8_{n}"] for n in ("rollout_only", "block"))
    assert_array_equal(only.matmul(x, w), block.matmul(x, w))
    same(only.prepare(w), block.prepare(w))
    loss = jax.grad(lambda w: quant.linear(x, w, only).astype(jnp.float32).sum())
    refused("'fp8_rollout_only' is of rollouts alone", loss, w)
    quant.Precision(rollout="fp8_rollout_only", train="bf16")
    message = "precision.train='fp8_rollout_only' has no gradient"
    refused(message, quant.Precision, train="fp8_rollout_only")


@pytest.mark.slow
def test_7_decoding_and_training_agree_where_both_are_quantised():
    """A mixed pair is 100 times further apart; and one scale a tensor is no remedy."""
    sizes = dict(
        vocab_size=32, hidden_size=128, intermediate_size=256, num_layers=2,
        num_heads=4, num_kv_heads=2, head_dim=32, head_recipe="fp32",
    )  # fmt: skip
    tokens = jax.random.randint(jax.random.key(0), (8, 24), 0, 32)
    plain = models.DecoderConfig(**sizes)
    params = models.init_params(models.Decoder(plain), jax.random.key(1), tokens)
    params = jax.tree.map(lambda w: 3 * w if w.ndim > 1 else w, params)

    def forward(recipe):
        network = models.Decoder(models.DecoderConfig(**sizes, recipe=recipe))
        logits = jax.jit(models.functional(network))(params, tokens)
        return np.asarray(jax.nn.log_softmax(logits))

    def decoded(recipe):
        config = models.DecoderConfig(**sizes, recipe=recipe)

        @jax.jit
        def run(params, tokens):
            weights = models.prepare_weights(params, config)

            def body(cache, step):
                at = jnp.full(8, step)
                logits, cache = models.decode(
                    config, weights, cache, tokens[:, step], at
                )
                return cache, jax.nn.log_softmax(logits)

            cache = models.init_cache(config, 8, 24)
            return jax.lax.scan(body, cache, jnp.arange(24))[1]

        return np.asarray(run(params, tokens)).swapaxes(0, 1)

    def apart(a, b):
        return np.abs(a - b).mean()

    rollout = decoded("fp8_block")
    unified = apart(rollout, forward("fp8_block"))
    assert 100 * unified < apart(rollout, forward("bf16"))
    assert 100 * unified < apart(decoded("fp8_tensor"), forward("fp8_tensor"))
