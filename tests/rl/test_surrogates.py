import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax import rl

RNG = np.random.default_rng(0)
SHAPE = (4, 5)
BEHAVIOUR = RNG.normal(-2, 0.5, SHAPE).astype(np.float32)
LOG_PROB = (BEHAVIOUR + RNG.normal(0, 0.4, SHAPE)).astype(np.float32)
PROXIMAL = (BEHAVIOUR + RNG.normal(0, 0.3, SHAPE)).astype(np.float32)
ADVANTAGE = RNG.normal(size=SHAPE).astype(np.float32)
MASK = RNG.random(SHAPE) < 0.7
clipped = jax.jit(
    functools.partial(rl.clipped_surrogate, clip_range=0.2), static_argnames="dual_clip"
)
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


sequence_log_ratio = jax.jit(rl.sequence_log_ratio)


def log(*ratios):
    return np.log(np.array(ratios, np.float32))


def test_clipped_surrogate_by_hand():
    ratios = log(0.5, 0.9, 1.1, 2.0)
    better = clipped(ratios, np.zeros(4, np.float32), 2.0)
    np.testing.assert_allclose(better, [-1.0, -1.8, -2.2, -2.4], rtol=1e-6)
    worse = clipped(ratios, np.zeros(4, np.float32), -2.0)
    np.testing.assert_allclose(worse, [1.6, 1.8, 2.2, 4.0], rtol=1e-6)
    higher = jax.jit(functools.partial(rl.clipped_surrogate, clip_range=(0.2, 0.5)))
    higher = higher(ratios, np.zeros(4, np.float32), 2.0)
    np.testing.assert_allclose(higher, [-1.0, -1.8, -2.2, -3.0], rtol=1e-6)
    dual = clipped(ratios, np.zeros(4, np.float32), -2.0, dual_clip=1.75)
    np.testing.assert_allclose(dual, [1.6, 1.8, 2.2, 3.5], rtol=1e-6)


def test_decoupled_by_hand():
    # Ratio 3 around the proximal policy (clipped to 1.2), weight 1/2.
    loss = clipped(log(3.0), log(2.0), 1.0, proximal_log_prob=log(1.0))
    np.testing.assert_allclose(loss, [-0.6], rtol=1e-6)


def test_gradient_vanishes_where_clipped():
    gradient = jax.jit(
        jax.grad(lambda x, advantage: clipped(x, np.zeros(4), advantage).sum())
    )
    x = log(0.5, 0.9, 1.1, 2.0)
    np.testing.assert_allclose(gradient(x, 1.0), [-0.5, -0.9, -1.1, 0], rtol=1e-6)
    np.testing.assert_allclose(gradient(x, -1.0), [0, 0.9, 1.1, 2.0], rtol=1e-6)


def test_dual_clip_by_sign_is_the_same():
    # Another form bounds both signs by sign(A) c A = c |A|.
    c = 1.5
    plain = clipped(LOG_PROB * 2, BEHAVIOUR * 2, ADVANTAGE)
    by_sign = np.minimum(plain, np.sign(ADVANTAGE) * c * ADVANTAGE)
    ours = clipped(LOG_PROB * 2, BEHAVIOUR * 2, ADVANTAGE, dual_clip=c)
    np.testing.assert_allclose(ours, by_sign, rtol=1e-6)
    assert (ours < plain).any()


def test_decoupled_with_the_acting_policy_is_plain():
    ours = clipped(LOG_PROB, BEHAVIOUR, ADVANTAGE, proximal_log_prob=BEHAVIOUR)
    np.testing.assert_array_equal(ours, clipped(LOG_PROB, BEHAVIOUR, ADVANTAGE))


