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


def noisy_table(steps, std, **changes):
    """An ODE table with constant noise added, for tests of the noisy path."""
    table = flows.make_table("ode", flows.uniform_grid(steps))
    noise = np.full(steps, std)
    return table.replace(
        S=noise, log_prob_std=noise, mask=noise > 0, stochastic=True
    ).replace(**changes)


@pytest.mark.parametrize(
    "method, order", [("euler", 1), ("heun", 2), ("midpoint", 2), ("rk4", 4)]
)
def test_measured_order(x64, truth, method, order):
    def error(n):
        table = flows.make_table("ode", flows.uniform_grid(n))
        end = rollout(
            None, MIXTURE.velocity, truth[0], table, method=method, store=False
        )
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
    ode = flows.make_table("ode", grid)
    velocity = jax.jit(MIXTURE.velocity)
    trajectory = rollout(None, MIXTURE.velocity, normal(8, 2), ode)
    states = np.asarray(trajectory.states)
    for i in range(6):
        v = np.asarray(velocity(states[i], np.full(8, grid[i], np.float32)))
        euler = states[i] - (grid[i] - grid[i + 1]) * v
        np.testing.assert_allclose(states[i + 1], euler, atol=1e-6)
    # the noisy code path with S = 0: bit for bit
    keys = prng.sample_keys(jax.random.key(1), 8)
    zero = rollout(keys, MIXTURE.velocity, normal(8, 2), ode.replace(stochastic=True))
    np.testing.assert_array_equal(states, zero.states)
    assert not np.any(zero.mask) and not np.any(zero.log_prob)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_log_prob_is_scipys(reduction):
    grid = flows.uniform_grid(4)
    keys = prng.sample_keys(jax.random.key(1), 8)
    velocity = jax.jit(MIXTURE.velocity)
    trajectory = rollout(
        keys, MIXTURE.velocity, normal(8, 2), noisy_table(4, 0.3), reduction=reduction
    )
    states = np.asarray(trajectory.states)
    for i in range(4):
        v = velocity(states[i], np.full(8, grid[i], np.float32))
        mean = states[i] - 0.25 * np.asarray(v)
        each = scipy.stats.norm(mean, 0.3).logpdf(states[i + 1])
        expected = getattr(np, reduction)(each, axis=1)
        np.testing.assert_allclose(
            trajectory.log_prob[i], expected, rtol=2e-4, atol=2e-5
        )


def test_split_scale_draws_and_scores_one_distribution():
    grid = flows.uniform_grid(2)
    table = flows.make_table("ode", grid)
    noise = np.array([0.5, 0.0])
    table = table.replace(
        S=noise,
        c=np.full(2, 2.0),
        log_prob_std=2 * noise,
        mask=noise > 0,
        stochastic=True,
    )
    keys = prng.sample_keys(jax.random.key(0), 4000)
    start = np.zeros((4000, 1), np.float32)
    trajectory = rollout(keys, lambda x, t, c: jnp.zeros_like(x), start, table)
    drawn = np.asarray(trajectory.states[1])[:, 0]
    assert abs(drawn.std() - 1.0) < 0.04
    np.testing.assert_allclose(
        trajectory.log_prob[0], scipy.stats.norm(0, 1).logpdf(drawn), atol=1e-5
    )


def test_noise_depends_on_the_sample_and_slices_compose():
    x, keys = normal(8, 2), prng.sample_keys(jax.random.key(1), 8)
    table = noisy_table(6, 0.2)
    whole = rollout(keys, MIXTURE.velocity, x, table)
    later = prng.sample_keys(jax.random.key(1), 4, start=4)
    half = rollout(later, MIXTURE.velocity, x[4:], table, store=False)
    np.testing.assert_allclose(np.asarray(whole.states)[-1, 4:], half, atol=1e-5)
    first = rollout(keys, MIXTURE.velocity, x, table[:3])
    second = rollout(keys, MIXTURE.velocity, first.states[-1], table[3:])
    np.testing.assert_allclose(whole.states[-1], second.states[-1], atol=1e-6)
    joined = np.concatenate([first.log_prob, second.log_prob])
    np.testing.assert_allclose(whole.log_prob, joined, atol=1e-5)

    @jax.jit
    def sliced_inside(table):
        return flows.rollout(
            keys, MIXTURE.velocity, first.states[-1], table[3:], store=False
        )

    np.testing.assert_allclose(sliced_inside(table), second.states[-1], atol=1e-6)


