"""Generation with a cache: equal to the full forward, in place, compiled once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import draw_tokens, equal, jitted, random_params, small_decoder
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax.core import trees
from tmdjax.models import Decoder, cache_bytes, decode, init_cache, prefill
from tmdjax.models.decoder.cache import fuse_projections, prepare_weights

LENGTH, SLOTS = 12, 3
NORMED = small_decoder(head_dim=6, qk_norm=True)
BIASED = small_decoder(head_dim=6, qkv_bias=True, tied_embedding=True)
WINDOW = small_decoder(sliding_window=3)
KINDS = ("full_attention", "sliding_attention", "full_attention")
WINDOWS = dataclasses.replace(BIASED, sliding_window=2, layer_types=KINDS)


@functools.cache
def steps(config):
    start = jax.jit(functools.partial(prefill, config), static_argnames="dtype")
    return start, jax.jit(functools.partial(decode, config), donate_argnums=1)


def empty(config=NORMED):
    return init_cache(config, SLOTS, LENGTH)


def insert(cache, prefix):
    """Rows of a prefill as the first slots."""
    update = functools.partial(jax.lax.dynamic_update_slice, start_indices=(0,) * 5)
    return jax.tree.map(lambda a, b: update(a, b.astype(a.dtype)), cache, prefix)


@pytest.mark.parametrize(
    ("config", "fused"),
    [(NORMED, False), (NORMED, True), (WINDOWS, False), (BIASED, True), (WINDOW, True)],
    ids=["normed", "normed fused", "windows", "biased fused", "window fused"],
)
def test_prefill_and_decode_are_the_full_forward(config, fused):
    tokens, params = draw_tokens(SLOTS, LENGTH), random_params(config)
    full = jitted(Decoder(config))(params, tokens)
    if fused:
        params = fuse_projections(params)
    run_prefill, run_decode = steps(config)
    # prompts of several lengths, padded with an id that must not matter
    lengths = jnp.array([2, 5, 3])
    bucket = jnp.where(jnp.arange(5) < lengths[:, None], tokens[:, :5], 12)
    logits, prefix = run_prefill(params, bucket, lengths)
    rows = jnp.arange(SLOTS)
    assert_allclose(logits, full[rows, lengths - 1], atol=1e-5)
    # what an earlier text left in the slots
    cache = jax.tree.map(lambda leaf: leaf + 7, empty(config))
    cache = insert(cache, prefix)
    positions, programs = lengths, []
    for _ in range(LENGTH - 5):
        logits, cache = run_decode(params, cache, tokens[rows, positions], positions)
        assert logits.dtype == jnp.float32
        assert_allclose(logits, full[rows, positions], atol=1e-5)
        positions = positions + 1
        programs.append(run_decode._cache_size())
    assert programs[0] == programs[-1]  # one for all steps


def test_prefill_and_decode_take_embeddings():
    tokens, params = draw_tokens(SLOTS, LENGTH), random_params(NORMED)
    run_prefill, run_decode = steps(NORMED)
    lengths = jnp.full(SLOTS, 4)
    expected = run_prefill(params, tokens[:, :4], lengths)
    ours = run_prefill(params, params["embedding"][tokens[:, :4]], lengths)
    equal(ours, expected)
    caches = [insert(empty(), ours[1]) for _ in range(2)]
    a, _ = run_decode(params, caches[0], tokens[:, 4], lengths)
    b, _ = run_decode(params, caches[1], params["embedding"][tokens[:, 4]], lengths)
    assert_array_equal(a, b)


@pytest.mark.parametrize("position", [LENGTH, LENGTH + 3, -1])
def test_idle_slot_is_left_as_it_is(position):
    params = random_params(NORMED)
    cache = jax.tree.map(lambda leaf: leaf + 2, empty())
    positions = jnp.array([1, position, 2])
    logits, cache = steps(NORMED)[1](params, cache, jnp.zeros(SLOTS, int), positions)
    assert np.isfinite(logits).all()
    for leaf in cache.values():
        assert (leaf[:, 1] == 2).all()
        changed = np.asarray((leaf != 2).any((0, 3, 4)))
        assert_array_equal(np.argwhere(changed), [[0, 1], [2, 2]])


def test_keys_and_values_are_kept_in_the_dtype_asked_for():
    tokens, params = draw_tokens(SLOTS, LENGTH), random_params(NORMED)
    cache = init_cache(NORMED, SLOTS, LENGTH, jnp.bfloat16)
    run_prefill, run_decode = steps(NORMED)
    lengths = jnp.full(SLOTS, 4)
    _, prefix = run_prefill(params, tokens[:, :4], lengths, dtype=jnp.bfloat16)
    assert prefix["k"].dtype == prefix["v"].dtype == jnp.bfloat16
    logits, cache = run_decode(params, insert(cache, prefix), tokens[:, 4], lengths)
    assert cache["k"].dtype == jnp.bfloat16
    full = jitted(Decoder(NORMED))(params, tokens)[:, 4]
    assert_allclose(logits, full, atol=0.02 * np.abs(full).max())


def test_cache_bytes():
    cache = init_cache(NORMED, 2, 5, jnp.bfloat16)
    assert cache["k"].shape == (3, 2, 5, 2, 6)
    assert cache_bytes(NORMED, 2, 5, jnp.bfloat16) == trees.nbytes(cache) == 1440
    half = small_decoder(recipe="bf16")
    assert init_cache(half, 2, 5)["v"].dtype == jnp.bfloat16
    # nothing is allocated
    assert cache_bytes(NORMED, 10**6, 10**6) == 3 * 10**12 * 2 * 6 * 2 * 4


def test_decoding_lowers_for_cuda_and_tpu():
    config = dataclasses.replace(NORMED, recipe="bf16", attention_implementation="xla")
    idle = jnp.zeros(SLOTS, jnp.int32)
    fused = prepare_weights(fuse_projections(random_params(NORMED)), config)
    arguments = jax.eval_shape(lambda: (fused, empty(config), idle, idle))
    step = jax.jit(functools.partial(decode, config), donate_argnums=1)
    exported = jax.export.export(step, platforms=["cuda", "tpu"])(*arguments)
    assert exported.platforms == ("cuda", "tpu")


def test_fused_parameters():
    params = random_params(BIASED)
    half = dataclasses.replace(BIASED, recipe="bf16")
    fused = prepare_weights(fuse_projections(params), half)
    blocks = fused["blocks"]
    assert set(blocks["attention"]) == {"qkv", "out"}
    assert blocks["attention"]["qkv"]["bias"].shape == (3, 48)
    assert set(blocks["mlp"]) == {"gate_up", "down"}
    assert trees.count(fused) == trees.count(params)
    narrow = {k for k, v in trees.flatten(fused).items() if v.dtype == jnp.bfloat16}
    kernels = {k for k in trees.flatten(fused) if k.endswith("/kernel")}
    assert narrow == kernels | {"embedding"} and len(kernels) == 4
    exact_head = dataclasses.replace(half, head_recipe="fp32")  # the tied embedding
    assert prepare_weights(params, exact_head)["embedding"].dtype == jnp.float32


@pytest.mark.parametrize("tied", [False, True])
def test_prepared_weights_change_no_bit_of_a_decoding_step(tied):
    config = small_decoder(
        head_dim=6,
        qkv_bias=True,
        tied_embedding=tied,
        recipe="bf16",
        head_recipe="fp32",
    )
    params, idle = random_params(config), jnp.zeros(SLOTS, jnp.int32)
    each = [params, prepare_weights(params, config)]
    logits, cache = zip(
        *(steps(config)[1](p, empty(config), idle + 3, idle) for p in each)
    )
    assert_array_equal(logits[0], logits[1])
    equal(*(c for c in cache))


def test_wrong_inputs(refused):
    params, two = random_params(NORMED), jnp.zeros(2, int)
    message = "the cache has 3 slots: give one of each"
    refused(message, decode, NORMED, params, empty(), two, two)
    start = functools.partial(prefill, NORMED, params)
    ids = jnp.zeros((2, 4), int)
    refused(r"lengths \(3,\); give ids", start, ids, jnp.ones(3, int))
    message = r"tokens \(ids.*\)=-1 is outside \[0, 12\]"
    refused(message, start, ids - 1, two + 1)
    refused("slots=0 must be at least 1", init_cache, NORMED, 0, 4)
