import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax import flows
from tmdjax.core.conventions import flip_velocity


@pytest.fixture
def path(x64):
    rng = np.random.default_rng(0)
    x_data, x_noise = map(jnp.asarray, rng.normal(size=(2, 20, 3)))
    t = jnp.asarray(rng.uniform(0.05, 0.95, 20))
    return x_data, x_noise, t, flows.interpolate(x_data, x_noise, t)


@jax.jit
def fields(mixture, x, t):
    """Velocity, log density and the gradient of the latter."""
    density = lambda x, t: mixture.log_density(x[None], t[None])[0]  # noqa: E731
    return mixture.velocity(x, t), *jax.vmap(jax.value_and_grad(density))(x, t)


def test_end_points():
    x_data, x_noise = jnp.ones((2, 3)), jnp.full((2, 3), 5.0)
    for t, expected in ((jnp.zeros(2), x_data), (jnp.ones(2), x_noise)):
        found = flows.interpolate(x_data, x_noise, t)
        np.testing.assert_array_equal(found, expected)


def test_velocity_is_the_time_derivative(path):
    x_data, x_noise, t, x = path
    later = flows.interpolate(x_data, x_noise, t + 1e-6)
    velocity = flows.conditional_velocity(x_data, x_noise)
    np.testing.assert_allclose((np.asarray(later) - x) / 1e-6, velocity, rtol=1e-6)


def test_parametrisation_table(path):
    x_data, x_noise, t, x = path
    truth = {
        "velocity": x_noise - x_data,
        "data": x_data,
        "noise": x_noise,
        # conditional score of N((1 - t) x_data, t^2 I) at x
        "score": -(x - (1 - t[:, None]) * x_data) / t[:, None] ** 2,
    }
    for source, target in itertools.product(flows.PARAMETRISATIONS, repeat=2):
        got = flows.convert(truth[source], source, target, x, t)
        np.testing.assert_allclose(
            got, truth[target], rtol=1e-9, atol=1e-9, err_msg=f"{source} to {target}"
        )


def test_wrapped_noise_network_samples_the_same(x64):
    mixture = flows.gaussian_mixture([1.0], [[1.0, 2.0]], [0.5])

    def noise_network(x, t, cond):
        return flows.convert(mixture.velocity(x, t), "velocity", "noise", x, t)

    # away from t = 1, where a noise prediction says nothing of the data
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))
    t = jnp.full(4, 0.7)
    wrapped = jax.jit(flows.as_velocity(noise_network, "noise"))
    np.testing.assert_allclose(wrapped(x, t, None), fields(mixture, x, t)[0], rtol=1e-9)


def test_walks_that_ask_at_a_singular_end_are_refused_and_the_remedy_works(refused):
    mixture = flows.gaussian_mixture([1.0], [[1.0, 2.0]], [0.5])

    def network(source):
        return lambda x, t, cond: flows.convert(
            mixture.velocity(x, t), "velocity", source, x, t
        )

    noise = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    grid, keys = flows.truncated_grid(40, 1.0), jax.random.split(jax.random.key(0), 4)
    truth = flows.endpoints(mixture.velocity, noise, flows.uniform_grid(40))
    words = "nothing of the velocity at t = 1.*flows.truncated_grid"
    for source in ("noise", "score"):
        velocity = flows.as_velocity(network(source), source)
        guided = flows.classifier_free_guidance(velocity, 2.0, 0.0)
        for built_in in (flows.uniform_grid(4), flows.edm_grid(4)):
            for walker in (velocity, guided):
                refused(words, flows.endpoints, walker, noise, built_in)
        table = flows.make_table("flow_cps", flows.shifted_grid(4, 3.0))
        refused(words, flows.rollout, keys, velocity, noise, table)
        refused(words, flows.local_error_costs, velocity, keys, (2,), knots=4)
        refused(words, flows.rk45, velocity, noise)
        found = flows.endpoints(velocity, noise, grid)
        np.testing.assert_allclose(found, truth, atol=0.05)
    costs = flows.local_error_costs(velocity, keys, (2,), knots=grid[::8])
    assert np.isfinite(costs).all()
    data = flows.as_velocity(network("data"), "data")
    refused("t = 0.*'euler'", flows.endpoints, data, noise, grid, method="heun")
    for method in ("euler", "midpoint"):
        assert np.isfinite(flows.endpoints(data, noise, grid, method=method)).all()
    turned = flip_velocity(flows.as_velocity(lambda x, t, cond: x, "data"))
    refused("t = 0", flows.endpoints, turned, noise, flows.uniform_grid(2))


def test_tweedie(x64):
    # The score from the velocity is the gradient of the log density.
    mixture = flows.gaussian_mixture([0.3, 0.7], [[-1.0, 0.0], [1.5, 1.0]], [0.4, 0.7])
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(20, 2)), rng.uniform(0.02, 1, 20)
    velocity, _, gradient = fields(mixture, x, t)
    score = flows.convert(velocity, "velocity", "score", jnp.asarray(x), jnp.asarray(t))
    np.testing.assert_allclose(score, gradient, rtol=1e-8, atol=1e-10)


def test_mixture_velocity_is_the_conditional_mean():
    # Regression oracle: the average of (noise - data) among draws that fall near x.
    mixture = flows.gaussian_mixture([0.5, 0.5], [[-1.0], [1.0]], [0.3, 0.3])
    n = 400_000
    x_data = np.asarray(jax.jit(mixture.sample, static_argnums=1)(jax.random.key(0), n))
    x_noise = np.random.default_rng(1).normal(size=(n, 1))
    x, v = (0.4 * x_data + 0.6 * x_noise)[:, 0], (x_noise - x_data)[:, 0]
    points = np.array([[-0.8], [0.1], [0.7]], np.float32)
    exact = fields(mixture, points, np.full(3, 0.6, np.float32))[0]
    for at, expected in zip(points[:, 0], np.asarray(exact)[:, 0]):
        near = np.abs(x - at) < 0.02
        error = v[near].std() / np.sqrt(near.sum())
        assert abs(v[near].mean() - expected) < 4 * error + 0.02


def test_bad_mixtures(refused):
    mixture, means = flows.gaussian_mixture, [[0.0], [1.0]]
    refused("sum to 0.9", mixture, [0.5, 0.4], means, [1.0, 1.0])
    refused("must be positive", mixture, [0.5, 0.5], means, [1.0, 0.0])
    refused(r"\[component, dim\]", mixture, [1.0], means, [1.0, 1.0])


def test_mixture_of_ellipses():
    """One component with its own spread an axis: each axis is its own Gaussian."""
    means, stds = [0.3, -0.2, 0.0], np.array([0.1, 1.0, 2.0])
    whole = flows.gaussian_mixture([1.0], [means], [stds])
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    t = np.linspace(0.1, 1.0, 5, dtype=np.float32)
    velocity, density, _ = fields(whole, x, t)
    each = [flows.gaussian_mixture([1.0], [[m]], [s]) for m, s in zip(means, stds)]
    by_axis = [fields(one, x[:, i : i + 1], t)[:2] for i, one in enumerate(each)]
    velocities, densities = map(np.stack, zip(*by_axis))
    np.testing.assert_allclose(velocity, velocities[..., 0].T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(density, densities.sum(0), rtol=1e-5, atol=1e-5)
    drawn = jax.jit(whole.sample, static_argnums=1)(jax.random.key(1), 20_000)
    np.testing.assert_allclose(np.asarray(drawn).std(0), stds, rtol=0.03)
