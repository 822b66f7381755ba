import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from scipy.integrate import solve_ivp

from tmdjax import flows
from tmdjax.core import prng

MIXTURE = flows.gaussian_mixture([0.4, 0.6], [[-1.0, 0.5], [1.2, -0.3]], [0.5, 0.8])


# one program for a velocity, a shape and the static part of a table
rollout = jax.jit(
    flows.rollout,
    static_argnums=1,
    static_argnames=("reduction", "store", "method", "g"),
)


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def uniform(steps, **options):
    return flows.make_table("ode", flows.uniform_grid(steps), **options)


def keys_of(count, seed=1, **options):
    return prng.sample_keys(jax.random.key(seed), count, **options)


def still(x, t, cond):
    return jnp.zeros_like(x)


def noisy_table(steps, std, **options):
    """An ODE table with constant noise added, for tests of the noisy path."""
    noise = np.full(steps, std)
    noisy = {"S": noise, "log_prob_std": noise, "mask": noise > 0, "stochastic": True}
    return uniform(steps, **options).replace(**noisy)


@pytest.mark.parametrize(
    "method, order", [("euler", 1), ("heun", 2), ("midpoint", 2), ("rk4", 4)]
)
def test_measured_order(x64, truth, method, order):
    def error(n):
        given = (None, MIXTURE.velocity, truth[0], uniform(n))
        end = rollout(*given, method=method, store=False)
        return np.sqrt(np.mean((end - truth[1]) ** 2))

    steps = {1: (160, 320), 2: (80, 160), 4: (40, 80)}[order]
    coarse, fine = (error(n) for n in steps)
    assert abs(np.log2(coarse / fine) - order) < 0.15


@pytest.fixture(scope="module")
def truth():
    """Starts, and where the ODE ends by scipy."""
    x = normal(16, 2, dtype=np.float64)
    with jax.enable_x64(True):
        velocity = jax.jit(MIXTURE.velocity)

        def backwards(s, y):
            return -np.asarray(velocity(y.reshape(16, 2), np.full(16, 1 - s))).ravel()

        solved = solve_ivp(backwards, (0, 1), x.ravel(), rtol=1e-12, atol=1e-12)
    return x, solved.y[:, -1].reshape(16, 2)


def test_ode_row_is_an_euler_step():
    grid = flows.shifted_grid(6, 3.0)
    velocity, ode = jax.jit(MIXTURE.velocity), flows.make_table("ode", grid)
    trajectory = rollout(None, MIXTURE.velocity, normal(8, 2), ode)
    states = np.asarray(trajectory.states)
    for i in range(6):
        v = np.asarray(velocity(states[i], np.full(8, grid[i], np.float32)))
        euler = states[i] - (grid[i] - grid[i + 1]) * v
        np.testing.assert_allclose(states[i + 1], euler, atol=1e-6)
    assert not np.any(trajectory.mask) and not np.any(trajectory.log_prob)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_log_prob_is_scipys(reduction):
    grid = flows.uniform_grid(4)
    velocity = jax.jit(MIXTURE.velocity)
    given = (keys_of(8), MIXTURE.velocity, normal(8, 2), noisy_table(4, 0.3))
    trajectory = rollout(*given, reduction=reduction)
    states = np.asarray(trajectory.states)
    for i in range(4):
        v = velocity(states[i], np.full(8, grid[i], np.float32))
        each = scipy.stats.norm(states[i] - 0.25 * np.asarray(v), 0.3)
        expected = getattr(np, reduction)(each.logpdf(states[i + 1]), axis=1)
        found = trajectory.log_prob[i]
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)


