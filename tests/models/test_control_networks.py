import jax
import jax.numpy as jnp
import numpy as np
from model_helpers import draw, jitted
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import models
from tmdjax.models.control import ACTIVATIONS

OBSERVED, ACTIONS = draw(5, 4), draw(5, 2, seed=1)


def initial(net, *inputs):
    return models.init_params(net, jax.random.key(0), *inputs)


def test_mlp_is_that_of_numpy():
    net = models.ControlMLP(3, (8, 6), "tanh")
    params = initial(net, OBSERVED)
    h = np.asarray(OBSERVED)
    for name in ("hidden_0", "hidden_1"):
        h = np.tanh(h @ params[name]["kernel"] + params[name]["bias"])
    expected = h @ params["out"]["kernel"] + params["out"]["bias"]
    out = jitted(net)(params, OBSERVED)
    assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_mish_is_that_of_jax():
    x = jnp.linspace(-6, 6, 101)
    assert_allclose(ACTIVATIONS["mish"](x), jax.nn.mish(x), atol=1e-6)


def test_what_the_observation_adds_is_computed_apart():
    net = models.ControlVelocity(2, (16, 8), frequencies=(1.0, 8.0, 4), out_scale=1.0)
    t = jnp.linspace(0, 1, 5)
    params = initial(net, ACTIONS, t, OBSERVED)
    apply_fn = models.functional(net)
    whole = apply_fn(params, ACTIONS, t, OBSERVED)
    embedded = apply_fn(params, OBSERVED, method="embed")
    parts = apply_fn(params, ACTIONS, t, embedded, method="velocity")
    assert_array_equal(whole, parts)
    one = apply_fn(params, ACTIONS, t[2:3], embedded, method="velocity")
    same = apply_fn(params, ACTIONS, jnp.full(5, t[2]), embedded, method="velocity")
    assert_allclose(one, same, rtol=1e-6, atol=1e-6)
    # times by the angles 1, 2, 4, 8 of FPO
    kernel = params["from_time"]["kernel"]
    angles = np.asarray(t)[:, None] * 2.0 ** np.arange(4)
    features = np.concatenate([np.cos(angles), np.sin(angles)], 1)
    by_hand = np.asarray(embedded) + features @ kernel
    by_hand += ACTIONS @ params["from_action"]["kernel"]
    h = np.asarray(jax.nn.mish(by_hand))
    layer = params["layers_0"]
    h = np.asarray(jax.nn.mish(h @ layer["kernel"] + layer["bias"]))
    expected = h @ params["out"]["kernel"] + params["out"]["bias"]
    assert_allclose(whole, expected, rtol=1e-4, atol=1e-5)


def test_residual_layers_and_the_two_of_the_time():
    """As ReinFlow's networks are written: linear, pairs that add, linear."""
    options = {"residual": True, "time_hidden": 5, "step_size": True, "out_scale": 1.0}
    net = models.ControlVelocity(2, (8, 8, 8), "relu", (1.0, 4.0, 3), **options)
    t, d = jnp.linspace(0, 1, 5), jnp.full(5, 0.25)
    params = initial(net, ACTIONS, t, OBSERVED, 0.25)
    out = jitted(net)(params, ACTIONS, t, OBSERVED, d)

    def dense(name, x):
        return x @ params[name]["kernel"] + params[name].get("bias", 0)

    waves = [np.asarray(x)[:, None] * [1.0, 2.0, 4.0] for x in (t, d)]
    sinusoids = [f(wave) for wave in waves for f in (np.cos, np.sin)]
    hidden = jax.nn.mish(dense("time_in", np.concatenate(sinusoids, 1)))
    h = dense("from_action", ACTIONS) + dense("from_observation", OBSERVED)
    h = h + dense("from_time", dense("time_out", hidden))
    inner = np.maximum(dense("layers_0", np.maximum(h, 0)), 0)
    expected = dense("out", h + dense("layers_1", inner))
    assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    apply_fn = models.functional(net)
    parts = {m: apply_fn(params, OBSERVED, method=m) for m in ("features", "embed")}
    assert_array_equal(parts["features"], OBSERVED)
    again = apply_fn(params, ACTIONS, t, parts["embed"], 0.25, method="velocity")
    assert_allclose(again, out, rtol=1e-5, atol=1e-6)


def test_outputs_start_small():
    inputs = ACTIONS, jnp.ones(1), OBSERVED
    for scale, low, high in ((0.0, 0, 0), (0.01, 1e-4, 0.05)):
        net = models.ControlVelocity(2, (64, 64), out_scale=scale)
        v = jitted(net)(initial(net, *inputs), *inputs)
        assert low <= np.abs(v).max() <= high


def test_images_are_seen():
    net = models.ControlMLP(1, (16,))
    image = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), np.uint8)
    params = initial(net, image)
    out = jitted(net)(params, image)
    assert out.shape == (3, 1)
    moved = jitted(net)(params, np.roll(image, 8, 2))
    assert np.abs(moved - out).min() > 1e-6  # where a patch lies matters


def test_bad_inputs(refused):
    refused(r"hidden=\(\) has no layer", models.ControlMLP, 1, ())
    refused("Did you mean 'mish'", models.ControlMLP, 1, (8,), "mis")
    frequencies = (9.0, 1.0, 4)
    refused("lowest=9", models.ControlVelocity, 1, frequencies=frequencies)
    message = r"hidden=\(8, 4, 8\) of a residual network: give an odd number of equal"
    refused(message, models.ControlVelocity, 1, (8, 4, 8), residual=True)
    refused("odd number", models.ControlVelocity, 1, (8, 8), residual=True)
    inputs = ACTIONS, jnp.ones(5), OBSERVED
    plain = models.ControlVelocity(2, (8,))
    given = models.functional(plain), initial(plain, *inputs), *inputs
    refused("step_size=0.5 for a network with step_size=False", *given, 0.5)
    net = models.ControlMLP(1, (8,))
    params, wrong = initial(net, OBSERVED), jnp.zeros((1, 2, 3))
    message = "float32 .1, 2, 3.; give float32"
    refused(message, models.functional(net), params, wrong, error=TypeError)
