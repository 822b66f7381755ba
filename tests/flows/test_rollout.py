import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from scipy.integrate import solve_ivp

from tmdjax import flows
from tmdjax.core import prng

MIXTURE = flows.gaussian_mixture([0.4, 0.6], [[-1.0, 0.5], [1.2, -0.3]], [0.5, 0.8])


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
def test_measured_order(x64, method, order):
    x = jax.random.normal(jax.random.key(0), (16, 2), jnp.float64)

    def solve(n):
        table = flows.make_table("ode", flows.uniform_grid(n))
        return flows.rollout(
            None, MIXTURE.velocity, x, table, method=method, store=False
        )

    truth = (
        solve_ivp(
            lambda s, y: (
                -np.asarray(
                    MIXTURE.velocity(jnp.asarray(y.reshape(16, 2)), jnp.full(16, 1 - s))
                ).ravel()
            ),
            (0, 1),
            np.asarray(x).ravel(),
            rtol=1e-12,
            atol=1e-12,
        )
        .y[:, -1]
        .reshape(16, 2)
    )
    steps = {1: (160, 320), 2: (80, 160), 4: (40, 80)}[order]
    coarse, fine = (np.sqrt(np.mean((solve(n) - truth) ** 2)) for n in steps)
    assert abs(np.log2(coarse / fine) - order) < 0.15


def test_ode_row_is_an_euler_step():
    x = jax.random.normal(jax.random.key(0), (8, 2))
    grid = flows.shifted_grid(6, 3.0)
    trajectory = flows.rollout(None, MIXTURE.velocity, x, flows.make_table("ode", grid))
    for i in range(6):
        here = trajectory.states[i]
        t = jnp.full(8, grid[i], jnp.float32)
        euler = here - (grid[i] - grid[i + 1]) * MIXTURE.velocity(here, t)
        np.testing.assert_allclose(trajectory.states[i + 1], euler, atol=1e-6)


def test_zero_noise_equals_the_ode_bit_for_bit():
    x = jax.random.normal(jax.random.key(0), (8, 2))
    ode = flows.make_table("ode", flows.uniform_grid(5))
    zero = ode.replace(stochastic=True)  # the noisy code path with S = 0
    keys = prng.sample_keys(jax.random.key(1), 8)
    a = flows.rollout(None, MIXTURE.velocity, x, ode)
    b = flows.rollout(keys, MIXTURE.velocity, x, zero)
    np.testing.assert_array_equal(a.states, b.states)
    assert not b.mask.any() and np.all(b.log_prob == 0)


