"""Local errors and the dynamic programme: invariants 1-10 and 14-16 of BOSS."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax import flows
from tmdjax.core import conventions, prng
from tmdjax.flows import cheapest_paths, local_error_costs


def keys(count, seed=0):
    return prng.sample_keys(jax.random.key(seed), count)


def brute_force(costs, budget):
    """Cheapest path by trying all; the lexicographically first of equals."""
    n = len(costs) - 1

    def total(path):  # summed as a recursion would
        steps = reversed(list(itertools.pairwise(path)))
        return functools.reduce(lambda later, step: costs[step] + later, steps, 0.0)

    inner = itertools.combinations(range(1, n), budget - 1)
    paths = ((0, *knots, n) for knots in inner)
    return min((total(path), path) for path in paths)


FLOW = flows.gaussian_mixture(
    weights=[0.1, 0.2, 0.3, 0.4],
    means=np.random.default_rng(3).normal(size=(4, 2)) * 1.5,
    stds=[0.2, 0.3, 0.4, 0.5],
)


def path_of(costs, budget):
    """The cheapest path of one budget."""
    return cheapest_paths(costs, budget).index[-1]


def flow_costs(seed=0, **options):
    """Of one program for all."""
    return local_error_costs(FLOW.velocity, keys(20, seed), (2,), knots=20, **options)


def states_of(velocity, knots):
    """Noise and the whole fine trajectory [knot, sample, dim]."""
    noise = prng.normal(keys(5), (2,))
    index = np.arange(len(knots))
    return noise, np.asarray(flows.states_at(velocity, noise, knots, index))


def test_1_equals_brute_force_on_random_matrices():
    """And 2: one table serves all budgets."""
    rng = np.random.default_rng(0)
    for trial in range(200):
        n = int(rng.integers(1, 10))
        costs = np.triu(rng.random((n + 1, n + 1)), 1)
        if trial % 4 == 0:
            costs = np.round(costs * 3)  # with ties
        found = cheapest_paths(costs, n)
        for budget in range(1, n + 1):
            total, path = brute_force(costs, budget)
            alone = cheapest_paths(costs, budget)
            assert found.cost[budget - 1] == alone.cost[-1] == total
            assert tuple(found.index[budget - 1]) == tuple(alone.index[-1]) == path


def test_3_more_steps_never_cost_more_where_refinement_helps():
    points = np.sort(np.random.default_rng(2).random(15))
    # (b - a)^2 is superadditive: every refinement lowers the sum
    costs = np.triu((points[None] - points[:, None]) ** 2, 1)
    assert (np.diff(cheapest_paths(costs, 14).cost) <= 0).all()


def test_3_and_4_all_knots_and_adjacent_ones_cost_nothing(x64):
    costs = flow_costs(dtype=jnp.float64)
    assert np.abs(np.diag(costs, 1)).max() <= 1e-10 * costs.max()
    assert (np.tril(costs) == 0).all()
    assert cheapest_paths(costs, 20).cost[-1] < 1e-10 * costs.max()


def constant(x, t, cond):
    return jnp.broadcast_to(jnp.arange(1.0, 4.0, dtype=x.dtype), x.shape)


def towards_origin(x, t, cond):
    return x / t[:, None]  # x_t = t z: constant along each trajectory


@pytest.mark.parametrize("velocity", [constant, towards_origin])
def test_5_straight_flow_costs_nothing(velocity, x64):
    costs = local_error_costs(velocity, keys(10), (3,), knots=20, dtype=jnp.float64)
    assert costs.max() < 1e-20
    noise = prng.normal(keys(10), (3,), jnp.float64)
    fine, one = (
        flows.endpoints(velocity, noise, flows.uniform_grid(k)) for k in (20, 1)
    )
    np.testing.assert_allclose(one, fine, atol=1e-12)
    # the tie rule
    np.testing.assert_array_equal(path_of(np.zeros((6, 6)), 3), [0, 1, 2, 5])


def time_only(x, t, cond):
    """G(t) u with g = 2 (1 - t) and a unit vector u, u' = -v."""
    unit = jnp.array([0.6, 0.8], x.dtype)
    return -2 * (1 - t)[:, None] * unit


