"""Drawing tokens: the distribution, its log-probs, and what may not be drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from tmdjax.core import prng
from tmdjax.generation import Sampling, sample, sampling_log_probs

LOGITS = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (Sampling(), [0.4, 0.3, 0.2, 0.1]),
        (Sampling(temperature=0.5), np.array([16, 9, 4, 1]) / 30),
        (Sampling(top_k=2), [4 / 7, 3 / 7, 0, 0]),
        (Sampling(top_k=9), [0.4, 0.3, 0.2, 0.1]),
        (Sampling(top_p=0.7), [4 / 7, 3 / 7, 0, 0]),
        (Sampling(top_p=0.71), [4 / 9, 3 / 9, 2 / 9, 0]),
        (Sampling(top_p=0.01), [1, 0, 0, 0]),
        (Sampling(top_k=3, top_p=0.5), [4 / 7, 3 / 7, 0, 0]),
    ],
)
def test_g5_the_distribution_and_its_draws(sampling, expected):
    log_probs = sampling_log_probs(LOGITS, sampling)
    assert_allclose(jnp.exp(log_probs), expected, atol=1e-6)
    keys = prng.sample_keys(jax.random.key(0), 4000)
    logits = jnp.broadcast_to(LOGITS, (4000, 4))
    token, log_prob = sample(logits, keys, sampling)
    count = np.bincount(token, minlength=4)
    allowed = np.asarray(expected) > 0
    assert count[~allowed].sum() == 0
    if allowed.sum() > 1:
        share = np.asarray(expected)[allowed]
        assert stats.chisquare(count[allowed], share * 4000).pvalue > 1e-3
    assert log_prob.dtype == jnp.float32
    assert_allclose(log_prob, np.log(np.asarray(expected)[token]), atol=1e-5)


def test_16_bit_logits_give_float32_log_probs():
    keys = prng.sample_keys(jax.random.key(0), 2)
    logits = LOGITS[None].repeat(2, 0).astype("bfloat16")
    token, log_prob = sample(logits, keys, Sampling())
    assert token.dtype == jnp.int32 and log_prob.dtype == jnp.float32
    assert_allclose(log_prob, LOGITS[token], atol=0.02)


def test_exactness():
    assert Sampling().is_exact and Sampling(temperature=0.7).is_exact
    for other in ({"top_k": 3}, {"top_p": 0.9}, {"temperature": 0.0}):
        assert not Sampling(**other).is_exact


def test_refused(refused):
    wrong = [("temperature", -1.0), ("temperature", float("inf"))]
    wrong += [("top_k", 0), ("top_p", 0.0), ("top_p", 1.5)]
    for name, value in wrong:
        refused(f"{name}={value}", Sampling, **{name: value})
