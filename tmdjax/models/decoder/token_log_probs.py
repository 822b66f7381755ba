"""Log-probabilities of tokens, aligned with the token they belong to.

Logits at position t - 1 are a distribution of token t. The shift by one is made
here and nowhere else: what these functions return at [batch, t] is about token t,
and the first position, which nothing predicts, holds 0. In rows packed of several
texts that first token of each later text is not predicted either; the loss mask
leaves it out, as it does prompts and padding. So it is with padding on the left, where
the first token of the text seems to be predicted by the padding before it.

Functions of logits are :func:`token_log_probs` and :func:`token_entropies`; what
:func:`token_log_probs_from_hidden` takes are hidden states, and it gives both.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import check_count, check_range
from tmdjax.core.types import Array, ArrayLike, Float, Int


def log_prob_of(
    logits: Float[Array, "*batch vocab"],
    tokens: Int[Array, "*batch"],
    temperature: ArrayLike = 1.0,
) -> Float[Array, "*batch"]:
    """Log-probability of a token under the logits beside it; nothing is shifted.

    For a sampler: logits [slot, vocab] and the token [slot] drawn from
    softmax(logits / temperature).

    Args:
        logits: any floating dtype, [..., vocab].
        tokens: int [...], ids of the vocabulary.
        temperature: number above 0 that divides the logits.

    Returns:
        float32 [...].

    Raises:
        ValueError: a (concrete) temperature that is not above 0.
    """
    scaled = _scaled(logits, temperature)
    chosen = jnp.take_along_axis(scaled, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(scaled, axis=-1)


def entropy_of(
    logits: Float[Array, "*batch vocab"], temperature: ArrayLike = 1.0
) -> Float[Array, "*batch"]:
    """Entropy of softmax(logits / temperature) in nats, float32 [...].

    Raises:
        ValueError: a (concrete) temperature that is not above 0.
    """
    log_prob = jax.nn.log_softmax(_scaled(logits, temperature), axis=-1)
    # A logit of -inf has probability 0 and adds nothing.
    finite = jnp.where(jnp.isfinite(log_prob), log_prob, 0.0)
    return -jnp.sum(jnp.exp(log_prob) * finite, axis=-1)


def token_log_probs(
    logits: Float[Array, "batch position vocab"],
    tokens: Int[Array, "batch position"],
    temperature: ArrayLike = 1.0,
) -> Float[Array, "batch position"]:
    """Log-probability of each token, from the logits of the position before it.

    Args:
        logits: [batch, position, vocab] of the same tokens, any floating dtype.
        tokens: int [batch, position], ids of the vocabulary, also where a mask leaves
            them out.
        temperature: number above 0 that divides the logits.

    Returns:
        float32 [batch, position]; [:, t] is of token t, [:, 0] is 0.

    Raises:
        ValueError: shapes that disagree, a (concrete) id that has no logit, a
            (concrete) temperature not above 0.
    """
    _check(logits, tokens)
    if tokens.size and not isinstance(tokens, jax.core.Tracer):
        ids = np.asarray(tokens)
        first, last = int(ids.min()), int(ids.max())
        if first < 0 or last >= logits.shape[-1]:
            raise ValueError(
                f"tokens hold ids from {first} to {last}, but logits are of "
                f"{logits.shape[-1]} tokens. For hidden states there is "
                f"token_log_probs_from_hidden; for labels in which -100 marks what "
                f"does not count, give any id there and leave it out by the mask."
            )
    return _align(log_prob_of(logits[:, :-1], tokens[:, 1:], temperature))


def token_entropies(
    logits: Float[Array, "batch position vocab"], temperature: ArrayLike = 1.0
) -> Float[Array, "batch position"]:
    """Entropy of the distribution each token was drawn from, in nats.

    Returns:
        float32 [batch, position]; [:, t] is of the distribution of token t, [:, 0]
        is 0.
    """
    return _align(entropy_of(logits[:, :-1], temperature))


def token_log_probs_from_hidden(
    output: Callable[[Any], Any],
    h: Float[Array, "batch position hidden"],
    tokens: Int[Array, "batch position"],
    *,
    chunk: int = 256,
    temperature: ArrayLike = 1.0,
    entropy: bool = False,
) -> tuple[Array, Any]:
    """Log-probability of each token from hidden states, a chunk of positions at a time.

    Logits of all positions never exist at once, in neither pass: the backward pass
    makes those of a chunk again. Values and gradients are those of the plain form.

    Args:
        output: ``h [batch, chunk, hidden] -> logits [batch, chunk, vocab]``, closing
            over its parameters, such as ``lambda h: apply_fn(params, h,
            method='output')``; gradients reach them.
        h: hidden states [batch, position, hidden], see ``Decoder.hidden``.
        tokens: int [batch, position].
        chunk: positions at a time; the last chunk is padded.
        temperature: number above 0 that divides the logits.
        entropy: also compute entropies.

    Returns:
        Log-probabilities float32 [batch, position], aligned as in
        :func:`token_log_probs`, and entropies of the same shape or None.

    Raises:
        TypeError: chunk is not an integer.
        ValueError: shapes that disagree, a chunk below 1, a (concrete) temperature
            not above 0.
    """
    chunk = min(check_count("chunk", chunk), max(1, h.shape[1] - 1))
    _check(h, tokens)
    _scaled(jnp.zeros(()), temperature)
    batch, positions = tokens.shape[0], tokens.shape[1] - 1
    count = -(-positions // chunk)

    def cut(x: Array) -> Array:
        padding = [(0, 0), (0, count * chunk - positions)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding).reshape(batch, count, chunk, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    def join(x: Array) -> Array:
        return _align(jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :positions])

    def body(_: None, inputs: tuple[Array, Array]) -> tuple[None, Any]:
        h, following = inputs
        logits = output(h)
        log_prob = log_prob_of(logits, following, temperature)
        return None, (log_prob, entropy_of(logits, temperature) if entropy else None)

    # Inside a scan the compiler cannot merge the recomputation away.
    body = jax.checkpoint(body, prevent_cse=False)
    inputs = (cut(h[:, :-1]), cut(tokens[:, 1:]))
    _, (log_prob, entropies) = jax.lax.scan(body, None, inputs)
    return join(log_prob), join(entropies) if entropy else None


def _align(x: Array) -> Array:
    """Moves what the position before says about a token to the token."""
    return jnp.pad(x, ((0, 0), (1, 0)))


def _scaled(logits: Array, temperature: ArrayLike) -> Array:
    if not isinstance(temperature, jax.core.Tracer):
        value = np.asarray(temperature).item()
        check_range("temperature", value, 0, open_low=True, open_high=True)
    return logits.astype(jnp.float32) / temperature


def _check(x: Array, tokens: Array) -> None:
    if tokens.shape != x.shape[:2]:
        raise ValueError(
            f"tokens have shape {tokens.shape}; give one a position, {x.shape[:2]}."
        )