def test_6_time_only_velocity_has_the_closed_form(x64):
    n = 100
    costs = local_error_costs(time_only, keys(3), (2,), knots=n, dtype=jnp.float64)
    j, k = np.triu_indices(n + 1, 1)
    expected = ((k - j) * (k - j - 1) / n**2) ** 2
    np.testing.assert_allclose(costs[j, k], expected, rtol=1e-9, atol=1e-15)
    for budget in (2, 4, 5, 10):
        even = np.linspace(0, n, budget + 1)
        np.testing.assert_array_equal(path_of(costs, budget), even)


def linear_costs(matrix, n):
    """Exact expectation over z ~ N(0, I) of a linear flow's costs, v = -A x."""
    dim = len(matrix)
    step = np.eye(dim) + matrix / n
    powers = [np.linalg.matrix_power(step, k) for k in range(n + 1)]
    costs = np.zeros((n + 1, n + 1))
    for j in range(n + 1):
        for k in range(j + 1, n + 1):
            gap = powers[k - j] - np.eye(dim) - (k - j) / n * matrix
            costs[j, k] = np.square(gap @ powers[j]).sum()
    return costs


def test_7_linear_flow_within_four_standard_errors():
    matrix = np.array([[1.0, -2.0], [1.5, 0.5]])
    n, samples = 12, 100

    def velocity(x, t, cond):
        return -x @ jnp.asarray(matrix.T, x.dtype)

    parts = np.stack(
        [
            local_error_costs(velocity, keys(samples, s), (2,), knots=n)
            for s in range(20)
        ]
    )
    error = parts.std(0, ddof=1) / np.sqrt(20)
    upper = np.triu_indices(n + 1, 2)
    deviation = np.abs(parts.mean(0) - linear_costs(matrix, n))[upper] / error[upper]
    assert deviation.max() < 4


@pytest.mark.parametrize(
    "rate, widths", [(3.0, [73, 45, 33, 27, 22]), (-3.0, [23, 28, 35, 46, 68])]
)
def test_7_growing_flows_take_shrinking_steps(rate, widths):
    index = path_of(linear_costs(np.array([[rate]]), 200), 5)
    np.testing.assert_array_equal(np.diff(index), widths)
    # and the same path from simulated trajectories: all samples scale alike
    found = local_error_costs(lambda x, t, cond: -rate * x, keys(4), (1,), knots=200)
    np.testing.assert_array_equal(path_of(found, 5), index)


def test_8_scaled_and_rotated_flows():
    """The flow itself turned and scaled, started from turned and scaled noise."""
    scale, turn = 3.0, jnp.array([[0.6, -0.8], [0.8, 0.6]])

    def changed(x, t, cond):
        # x = S R y for the y of the original, and so for velocities
        y = (x - cond) @ turn / scale
        return scale * FLOW.velocity(y, t) @ turn.T

    # cond shifts the given noise z to S R z: x - cond = S R y
    z = prng.normal(keys(20), (2,))
    shift = z - scale * z @ turn.T
    base = flow_costs()
    found = local_error_costs(changed, keys(20), (2,), shift, knots=20)
    np.testing.assert_allclose(found, 9 * base, rtol=2e-3, atol=1e-5)
    for k in (2, 4):
        np.testing.assert_array_equal(path_of(found, k), path_of(base, k))


def test_9_micro_batches_add_up(x64):
    """And conditions follow their samples."""

    def velocity(x, t, cond):
        return cond["gain"][:, None] * FLOW.velocity(x, t)

    def costs(rows=slice(None), **options):
        of_rows = {"gain": np.linspace(0.5, 1.5, 18)[rows]}
        given = (velocity, keys(18)[rows], (2,), of_rows)
        return local_error_costs(*given, knots=20, dtype=jnp.float64, **options)

    parts = [costs(micro_batch=9)]  # as long as the halves
    parts += [(costs(slice(9)) + costs(slice(9, 18))) / 2]
    parts += [costs(micro_batch=7)]  # the last one is filled up
    for found in parts:
        np.testing.assert_allclose(found, costs(), rtol=1e-6, atol=1e-12)


def forward_costs(u, start, n):
    """The paper's own form: tau from 0 to 1, x' = x + u / n, in numpy."""
    states, velocities = [start], []
    for k in range(n):
        velocities.append(u(states[-1], k / n))
        states.append(states[-1] + velocities[-1] / n)
    costs = np.zeros((n + 1, n + 1))
    for j in range(n):
        for k in range(j + 1, n + 1):
            miss = states[j] + (k - j) / n * velocities[j] - states[k]
            costs[j, k] = np.square(miss).sum(-1).mean()
    return costs, states[-1]


