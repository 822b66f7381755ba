import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from numpy.testing import assert_allclose

from tmdjax.core import prng
from tmdjax.systems.ppo import GaussianPolicy
from tmdjax.train.on_policy import Samples

BATCH = 40
KEYS = prng.sample_keys(jax.random.key(7), BATCH)
COEFFICIENTS = {"clip_range": 0.2, "entropy_coefficient": 0.01}


METHOD = GaussianPolicy(hidden=(16,), initial_std=0.5)


@functools.cache
def made():
    """Parameters, samples and actions."""

    @jax.jit
    def begin(key):
        seen = jax.random.normal(jax.random.key(1), (BATCH, 3))
        params = METHOD.init(key, seen[:1], 2)
        action, record = METHOD.act(params, seen, KEYS)
        advantage = jax.random.normal(jax.random.key(2), (BATCH,))
        return params, Samples(seen, record, advantage), action

    return begin(jax.random.key(0))


mean_and_log_std = jax.jit(METHOD.mean_and_log_std)


@jax.jit
@functools.partial(jax.value_and_grad, has_aux=True)
def total(params, behaviour, samples, coefficients):
    found = METHOD.loss(params, behaviour, samples, KEYS, coefficients)
    return found[0].mean(), found


def test_log_prob_is_scipys():
    params, samples, action = made()
    mean, log_std = mean_and_log_std(params, samples.observation)
    std = np.exp(log_std)
    assert_allclose(std, 0.5, rtol=1e-6)
    expected = scipy.stats.norm(mean, std).logpdf(action).sum(1)
    assert_allclose(samples.record["log_prob"], expected, rtol=1e-5)


def test_loss_by_hand():
    params, samples, action = made()
    new = {**params, "log_std": params["log_std"] + 0.3}
    (_, (loss, metrics)), _ = total(new, params, samples, COEFFICIENTS)
    mean, log_std = mean_and_log_std(new, samples.observation)
    std = np.exp(log_std)
    density = scipy.stats.norm(mean, std).logpdf(action).sum(1)
    ratio = np.exp(density - samples.record["log_prob"])
    a = np.asarray(samples.advantage)
    expected = np.maximum(-a * ratio, -a * np.clip(ratio, 0.8, 1.2))
    expected -= 0.01 * scipy.stats.norm(0, std).entropy().sum()
    assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)
    assert_allclose(metrics["ratio_error"], np.abs(ratio - 1), atol=1e-5)
    kl = 2 * (0.3 + 0.5 * (np.exp(-0.6) - 1))
    assert_allclose(metrics["kl"], kl, rtol=1e-4)


def test_gradient_is_the_policy_gradient_at_the_start():
    params, samples, _ = made()

    without = {**COEFFICIENTS, "entropy_coefficient": 0.0}
    _, slope = total(params, params, samples, without)

    @jax.jit
    @jax.grad
    def expected(p):
        mean, log_std = METHOD.mean_and_log_std(p, samples.observation)
        z = (samples.record["action"] - mean) / jnp.exp(log_std)
        density = jnp.sum(-0.5 * z**2 - log_std, -1)
        return -jnp.mean(samples.advantage * density)

    for a, b in zip(jax.tree.leaves(slope), jax.tree.leaves(expected(params))):
        assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"initial_std": 0.0}, "initial_std=0.0 is outside"),
        ({"clip_range": 1.2}, r"clip_range=1.2 is outside \(0, 1\)"),
        ({"entropy_coefficient": -1.0}, "entropy_coefficient=-1.0"),
        ({"log_std_bounds": (2.0, 1.0)}, "lower=2.0 is outside"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        GaussianPolicy(**options)