def test_noise_depends_on_the_sample_and_slices_compose():
    x, keys, table = normal(8, 2), keys_of(8), noisy_table(6, 0.2)
    run = functools.partial(rollout, keys, MIXTURE.velocity)
    whole, first = run(x, table), run(x, table[:3])
    later = keys_of(4, start=4)
    half = rollout(later, MIXTURE.velocity, x[4:], table, store=False)
    np.testing.assert_allclose(np.asarray(whole.states)[-1, 4:], half, atol=1e-5)
    second = run(first.states[-1], table[3:])
    np.testing.assert_allclose(whole.states[-1], second.states[-1], atol=1e-6)
    joined = np.concatenate([first.log_prob, second.log_prob])
    np.testing.assert_allclose(whole.log_prob, joined, atol=1e-5)
    inside = jax.jit(lambda table: run(first.states[-1], table[3:], store=False))
    np.testing.assert_allclose(inside(table), second.states[-1], atol=1e-6)


@pytest.mark.parametrize("rule", flows.FINAL_RULES)
def test_final_rule(rule):
    table = noisy_table(3, 0.4, final=rule)
    given = (keys_of(5, seed=0), MIXTURE.velocity, jnp.asarray(normal(5, 2)), table)
    trajectory = flows.rollout(*given)
    last = np.asarray(trajectory.states)[-1]
    # The ODE's last step ends in x0_hat, so only the noise tells the rules apart.
    noisy = not np.allclose(last, trajectory.x0_hat, atol=1e-5)
    assert noisy == (rule == "sample")
    np.testing.assert_array_equal(last, flows.rollout(*given, store=False))
    if rule != "sample":
        assert table[:2].final == "sample"  # the rule belongs to the last step
        assert table[1:].final == rule


def test_steps_that_draw_no_noise_have_no_log_prob(monkeypatch):
    entries = {"constant_noise": lambda t, t_next: {"k": t_next, "S": 0.1}}
    monkeypatch.setattr(flows.PRESETS, "_entries", flows.PRESETS._entries | entries)
    make = functools.partial(flows.make_table, "constant_noise", flows.uniform_grid(3))
    table = make(final="mean")
    assert table.stochastic and list(table.mask) == [True, True, False]
    table = make(c=np.array([1.0, 0.0, 1.0]))
    assert list(table.mask) == [True, False, True]
    trajectory = rollout(keys_of(5), MIXTURE.velocity, normal(5, 2), table)
    assert np.isfinite(trajectory.log_prob).all()


def test_reward_gradient_moves_by_its_column():
    table = uniform(4).replace(C=np.array([0.1, 0.2, 0.3, 0.4]))
    given = (None, still, np.zeros((2, 1), np.float32), table)
    end = rollout(*given, g=lambda x, t, c: jnp.ones_like(x), store=False)
    np.testing.assert_allclose(end, 1.0, rtol=1e-6)


def test_conditions_reach_the_velocity():
    def velocity(x, t, cond):
        return jnp.broadcast_to(cond[:, None], x.shape)

    given = np.zeros((3, 2), np.float32), uniform(2), np.float32([1, 2, 3])
    end = rollout(None, velocity, *given, store=False)
    np.testing.assert_allclose(np.asarray(end)[:, 0], [-1, -2, -3], rtol=1e-6)


@pytest.mark.parametrize("method", flows.SOLVERS)
def test_evaluations_are_counted_and_stay_in_the_unit_interval(method):
    table = flows.make_table("ode", flows.shifted_grid(7, 5.0))
    seen = []

    def velocity(x, t, cond):
        jax.debug.callback(lambda t: seen.append(float(t[0])), t)
        return x

    start = np.ones((1, 1), np.float32)
    rollout(None, velocity, start, table, method=method, store=False)
    jax.effects_barrier()
    assert len(seen) == flows.nfe(table, method)
    assert min(seen) >= 0 and max(seen) == 1


def test_gradient_through_a_rollout(x64):
    table, x = uniform(5), normal(1, 2, dtype=np.float64)

    @jax.jit
    def objective(x):
        end = flows.rollout(None, MIXTURE.velocity, x, table, method="rk4", store=False)
        return jnp.sum(end**2)

    gradient = jax.jit(jax.grad(objective))(x)
    for i, eps in enumerate(1e-6 * np.eye(2)):
        difference = (objective(x + eps) - objective(x - eps)) / 2e-6
        np.testing.assert_allclose(gradient[0, i], difference, rtol=1e-6)


