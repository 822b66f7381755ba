import functools

import jax
import numpy as np
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


loss_of = jax.jit(METHOD.loss)


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
    loss, metrics = loss_of(new, params, samples, KEYS, COEFFICIENTS)
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


def test_bad_settings(refused):
    refused("initial_std=0.0 is outside", GaussianPolicy, initial_std=0.0)
    refused(r"clip_range=1.2 is outside \(0, 1\)", GaussianPolicy, clip_range=1.2)
    refused("entropy_coefficient=-1.0", GaussianPolicy, entropy_coefficient=-1.0)
    refused("lower=2.0 is outside", GaussianPolicy, log_std_bounds=(2.0, 1.0))
