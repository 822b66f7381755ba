"""A language model whose logits are small integers: equal on every machine.

They depend on every token before, through the cache: a token lost, doubled or put into
another slot changes what follows.
"""

import jax.numpy as jnp
import numpy as np

from tmdjax.generation import CachedModel

VOCAB = 13
PARAMS = {"salt": jnp.int32(5)}
OTHER = {"salt": jnp.int32(11)}


def _digest(values, live):
    """[..., position] -> [...]: order matters."""
    place = jnp.arange(values.shape[-1]) + 3
    return jnp.sum(jnp.where(live, values * place * place % 10007, 0), -1) % 10007


def _logits(digest, salt):
    v = jnp.arange(VOCAB)
    return ((digest[..., None] * (v + 2) + salt * v * v) % 7).astype(jnp.float32)


def _stored(tokens, params):
    return (tokens + 1) * (params["salt"] + 2)


def integer_model():
    def init_cache(slots, length):
        return {"seen": jnp.zeros((1, slots, length), jnp.int32)}

    def prefill(params, tokens, lengths):
        seen = _stored(tokens, params)
        live = jnp.arange(tokens.shape[1]) < lengths[:, None]
        return _logits(_digest(seen, live), params["salt"]), {"seen": seen[None]}

    def decode(params, cache, tokens, positions):
        slot = jnp.arange(tokens.shape[0])
        new = _stored(tokens, params)
        seen = cache["seen"].at[0, slot, positions].set(new, mode="drop")
        live = jnp.arange(seen.shape[2]) <= positions[:, None]
        return _logits(_digest(seen[0], live), params["salt"]), {"seen": seen}

    return CachedModel(VOCAB, init_cache, prefill, decode)


def logits_of(texts_and_salts, salt):
    """The next token's logits in numpy; (token, salt it was read with) each."""
    total = 0
    for i, (token, read) in enumerate(texts_and_salts):
        total += (token + 1) * (read + 2) * (i + 3) ** 2 % 10007
    v = np.arange(VOCAB)
    return ((total % 10007 * (v + 2) + salt * v * v) % 7).astype(np.float64)