def test_one_compilation_for_all_grids_of_one_length(count_compiles):
    x = np.ones((2, 2), np.float32)
    rollout(None, MIXTURE.velocity, x, uniform(4), store=False)
    other = flows.make_table("ode", flows.shifted_grid(4, 3.0))
    with count_compiles() as compiled:
        rollout(None, MIXTURE.velocity, x, other, store=False)
    assert not compiled


def test_float64_follows_x(x64):
    for dtype in (np.float64, np.float32):
        given = None, MIXTURE.velocity, np.ones((2, 2), dtype), uniform(3)
        assert jax.eval_shape(rollout, *given).states.dtype == dtype


def test_per_sample_std():
    x, mean = np.ones((3, 2), np.float32), np.zeros((3, 2), np.float32)
    std = np.array([0.5, 1.0, 2.0], np.float32)
    got = jax.jit(flows.gaussian_log_prob, static_argnums=3)(x, mean, std, "sum")
    truth = scipy.stats.norm(0, std[:, None]).logpdf(np.ones((3, 2))).sum(1)
    np.testing.assert_allclose(got, truth, rtol=1e-6)


def test_bad_inputs(refused):
    table, noisy, x, v = uniform(3), noisy_table(3, 0.1), jnp.ones((2, 2)), still
    run, half = functools.partial(flows.rollout, None, v), x.astype(jnp.bfloat16)
    refused("Did you mean 'midpoint'", run, x, table, method="midpont")
    refused("reduction='avg'", run, x, table, reduction="avg")
    refused("sampler state is bfloat16", run, half, table, error=TypeError)
    refused("give keys", run, x, noisy)
    narrow, words = lambda x, t, c: x[:, :1], r"velocity has shape \(2, 1\).*\(2, 2\)"
    refused(words, flows.rollout, None, narrow, x, table)
    noise = "rows without noise"
    refused(noise, flows.rollout, keys_of(2), v, x, noisy, method="heun")
    refused("must be the batch, 2", flows.rollout, keys_of(3), v, x, noisy)
    raw = jnp.zeros((2, 2), jnp.uint32)
    refused("typed key", flows.rollout, raw, v, x, noisy, error=TypeError)
    grid = flows.uniform_grid(3)
    refused(r"unknown sampler preset 'oed'.*'ode'", flows.make_table, "oed", grid)
    refused(r"final='x0hat'.*'x0_hat'", flows.make_table, "ode", grid, final="x0hat")
    for rows in (slice(None, None, 2), slice(3, None)):
        refused("consecutive steps", lambda rows: table[rows], rows)
    words = "store sampler states in float32"
    refused(words, flows.gaussian_log_prob, half, x, 1.0, error=TypeError)
    times, outside = jnp.array([0.5, 1.5]), r"t has 1 value.*outside \[0, 1\]"
    refused(outside, flows.interpolate, x, x, times)
    refused(outside, flows.convert, x, "velocity", "data", x, times - 1)
    refused("method='rk5'", flows.nfe, table, "rk5")


def test_noise_of_the_steps_may_be_given(refused):
    x, table, keys = jnp.ones((2, 2)), noisy_table(3, 0.1), keys_of(2)
    drawn = flows.rollout(keys, still, x, table)
    noise = jnp.stack([prng.normal(prng.fold_in(keys, i), (2,)) for i in range(3)])
    replayed = flows.rollout(None, still, x, table, noise=noise)
    np.testing.assert_allclose(drawn.states, replayed.states, rtol=1e-6)
    np.testing.assert_allclose(drawn.log_prob, replayed.log_prob, rtol=1e-5)
    short = {"noise": noise[:2]}
    refused("noise has shape", flows.rollout, None, still, x, table, **short)