def test_log_prob_is_scipys():
    x = jax.random.normal(jax.random.key(0), (8, 2))
    table = noisy_table(4, 0.3)
    keys = prng.sample_keys(jax.random.key(1), 8)
    plain = flows.make_table("ode", flows.uniform_grid(4))
    for reduction, reduce in (("sum", np.sum), ("mean", np.mean)):
        trajectory = flows.rollout(
            keys, MIXTURE.velocity, x, table, reduction=reduction
        )
        for i in range(4):
            mean = flows.rollout(
                None,
                MIXTURE.velocity,
                trajectory.states[i],
                plain[i : i + 1],
                store=False,
            )
            truth = scipy.stats.norm(mean, 0.3).logpdf(trajectory.states[i + 1])
            np.testing.assert_allclose(
                trajectory.log_prob[i], reduce(truth, axis=1), rtol=2e-4, atol=2e-5
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
    trajectory = flows.rollout(
        keys, lambda x, t, c: jnp.zeros_like(x), jnp.zeros((4000, 1)), table
    )
    drawn = np.asarray(trajectory.states[1])[:, 0]
    assert abs(drawn.std() - 1.0) < 0.04
    np.testing.assert_allclose(
        trajectory.log_prob[0], scipy.stats.norm(0, 1).logpdf(drawn), atol=1e-5
    )


def test_noise_does_not_depend_on_the_batch():
    x = jax.random.normal(jax.random.key(0), (8, 2))
    table = noisy_table(3, 0.2)
    whole = flows.rollout(
        prng.sample_keys(jax.random.key(1), 8), MIXTURE.velocity, x, table, store=False
    )
    half = flows.rollout(
        prng.sample_keys(jax.random.key(1), 4, start=4),
        MIXTURE.velocity,
        x[4:],
        table,
        store=False,
    )
    np.testing.assert_allclose(whole[4:], half, atol=1e-5)


def test_slices_compose():
    x = jax.random.normal(jax.random.key(0), (4, 2))
    keys = prng.sample_keys(jax.random.key(1), 4)
    table = noisy_table(6, 0.2)
    whole = flows.rollout(keys, MIXTURE.velocity, x, table)
    first = flows.rollout(keys, MIXTURE.velocity, x, table[:2])
    second = flows.rollout(keys, MIXTURE.velocity, first.states[-1], table[2:])
    np.testing.assert_allclose(whole.states[-1], second.states[-1], atol=1e-6)
    np.testing.assert_allclose(
        whole.log_prob, jnp.concatenate([first.log_prob, second.log_prob]), atol=1e-5
    )


@pytest.mark.parametrize("rule", flows.FINAL_RULES)
def test_final_rule(rule):
    table = flows.make_table("ode", flows.uniform_grid(3), final=rule)
    noise = np.full(3, 0.4)
    table = table.replace(S=noise, log_prob_std=noise, stochastic=True)
    keys = prng.sample_keys(jax.random.key(0), 5)
    x = jax.random.normal(jax.random.key(1), (5, 2))
    trajectory = flows.rollout(keys, MIXTURE.velocity, x, table)
    last = trajectory.states[-1]
    # The ODE's last step ends in x0_hat, so only the noise tells the rules apart.
    noisy = not np.allclose(last, trajectory.x0_hat, atol=1e-5)
    assert noisy == (rule == "sample")
    np.testing.assert_array_equal(
        last, flows.rollout(keys, MIXTURE.velocity, x, table, store=False)
    )
    if rule != "sample":
        assert table[:2].final == "sample"  # the rule belongs to the last step
        assert table[1:].final == rule


def test_final_rule_masks_the_last_transition():
    flows.PRESETS._entries["constant_noise"] = lambda t, t_next: {"k": t_next, "S": 0.1}
    try:
        table = flows.make_table("constant_noise", flows.uniform_grid(3), final="mean")
    finally:
        del flows.PRESETS._entries["constant_noise"]
    assert table.stochastic and list(table.mask) == [True, True, False]


def test_no_noise_drawn_means_no_log_prob():
    flows.PRESETS._entries["constant_noise"] = lambda t, t_next: {"k": t_next, "S": 0.1}
    try:
        table = flows.make_table(
            "constant_noise", flows.uniform_grid(3), c=np.array([1.0, 0.0, 1.0])
        )
    finally:
        del flows.PRESETS._entries["constant_noise"]
    assert list(table.mask) == [True, False, True]
    keys = prng.sample_keys(jax.random.key(0), 2)
    trajectory = flows.rollout(keys, MIXTURE.velocity, jnp.ones((2, 2)), table)
    assert np.isfinite(trajectory.log_prob).all()


def test_slices_of_a_traced_table():
    keys = prng.sample_keys(jax.random.key(0), 2)
    x, table = jnp.ones((2, 2)), noisy_table(6, 0.2)

    @jax.jit
    def second_half(table):
        return flows.rollout(keys, MIXTURE.velocity, x, table[3:], store=False)

    direct = flows.rollout(keys, MIXTURE.velocity, x, table[3:], store=False)
    np.testing.assert_allclose(second_half(table), direct, atol=1e-6)


def test_reward_gradient_moves_by_its_column():
    table = flows.make_table("ode", flows.uniform_grid(4))
    table = table.replace(C=np.array([0.1, 0.2, 0.3, 0.4]))
    x = jnp.zeros((2, 1))
    end = flows.rollout(
        None,
        lambda x, t, c: jnp.zeros_like(x),
        x,
        table,
        g=lambda x, t, c: jnp.ones_like(x),
        store=False,
    )
    np.testing.assert_allclose(end, 1.0, rtol=1e-6)


def test_conditions_reach_the_velocity():
    table = flows.make_table("ode", flows.uniform_grid(2))
    end = flows.rollout(
        None,
        lambda x, t, cond: jnp.broadcast_to(cond[:, None], x.shape),
        jnp.zeros((3, 2)),
        table,
        cond=jnp.array([1.0, 2.0, 3.0]),
        store=False,
    )
    np.testing.assert_allclose(end[:, 0], [-1, -2, -3], rtol=1e-6)


@pytest.mark.parametrize("method", flows.METHODS)
def test_evaluations_are_counted_and_stay_in_the_unit_interval(method):
    table = flows.make_table("ode", flows.shifted_grid(7, 5.0))
    seen = []

    def velocity(x, t, cond):
        jax.debug.callback(lambda t: seen.append(float(t[0])), t)
        return x

    flows.rollout(None, velocity, jnp.ones((1, 1)), table, method=method, store=False)
    jax.effects_barrier()
    assert len(seen) == flows.nfe(table, method)
    assert min(seen) >= 0 and max(seen) == 1


def test_gradient_through_a_rollout(x64):
    table = flows.make_table("ode", flows.uniform_grid(5))
    x = jax.random.normal(jax.random.key(0), (1, 2), jnp.float64)

    def objective(x):
        return jnp.sum(
            flows.rollout(None, MIXTURE.velocity, x, table, method="rk4", store=False)
            ** 2
        )

    gradient = jax.grad(objective)(x)
    for i in range(2):
        eps = np.zeros((1, 2))
        eps[0, i] = 1e-6
        difference = (objective(x + eps) - objective(x - eps)) / 2e-6
        np.testing.assert_allclose(gradient[0, i], difference, rtol=1e-6)


def test_one_compilation_for_all_grids_of_one_length(count_compiles):
    x = jnp.ones((2, 2))
    sample = jax.jit(
        lambda x, table: flows.rollout(None, MIXTURE.velocity, x, table, store=False)
    )
    sample(x, flows.make_table("ode", flows.uniform_grid(4)))
    with count_compiles() as compiled:
        sample(x, flows.make_table("ode", flows.shifted_grid(4, 3.0)))
    assert not compiled


def test_float64_follows_x(x64):
    table = flows.make_table("ode", flows.uniform_grid(3))
    x = jnp.ones((2, 2), jnp.float64)
    assert flows.rollout(None, MIXTURE.velocity, x, table).states.dtype == jnp.float64
    x = jnp.ones((2, 2), jnp.float32)
    assert flows.rollout(None, MIXTURE.velocity, x, table).states.dtype == jnp.float32


def test_transition_density_gradient_and_expectation():
    mean, std = jnp.array([[0.3, -0.2, 1.0]]), 0.7
    z = jax.random.normal(jax.random.key(0), (100_000, 3))
    x = flows.gaussian_transition(jnp.broadcast_to(mean, z.shape), std, z)
    log_prob = flows.gaussian_log_prob(x, jnp.broadcast_to(mean, z.shape), std)
    expected = -0.5 - np.log(std) - 0.5 * np.log(2 * np.pi)
    error = float(log_prob.std()) / np.sqrt(len(log_prob))
    assert abs(float(log_prob.mean()) - expected) < 4 * error
    gradient = jax.grad(lambda m: flows.gaussian_log_prob(x[:1], m, std, "sum")[0])(
        mean
    )
    eps = 1e-2
    for i in range(3):
        shift = jnp.zeros((1, 3)).at[0, i].set(eps)
        up = scipy.stats.norm(mean + shift, std).logpdf(x[:1]).sum()
        down = scipy.stats.norm(mean - shift, std).logpdf(x[:1]).sum()
        np.testing.assert_allclose(gradient[0, i], (up - down) / (2 * eps), rtol=1e-3)


def test_per_sample_std():
    x, mean = jnp.ones((3, 2)), jnp.zeros((3, 2))
    std = jnp.array([0.5, 1.0, 2.0])
    got = flows.gaussian_log_prob(x, mean, std, "sum")
    truth = scipy.stats.norm(0, np.asarray(std)[:, None]).logpdf(np.ones((3, 2))).sum(1)
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
