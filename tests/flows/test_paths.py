import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax import flows


@pytest.fixture
def path(x64):
    a, b, c = jax.random.split(jax.random.key(0), 3)
    x_data = jax.random.normal(a, (20, 3), jnp.float64)
    x_noise = jax.random.normal(b, (20, 3), jnp.float64)
    t = jax.random.uniform(c, (20,), jnp.float64, 0.05, 0.95)
    return x_data, x_noise, t, flows.interpolate(x_data, x_noise, t)


def test_end_points():
    x_data, x_noise = jnp.ones((2, 3)), jnp.full((2, 3), 5.0)
    np.testing.assert_array_equal(
        flows.interpolate(x_data, x_noise, jnp.zeros(2)), x_data
    )
    np.testing.assert_array_equal(
        flows.interpolate(x_data, x_noise, jnp.ones(2)), x_noise
    )


def test_velocity_is_the_time_derivative(path):
    x_data, x_noise, t, x = path
    eps = 1e-6
    later = flows.interpolate(x_data, x_noise, t + eps)
    np.testing.assert_allclose(
        (later - x) / eps, flows.conditional_velocity(x_data, x_noise), rtol=1e-6
    )


@pytest.mark.parametrize(
    "source, target", itertools.product(flows.PARAMETRISATIONS, repeat=2)
)
def test_parametrisation_table(path, source, target):
    x_data, x_noise, t, x = path
    truth = {
        "velocity": x_noise - x_data,
        "data": x_data,
        "noise": x_noise,
        # conditional score of N((1 - t) x_data, t^2 I) at x
        "score": -(x - (1 - t[:, None]) * x_data) / t[:, None] ** 2,
    }
    got = flows.convert(truth[source], source, target, x, t)
    np.testing.assert_allclose(got, truth[target], rtol=1e-9, atol=1e-9)


def test_wrapped_noise_network_samples_the_same(x64):
    mixture = flows.gaussian_mixture([1.0], [[1.0, 2.0]], [0.5])

    def noise_network(x, t, cond):
        return flows.convert(mixture.velocity(x, t), "velocity", "noise", x, t)

    # away from t = 1, where a noise prediction says nothing of the data
    x = jax.random.normal(jax.random.key(0), (4, 2), jnp.float64)
    t = jnp.full(4, 0.7)
    wrapped = flows.as_velocity(noise_network, "noise")
    np.testing.assert_allclose(wrapped(x, t, None), mixture.velocity(x, t), rtol=1e-9)


def test_bad_parametrisation():
    with pytest.raises(ValueError, match="Did you mean 'velocity'"):
        flows.as_velocity(lambda x, t, c: x, "velocty")


def test_tweedie(x64):
    # The score from the velocity is the gradient of the log density.
    mixture = flows.gaussian_mixture([0.3, 0.7], [[-1.0, 0.0], [1.5, 1.0]], [0.4, 0.7])
    x = jax.random.normal(jax.random.key(0), (20, 2), jnp.float64)
    t = jax.random.uniform(jax.random.key(1), (20,), jnp.float64, 0.02, 1.0)
    score = flows.convert(mixture.velocity(x, t), "velocity", "score", x, t)
    gradient = jax.vmap(
        jax.grad(lambda x, t: mixture.log_density(x[None], t[None])[0])
    )(x, t)
    np.testing.assert_allclose(score, gradient, rtol=1e-8, atol=1e-10)


def test_mixture_velocity_is_the_conditional_mean():
    # Regression oracle: the average of (noise - data) among draws that fall near x.
    mixture = flows.gaussian_mixture([0.5, 0.5], [[-1.0], [1.0]], [0.3, 0.3])
    n = 400_000
    x_data = mixture.sample(jax.random.key(0), n)
    x_noise = jax.random.normal(jax.random.key(1), (n, 1))
    t = jnp.full(n, 0.6)
    x = np.asarray(flows.interpolate(x_data, x_noise, t))[:, 0]
    v = np.asarray(x_noise - x_data)[:, 0]
    for at in (-0.8, 0.1, 0.7):
        near = np.abs(x - at) < 0.02
        error = v[near].std() / np.sqrt(near.sum())
        exact = float(mixture.velocity(jnp.full((1, 1), at), jnp.full(1, 0.6))[0, 0])
        assert abs(v[near].mean() - exact) < 4 * error + 0.02


@pytest.mark.parametrize(
    "weights, means, stds, message",
    [
        ([0.5, 0.4], [[0.0], [1.0]], [1.0, 1.0], "sum to 0.9"),
        ([0.5, 0.5], [[0.0], [1.0]], [1.0, 0.0], "must be positive"),
        ([1.0], [[0.0], [1.0]], [1.0, 1.0], r"\[component, dim\]"),
    ],
)
def test_bad_mixtures(weights, means, stds, message):
    with pytest.raises(ValueError, match=message):
        flows.gaussian_mixture(weights, means, stds)


def test_mixture_of_ellipses():
    """One component with its own spread an axis: each axis is its own Gaussian."""
    stds = np.array([0.1, 1.0, 2.0])
    whole = flows.gaussian_mixture([1.0], [[0.3, -0.2, 0.0]], [stds])
    x = jax.random.normal(jax.random.key(0), (5, 3))
    t = jnp.linspace(0.1, 1.0, 5)
    density = 0.0
    for i, (mean, std) in enumerate(zip([0.3, -0.2, 0.0], stds)):
        axis = flows.gaussian_mixture([1.0], [[mean]], [std])
        np.testing.assert_allclose(
            whole.velocity(x, t)[:, i : i + 1],
            axis.velocity(x[:, i : i + 1], t),
            rtol=1e-5,
            atol=1e-6,
        )
        density = density + axis.log_density(x[:, i : i + 1], t)
    np.testing.assert_allclose(whole.log_density(x, t), density, rtol=1e-5, atol=1e-5)
    drawn = whole.sample(jax.random.key(1), 20_000)
    np.testing.assert_allclose(drawn.std(0), stds, rtol=0.03)
