"""Couplings of a batch: against scipy, closed forms, and what must not change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from tmdjax import flows
from tmdjax.core import prng


def batch(count, event=(3, 2), seed=0):
    x, z = (
        jax.random.normal(jax.random.key(2 * seed + i), (count, *event)) for i in (0, 1)
    )
    return 2 * x + 1, z


def distances(x, z):
    x, z = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (x, z))
    return ((x[:, None] - z) ** 2).sum(-1)


def total(x, z):
    return np.square(np.asarray(x, np.float64) - np.asarray(z)).sum()


def same_rows(a, b):
    order = [np.lexsort(np.asarray(m).reshape(len(m), -1).T) for m in (a, b)]
    return (np.asarray(a)[order[0]] == np.asarray(b)[order[1]]).all()


def test_costs_are_squared_distances():
    x, z = batch(17)
    np.testing.assert_allclose(flows.transport_cost(x, z), distances(x, z), rtol=1e-5)
    assert flows.transport_cost(x.astype(jnp.bfloat16), z).dtype == jnp.float32


@pytest.mark.parametrize("count", [1, 2, 64])
def test_exact_assignment_is_that_of_scipy(count):
    x, z = batch(count, seed=count)
    coupled = jax.jit(flows.optimal_coupling)(x, z)
    assert same_rows(coupled, z)
    best = distances(x, z)[scipy.optimize.linear_sum_assignment(distances(x, z))].sum()
    np.testing.assert_allclose(total(x, coupled), best, rtol=1e-5)


def test_rows_in_another_order_are_coupled_alike():
    x, z = batch(32)
    order = jax.random.permutation(jax.random.key(5), 32)
    np.testing.assert_array_equal(
        flows.optimal_coupling(x[order], z), flows.optimal_coupling(x, z)[order]
    )
    np.testing.assert_array_equal(
        flows.optimal_coupling(x, z[order]), flows.optimal_coupling(x, z)
    )


def test_in_one_dimension_both_are_sorted():
    x, z = batch(40, ())
    coupled = flows.optimal_coupling(x, z)
    np.testing.assert_array_equal(coupled[jnp.argsort(x)], jnp.sort(z))


def test_labels_keep_their_own_noise():
    x, z = batch(48)
    labels = jnp.arange(48) % 5
    coupled = flows.optimal_coupling(x, z, labels=labels)
    for label in range(5):
        rows = labels == label
        assert same_rows(coupled[rows], z[rows])
        cost = distances(x[rows], z[rows])
        best = cost[scipy.optimize.linear_sum_assignment(cost)].sum()
        np.testing.assert_allclose(total(x[rows], coupled[rows]), best, rtol=1e-5)
    keys = prng.sample_keys(jax.random.key(3), 48)
    drawn = flows.entropic_coupling(x, z, keys, labels=labels)
    source = jnp.argmax((drawn[:, None] == z).all((-1, -2)), -1)
    assert (labels[source] == labels).all() and (source != jnp.arange(48)).any()


def test_plan_of_two_points_in_closed_form(x64):
    """Plan [[a, b], [b, a]] / 2 with a / b = exp(gap / epsilon), a + b = 1."""
    cost = jnp.array([[0.0, 1.0], [3.0, 0.0]])
    plan = flows.transport_plan(cost, regularisation=0.5, iterations=2000)
    odds = np.exp((1.0 + 3.0) / 2 / (0.5 * 1.0))
    a = odds / (1 + odds)
    expected = np.array([[a, 1 - a], [1 - a, a]]) / 2
    np.testing.assert_allclose(plan, expected, rtol=1e-10)


def test_plan_has_both_marginals_and_tends_to_the_assignment(x64):
    x, z = (a.astype(jnp.float64) for a in batch(24))
    cost = flows.transport_cost(x, z)
    smooth = flows.transport_plan(cost, regularisation=1.0)
    np.testing.assert_allclose(smooth.sum(1), 1 / 24, rtol=1e-12)
    np.testing.assert_allclose(smooth.sum(0), 1 / 24, rtol=1e-6)
    sharp = flows.transport_plan(cost, regularisation=0.002, iterations=5000)
    best = distances(x, z)[scipy.optimize.linear_sum_assignment(distances(x, z))].mean()
    assert best < (sharp * cost).sum() < best + 0.02 * cost.mean()
    assert (smooth * cost).sum() > (sharp * cost).sum()


def test_entropic_draws_follow_the_plan():
    x, z = batch(6, (2,))
    count = 4000
    keys = prng.sample_keys(jax.random.key(0), 6 * count).reshape(count, 6)
    draw = functools.partial(flows.entropic_coupling, regularisation=0.3)
    drawn = jax.vmap(lambda keys: draw(x, z, keys))(keys)
    source = jnp.argmax((drawn[:, :, None] == z).all(-1), -1)
    shares = jax.nn.one_hot(source, 6).mean(0)
    plan = flows.transport_plan(flows.transport_cost(x, z), regularisation=0.3)
    np.testing.assert_allclose(shares, 6 * plan, atol=0.03)


def test_no_gradient_passes_the_choice():
    x, z = batch(8)
    keys = prng.sample_keys(jax.random.key(0), 8)
    for coupling in (flows.optimal_coupling, flows.entropic_coupling):
        couple = functools.partial(coupling, x_noise=z, keys=keys)
        slope = jax.jacobian(couple)(x)
        assert (slope == 0).all()


def test_a_batch_with_a_damaged_row_ends():
    x, z = batch(8)
    x = x.at[3].set(jnp.nan)
    assert same_rows(flows.optimal_coupling(x, z), z)
    equal = jnp.zeros_like(z)
    keys = prng.sample_keys(jax.random.key(0), 8)
    assert np.isfinite(flows.entropic_coupling(equal, equal, keys)).all()


def test_regression_onto_coupled_pairs_is_less_noisy():
    """A network that answers with the best constant: what is left is the pairs' own."""
    x, _ = batch(128, (2,))
    keys = prng.sample_keys(jax.random.key(1), 128)

    def loss(coupling):
        def answer(params, x_t, t, cond):
            return jnp.broadcast_to(-x.mean(0), x_t.shape)

        return flows.flow_matching_loss({}, answer, x, keys, coupling=coupling)[0]

    alone, coupled = loss(None).mean(), loss(flows.optimal_coupling).mean()
    # the variance of z - x: 1 + 4 if independent, (2 - 1)^2 if coupled
    np.testing.assert_allclose(alone, 5.0, rtol=0.2)
    assert coupled < 2.0


BAD = [
    (
        lambda x, z: flows.optimal_coupling(x, z[:2]),
        r"x_noise has shape \(2, 3, 2\) but",
    ),
    (
        lambda x, z: flows.optimal_coupling(x, z, labels=jnp.zeros(3, int)),
        r"labels has shape \(3,\)",
    ),
    (
        lambda x, z: flows.transport_plan(distances(x, z), regularisation=0.0),
        "regularisation=0.0",
    ),
    (lambda x, z: flows.transport_plan(distances(x, z), iterations=0), "iterations"),
]


@pytest.mark.parametrize("call, message", BAD)
def test_bad_inputs(call, message, as_shipped):
    with pytest.raises(ValueError, match=message):
        call(*batch(4))
