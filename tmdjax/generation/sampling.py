"""One token from logits, with the log-prob of the distribution it was drawn from."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from tmdjax.core.checks import check_count, check_range
from tmdjax.core.types import Array, SampleKeys


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token, whose
            log-prob is then 0.
        top_k: only the most likely that many, or None for all.
        top_p: the fewest tokens whose probability sums to at least this, in (0, 1].
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, 0, math.inf, open_high=True)
        if self.top_k is not None:
            check_count("top_k", self.top_k)
        check_range("top_p", self.top_p, 0, 1, open_low=True)

    @property
    def is_exact(self) -> bool:
        """Whether every token keeps a probability: what training wants."""
        return self.temperature > 0 and self.top_k is None and self.top_p == 1


def sampling_log_probs(logits: Array, sampling: Sampling) -> Array:
    """Log-probs of the distribution that :func:`sample` draws from.

    Args:
        logits: [..., vocab], any float dtype.
        sampling: temperature is above 0.

    Returns:
        Float32 [..., vocab]; -inf for tokens that cannot be drawn. Tokens tied with the
        last one of the top k are all kept.
    """
    x = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < x.shape[-1]:
        least = jax.lax.top_k(x, sampling.top_k)[0][..., -1:]
        x = jnp.where(x < least, -jnp.inf, x)
    if sampling.top_p < 1:
        down = -jnp.sort(-x, axis=-1)
        probability = jax.nn.softmax(down, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        kept = jnp.sum(before < sampling.top_p, axis=-1, keepdims=True)
        least = jnp.take_along_axis(down, kept - 1, axis=-1)
        x = jnp.where(x < least, -jnp.inf, x)
    return jax.nn.log_softmax(x, axis=-1)


def sample(logits: Array, keys: SampleKeys, sampling: Sampling) -> tuple[Array, Array]:
    """Draws a token in every slot.

    Args:
        logits: [slot, vocab].
        keys: [slot].
        sampling: how they are drawn.

    Returns:
        int32 [slot] and its log-prob, float32 [slot].
    """
    if sampling.temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return token, jnp.zeros(token.shape, jnp.float32)
    log_probs = sampling_log_probs(logits, sampling)
    noise = jax.vmap(lambda k: jax.random.gumbel(k, logits.shape[1:]))(keys)
    token = jnp.argmax(log_probs + noise, axis=-1).astype(jnp.int32)
    return token, jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]
