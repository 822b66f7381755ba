import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from tmdjax import flows
from tmdjax.core.prng import normal, sample_keys
from tmdjax.data import moving_sprites
from tmdjax.domains.sprites.checks import check
from tmdjax.flows.empirical import empirical_flow

RNG = np.random.default_rng(0)
BANK = RNG.uniform(-1, 1, (3, 5, 2, 4)).astype(np.float32) + np.float32(0.5)
X = RNG.standard_normal((7, 2, 4)).astype(np.float32)
T = np.array([1.0, 0.7, 0.4, 0.2, 0.1, 0.9, 0.3], np.float32)
COND = np.array([0, 1, 2, 3, 0, 3, 1], np.int32)


@jax.jit
def run(velocity, x, t, cond=None):
    return velocity(x, t, cond)


FLOW = flows.as_pytree(empirical_flow(BANK))


def brute_force(x, t, samples):
    """The velocity of one point in float64, sample by sample."""
    x, samples = np.float64(x).ravel(), np.float64(samples).reshape(-1, 8)
    distances = [np.sum((x - (1 - t) * one) ** 2) for one in samples]
    weights = softmax(-np.array(distances) / (2 * t**2))
    return ((x - weights @ samples) / t).reshape(2, 4)


def expected(x, t, cond):
    groups = [*BANK, BANK]
    rows = zip(x, t, cond)
    return np.stack([brute_force(a, float(b), groups[c]) for a, b, c in rows])


def test_velocity_is_that_of_brute_force():
    result = run(FLOW, X, T, COND)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected(X, T, COND), rtol=1e-4, atol=1e-5)
    null = expected(X, T, np.full(7, 3, np.int32))
    np.testing.assert_allclose(run(FLOW, X, T), null, rtol=1e-4, atol=1e-5)


def test_float64_follows_the_state(x64):
    result = run(FLOW, np.float64(X), T, COND)
    assert result.dtype == jnp.float64
    np.testing.assert_allclose(result, expected(X, T, COND), rtol=1e-6, atol=1e-6)


def test_it_is_the_limit_of_a_gaussian_mixture(x64):
    vectors, times = np.float64(X).reshape(7, 8), np.float64(T)
    points = np.float64(BANK[1]).reshape(5, 8)
    mixture = flows.gaussian_mixture(np.full(5, 0.2), points, np.full(5, 1e-5))
    found = run(flows.as_pytree(empirical_flow(points[None])), vectors, times)
    limit = jax.jit(mixture.velocity)(vectors, times)
    np.testing.assert_allclose(found, limit, rtol=1e-6, atol=1e-6)


def test_at_time_one_it_is_noise_minus_the_mean():
    means = np.concatenate([BANK.mean(1), BANK.mean((0, 1))[None]])
    result = run(FLOW, X, np.ones(7, np.float32), COND)
    np.testing.assert_allclose(result, X - means[COND], atol=2e-6)


def test_near_time_zero_it_is_finite_and_points_away_from_the_sample():
    samples, noise = BANK[COND % 3, 2], X
    for t in (1e-2, 1e-3):
        x = (1 - t) * samples + t * noise
        v = run(FLOW, np.float32(x), np.full(7, t, np.float32), COND)
        # The posterior is the sample that x came from; rounding of x counts 1 / t.
        np.testing.assert_allclose(v, noise - samples, atol=1e-6 / t)
    for t in (0.0, 1e-8, 1e-5):
        times = np.full(7, t, np.float32)
        assert np.isfinite(run(FLOW, X, times, COND)).all()
        assert np.abs(run(FLOW, samples, times, COND)).max() < 0.01


def test_a_sample_does_not_depend_on_its_batch():
    whole = np.asarray(run(FLOW, X, T, COND))
    for order in (np.roll(np.arange(7), 3), np.arange(7)[::-1], np.array([4])):
        part = run(FLOW, X[order], T[order], COND[order])
        np.testing.assert_allclose(part, whole[order], rtol=1e-5, atol=1e-5)


