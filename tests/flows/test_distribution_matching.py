"""Distribution matching and adversarial losses (TMD sheet, section 6: 10, 14)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax import flows

SHAPE = (4, 3, 5)


def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, SHAPE) for key in keys]


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
    np.testing.assert_allclose(
        found, weight * (critic - teacher) / x.size, rtol=1e-4, atol=1e-7
    )


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

    def loss(t, c):
        return flows.distribution_matching_loss(x, t, c)[0].sum()

    for found in jax.grad(loss, (0, 1))(teacher, critic):
        np.testing.assert_array_equal(found, 0)


def test_14_losses_at_zero_logits():
    zero = jnp.zeros((3, 2))
    np.testing.assert_allclose(flows.generator_loss(zero), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(
        flows.discriminator_loss(zero, zero), 2 * np.log(2), rtol=1e-6
    )


def test_discriminator_wants_real_up_and_fake_down():
    fake, real = jax.grad(
        lambda f, r: flows.discriminator_loss(f, r).sum(), (0, 1)
    )(jnp.zeros((1, 1)), jnp.zeros((1, 1)))  # fmt: skip
    assert fake > 0 > real
    assert jax.grad(lambda x: flows.generator_loss(x).sum())(jnp.zeros((1, 1))) < 0


def test_approximate_r1_is_the_gradient_penalty_of_a_linear_discriminator():
    weight, sigma = jnp.array([1.0, -2.0]), 0.1
    rng = np.random.default_rng(0)
    x, z = (jnp.asarray(rng.normal(size=(50_000, 2)), jnp.float32) for _ in "xz")
    penalty = flows.approximate_r1(
        (x @ weight)[:, None], ((x + sigma * z) @ weight)[:, None]
    )
    np.testing.assert_allclose(penalty.mean(), sigma**2 * 5, rtol=0.03)


def test_denoising_loss_leaves_its_target_alone():
    x, prediction, _ = arrays()
    np.testing.assert_allclose(
        flows.denoising_loss(prediction, x),
        np.square(prediction - x).mean((1, 2)),
        rtol=1e-5,
    )
    found = jax.grad(lambda x: flows.denoising_loss(prediction, x).sum())(x)
    np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"normalisation": "dmd2"}, "normalisation='dmd2' is not one of 'distance'"),
        ({"epsilon": 0.0}, "epsilon=0"),
        ({"teacher": jnp.ones((4, 3))}, "teacher has shape"),
    ],
)
def test_bad_inputs(options, message, as_shipped):
    x, teacher, critic = arrays()
    given = {"teacher": teacher, "critic": critic, **options}
    with pytest.raises(ValueError, match=message):
        flows.distribution_matching_loss(x, **given)
