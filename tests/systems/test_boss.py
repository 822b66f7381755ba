"""BOSS: invariants 11-13 of its sheet, search, sampling, and every bad input.

Invariants 1-10 and 14-16 are those of the cost matrix and the dynamic programme:
tests/flows/test_step_search.py.
"""

import functools
import itertools
import json
import logging

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from checks import lowered, mlp, same
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import data, flows, models, train
from tmdjax.core import prng
from tmdjax.systems import boss, reflow

FLOW = flows.gaussian_mixture(**data.MIXTURE)


def keys(count, seed=0):
    return prng.sample_keys(jax.random.key(seed), count)


@pytest.fixture(scope="module")
def found():
    return bellman(budgets=(2, 4, 6))


@pytest.fixture(scope="module")
def fine(found):
    given = (FLOW.velocity, keys(50, 1), (2,), found.schedules.values())
    return boss.fine_states(*given, micro_batch=20)


def bellman(velocity=FLOW.velocity, budgets=(4,), cond=None, **options):
    """A search on 20 samples and knots: one program for all of them."""
    options = {"knots": 20, **options}
    return boss.search(velocity, keys(20), (2,), budgets, cond, **options)


def conditional(x, t, cond):
    return FLOW.velocity(x, t) + cond[:, None]


def test_search_finds_what_is_best_on_a_linear_flow():
    """Exact expectations give these widths, and all samples scale alike."""
    growing = lambda x, t, cond: -3.0 * x  # noqa: E731
    schedule = boss.search(growing, keys(4), (1,), (5,), knots=200).schedules[5]
    assert_array_equal(np.diff(schedule.index), [73, 45, 33, 27, 22])


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_search_minimises_the_weighted_sum_and_tells_the_plain_one(found, weight):
    weighted = bellman(budgets=3, future_weight=weight)
    assert tuple(weighted.schedules) == (1, 2, 3)  # one number means all budgets
    costs = weighted.costs
    assert_array_equal(costs, found.costs)
    paths = [(0, a, b, 20) for a, b in itertools.combinations(range(1, 20), 2)]
    totals = [
        sum(weight**i * costs[edge] for i, edge in enumerate(itertools.pairwise(path)))
        for path in paths
    ]
    schedule = weighted.schedules[3]
    assert tuple(schedule.index) == paths[np.argmin(totals)]
    edges = itertools.pairwise(schedule.index)
    assert schedule.cost == pytest.approx(sum(costs[edge] for edge in edges))
    assert_allclose(schedule.times, 1 - schedule.index / 20, atol=1e-15)
    uniform = flows.path_cost(costs, flows.step_search.uniform_index(20, 3))
    assert weight != 1 or schedule.cost <= uniform


def test_guided_search_differs_and_is_labelled():
    cond = np.ones(20, np.float32)
    plain, guided = (
        bellman(flows.classifier_free_guidance(conditional, scale, 0.0), cond=cond)
        for scale in (1.0, 3.0)
    )
    assert not np.allclose(plain.costs, guided.costs)
    assert plain.schedules[4].guidance_scale is None  # an unguided one cannot tell
    assert guided.schedules[4].guidance_scale == 3.0


def test_any_metric():
    one_axis = lambda estimate, target: jnp.abs(estimate - target)[:, 0]  # noqa: E731
    noise, knots = prng.normal(keys(20), (2,)), flows.fine_knots(20)
    states = np.asarray(flows.states_at(FLOW.velocity, noise, knots, np.arange(21)))
    v = np.asarray(jax.jit(FLOW.velocity)(noise, jnp.ones(20)))
    expected = np.abs(states[0] - 0.5 * v - states[10])[:, 0].mean()
    assert bellman(metric=one_axis).costs[0, 10] == pytest.approx(expected, rel=1e-4)


