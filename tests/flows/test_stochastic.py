"""The invariants of the stochastic sampler, numbered as in its sheet.

15, that devices do not matter, stands in tests/train/test_sharding.py.
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from checks import same

from tmdjax import flows
from tmdjax.core import conventions, prng

MEAN, STD = 1.5, 0.5
STOCHASTIC = ("flow_grpo", "dance_grpo", "flow_cps")


def exact_velocity(x, t, cond=None):
    """Of data N(MEAN, STD^2): the regression of noise - data on the state."""
    t = t.reshape(t.shape + (1,) * (x.ndim - 1))
    variance = (1 - t) ** 2 * STD**2 + t**2
    slope = (t - (1 - t) * STD**2) / variance
    return -MEAN + slope * (x - (1 - t) * MEAN)


def sigma_of(preset, t, t_next, strength):
    if preset == "dance_grpo":
        return strength
    return strength * np.sqrt(t / (1 - (t_next if t == 1 else t)))


# one program for a table's static part, a velocity and a shape
walk = jax.jit(
    flows.rollout, static_argnums=1, static_argnames=("reduction", "store", "method")
)
rescored = jax.jit(
    flows.rescore,
    static_argnums=0,
    static_argnames=("steps", "reduction", "micro_batch", "reference", "kl_kind"),
)


def draw(table, batch=6, dim=3, velocity=exact_velocity, cond=None, **options):
    x = np.random.default_rng(0).normal(size=(batch, dim)).astype(np.float32)
    keys = prng.sample_keys(jax.random.key(1), batch)
    return walk(keys, velocity, x, table, cond, **options)


def table_of(preset, steps, **options):
    return flows.make_table(preset, flows.uniform_grid(steps), **options)


def check_mean(found, expected):
    """The mean of drawn log-probs, within four standard errors."""
    found = np.asarray(found)
    assert abs(found.mean() - expected) < 4 * found.std() / np.sqrt(len(found))


@pytest.mark.parametrize("preset", STOCHASTIC)
def test_1_zero_strength_is_the_ode_to_the_last_bit(preset):
    grid = flows.shifted_grid(7, 3.0)
    quiet = draw(flows.make_table(preset, grid, strength=0.0, final="sample"))
    ode = draw(flows.make_table("ode", grid))
    np.testing.assert_array_equal(quiet.states, ode.states)
    assert not quiet.mask.any()
    np.testing.assert_array_equal(quiet.log_prob, 0)


@pytest.mark.parametrize("preset, strength", [("flow_grpo", 0.7), ("dance_grpo", 0.3)])
def test_2_two_number_form_is_euler_maruyama(x64, preset, strength):
    grid = flows.uniform_grid(9)
    table = flows.make_table(preset, grid, strength=strength)
    x, v, z = np.random.default_rng(0).normal(size=(3, 20, 4))

    @jax.jit
    def step(i, x, v, z):
        rows = table.rows(i, x.dtype)
        mean, _ = flows.transition_mean(rows, x, v)
        return flows.gaussian_transition(mean, rows["S"], z)

    for i in range(8):
        t, t_next = grid[i], grid[i + 1]
        h, sigma = t - t_next, sigma_of(preset, t, t_next, strength)
        score = -(x + (1 - t) * v) / t
        direct = x - h * v + h * sigma**2 / 2 * score + sigma * np.sqrt(h) * z
        for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-6)):
            ours = step(i, x.astype(dtype), v.astype(dtype), z.astype(dtype))
            assert ours.dtype == dtype
            scale = max(np.abs(direct).max(), 1)
            assert np.abs(ours - direct).max() <= tolerance * scale
        weight = -h * (1 + sigma**2 * (1 - t) / (2 * t))
        np.testing.assert_allclose(table.velocity_weight[i], weight, rtol=1e-12)


@pytest.mark.parametrize("a", [0.3, 0.7, 1.2])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_3_flow_grpo_gain_does_not_depend_on_the_grid(a, shift):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = flows.make_table("flow_grpo", flows.shifted_grid(8, shift), strength=a)
    kappa = -table.velocity_weight / table.h
    np.testing.assert_allclose(kappa[1:], 1 + a**2 / 2, rtol=1e-12)
    np.testing.assert_allclose(kappa[0], 1, rtol=1e-12)
    np.testing.assert_allclose(table.S[0], a, rtol=1e-12)


def test_4_coefficients_preserving_sampling_keeps_the_noise_power():
    table = flows.make_table("flow_cps", flows.shifted_grid(8, 3.0))
    np.testing.assert_allclose(table.k**2 + table.S**2, table.t_next**2, atol=1e-15)
    np.testing.assert_allclose(flows.noise_excess(table)[:-1], 1)
    assert not table.mask[-1]  # its last step has no noise


def test_renoised_states_are_the_estimate_and_new_noise():
    """A posterior that is a point, -2: each state is on its path to the noise drawn."""
    grid = np.array([0.999, 0.7, 0.2, 0.0])
    noise = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    table = flows.make_table("renoise", grid)
    walk = functools.partial(
        flows.rollout,
        None,
        lambda x, t, c: (x + 2) / t[:, None],
        jnp.asarray(noise[0]),
        table,
    )
    states = np.asarray(walk(noise=jnp.asarray(noise)).states)
    for state, t, z in zip(states[1:], grid[1:], noise):
        np.testing.assert_allclose(state, t * z - 2 * (1 - t), atol=1e-5)
    np.testing.assert_allclose(flows.noise_excess(table)[:-1], 1)
    assert table.mask.tolist() == [True, True, False]


def test_noise_of_another_shape_is_refused_where_no_row_adds_any(refused):
    table = flows.make_table("renoise", np.array([1.0, 0.0]))
    assert not table.stochastic
    given = (None, lambda x, t, c: x, np.ones((5, 4), np.float32), table)
    walk = functools.partial(flows.rollout, *given)
    refused("give one a step, .1, 5, 4", walk, noise=jnp.ones((2, 5, 4)))


def test_noise_excess_of_the_published_grid():
    times = flows.shift_time(np.linspace(1, 3e-3, 10), 3)
    with pytest.warns(UserWarning, match=r"steps \[8\] remove more noise"):
        table = flows.make_table("flow_grpo", flows.custom_grid(np.append(times, 0)))
    excess = flows.noise_excess(table)
    published = [1.04, 1.06, 1.03, 1.02, 1.03, 1.04, 1.07, 1.23]
    np.testing.assert_allclose(excess[:8], published, atol=0.006)
    assert excess[8] == pytest.approx(27, rel=0.02) and np.isnan(excess[9])


def chain_std(table):
    """Mean and standard deviation of the end, by the scalar recursion."""
    mean, variance = 0.0, 1.0
    for i, t in enumerate(table.t):
        spread = (1 - t) ** 2 * STD**2 + t**2
        slope = (t - (1 - t) * STD**2) / spread
        offset = -MEAN - slope * (1 - t) * MEAN
        if i == len(table) - 1 and table.final == "x0_hat":
            end = mean - t * (slope * mean + offset)
            return end, np.sqrt(variance) * abs(1 - t * slope)
        b = table.velocity_weight[i]
        a = (1 - table.t_next[i]) + table.k[i]
        mean = (a + b * slope) * mean + b * offset
        variance = (a + b * slope) ** 2 * variance + table.S[i] ** 2
    return mean, np.sqrt(variance)


PARAMS = {
    name: scale * np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    for name, seed, scale, shape in (("w", 5, 1, (3, 16)), ("u", 6, 0.25, (16, 3)))
}


def network(params, x, t, cond=None):
    return jnp.tanh(x @ params["w"] + t[:, None]) @ params["u"]


@pytest.mark.filterwarnings("ignore:steps")
@pytest.mark.parametrize("preset", ("ode", *STOCHASTIC))
def test_5_the_chain_on_gaussian_data(x64, preset):
    errors = {}
    for n in (20, 40, 80, 160, 320, 640):
        mean, std = chain_std(flows.make_table(preset, flows.uniform_grid(n)))
        assert mean == pytest.approx(MEAN, abs=1e-9)
        errors[n] = std - STD
    measured = {
        "ode": [-0.0358, -0.0182, -0.0092, -0.0046, -0.0023, -0.0012],
        "dance_grpo": [-0.0306, -0.0155, -0.0078, -0.0039, -0.0020, -0.0010],
        "flow_grpo": [-0.0086, -0.0026, -0.0000, 0.0009, 0.0011, 0.0010],
        "flow_cps": [-0.106, -0.093, -0.085, -0.080, -0.078, -0.076],
    }[preset]
    tolerance = 6e-4 if preset == "flow_cps" else 6e-5
    np.testing.assert_allclose(list(errors.values()), measured, atol=tolerance)
    if preset in ("ode", "dance_grpo"):
        assert 1.9 <= errors[40] / errors[80] <= 2.05
    elif preset == "flow_grpo":
        assert max(map(abs, errors.values())) < 0.01
    else:
        assert max(errors.values()) < -0.07

    # the sampler itself, probed as an affine map of its start and of each noise
    steps = 8
    table = flows.make_table(preset, flows.uniform_grid(steps))
    keys = prng.sample_keys(jax.random.key(2), 1)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, 0))
    def end(x, c):
        start = jnp.full((1, 1), x, jnp.float64)
        scaled = table.replace(c=c)
        return flows.rollout(keys, exact_velocity, start, scaled, store=False)[0, 0]

    noise = jax.jit(lambda i: prng.normal(prng.fold_in(keys, i), (1,), jnp.float64))
    starts = np.array([0.0, 1.0] + [0.0] * steps)
    ends = np.asarray(end(starts, np.append(np.zeros((2, steps)), np.eye(steps), 0)))
    offset, gains = ends[0], ends[1:] - ends[0]
    if table.stochastic:
        gains[1:] /= [noise(i).item() for i in range(steps)]
    mean, std = chain_std(table)
    assert offset == pytest.approx(mean, abs=1e-6)
    assert np.linalg.norm(gains) == pytest.approx(std, abs=1e-6)


def test_6_score_from_the_velocity_is_the_analytic_one(x64):
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(20, 1)), rng.uniform(0.05, 1, 20)
    score = jax.jit(
        lambda x, t: flows.convert(exact_velocity(x, t), "velocity", "score", x, t)
    )(x, t)
    for i in range(20):
        law = scipy.stats.norm((1 - t[i]) * MEAN, np.hypot((1 - t[i]) * STD, t[i]))
        slope = (law.logpdf(x[i] + 1e-5) - law.logpdf(x[i] - 1e-5)) / 2e-5
        np.testing.assert_allclose(score[i], slope, rtol=1e-5)


NETWORK = functools.partial(network, PARAMS)


@pytest.mark.parametrize(
    "preset, reduction",
    [*((preset, "mean") for preset in STOCHASTIC), ("flow_cps", "sum")],
)
def test_7_the_first_ratio_is_one(preset, reduction):
    table = table_of(preset, 6)
    # of an event of 24: a processor's rounding of one number is no ratio
    wide = {"w": np.tile(PARAMS["w"], (8, 1)) / 3, "u": np.tile(PARAMS["u"], (1, 8))}
    velocity = functools.partial(network, wide)
    sample = draw(table, 8, dim=24, velocity=velocity, reduction=reduction)
    again = flows.rescore(velocity, sample, table, reduction=reduction, micro_batch=4)
    drawn = np.asarray(sample.log_prob)[np.flatnonzero(table.mask)]
    assert again.log_prob.shape == drawn.shape
    tolerance = 1e-6 if reduction == "mean" else 24e-6
    np.testing.assert_allclose(again.log_prob, drawn, atol=tolerance, rtol=0)


@pytest.mark.parametrize("preset", STOCHASTIC)
def test_8_gradients(x64, preset):
    """To the velocity; the states of a record are held constant."""
    table = table_of(preset, 5)
    x, v, x_next = map(jnp.asarray, np.random.default_rng(1).normal(size=(3, 4, 3)))

    @jax.jit
    def log_prob(v, x, x_next):
        rows = table.rows(jnp.arange(4), v.dtype)
        score = flows.score_transitions(lambda x, *_: v - x, x, x_next, rows)
        return score.log_prob.sum(), flows.transition_mean(rows, x, v - x)[0]

    gradient = jax.jit(jax.grad(log_prob, (0, 1, 2), has_aux=True))
    (found, *of_states), mean = gradient(v, x, x_next)
    np.testing.assert_array_equal(of_states, 0)
    weight = (table.velocity_weight[:4] / table.S[:4] ** 2)[:, None]
    np.testing.assert_allclose(found, (x_next - mean) * weight / 3, rtol=1e-9)
    for entry in np.ndindex(4, 3):
        bump = np.zeros((4, 3))
        bump[entry] = 1e-6
        up, down = (log_prob(v + sign * bump, x, x_next)[0] for sign in (1, -1))
        np.testing.assert_allclose(
            found[entry], (up - down) / 2e-6, rtol=1e-5, atol=1e-8
        )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_9_kl_to_a_reference(reduction):
    table, rng = table_of("flow_grpo", 5), np.random.default_rng(2)
    x, v, other = rng.normal(size=(3, 1, 2)).astype(np.float32)
    z = rng.normal(size=(100_000, 2)).astype(np.float32)

    @jax.jit
    def terms(x, v, other):
        rows = table.rows(jnp.full(1, 2), jnp.float32)
        kl = [
            flows.transition_kl(v, other, rows, reduction=reduction, kind=kind)[0]
            for kind in ("transition", "flow_grpo_code", "velocity_mse")
        ]
        means = [flows.transition_mean(rows, x, used)[0] for used in (v, other)]
        scores = flows.score_transitions(
            lambda *_: v, x, x, rows, reference=lambda *_: other, reduction=reduction
        )
        return kl, means, scores.kl[0]

    found = jax.tree.map(np.asarray, terms(x, v, other))
    (kl, of_code, of_velocity), means, scored = found
    share, std = 2 if reduction == "mean" else 1, table.log_prob_std[2]
    drawn = means[0] + std * z
    p, q = (scipy.stats.norm(m, std).logpdf(drawn).sum(1) / share for m in means)
    assert abs(kl - (p - q).mean()) < 3 * (p - q).std() / np.sqrt(len(p))
    np.testing.assert_allclose(of_code, table.h[2] * kl, rtol=1e-6)
    np.testing.assert_allclose(of_velocity, np.sum((v - other) ** 2) / share, rtol=1e-6)
    np.testing.assert_allclose(scored, kl, rtol=1e-6)


@pytest.mark.parametrize("preset", STOCHASTIC)
def test_10_expected_log_prob_of_the_policy_itself(preset):
    table = table_of(preset, 4)
    sample = draw(table, 20_000, 2)
    for i in np.flatnonzero(table.mask):
        expected = -0.5 - np.log(table.S[i]) - 0.5 * np.log(2 * np.pi)
        check_mean(sample.log_prob[i], expected)


def test_11_the_time_bridge_is_its_own_inverse():
    twice = conventions.flip_velocity(conventions.flip_velocity(NETWORK))
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    t = np.linspace(0.125, 1, 5, dtype=np.float32)
    found, expected = jax.jit(lambda *given: (twice(*given), NETWORK(*given)))(x, t)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_12_mean_ratio_is_the_root_of_the_joint_ratio(x64):
    table = table_of("dance_grpo", 4)
    sample = draw(table, velocity=NETWORK)
    trained = tuple(np.flatnonzero(table.mask))

    def other(x, t, cond=None):
        return 1.001 * NETWORK(x, t)

    def ratio(reduction):
        options = {"reduction": reduction, "steps": trained}
        new, old = (
            np.float64(rescored(velocity, sample, table, **options).log_prob)
            for velocity in (other, NETWORK)
        )
        return np.exp(new - old)

    np.testing.assert_allclose(ratio("mean"), ratio("sum") ** (1 / 3), rtol=1e-5)


def test_14_shared_noise_and_a_window():
    window = flows.window(8, 3, 2)
    table = table_of("flow_grpo", 8, window=window)
    assert list(np.flatnonzero(table.mask)) == [3, 4]
    np.testing.assert_array_equal(table.k[~window], table.t_next[~window])
    keys = prng.sample_keys(jax.random.key(1), 5)
    x = np.tile(np.random.default_rng(0).normal(size=(1, 3)).astype(np.float32), (5, 1))
    sample = jax.tree.map(np.asarray, walk(keys, exact_velocity, x, table))
    before, after = sample.states[:4], sample.states[4:]
    assert np.all(before == before[:, :1])
    assert not np.any(np.all(after == after[:, :1], axis=(1, 2)))
    np.testing.assert_array_equal(sample.log_prob[~window], 0)


def test_split_scale_is_scored_as_asked():
    c = np.array([4.0, 1, 1, 1])
    proposal = table_of("dance_grpo", 4, c=c)
    policy = table_of("dance_grpo", 4, c=c, split_log_prob="policy")
    np.testing.assert_allclose(proposal.log_prob_std, c * policy.log_prob_std)
    np.testing.assert_allclose(policy.log_prob_std, policy.S)
    drawn = [draw(table, 20_000, 2) for table in (proposal, policy)]
    np.testing.assert_array_equal(drawn[0].states, drawn[1].states)
    for sample, c_in, std in zip(drawn, (1, 4), (4 * proposal.S[0], policy.S[0])):
        expected = -(c_in**2) / 2 - np.log(std) - 0.5 * np.log(2 * np.pi)
        check_mean(sample.log_prob[0], expected)


def test_rescore_takes_chosen_steps_and_one_compilation(count_compiles):
    table = table_of("flow_grpo", 6)
    sample, cond = draw(table, velocity=NETWORK), jnp.arange(6.0)

    def conditioned(x, t, cond):
        return NETWORK(x, t) + 0 * cond[:, None]

    options = {"steps": (1, 4), "micro_batch": 3}
    found = rescored(conditioned, sample, table, cond, **options).log_prob
    np.testing.assert_allclose(found, np.asarray(sample.log_prob)[[1, 4]], atol=2e-6)
    other = flows.make_table("flow_grpo", flows.shifted_grid(6, 1.5))
    with count_compiles() as compiled:
        rescored(conditioned, sample, other, cond, **options)
    assert not compiled


def test_microbatched_gradient_is_the_whole_one():
    table = table_of("flow_grpo", 4)
    sample = draw(table, velocity=NETWORK)

    def loss(params, micro_batch):
        options = {"micro_batch": micro_batch, "reference": NETWORK}
        velocity = functools.partial(network, params)
        scores = flows.rescore(velocity, sample, table, **options)
        return jnp.sum(scores.log_prob + scores.kl)

    params = jax.tree.map(lambda x: 1.01 * x, PARAMS)
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    whole, parts = (gradient(params, n) for n in (None, 6))
    same(parts, whole, rtol=1e-4, atol=1e-5)


def test_guided_rollouts_are_scored_under_their_own_guidance(refused):
    table = table_of("dance_grpo", 3)
    cond = np.ones((4, 3), np.float32)

    def network(x, t, cond):
        return x * cond

    guided = flows.classifier_free_guidance(network, 3.0, np.zeros(3))
    frozen = flows.classifier_free_guidance(network, 3.0, np.zeros(3), freeze_null=True)
    assert flows.guidance_scale(frozen) == 3.0
    sample = draw(table, 4, velocity=guided, cond=cond)
    assert sample.guidance == 3.0
    found = rescored(frozen, sample, table, cond, steps=(0, 1)).log_prob
    np.testing.assert_allclose(found, np.asarray(sample.log_prob)[:2], atol=1e-6)
    other = flows.classifier_free_guidance(network, 2.0, np.zeros(3))
    words = r"guidance scale 3.0, the velocity has 2.0"
    refused(words, flows.rescore, other, sample, table, cond)
    hidden = lambda x, t, cond: guided(x, t, cond)  # noqa: E731
    with pytest.warns(UserWarning, match=r"scale 3.0, the velocity has None"):
        unseen = rescored(hidden, sample, table, cond, steps=(0, 1)).log_prob
    np.testing.assert_array_equal(unseen, found)
    known = sample.replace(guidance=None)  # a warning would be an error
    rescored(hidden, known, table, cond, steps=(0, 1))


def test_a_frozen_null_branch_gets_no_gradient():
    def network(w, x, t, cond):
        return w * x * cond

    def total(w, freeze):
        velocity = flows.classifier_free_guidance(
            functools.partial(network, w), 2.0, np.float32(0.5), freeze_null=freeze
        )
        return jnp.sum(velocity(jnp.ones((2, 1)), jnp.ones(2), jnp.ones((2, 1))))

    # v = n + 2 (c - n) = 2 c - n with c = w, n = w / 2, in two samples
    gradient = jax.jit(jax.grad(total), static_argnums=1)
    assert gradient(1.0, False) == pytest.approx(3.0)
    assert gradient(1.0, True) == pytest.approx(4.0)


def test_step_weights_even_out_the_gain():
    table = table_of("flow_grpo", 6, final="mean")
    np.testing.assert_array_equal(flows.step_weights(table), table.mask)
    weights = flows.step_weights(table, "inverse_gain")
    evened = weights * np.abs(table.velocity_weight) / table.S
    assert weights[-1] == 0 and weights[:-1].mean() == pytest.approx(1)
    np.testing.assert_allclose(evened[:-1], evened[0], rtol=1e-5)


def test_window_schedules():
    start = functools.partial(flows.window_start, high=10, size=4)
    assert [start(i, iterations=2) for i in range(16)] == [
        0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 0, 0,
    ]  # fmt: skip
    assert [start(i, iterations=1, stride=4) for i in range(5)] == [0, 4, 6, 0, 4]
    assert start(10**6, iterations=1, at_end="stay") == 6
    assert start(17, schedule="fixed", low=2) == 2
    drawn = [start(i, schedule="random", low=1) for i in range(300)]
    assert set(drawn) == {1, 2, 3, 4, 5, 6}
    assert drawn == [start(i, schedule="random", low=1) for i in range(300)]
    decay = [start(i, schedule="decay", iterations=10) for i in range(38)]
    counts = [decay.count(p) for p in range(7)]
    assert counts == [10, 8, 7, 6, 4, 2, 1]
    late = functools.partial(
        flows.window_start, high=20, size=2, schedule="exp_decay", iterations=8
    )
    spent = [late(i) for i in range(14 * 8)]
    assert spent.count(13) == 8
    assert late(14 * 8 + 8) == 15  # ceil(8 exp(-0.1)) = 8 iterations at 14
    assert list(flows.periodic_windows(7, 3, 2)) == [1, 1, 0, 1, 1, 0, 1]


def test_bad_inputs(refused):
    even = flows.uniform_grid(4)

    def table_refused(words, preset, grid=even, **options):
        refused(words, flows.make_table, preset, grid, **options)

    noisy = flows.custom_grid([0.9999, 0.5, 0])
    table_refused(r"starts at 0.9999.*nearly singular", "flow_grpo", noisy)
    flows.make_table("flow_grpo", noisy, strength=0.0)
    flows.make_table("dance_grpo", noisy)
    table_refused(r"strength=1.5 is outside \[0, 1\]", "flow_cps", strength=1.5)
    table_refused("strength=-1", "dance_grpo", strength=-1.0)
    table_refused("one bool a step", "flow_grpo", window=np.ones(3, bool))
    table_refused("one bool a step", "flow_grpo", window=np.ones(4))
    table_refused(r"c .*=-1.0 is outside", "flow_grpo", c=-1.0)
    table_refused("Did you mean 'policy'", "flow_grpo", split_log_prob="polcy")
    refused(r"start=3 is outside \[0, 2\]", flows.window, 4, 3, 2)
    refused(r"low=0 is outside \[0, -1\]", flows.window_start, 0, high=3, size=4)

    table = table_of("dance_grpo", 4)
    sample = draw(table)
    score = functools.partial(flows.rescore, exact_velocity, sample)
    refused("step 3 is deterministic", score, table, steps=[0, 3])
    refused("nothing has a log-prob", score, table_of("ode", 4))
    refused("step 4 is not in a table of 4", score, table, steps=[4])
    refused("leading axis must be the batch, 3", score, table[:2])
    words = "does not divide 3 steps x 6 samples = 18"
    refused(words, score, table, micro_batch=4)
    refused("Did you mean 'transition'", score, table, kl_kind="transitions")
    refused("say which steps", jax.jit(score), table)
    rounded = sample.replace(states=sample.states.astype(jnp.bfloat16))
    words, given = "Store sampler states in float32", (exact_velocity, rounded, table)
    refused(words, flows.rescore, *given, error=TypeError)
