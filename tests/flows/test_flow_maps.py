"""Flow maps: the MeanFlow identity, its derivative, its loss (TMD sheet, section 6)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from tmdjax import flows
from tmdjax.core import prng

MU, S = 0.7, 0.5


def std(s):
    return jnp.sqrt((1 - s) ** 2 * S**2 + s**2)


def velocity(y, s):
    """Of the path between N(MU, S^2) and N(0, 1), in closed form."""
    slope = (s - (1 - s) * S**2) / std(s) ** 2
    return -MU + slope * (y - (1 - s) * MU)


def average(y, s, r):
    """Of the exact map, which keeps the number of standard deviations; v at r = s."""
    end = (1 - r) * MU + std(r) / std(s) * (y - (1 - s) * MU)
    gap = jnp.where(s > r, s - r, 1.0)
    return jnp.where(s > r, (y - end) / gap, velocity(y, s))


@pytest.fixture
def states(x64):
    keys = jax.random.split(jax.random.key(0), 3)
    y = jax.random.uniform(keys[0], (200,), jnp.float64, -1.5, 1.5)
    s = jax.random.uniform(keys[1], (200,), jnp.float64, 0.4, 0.9)
    r = s * jax.random.uniform(keys[2], (200,), jnp.float64, 0.0, 0.9)
    return y, s, r


@pytest.mark.parametrize(
    "options, tolerance", [({}, 1e-6), ({"derivative": "difference"}, 1e-4)]
)
def test_4_identity_holds_for_the_exact_map(states, options, tolerance):
    """With f = y + (s - r) u the map's u is the negative one, which has no identity."""
    y, s, r = states

    @functools.partial(jax.jit, static_argnums=0)
    def of(u, y, s, r):
        slope = flows.total_derivative(u, y, s, r, velocity(y, s), **options)
        return jnp.abs(u(y, s, r) + (s - r) * slope - velocity(y, s))

    def residual(u):
        return np.asarray(of(u, y, s, r))

    assert residual(average).max() < tolerance
    printed = lambda y, s, r: -average(y, s, r)  # noqa: E731
    assert residual(printed).mean() > 0.5


@pytest.mark.parametrize(
    "time_range, ratio",
    [((0.001, 0.999), 4.0), ((0.001, 0.0), 2.0), ((1.0, 0.999), 2.0)],
)
def test_5_difference_is_of_second_order_inside_and_of_first_at_a_barred_side(
    states, time_range, ratio
):
    def errors(y, s, r):
        v = velocity(y, s)
        exact = flows.total_derivative(average, y, s, r, v)
        options = {"derivative": "difference", "time_range": time_range}
        for delta in (5e-3, 2.5e-3):
            near = flows.total_derivative(average, y, s, r, v, delta=delta, **options)
            yield jnp.abs(near - exact).max()

    coarse, fine = jax.jit(lambda *at: list(errors(*at)))(*states)
    assert abs(coarse / fine / ratio - 1) < 0.15


def test_5_both_sides_barred_gives_zero(states):
    y, s, r = states
    options = {"derivative": "difference", "time_range": (1.0, 0.0)}
    slope = flows.total_derivative(average, y, s, r, y, **options)
    np.testing.assert_array_equal(slope, 0)


def test_difference_never_reaches_r(x64):
    """The lower side is barred where it would pass r, so u is only asked for r < s."""
    seen = []

    def watched(y, s, r):
        seen.append(np.asarray(s) - np.asarray(r))
        return y * s

    s, r, y = jnp.full(3, 0.5), jnp.array([0.5, 0.4975, 0.2]), jnp.ones(3)
    flows.total_derivative(watched, y, s, r, y, derivative="difference")
    assert min(gap.min() for gap in seen) >= 0


@pytest.mark.parametrize("remat", [False, True])
def test_exact_jumps_along_any_grid_keep_the_number_of_deviations(x64, remat):
    y = jax.random.normal(jax.random.key(3), (50,), jnp.float64)
    walk = functools.partial(flows.map_endpoints, average, remat=remat)
    for grid in ([1.0, 0.0], [1.0, 0.7, 0.2, 0.0]):
        along = functools.partial(walk, times=jnp.array(grid))
        end, slope = jax.jvp(along, (y,), (y,))
        np.testing.assert_allclose(end, MU + S * y, atol=1e-12)
        np.testing.assert_allclose(slope, S * y, atol=1e-12)
    assert (walk(y, jnp.array([0.4])) == y).all()


