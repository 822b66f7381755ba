import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import models

OBSERVED = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
ACTIONS = jnp.asarray(np.random.default_rng(1).normal(size=(5, 2)), jnp.float32)


def test_mlp_is_that_of_numpy():
    net = models.ControlMLP(3, (8, 6), "tanh")
    params = models.init_params(net, jax.random.key(0), OBSERVED)
    h = np.asarray(OBSERVED)
    for name in ("hidden_0", "hidden_1"):
        h = np.tanh(h @ params[name]["kernel"] + params[name]["bias"])
    expected = h @ params["out"]["kernel"] + params["out"]["bias"]
    out = jax.jit(models.functional(net))(params, OBSERVED)
    assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_mish_is_that_of_jax():
    x = jnp.linspace(-6, 6, 101)
    from tmdjax.models.control import ACTIVATIONS

    assert_allclose(ACTIVATIONS["mish"](x), jax.nn.mish(x), atol=1e-6)


def test_what_the_observation_adds_is_computed_apart():
    net = models.ControlVelocity(2, (16, 8), frequencies=(1.0, 8.0, 4), out_scale=1.0)
    t = jnp.linspace(0, 1, 5)
    params = models.init_params(net, jax.random.key(0), ACTIONS, t, OBSERVED)
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


def test_outputs_start_small():
    for scale, low, high in ((0.0, 0, 0), (0.01, 1e-4, 0.05)):
        net = models.ControlVelocity(2, (64, 64), out_scale=scale)
        params = models.init_params(
            net, jax.random.key(0), ACTIONS, jnp.ones(1), OBSERVED
        )
        v = jax.jit(models.functional(net))(params, ACTIONS, jnp.ones(1), OBSERVED)
        assert low <= np.abs(v).max() <= high


def test_images_are_seen():
    net = models.ControlMLP(1, (16,))
    image = jax.random.randint(jax.random.key(0), (3, 64, 64, 3), 0, 255).astype(
        jnp.uint8
    )
    params = models.init_params(net, jax.random.key(1), image)
    apply_fn = jax.jit(models.functional(net))
    out = apply_fn(params, image)
    assert out.shape == (3, 1)
    moved = apply_fn(params, jnp.roll(image, 8, 2))
    assert np.abs(moved - out).min() > 1e-6  # where a patch lies matters


def test_bad_inputs(as_shipped):
    with pytest.raises(ValueError, match=r"hidden=\(\) has no layer"):
        models.ControlMLP(1, ())
    with pytest.raises(ValueError, match="Did you mean 'mish'"):
        models.ControlMLP(1, (8,), "mis")
    with pytest.raises(ValueError, match="lowest=9"):
        models.ControlVelocity(1, frequencies=(9.0, 1.0, 4))
    net = models.ControlMLP(1, (8,))
    params = models.init_params(net, jax.random.key(0), OBSERVED)
    with pytest.raises(TypeError, match="float32 .1, 2, 3.; give float32"):
        models.functional(net)(params, jnp.zeros((1, 2, 3)))
