import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import rl

TARGET = np.log([[0.1, 0.4, 0.3], [0.2, 0.5, 0.9]]).astype(np.float32)
BEHAVIOUR = np.log([[0.2, 0.1, 0.3], [0.1, 0.4, 0.9]]).astype(np.float32)
# Ratios: [[0.5, 4, 1], [2, 1.25, 1]].
MASK = np.array([[True, True, True], [True, False, True]])
RULES = {
    "truncated": rl.truncated_weights,
    "sequence": rl.sequence_weights,
    "rejecting": lambda *args, **kw: rl.rejecting_weights(*args, **{"low": 0.6, "high": 3.0, **kw}),
    "divergence": lambda *args, **kw: rl.rejecting_weights(*args, **{"high": 2.0, "metric": "k3", "reduction": "max", **kw}),
}  # fmt: skip


BY_HAND = [
    ("truncated", MASK, {"high": 3.0}, [[0.5, 3, 1], [2, 0, 1]]),
    ("truncated", None, {"high": 1.0, "low": 0.75}, [[0.75, 1, 1], [1, 1, 1]]),
    ("sequence", MASK, {"high": 5.0}, [[2, 2, 2], [2, 0, 2]]),
    ("sequence", MASK, {"high": 5.0, "reduction": "mean"}, [[2 ** (1 / 3)] * 3, [2**0.5, 0, 2**0.5]]),
    ("sequence", None, {"high": 2.25}, [[2, 2, 2], [2.25, 2.25, 2.25]]),
    ("rejecting", MASK, {}, [[0, 0, 1], [2, 0, 1]]),
    # of whole sequences: geometric means are 2^(1/3) and 2^(1/2)
    ("rejecting", MASK, {"high": 1.3, "reduction": "mean"}, [[2 ** (1 / 3)] * 3, [0, 0, 0]]),
    ("rejecting", MASK, {"reduction": "max"}, [[0, 0, 0], [2**0.5, 0, 2**0.5]]),
    ("rejecting", MASK, {"high": 1.9, "reduction": "sum"}, [[0, 0, 0], [0, 0, 0]]),
    # k1 is log 2, -log 4, 0; -log 2, 0: large where the target gives less
    ("rejecting", MASK, {"low": None, "high": 0.5, "metric": "k1"}, [[0, 4, 1], [2, 0, 1]]),
    ("rejecting", MASK, {"low": -1.0, "high": 1.0, "metric": "k1"}, [[0.5, 0, 1], [2, 0, 1]]),
    # k2 is 0.24, 0.96, 0; 0.24, 0, and k3 0.19, 1.61, 0; 0.31, 0
    ("rejecting", MASK, {"low": None, "high": 0.5, "metric": "k2"}, [[0.5, 0, 1], [2, 0, 1]]),
    ("rejecting", MASK, {"low": None, "high": 0.3, "metric": "k3"}, [[0.5, 0, 1], [0, 0, 1]]),
    ("divergence", MASK, {"high": 0.3, "reduction": "mean"}, [[0, 0, 0], [2, 0, 1]]),
    ("divergence", MASK, {"high": 1.0, "reduction": "sum"}, [[0, 0, 0], [2, 0, 1]]),
]  # fmt: skip


@pytest.mark.parametrize("rule, mask, options, expected", BY_HAND)
def test_by_hand(rule, mask, options, expected):
    ours = RULES[rule](TARGET, BEHAVIOUR, mask, **options)
    assert_allclose(ours, expected, rtol=1e-5)


def test_truncated_expectation_is_the_closed_form():
    # E_mu[min(pi / mu, C) f] = sum_a min(pi_a, C mu_a) f_a.
    policy, acting = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.2, 0.6])
    f = np.array([1.0, -3.0, 2.0])
    weights = rl.truncated_weights(np.log(policy), np.log(acting), high=1.5)
    assert_allclose(np.sum(acting * weights * f), 0.3 - 0.6 + 0.2, rtol=1e-5)
    free = rl.truncated_weights(np.log(policy), np.log(acting), high=math.inf)
    assert_allclose(np.sum(acting * free), 1, rtol=1e-6)


def test_decoupled_gradient_is_the_policy_gradient_of_the_target():
    # A bandit: rewards f, drawn by another policy; all outcomes enumerated.
    logits, f = jnp.array([0.5, -0.2, 0.1]), jnp.array([1.0, -3.0, 2.0])
    acting = jax.nn.log_softmax(jnp.array([-0.5, 0.3, 0.6]))

    def loss(x):
        log_prob = jax.nn.log_softmax(x)
        start = jax.lax.stop_gradient(log_prob)
        options = {"clip_range": 0.2, "proximal_log_prob": start}
        elements = rl.clipped_surrogate(log_prob, acting, f, **options)
        return jnp.sum(jnp.exp(acting) * elements)

    expected = jax.grad(lambda x: -jnp.sum(jax.nn.softmax(x) * f))(logits)
    assert_allclose(jax.grad(loss)(logits), expected, rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_constants_which_equal_policies_make_one_and_masks_zero(rule):
    weights = RULES[rule]
    assert_array_equal(weights(TARGET, TARGET), np.ones((2, 3)))
    gradients = jax.grad(lambda *x: weights(*x).sum(), (0, 1))(TARGET, BEHAVIOUR)
    assert_array_equal(gradients, np.zeros((2, 2, 3)))
    hole = np.where(MASK, TARGET, -np.inf)
    ours = jax.jit(weights)(hole, np.where(MASK, BEHAVIOUR, np.nan), MASK)
    assert_allclose(ours, weights(TARGET, BEHAVIOUR, MASK), rtol=1e-6)
    assert ours[1, 1] == 0
    # in half precision, and huge
    half = [jnp.asarray(x, jnp.bfloat16) for x in (TARGET, BEHAVIOUR)]
    ours = weights(*half)
    assert ours.dtype == jnp.float32
    assert_array_equal(ours, weights(*[x.astype(jnp.float32) for x in half]))
    high = {} if rule in ("rejecting", "divergence") else {"high": math.inf}
    ours = weights(BEHAVIOUR + np.float32(1000), BEHAVIOUR, **high)
    assert_allclose(ours, math.exp(20) if high else 0, rtol=1e-5)


def test_bad_inputs(refused):
    given, row = (TARGET, BEHAVIOUR), (TARGET[0], BEHAVIOUR[0])
    for message, weights, options in (
        (r"high=0.5 is outside \(1, inf\]", "truncated", {"low": 1.0, "high": 0.5}),
        ("low=-1.0 is outside", "rejecting", {"low": -1.0, "high": 0.5}),
        ("reduction='max' is not one of", "sequence", {"reduction": "max"}),
        (
            "reduction='min' is not one of",
            "rejecting",
            {"high": 1.0, "reduction": "min"},
        ),
        ("metric='k4' is not one of", "rejecting", {"high": 1.0, "metric": "k4"}),
        (r"high=-1.0 is outside \(0, inf\]", "rejecting", {"high": -1.0}),
    ):
        refused(message, getattr(rl, f"{weights}_weights"), *given, **options)
    refused(r"shape \(3,\); a sequence weight needs", rl.sequence_weights, *row)
    refused(r"shape \(3,\); a sequence", RULES["divergence"], *row)
    for rule in RULES.values():
        refused(r"shape \(2, 3\) but the other log_prob", rule, TARGET, BEHAVIOUR[:1])
        refused(r"mask has shape \(3,\)", rule, *given, MASK[0])