def test_6_rows_without_a_jump_are_flow_matching(states):
    """Gradient of the normalised loss = that of |u - v|^2 over its own size."""
    y, s = (np.asarray(x) for x in states[:2])
    y, a = y[:, None], 1.3
    target = np.cos(y) + 3

    def loss(a, y, s, target):
        u = lambda y, s, r: a * y + s[:, None]  # noqa: E731
        error, _ = flows.meanflow_error(u, y, s, s, target, derivative="difference")
        return flows.normalised_loss(error, 2.0).sum()

    residual = a * y + s[:, None] - target
    expected = np.sum(2 * residual * y / (np.square(residual) + 2.0))
    found = jax.jit(jax.grad(loss))(a, y, s, target)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_target_carries_no_gradient(states):
    y, s, r = states

    def loss(a):
        u = lambda y, s, r: a * y * s[:, None]  # noqa: E731
        return flows.meanflow_error(u, y[:, None], s, r, y[:, None])[0].sum()

    found = jax.jit(jax.grad(loss))(1.0)
    y, s, r = (np.asarray(x)[:, None] for x in states)
    target = y - (s - r) * (y * s + y)  # du/ds along v = y, at a = 1
    np.testing.assert_allclose(found, np.sum(2 * (y * s - target) * y * s), rtol=1e-6)


def test_11_normalised_loss_lies_below_one():
    errors = jnp.array([0.0, 1e-9, 1.0, 1e9])
    loss = np.asarray(flows.normalised_loss(errors, 3.0))
    assert (loss >= 0).all() and (loss <= 1).all() and loss[2] == 0.25


def test_floor_to_grid():
    grid = flows.truncated_grid(2, 10.0)
    s = np.float32([0.999, 0.95, float(grid[1]), 0.5, 0.001])
    found = np.asarray(flows.floor_to_grid(jnp.asarray(s), grid))
    np.testing.assert_allclose(found, [0.999, grid[1], grid[1], 0, 0], rtol=1e-6)
    assert (found <= s).all()


def test_1_few_step_grids():
    for steps, shift, expected in (
        (2, 10.0, (0.999, 0.908, 0)),
        (4, 5.0, (0.999, 0.937, 0.833, 0.624, 0)),
        (4, 10.0, (0.999, 0.967, 0.908, 0.769, 0)),
    ):
        grid = flows.truncated_grid(steps, shift)
        np.testing.assert_allclose(grid, expected, atol=1.1e-3)
        assert grid[-1] == 0 and grid[0] == 0.999 and (np.diff(grid) < 0).all()


def test_1_shifts_compose():
    t, shift = np.linspace(0, 1, 11), flows.shift_time
    assert shift(1.0, 7.0) == 1 and shift(0.0, 7.0) == 0
    np.testing.assert_array_equal(shift(t, 1.0), t)
    np.testing.assert_allclose(shift(shift(t, 2.0), 5.0), shift(t, 10.0))
    np.testing.assert_allclose(shift(shift(t, 4.0), 0.25), t)
    assert (np.diff(shift(t, 5.0)) > 0).all()


KEYS = jax.random.split(jax.random.key(0), 20_000)


def test_roles_have_their_shares_and_never_meet():
    config = flows.FlowMapConfig(drop_rate=0.1, map_rate=0.25)
    drops, jumps = map(np.asarray, flows.draw_roles(KEYS, config))
    assert abs(drops.mean() - 0.1) < 0.01 and abs(jumps.mean() - 0.25) < 0.01
    assert not (drops & jumps).any()


def test_13_guidance_of_one_is_none_and_dropped_rows_are_not_guided():
    v, drops = jnp.ones((2, 3)), jnp.array([True, False])
    cond, null = jnp.array([[1.0], [2.0]]), jnp.zeros(1)
    target = functools.partial(
        flows.guided_target, lambda cond: 0.5 * jnp.ones((2, 3)), v, cond, drops, null
    )
    mixed, found = target(flows.FlowMapConfig(guidance=1.0))
    np.testing.assert_array_equal(found, v)
    np.testing.assert_array_equal(mixed, [[0.0], [2.0]])
    _, found = target(flows.FlowMapConfig(guidance=3.0))
    np.testing.assert_allclose(found, [[1.0] * 3, [0.5 + 3 * 0.5] * 3])


def test_ranged_times():
    times = np.asarray(jax.jit(flows.ranged_time(5.0, 0.001, 0.999))(KEYS))
    assert times.min() >= 0.001 and times.max() <= np.float32(0.999)
    u = np.linspace(0.001, 0.999, 100_001)
    assert abs(times.mean() - flows.shift_time(u, 5.0).mean()) < 0.01


def test_noised_start_uses_no_data_at_the_first_time():
    x = jnp.full((2000, 2), 1e3)
    start = jax.jit(lambda keys: flows.noised_start(x, keys, (0.999, 0.9, 0.0)))
    x_t, t, noise = jax.tree.map(np.asarray, start(KEYS[:2000]))
    first = t > 0.95
    assert 0.45 < first.mean() < 0.55
    np.testing.assert_allclose(x_t[first], 0.999 * noise[first], rtol=1e-6)
    np.testing.assert_allclose(x_t[~first], 100 + 0.9 * noise[~first], rtol=1e-5)


