import jax
import numpy as np
import scipy.stats
from numpy.testing import assert_allclose

from tmdjax.core import prng
from tmdjax.systems.ppo import GaussianPolicy
from tmdjax.train.on_policy import Samples

BATCH = 40
KEYS = prng.sample_keys(jax.random.key(7), BATCH)


def test_log_prob_and_loss_are_scipys():
    method = GaussianPolicy(hidden=(16,), initial_std=0.5)
    moments, loss_of = jax.jit(method.mean_and_log_std), jax.jit(method.loss)
    seen = jax.random.normal(jax.random.key(1), (BATCH, 3))
    params = method.init(jax.random.key(0), seen[:1], 2)
    action, record = jax.jit(method.act)(params, seen, KEYS)
    mean, log_std = moments(params, seen)
    assert_allclose(np.exp(log_std), 0.5, rtol=1e-6)
    before = scipy.stats.norm(mean, np.exp(log_std)).logpdf(action).sum(1)
    assert_allclose(record["log_prob"], before, rtol=1e-5)
    # other parameters
    a = np.random.default_rng(2).normal(size=BATCH).astype(np.float32)
    new = {**params, "log_std": params["log_std"] + 0.3}
    given = (Samples(seen, record, a), KEYS)
    coefficients = {"clip_range": 0.2, "entropy_coefficient": 0.01}
    loss, metrics = loss_of(new, params, *given, coefficients)
    mean, log_std = moments(new, seen)
    std = np.exp(log_std)
    density = scipy.stats.norm(mean, std).logpdf(action).sum(1)
    ratio = np.exp(density - record["log_prob"])
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
