"""The objective: each method against its formula, in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from tmdjax import rl, runtime
from tmdjax.rl import TokenBatch, TokenRecord
from tmdjax.runtime import UpdateBatch
from tmdjax.systems import grpo

RNG = np.random.default_rng(0)
MASK = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]], bool)
LOG_PROB, PROXIMAL, BEHAVIOUR = np.float32(RNG.normal(-1.5, 0.3, (3, *MASK.shape)))
ADVANTAGE = np.float32([1.0, -2.0, 0.5])
A = ADVANTAGE[:, None]
RATIO = np.exp(LOG_PROB - PROXIMAL)


def found(objective, log_prob=LOG_PROB, reference=None, calibrated=None):
    texts = TokenBatch(*[None] * 5, MASK, BEHAVIOUR, None, None, None)
    rest = (None, PROXIMAL, reference, None, None, calibrated)
    batch = UpdateBatch(texts, ADVANTAGE, *rest)
    return objective.loss(jnp.asarray(log_prob), batch)[0]


def live(x):
    return np.where(MASK, x, 0)


def clipped(r, low, high):
    return np.maximum(-A * r, -A * np.clip(r, 1 - low, 1 + high))


SUMS = live(LOG_PROB - PROXIMAL).sum(1, keepdims=True)
WEIGHT = np.exp(PROXIMAL - BEHAVIOUR)
TEMPERATURE = np.where(A > 0, 1, 1.05)
LOSSES = {
    "grpo": clipped(RATIO, 0.2, 0.2),
    "dapo": clipped(RATIO, 0.2, 0.28),
    "gspo": clipped(np.exp(SUMS / MASK.sum(1, keepdims=True)), 3e-4, 4e-4),
    "cispo": -np.clip(RATIO, 0, 3) * A * LOG_PROB,
    "sapo": -A * 4 / TEMPERATURE / (1 + np.exp(-TEMPERATURE * (RATIO - 1))),
    "decoupled": clipped(RATIO, 0.2, 0.2) * np.where(WEIGHT <= 5, WEIGHT, 0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_c_losses(name):
    assert_allclose(found(grpo.preset(name)), live(LOSSES[name]), rtol=2e-5)


@pytest.mark.parametrize("correction", ["truncate", "sequence"])
def test_c_corrections(correction):
    difference = live(PROXIMAL - BEHAVIOUR)
    if correction == "sequence":
        difference = np.broadcast_to(difference.sum(1, keepdims=True), MASK.shape)
    weight = np.minimum(np.exp(difference), 1.1)
    objective = runtime.GroupRelativeObjective(correction=correction, max_weight=1.1)
    assert_allclose(found(objective), live(LOSSES["grpo"] * weight), rtol=2e-5)


def test_a_calibrated_range_stands_in_the_place_of_the_objectives():
    plain = grpo.preset("grpo")
    ours = found(plain, calibrated=np.float32([0.1, 0.3]))
    assert_allclose(ours, found(grpo.preset("grpo", clip_range=(0.1, 0.3))), rtol=1e-6)
    assert (ours != found(plain)).any()


def test_the_sequence_ratio_reaches_every_token():
    """GSPO's gradient at ratio 1 is that of the mean over the sequence's tokens."""
    total = lambda x: found(grpo.preset("gspo"), x).sum()  # noqa: E731
    gradient = jax.grad(total)(jnp.asarray(PROXIMAL))
    assert_allclose(gradient, live(-A * np.ones(MASK.shape)), rtol=1e-6)


def test_c_kl_to_a_reference():
    reference = LOG_PROB - 0.5
    objective = runtime.GroupRelativeObjective(kl_coefficient=2.0)
    extra = found(objective, reference=reference) - found(grpo.preset("grpo"))
    assert_allclose(extra, live(2 * (np.exp(-0.5) - 1 + 0.5)), rtol=1e-4)


def test_b_advantages_of_the_methods():
    records = [
        TokenRecord(number=i, group=group, prompt=(1,), reward=reward)
        for i, (group, reward) in enumerate(zip((0, 0, 0, 1, 1, 1), (1, 0, 0, 1, 1, 1)))
    ]
    centred = np.array([2, -1, -1, 0, 0, 0]) / 3
    for name, options, expected, rtol in (
        ("grpo", {}, centred / np.std([1, 0, 0], ddof=1), 1e-4),
        ("rloo", {}, 1.5 * centred, 1e-7),
        ("dr_grpo", {"length": 4}, centred, 1e-6),
    ):
        ours = grpo.preset(name, **options).advantages(records)
        assert_allclose(ours, expected, rtol=rtol, err_msg=name)


COUNT = MASK.sum(1)
SEQUENCES = np.repeat(1 / (3 * COUNT[:, None]), 4, axis=1)
PUBLISHED = {  # what a token weighs, by the sheets: three sequences, eight tokens
    "grpo": SEQUENCES,
    "gspo": SEQUENCES,
    "sapo": SEQUENCES,
    "dapo": 1 / 8,
    "cispo": 1 / 8,
    "decoupled": 1 / 8,
    "rloo": 1 / 3,
    "dr_grpo": 1 / (3 * 4),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_divide_as_their_sheets_do(name):
    objective = grpo.preset(name, **({"length": 4} if name == "dr_grpo" else {}))
    weights = rl.aggregation_weights(
        MASK, objective.aggregation, length=objective.length
    )
    assert_allclose(weights, live(PUBLISHED[name] * np.ones(MASK.shape)), rtol=1e-6)
    assert PUBLISHED.keys() == grpo.PRESETS.keys()


def test_the_decoupled_loss_is_areals():
    """Sum over kept tokens / tokens before rejection (areal/trainer/ppo/actor.py)."""
    objective = grpo.preset("decoupled", max_weight=1.1)
    ratio = np.exp(LOG_PROB - PROXIMAL)
    loss = np.maximum(-A * ratio, -A * np.clip(ratio, 0.8, 1.2))
    kept = MASK & (WEIGHT <= 1.1)
    assert 0 < kept.sum() < MASK.sum()
    expected = (loss * WEIGHT)[kept].sum() / MASK.sum()
    ours = rl.aggregate(found(objective), MASK, objective.aggregation)
    assert_allclose(ours, expected, rtol=1e-5)


def test_bad_settings(refused):
    refused("Did you mean 'grpo'", grpo.preset, "grpoo")
    refused("length=4 with aggregation='token-mean'", grpo.preset, "dapo", length=4)
    refused("length=0 is outside", grpo.preset, "dr_grpo", length=0)
    refused("clip_range low", grpo.preset, "grpo", clip_range=0.0)
    refused("dual_clip=3.0 has no meaning", grpo.preset, "cispo", dual_clip=3.0)
    refused("max_weight=0.0", grpo.preset, "grpo", max_weight=0.0)
    refused("kl_coefficient=-1.0", grpo.preset, "grpo", kl_coefficient=-1.0)
    refused("Did you mean 'group'", grpo.preset, "grpo", scale="groups")
    refused("baseline='bar'", grpo.preset, "grpo", baseline="bar")
    refused("kl_estimator='k9'", grpo.preset, "grpo", kl_estimator="k9")
    refused("dual_clip=0.5", grpo.preset, "grpo", dual_clip=0.5)
