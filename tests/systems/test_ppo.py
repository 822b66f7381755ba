import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tmdjax.core import prng
from tmdjax.systems.ppo import GaussianPolicy
from tmdjax.train.on_policy import Samples

BATCH = 40
KEYS = prng.sample_keys(jax.random.key(7), BATCH)
COEFFICIENTS = {"clip_range": 0.2, "entropy_coefficient": 0.01}


def made():
    method = GaussianPolicy(hidden=(16,), initial_std=0.5)
    seen = jax.random.normal(jax.random.key(1), (BATCH, 3))
    params = method.init(jax.random.key(0), seen[:1], 2)
    action, record = method.act(params, seen, KEYS)
    advantage = jax.random.normal(jax.random.key(2), (BATCH,))
    return method, params, Samples(seen, record, advantage), action


def test_log_prob_is_scipys():
    method, params, samples, action = made()
    mean, log_std = method.mean_and_log_std(params, samples.observation)
    std = np.exp(log_std)
    np.testing.assert_allclose(std, 0.5, rtol=1e-6)
    expected = scipy.stats.norm(mean, std).logpdf(action).sum(1)
    np.testing.assert_allclose(samples.record["log_prob"], expected, rtol=1e-5)


def test_loss_by_hand():
    method, params, samples, action = made()
    new = {**params, "log_std": params["log_std"] + 0.3}
    loss, metrics = method.loss(new, params, samples, KEYS, COEFFICIENTS)
    mean, log_std = method.mean_and_log_std(new, samples.observation)
    std = np.exp(log_std)
    density = scipy.stats.norm(mean, std).logpdf(action).sum(1)
    ratio = np.exp(density - samples.record["log_prob"])
    a = np.asarray(samples.advantage)
    expected = np.maximum(-a * ratio, -a * np.clip(ratio, 0.8, 1.2))
    expected -= 0.01 * scipy.stats.norm(0, std).entropy().sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["ratio_error"], np.abs(ratio - 1), atol=1e-5)
    kl = 2 * (0.3 + 0.5 * (np.exp(-0.6) - 1))
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-4)


def test_gradient_is_the_policy_gradient_at_the_start():
    method, params, samples, _ = made()

    def loss(p):
        return method.loss(
            p, params, samples, KEYS, {**COEFFICIENTS, "entropy_coefficient": 0.0}
        )[0].mean()

    def log_prob(p):
        mean, log_std = method.mean_and_log_std(p, samples.observation)
        z = (samples.record["action"] - mean) / jnp.exp(log_std)
        density = jnp.sum(-0.5 * z**2 - log_std, -1)
        return -jnp.mean(samples.advantage * density)

    for a, b in zip(
        jax.tree.leaves(jax.grad(loss)(params)),
        jax.tree.leaves(jax.grad(log_prob)(params)),
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


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