def test_gradient_is_that_of_finite_differences(x64):
    rng = np.random.default_rng(1)
    x, t = np.float64(X), np.float64(T)
    dx, dt, h = rng.normal(size=X.shape), rng.normal(size=7), 1e-6

    @jax.jit
    def slopes(x, t):
        velocity = functools.partial(FLOW, cond=jnp.asarray(COND))
        _, tangent = jax.jvp(velocity, (x, t), (dx, dt))
        _, pushed = jax.jvp(lambda x: velocity(x, t), (x,), (dx,))
        pulled = jax.grad(lambda x: jnp.sum(velocity(x, t) * dx))(x)
        return tangent, pushed, pulled

    tangent, pushed, pulled = jax.device_get(slopes(x, t))
    later, earlier = (
        np.asarray(run(FLOW, x + s * dx, t + s * dt, COND)) for s in (h, -h)
    )
    np.testing.assert_allclose(tangent, (later - earlier) / (2 * h), rtol=1e-5)
    np.testing.assert_allclose(np.sum(pulled * dx), np.sum(pushed * dx), rtol=1e-8)


def test_bad_inputs(refused):
    banks = r"shape \(3, 4\); give \[group, n, \*event\]"
    refused(banks, empirical_flow, np.zeros((3, 4)))
    refused("at least one sample", empirical_flow, np.zeros((3, 0, 4)))
    refused("bank has 1 non-finite", empirical_flow, np.full((1, 1, 1), np.nan))
    velocity = functools.partial(empirical_flow(BANK), t=jnp.ones(2))
    x = jnp.zeros((2, 2, 4))
    refused(r"shape \(2, 4, 2\); .* \[batch, 2, 4\]", velocity, x.reshape(2, 4, 2))
    refused("groups are 0 to 2, and 3 stands", velocity, x, cond=np.array([0, 4]))
    words = "leading axis must be the batch, 2"
    refused(words, velocity, x, cond=np.zeros(3, int))
    refused("give one int32 a sample", velocity, x, cond=np.zeros(2))


def test_the_bank_is_an_argument_of_the_compiled_program(count_compiles):
    def guided(bank):
        flow = flows.classifier_free_guidance(empirical_flow(bank), 2.0, np.int32(3))
        return flows.as_pytree(flow)

    first, other = guided(BANK), guided(BANK[::-1])
    assert sum(leaf.size for leaf in jax.tree.leaves(first)) >= BANK.size
    run(first, X, T, COND).block_until_ready()
    with count_compiles() as compiled:
        v = run(other, X, T, COND)
    assert not compiled
    conditional = expected(X, T, np.where(COND < 3, 2 - COND, 3))
    null = expected(X, T, np.full(7, 3))
    np.testing.assert_allclose(v, 2 * conditional - null, rtol=1e-3, atol=1e-4)


def adherence(steps, count):
    bank = moving_sprites.bank()
    keys = sample_keys(jax.random.key(5), count)
    noise = normal(keys, bank.shape[2:])
    prompts = jnp.arange(count, dtype=jnp.int32) * 5 % 48
    grid = flows.shifted_grid(steps, 3.0)
    videos = flows.endpoints(empirical_flow(bank), noise, grid, prompts)
    return check(np.asarray(videos), np.asarray(prompts))["all"].mean()


def test_four_steps_follow_every_prompt_and_one_none():
    """Section 5 of the sheet, two rows of its table."""
    assert adherence(4, 48) == 1
    assert adherence(1, 48) == 0


@pytest.mark.slow
def test_adherence_by_number_of_steps():
    """Section 5 of the sheet: 100 % at 50, 16, 8 and 4 Euler steps, 85 % at 2."""
    rates = {steps: adherence(steps, 240) for steps in (50, 16, 8, 4, 2, 1)}
    # Three standard errors of two proportions.
    assert abs(rates.pop(2) - 0.85) < 0.1
    assert rates == {50: 1, 16: 1, 8: 1, 4: 1, 1: 0}
