"""Generation with a cache: equal to the full forward, in place, compiled once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax.core import trees
from tmdjax.models import (
    Decoder,
    DecoderConfig,
    cache_bytes,
    decode,
    functional,
    fuse_projections,
    init_cache,
    init_params,
    prefill,
)

LENGTH, SLOTS = 12, 3
SIZES = dict(
    vocab_size=13,
    hidden_size=8,
    intermediate_size=12,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
)
NORMED = DecoderConfig(**SIZES, qk_norm=True)
BIASED = DecoderConfig(**SIZES, qkv_bias=True, tied_embedding=True)


@functools.cache
def draw_params(config):
    params = init_params(Decoder(config), jax.random.key(0), jnp.zeros((1, 1), int))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype),
        params,
    )


def draw_tokens():
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.integers(0, 13, (SLOTS, LENGTH)), jnp.int32)


@functools.cache
def steps(config):
    return (
        jax.jit(functools.partial(prefill, config), static_argnames="dtype"),
        jax.jit(functools.partial(decode, config), donate_argnums=1),
    )


def insert(cache, prefix):
    """Rows of a prefill as the first slots."""
    return jax.tree.map(
        lambda whole, part: jax.lax.dynamic_update_slice(
            whole, part.astype(whole.dtype), (0,) * 5
        ),
        cache,
        prefix,
    )


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("config", [NORMED, BIASED], ids=["normed", "biased"])
def test_prefill_and_decode_are_the_full_forward(config, fused):
    tokens, params = draw_tokens(), draw_params(config)
    full = jax.jit(functional(Decoder(config)))(params, tokens)
    if fused:
        params = fuse_projections(params)
    run_prefill, run_decode = steps(config)
    # prompts of several lengths, padded with an id that must not matter
    lengths = jnp.array([2, 5, 3])
    bucket = jnp.where(jnp.arange(5) < lengths[:, None], tokens[:, :5], 12)
    logits, prefix = run_prefill(params, bucket, lengths)
    rows = jnp.arange(SLOTS)
    np.testing.assert_allclose(logits, full[rows, lengths - 1], atol=1e-5)
    # what an earlier text left in the slots
    cache = jax.tree.map(lambda leaf: leaf + 7, init_cache(config, SLOTS, LENGTH))
    cache = insert(cache, prefix)
    positions = lengths
    for _ in range(LENGTH - 5):
        logits, cache = run_decode(params, cache, tokens[rows, positions], positions)
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, full[rows, positions], atol=1e-5)
        positions = positions + 1


def test_prefill_and_decode_take_embeddings():
    tokens, params = draw_tokens(), draw_params(NORMED)
    run_prefill, run_decode = steps(NORMED)
    lengths = jnp.full(SLOTS, 4)
    expected = run_prefill(params, tokens[:, :4], lengths)
    ours = run_prefill(params, params["embedding"][tokens[:, :4]], lengths)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)
    caches = [insert(init_cache(NORMED, SLOTS, LENGTH), ours[1]) for _ in range(2)]
    a, _ = run_decode(params, caches[0], tokens[:, 4], lengths)
    b, _ = run_decode(params, caches[1], params["embedding"][tokens[:, 4]], lengths)
    np.testing.assert_array_equal(a, b)


def test_slots_do_not_see_each_other():
    tokens, params = draw_tokens(), draw_params(NORMED)
    run_prefill, run_decode = steps(NORMED)
    lengths = jnp.full(SLOTS, 4)
    _, prefix = run_prefill(params, tokens[:, :4], lengths)
    outputs = []
    for other in (3, 9):
        cache = insert(init_cache(NORMED, SLOTS, LENGTH), prefix)
        cache = jax.tree.map(lambda leaf, o=other: leaf.at[:, 1].set(o), cache)
        step = run_decode(params, cache, tokens[:, 4].at[1].set(other), lengths)
        outputs.append(jax.tree.map(lambda leaf: np.asarray(leaf), step))
    for logits in outputs:
        np.testing.assert_array_equal(logits[0][[0, 2]], outputs[0][0][[0, 2]])


@pytest.mark.parametrize("position", [LENGTH, LENGTH + 3, -1])
def test_idle_slot_is_left_as_it_is(position):
    params = draw_params(NORMED)
    cache = jax.tree.map(lambda leaf: leaf + 2, init_cache(NORMED, SLOTS, LENGTH))
    positions = jnp.array([1, position, 2])
    logits, cache = steps(NORMED)[1](params, cache, jnp.zeros(SLOTS, int), positions)
    assert np.isfinite(logits).all()
    for leaf in cache.values():
        assert (leaf[:, 1] == 2).all()
        changed = np.asarray((leaf != 2).any((0, 3, 4)))
        np.testing.assert_array_equal(np.argwhere(changed), [[0, 1], [2, 2]])


def test_keys_and_values_are_kept_in_the_dtype_asked_for():
    tokens, params = draw_tokens(), draw_params(NORMED)
    cache = init_cache(NORMED, SLOTS, LENGTH, jnp.bfloat16)
    _, prefix = steps(NORMED)[0](
        params, tokens[:, :4], jnp.full(SLOTS, 4), dtype=jnp.bfloat16
    )
    assert prefix["k"].dtype == prefix["v"].dtype == jnp.bfloat16
    logits, cache = steps(NORMED)[1](
        params, insert(cache, prefix), tokens[:, 4], jnp.full(SLOTS, 4)
    )
    assert cache["k"].dtype == jnp.bfloat16
    full = jax.jit(functional(Decoder(NORMED)))(params, tokens)[:, 4]
    np.testing.assert_allclose(logits, full, atol=0.02 * np.abs(full).max())


def test_cache_bytes():
    cache = init_cache(NORMED, 2, 5, jnp.bfloat16)
    assert cache["k"].shape == (3, 2, 5, 2, 6)
    assert cache_bytes(NORMED, 2, 5, jnp.bfloat16) == trees.nbytes(cache) == 1440
    half = DecoderConfig(**SIZES, recipe="bf16")
    assert init_cache(half, 2, 5)["v"].dtype == jnp.bfloat16
    # nothing is allocated
    assert cache_bytes(NORMED, 10**6, 10**6) == 3 * 10**12 * 2 * 6 * 2 * 4


def test_one_program_for_all_steps(count_compiles):
    params = draw_params(NORMED)
    run = jax.jit(functools.partial(decode, NORMED), donate_argnums=1)
    cache, logits = init_cache(NORMED, SLOTS, LENGTH), None
    arguments = [
        (jnp.full(SLOTS, step, jnp.int32), jnp.full(SLOTS, step, jnp.int32))
        for step in range(3)
    ]
    logits, cache = run(params, cache, *arguments[0])
    with count_compiles() as counted:
        for tokens, positions in arguments[1:]:
            logits, cache = run(params, cache, tokens, positions)
    assert counted == [] and np.isfinite(logits).all()


def test_decoding_lowers_for_cuda_and_tpu():
    config = dataclasses.replace(NORMED, recipe="bf16", attention_implementation="xla")
    arguments = jax.eval_shape(
        lambda: (
            fuse_projections(draw_params(NORMED), jnp.bfloat16),
            init_cache(config, SLOTS, LENGTH),
            jnp.zeros(SLOTS, jnp.int32),
            jnp.zeros(SLOTS, jnp.int32),
        )
    )
    step = jax.jit(functools.partial(decode, config), donate_argnums=1)
    exported = jax.export.export(step, platforms=["cuda", "tpu"])(*arguments)
    assert exported.platforms == ("cuda", "tpu")


def test_fused_parameters():
    params = draw_params(BIASED)
    fused = fuse_projections(params, jnp.bfloat16)
    attention = fused["blocks"]["attention"]
    assert set(attention) == {"qkv", "out"}
    assert attention["qkv"]["kernel"].shape == (3, 8, 48)
    assert attention["qkv"]["bias"].shape == (3, 48)
    assert set(fused["blocks"]["mlp"]) == {"gate_up", "down"}
    assert {leaf.dtype for leaf in jax.tree.leaves(fused)} == {jnp.dtype("bfloat16")}
    assert trees.count(fused) == trees.count(params)


def test_wrong_inputs(as_shipped):
    params, cache = draw_params(NORMED), init_cache(NORMED, SLOTS, LENGTH)
    with pytest.raises(ValueError, match="the cache has 3 slots: give one of each"):
        decode(NORMED, params, cache, jnp.zeros(2, int), jnp.zeros(2, int))
    with pytest.raises(ValueError, match=r"lengths \(3,\); give ids"):
        prefill(NORMED, params, jnp.zeros((2, 4), int), jnp.ones(3, int))
    with pytest.raises(ValueError, match=r"an id\)=-1 is outside \[0, 12\]"):
        prefill(NORMED, params, jnp.full((2, 4), -1), jnp.ones(2, int))
    with pytest.raises(ValueError, match="slots=0 must be at least 1"):
        init_cache(NORMED, 0, 4)