def test_decoupled_is_the_product_with_an_untruncated_weight():
    weight = np.exp(PROXIMAL.astype(float) - BEHAVIOUR)
    product = clipped(LOG_PROB, PROXIMAL, ADVANTAGE) * weight
    ours = values("decoupled", LOG_PROB, BEHAVIOUR, ADVANTAGE)
    np.testing.assert_allclose(ours, product, rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_first_minibatch_is_the_policy_gradient(rule):
    _, found = gradients(rule, BEHAVIOUR, BEHAVIOUR, ADVANTAGE, BEHAVIOUR)
    np.testing.assert_allclose(found[0], -ADVANTAGE, rtol=1e-6)


@pytest.mark.parametrize("rule", [r for r in RULES if r != "policy_gradient"])
def test_gradient_is_that_of_finite_differences(rule, x64):
    log_prob, *given = (
        np.asarray(x, np.float64) for x in (LOG_PROB, BEHAVIOUR, ADVANTAGE, PROXIMAL)
    )
    step = 1e-6
    up, down = (np.asarray(values(rule, log_prob + s, *given)) for s in (step, -step))
    assert up.dtype == np.float64
    _, found = gradients(rule, log_prob, *given)
    np.testing.assert_allclose(found[0], (up - down) / (2 * step), rtol=1e-6, atol=1e-8)


def test_clipped_policy_gradient_keeps_every_element():
    ratios = log(0.5, 0.9, 1.1, 2.0)
    gradient = jax.jit(
        jax.grad(
            lambda x: rl.clipped_policy_gradient(
                x, np.zeros(4), 2.0, clip_range=(1.0, 0.2)
            ).sum()
        )
    )(ratios)
    np.testing.assert_allclose(gradient, [-1.0, -1.8, -2.2, -2.4], rtol=1e-6)


def test_sigmoid_surrogate_fades_on_both_sides():
    gradient = jax.jit(
        jax.grad(
            lambda x, *given, **options: rl.sigmoid_surrogate(
                x, np.zeros(1), *given, **options
            ).sum()
        ),
        static_argnames="positive_temperature",
    )

    def weight(r, advantage, **options):
        return float(-gradient(log(r), advantage, **options)[0] / r / advantage)

    # 4 p (1 - p) with p = sigmoid(tau (r - 1)).
    assert weight(1.0, 3.0) == pytest.approx(1)
    p = 1 / (1 + math.exp(-2.0))
    assert weight(3.0, 1.0) == pytest.approx(4 * p * (1 - p), rel=1e-5)
    p = 1 / (1 + math.exp(-2 * 1.05))
    assert weight(3.0, -1.0) == pytest.approx(4 * p * (1 - p), rel=1e-5)
    assert weight(0.5, 1.0) == pytest.approx(weight(1.5, 1.0), rel=1e-5)
    sharp = weight(2.0, 1.0, positive_temperature=5.0)
    assert sharp < 0.2 * weight(2.0, 1.0)


@pytest.mark.parametrize("rule", RULES)
def test_advantages_of_whole_sequences_broadcast(rule):
    for shape in ((4,), (4, 1), ()):
        advantage = RNG.normal(size=shape).astype(np.float32)
        full = advantage.reshape(shape + (1,) * (2 - len(shape)))
        np.testing.assert_array_equal(
            values(rule, LOG_PROB, BEHAVIOUR, advantage),
            values(rule, LOG_PROB, BEHAVIOUR, np.broadcast_to(full, SHAPE)),
        )


def test_any_shape():
    for shape in ((), (7,), (3, 2, 2)):
        zeros = np.zeros(shape, np.float32)
        np.testing.assert_array_equal(clipped(zeros, zeros, zeros + 1), -np.ones(shape))
    # a square batch takes one advantage a row
    square = np.zeros((2, 2), np.float32)
    loss = clipped(square, square, np.array([1, 5], np.float32))
    np.testing.assert_array_equal(loss, [[-1, -1], [-5, -5]])


@pytest.mark.parametrize("rule", RULES)
def test_masked_elements_have_no_value_and_no_gradient(rule):
    hole = np.where(MASK, LOG_PROB, -np.inf)
    behaviour = np.where(MASK, BEHAVIOUR, -np.inf)
    advantage = np.where(MASK, ADVANTAGE, np.nan)
    out, (found, *_) = gradients(rule, hole, behaviour, advantage, hole, MASK)
    out, found = np.asarray(out), np.asarray(found)
    np.testing.assert_array_equal(out[~MASK], 0)
    np.testing.assert_array_equal(found[~MASK], 0)
    assert (found[MASK] != 0).any() and np.isfinite(found).all()


@pytest.mark.parametrize("rule", RULES)
def test_only_the_trained_policy_has_a_gradient(rule):
    _, (found, *others) = gradients(rule, LOG_PROB, BEHAVIOUR, ADVANTAGE)
    assert np.any(found)
    for gradient in others:
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("rule", RULES)
def test_half_precision_is_computed_in_float32(rule):
    half = [np.asarray(x, jnp.bfloat16) for x in (LOG_PROB, BEHAVIOUR, ADVANTAGE)]
    ours = values(rule, *half)
    assert ours.dtype == jnp.float32
    np.testing.assert_array_equal(
        ours, values(rule, *[x.astype(np.float32) for x in half])
    )


@pytest.mark.parametrize("rule", RULES)
def test_huge_ratios_stay_finite(rule):
    far = LOG_PROB + np.float32(500) * np.sign(ADVANTAGE)
    out, (found, *_) = gradients(rule, far, BEHAVIOUR, ADVANTAGE)
    assert np.isfinite(out).all() and np.isfinite(found).all()


def test_outside_jit_the_same():
    np.testing.assert_allclose(
        RULES["clipped"](LOG_PROB, BEHAVIOUR, ADVANTAGE),
        values("clipped", LOG_PROB, BEHAVIOUR, ADVANTAGE),
        rtol=1e-6,
    )


BAD_SHAPES = [
    (BEHAVIOUR[:3], ADVANTAGE, r"log_prob has shape \(4, 5\) but the other log_prob has shape \(3, 5\)"),
    (BEHAVIOUR, ADVANTAGE[0], r"advantage has shape \(5,\) but log_prob has shape \(4, 5\)"),
    (BEHAVIOUR, ADVANTAGE[:1], r"advantage has shape \(1, 5\) but log_prob has shape \(4, 5\)"),
    (BEHAVIOUR, ADVANTAGE[0, :1], r"advantage has shape \(1,\)"),
    (BEHAVIOUR, ADVANTAGE[..., None], r"advantage has shape \(4, 5, 1\)"),
]  # fmt: skip


@pytest.mark.parametrize("rule", ["clipped", "policy_gradient", "sigmoid"])
def test_wrong_shapes_are_refused(rule, as_shipped):
    for behaviour, advantage, message in BAD_SHAPES:
        with pytest.raises(ValueError, match=message):
            RULES[rule](LOG_PROB, behaviour, advantage)


def test_bad_options(as_shipped):
    given = (LOG_PROB, BEHAVIOUR, ADVANTAGE)
    with pytest.raises(ValueError, match="clip_range low=0.0 is outside"):
        rl.clipped_surrogate(*given, clip_range=0.0)
    with pytest.raises(ValueError, match=r"clip_range low=1.5 is outside \(0, 1\]"):
        rl.clipped_policy_gradient(*given, clip_range=(1.5, 0.2))
    with pytest.raises(ValueError, match="dual_clip=1.0 is outside"):
        clipped(*given, dual_clip=1.0)
    with pytest.raises(ValueError, match="negative_temperature=0.0 is outside"):
        rl.sigmoid_surrogate(*given, negative_temperature=0.0)
    with pytest.raises(ValueError, match=r"mask has shape \(5,\)"):
        clipped(*given, mask=np.ones(5, bool))
    with pytest.raises(ValueError, match="max_log_ratio=0.0 is outside"):
        rl.sequence_log_ratio(LOG_PROB, BEHAVIOUR, max_log_ratio=0.0)
    with pytest.raises(ValueError, match=r"shape \(4,\); a sequence ratio needs"):
        rl.sequence_log_ratio(LOG_PROB[:, 0], BEHAVIOUR[:, 0])


def test_check_clip_range(as_shipped):
    assert rl.check_clip_range(0.2) == (0.2, 0.2)
    assert rl.check_clip_range((0.2, 0.28), "sum") == (0.2, 0.28)
    assert rl.check_clip_range((1.0, 3.0)) == (1.0, 3.0)
    assert rl.check_clip_range(0.8, "sum") == (0.8, 0.8)
    with pytest.warns(UserWarning, match="no clipping will ever happen"):
        rl.check_clip_range((0.1, 0.5), "mean")
    with pytest.raises(ValueError, match="clip_range high=-0.1"):
        rl.check_clip_range((0.1, -0.1))
    with pytest.raises(ValueError, match="clip_range low=nan"):
        rl.check_clip_range(math.nan)
    with pytest.raises(ValueError, match="reduction='average' is not one of"):
        rl.check_clip_range(0.1, "average")
    for wrong in ((0.1, 0.2, 0.3), "0.1", True):
        with pytest.raises(TypeError, match="must be a number or a pair"):
            rl.check_clip_range(wrong)


def test_sequence_ratio_is_the_geometric_mean():
    ours = np.asarray(sequence_log_ratio(LOG_PROB, BEHAVIOUR, MASK))
    for i, row in enumerate(MASK):
        ratios = np.exp(LOG_PROB[i, row].astype(float) - BEHAVIOUR[i, row])
        mean = np.prod(ratios) ** (1 / row.sum())
        np.testing.assert_allclose(np.exp(ours[i, row]), mean, rtol=1e-5)
    np.testing.assert_array_equal(ours[~MASK], 0)


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
    expected, expected_gradient = jax.jit(jax.value_and_grad(through_the_mean))(
        LOG_PROB
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-8)
    assert np.any(gradient)


def test_sequence_ratio_of_one_token_is_the_token_ratio():
    one, other = LOG_PROB[:, :1], BEHAVIOUR[:, :1]
    np.testing.assert_allclose(sequence_log_ratio(one, other), one - other, rtol=1e-6)


def test_sequence_ratio_is_bounded_above_and_survives_empty_sequences():
    far = BEHAVIOUR + np.float32(50)
    mask = MASK & (np.arange(4) != 2)[:, None]
    ours = np.asarray(sequence_log_ratio(far, BEHAVIOUR, mask))
    np.testing.assert_array_equal(ours, np.where(mask, 10, 0))
    gradient = jax.jit(
        jax.grad(lambda x: rl.sequence_log_ratio(x, BEHAVIOUR, mask).sum())
    )(far)
    np.testing.assert_array_equal(gradient, 0)
    below = sequence_log_ratio(BEHAVIOUR - np.float32(50), BEHAVIOUR)
    np.testing.assert_allclose(below, -50, rtol=1e-5)


def test_ratio_of_means_is_a_root_of_the_joint_ratio():
    # flow_sde invariant 12, on the losses: D = 5 dimensions an event.
    loss_of_mean = clipped(LOG_PROB.mean(1), BEHAVIOUR.mean(1), -1.0, dual_clip=1e9)
    joint = np.exp(LOG_PROB.sum(1, dtype=float) - BEHAVIOUR.sum(1, dtype=float))
    np.testing.assert_allclose(loss_of_mean, np.maximum(joint**0.2, 0.8), rtol=1e-5)


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
    np.testing.assert_allclose(value, expected[MASK].mean(), rtol=1e-5)
    expected = np.where(MASK, -advantage - 0.01 * np.expm1(-d), 0) / MASK.sum()
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
