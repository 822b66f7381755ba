import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import rl

RNG = np.random.default_rng(0)
SHAPE = (4, 5)
BEHAVIOUR = RNG.normal(-2, 0.5, SHAPE).astype(np.float32)
LOG_PROB = (BEHAVIOUR + RNG.normal(0, 0.4, SHAPE)).astype(np.float32)
PROXIMAL = (BEHAVIOUR + RNG.normal(0, 0.3, SHAPE)).astype(np.float32)
ADVANTAGE = RNG.normal(size=SHAPE).astype(np.float32)
MASK = RNG.random(SHAPE) < 0.7
clipped = jax.jit(
    functools.partial(rl.clipped_surrogate, clip_range=0.2),
    static_argnames=("clip_range", "dual_clip"),
)
sequence_log_ratio = jax.jit(rl.sequence_log_ratio)
RULES = {
    "clipped": functools.partial(rl.clipped_surrogate, clip_range=0.2),
    "clip_higher": functools.partial(rl.clipped_surrogate, clip_range=(0.1, 0.3)),
    "dual": functools.partial(rl.clipped_surrogate, clip_range=0.2, dual_clip=1.5),
    "decoupled": functools.partial(rl.clipped_surrogate, clip_range=0.2),
    "policy_gradient": functools.partial(rl.clipped_policy_gradient, clip_range=0.2),
    "sigmoid": rl.sigmoid_surrogate,
}


@functools.partial(jax.jit, static_argnames="rule")
def values(rule, log_prob, behaviour, advantage, proximal=PROXIMAL, mask=None):
    options = {"proximal_log_prob": proximal} if rule == "decoupled" else {}
    return RULES[rule](log_prob, behaviour, advantage, mask=mask, **options)


@functools.partial(jax.jit, static_argnames="rule")
def gradients(rule, log_prob, behaviour, advantage, proximal=PROXIMAL, mask=None):
    """Values, and the gradient of their sum with respect to all four arrays."""

    def loss(*arrays):
        out = values(rule, *arrays, mask=mask)
        return out.sum(), out

    arrays = log_prob, behaviour, advantage, jnp.asarray(proximal)
    found, out = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(*arrays)
    return out, found


def log(*ratios):
    return np.log(np.array(ratios, np.float32))


def test_clipped_surrogate_by_hand():
    ratios, zeros = log(0.5, 0.9, 1.1, 2.0), np.zeros(4, np.float32)
    for advantage, options, expected in (
        (2.0, {}, [-1.0, -1.8, -2.2, -2.4]),
        (-2.0, {}, [1.6, 1.8, 2.2, 4.0]),
        (2.0, {"clip_range": (0.2, 0.5)}, [-1.0, -1.8, -2.2, -3.0]),
        (-2.0, {"dual_clip": 1.75}, [1.6, 1.8, 2.2, 3.5]),
        (2.0, {"dual_clip": 1.05}, [-1.0, -1.8, -2.2, -2.4]),
    ):
        ours = clipped(ratios, zeros, advantage, **options)
        assert_allclose(ours, expected, rtol=1e-6, err_msg=str(options))
    for shape in ((), (7,), (3, 2, 2)):
        zeros = np.zeros(shape, np.float32)
        assert_array_equal(clipped(zeros, zeros, zeros + 1), -np.ones(shape))
    # a square batch takes one advantage a row
    square, rows = np.zeros((2, 2), np.float32), np.array([1, 5], np.float32)
    assert_array_equal(clipped(square, square, rows), [[-1, -1], [-5, -5]])
    # decoupled: the product with a weight that is not truncated
    weight = np.exp(PROXIMAL.astype(float) - BEHAVIOUR)
    product = clipped(LOG_PROB, PROXIMAL, ADVANTAGE) * weight
    ours = values("decoupled", LOG_PROB, BEHAVIOUR, ADVANTAGE)
    assert_allclose(ours, product, rtol=1e-6)


def test_gradient_vanishes_where_clipped_and_a_policy_gradients_nowhere():
    def total(x, advantage, rule=clipped, **options):
        return rule(x, np.zeros(4), advantage, **options).sum()

    gradient, x = jax.jit(jax.grad(total)), log(0.5, 0.9, 1.1, 2.0)
    assert_allclose(gradient(x, 1.0), [-0.5, -0.9, -1.1, 0], rtol=1e-6)
    assert_allclose(gradient(x, -1.0), [0, 0.9, 1.1, 2.0], rtol=1e-6)
    options = {"rule": rl.clipped_policy_gradient, "clip_range": (1.0, 0.2)}
    found = jax.grad(functools.partial(total, **options))(x, 2.0)
    assert_allclose(found, [-1.0, -1.8, -2.2, -2.4], rtol=1e-6)


@pytest.mark.parametrize("rule", [r for r in RULES if r != "policy_gradient"])
def test_gradient_is_that_of_finite_differences(rule, x64):
    arrays = (LOG_PROB, BEHAVIOUR, ADVANTAGE, PROXIMAL)
    log_prob, *given = np.asarray(arrays, np.float64)
    step = 1e-6
    up, down = (np.asarray(values(rule, log_prob + s, *given)) for s in (step, -step))
    assert up.dtype == np.float64
    _, found = gradients(rule, log_prob, *given)
    assert_allclose(found[0], (up - down) / (2 * step), rtol=1e-6, atol=1e-8)


