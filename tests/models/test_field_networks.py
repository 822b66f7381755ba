"""Networks of fields: sizes, shifts of the domain, conditions, layers by hand."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import draw, jitted, shapes_of
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax.core import trees
from tmdjax.models import (
    FNO,
    DilatedResNet,
    UNet,
    build,
    functional,
    init_params,
    spec_of,
)
from tmdjax.models.convolution import Convolution, Upsampling
from tmdjax.models.layers import ScalarEmbedding, exact_gelu, timestep_embedding

MODERN = dict(design="modern", padding="circular", out_channels=1)
UNET = UNet(8, (1, 2), blocks=1, dims=1, scalars=2, remat=False, **MODERN)
RESNET = DilatedResNet(4, 2, dims=2, scalars=1, out_channels=1)
NETWORKS = {
    "unet": (UNET, (8,), 2),
    "dilated_resnet": (RESNET, (6, 8), 1),
    "fno": (FNO(4, 1, modes=3, dims=2, scalars=2, out_channels=1), (6, 8), 1),
}
# of PDEArena's code: 1-D, one field, history and dt, dx; 2-D, a vector field
SIZES = [
    (1, 2, 1, 2, 53_924_225),
    pytest.param(2, 4, 2, 0, 146_512_066, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("dims", "channels", "out", "scalars", "count"), SIZES)
def test_parameters_of_the_published_networks_9(dims, channels, out, scalars, count):
    module = UNet(
        64, (1, 2, 4, 16), dims=dims, scalars=scalars, **MODERN | {"out_channels": out}
    )
    x, cond = jnp.zeros((2, *(16,) * dims, channels)), jnp.zeros((2, scalars))
    given = x, jnp.zeros(2), cond if scalars else None
    assert trees.count(shapes_of(module.clone(remat=False), *given)) == count


@functools.cache
def inputs(name):
    """Five rows: a field, itself moved, moved by one, with another time, condition."""
    module, sides, unit = NETWORKS[name]
    x = np.asarray(draw(*sides, 2))
    moved = [np.roll(x, by, axis=range(len(sides))) for by in (unit, 1)]
    cond = np.ones((5, module.scalars), np.float32)
    cond[4] = 3
    return np.stack([x, *moved, x, x]), np.float32([0.4, 0.4, 0.4, 0.7, 0.4]), cond


@functools.cache
def drawn(name):
    """Parameters of the size of initial ones, none of them zero; nothing compiles."""
    module, rng = NETWORKS[name][0], np.random.default_rng(1)

    def leaf(shape):
        fan_in = np.prod(shape.shape[:-1]) if len(shape.shape) < 5 else shape.shape[-3]
        return np.float32(rng.normal(size=shape.shape) / np.sqrt(max(fan_in, 4)))

    return jax.tree.map(leaf, shapes_of(module, *inputs(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_new_networks_say_nothing_9(name):
    module, given = NETWORKS[name][0], inputs(name)
    params = init_params(module, jax.random.key(0), *given)
    assert_array_equal(jitted(module)(params, *given), 0)


@pytest.mark.parametrize("name", NETWORKS)
def test_shifts_times_conditions_and_order_9_10(name):
    module, sides, unit = NETWORKS[name]
    given, apply_fn = inputs(name), jitted(module)
    params = drawn(name)
    y = np.asarray(apply_fn(params, *given))
    size = np.abs(y).max()
    axes = range(len(sides))
    assert size > 0.05
    assert_allclose(y[1], np.roll(y[0], unit, axes), atol=1e-5 * size)
    by_one = np.abs(y[2] - np.roll(y[0], 1, axes)).max()
    assert (by_one < 1e-5 * size) == (unit == 1)
    for other in (3, 4):  # of another time, and under other conditions
        assert np.abs(y[other] - y[0]).max() > 1e-3 * size
    order = np.array([3, 0, 4, 2, 1])
    again = apply_fn(params, *(part[order] for part in given))
    assert_allclose(again, y[order], atol=1e-5 * size)


@pytest.mark.parametrize("name", ["unet", "dilated_resnet"])
def test_16_bits_stay_inside_a_network(name):
    """A refiner's input and answer have parts that 16 bits do not hold."""
    module = NETWORKS[name][0].clone(recipe="bf16")
    program = jax.make_jaxpr(functional(module))(drawn(name), *inputs(name))
    products = [e for e in program.eqns if e.primitive.name == "conv_general_dilated"]
    first, *inner, last = [e.invars[0].aval.dtype for e in products]
    assert {first, last} == {jnp.dtype("float32")}
    assert {*inner} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("wave", [(1, 2), (-2, 1)])