def test_polish_never_ends_worse(found):
    noise, knots = prng.normal(keys(20), (2,)), flows.fine_knots(20)
    reference = flows.endpoints(FLOW.velocity, noise, knots)

    def errors(grids):
        return flows.terminal_errors(FLOW.velocity, noise, reference, grids).mean(1)

    for budget, schedule in found.schedules.items():
        polished = boss.polish_schedule(FLOW.velocity, noise, schedule, found.costs)
        starts = [schedule.times, flows.uniform_grid(budget)]
        polished_error, *others = errors([polished.times, *starts])
        assert polished_error <= min(others) * (1 + 1e-6)
        assert polished.cost >= schedule.cost - 1e-9  # the search had the optimum
        cost = flows.path_cost(found.costs, polished.index)
        assert polished.cost == pytest.approx(cost)
        if budget == 2:  # a local optimum of the true error
            everywhere = errors([knots[[0, m, 20]] for m in range(1, 20)])
            m = polished.index[1] - 1
            assert everywhere[m] == everywhere[max(m - 1, 0) : m + 2].min()
    option = bellman(polish=True, budgets=(6,)).schedules[6]
    assert_array_equal(option.index, polished.index)


def scaled(params, x, t, cond):
    return params["gain"] * FLOW.velocity(x, t)


def test_cache_is_used_for_the_same_content_only(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "tmdjax")
    path = tmp_path / "costs.npz"

    def search(gain=1.0, seed=0, knots=10, **options):
        velocity = functools.partial(scaled, {"gain": jnp.float32(gain)})
        options |= {"knots": knots, "cache": path}
        return boss.search(velocity, keys(8, seed), (2,), (2,), **options).costs

    first = search()
    stamp = path.stat().st_mtime_ns
    assert_array_equal(search(), first)
    assert path.stat().st_mtime_ns == stamp and not caplog.records
    doubled = lambda a, b: 2 * flows.squared_l2(a, b)  # noqa: E731
    changes = ({"gain": 1.001}, {"seed": 1}, {"knots": 12}, {"metric": doubled})
    for change in (*changes, {"method": "heun"}):
        caplog.clear()
        other = search(**change)
        assert "holds content" in caplog.text and "computing it again" in caplog.text
        assert other.shape != first.shape or not np.array_equal(other, first)
        search()  # and back
    path.write_bytes(path.read_bytes()[:100])
    caplog.clear()
    assert_array_equal(search(), first)
    assert "is damaged" in caplog.text


def test_cache_sees_a_model_that_differs_at_one_time_only(tmp_path):
    """A straightened network, say, at the knot it was tuned at."""
    bend = lambda t: jnp.where(t == 0.5, 1.0, 0.0)[:, None]  # noqa: E731
    bent = lambda x, t, cond: FLOW.velocity(x, t) + bend(t)  # noqa: E731
    options = {"knots": 10, "cache": tmp_path / "costs.npz"}
    given = (keys(4), (2,), (2,))
    costs = [boss.search(v, *given, **options).costs for v in (FLOW.velocity, bent)]
    assert not np.array_equal(*costs)


def test_chords_join_states_of_one_trajectory_and_are_split(found, fine):
    noise = prng.normal(keys(50, 1), (2,))
    knots = flows.fine_knots(20)
    whole = np.asarray(flows.states_at(FLOW.velocity, noise, knots, np.arange(21)))
    for budget, schedule in found.schedules.items():
        chords = boss.chords(fine, schedule)
        assert len(chords["t"]) == 50 * budget
        for i, ends in enumerate(itertools.pairwise(schedule.index)):
            for end, knot in zip(("", "_next"), ends):
                x, t = (chords[n + end][50 * i : 50 * (i + 1)] for n in "xt")
                assert_allclose(x, whole[knot], atol=1e-5)
                assert_allclose(t, 1 - knot / 20, atol=1e-6)
    # a split pools chords, not noises
    chords["number"] = np.arange(300)
    training, held_out = boss.split(chords, jax.random.key(0))
    assert len(held_out["t"]) == 30 and len(training["t"]) == 270
    both = np.concatenate([training["number"], held_out["number"]])
    assert_array_equal(np.sort(both), np.arange(300))
    assert len(np.unique(held_out["t"])) > 1  # of several steps of the grid


