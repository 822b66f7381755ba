"""Rollouts in 8 bits beside training (Jet-RL's sheet; invariants numbered).

The language model is a table of bigrams behind one product: it compiles at once.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import same

from tmdjax import models, quant, rl, runtime
from tmdjax.generation import CachedModel, Engine, EngineConfig
from tmdjax.quant import Precision
from tmdjax.runtime import LanguageSettings, Prompt
from tmdjax.systems import grpo

KEY, VOCAB, WIDTH = jax.random.key(0), 11, 16
RNG = np.random.default_rng(0)
PARAMS = {
    "table": jnp.float32(RNG.normal(size=(VOCAB, WIDTH))),
    "kernel": jnp.float32(RNG.normal(size=(WIDTH, VOCAB)) / 2),
}
SETTINGS = LanguageSettings(
    prompts=2, samples=4, max_new_tokens=6, microbatch=4, minibatches=2
)
UNIFIED = Precision(rollout="fp8_block", train="fp8_block")
MIXED = Precision(rollout="fp8_rollout_only", train="fp32")


def logits_of(recipe, params, tokens):
    return quant.linear(params["table"][tokens], params["kernel"], recipe).astype("f4")


def bigrams(recipe):
    def cache(rows, length):
        return {"seen": jnp.zeros((1, rows, length))}

    def prefill(params, tokens, lengths):
        return logits_of(recipe, params, tokens[:, -1]), cache(*tokens.shape)

    def decode(params, cache, tokens, positions):
        return logits_of(recipe, params, tokens), cache

    return CachedModel(VOCAB, cache, prefill, decode, exact=False)


def log_probs(recipe, params, tokens, positions, segments):
    logits = logits_of(recipe, params, tokens)
    return models.token_log_probs(logits, tokens), models.token_entropies(logits)


MADE = []


def published(params, recipe):
    MADE.append(params)
    return {**params, "kernel": recipe.prepare(params["kernel"])}


def draw(iteration, attempt):
    rng = np.random.default_rng([iteration, attempt])
    return [Prompt(rng.integers(0, VOCAB, 3).tolist(), None) for _ in range(2)]


def low(problem, tokens):
    return float(np.mean([token < 5 for token in tokens]))


@functools.cache
def engine_of(precision):
    config = EngineConfig(slots=8, length=16, steps=3, stop=(10,))
    return Engine(bigrams(precision.rollout), PARAMS, config, KEY)


def made(precision, rate=0.0, objective=None, **changes):
    iterate = runtime.make_iteration(
        engine_of(precision),
        functools.partial(log_probs, precision.train),
        objective or grpo.preset("grpo"),
        optax.sgd(rate),
        dataclasses.replace(SETTINGS, **changes),
        draw,
        low,
        length=16,
        generation_params=functools.partial(published, recipe=precision.rollout),
        precision=precision,
    )
    return iterate, iterate.init(PARAMS)


def copied(state):
    """As a checkpoint gives it back."""
    return jax.tree.map(lambda x: jnp.asarray(np.array(x)), state)


def test_7_and_8_one_recipe_for_both_is_one_policy(refused):
    """By the log-probs of the rollout; and what is published is made once an update."""
    iterate, state = made(UNIFIED, 3.0, proximal="behaviour")
    engine = engine_of(UNIFIED)
    MADE.clear()
    for _ in range(2):
        trained = jax.device_get(state.learner.params)
        rollout = iterate.collect(state, None, KEY)
        own = UNIFIED.train.prepare(jnp.asarray(trained["kernel"]))
        same(engine._params["kernel"], own)  # values and scales, to the bit
        kept = copied(state)
        state, metrics = iterate.learn(state, rollout, KEY)
        assert metrics["first_ratio_error"] < 1e-5
        assert 0 <= metrics["mismatch_kl"] < 1e-10
        assert metrics["mismatch_max"] < 1e-5
        assert 0 < metrics["quantised_moved"] < 1
    assert state.skipped == 0 and len(MADE) == 3  # the start's and that of each update
    # a run that was killed says the same, though it never saw what was published before
    again, told = made(UNIFIED, 3.0, proximal="behaviour")[0].iterate(kept, None, KEY)
    assert told == metrics
    same(again, state)
    message = (
        r"tokens of weights of version \[1\], but the state is that of iteration 2"
    )
    refused(message, iterate.learn, state, rollout, KEY)


def compared(records):
    """:func:`rl.mismatch` of all responses, by a forward pass of their texts in rows."""
    tokens, start = np.zeros((len(records), 16), int), len(records[0].prompt)
    given = np.zeros((len(records), 16 - start), np.float32)
    for row, record in enumerate(records):
        text = [*record.prompt, *record.tokens]
        tokens[row, : len(text)] = text
        given[row, : len(record)] = record.log_probs
    found = log_probs(MIXED.train, PARAMS, jnp.asarray(tokens), None, None)[0]
    live = np.arange(16 - start) < np.array([[len(record)] for record in records])
    return jax.device_get(rl.mismatch(found[:, start:], given, live))


def test_a_mixed_pair_is_seen_and_said_once(caplog):
    objective = grpo.preset("decoupled", correction="truncate")
    bounds = {"max_mismatch_kl": 1e-6, "frozen_after": 3}
    iterate, state = made(MIXED, 0.0, objective, **bounds)
    found = []
    for _ in range(4):
        rollout = iterate.collect(state, None, KEY)
        state, metrics = iterate.learn(state, rollout, KEY)
        found.append(metrics)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3 and said[0].startswith("quantised_padded=98.9%")  # 16 x 11
    assert said[1].startswith("mismatch_kl=")
    assert "frozen: quantised_moved=0 in each of the last 3" in said[2]
    for metrics in found:
        assert metrics["quantised_moved"] == 0
        assert 1e-6 < metrics["mismatch_kl"] < metrics["mismatch_max"] < 0.5
        assert metrics["mismatch_mean"] < metrics["mismatch_max"]
        assert min(metrics["mismatch_early"], metrics["mismatch_late"]) > 1e-4
    # of every token alike, though minibatches have more and fewer
    lengths = [len(record) for record in rollout.records]
    assert len(set(lengths)) > 1
    for name, value in compared(rollout.records).items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-4), name