@pytest.mark.parametrize("rule", flows.FINAL_RULES)
def test_final_rule(rule):
    table = flows.make_table("ode", flows.uniform_grid(3), final=rule)
    noise = np.full(3, 0.4)
    table = table.replace(S=noise, log_prob_std=noise, stochastic=True)
    keys = prng.sample_keys(jax.random.key(0), 5)
    x = jnp.asarray(normal(5, 2))
    trajectory = flows.rollout(keys, MIXTURE.velocity, x, table)
    last = np.asarray(trajectory.states)[-1]
    # The ODE's last step ends in x0_hat, so only the noise tells the rules apart.
    noisy = not np.allclose(last, trajectory.x0_hat, atol=1e-5)
    assert noisy == (rule == "sample")
    np.testing.assert_array_equal(
        last, flows.rollout(keys, MIXTURE.velocity, x, table, store=False)
    )
    if rule != "sample":
        assert table[:2].final == "sample"  # the rule belongs to the last step
        assert table[1:].final == rule


def test_steps_that_draw_no_noise_have_no_log_prob(monkeypatch):
    entries = {"constant_noise": lambda t, t_next: {"k": t_next, "S": 0.1}}
    monkeypatch.setattr(flows.PRESETS, "_entries", flows.PRESETS._entries | entries)
    grid = flows.uniform_grid(3)
    table = flows.make_table("constant_noise", grid, final="mean")
    assert table.stochastic and list(table.mask) == [True, True, False]
    table = flows.make_table("constant_noise", grid, c=np.array([1.0, 0.0, 1.0]))
    assert list(table.mask) == [True, False, True]
    keys = prng.sample_keys(jax.random.key(0), 5)
    trajectory = rollout(keys, MIXTURE.velocity, normal(5, 2), table)
    assert np.isfinite(trajectory.log_prob).all()


def test_reward_gradient_moves_by_its_column():
    table = flows.make_table("ode", flows.uniform_grid(4))
    table = table.replace(C=np.array([0.1, 0.2, 0.3, 0.4]))
    end = rollout(
        None,
        lambda x, t, c: jnp.zeros_like(x),
        np.zeros((2, 1), np.float32),
        table,
        g=lambda x, t, c: jnp.ones_like(x),
        store=False,
    )
    np.testing.assert_allclose(end, 1.0, rtol=1e-6)


def test_conditions_reach_the_velocity():
    end = rollout(
        None,
        lambda x, t, cond: jnp.broadcast_to(cond[:, None], x.shape),
        np.zeros((3, 2), np.float32),
        flows.make_table("ode", flows.uniform_grid(2)),
        np.array([1.0, 2.0, 3.0], np.float32),
        store=False,
    )
    np.testing.assert_allclose(np.asarray(end)[:, 0], [-1, -2, -3], rtol=1e-6)


@pytest.mark.parametrize("method", flows.METHODS)
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
    table = flows.make_table("ode", flows.uniform_grid(5))
    x = normal(1, 2, dtype=np.float64)

    @jax.jit
    def objective(x):
        end = flows.rollout(None, MIXTURE.velocity, x, table, method="rk4", store=False)
        return jnp.sum(end**2)

    gradient = jax.jit(jax.grad(objective))(x)
    for i in range(2):
        eps = np.zeros((1, 2))
        eps[0, i] = 1e-6
        difference = (objective(x + eps) - objective(x - eps)) / 2e-6
        np.testing.assert_allclose(gradient[0, i], difference, rtol=1e-6)


def test_one_compilation_for_all_grids_of_one_length(count_compiles):
    x = np.ones((2, 2), np.float32)
    grids = flows.uniform_grid(4), flows.shifted_grid(4, 3.0)
    one, other = (flows.make_table("ode", grid) for grid in grids)
    rollout(None, MIXTURE.velocity, x, one, store=False)
    with count_compiles() as compiled:
        rollout(None, MIXTURE.velocity, x, other, store=False)
    assert not compiled


def test_float64_follows_x(x64):
    table = flows.make_table("ode", flows.uniform_grid(3))
    for dtype in (np.float64, np.float32):
        given = None, MIXTURE.velocity, np.ones((2, 2), dtype), table
        assert jax.eval_shape(rollout, *given).states.dtype == dtype


