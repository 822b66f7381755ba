"""Log-probabilities: alignment, an oracle in float64, the chunked form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from model_helpers import close, draw
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import models
from tmdjax.models import token_entropies, token_log_probs, token_log_probs_from_hidden

BATCH, LENGTH, VOCAB, HIDDEN = 2, 8, 11, 6


def inputs():
    tokens = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH))
    h, kernel = draw(BATCH, LENGTH, HIDDEN), draw(HIDDEN, VOCAB, seed=1)
    return h, kernel, jnp.asarray(tokens, jnp.int32)


def test_four_tokens_by_hand():
    # After each token the next one has probability 1/2, 3/4, 1/5; the distribution
    # after the last token belongs to no token.
    rows = [[0.25, 0.5, 0.25], [0.125, 0.125, 0.75], [0.2, 0.4, 0.4], [1, 0, 0]]
    tokens = jnp.array([[0, 1, 2, 0]])
    logits = jnp.log(jnp.array([rows]))
    ours = token_log_probs(logits, tokens)
    assert_allclose(ours, [[0, *np.log([0.5, 0.75, 0.2])]], atol=1e-6)
    entropies = token_entropies(logits)
    expected = [scipy.stats.entropy(row) for row in rows[:3]]
    assert_allclose(entropies, [[0, *expected]], atol=1e-6)
    assert_allclose(models.entropy_of(logits[:, 3]), [0], atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_against_float64(temperature):
    h, kernel, tokens = inputs()
    logits = np.asarray(h @ kernel, np.float64)
    table = scipy.special.log_softmax(logits / temperature, axis=-1)
    expected = np.take_along_axis(table, np.asarray(tokens)[..., None], -1)[..., 0]
    logits = jnp.asarray(logits, jnp.float32)
    close(models.log_prob_of(logits, tokens, temperature), expected)
    entropies = scipy.stats.entropy(np.exp(table), axis=-1)
    close(models.entropy_of(logits, temperature), entropies)


def test_half_precision_logits_are_widened_first():
    h, kernel, tokens = inputs()
    half = (h @ kernel).astype(jnp.bfloat16)
    ours = token_log_probs(half, tokens)
    assert ours.dtype == jnp.float32
    assert_array_equal(ours, token_log_probs(half.astype(jnp.float32), tokens))


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunked_is_plain(chunk):
    h, kernel, tokens = inputs()
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, LENGTH)))

    def plain(kernel, h):
        logits = h @ kernel
        return token_log_probs(logits, tokens, 1.7), token_entropies(logits, 1.7)

    def chunked(kernel, h):
        options = dict(chunk=chunk, temperature=1.7, entropy=True)
        return token_log_probs_from_hidden(lambda h: h @ kernel, h, tokens, **options)

    def of(fn):
        def loss(kernel, h):
            log_prob, entropies = fn(kernel, h)
            return (weights * (log_prob + 0.3 * entropies)).sum(), (log_prob, entropies)

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(kernel, h)

    close(of(chunked), of(plain))


def test_chunked_never_holds_all_logits(equation_outputs):
    h, kernel, tokens = inputs()

    def loss(h, kernel):
        chunked = functools.partial(token_log_probs_from_hidden, lambda h: h @ kernel)
        log_prob, entropies = chunked(h, tokens, chunk=2)
        assert entropies is None
        return log_prob.sum()

    outputs = equation_outputs(jax.grad(loss, (0, 1)), h, kernel)
    sizes = [output.size for output in outputs if VOCAB in output.shape]
    assert max(sizes) == max(BATCH * 2 * VOCAB, HIDDEN * VOCAB)


def test_wrong_inputs(refused):
    h, kernel, tokens = inputs()
    message = r"tokens have shape \(2, 7\); give one a pos"
    refused(message, token_log_probs, h @ kernel, tokens[:, 1:])
    for ids, found in ((tokens.at[0, 1].set(-100), "from -100 to"), (tokens, "to 10")):
        message = f"tokens hold ids {'.*' + found}.*token_log_probs_from_hidden.*-100"
        refused(message, token_log_probs, h, ids)
    chunked = functools.partial(token_log_probs_from_hidden, jnp.array, h, tokens)
    for temperature in (0.0, -1.0, float("nan")):
        message = r"temperature=.* is outside \(0, inf\)"
        refused(message, token_log_probs, h @ kernel, tokens, temperature)
        refused(message, chunked, temperature=temperature)
    refused("chunk=0 must be at least 1", chunked, chunk=0)