def test_a_wave_leaves_the_operator_times_the_matrix_of_its_mode(wave):
    module, sides, _ = NETWORKS["fno"]
    params = jax.tree.map(np.zeros_like, drawn("fno"))
    params["input"]["kernel"][0, 1] = params["output"]["kernel"][2, 0] = 1
    params["spectral_0"] = drawn("fno")["spectral_0"]
    real, imaginary = params["spectral_0"][wave[0] % 6, wave[1], 1, 2]
    phase = sum(
        2 * np.pi * k * at / side for k, at, side in zip(wave, np.indices(sides), sides)
    )
    x = np.zeros((5, *sides, 2), np.float32)
    x[..., 0] = np.cos(phase)
    found = jitted(module)(params, x, *inputs("fno")[1:])[0, ..., 0]
    expected = real * np.cos(phase) - imaginary * np.sin(phase)
    assert_allclose(found, exact_gelu(jnp.asarray(expected)), atol=1e-5)


@pytest.mark.slow
def test_the_published_padding_moves_with_no_shift_9():
    """PDEArena's transposed convolutions have zeros beyond the ends."""
    module = UNET.clone(padding="reference")
    y = jitted(module)(drawn("unet"), *inputs("unet"))
    assert np.abs(y[1] - np.roll(y[0], 2, 0)).max() > 0.01 * np.abs(y).max()


@pytest.mark.slow
def test_adm_wraps_around_too():
    module = UNet(4, (1,), 1, (), heads=1, padding="circular")
    x = draw(1, 4, 4, 2)
    both = jnp.concatenate([x, jnp.roll(x, 1, 2)]), 0.5, None
    params = init_params(module, jax.random.key(0), *both)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)
    y = jitted(module)(params, *both)
    assert_allclose(y[1], jnp.roll(y[0], 1, 1), atol=1e-4)


@pytest.mark.parametrize("circular", [True, False])
def test_upsampling_spreads_every_point_over_four(circular):
    module, x = Upsampling(2, 2, circular=circular), np.asarray(draw(1, 3, 2, 2))
    kernel, expected = np.asarray(draw(4, 4, 2, 2)), np.zeros((6, 4, 2))
    for i, j, a, b in itertools.product(range(3), range(2), range(4), range(4)):
        row, column = 2 * i + a - 1, 2 * j + b - 1
        if circular:
            row, column = row % 6, column % 4
        elif not (0 <= row < 6 and 0 <= column < 4):
            continue
        expected[row, column] += x[0, i, j] @ kernel[3 - a, 3 - b]
    params = {"kernel": kernel, "bias": np.ones(2, np.float32)}
    found = jitted(module)(params, x)[0] - 1
    assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_circular_convolution_goes_on_at_the_other_end():
    options = {"padding": "circular", "dilation": 2}
    module, x = Convolution(3, (3,), **options), np.asarray(draw(2, 7, 2))
    kernel = np.asarray(draw(3, 2, 3))
    params = {"kernel": kernel, "bias": np.zeros(3, np.float32)}
    expected = sum(np.roll(x, -2 * (m - 1), 1) @ kernel[m] for m in range(3))
    assert_allclose(jitted(module)(params, x), expected, rtol=1e-5, atol=1e-5)


def test_sinusoids_of_zero_are_ones_and_zeros_8():
    assert_array_equal(timestep_embedding(jnp.zeros(1), 8)[0], [1] * 4 + [0] * 4)


def test_every_network_is_built_from_what_is_said_of_it():
    for name, (module, _, _) in NETWORKS.items():
        assert spec_of(module)["name"] == name and build(spec_of(module)) == module


def test_bad_settings_and_inputs(refused):
    refused("dims=3 is outside", UNet, dims=3)
    refused("padding='same' is not one of", UNet, padding="same")
    refused("design='moderne' is not one of .*'modern'", UNet, design="moderne")
    refused("scalars=2 is no setting of design='adm'", UNet, scalars=2)
    refused("num_classes=3 is no setting of", UNet, num_classes=3, design="modern")
    refused("width=12 must be a multiple of 8", UNet, 12, design="modern")
    refused("width=5 must be even", FNO, 5)
    refused("layers=0 must be at least 1", DilatedResNet, layers=0)
    x, t, cond = inputs("unet")

    def unet(x, cond):
        return UNET.apply({"params": drawn("unet")}, x, t, cond)

    refused("sides 7, .* = 2: .*or sides of 8", unet, x[:, :7], cond)
    refused("give fields", unet, x[..., None], cond)
    refused("cond has shape None, and a network of scalars=2", unet, x, None)
    refused(r"cond has shape \(5, 1\)", unet, x, cond[:, :1])
    shapes = drawn("fno"), *inputs("fno")
    fno = NETWORKS["fno"][0]
    few = "sides 6 x 4, too few for modes=3"
    refused(few, fno.apply, {"params": shapes[0]}, shapes[1][:, :, :4], t, shapes[3])
    embedding = ScalarEmbedding(4)
    refused("scalars=0 takes None", embedding.init, jax.random.key(0), t, cond)
