"""The objective: each method against its formula, in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from tmdjax.rl import TokenBatch
from tmdjax.runtime.lm_rl import UpdateBatch
from tmdjax.systems import grpo

RNG = np.random.default_rng(0)
MASK = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]], bool)
LOG_PROB, PROXIMAL, BEHAVIOUR = (
    RNG.normal(-1.5, 0.3, MASK.shape).astype(np.float32) for _ in range(3)
)
ADVANTAGE = np.float32([1.0, -2.0, 0.5])
A = ADVANTAGE[:, None]
RATIO = np.exp(LOG_PROB - PROXIMAL)


def batch(reference=None):
    texts = TokenBatch(*[None] * 5, MASK, BEHAVIOUR, None, None, None)
    return UpdateBatch(texts, ADVANTAGE, None, PROXIMAL, reference, None)


def found(objective, **more):
    return objective.loss(jnp.asarray(LOG_PROB), batch(**more))[0]


def live(x):
    return np.where(MASK, x, 0)


def clipped(r, low, high):
    return np.maximum(-A * r, -A * np.clip(r, 1 - low, 1 + high))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("grpo", clipped(RATIO, 0.2, 0.2)),
        ("dapo", clipped(RATIO, 0.2, 0.28)),
        (
            "gspo",
            clipped(
                np.exp(
                    live(LOG_PROB - PROXIMAL).sum(1, keepdims=True)
                    / MASK.sum(1, keepdims=True)
                ),
                3e-4,
                4e-4,
            ),
        ),
        ("cispo", -np.clip(RATIO, 0, 3) * A * LOG_PROB),
        (
            "sapo",
            -A * 4 / (t := np.where(A > 0, 1, 1.05)) / (1 + np.exp(-t * (RATIO - 1))),
        ),
        (
            "decoupled",
            clipped(RATIO, 0.2, 0.2)
            * np.where(
                np.exp(PROXIMAL - BEHAVIOUR) <= 5, np.exp(PROXIMAL - BEHAVIOUR), 0
            ),
        ),
    ],
)
def test_c_losses(name, expected):
    assert_allclose(found(grpo.preset(name)), live(expected), rtol=2e-5)


@pytest.mark.parametrize("correction", ["truncate", "sequence"])
def test_c_corrections(correction):
    difference = live(PROXIMAL - BEHAVIOUR)
    if correction == "sequence":
        difference = np.broadcast_to(difference.sum(1, keepdims=True), MASK.shape)
    weight = np.minimum(np.exp(difference), 1.1)
    objective = grpo.PolicyObjective(correction=correction, max_weight=1.1)
    assert_allclose(
        found(objective), live(clipped(RATIO, 0.2, 0.2) * weight), rtol=2e-5
    )


def test_the_sequence_ratio_reaches_every_token():
    """GSPO's gradient at ratio 1 is that of the mean over the sequence's tokens."""
    objective = grpo.preset("gspo")

    def total(x):
        return objective.loss(x, batch())[0].sum()

    gradient = jax.grad(total)(jnp.asarray(PROXIMAL))
    assert_allclose(gradient, live(-A * np.ones(MASK.shape)), rtol=1e-6)


def test_c_kl_to_a_reference():
    reference = LOG_PROB - 0.5
    objective = grpo.PolicyObjective(kl_coefficient=2.0)
    extra = found(objective, reference=reference) - found(grpo.preset("grpo"))
    assert_allclose(extra, live(2 * (np.exp(-0.5) - 1 + 0.5)), rtol=1e-4)


def test_b_advantages_of_the_methods():
    rewards, group = jnp.array([1.0, 0, 0, 1, 1, 1]), jnp.array([0, 0, 0, 1, 1, 1])
    given = (rewards, group, 2)
    assert_allclose(
        grpo.preset("grpo").advantages(*given),
        np.array([2, -1, -1, 0, 0, 0]) / 3 / np.std([1, 0, 0], ddof=1),
        rtol=1e-4,
    )
    assert_allclose(grpo.preset("rloo").advantages(*given), [1, -0.5, -0.5, 0, 0, 0])
    assert_allclose(
        grpo.preset("dr_grpo", length=4).advantages(*given),
        np.array([2, -1, -1, 0, 0, 0]) / 3,
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: grpo.preset("grpoo"), "Did you mean 'grpo'"),
        (lambda: grpo.preset("dr_grpo"), "needs the largest response length"),
        (lambda: grpo.preset("grpo", clip_range=0.0), "clip_range low"),
        (lambda: grpo.preset("cispo", dual_clip=3.0), "dual_clip=3.0 has no meaning"),
        (lambda: grpo.preset("grpo", max_weight=0.0), "max_weight=0.0"),
        (lambda: grpo.preset("grpo", kl_coefficient=-1.0), "kl_coefficient=-1.0"),
        (lambda: grpo.preset("grpo", scale="groups"), "Did you mean 'group'"),
        (lambda: grpo.preset("grpo", baseline="bar"), "baseline='bar'"),
        (lambda: grpo.preset("grpo", kl_estimator="k9"), "kl_estimator='k9'"),
        (lambda: grpo.preset("grpo", dual_clip=0.5), "dual_clip=0.5"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
