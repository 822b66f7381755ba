"""Many texts written side by side in slots of fixed shape: pure functions.

A slot holds one text: its keys and values, where it stands, and the token that comes
next into the network. A text enters with all of its tokens but the last in the cache
(:func:`prefill`, once for all that share them, and :func:`insert` for each); the last
one is what its first :func:`generate` step reads. So a new prompt and a half-written
text enter the same way, and no token is drawn outside of :func:`generate`.

Token i of a text is drawn with ``fold_in(key of the text, i)``, whatever its slot, its
neighbours or the number of times it was interrupted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from tmdjax import models
from tmdjax.core import prng
from tmdjax.core.types import Array, Params, PyTree
from tmdjax.generation.sampling import Sampling, sample
from tmdjax.quant import as_recipe


class CachedModel(NamedTuple):
    """A language model that generates: functions of its parameters.

    Attributes:
        vocab_size: number of token ids.
        init_cache: ``(slots, length) -> cache``, a tree of arrays [layer, slot,
            position, ...].
        prefill: ``(params, tokens [batch, length], lengths [batch]) -> (logits [batch,
            vocab], cache [layer, batch, length, ...])``.
        decode: ``(params, cache, tokens [slot], positions [slot]) -> (logits [slot,
            vocab], cache)``; a position outside the cache writes nothing.
        exact: whether its log-probs agree with those of training to float32 rounding,
            see :class:`tmdjax.quant.Recipe`.
    """

    vocab_size: int
    init_cache: Callable[[int, int], PyTree]
    prefill: Callable[[Params, Array, Array], tuple[Array, PyTree]]
    decode: Callable[[Params, PyTree, Array, Array], tuple[Array, PyTree]]
    exact: bool = True


def cached_decoder(config: models.DecoderConfig, dtype: Any = None) -> CachedModel:
    """The functions of a :class:`tmdjax.models.Decoder`, its cache in ``dtype``."""
    recipes = as_recipe(config.recipe), as_recipe(config.output_recipe)
    narrow = dtype is not None and jnp.dtype(dtype).itemsize < 4
    return CachedModel(
        config.vocab_size,
        lambda slots, length: models.init_cache(config, slots, length, dtype),
        lambda params, tokens, lengths: models.prefill(
            config, params, tokens, lengths, dtype
        ),
        lambda params, cache, tokens, positions: models.decode(
            config, params, cache, tokens, positions
        ),
        exact=all(r.exact and r.batch_independent for r in recipes) and not narrow,
    )


@struct.dataclass
class Slots:
    """Every slot between two steps.

    Attributes:
        cache: [layer, slot, position, ...].
        token: int32 [slot], the token that is read next.
        position: int32 [slot], place of that token in its text.
        active: bool [slot]; the others wait for a text.
        drawn: int32 [slot], how many tokens of the response there are.
        remaining: int32 [slot], how many more there may be.
        key: typed keys [slot], of the texts.
    """

    cache: Any
    token: Any
    position: Any
    active: Any
    drawn: Any
    remaining: Any
    key: Any


class Entry(NamedTuple):
    """Texts about to enter slots; the first ``count`` of [slot] rows.

    Attributes:
        count: int32 scalar.
        row: int32 [slot], the text's row of the prefilled cache.
        slot: int32 [slot], the slot that it enters.
        token: int32 [slot], last token of the text so far.
        position: int32 [slot], place of that token in the text.
        drawn: int32 [slot], tokens of the response so far.
        remaining: int32 [slot], how many more there may be, at least 1.
        key: typed keys [slot].
    """

    count: Any
    row: Any
    slot: Any
    token: Any
    position: Any
    drawn: Any
    remaining: Any
    key: Any


class Drawn(NamedTuple):
    """Tokens of some steps, [step, slot] each; nothing counts where not ``valid``.

    Attributes:
        token: int32.
        log_prob: float32, of the distribution it was drawn from.
        valid: bool.
    """

    token: Any
    log_prob: Any
    valid: Any


def init_slots(model: CachedModel, slots: int, length: int) -> Slots:
    """Empty slots."""
    # one buffer in two places could not be donated
    token, position, drawn, remaining = (jnp.zeros(slots, jnp.int32) for _ in range(4))
    return Slots(
        cache=model.init_cache(slots, length),
        token=token,
        position=position,
        active=jnp.zeros(slots, bool),
        drawn=drawn,
        remaining=remaining,
        key=prng.sample_keys(jax.random.key(0), slots),
    )


def prefill(model: CachedModel, params: Params, tokens: Array, lengths: Array) -> Any:
    """The cache [layer, batch, length, ...] of texts, from the model's own prefill."""
    return model.prefill(params, tokens, lengths)[1]


def insert(state: Slots, prefilled: PyTree, entry: Entry) -> Slots:
    """Puts texts into slots: their rows of a prefilled cache, and what comes next.

    Args:
        state: the slots before; donate it.
        prefilled: from :func:`prefill`, no longer than the slots; None where no text
            has more than one token.
        entry: which rows go to which slots, and how far each text is.

    Returns:
        The state with those slots active.
    """

    def one(i: Array, state: Slots) -> Slots:
        slot = entry.slot[i]
        cache = state.cache
        if prefilled is not None:
            cache = jax.tree.map(
                lambda whole, rows: jax.lax.dynamic_update_slice(
                    whole,
                    jax.lax.dynamic_slice_in_dim(rows, entry.row[i], 1, axis=1),
                    (0, slot) + (0,) * (whole.ndim - 2),
                ),
                cache,
                prefilled,
            )
        return Slots(
            cache=cache,
            token=state.token.at[slot].set(entry.token[i]),
            position=state.position.at[slot].set(entry.position[i]),
            active=state.active.at[slot].set(True),
            drawn=state.drawn.at[slot].set(entry.drawn[i]),
            remaining=state.remaining.at[slot].set(entry.remaining[i]),
            key=state.key.at[slot].set(entry.key[i]),
        )

    return jax.lax.fori_loop(0, entry.count, one, state)


def generate(
    model: CachedModel,
    params: Params,
    state: Slots,
    steps: int,
    sampling: Sampling,
    stop: tuple[int, ...] = (),
) -> tuple[Slots, Drawn]:
    """Draws up to ``steps`` tokens in every active slot, in one scan.

    Args:
        model: the functions of the language model.
        params: of the model.
        state: the slots before; donate it.
        steps: static; a slot that ends in between waits.
        sampling: how tokens are drawn.
        stop: ids that end a text; they belong to it.

    Returns:
        The slots after, and the tokens that were drawn.
    """
    length = jax.tree.leaves(state.cache)[0].shape[2]

    def step(state: Slots, _: None) -> tuple[Slots, Drawn]:
        active = state.active
        logits, cache = model.decode(
            params,
            state.cache,
            state.token,
            jnp.where(active, state.position, length),
        )
        keys = prng.fold_in(state.key, state.drawn)
        token, log_prob = sample(logits, keys, sampling)
        token = jnp.where(active, token, 0)
        remaining = state.remaining - active
        ended = (remaining <= 0) | jnp.isin(token, jnp.asarray(stop, jnp.int32))
        after = Slots(
            cache=cache,
            token=token,
            position=state.position + active,
            active=active & ~ended,
            drawn=state.drawn + active,
            remaining=remaining,
            key=state.key,
        )
        return after, Drawn(token, jnp.where(active, log_prob, 0), active)

    return jax.lax.scan(step, state, None, length=steps)


def deactivate(state: Slots, which: Array) -> Slots:
    """Frees the slots where ``which`` [slot] is True."""
    return state.replace(active=state.active & ~which)  # pyright: ignore
