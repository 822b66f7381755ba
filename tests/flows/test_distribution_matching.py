"""Distribution matching and adversarial losses (TMD sheet, section 6: 10, 14)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax import flows


def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (4, 3, 5)) for key in keys]


@functools.partial(jax.jit, static_argnames="normalisation")
def gradient(x, teacher, critic, **options):
    loss = flows.distribution_matching_loss
    return jax.grad(lambda x: loss(x, teacher, critic, **options)[0].mean())(x)


@pytest.mark.parametrize("normalisation", flows.NORMALISATIONS)
def test_10_gradient(normalisation):
    x, teacher, critic = arrays()
    found = gradient(x, teacher, critic, normalisation=normalisation)
    apart = {"distance": x - teacher, "difference": critic - teacher}[normalisation]
    weight = 1 / (np.abs(apart).mean((1, 2), keepdims=True) + 1e-6)
    expected = weight * (critic - teacher) / x.size
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


def test_10_zero_only_where_the_scores_agree():
    x, teacher, _ = arrays()
    np.testing.assert_allclose(gradient(x, teacher, teacher), 0, atol=1e-8)
    assert np.abs(gradient(x, teacher, teacher + 0.1)).min() > 0


def test_10_scale_does_not_matter():
    found = [gradient(*(scale * a for a in arrays())) for scale in (1.0, 50.0)]
    np.testing.assert_allclose(*found, rtol=1e-4)


def test_10_moves_the_student_towards_the_teacher():
    """Gaussians with exact scores: descent moves the mean the right way."""
    rng, t = np.random.default_rng(1), jnp.full(5000, 0.6)
    x, noise = (jnp.asarray(rng.normal(size=(5000, 1)), jnp.float32) for _ in "xn")
    x = x + 1.5
    x_t = flows.interpolate(x, noise, t)

    @jax.jit
    def predict(mean):
        velocity = flows.gaussian_mixture([1.0], [[0.0]], [1.0]).velocity
        v = velocity(x_t - (1 - t)[:, None] * mean, t) - mean
        return flows.convert(v, "velocity", "data", x_t, t)

    predictions = [predict(mean) for mean in (-0.5, 1.5)]  # of teacher and student
    assert gradient(x, *predictions).mean() > 0  # the mean goes down, to -0.5
    assert gradient(x, *predictions[::-1]).mean() < 0


def test_finite_where_prediction_and_sample_are_equal():
    x, _, critic = arrays()
    assert np.isfinite(gradient(x, x, critic)).all()
    loss, metrics = flows.distribution_matching_loss(x, x, x)
    assert np.isfinite(loss).all() and np.isfinite(metrics["weight"]).all()


def test_no_gradient_reaches_teacher_or_critic():
    x, teacher, critic = arrays()
    loss = lambda *of: flows.distribution_matching_loss(x, *of)[0].sum()  # noqa: E731
    np.testing.assert_array_equal(jax.grad(loss, (0, 1))(teacher, critic), 0)


def test_14_losses_at_zero_logits():
    zero = jnp.zeros((3, 2))
    np.testing.assert_allclose(flows.generator_loss(zero), np.log(2), rtol=1e-6)
    both = flows.discriminator_loss(zero, zero)
    np.testing.assert_allclose(both, 2 * np.log(2), rtol=1e-6)


def test_discriminator_wants_real_up_and_fake_down():
    zero = jnp.zeros((1, 1))
    loss = lambda fake, real: flows.discriminator_loss(fake, real).sum()  # noqa: E731
    fake, real = jax.grad(loss, (0, 1))(zero, zero)
    assert fake > 0 > real
    assert jax.grad(lambda x: flows.generator_loss(x).sum())(zero) < 0


def test_approximate_r1_is_the_gradient_penalty_of_a_linear_discriminator():
    weight, sigma = jnp.array([1.0, -2.0]), 0.1
    x, z = np.random.default_rng(0).normal(size=(2, 50_000, 2)).astype(np.float32)
    logits, moved = ((at @ weight)[:, None] for at in (x, x + sigma * z))
    penalty = flows.approximate_r1(logits, moved)
    np.testing.assert_allclose(penalty.mean(), sigma**2 * 5, rtol=0.03)


def test_denoising_loss_leaves_its_target_alone():
    x, prediction, _ = arrays()
    found = flows.denoising_loss(prediction, x)
    expected = np.square(prediction - x).mean((1, 2))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    slope = jax.grad(lambda x: flows.denoising_loss(prediction, x).sum())(x)
    np.testing.assert_array_equal(slope, 0)


def test_bad_inputs(refused):
    x, teacher, critic = arrays()
    given = (flows.distribution_matching_loss, x, teacher, critic)
    words = "normalisation='dmd2' is not one of 'distance'"
    refused(words, *given, normalisation="dmd2")
    refused("epsilon=0", *given, epsilon=0.0)
    refused("teacher has shape", *given[:2], jnp.ones((4, 3)), critic)
