import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax import rl

TARGET = np.log([[0.1, 0.4, 0.3], [0.2, 0.5, 0.9]]).astype(np.float32)
BEHAVIOUR = np.log([[0.2, 0.1, 0.3], [0.1, 0.4, 0.9]]).astype(np.float32)
# Ratios: [[0.5, 4, 1], [2, 1.25, 1]].
MASK = np.array([[True, True, True], [True, False, True]])
RULES = {
    "truncated": rl.truncated_weights,
    "sequence": rl.sequence_weights,
    "rejecting": lambda *args, **kw: rl.rejecting_weights(*args, low=0.6, high=3.0, **kw),
}  # fmt: skip


def test_truncated_by_hand():
    ours = rl.truncated_weights(TARGET, BEHAVIOUR, MASK, high=3.0)
    np.testing.assert_allclose(ours, [[0.5, 3, 1], [2, 0, 1]], rtol=1e-5)
    ours = rl.truncated_weights(TARGET, BEHAVIOUR, high=1.0, low=0.75)
    np.testing.assert_allclose(ours, [[0.75, 1, 1], [1, 1, 1]], rtol=1e-5)


def test_sequence_by_hand():
    ours = rl.sequence_weights(TARGET, BEHAVIOUR, MASK, high=5.0)
    np.testing.assert_allclose(ours, [[2, 2, 2], [2, 0, 2]], rtol=1e-5)
    ours = rl.sequence_weights(TARGET, BEHAVIOUR, MASK, high=5.0, reduction="mean")
    root = [2 ** (1 / 3)] * 3, [2**0.5, 0, 2**0.5]
    np.testing.assert_allclose(ours, root, rtol=1e-5)
    ours = rl.sequence_weights(TARGET, BEHAVIOUR, high=2.25)
    np.testing.assert_allclose(ours, [[2, 2, 2], [2.25, 2.25, 2.25]], rtol=1e-5)


def test_rejecting_by_hand():
    ours = rl.rejecting_weights(TARGET, BEHAVIOUR, MASK, low=0.6, high=3.0)
    np.testing.assert_allclose(ours, [[0, 0, 1], [2, 0, 1]], rtol=1e-5)


def test_truncated_expectation_is_the_closed_form():
    # E_mu[min(pi / mu, C) f] = sum_a min(pi_a, C mu_a) f_a.
    policy, acting = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.2, 0.6])
    f = np.array([1.0, -3.0, 2.0])
    weights = rl.truncated_weights(np.log(policy), np.log(acting), high=1.5)
    np.testing.assert_allclose(np.sum(acting * weights * f), 0.3 - 0.6 + 0.2, rtol=1e-5)
    free = rl.truncated_weights(np.log(policy), np.log(acting), high=math.inf)
    np.testing.assert_allclose(np.sum(acting * free), 1, rtol=1e-6)


def test_decoupled_gradient_is_the_policy_gradient_of_the_target():
    # A bandit: rewards f, drawn by another policy; all outcomes enumerated.
    logits, f = jnp.array([0.5, -0.2, 0.1]), jnp.array([1.0, -3.0, 2.0])
    acting = jax.nn.log_softmax(jnp.array([-0.5, 0.3, 0.6]))

    def loss(x):
        log_prob = jax.nn.log_softmax(x)
        start = jax.lax.stop_gradient(log_prob)
        elements = rl.clipped_surrogate(
            log_prob, acting, f, clip_range=0.2, proximal_log_prob=start
        )
        return jnp.sum(jnp.exp(acting) * elements)

    expected = jax.grad(lambda x: -jnp.sum(jax.nn.softmax(x) * f))(logits)
    np.testing.assert_allclose(jax.grad(loss)(logits), expected, rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_weights_are_constants(rule):
    for gradient in jax.grad(lambda *x: RULES[rule](*x).sum(), (0, 1))(
        TARGET, BEHAVIOUR
    ):
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("rule", RULES)
def test_equal_policies_weigh_one(rule):
    np.testing.assert_array_equal(RULES[rule](TARGET, TARGET), np.ones((2, 3)))


@pytest.mark.parametrize("rule", RULES)
def test_masked_log_probs_may_be_anything(rule):
    hole = np.where(MASK, TARGET, -np.inf)
    ours = jax.jit(RULES[rule])(hole, np.where(MASK, BEHAVIOUR, np.nan), MASK)
    np.testing.assert_allclose(ours, RULES[rule](TARGET, BEHAVIOUR, MASK), rtol=1e-6)
    assert ours[1, 1] == 0


@pytest.mark.parametrize("rule", RULES)
def test_half_precision_is_computed_in_float32(rule):
    half = [jnp.asarray(x, jnp.bfloat16) for x in (TARGET, BEHAVIOUR)]
    ours = RULES[rule](*half)
    assert ours.dtype == jnp.float32
    np.testing.assert_array_equal(
        ours, RULES[rule](*[x.astype(jnp.float32) for x in half])
    )


def test_huge_ratios_stay_finite():
    far = BEHAVIOUR + np.float32(1000)
    ours = rl.truncated_weights(far, BEHAVIOUR, high=math.inf)
    np.testing.assert_allclose(ours, math.exp(20), rtol=1e-5)
    np.testing.assert_array_equal(rl.sequence_weights(far, BEHAVIOUR), 2)


def test_bad_inputs(as_shipped):
    with pytest.raises(ValueError, match=r"high=0.5 is outside \(1, inf\]"):
        rl.truncated_weights(TARGET, BEHAVIOUR, low=1.0, high=0.5)
    with pytest.raises(ValueError, match="low=-1.0 is outside"):
        rl.rejecting_weights(TARGET, BEHAVIOUR, low=-1.0, high=0.5)
    with pytest.raises(ValueError, match="reduction='max' is not one of"):
        rl.sequence_weights(TARGET, BEHAVIOUR, reduction="max")
    with pytest.raises(ValueError, match=r"shape \(3,\); a sequence weight needs"):
        rl.sequence_weights(TARGET[0], BEHAVIOUR[0])
    for rule in RULES.values():
        with pytest.raises(ValueError, match=r"shape \(2, 3\) but the other log_prob"):
            rule(TARGET, BEHAVIOUR[:1])
        with pytest.raises(ValueError, match=r"mask has shape \(3,\)"):
            rule(TARGET, BEHAVIOUR, MASK[0])