def test_11_loss_is_zero_iff_the_velocity_is_the_chord(found, fine):
    chords = boss.chords(fine, found.schedules[4])
    width = chords["t"] - chords["t_next"]
    exact = (chords["x"] - chords["x_next"]) / width[:, None]
    table = lambda params, x, t, cond: params["v"]  # noqa: E731
    loss, _ = boss.straightening_loss({"v": exact}, table, chords)
    assert loss.max() < 1e-12
    off = {"v": jnp.asarray(exact).at[3, 0].add(0.5)}
    loss, _ = boss.straightening_loss(off, table, chords)
    assert loss[3] == pytest.approx(0.125, rel=1e-4)
    assert loss.at[3].set(0).max() < 1e-12
    weighted, _ = boss.straightening_loss(off, table, chords, weight="width2")
    assert weighted[3] == pytest.approx(0.125 * width[3] ** 2, rel=1e-4)


@pytest.mark.parametrize("weight", boss.WEIGHTS)
def test_11_gradient_equals_finite_differences(found, fine, weight, x64):
    def apply_fn(params, x, t, cond):
        return jnp.tanh(x @ params["a"] + t[:, None]) @ params["b"]

    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(2, 5)), "b": rng.normal(size=(5, 2))}
    chords = boss.chords(fine, found.schedules[4])
    chords = {name: array[:8].astype(np.float64) for name, array in chords.items()}

    def loss(params):
        values, _ = boss.straightening_loss(params, apply_fn, chords, weight=weight)
        return values.mean()

    jax.test_util.check_grads(jax.jit(loss), (params,), 1, ["rev"], rtol=1e-6)


def test_11_one_step_is_reflow_at_pure_noise():
    apply_fn, params = mlp(hidden=32, depth=2)
    params = jax.tree.map(lambda p: p + 0.01, params)
    rng = np.random.default_rng(2)
    noise, ends = (jnp.asarray(rng.normal(size=(16, 2)), jnp.float32) for _ in "ab")
    chords = {"x": noise, "x_next": ends, "t": jnp.ones(16), "t_next": jnp.zeros(16)}

    @jax.jit
    def both(params):
        options = {"x_noise": noise, "time_sampler": flows.discrete_time([1.0])}
        given = (params, apply_fn, ends, keys(16))
        lines = flows.flow_matching_loss(*given, **options)
        return boss.straightening_loss(params, apply_fn, chords)[0], lines[0]

    assert_allclose(*both(params), rtol=1e-5)


def test_12_a_table_recovers_the_fine_states(found, fine):
    """A free value for each step and sample, fitted: Euler telescopes exactly."""
    schedule = found.schedules[4]
    table = lambda params, x, t, cond: params["v"][cond]  # noqa: E731
    batch = {**boss.chords(fine, schedule), "cond": np.arange(50 * 4)}
    params = {"v": jnp.zeros((50 * 4, 2))}
    rate = 0.9 * 50 * 4  # of a quadratic with curvature 1 / (samples steps)

    @jax.jit
    def update(params):
        mean = lambda p: boss.straightening_loss(p, table, batch)[0].mean()  # noqa: E731
        return {"v": params["v"] - rate * jax.grad(mean)(params)["v"]}

    for _ in range(60):
        params = update(params)
    moves = np.diff(schedule.times)[:, None, None] * params["v"].reshape(4, 50, 2)
    walked = fine.states[0] + np.cumsum(moves, 0)
    expected = fine.states[np.searchsorted(fine.index, schedule.index[1:])]
    assert np.abs(walked - expected).max() < 1e-5 * np.abs(fine.states).max()


def test_13_all_knots_leave_the_teacher_as_it_is():
    schedule = bellman(budgets=(20,)).schedules[20]
    assert_array_equal(schedule.index, np.arange(21))
    fine = boss.fine_states(FLOW.velocity, keys(20), (2,), [schedule])
    teacher = lambda params, x, t, cond: FLOW.velocity(x, t)  # noqa: E731
    of = jax.jit(lambda rows: boss.straightening_loss({}, teacher, rows)[0].max())
    assert of(boss.chords(fine, schedule)) < 1e-8


