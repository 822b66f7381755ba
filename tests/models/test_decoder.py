"""Decoder: parity with transformers, padding, packing, splits, log-probs, devices."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import (
    checkpoint,
    close,
    draw_tokens,
    golden,
    jitted,
    random_params,
    small_decoder,
)
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import log_softmax

from tmdjax import models
from tmdjax.models import Decoder, functional
from tmdjax.models.checkpoints.decoder import params_from_hf

CASES = (
    *("llama_grouped_tied", "llama_full_untied", "qwen2_grouped_untied"),
    *("qwen2_single_tied", "qwen3_wide_untied", "qwen3_full_tied"),
)
SMALL = small_decoder(qk_norm=True)
MODULE = Decoder(SMALL)
SLIDING = "sliding_attention"


def small_params():
    return random_params(SMALL)


def logits_of(*inputs):
    return jitted(MODULE)(small_params(), *inputs)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case):
    config, weights = checkpoint(case)
    tokens, logits = golden(case)["tokens"].astype(np.int32), golden(case)["logits"]
    assert case.split("_")[0] == config.model_type
    assert case.endswith("_tied") == config.tied_embedding
    params = params_from_hf(config, weights)
    ours = jitted(Decoder(config))(params, tokens)
    assert ours.dtype == jnp.float32
    assert_allclose(ours, logits, atol=2e-4)
    if case == "qwen3_wide_untied":  # narrow products stay near them
        half = Decoder(dataclasses.replace(config, recipe="bf16"))
        rough = jitted(half)(params, tokens)
        assert rough.dtype == jnp.float32
        assert_allclose(rough, logits, atol=0.05 * np.abs(logits).max())


def test_the_first_layer_that_is_not_finite_is_named():
    config = dataclasses.replace(SMALL, num_tokens=SMALL.vocab_size - 3)
    tokens, depth = draw_tokens(2, 7), config.num_layers
    segments = np.ones(tokens.shape, np.int32)
    segments[1, 4:] = 0

    def found(*path, at=..., factor=1.0, tokens=tokens):
        params = jax.tree.map(np.array, small_params())
        leaf = functools.reduce(lambda tree, name: tree[name], path, params)
        leaf[at] *= factor
        return models.first_non_finite(config, params, tokens, None, segments)

    assert found("embedding") is None
    mlp = ("blocks", "mlp_norm", "scale")  # a product of two such overflows
    assert found(*mlp, at=-1, factor=1e25) == f"blocks/{depth - 1}"
    assert found(*mlp, factor=1e25) == "blocks/0"
    assert found(*mlp, at=-1, factor=np.inf) == "blocks/mlp_norm/scale"
    assert found("norm", "scale", factor=2e38) == "logits"
    beyond = np.where(segments == 0, -1, tokens)  # a NaN, of padding: not looked at
    assert found("embedding", tokens=jnp.asarray(beyond)) == "blocks/0"  # 0 x NaN
    beyond[0, 2] = -1
    assert found("embedding", tokens=jnp.asarray(beyond)) == "embedding"


def test_rows_of_a_padded_embedding_are_never_drawn_and_weigh_nothing(refused):
    count = SMALL.vocab_size - 3
    padded = dataclasses.replace(SMALL, num_tokens=count)
    tokens = draw_tokens(2, 7) % count
    whole = logits_of(tokens)
    logits = np.asarray(jitted(Decoder(padded))(small_params(), tokens))
    assert_array_equal(logits[..., :count], whole[..., :count])
    assert (logits[..., count:] == -np.inf).all()
    lengths = np.full(2, 7, np.int32)
    prefill = jax.jit(models.prefill, static_argnums=0)
    drawn = np.asarray(prefill(padded, small_params(), tokens, lengths)[0])
    assert (drawn[:, count:] == -np.inf).all() and np.isfinite(drawn[:, :count]).all()
    expected = log_softmax(np.asarray(whole)[:, :-1, :count], axis=-1)
    expected = np.take_along_axis(expected, tokens[:, 1:, None], -1)[..., 0]
    found = np.asarray(jax.jit(models.token_log_probs)(logits, tokens))
    assert_allclose(found[:, 1:], expected, atol=1e-5)

    def total(params):
        logits = functional(Decoder(padded))(params, tokens)
        both = models.token_log_probs(logits, tokens) + models.token_entropies(logits)
        return both.sum()

    gradient = jax.jit(jax.grad(total))(small_params())
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    for bad in (0, SMALL.vocab_size + 1):
        refused(f"num_tokens={bad}", dataclasses.replace, SMALL, num_tokens=bad)


def test_left_padded_is_unpadded():
    tokens = draw_tokens(2, 7)
    whole = logits_of(tokens)
    padded = jnp.pad(tokens, ((0, 0), (3, 0)))
    segments = (jnp.arange(10) >= 3).astype(jnp.int32) * jnp.ones((2, 1), jnp.int32)
    ours = logits_of(padded, None, segments)
    assert_allclose(ours[:, 3:], whole, atol=1e-5)
    assert np.isfinite(ours).all()
    # padding holds any id
    other = logits_of(padded.at[:, :3].set(5), None, segments)
    assert_array_equal(other[:, 3:], ours[:, 3:])
    # and its positions any number, such as other code gives
    theirs = jnp.maximum(jnp.cumsum(segments, 1) - 1, 0).at[:, :3].set(1)
    assert_allclose(logits_of(padded, theirs, segments)[:, 3:], whole, atol=1e-5)
    for function in (models.token_log_probs, lambda x, _: models.token_entropies(x)):
        expected = function(whole, tokens)[:, 1:]
        assert_allclose(function(ours, padded)[:, 4:], expected, atol=1e-5)


def test_right_padding_needs_no_segments():
    tokens = draw_tokens(2, 7)
    close(logits_of(tokens)[:, :4], logits_of(tokens[:, :4]))


def test_packed_is_unpacked():
    tokens = draw_tokens(2, 7)
    packed = jnp.concatenate([tokens[:1, :5], tokens[1:], jnp.zeros((1, 1), int)], 1)
    segments = jnp.asarray([[1] * 5 + [2] * 7 + [0]], jnp.int32)
    ours = logits_of(packed, None, segments)
    whole = logits_of(tokens)
    assert_allclose(ours[0, :5], whole[0, :5], atol=1e-5)
    assert_allclose(ours[0, 5:12], whole[1], atol=1e-5)
    given = jnp.asarray([[*range(5), *range(7), 0]], jnp.int32)
    assert_array_equal(logits_of(packed, given, segments), ours)


def test_a_window_reaches_that_far_and_no_further():
    """And packed texts, each of its own window, are the texts alone."""
    tokens, params = draw_tokens(2, 10), small_params()
    for kinds, reach in ((None, 6), (("full_attention",) + 2 * (SLIDING,), 99)):
        config = dataclasses.replace(SMALL, sliding_window=3, layer_types=kinds)
        run = jitted(Decoder(config))
        logits = run(params, tokens)
        other = run(params, tokens.at[:, 0].set((tokens[:, 0] + 1) % 13))
        same = np.asarray(logits == other).all((0, 2))
        # three layers of it, each two positions back
        assert_array_equal(same, np.arange(10) > reach)
        order = jnp.asarray([[*range(4), *range(6)]])
        packed = jnp.concatenate([tokens[:1, :4], tokens[1:, :6]], 1)
        segments = jnp.asarray([[1] * 4 + [2] * 6], jnp.int32)
        ours = run(params, packed, order, segments)
        assert_allclose(ours[0, :4], logits[0, :4], atol=1e-5)
        assert_allclose(ours[0, 4:], logits[1, :6], atol=1e-5)
    # one as wide as the text is the program without, bit for bit
    wide = dataclasses.replace(SMALL, sliding_window=10)
    programs = [
        str(jax.make_jaxpr(functional(Decoder(c)))(params, tokens))
        for c in (wide, SMALL, dataclasses.replace(SMALL, sliding_window=9))
    ]
    assert programs[0] == programs[1] != programs[2]


def test_rotation_is_relative():
    tokens = draw_tokens(2, 7)
    moved = logits_of(tokens, jnp.arange(7)[None] + jnp.full((2, 1), 40))
    assert_allclose(moved, logits_of(tokens), atol=1e-4)


def test_embeddings_are_tokens():
    tokens = draw_tokens(2, 7)
    embeddings = small_params()["embedding"][tokens]
    assert_array_equal(logits_of(embeddings), logits_of(tokens))


def test_parts_are_the_whole():
    tokens, params = draw_tokens(2, 7), small_params()
    whole = jitted(MODULE, "hidden")(params, tokens)
    positions = jnp.tile(jnp.arange(7), (2, 1))

    @jax.jit
    def parts(params, tokens):
        run = functools.partial(functional(MODULE), params)
        h = run(tokens, method="embed")
        _, taps = run(h, positions, method="blocks", taps=(0, 2))
        lower, _ = run(h, positions, method="blocks", stop=1)
        upper, _ = run(lower, positions, method="blocks", start=1)
        skipped, _ = run(h, positions, method="blocks", skip=(1, 2))
        return taps, lower, upper, skipped, run(upper, method="output")

    taps, lower, upper, skipped, logits = parts(params, tokens)
    close((upper, taps[2], taps[0], skipped), (whole, whole, lower, lower))
    close(logits, jitted(MODULE)(params, tokens))


def test_spec_round_trip():
    spec = json.loads(json.dumps(models.spec_of(MODULE)))
    assert models.build(spec) == MODULE


def test_training_gradient_lowers_for_cuda_and_tpu():
    options = dict(recipe="bf16", attention_implementation="xla")
    apply_fn = functional(Decoder(dataclasses.replace(SMALL, **options)))
    segments = jnp.ones((2, 7), jnp.int32)

    def loss(params, tokens):
        run = functools.partial(apply_fn, params)
        output = functools.partial(run, method="output")
        h = run(tokens, None, segments, method="hidden")
        return models.token_log_probs_from_hidden(output, h, tokens, chunk=4)[0].sum()

    export = jax.export.export(jax.jit(jax.grad(loss)), platforms=["cuda", "tpu"])
    exported = export(small_params(), draw_tokens(2, 7))
    assert exported.platforms == ("cuda", "tpu")


EIGHT_DEVICES = """
import functools, jax, jax.numpy as jnp, numpy as np
from tmdjax import models, train
from tmdjax.core.trees import flatten

