"""Couplings of a batch: against scipy, closed forms, and what must not change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from tmdjax import flows
from tmdjax.core import prng

optimal = jax.jit(flows.optimal_coupling)
entropic = jax.jit(flows.entropic_coupling)
plan_of = jax.jit(
    flows.transport_plan, static_argnames=("regularisation", "iterations")
)


KEY = jax.random.key(3)


def batch(count, event=(3, 2), seed=0):
    rng = np.random.default_rng(seed)
    x, z = rng.normal(size=(2, count, *event)).astype(np.float32)
    return 2 * x + 1, z


def distances(x, z):
    x, z = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (x, z))
    return ((x[:, None] - z) ** 2).sum(-1)


def total(x, z):
    return np.square(np.asarray(x, np.float64) - np.asarray(z)).sum()


def least(x, z):
    """The sum of squared distances of scipy's assignment."""
    cost = distances(x, z)
    return cost[scipy.optimize.linear_sum_assignment(cost)].sum()


def same_rows(a, b):
    order = [np.lexsort(np.asarray(m).reshape(len(m), -1).T) for m in (a, b)]
    return (np.asarray(a)[order[0]] == np.asarray(b)[order[1]]).all()


def test_costs_are_squared_distances():
    x, z = batch(17)
    cost = jax.jit(flows.transport_cost)
    np.testing.assert_allclose(cost(x, z), distances(x, z), rtol=1e-5)
    assert jax.eval_shape(cost, x.astype(jnp.bfloat16), z).dtype == jnp.float32


@pytest.mark.parametrize("count", [1, 2, 64])
def test_exact_assignment_is_that_of_scipy(count):
    x, z = batch(count, seed=count)
    coupled = optimal(x, z)
    assert same_rows(coupled, z)
    np.testing.assert_allclose(total(x, coupled), least(x, z), rtol=1e-5)


def test_rows_in_another_order_are_coupled_alike():
    x, z = batch(64)
    order, coupled = np.random.default_rng(5).permutation(64), np.asarray(optimal(x, z))
    np.testing.assert_array_equal(optimal(x[order], z), coupled[order])
    np.testing.assert_array_equal(optimal(x, z[order]), coupled)


def test_in_one_dimension_both_are_sorted():
    x, z = batch(40, ())
    coupled = np.asarray(optimal(x, z))
    np.testing.assert_array_equal(coupled[np.argsort(x)], np.sort(z))


def test_labels_keep_their_own_noise():
    x, z = batch(48)
    labels = np.arange(48) % 5
    coupled = np.asarray(optimal(x, z, labels=labels))
    for label in range(5):
        a, b, c = (rows[labels == label] for rows in (x, z, coupled))
        assert same_rows(c, b)
        np.testing.assert_allclose(total(a, c), least(a, b), rtol=1e-5)
    drawn = np.asarray(entropic(x, z, prng.sample_keys(KEY, 48), labels=labels))
    source = np.argmax((drawn[:, None] == z).all((-1, -2)), -1)
    assert (labels[source] == labels).all() and (source != np.arange(48)).any()


def test_plan_of_two_points_in_closed_form(x64):
    """Plan [[a, b], [b, a]] / 2 with a / b = exp(gap / epsilon), a + b = 1."""
    cost = np.array([[0.0, 1.0], [3.0, 0.0]])
    plan = plan_of(cost, regularisation=0.5, iterations=2000)
    odds = np.exp((1.0 + 3.0) / 2 / (0.5 * 1.0))
    a, b = odds / (1 + odds), 1 / (1 + odds)
    np.testing.assert_allclose(plan, np.array([[a, b], [b, a]]) / 2, rtol=1e-10)


def test_plan_has_both_marginals_and_tends_to_the_assignment(x64):
    x, z = batch(24)
    cost = distances(x, z)
    smooth = np.asarray(plan_of(cost, regularisation=1.0))
    np.testing.assert_allclose(smooth.sum(1), 1 / 24, rtol=1e-12)
    np.testing.assert_allclose(smooth.sum(0), 1 / 24, rtol=1e-6)
    sharp = np.asarray(plan_of(cost, regularisation=0.002, iterations=5000))
    best = least(x, z) / 24
    assert best < (sharp * cost).sum() < best + 0.02 * cost.mean()
    assert (smooth * cost).sum() > (sharp * cost).sum()


def test_entropic_draws_follow_the_plan():
    x, z = batch(6, (2,))
    keys = prng.sample_keys(KEY, 24_000).reshape(4000, 6)
    draw = functools.partial(flows.entropic_coupling, regularisation=0.3)
    drawn = np.asarray(jax.jit(jax.vmap(draw, in_axes=(None, None, 0)))(x, z, keys))
    source = np.argmax((drawn[:, :, None] == z).all(-1), -1)
    plan = np.asarray(plan_of(distances(x, z), regularisation=0.3))
    np.testing.assert_allclose(np.eye(6)[source].mean(0), 6 * plan, atol=0.03)


def test_no_gradient_passes_the_choice():
    x, z = batch(8)
    keys = prng.sample_keys(KEY, 8)

    @jax.jit
    def slopes(x, z):
        return [
            jax.jacobian(functools.partial(coupling, x_noise=z, keys=keys))(x)
            for coupling in (flows.optimal_coupling, flows.entropic_coupling)
        ]

    assert not np.any(slopes(x, z))


def test_a_batch_with_a_damaged_row_ends():
    x, z = batch(64)
    x[3] = np.nan
    assert same_rows(optimal(x, z), z)
    equal = np.zeros_like(z)
    assert np.isfinite(entropic(equal, equal, prng.sample_keys(KEY, 64))).all()


def test_regression_onto_coupled_pairs_is_less_noisy():
    """A network that answers with the best constant: what is left is the pairs' own."""
    x, _ = batch(128, (2,))

    @jax.jit
    def losses(x, keys):
        def answer(params, x_t, t, cond):
            return jnp.broadcast_to(-x.mean(0), x_t.shape)

        return [
            flows.flow_matching_loss({}, answer, x, keys, coupling=coupling)[0].mean()
            for coupling in (None, flows.optimal_coupling)
        ]

    alone, coupled = losses(x, prng.sample_keys(KEY, 128))
    # the variance of z - x: 1 + 4 if independent, (2 - 1)^2 if coupled
    np.testing.assert_allclose(alone, 5.0, rtol=0.2)
    assert coupled < 2.0


def test_a_coupling_of_ones_own_draws_apart_from_the_noise():
    x, seen = jnp.zeros((4, 3)), {}

    def coupling(x_data, x_noise, keys):
        seen.update(noise=x_noise, drawn=prng.normal(keys, x_noise.shape[1:]))
        return x_noise

    still = lambda params, x_t, t, cond: x_t  # noqa: E731
    flows.flow_matching_loss({}, still, x, prng.sample_keys(KEY, 4), coupling=coupling)
    assert (np.abs(seen["noise"] - seen["drawn"]) > 1e-3).all()


def test_bad_inputs(refused):
    x, z = batch(4)
    words = r"x_noise has shape \(2, 3, 2\) but"
    refused(words, flows.optimal_coupling, x, z[:2])
    labels = jnp.zeros(3, int)
    refused(r"labels has shape \(3,\)", flows.optimal_coupling, x, z, labels=labels)
    plan = functools.partial(flows.transport_plan, distances(x, z))
    refused("regularisation=0.0", plan, regularisation=0.0)
    refused("iterations", plan, iterations=0)