def test_13_network_time_is_remapped_once(refused):
    """A network of the original code, by its wrapper: search, chords and loss agree."""
    eps, n, times = 1e-3, 20, []

    def original(params, x, time, cond):
        jax.debug.callback(lambda now: times.append(np.asarray(now)), time)
        tau = (time / 999 - eps) / (1 - eps)
        return -params["gain"] * FLOW.velocity(x, 1 - tau)

    wrapped = models.rectified_flow(original, eps)
    params = {"gain": jnp.float32(1.0)}
    velocity = functools.partial(wrapped, params)
    found = boss.search(velocity, keys(10), (2,), (n,), knots=n)
    jax.effects_barrier()
    seen = np.concatenate([now.ravel() for now in times])
    assert seen.min() == pytest.approx(999 * eps, rel=1e-3)  # at pure noise
    assert seen.max() == pytest.approx(999 * (1 - (1 - eps) / n), rel=1e-5)
    x, t = prng.normal(keys(5), (2,)), jnp.linspace(0.0, 1.0, 5)
    ours, exact = jax.jit(lambda *at: (velocity(*at, None), FLOW.velocity(*at)))(x, t)
    assert_allclose(ours, exact, rtol=1e-3, atol=1e-3)
    schedule = found.schedules[n]
    fine = boss.fine_states(velocity, keys(10), (2,), [schedule])
    of = jax.jit(lambda rows: boss.straightening_loss(params, wrapped, rows)[0].max())
    assert of(boss.chords(fine, schedule)) < 1e-8
    refused("eps=1", models.rectified_flow, original, 1.0)


@pytest.fixture(scope="module")
def student():
    apply_fn, params = mlp(hidden=32, depth=2)
    moved = lambda params, *at: FLOW.velocity(*at[:2]) + apply_fn(params, *at)  # noqa: E731
    return moved, jax.tree.map(lambda p: p + 0.01, params)


def test_straightening_brings_few_steps_to_the_fine_samples(found, student, refused):
    (apply_fn, params), schedule = student, found.schedules[4]
    fine = boss.fine_states(FLOW.velocity, keys(500, 1), (2,), [schedule])
    training, held_out = boss.split(boss.chords(fine, schedule), jax.random.key(0))
    rule = train.OptimizerConfig(name="adam", learning_rate=3e-3)
    options = {"steps": 300, "batch_size": 128, "optimizer": rule}
    given = (params, apply_fn, training, schedule)
    tuned = boss.straighten(*given, key=jax.random.key(1), **options)
    noise = prng.normal(keys(300, 5), (2,))
    fine = np.asarray(flows.endpoints(FLOW.velocity, noise, flows.fine_knots(20)))
    loss = jax.jit(lambda p: boss.straightening_loss(p, apply_fn, held_out)[0].mean())
    errors = []
    for p in (params, tuned.params):
        velocity = functools.partial(apply_fn, p)
        x = np.asarray(boss.sample(velocity, noise, schedule))
        errors.append((float(loss(p)), np.square(x - fine).sum(1).mean()))
    assert (np.array(errors[1]) < 0.6 * np.array(errors[0])).all()
    averaged, last = (jax.tree.leaves(p)[0] for p in (tuned.params, tuned.raw_params))
    assert not np.allclose(averaged, last)
    # what comes out carries its grid
    velocity = tuned.velocity(apply_fn)
    message = "straightened on the times"
    refused(message, boss.sample, velocity, noise, found.schedules[6])
    assert_array_equal(boss.sample(velocity, noise), x)


