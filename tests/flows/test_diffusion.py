"""Variance-preserving diffusion against Bayes' rule and published numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from numpy.testing import assert_allclose

from tmdjax import flows
from tmdjax.core import prng

SCHEDULES = {
    "cosine": flows.cosine_schedule(20),
    "linear": flows.linear_schedule(1000),
    "exponential": flows.exponential_schedule(3, 4e-7),
    "one": flows.cosine_schedule(1),
}
RNG = np.random.default_rng(0)
X, NOISE = np.float32(RNG.normal(size=(2, 5, 3)))


def test_exponential_levels_are_those_of_pde_refiner():
    schedule = SCHEDULES["exponential"]
    assert_allclose(schedule.beta, [4e-7, 5.4288e-5, 7.3681e-3, 1], rtol=1e-4)
    known = [0.9999996, 0.9999453, 0.9925776, 0]
    assert_allclose(schedule.alpha_bar, known, atol=5e-8)
    # a variance that float32 would have 4 % wrong
    assert_allclose(schedule.noise_variance[0], 4e-7, rtol=1e-12)
    assert_allclose(schedule.rows(0)["noise"], np.sqrt(4e-7), rtol=1e-6)
    assert schedule.noise_variance[-1] == 1 and schedule.alpha_bar[-1] == 0


def test_cosine_and_linear_levels():
    t = np.arange(1, 21) / 20
    cosine = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    cosine /= np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    assert_allclose(SCHEDULES["cosine"].alpha_bar[:-1], cosine[:-1], rtol=1e-12)
    assert SCHEDULES["cosine"].beta[-1] == 0.999  # where the cosine is 0
    # DDPM's 1000 levels end where almost nothing is left
    assert_allclose(SCHEDULES["linear"].alpha_bar[-1], 4.0358e-5, rtol=1e-3)
    assert SCHEDULES["linear"].beta[0] == 1e-4 and SCHEDULES["linear"].beta[-1] == 0.02


@pytest.mark.parametrize("name", SCHEDULES)
def test_ancestral_steps_are_those_of_bayes(name):
    """q(x_{k-1} | x_k, x_data): precisions of prior and likelihood add."""
    schedule = SCHEDULES[name]
    level = np.unique([0, 1 % len(schedule), len(schedule) // 2, len(schedule) - 1])
    row = schedule.rows(level)
    beta = schedule.beta[level]
    before = np.where(level > 0, schedule.alpha_bar[level - 1], 1.0)
    with np.errstate(divide="ignore"):
        prior, likelihood = 1 / (1 - before), (1 - beta) / beta
    x, x_data = np.resize(X, (len(level), 3)), np.resize(NOISE, (len(level), 3))
    mean, std = flows.ancestral_step(jnp.asarray(x_data), jnp.asarray(x), row, "data")
    for i, k in enumerate(level):
        if k == 0:
            assert std[i] == 0
            assert_allclose(mean[i], x_data[i], rtol=1e-6)
            continue
        variance = 1 / (prior[i] + likelihood[i])
        away = np.sqrt(before[i]) * x_data[i] * prior[i]
        seen = np.sqrt(1 - beta[i]) * x[i] / beta[i]
        assert_allclose(std[i], np.sqrt(variance), rtol=1e-5)
        assert_allclose(mean[i], variance * (away + seen), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "level, mean, std",
    [
        (19, [-0.140628576, -0.0987204313], 0.99646997),
        (10, [-1.78140426, -0.719814062], 0.36897564),
        (1, [-1.28349364, -0.713925779], 0.07582580),
        (0, [-1.0, -0.699267507], 0.0),
    ],
)
def test_steps_are_those_of_diffusers(level, mean, std):
    """DDPMScheduler(20, 'squaredcos_cap_v2', fixed_small, clip_sample) of diffusers."""
    x, noise = jnp.float32([[-2, -2 / 3]]), jnp.float32([[1, 1 / 3]])
    row = SCHEDULES["cosine"].rows(level)
    ours, own = flows.ancestral_step(noise, x, row, clip_data=1.0)
    assert_allclose(ours[0], mean, rtol=1e-5)
    assert_allclose(own, std, rtol=1e-5)


@pytest.mark.parametrize("prediction", flows.PREDICTIONS)
def test_predictions_carry_the_same_data(prediction):
    row = SCHEDULES["cosine"].rows(np.array([0, 3, 9, 15, 18]))
    x = flows.diffuse(jnp.asarray(X), jnp.asarray(NOISE), row)
    share = np.asarray(row["data"])[:, None] ** 2
    assert_allclose(
        x, np.sqrt(share) * X + np.sqrt(1 - share) * NOISE, rtol=1e-4, atol=1e-6
    )
    value = flows.diffusion_target(jnp.asarray(X), jnp.asarray(NOISE), row, prediction)
    assert_allclose(
        flows.predicted_data(value, x, row, prediction), X, rtol=1e-4, atol=1e-5
    )
    mean, _ = flows.ancestral_step(value, x, row, prediction, clip_data=0.3)
    clipped, _ = flows.ancestral_step(jnp.clip(X, -0.3, 0.3), x, row, "data")
    assert_allclose(mean, clipped, rtol=1e-4, atol=1e-5)


def test_v_is_the_data_in_pure_noise():
    row = SCHEDULES["exponential"].rows(jnp.full(5, 3))
    v = flows.diffusion_target(jnp.asarray(X), jnp.asarray(NOISE), row, "v")
    assert_allclose(v, -X, rtol=1e-6)


def test_a_whole_walk_ends_at_the_data():
    """Noisiest level first; the last step has no noise of its own."""
    rows = SCHEDULES["cosine"].rows(slice(None, None, -1))
    assert (np.asarray(rows["level"]) == np.arange(20)[::-1]).all()
    assert (np.asarray(rows["step"]) == np.arange(20)).all()
    assert_allclose(rows["t"], np.arange(20, 0, -1) / 20, rtol=1e-6)

    def transition(x, row, cond):
        return flows.ancestral_step(jnp.full_like(x, 0.3), x, row, "data")

    keys, few = prng.sample_keys(jax.random.key(0), 4), flows.cosine_schedule(5)
    walk = jax.jit(lambda rows, x: flows.noisy_chain(keys, transition, x, rows).states)
    states = walk(few.rows(slice(None, None, -1)), jnp.ones((4, 2)))
    assert_allclose(states[-1], 0.3, atol=1e-6)
    assert np.std(states[3]) > 0.1


def test_loss_is_zero_for_what_is_right_and_draws_every_level():
    schedule, count = SCHEDULES["cosine"], 4000
    keys = prng.sample_keys(jax.random.key(1), count)
    x_data = jnp.full((count, 2), 0.7)

    def knows(params, x, t, cond):
        """The noise of a point mass at 0.7."""
        row = schedule.rows(jnp.round(t * 20).astype(int) - 1)
        return (x - 0.7 * row["data"][:, None]) / row["noise"][:, None]

    loss = jax.jit(
        functools.partial(flows.diffusion_loss, {}),
        static_argnums=0,
        static_argnames=("schedule", "prediction"),
    )
    assert np.max(loss(knows, x_data, keys, schedule=schedule)) < 1e-6
    told = lambda params, x, t, cond: 0.7 + t[:, None] + 0 * x  # noqa: E731
    found = loss(told, x_data, keys, schedule=schedule, prediction="data")
    level, counts = np.unique(np.round(20 * np.sqrt(found)), return_counts=True)
    assert (level == np.arange(1, 21)).all()
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


def test_bad_inputs(refused):
    refused(r"beta\[1\]=1.0 of 3 levels", flows.DiffusionSchedule, [0.1, 1.0, 0.5])
    refused(r"beta\[0\]=0.0 of 2 levels", flows.DiffusionSchedule, [0.0, 0.5])
    refused("beta has shape", flows.DiffusionSchedule, [[0.1]])
    refused("levels=0 must be at least 1", flows.cosine_schedule, 0)
    refused(r"last=0.01 is outside \[0.1, 1\)", flows.linear_schedule, 5, 0.1, 0.01)
    refused("min_variance=0", flows.exponential_schedule, 3, 0)
    row, x = SCHEDULES["cosine"].rows(0), jnp.asarray(X)
    refused("prediction='eps' is not one of", flows.predicted_data, x, x, row, "eps")
    refused("must agree", flows.ancestral_step, x[:, :1], x, row)
