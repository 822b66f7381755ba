"""Log-probabilities: alignment, an oracle in float64, the chunked form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from tmdjax.models import (
    Decoder,
    DecoderConfig,
    chunked_token_log_probs,
    entropy_of,
    functional,
    init_params,
    log_prob_of,
    token_entropies,
    token_log_probs,
)

BATCH, LENGTH, VOCAB, HIDDEN = 2, 8, 11, 6


def draw():
    rng = np.random.default_rng(0)
    h = jnp.asarray(rng.normal(size=(BATCH, LENGTH, HIDDEN)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(HIDDEN, VOCAB)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, VOCAB, (BATCH, LENGTH)), jnp.int32)
    return h, kernel, tokens


def test_four_tokens_by_hand():
    # After each token the next one has probability 1/2, 3/4, 1/5; the distribution
    # after the last token belongs to no token.
    probabilities = [
        [0.25, 0.5, 0.25],
        [0.125, 0.125, 0.75],
        [0.2, 0.4, 0.4],
        [1, 0, 0],
    ]
    tokens = jnp.array([[0, 1, 2, 0]])
    logits = jnp.log(jnp.array([probabilities]))
    ours = token_log_probs(logits, tokens)
    np.testing.assert_allclose(ours, [[0, *np.log([0.5, 0.75, 0.2])]], atol=1e-6)
    entropies = token_entropies(logits)
    expected = [scipy.stats.entropy(row) for row in probabilities[:3]]
    np.testing.assert_allclose(entropies, [[0, *expected]], atol=1e-6)
    np.testing.assert_allclose(entropy_of(logits[:, 3]), [0], atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_against_float64(temperature):
    h, kernel, tokens = draw()
    logits = np.asarray(h @ kernel, np.float64)
    table = scipy.special.log_softmax(logits / temperature, axis=-1)
    expected = np.take_along_axis(table, np.asarray(tokens)[..., None], -1)[..., 0]
    ours = log_prob_of(jnp.asarray(logits, jnp.float32), tokens, temperature)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    np.testing.assert_allclose(
        entropy_of(jnp.asarray(logits, jnp.float32), temperature),
        scipy.stats.entropy(np.exp(table), axis=-1),
        atol=1e-5,
    )


def test_half_precision_logits_are_widened_first():
    h, kernel, tokens = draw()
    half = (h @ kernel).astype(jnp.bfloat16)
    ours = token_log_probs(half, tokens)
    assert ours.dtype == jnp.float32
    np.testing.assert_array_equal(
        ours, token_log_probs(half.astype(jnp.float32), tokens)
    )


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunked_is_plain(chunk):
    h, kernel, tokens = draw()
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, LENGTH)))

    def plain(h, kernel):
        logits = h @ kernel
        values = token_log_probs(logits, tokens, 1.7), token_entropies(logits, 1.7)
        return (weights * (values[0] + 0.3 * values[1])).sum(), values

    def chunked(h, kernel):
        values = chunked_token_log_probs(
            lambda h: h @ kernel, h, tokens, chunk=chunk, temperature=1.7, entropy=True
        )
        return (weights * (values[0] + 0.3 * values[1])).sum(), values

    ours, expected = (
        jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(h, kernel)
        for loss in (chunked, plain)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, expected
    )


def test_chunked_never_holds_all_logits(equation_outputs):
    h, kernel, tokens = draw()

    def loss(h, kernel):
        log_prob, entropies = chunked_token_log_probs(
            lambda h: h @ kernel, h, tokens, chunk=2
        )
        assert entropies is None
        return log_prob.sum()

    outputs = equation_outputs(jax.grad(loss, (0, 1)), h, kernel)
    sizes = [output.size for output in outputs if VOCAB in output.shape]
    assert max(sizes) == max(BATCH * 2 * VOCAB, HIDDEN * VOCAB)


def test_of_a_decoder():
    config = DecoderConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
    )
    apply_fn = functional(Decoder(config))
    _, _, tokens = draw()
    params = init_params(Decoder(config), jax.random.key(0), tokens)

    @jax.jit
    def both(params):
        run = functools.partial(apply_fn, params)
        output = functools.partial(run, method="output")
        h = run(tokens, method="hidden")
        return (
            token_log_probs(run(tokens), tokens),
            chunked_token_log_probs(output, h, tokens, chunk=3)[0],
        )

    plain, chunked = both(params)
    np.testing.assert_allclose(chunked, plain, atol=1e-5)


def test_wrong_inputs(as_shipped):
    h, kernel, tokens = draw()
    with pytest.raises(ValueError, match=r"tokens have shape \(2, 7\); give one a pos"):
        token_log_probs(h @ kernel, tokens[:, 1:])
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"temperature=.* is outside \(0, inf\)"):
            token_log_probs(h @ kernel, tokens, temperature)
        with pytest.raises(ValueError, match=r"temperature=.* is outside \(0, inf\)"):
            chunked_token_log_probs(lambda h: h, h, tokens, temperature=temperature)
    with pytest.raises(ValueError, match="chunk=0 must be at least 1"):
        chunked_token_log_probs(lambda h: h @ kernel, h, tokens, chunk=0)