config = models.DecoderConfig(
    vocab_size=16, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=8, qkv_bias=True,
)
apply_fn = models.functional(models.Decoder(config))
tokens = jax.random.randint(jax.random.key(0), (8, 8), 0, 16)
params = models.init_params(models.Decoder(config), jax.random.key(1), tokens)

def step(params, tokens, key):
    def loss(params):
        run = functools.partial(apply_fn, params)
        output = functools.partial(run, method="output")
        h = run(tokens, method="hidden")
        log_probs, _ = models.token_log_probs_from_hidden(output, h, tokens, chunk=4)
        return -log_probs.mean()
    value, gradient = jax.value_and_grad(loss)(params)
    return jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient), value

def run(mesh):
    compiled, state, place = train.jit_train_step(
        step, jax.tree.map(jnp.array, params), mesh, rules=train.DECODER_RULES
    )
    losses = []
    for _ in range(5):
        state, loss = compiled(state, place(tokens), jax.random.key(0))
        losses.append(float(loss))
    return state, np.array(losses)

one, losses = run(train.make_mesh(devices=jax.devices()[:1]))
assert losses[-1] < losses[0] - 0.01, losses
for sizes in ((2, 2, 2), (1, 2, 4)):
    state, other = run(train.make_mesh(*sizes))
    np.testing.assert_allclose(other, losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, one)
    both, leaves = sizes[1] * sizes[2], flatten(state)
    for path, ways in (
        ("blocks/attention/query/kernel", both), ("blocks/mlp/down/kernel", both),
        ("blocks/attention/query/bias", sizes[2]), ("embedding", both), ("norm/scale", 1),
    ):
        leaf = leaves[path]
        assert leaf.addressable_shards[0].data.size * ways == leaf.size, path
print("same")
"""


@pytest.mark.slow
def test_eight_devices_equal_one(run_python):
    assert run_python(EIGHT_DEVICES, devices=8).strip().endswith("same")


def test_wrong_inputs(refused):
    call = functools.partial(functional(MODULE), small_params())
    refused(r"tokens \(ids.*\)=13 is outside \[0, 12\]", call, jnp.full((1, 2), 13))
    refused("last axis must be hidden_size=8", call, jnp.zeros((1, 2, 9)))
    refused(r"give ids \[batch, position\]", call, jnp.zeros(3, int))
    refused(
        "integer array; got .* dtype bool",
        call,
        jnp.zeros((3, 1), bool),
        error=TypeError,
    )
    ids, segments = jnp.zeros((2, 4), int), jnp.ones((2, 3), int)
    refused(r"segments have shape \(2, 3\); give one a", call, ids, None, segments)
    refused("is of type int; give a DecoderConfig", Decoder, 3, error=TypeError)
    assert np.isnan(logits_of(jnp.full((1, 2), 13))).all()