@pytest.mark.parametrize("steps_distilled, learned", [(None, range(6)), (3, [1, 3, 5])])
def test_reflow_regresses_onto_lines_at_its_times_alone(steps_distilled, learned):
    """A table over six intervals of time, and pairs that are all one step apart."""
    x = np.random.default_rng(0).normal(size=(500, 2)).astype(np.float32)

    def table(params, x, t, cond):
        return params["v"][jnp.clip(jnp.ceil(6 * t - 0.5), 1, 6).astype(int) - 1]

    rule = train.OptimizerConfig(name="adam", learning_rate=0.05)
    pairs = {"x_noise": x + np.float32([0.3, -0.2]), "x_data": x}
    tuned = reflow.rectify(
        {"v": jnp.zeros((6, 2))}, table, pairs, steps_distilled=steps_distilled,
        key=jax.random.key(0), steps=60, optimizer=rule,
    )  # fmt: skip
    expected = np.zeros((6, 2))
    expected[list(learned)] = [0.3, -0.2]
    assert_allclose(tuned.raw_params["v"], expected, atol=0.02)


def test_fine_tuning_resumes_to_the_same_parameters(student, found, fine, tmp_path):
    (apply_fn, params), schedule, key = student, found.schedules[4], jax.random.key(0)
    chords = boss.chords(fine, schedule)

    def run(folder, stop_at=None):
        def fit(state, step, batches, num_steps, place):
            asked = []
            stop = lambda: asked.append(1) or len(asked) == stop_at  # noqa: E731
            return train.fit(
                state, step, batches, key=key, num_steps=num_steps, place=place,
                log_every=2, checkpoints=train.Checkpoints(folder), should_stop=stop,
            ).state  # fmt: skip

        options = {"key": key, "steps": 10, "batch_size": 32, "fit": fit}
        return boss.straighten(params, apply_fn, chords, schedule, **options)

    whole = run(tmp_path / "a")
    run(tmp_path / "b", stop_at=2)
    same(whole, run(tmp_path / "b"))


def test_sample_walks_the_grid_which_survives_json(found, refused):
    schedule, noise = found.schedules[6], prng.normal(keys(9), (2,))
    expected = boss.sample(FLOW.velocity, noise, schedule)
    assert_array_equal(expected, flows.endpoints(FLOW.velocity, noise, schedule.times))
    heun = boss.sample(FLOW.velocity, noise, schedule, method="heun")
    assert not np.allclose(heun, expected)
    grid = json.loads(json.dumps(schedule.times.tolist()))
    for times in (grid, schedule, np.float32(grid)):  # as disks and devices keep them
        velocity = boss.on_grid(FLOW.velocity, times)
        assert_array_equal(boss.sample(velocity, noise), expected)
        assert_array_equal(boss.sample(velocity, noise, schedule), expected)
    # inside a compiled program it is still in float64 on the host
    assert_allclose(jax.jit(boss.sample)(velocity, noise), expected, atol=1e-6)
    # another is refused unless allowed
    other = flows.uniform_grid(6)
    for grid in (other, found.schedules[4]):
        message = "straightened on the times.*allow_grid"
        refused(message, boss.sample, velocity, noise, grid)
    x = boss.sample(velocity, noise, other, allow_grid_mismatch=True)
    assert_array_equal(x, flows.endpoints(FLOW.velocity, noise, other))
    refused("give a grid", boss.sample, FLOW.velocity, noise)


def test_a_straightened_model_is_not_asked_at_times_it_does_not_know(found, refused):
    schedule, noise = found.schedules[4], prng.normal(keys(4), (2,))
    student = boss.on_grid(FLOW.velocity, schedule)
    for method in ("heun", "midpoint", "rk4"):
        words = f"for Euler steps, and method='{method}'"
        refused(words, boss.sample, student, noise, method=method)
        options = {"method": method, "allow_grid_mismatch": True}
        x = boss.sample(student, noise, **options)
        plain = flows.endpoints(FLOW.velocity, noise, schedule.times, method=method)
        assert_array_equal(x, plain)
        with pytest.warns(UserWarning, match=r"is asked at \["):
            flows.endpoints(student, noise, schedule.times, method=method)
    table = flows.make_table("ode", flows.uniform_grid(5))
    for walk in (
        lambda: flows.rollout(None, student, noise, table),
        lambda: flows.rk45(student, noise),
        lambda: boss.search(student, keys(4), (2,), 2, knots=3),
        lambda: boss.fine_states(student, keys(4), (2,), [schedule]),
    ):
        with pytest.warns(UserWarning, match="starts .* of Euler steps alone"):
            walk()


