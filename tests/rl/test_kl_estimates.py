import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import log_softmax
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import rl

LOGITS = jnp.array([0.3, -1.0, 0.8, 0.1])
REFERENCE = log_softmax(jnp.array([0.0, 0.2, -0.4, 0.9]))
BEHAVIOUR = log_softmax(jnp.array([0.5, 0.5, 0.2, -0.7]))


@jax.jit
@jax.value_and_grad
def exact_kl(logits):
    policy = log_softmax(logits)
    return jnp.sum(jnp.exp(policy) * (policy - REFERENCE))


@functools.partial(jax.jit, static_argnames="kind")
@jax.value_and_grad
def expectation(logits, drawn_from, kind, **options):
    """Over all four outcomes: no sampling error."""
    estimate = rl.kl_estimate(log_softmax(logits), REFERENCE, kind, **options)
    return jnp.sum(jax.lax.stop_gradient(jnp.exp(drawn_from)) * estimate)


def test_by_hand_and_bad_inputs(refused):
    d, zeros = jnp.log(jnp.array([2.0, 0.5, 1.0])), jnp.zeros(3)
    assert_allclose(rl.kl_estimate(d, zeros, "k1"), d)
    k2, k3 = rl.kl_estimate(d, zeros, "k2"), rl.kl_estimate(d, zeros)
    assert_allclose(k2, [0.2402265, 0.2402265, 0], rtol=1e-6)
    assert_allclose(k3, [0.19314718, 0.30685282, 0], rtol=1e-6)
    of, shapes = rl.kl_estimate, r"shape \(4,\) but the other log_prob has"
    refused("kind='k4' is not one of 'k1', 'k2', 'k3'", of, LOGITS, REFERENCE, "k4")
    refused(shapes, of, LOGITS, REFERENCE[:1])
    refused(shapes, of, LOGITS, REFERENCE, behaviour_log_prob=BEHAVIOUR[:2])


@pytest.mark.parametrize("kind", ["k1", "k3"])
@pytest.mark.parametrize("on_policy", [True, False])
def test_multiplied_by_the_ratio_value_and_gradient_are_unbiased(kind, on_policy):
    behaviour = log_softmax(LOGITS) if on_policy else BEHAVIOUR
    given = (LOGITS, behaviour, kind)
    found = expectation(*given, behaviour_log_prob=behaviour)
    exact = exact_kl(LOGITS)
    assert_allclose(found[0], exact[0], rtol=1e-5)
    assert_allclose(found[1], exact[1], rtol=1e-4, atol=1e-7)


def test_gradient_of_k2_is_unbiased_on_policy_and_that_of_k3_is_not():
    exact, drawn = np.asarray(exact_kl(LOGITS)[1]), log_softmax(LOGITS)
    k2, k3 = (expectation(LOGITS, drawn, kind)[1] for kind in ("k2", "k3"))
    assert_allclose(k2, exact, rtol=1e-5, atol=1e-7)
    assert np.abs(k3 - exact).max() > 0.05


def test_k3_is_accurate_for_every_size_and_never_negative():
    d = np.float32(np.outer([1, -1], np.logspace(-7, 1.2, 400)))
    ours = rl.kl_estimate(d, np.zeros_like(d))
    wide = d.astype(np.float64)
    small = wide**2 / 2 - wide**3 / 6 + wide**4 / 24 - wide**5 / 120
    exact = np.where(abs(wide) < 1e-3, small, np.expm1(-wide) + wide)
    assert_allclose(ours, exact, rtol=2e-5)
    assert (ours > 0).all()
    assert rl.kl_estimate(jnp.zeros(()), jnp.zeros(())) == 0


def test_k3_gradient(x64):
    d = np.array([-3.0, -0.03, -0.019, 0.0, 0.019, 0.5, 4.0])
    of = jax.jit(jax.grad(lambda x: rl.kl_estimate(x, np.zeros(7)).sum()))
    gradient = of(d)
    assert_allclose(gradient, -np.expm1(-d), rtol=1e-8, atol=0)


def test_far_from_the_reference_and_in_half_precision():
    d, zeros = jnp.array([-500.0, 500.0]), jnp.zeros(2)
    total = lambda x: rl.kl_estimate(x, zeros, behaviour_log_prob=x).sum()  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(total))(d)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert_allclose(rl.kl_estimate(d, zeros)[1], 499, rtol=1e-6)
    half = log_softmax(LOGITS).astype(jnp.bfloat16), REFERENCE.astype(jnp.bfloat16)
    ours = rl.kl_estimate(*half)
    assert ours.dtype == jnp.float32
    assert_array_equal(ours, rl.kl_estimate(*[x.astype(jnp.float32) for x in half]))


def test_masked_elements_and_constants():
    mask = np.array([True, True, False, True])
    hole = jnp.where(mask, log_softmax(LOGITS), -jnp.inf)

    def loss(x, reference, behaviour):
        given = {"behaviour_log_prob": behaviour, "mask": mask}
        return rl.kl_estimate(x, reference, **given).sum()

    of = jax.jit(jax.grad(loss, (0, 1, 2)))
    gradient = [np.asarray(each) for each in of(hole, REFERENCE, BEHAVIOUR)]
    assert np.isfinite(gradient[0]).all() and gradient[0][2] == 0
    assert (gradient[0][mask] != 0).all()
    assert_array_equal(gradient[1:], np.zeros((2, 4)))
    assert rl.kl_estimate(hole, REFERENCE, mask=mask)[2] == 0
