"""Arms of precision, and the stress; numbers in names are the sheet's invariants."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import same
from numpy.testing import assert_allclose, assert_array_equal

from configs import jet_rl as config
from tmdjax import models, quant, rl
from tmdjax.generation import Engine, EngineConfig, cached_decoder
from tmdjax.systems import grpo, jet_rl

CONFIG = models.DecoderConfig(
    vocab_size=11, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=8, qkv_bias=True, remat=False, head_recipe="fp32",
)  # fmt: skip
SHAPE = (8, 16)


def drawn():
    """Parameters of a policy that is sure of some tokens."""
    network = models.Decoder(CONFIG)
    params = models.init_params(
        network, jax.random.key(0), jax.ShapeDtypeStruct((1, 4), np.int32)
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: np.float32(x + 0.15 * rng.normal(size=x.shape)), params
    )


PARAMS = drawn()
TOKENS = np.random.default_rng(1).integers(0, 10, SHAPE).astype(np.int32)


@functools.cache
def program(recipe):
    network = models.Decoder(models.with_recipe(CONFIG, quant.as_recipe(recipe)))
    return jax.jit(models.functional(network))


def log_probs(recipe, params=PARAMS, tokens=TOKENS):
    """Of all next tokens, [row, position, vocab]."""
    return np.asarray(jax.nn.log_softmax(program(recipe)(params, tokens)))


def test_arms_are_pairs_of_recipes_and_grpos_objective(refused):
    assert jet_rl.PRESETS.keys() == jet_rl.RECIPES.keys() == config.ARMS.keys()
    assert config.ARMS == jet_rl.RECIPES
    paper = config.get_config("paper")
    for name, arm in paper.arms.items():
        pair = arm.get("precision", paper.precision)
        assert (pair.rollout, pair.train) == jet_rl.RECIPES[name]
        assert arm.method.name == f"jet_rl:{name}"
    for narrow, wide in config.OUT_FP32.items():
        assert quant.as_recipe(wide).dtype == jnp.float32, narrow
    plain = grpo.preset("grpo")
    changed = {
        "truncated": {"correction": "truncate", "max_weight": 2.0},
        "calibrated": {"calibrate_every": 20},
    }
    for name in jet_rl.PRESETS:
        expected = dataclasses.replace(plain, **changed.get(name, {}))
        assert jet_rl.preset(name) == expected
        pair = jet_rl.precision(name)
        assert (pair.rollout == pair.train) == ("fp8_rollout" not in pair.rollout.name)
        assert pair.rollout.batch_independent == (name != "unified_tensor")
    assert jet_rl.preset("jet_rl", clip_range=0.3) == grpo.preset(
        "grpo", clip_range=0.3
    )
    refused("preset='fp8' is not one of 'bf16'", jet_rl.preset, "fp8")
    refused("precision='fp16'", jet_rl.precision, "fp16")
    refused("no field 'clip'|clip", jet_rl.preset, "unified", clip=1, error=TypeError)


def test_stress_changes_no_function_and_makes_rounding_worse():
    exact = log_probs("fp32")
    stressed = jet_rl.outlier_channels(PARAMS, CONFIG, channels=2)
    assert_allclose(log_probs("fp32", stressed), exact, atol=1e-4)
    for recipe in ("bf16", "fp8_block"):
        plain, worse = (
            np.abs(log_probs(recipe, params) - exact).mean()
            for params in (PARAMS, stressed)
        )
        assert worse > 2 * plain > 0, recipe
    # values have channels of about 32 times the size of others, in every head
    value = np.asarray(stressed["blocks"]["attention"]["value"]["kernel"])
    size = np.abs(value.reshape(2, 32, 2, 8)).mean(1)
    assert (size[..., 6:] > 15 * size[..., :6].max()).all()
    # all but two arrays of the attention, and a bias, stay
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), PARAMS, stressed)
    assert sum(jax.tree.leaves(moved)) == 3
    # it can be taken back
    back = jet_rl.outlier_channels(stressed, CONFIG, channels=2, factor=-32.0)
    same(back, PARAMS, atol=1e-5)


def test_6_other_rows_change_nothing_under_scales_of_a_token():
    """Not even a token whose hidden state is 1e4 in one channel and 0 in all others."""
    other = TOKENS.copy()
    other[1:] = 10
    params = PARAMS | {"embedding": PARAMS["embedding"].copy()}
    params["embedding"][10] = 1e4 * np.eye(32)[5]
    for recipe in ("fp8_block", "fp8_tensor"):
        found = [log_probs(recipe, params, tokens)[0] for tokens in (TOKENS, other)]
        if recipe == "fp8_block":
            assert_array_equal(*found)
        else:
            assert np.abs(found[0] - found[1]).max() > 1e-3


@functools.cache
def written():
    """Records of an engine in 8 bits."""
    acting = models.with_recipe(CONFIG, jet_rl.precision("unified").rollout)
    engine = Engine(
        cached_decoder(acting),
        models.prepare_weights(PARAMS, config=acting),
        EngineConfig(slots=8, length=16, steps=4, stop=()),
        jax.random.key(1),
    )
    engine.submit(range(8), prompt=[1, 2, 3], max_new_tokens=13)
    return engine.run()


def distances(recipe):
    """Log-probs of training less those of the engine, [record, token]."""
    records = written()
    tokens = np.array([[*r.prompt, *r.tokens] for r in records], np.int32)
    found = log_probs(recipe, PARAMS, tokens)[:, 2:-1]
    own = np.take_along_axis(found, tokens[:, 3:, None], -1)[..., 0]
    return own - np.array([r.log_probs for r in records])


def test_7_and_8_one_flow_agrees_with_itself():
    unified, apart = distances("fp8_block"), distances("bf16")
    assert np.abs(apart).mean() > 10 * np.abs(unified).mean()
    low, high = rl.beyond_clip(unified, jet_rl.preset("unified").clip_range)
    assert not (low | high).any()
    mask = np.ones(unified.shape, bool)
    kl = [float(rl.mismatch(d, 0 * d, mask)["mismatch_kl"]) for d in (unified, apart)]
    assert kl[1] > 10 * kl[0] >= 0


def test_13_truncated_weights():
    objective = jet_rl.preset("truncated")
    behaviour = np.float32([[-1.0, -2.0, -0.5]])
    proximal = behaviour + np.float32([[0.1, -0.3, 1.2]])
    given = {"high": objective.max_weight}
    found = rl.truncated_weights(proximal, behaviour, **given)
    assert_allclose(found, np.exp([[0.1, -0.3, math.log(2)]]), rtol=1e-5)
    alike = rl.truncated_weights(behaviour, behaviour, high=math.inf)
    assert_array_equal(alike, np.ones((1, 3)))


def test_bad_stress(refused):
    stress = functools.partial(jet_rl.outlier_channels, PARAMS, CONFIG)
    refused("channels=5 of head_dim=8: .* at most 4", stress, 5)
    refused("channels=0 must be at least 1", stress, 0)
    refused("factor=inf is outside", stress, 1, math.inf)
    fused = models.fuse_projections(PARAMS)
    refused("qkv and no 'value'; .*fuse", jet_rl.outlier_channels, fused, CONFIG)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    message = "kernel of 'value' has bfloat16; .* float32"
    refused(message, jet_rl.outlier_channels, narrow, CONFIG)
    kernel = quant.Quantised(np.zeros((2, 32, 16)), np.ones((2, 1, 1)), "tensor")
    attention = PARAMS["blocks"]["attention"] | {"value": {"kernel": kernel}}
    prepared = {"blocks": {"attention": attention}}
    refused("no dtype: it is prep", jet_rl.outlier_channels, prepared, CONFIG)


@pytest.mark.parametrize("tier", ["cpu", "gpu"])
def test_widths_that_are_quantised_are_multiples_of_128(tier):
    sizes = config.get_config(tier).model
    widths = (sizes.hidden_size, sizes.intermediate_size)
    heads = (sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim)
    assert all(width % 128 == 0 for width in (*widths, *heads))