def test_guidance_other_than_the_schedules_warns(found):
    """A straightened model has absorbed its teacher's: none around it fits."""
    guided = flows.classifier_free_guidance(conditional, 2.0, 0.0)
    noise, cond = prng.normal(keys(4), (2,)), jnp.ones(4)
    with pytest.warns(UserWarning, match=r"at guidance scale None.*sampled at 2.0"):
        boss.sample(guided, noise, found.schedules[4], cond)
    schedule = boss.search(guided, keys(4), (2,), (2,), cond, knots=6).schedules[2]
    student = boss.on_grid(conditional, schedule)
    for fitting in (guided, student):  # a warning would be an error
        boss.sample(fitting, noise, schedule, cond)
    hidden = lambda x, t, cond: guided(x, t, cond)  # noqa: E731
    with pytest.warns(UserWarning, match=r"at guidance scale 2.0.*sampled at None"):
        boss.sample(hidden, noise, schedule, cond)
    boss.sample(hidden, noise, schedule, cond, guidance_scale=2.0)  # the user knows
    told = boss.search(hidden, keys(4), (2,), (2,), cond, knots=6, guidance_scale=2.0)
    assert told.schedules[2].guidance_scale == 2.0
    wrapped = flows.classifier_free_guidance(student, 2.0, 0.0)
    with pytest.warns(UserWarning, match="absorbed its teacher's"):
        boss.sample(wrapped, noise, schedule, cond)


def test_noise_may_be_given_in_place_of_keys(found, tmp_path, refused):
    noise = prng.normal(keys(7, 3), (2,))
    given = {"budgets": 2, "knots": 5, "polish": True}
    drawn = boss.search(FLOW.velocity, keys(7, 3), (2,), **given)
    for cache in (None, tmp_path / "costs.npz"):
        replayed = boss.search(FLOW.velocity, noise, (2,), cache=cache, **given)
        assert_array_equal(drawn.costs, replayed.costs)
        same(drawn.schedules[2].index, replayed.schedules[2].index)
    schedules = [found.schedules[4]]
    states = [
        boss.fine_states(FLOW.velocity, start, (2,), schedules).states
        for start in (keys(7, 3), noise)
    ]
    assert_array_equal(*states)
    refused("noise has shape", boss.search, FLOW.velocity, noise, (3,), 2, knots=5)


def test_one_key_and_numpy_budgets():
    key = jax.random.key(3)
    one = boss.search(FLOW.velocity, key, (2,), np.int64(2), samples=7, knots=5)
    many = boss.search(FLOW.velocity, keys(7, 3), (2,), 2, knots=5)
    assert_array_equal(one.costs, many.costs)


@pytest.mark.parametrize("cached", [False, True])
def test_bad_search_before_the_network(cached, tmp_path, refused):
    cache = tmp_path / "costs.npz" if cached else None
    noisy = flows.make_table("ode", flows.uniform_grid(4))
    noisy = noisy.replace(S=np.full(4, 0.1), stochastic=True)
    budget = r"budget K=.* must be in \[1, K_max=100\]"
    search, four = functools.partial(boss.search, print, cache=cache), keys(4)
    for budgets in (0, 101, (4, 200), -1):
        refused(budget, search, four, (2,), budgets)
    refused("budgets is empty", search, four, (2,), ())
    refused("give one a sample", search, four[:0], (2,), 2)
    refused("use fewer knots", search, four, (2,), 2, memory_limit=10.0)
    refused("Did you mean 'heun'", search, four, (2,), 2, method="hein")
    refused("leading axis must be the batch, 4", search, four, (2,), 2, np.zeros(3))
    refused("deterministic flow", search, four, (2,), 2, knots=noisy)
    refused("future_weight=0", search, four, (2,), 2, future_weight=0.0)
    raw = jnp.zeros((4, 2), jnp.uint32)
    refused("typed key", search, raw, (2,), 2, error=TypeError)