def test_sigmoid_surrogate_fades_on_both_sides():
    def total(x, advantage, **options):
        return rl.sigmoid_surrogate(x, np.zeros(1), advantage, **options).sum()

    gradient = jax.jit(jax.grad(total), static_argnames="positive_temperature")

    def weight(r, advantage, **options):
        return float(-gradient(log(r), advantage, **options)[0] / r / advantage)

    # 4 p (1 - p) with p = sigmoid(tau (r - 1)).
    assert weight(1.0, 3.0) == pytest.approx(1)
    for advantage, temperature in ((1.0, 1), (-1.0, 1.05)):
        p = 1 / (1 + math.exp(-2 * temperature))
        assert weight(3.0, advantage) == pytest.approx(4 * p * (1 - p), rel=1e-5)
    assert weight(0.5, 1.0) == pytest.approx(weight(1.5, 1.0), rel=1e-5)
    assert weight(2.0, 1.0, positive_temperature=5.0) < 0.2 * weight(2.0, 1.0)


@pytest.mark.parametrize("rule", RULES)
def test_advantages_of_whole_sequences_broadcast(rule):
    for shape in ((4,), (4, 1), ()):
        advantage = RNG.normal(size=shape).astype(np.float32)
        full = advantage.reshape(shape + (1,) * (2 - len(shape)))
        expected = values(rule, LOG_PROB, BEHAVIOUR, np.broadcast_to(full, SHAPE))
        assert_array_equal(values(rule, LOG_PROB, BEHAVIOUR, advantage), expected)


@pytest.mark.parametrize("rule", RULES)
def test_masked_elements_have_no_value_and_no_gradient(rule):
    hole = np.where(MASK, LOG_PROB, -np.inf)
    behaviour = np.where(MASK, BEHAVIOUR, -np.inf)
    advantage = np.where(MASK, ADVANTAGE, np.nan)
    out, (found, *_) = gradients(rule, hole, behaviour, advantage, hole, MASK)
    out, found = np.asarray(out), np.asarray(found)
    assert_array_equal(out[~MASK], 0)
    assert_array_equal(found[~MASK], 0)
    assert (found[MASK] != 0).any() and np.isfinite(found).all()


@pytest.mark.parametrize("rule", RULES)
def test_gradients_half_precision_and_huge_ratios(rule):
    half = [np.asarray(x, jnp.bfloat16) for x in (LOG_PROB, BEHAVIOUR, ADVANTAGE)]
    ours = values(rule, *half)
    assert ours.dtype == jnp.float32
    assert_array_equal(ours, values(rule, *[x.astype(np.float32) for x in half]))
    # the first minibatch's gradient is the policy gradient
    _, found = gradients(rule, BEHAVIOUR, BEHAVIOUR, ADVANTAGE, BEHAVIOUR)
    assert_allclose(found[0], -ADVANTAGE, rtol=1e-6)
    _, (found, *others) = gradients(rule, LOG_PROB, BEHAVIOUR, ADVANTAGE)
    assert np.any(found) and not any(np.any(gradient) for gradient in others)
    far = LOG_PROB + np.float32(500) * np.sign(ADVANTAGE)
    out, (found, *_) = gradients(rule, far, BEHAVIOUR, ADVANTAGE)
    assert np.isfinite(out).all() and np.isfinite(found).all()


def test_bad_shapes_and_options(refused):
    for behaviour, advantage, message in (
        (BEHAVIOUR[:3], ADVANTAGE, r"log_prob has shape \(4, 5\) but the other log_prob has shape \(3, 5\)"),
        (BEHAVIOUR, ADVANTAGE[0], r"advantage has shape \(5,\) but log_prob has shape \(4, 5\)"),
        (BEHAVIOUR, ADVANTAGE[:1], r"advantage has shape \(1, 5\) but log_prob has shape \(4, 5\)"),
        (BEHAVIOUR, ADVANTAGE[0, :1], r"advantage has shape \(1,\)"),
        (BEHAVIOUR, ADVANTAGE[..., None], r"advantage has shape \(4, 5, 1\)"),
    ):  # fmt: skip
        for rule in ("clipped", "policy_gradient", "sigmoid"):
            refused(message, RULES[rule], LOG_PROB, behaviour, advantage)
    given = (LOG_PROB, BEHAVIOUR, ADVANTAGE)
    low, gradient = "clip_range low=", rl.clipped_policy_gradient
    refused(low + "0.0 is outside", rl.clipped_surrogate, *given, clip_range=0.0)
    refused(low + r"1.5 is outside \(0, 1\]", gradient, *given, clip_range=(1.5, 0.2))
    refused("dual_clip=1.0 is outside", clipped, *given, dual_clip=1.0)
    refused(r"mask has shape \(5,\)", clipped, *given, mask=np.ones(5, bool))
    cold = {"negative_temperature": 0.0}
    refused("negative_temperature=0.0 is outside", rl.sigmoid_surrogate, *given, **cold)
    of, one = rl.sequence_log_ratio, (LOG_PROB[:, 0], BEHAVIOUR[:, 0])
    refused("max_log_ratio=0.0 is outside", of, *given[:2], max_log_ratio=0.0)
    refused(r"shape \(4,\); a sequence ratio needs", of, *one)