def test_bad_inputs(refused):
    one, two = jnp.ones(1), jnp.ones(2)
    jump = functools.partial(flows.apply_map, average, two)
    refused(r"2 row\(s\) have r > s", jump, 0.2 * two, 0.5 * two)
    refused(r"outside \[0, 1\]", jump, 500 * two, 0 * two)
    refused("steps=0 must be at least 1", flows.truncated_grid, 0, 5.0)
    refused("shift=0.5", flows.truncated_grid, 2, 0.5)
    refused("start=1.5", flows.truncated_grid, 2, 5.0, 1.5)
    refused("end at 0", flows.floor_to_grid, one, (1.0, 0.5))
    config = flows.FlowMapConfig
    refused("derivative='central'", config, derivative="central")
    refused("together they must not exceed 1", config, drop_rate=0.9, map_rate=0.2)
    refused("loss_constant=0", config, loss_constant=0.0)
    refused("shift=0.5", flows.ranged_time, 0.5)
    given = (None, one, None, jnp.ones(1, bool), None, config(guidance=3.0))
    refused("need null_cond", flows.guided_target, *given)


@pytest.mark.parametrize("derivative", flows.DERIVATIVES)
def test_derivative_of_serves_du_ds_alone(states, derivative):

    def columns(scale=1.0, shift=0.0):
        return lambda y, s, r: scale * average(y, s[:, None], r[:, None]) + shift

    @jax.jit
    def found(y, s, r):
        v = velocity(y, s)
        rows = (y[:, None], s, r, v[:, None])
        error = functools.partial(
            flows.meanflow_error, columns(), *rows, derivative=derivative
        )
        plain, u = error()
        same, _ = error(derivative_of=columns(shift=5.0))
        slope = flows.total_derivative(average, y, s, r, v, derivative=derivative)
        other, _ = error(derivative_of=columns(scale=2.0))
        expected = jnp.square(u[:, 0] - v + 2 * (s - r) * slope)
        config = flows.FlowMapConfig(derivative=derivative)
        options = {"derivative_of": columns(scale=2.0)}
        _, metrics = flows.flow_map_loss(columns(), *rows, config, **options)
        return plain, same, expected, other, metrics["squared_error"]

    plain, same, expected, other, squared_error = found(*states)
    np.testing.assert_allclose(same, plain, atol=1e-9)
    np.testing.assert_allclose(other, expected, atol=1e-9)
    np.testing.assert_allclose(squared_error, other, atol=1e-12)


def test_jvp_without_forward_mode_names_the_remedy(refused):
    @jax.custom_vjp
    def fused(y):
        return y

    fused.defvjp(lambda y: (y, None), lambda _, g: (g,))

    def broken(y, s, r):
        raise TypeError("of the network's own")

    y, s = jnp.ones((2, 1)), jnp.full(2, 0.5)
    remedy = r"derivative_apply_fn.*'xla'.*'difference'"
    of_fused = lambda y, s, r: fused(y)  # noqa: E731
    refused(remedy, flows.total_derivative, of_fused, y, s, 0 * s, y)
    refused("own", flows.total_derivative, broken, y, s, 0 * s, y, error=TypeError)


def test_half_jumps_along_straight_lines_agree_with_the_whole():
    """Sheet of ReinFlow, 13: the exact field of a point mass, (x - m) / t."""
    m, count = 0.4, 512
    exact = lambda y, s, r: (y - m) / s[:, None]  # noqa: E731
    y, s = np.linspace(-2, 2, 10, dtype="f"), np.float32([1, 1, 0.5, 0.25, 0.75])
    y, r = y.reshape(5, 2), np.float32([0, 0.5, 0, 0.125, 0.5])
    target = jax.jit(flows.shortcut_target, static_argnums=0)
    assert_allclose(target(exact, y, s, r), exact(y, s, r), rtol=1e-5)
    keys, data = prng.sample_keys(jax.random.key(0), count), jnp.full((count, 2), m)
    loss = jax.jit(
        flows.shortcut_loss,
        static_argnums=0,
        static_argnames=("rate", "levels", "target_of"),
    )
    assert np.quantile(loss(exact, data, keys, rate=1.0), 1) < 1e-6
    assert np.quantile(loss(exact, data, keys, rate=0.0), 0.95) < 1e-6

    # told apart by a map that answers with the length of its jump
    length = lambda y, s, r: (s - r)[:, None] + 0 * y  # noqa: E731
    nothing = lambda y, s, r: 0 * y  # noqa: E731
    found = loss(length, data, keys, levels=3, target_of=nothing)
    sizes = np.sqrt(np.asarray(found))
    jumps = [np.isclose(sizes, size, atol=1e-6).mean() for size in (1, 0.5, 0.25)]
    assert np.abs(np.array(jumps) - 0.25 / 3).max() < 4 * np.sqrt(0.083 / count)

    # the halves are those of another map, without gradient
    @jax.jit
    @jax.grad
    def half(a):
        given = map(jnp.asarray, (y, s, r))
        return flows.shortcut_target(lambda y, s, r: a * y, *given).sum()

    assert half(1.0) == 0


def test_halves_of_a_curved_map_are_averaged():
    """u = y: two halves of length d / 2 give y (1 - d / 4)."""
    y, s, r = jnp.ones((1, 1)), jnp.float32([0.8]), jnp.float32([0.4])
    target = jax.jit(flows.shortcut_target, static_argnums=0)
    found = target(lambda y, s, r: y, y, s, r)
    assert_allclose(found, 1 - 0.4 / 4, rtol=1e-6)