def on_host(velocity):
    """The paper's u(x, tau), compiled outside of the costs."""
    velocity = jax.jit(velocity)
    return lambda x, tau: -np.asarray(velocity(x, np.full(len(x), 1 - tau, x.dtype)))


@pytest.mark.parametrize("size", [65, 500])
def test_long_events_add_up_in_pieces(size, x64):
    """The pieces of an event, whole or not, against one pass in numpy."""

    def velocity(x, t, cond=None):
        return jnp.sin(3 * x) * t[:, None] + jnp.cos(x[:, :1])

    n, many = 30, keys(40)  # so many that events are cut up
    costs = local_error_costs(velocity, many, (size,), knots=n, dtype=jnp.float64)
    noise = np.asarray(prng.normal(many, (size,), jnp.float64))
    theirs, _ = forward_costs(on_host(velocity), noise, n)
    np.testing.assert_allclose(costs, theirs, rtol=1e-9, atol=1e-20)


def test_10_labels_of_time_change_nothing_and_its_direction_does(x64):
    """Invariant 16 too: the other side runs in numpy, uncompiled."""
    n, theirs_of = 24, on_host(FLOW.velocity)

    def u(x, tau, cond=None):  # data minus noise, tau = 1 is data
        return -FLOW.velocity(x, 1 - tau)

    noise = np.asarray(prng.normal(keys(20), (2,), jnp.float64))
    theirs, ends = forward_costs(theirs_of, noise, n)
    flipped = conventions.flip_velocity(u)
    ours = local_error_costs(flipped, keys(20), (2,), knots=n, dtype=jnp.float64)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-14)
    knots = flows.fine_knots(n)
    for k in (2, 5):
        index = path_of(ours, k)
        np.testing.assert_array_equal(index, path_of(theirs, k))
        np.testing.assert_allclose(knots[index], 1 - index / n, atol=1e-15)
    # from data back to noise is another matrix and another path
    back, _ = forward_costs(lambda x, tau: -theirs_of(x, 1 - tau), ends, n)
    assert not np.allclose(back, theirs)
    paths = [path_of(c, 5) for c in (theirs, back)]
    assert not np.array_equal(paths[0], paths[1])
    assert not np.array_equal(paths[0], n - paths[1][::-1])


def test_14_grids_are_exact():
    for n in (3, 7, 100, 1000):
        knots = flows.fine_knots(n)
        assert knots[0] == 1.0 and knots[-1] == 0.0
        assert (np.diff(knots) < 0).all()
        np.testing.assert_allclose(knots, 1 - np.arange(n + 1) / n, atol=1e-15)


def test_14_euler_on_integer_knots_equals_euler_on_the_grid():
    index, velocity = np.array([0, 10, 35, 70, 100]), jax.jit(FLOW.velocity)
    noise = prng.normal(keys(16), (2,))
    x = np.asarray(noise)
    for j, k in itertools.pairwise(index):
        t = np.full(len(x), 1 - j / 100, np.float32)
        step = np.asarray(velocity(jnp.asarray(x), jnp.asarray(t)))
        x = x - np.float32((k - j) / 100) * step
    found = flows.endpoints(FLOW.velocity, noise, flows.fine_knots(100)[index])
    np.testing.assert_allclose(found, x, atol=1e-5)