def test_check_clip_range(refused):
    assert rl.check_clip_range(0.2) == (0.2, 0.2)
    assert rl.check_clip_range((0.2, 0.28), "sum") == (0.2, 0.28)
    assert rl.check_clip_range((1.0, 3.0)) == (1.0, 3.0)
    assert rl.check_clip_range(0.8, "sum") == (0.8, 0.8)
    with pytest.warns(UserWarning, match="no clipping will ever happen"):
        rl.check_clip_range((0.1, 0.5), "mean")
    refused("clip_range high=-0.1", rl.check_clip_range, (0.1, -0.1))
    refused("clip_range low=nan", rl.check_clip_range, math.nan)
    refused("reduction='average' is not one of", rl.check_clip_range, 0.1, "average")
    for wrong in ((0.1, 0.2, 0.3), "0.1", True):
        message = "must be a number or a pair"
        refused(message, rl.check_clip_range, wrong, error=TypeError)


def test_sequence_ratio_is_the_geometric_mean():
    ours = np.asarray(sequence_log_ratio(LOG_PROB, BEHAVIOUR, MASK))
    for i, row in enumerate(MASK):
        ratios = np.exp(LOG_PROB[i, row].astype(float) - BEHAVIOUR[i, row])
        mean = np.prod(ratios) ** (1 / row.sum())
        assert_allclose(np.exp(ours[i, row]), mean, rtol=1e-5)
    assert_array_equal(ours[~MASK], 0)


def test_sequence_ratio_has_the_gradient_of_the_geometric_mean():
    # For one advantage a sequence, differentiating through the mean is the same.
    def through_the_mean(log_prob):
        difference = jnp.where(MASK, log_prob - BEHAVIOUR, 0).sum(1) / MASK.sum(1)
        return clipped(difference, np.zeros(4, np.float32), ADVANTAGE[:, 0]).mean()

    def ours(log_prob):
        ratio = rl.sequence_log_ratio(log_prob, BEHAVIOUR, MASK)
        loss = clipped(ratio, jnp.zeros(SHAPE), ADVANTAGE[:, 0])
        return rl.aggregate(loss, MASK, "seq-mean-token-mean")

    value, gradient = jax.jit(jax.value_and_grad(ours))(LOG_PROB)
    expected = jax.jit(jax.value_and_grad(through_the_mean))(LOG_PROB)
    assert_allclose(value, expected[0], rtol=1e-5)
    assert_allclose(gradient, expected[1], rtol=1e-5, atol=1e-8)
    assert np.any(gradient)


def test_sequence_ratio_is_bounded_above_and_survives_empty_sequences():
    far = BEHAVIOUR + np.float32(50)
    mask = MASK & (np.arange(4) != 2)[:, None]
    ours = np.asarray(sequence_log_ratio(far, BEHAVIOUR, mask))
    assert_array_equal(ours, np.where(mask, 10, 0))
    gradient = jax.grad(lambda x: sequence_log_ratio(x, BEHAVIOUR, mask).sum())
    assert_array_equal(gradient(far), 0)
    below = sequence_log_ratio(BEHAVIOUR - np.float32(50), BEHAVIOUR)
    assert_allclose(below, -50, rtol=1e-5)


def test_ratio_of_means_is_a_root_of_the_joint_ratio():
    # flow_sde invariant 12, on the losses: D = 5 dimensions an event.
    loss_of_mean = clipped(LOG_PROB.mean(1), BEHAVIOUR.mean(1), -1.0, dual_clip=1e9)
    joint = np.exp(LOG_PROB.sum(1, dtype=float) - BEHAVIOUR.sum(1, dtype=float))
    assert_allclose(loss_of_mean, np.maximum(joint**0.2, 0.8), rtol=1e-5)


def test_reinforce_with_a_kl_term():
    # promptrl invariant 3: value -A + beta k3, gradient -A + beta (1 - exp(-d)).
    def loss(log_prob):
        policy = clipped(log_prob, log_prob, ADVANTAGE[:, 0])
        elements = policy + 0.01 * rl.kl_estimate(log_prob, PROXIMAL)
        return rl.aggregate(elements, MASK, "token-mean")

    value, gradient = jax.jit(jax.value_and_grad(loss))(LOG_PROB)
    d = (LOG_PROB - PROXIMAL).astype(float)
    advantage = np.broadcast_to(ADVANTAGE[:, :1], SHAPE)
    expected = -advantage + 0.01 * (np.expm1(-d) + d)
    assert_allclose(value, expected[MASK].mean(), rtol=1e-5)
    expected = np.where(MASK, -advantage - 0.01 * np.expm1(-d), 0) / MASK.sum()
    assert_allclose(gradient, expected, rtol=1e-5)