def test_transition_density_gradient_and_expectation():
    mean, std = np.array([[0.3, -0.2, 1.0]], np.float32), 0.7
    z = normal(100_000, 3)

    @jax.jit
    def scored(z, mean):
        mean = jnp.broadcast_to(mean, z.shape)
        x = flows.gaussian_transition(mean, std, z)
        return x, flows.gaussian_log_prob(x, mean, std)

    x, log_prob = jax.tree.map(np.asarray, scored(z, mean))
    expected = -0.5 - np.log(std) - 0.5 * np.log(2 * np.pi)
    error = log_prob.std() / np.sqrt(len(log_prob))
    assert abs(log_prob.mean() - expected) < 4 * error
    gradient = jax.jit(
        jax.grad(lambda m: flows.gaussian_log_prob(jnp.array(x[:1]), m, std, "sum")[0])
    )(mean)
    for i in range(3):
        shift = 1e-2 * np.eye(3)[None, i]
        up, down = (
            scipy.stats.norm(mean + s, std).logpdf(x[:1]).sum() for s in (shift, -shift)
        )
        np.testing.assert_allclose(gradient[0, i], (up - down) / 2e-2, rtol=1e-3)


def test_per_sample_std():
    x, mean = np.ones((3, 2), np.float32), np.zeros((3, 2), np.float32)
    std = np.array([0.5, 1.0, 2.0], np.float32)
    got = jax.jit(flows.gaussian_log_prob, static_argnums=3)(x, mean, std, "sum")
    truth = scipy.stats.norm(0, std[:, None]).logpdf(np.ones((3, 2))).sum(1)
    np.testing.assert_allclose(got, truth, rtol=1e-6)


def test_bad_inputs(as_shipped):
    table = flows.make_table("ode", flows.uniform_grid(3))
    noisy = noisy_table(3, 0.1)
    x = jnp.ones((2, 2))
    v = MIXTURE.velocity
    keys = prng.sample_keys(jax.random.key(0), 2)
    with pytest.raises(ValueError, match="Did you mean 'midpoint'"):
        flows.rollout(None, v, x, table, method="midpont")
    with pytest.raises(ValueError, match="reduction='avg'"):
        flows.rollout(None, v, x, table, reduction="avg")
    with pytest.raises(TypeError, match="sampler state is bfloat16"):
        flows.rollout(None, v, x.astype(jnp.bfloat16), table)
    with pytest.raises(ValueError, match="give keys"):
        flows.rollout(None, v, x, noisy)
    with pytest.raises(ValueError, match="rows without noise"):
        flows.rollout(keys, v, x, noisy, method="heun")
    with pytest.raises(ValueError, match="leading axis must be the batch, 2"):
        flows.rollout(prng.sample_keys(jax.random.key(0), 3), v, x, noisy)
    with pytest.raises(TypeError, match="typed key"):
        flows.rollout(jnp.zeros((2, 2), jnp.uint32), v, x, noisy)
    with pytest.raises(ValueError, match=r"unknown sampler preset 'oed'.*'ode'"):
        flows.make_table("oed", flows.uniform_grid(3))
    with pytest.raises(ValueError, match=r"final='x0hat'.*'x0_hat'"):
        flows.make_table("ode", flows.uniform_grid(3), final="x0hat")
    with pytest.raises(ValueError, match="consecutive steps"):
        table[::2]
    with pytest.raises(ValueError, match="consecutive steps"):
        table[3:]
    with pytest.raises(TypeError, match="store sampler states in float32"):
        flows.gaussian_log_prob(x.astype(jnp.bfloat16), x, 1.0)
    with pytest.raises(ValueError, match=r"velocity has shape \(2, 1\).*\(2, 2\)"):
        flows.rollout(None, lambda x, t, c: x[:, :1], x, table)
    with pytest.raises(ValueError, match=r"t has 1 value.*outside \[0, 1\]"):
        flows.interpolate(x, x, jnp.array([0.5, 1.5]))
    with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
        flows.convert(x, "velocity", "data", x, jnp.array([-0.5, 1.0]))
    with pytest.raises(ValueError, match="method='rk5'"):
        flows.nfe(table, "rk5")