def test_15_same_key_same_matrix():
    first, again, other = (flow_costs(seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    # a path found on other noise costs little more than the best
    best, path = (path_of(costs, 5) for costs in (first, other))
    assert flows.path_cost(first, path) < 1.2 * flows.path_cost(first, best)


def test_16_paths_of_both_precisions(x64):
    start = prng.normal(keys(20), (2,), jnp.float32)

    def from_start(x, t, shift):
        return FLOW.velocity(x - shift, t)

    def costs(dtype):  # which draws its own noise
        shift = prng.normal(keys(20), (2,), dtype) - start.astype(dtype)
        given = (from_start, keys(20), (2,), shift)
        return local_error_costs(*given, knots=20, dtype=dtype)

    single, double = costs(jnp.float32), costs(jnp.float64)
    np.testing.assert_allclose(single, double, rtol=1e-3, atol=1e-6)
    for budget in (2, 4, 6, 8):
        a, b = (path_of(c, budget) for c in (single, double))
        tied = abs(flows.path_cost(double, a) / flows.path_cost(double, b) - 1) < 1e-6
        assert np.array_equal(a, b) or tied


def test_other_knots_and_tables():
    edm = flows.edm_grid(12)
    costs, again = (
        local_error_costs(FLOW.velocity, keys(20), (2,), knots=knots)
        for knots in (edm, flows.make_table("ode", edm))
    )
    assert costs.shape == (13, 13)
    np.testing.assert_array_equal(again, costs)


def test_heun_counts_its_evaluations():
    calls = []

    def velocity(x, t, cond):
        jax.debug.callback(lambda: calls.append(1))
        return -x

    n = 6
    local_error_costs(velocity, keys(2), (2,), knots=n, method="heun")
    jax.effects_barrier()
    assert len(calls) == n + n * (n + 1) // 2


def test_costly_metrics_meet_one_target_at_a_time():
    seen = []

    def metric(weights, estimate, target):
        seen.append(estimate.shape)
        return jnp.abs((estimate - target) @ weights).sum(-1)

    metric = functools.partial(metric, np.eye(2, dtype=np.float32))
    found = local_error_costs(FLOW.velocity, keys(5), (2,), knots=8, metric=metric)
    assert set(seen) == {(5, 2)}
    _, states = states_of(FLOW.velocity, flows.fine_knots(8))
    v = FLOW.velocity(jnp.asarray(states[1]), jnp.full(5, 7 / 8))
    miss = states[1] - np.asarray(v) / 4 - states[3]
    assert found[1, 3] == pytest.approx(np.abs(miss).sum(-1).mean(), rel=1e-3)


def test_heun_costs_are_those_of_heun_steps():
    velocity, knots = jax.jit(FLOW.velocity), flows.fine_knots(8)
    costs = local_error_costs(FLOW.velocity, keys(5), (2,), knots=8, method="heun")
    _, states = states_of(FLOW.velocity, knots)
    for j, k in ((0, 8), (2, 5), (6, 8)):
        t, t_next = (jnp.full(5, knots[i], jnp.float32) for i in (j, k))
        width = np.float32(knots[j] - knots[k])
        v = np.asarray(velocity(jnp.asarray(states[j]), t))
        w = np.asarray(velocity(jnp.asarray(states[j] - width * v), t_next))
        landing = states[j] - width * (v + w) / 2
        expected = np.square(landing - states[k]).sum(-1).mean()
        assert costs[j, k] == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_future_weight_multiplies_what_comes_later():
    costs = np.triu(np.random.default_rng(5).random((8, 8)), 1)
    found = cheapest_paths(costs, 3, future_weight=1.5)
    best = min(
        (costs[0, a] + 1.5 * costs[a, b] + 2.25 * costs[b, 7], (0, a, b, 7))
        for a, b in itertools.combinations(range(1, 7), 2)
    )
    assert found.cost[-1] == pytest.approx(best[0])
    assert tuple(found.index[-1]) == best[1]


def test_parameters_are_arguments_of_the_program(count_compiles):
    """As they come from disk, in numpy, for a network that needs jax arrays."""

    def apply_fn(params, x, t, cond):
        return params["w"].at[cond].get() * jnp.sin(x + t[:, None])

    def costs(w):
        params = {"w": np.full((3, 2), w, np.float32)}
        velocity = functools.partial(apply_fn, params)
        guided = flows.classifier_free_guidance(velocity, 2.0, 0)
        cond = np.zeros(4, np.int32)
        return local_error_costs(guided, keys(4), (2,), cond, knots=5)

    first = costs(1.0)
    with count_compiles() as compiled:
        second = costs(2.0)
    assert not compiled and np.isfinite(first).all()
    assert not np.allclose(first, second)


def test_states_at_equal_the_whole_trajectory(refused):
    knots = flows.fine_knots(8)
    noise, states = states_of(FLOW.velocity, knots)
    table = flows.make_table("ode", knots)
    whole = np.asarray(flows.rollout(None, FLOW.velocity, noise, table).states)
    np.testing.assert_allclose(states, whole, atol=1e-5)
    kept = flows.states_at(FLOW.velocity, noise, knots, [0, 3, 4, 8])
    np.testing.assert_allclose(kept, whole[[0, 3, 4, 8]], atol=1e-5)
    given = (FLOW.velocity, noise, knots, [1, 4])
    refused("must increase from 0", flows.states_at, *given)


def test_endpoints_in_micro_batches(refused):
    def velocity(x, t, cond):
        return FLOW.velocity(x, t) + cond[:, None]

    noise, cond = prng.normal(keys(7), (2,)), jnp.arange(7.0)
    ends = functools.partial(
        flows.endpoints, velocity, noise, flows.uniform_grid(4), cond
    )
    np.testing.assert_allclose(ends(micro_batch=3), ends(), atol=1e-5)
    refused("micro_batch=0", ends, micro_batch=0)


def test_terminal_errors_are_distances_of_endpoints():
    noise, states = states_of(FLOW.velocity, flows.fine_knots(8))
    grids = [flows.uniform_grid(4), flows.shifted_grid(4, 2.0)]
    errors = functools.partial(
        flows.terminal_errors, FLOW.velocity, noise, jnp.asarray(states[-1])
    )
    found = errors(grids)
    assert found.shape == (2, 5)
    np.testing.assert_allclose(errors(grids, micro_batch=2), found, rtol=1e-5)
    for row, grid in zip(found, grids):
        x = np.asarray(flows.endpoints(FLOW.velocity, noise, grid))
        np.testing.assert_allclose(row, np.square(x - states[-1]).sum(-1), rtol=1e-4)
    assert errors([grids[0], flows.uniform_grid(5)]).shape == (2, 5)


def test_budget_out_of_range(refused):
    for budget in (0, -3, 11):
        words = rf"K={budget} must be in \[1, K_max=10\]"
        refused(words, cheapest_paths, np.zeros((11, 11)), budget)


def test_bad_costs(refused):
    for entry, value, words in (
        ((1, 3), np.nan, r"costs\[1, 3\] = nan.*singular at t = 1.*eps"),
        ((0, 2), np.inf, r"costs\[0, 2\] = inf"),
        ((2, 4), -0.1, r"costs\[2, 4\] = -0.1: costs must not be negative"),
    ):
        costs = np.triu(np.ones((5, 5)), 1)
        costs[entry] = value
        refused(words, cheapest_paths, costs, 2)
        costs[entry] = 1
        costs[entry[::-1]] = value  # below the diagonal nobody looks
        cheapest_paths(costs, 2)
    refused(r"must be square.*\(3, 4\)", cheapest_paths, np.zeros((3, 4)), 2)
    singular = lambda x, t, cond: x / (1 - t)[:, None]  # noqa: E731
    costs = local_error_costs(singular, keys(2), (2,), knots=5)
    refused(r"costs\[0, 1\] = nan", cheapest_paths, costs, 2)


def test_bad_inputs(refused):
    def costs_refused(words, velocity=constant, knots=5, **options):
        given = (velocity, keys(4), (3,))
        refused(words, local_error_costs, *given, knots=knots, **options)

    costs_refused("knot 1 is 0.5 and knot 2 is 0.6", knots=[1.0, 0.5, 0.6, 0.0])
    costs_refused("knot 1 is 0.5 and knot 2 is 0.5", knots=[1.0, 0.5, 0.5, 0.0])
    costs_refused("knot 0 is 0.9", knots=[0.9, 0.5, 0.0])
    costs_refused("last knot is 0.1", knots=[1.0, 0.5, 0.1])
    costs_refused("knots=0 must be at least 1", knots=0)
    table = flows.make_table("flow_cps", flows.uniform_grid(4))
    costs_refused("deterministic flow", knots=table)
    costs_refused("leading axis must be the batch, 4", cond=np.zeros(3))
    costs_refused("method='hein'.*Did you mean 'heun'", method="hein")
    other = functools.partial(costs_refused, error=TypeError)
    costs_refused(r"shape \(4, 1\) but.*\(4, 3\)", lambda x, t, c: x[:, :1])
    other("velocity is int32", lambda x, t, c: jnp.ones(x.shape, jnp.int32))
    other("velocity is tuple", lambda x, t, c: (x, x))


def test_memory_is_bounded_before_anything_runs(refused):
    def never(x, t, cond):
        raise AssertionError("traced")

    shape = (256, 256, 3)
    assert 1.5e8 < flows.cost_memory(shape, 100) < 1.7e8
    given = (local_error_costs, never, keys(1000), shape)
    refused("give micro_batch<=12", *given, micro_batch=1000)
    refused("use fewer knots", *given, memory_limit=1e8)