def test_velocity_of_another_shape_anywhere(found, fine, refused):
    noise, schedule = prng.normal(keys(4), (2,)), found.schedules[2]
    for velocity, message, error in (
        (lambda x, t, c: x[:, :1], r"\(4, 1\)", ValueError),
        (lambda x, t, c: jnp.ones(x.shape, jnp.int32), "int32", TypeError),
    ):
        for call, *given in (
            (boss.fine_states, keys(4), (2,), [schedule]),
            (boss.sample, noise, schedule),
            (boss.polish_schedule, noise, schedule, found.costs),
            (flows.terminal_errors, noise, noise, [schedule.times]),
        ):
            refused(message, call, velocity, *given, error=error)
    narrow = lambda params, x, t, cond: x[:, :1]  # noqa: E731
    message, chords = "the velocity has shape", boss.chords(fine, schedule)
    refused(message, boss.straightening_loss, {}, narrow, chords)
    refused(message, flows.flow_matching_loss, {}, narrow, jnp.zeros((3, 2)), keys(3))


def test_bad_schedules_chords_and_straightening(found, fine, student, refused):
    apply_fn, params = student
    schedule, key = found.schedules[2], jax.random.key(0)
    refused("give at least one", boss.fine_states, FLOW.velocity, keys(4), (2,), [])
    skipped = np.setdiff1d(np.arange(21), fine.index)[0]
    moved = boss.Schedule(np.array([0, skipped, 20]), schedule.knots, 0.0)
    refused(f"passes knot {skipped}", boss.chords, fine, moved)
    several = r"other knots \(10 steps.*than the fine.*20"
    for knots, message in ((10, several), (flows.edm_grid(20), "hash")):
        other = boss.search(FLOW.velocity, keys(5), (2,), (4,), knots=knots)
        refused(message, boss.chords, fine, other.schedules[4])
    chords = boss.chords(fine, found.schedules[4])
    refused("eval_fraction=1", boss.split, chords, key, 1.0)
    broken = {**chords, "t_next": chords["t_next"].copy()}
    broken["t_next"][7] = chords["t"][7]
    refused("chord 7", boss.split, broken, key)
    straighten = functools.partial(boss.straighten, params, apply_fn, key=key)
    refused("which is not in the schedule", straighten, chords, schedule)
    schedule, message = found.schedules[4], "weight='widht2'.*Did you mean 'width2'"
    refused(message, straighten, chords, schedule, weight="widht2")
    refused("steps=0", straighten, chords, schedule, steps=0)
    refused("ema_half_life=0", straighten, chords, schedule, ema_half_life=0.0)
    message = r"chord 7 goes from.*Is a knot.*twice"
    refused(message, straighten, broken, schedule)


def test_search_compiles_once_for_other_parameters(count_compiles):
    def search(gain):
        velocity = functools.partial(scaled, {"gain": jnp.float32(gain)})
        return boss.search(velocity, keys(6), (2,), (3,), knots=8, polish=True)

    search(1.0)
    with count_compiles() as compiled:
        search(1.1)
    assert not compiled


def test_cost_matrix_lowers_for_accelerators():
    from tmdjax.flows import step_search

    velocity, metric = map(flows.as_pytree, (FLOW.velocity, flows.squared_l2))
    knots, ones = jnp.linspace(1, 0, 6), jnp.ones(4, bool)

    @jax.jit
    def costs(data):
        given = (jax.random.wrap_key_data(data), None, knots, ones, (2,), "euler")
        return step_search._cost_sums(velocity, metric, *given)

    assert lowered(costs, jax.random.key_data(keys(4))).out_avals[0].shape == (5, 6)
