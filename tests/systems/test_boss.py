"""BOSS: invariants 11-13 of its sheet, search, sampling, and every bad input.

Invariants 1-10 and 14-16 are those of the cost matrix and the dynamic programme:
tests/flows/test_step_search.py.
"""

import functools
import itertools
import json
import logging
import warnings

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from tmdjax import data, flows, models, train
from tmdjax.core import prng
from tmdjax.models import lora
from tmdjax.systems import boss, reflow

FLOW = flows.gaussian_mixture(**data.MIXTURE)
BUDGETS = (2, 4, 6)


def keys(count, seed=0):
    return prng.sample_keys(jax.random.key(seed), count)


@pytest.fixture(scope="module")
def found():
    return bellman(budgets=BUDGETS)


@pytest.fixture(scope="module")
def fine(found):
    return boss.fine_states(
        FLOW.velocity, keys(50, 1), (2,), found.schedules.values(), micro_batch=20
    )


def bellman(velocity=FLOW.velocity, budgets=(4,), cond=None, **options):
    """A search on 20 samples and knots: one program for all of them."""
    options = {"knots": 20, **options}
    return boss.search(velocity, keys(20), (2,), budgets, cond, **options)


def mlp():
    module = models.build({"name": "mlp", "hidden": 32, "depth": 2})
    apply_fn = models.functional(module)
    shapes = (jnp.zeros((1, 2)), jnp.zeros(1), None)
    params = models.init_params(module, jax.random.key(0), *shapes)
    return apply_fn, jax.tree.map(lambda p: p + 0.01, params)


# Search -------------------------------------------------------------------------------


def test_search_finds_what_is_best_on_a_linear_flow():
    """Exact expectations give these widths, and all samples scale alike."""
    growing = lambda x, t, cond: -3.0 * x  # noqa: E731
    schedule = boss.search(growing, keys(4), (1,), (5,), knots=200).schedules[5]
    np.testing.assert_array_equal(np.diff(schedule.index), [73, 45, 33, 27, 22])


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_search_minimises_the_weighted_sum_and_tells_the_plain_one(found, weight):
    weighted = bellman(budgets=3, future_weight=weight)
    assert tuple(weighted.schedules) == (1, 2, 3)  # one number means all budgets
    costs = weighted.costs
    np.testing.assert_array_equal(costs, found.costs)
    paths = [(0, a, b, 20) for a, b in itertools.combinations(range(1, 20), 2)]
    totals = [
        sum(weight**i * costs[edge] for i, edge in enumerate(itertools.pairwise(path)))
        for path in paths
    ]
    schedule = weighted.schedules[3]
    assert tuple(schedule.index) == paths[np.argmin(totals)]
    edges = itertools.pairwise(schedule.index)
    assert schedule.cost == pytest.approx(sum(costs[edge] for edge in edges))
    np.testing.assert_allclose(schedule.times, 1 - schedule.index / 20, atol=1e-15)
    uniform = flows.path_cost(costs, flows.step_search.uniform_index(20, 3))
    assert weight != 1 or schedule.cost <= uniform


def test_guided_search_differs_and_is_labelled():
    def conditional(x, t, cond):
        return FLOW.velocity(x, t) * (1 + 0.5 * cond[:, None])

    cond = np.ones(20, np.float32)
    plain, guided = (
        bellman(flows.classifier_free_guidance(conditional, scale, 0.0), cond=cond)
        for scale in (1.0, 3.0)
    )
    assert not np.allclose(plain.costs, guided.costs)
    assert plain.schedules[4].guidance_scale == 1.0
    assert guided.schedules[4].guidance_scale == 3.0


def test_any_metric():
    def first_axis(estimate, target):
        return jnp.abs(estimate - target)[:, 0]

    found = bellman(metric=first_axis)
    noise, knots = prng.normal(keys(20), (2,)), flows.fine_knots(20)
    states = np.asarray(flows.states_at(FLOW.velocity, noise, knots, np.arange(21)))
    v = np.asarray(jax.jit(FLOW.velocity)(noise, jnp.ones(20)))
    expected = np.abs(states[0] - 0.5 * v - states[10])[:, 0].mean()
    assert found.costs[0, 10] == pytest.approx(expected, rel=1e-4)


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
    np.testing.assert_array_equal(option.index, polished.index)


# Cache --------------------------------------------------------------------------------


def scaled(params, x, t, cond):
    return params["gain"] * FLOW.velocity(x, t)


def test_cache_is_used_for_the_same_content_only(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "tmdjax")
    path = tmp_path / "costs.npz"

    def search(gain=1.0, seed=0, knots=10, **options):
        velocity = functools.partial(scaled, {"gain": jnp.float32(gain)})
        return boss.search(
            velocity, keys(8, seed), (2,), (2,), knots=knots, cache=path, **options
        ).costs

    first = search()
    stamp = path.stat().st_mtime_ns
    np.testing.assert_array_equal(search(), first)
    assert path.stat().st_mtime_ns == stamp and not caplog.records
    changes = (
        {"gain": 1.001},
        {"seed": 1},
        {"knots": 12},
        {"metric": lambda a, b: 2 * flows.squared_l2(a, b)},
        {"method": "heun"},
    )
    for change in changes:
        caplog.clear()
        other = search(**change)
        assert "holds content" in caplog.text and "computing it again" in caplog.text
        assert other.shape != first.shape or not np.array_equal(other, first)
        search()  # and back
    path.write_bytes(path.read_bytes()[:100])
    caplog.clear()
    np.testing.assert_array_equal(search(), first)
    assert "is damaged" in caplog.text


def test_cache_sees_a_model_that_differs_at_one_time_only(tmp_path):
    """A straightened network, say, at the knot it was tuned at."""

    def bent(x, t, cond):
        return FLOW.velocity(x, t) + jnp.where(t == 0.5, 1.0, 0.0)[:, None]

    path = tmp_path / "costs.npz"
    costs = [
        boss.search(v, keys(4), (2,), (2,), knots=10, cache=path).costs
        for v in (FLOW.velocity, bent)
    ]
    assert not np.array_equal(*costs)


# Straightening ------------------------------------------------------------------------


def test_chords_join_states_of_one_trajectory(found, fine):
    noise = prng.normal(keys(50, 1), (2,))
    knots = flows.fine_knots(20)
    whole = np.asarray(flows.states_at(FLOW.velocity, noise, knots, np.arange(21)))
    for budget, schedule in found.schedules.items():
        chords = boss.chords(fine, schedule)
        assert len(chords["t"]) == 50 * budget
        for i, j, k in zip(range(budget), schedule.index[:-1], schedule.index[1:]):
            rows = slice(50 * i, 50 * (i + 1))
            np.testing.assert_allclose(chords["x"][rows], whole[j], atol=1e-5)
            np.testing.assert_allclose(chords["x_next"][rows], whole[k], atol=1e-5)
            np.testing.assert_allclose(chords["t"][rows], 1 - j / 20, atol=1e-6)
            np.testing.assert_allclose(chords["t_next"][rows], 1 - k / 20, atol=1e-6)


def test_split_pools_chords_not_noises(found, fine):
    chords = boss.chords(fine, found.schedules[6])
    chords["number"] = np.arange(300)
    training, held_out = boss.split(chords, jax.random.key(0))
    assert len(held_out["t"]) == 30 and len(training["t"]) == 270
    both = np.concatenate([training["number"], held_out["number"]])
    np.testing.assert_array_equal(np.sort(both), np.arange(300))
    assert len(np.unique(held_out["t"])) > 1  # of several steps of the grid


def test_11_loss_is_zero_iff_the_velocity_is_the_chord(found, fine):
    chords = boss.chords(fine, found.schedules[4])
    width = chords["t"] - chords["t_next"]
    exact = (chords["x"] - chords["x_next"]) / width[:, None]

    def table(params, x, t, cond):
        return params["v"]

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

    a, b = jax.random.split(jax.random.key(0))
    params = {
        "a": jax.random.normal(a, (2, 5), jnp.float64),
        "b": jax.random.normal(b, (5, 2), jnp.float64),
    }
    chords = boss.chords(fine, found.schedules[4])
    chords = {name: array[:8].astype(np.float64) for name, array in chords.items()}

    def loss(params):
        values, _ = boss.straightening_loss(params, apply_fn, chords, weight=weight)
        return values.mean()

    jax.test_util.check_grads(
        jax.jit(loss), (params,), order=1, modes=["rev"], rtol=1e-6
    )


def test_11_one_step_is_reflow_at_pure_noise():
    apply_fn, params = mlp()
    rng = np.random.default_rng(2)
    noise, ends = (jnp.asarray(rng.normal(size=(16, 2)), jnp.float32) for _ in "ab")
    chords = {"x": noise, "x_next": ends, "t": jnp.ones(16), "t_next": jnp.zeros(16)}

    @jax.jit
    def both(params):
        lines = flows.flow_matching_loss(
            params, apply_fn, ends, keys(16), x_noise=noise,
            time_sampler=flows.discrete_time([1.0]),
        )  # fmt: skip
        return boss.straightening_loss(params, apply_fn, chords)[0], lines[0]

    np.testing.assert_allclose(*both(params), rtol=1e-5)


def test_12_a_table_recovers_the_fine_states(found, fine):
    """A free value for each step and sample, fitted: Euler telescopes exactly."""
    schedule = found.schedules[4]
    chords = boss.chords(fine, schedule)
    samples, steps = 50, 4

    def table(params, x, t, cond):
        return params["v"][cond]

    batch = {**chords, "cond": np.arange(samples * steps)}
    params = {"v": jnp.zeros((samples * steps, 2))}
    rate = 0.9 * samples * steps  # of a quadratic with curvature 1 / (samples steps)

    @jax.jit
    def update(params):
        grad = jax.grad(lambda p: boss.straightening_loss(p, table, batch)[0].mean())(
            params
        )
        return {"v": params["v"] - rate * grad["v"]}

    for _ in range(60):
        params = update(params)
    x, kept = jnp.asarray(fine.states[0]), [fine.states[0]]
    for k, (t, t_next) in enumerate(zip(schedule.times[:-1], schedule.times[1:])):
        x = x - (t - t_next) * params["v"][k * samples : (k + 1) * samples]
        kept.append(np.asarray(x))
    place = np.searchsorted(fine.index, schedule.index)
    scale = np.abs(fine.states).max()
    assert np.abs(np.stack(kept) - fine.states[place]).max() < 1e-5 * scale


def test_13_all_knots_leave_the_teacher_as_it_is():
    schedule = bellman(budgets=(20,)).schedules[20]
    np.testing.assert_array_equal(schedule.index, np.arange(21))
    fine = boss.fine_states(FLOW.velocity, keys(20), (2,), [schedule])
    teacher = lambda params, x, t, cond: FLOW.velocity(x, t)  # noqa: E731
    loss, _ = boss.straightening_loss({}, teacher, boss.chords(fine, schedule))
    assert loss.max() < 1e-8


def test_13_network_time_is_remapped_once():
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
    x = prng.normal(keys(5), (2,))
    t = jnp.linspace(0.0, 1.0, 5)
    expected = FLOW.velocity(x, t)
    np.testing.assert_allclose(velocity(x, t, None), expected, rtol=1e-3, atol=1e-3)
    schedule = found.schedules[n]
    fine = boss.fine_states(velocity, keys(10), (2,), [schedule])
    loss, _ = boss.straightening_loss(params, wrapped, boss.chords(fine, schedule))
    assert loss.max() < 1e-8
    with pytest.raises(ValueError, match="eps=1"):
        models.rectified_flow(original, 1.0)


@pytest.fixture(scope="module")
def student():
    apply_fn, params = mlp()

    def corrected(params, x, t, cond=None):
        return FLOW.velocity(x, t) + apply_fn(params, x, t, None)

    return corrected, params


@pytest.fixture(scope="module")
def straightened(found, student):
    """Chords in two parts, and what straightening on the first made of the student."""
    apply_fn, params = student
    schedule = found.schedules[4]
    fine = boss.fine_states(FLOW.velocity, keys(500, 1), (2,), [schedule])
    training, held_out = boss.split(boss.chords(fine, schedule), jax.random.key(0))
    tuned = boss.straighten(
        params,
        apply_fn,
        training,
        schedule,
        key=jax.random.key(1),
        steps=300,
        batch_size=128,
        optimizer=train.OptimizerConfig(name="adam", learning_rate=3e-3),
    )
    return held_out, tuned


def test_straightening_brings_few_steps_to_the_fine_samples(
    found, student, straightened
):
    apply_fn, params = student
    held_out, tuned = straightened
    noise = prng.normal(keys(300, 5), (2,))
    fine = np.asarray(flows.endpoints(FLOW.velocity, noise, flows.fine_knots(20)))
    loss = jax.jit(lambda p: boss.straightening_loss(p, apply_fn, held_out)[0].mean())
    errors = []
    for p in (params, tuned.params):
        velocity = functools.partial(apply_fn, p)
        x = np.asarray(boss.sample(velocity, noise, found.schedules[4]))
        errors.append((float(loss(p)), np.square(x - fine).sum(1).mean()))
    assert (np.array(errors[1]) < 0.6 * np.array(errors[0])).all()
    averaged, last = (jax.tree.leaves(p)[0] for p in (tuned.params, tuned.raw_params))
    assert not np.allclose(averaged, last)
    # what comes out carries its grid
    velocity = tuned.velocity(apply_fn)
    with pytest.raises(ValueError, match="straightened on the times"):
        boss.sample(velocity, noise, found.schedules[6])
    np.testing.assert_array_equal(boss.sample(velocity, noise), x)


def test_straightening_by_lora_trains_adapters_alone(found, fine, student):
    corrected, params = student
    adapters = lora.init(jax.random.key(3), params, 2, ["kernel"])
    adapted = lora.apply_fn(corrected, params, 2.0)
    chords = boss.chords(fine, found.schedules[2])
    tuned = boss.straighten(
        adapters,
        adapted,
        chords,
        found.schedules[2],
        key=jax.random.key(1),
        steps=50,
        batch_size=64,
    )
    assert jax.tree.structure(tuned.params) == jax.tree.structure(adapters)
    loss = jax.jit(lambda p: boss.straightening_loss(p, adapted, chords)[0].mean())
    assert loss(tuned.params) < loss(adapters)


@pytest.mark.parametrize("steps_distilled, learned", [(None, range(6)), (3, [1, 3, 5])])
def test_reflow_regresses_onto_lines_at_its_times_alone(steps_distilled, learned):
    """A table over six intervals of time, and pairs that are all one step apart."""
    x = np.random.default_rng(0).normal(size=(500, 2)).astype(np.float32)

    def table(params, x, t, cond):
        return params["v"][jnp.clip(jnp.ceil(6 * t - 0.5), 1, 6).astype(int) - 1]

    tuned = reflow.straighten(
        {"v": jnp.zeros((6, 2))},
        table,
        {"x_noise": x + np.float32([0.3, -0.2]), "x_data": x},
        steps_distilled=steps_distilled,
        key=jax.random.key(0),
        steps=60,
        optimizer=train.OptimizerConfig(name="adam", learning_rate=0.05),
    )
    expected = np.zeros((6, 2))
    expected[list(learned)] = [0.3, -0.2]
    np.testing.assert_allclose(tuned.raw_params["v"], expected, atol=0.02)


def test_fine_tuning_resumes_to_the_same_parameters(student, found, fine, tmp_path):
    apply_fn, params = student
    chords = boss.chords(fine, found.schedules[4])

    def run(folder, stop_at=None):
        def fit(state, step, batches, num_steps, place):
            asked = []
            result = train.fit(
                state,
                step,
                batches,
                key=jax.random.key(0),
                num_steps=num_steps,
                place=place,
                log_every=2,
                checkpoints=train.Checkpoints(folder),
                should_stop=lambda: asked.append(1) or len(asked) == stop_at,
            )
            return result.state

        return boss.straighten(
            params,
            apply_fn,
            chords,
            found.schedules[4],
            key=jax.random.key(0),
            steps=10,
            batch_size=32,
            fit=fit,
        )

    whole = run(tmp_path / "a")
    run(tmp_path / "b", stop_at=2)
    again = run(tmp_path / "b")
    jax.tree.map(np.testing.assert_array_equal, whole, again)


# Sampling carries its grid ------------------------------------------------------------


def test_sample_walks_the_grid(found):
    noise = prng.normal(keys(9), (2,))
    x = boss.sample(FLOW.velocity, noise, found.schedules[4])
    y = flows.endpoints(FLOW.velocity, noise, found.schedules[4].times)
    np.testing.assert_array_equal(x, y)
    heun = boss.sample(FLOW.velocity, noise, found.schedules[4], method="heun")
    assert not np.allclose(heun, x)


def test_grid_survives_json_and_is_the_default(found):
    schedule = found.schedules[6]
    grid = json.loads(json.dumps(schedule.times.tolist()))
    noise = prng.normal(keys(9), (2,))
    expected = boss.sample(FLOW.velocity, noise, schedule)
    for times in (grid, schedule, np.float32(grid)):  # as disks and devices keep them
        velocity = boss.on_grid(FLOW.velocity, times)
        np.testing.assert_array_equal(boss.sample(velocity, noise), expected)
        np.testing.assert_array_equal(boss.sample(velocity, noise, schedule), expected)


def test_another_grid_is_refused_unless_allowed(found):
    noise = prng.normal(keys(9), (2,))
    velocity = boss.on_grid(FLOW.velocity, found.schedules[6])
    other = flows.uniform_grid(6)
    for refused in (other, found.schedules[4]):
        with pytest.raises(ValueError, match="straightened on the times.*allow_grid"):
            boss.sample(velocity, noise, refused)
    x = boss.sample(velocity, noise, other, allow_grid_mismatch=True)
    np.testing.assert_array_equal(x, flows.endpoints(FLOW.velocity, noise, other))
    with pytest.raises(ValueError, match="give a grid"):
        boss.sample(FLOW.velocity, noise)


def conditional(x, t, cond):
    return FLOW.velocity(x, t) + cond[:, None]


def test_another_guidance_scale_warns(found):
    guided = flows.classifier_free_guidance(conditional, 2.0, 0.0)
    noise, cond = prng.normal(keys(4), (2,)), jnp.ones(4)
    with pytest.warns(UserWarning, match=r"at guidance scale 1.0.*sampled at 2.0"):
        boss.sample(guided, noise, found.schedules[4], cond)
    own = boss.search(guided, keys(4), (2,), (2,), cond, knots=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        boss.sample(guided, noise, own.schedules[2], cond)


def test_a_straightened_model_has_absorbed_guidance():
    """Its teacher's schedule fits it unguided; guidance around it is a mistake."""
    guided = flows.classifier_free_guidance(conditional, 2.0, 0.0)
    noise, cond = prng.normal(keys(4), (2,)), jnp.ones(4)
    schedule = boss.search(guided, keys(4), (2,), (2,), cond, knots=6).schedules[2]
    student = boss.on_grid(conditional, schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        boss.sample(student, noise, schedule, cond)
    wrapped = flows.classifier_free_guidance(student, 2.0, 0.0)
    with pytest.warns(UserWarning, match="absorbed its teacher's"):
        boss.sample(wrapped, noise, schedule, cond)


# Bad inputs ---------------------------------------------------------------------------


def never(x, t, cond):
    raise AssertionError("the budget is checked before the network is traced")


def test_one_key_and_numpy_budgets():
    key = jax.random.key(3)
    one = boss.search(FLOW.velocity, key, (2,), np.int64(2), samples=7, knots=5)
    many = boss.search(FLOW.velocity, keys(7, 3), (2,), 2, knots=5)
    np.testing.assert_array_equal(one.costs, many.costs)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"budgets": ()}, ValueError, "budgets is empty"),
        ({"keys": jnp.zeros((4, 2), jnp.uint32)}, TypeError, "typed key"),
        ({"keys": keys(4)[:0]}, ValueError, "give one a sample"),
        ({"memory_limit": 10.0}, ValueError, "use fewer knots"),
        ({"method": "hein"}, ValueError, "Did you mean 'heun'"),
        ({"cond": np.zeros(3)}, ValueError, "leading axis must be the batch, 4"),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_bad_search_before_the_network(change, error, message, cached, tmp_path):
    given = {"keys": keys(4), "budgets": 2, **change}
    cache = tmp_path / "costs.npz" if cached else None
    with pytest.raises(error, match=message):
        boss.search(
            never,
            given.pop("keys"),
            (2,),
            given.pop("budgets"),
            given.pop("cond", None),
            cache=cache,
            **given,
        )


@pytest.mark.parametrize(
    "velocity, message",
    [
        (lambda x, t, c: x[:, :1], r"\(4, 1\)"),
        (lambda x, t, c: jnp.ones(x.shape, jnp.int32), "int32"),
    ],
)
def test_velocity_of_another_shape_anywhere(velocity, message, found):
    noise = prng.normal(keys(4), (2,))
    schedule = found.schedules[2]
    for call in (
        lambda: boss.fine_states(velocity, keys(4), (2,), [schedule]),
        lambda: boss.sample(velocity, noise, schedule),
        lambda: boss.polish_schedule(velocity, noise, schedule, found.costs),
        lambda: flows.terminal_errors(velocity, noise, noise, [schedule.times]),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_losses_refuse_another_shape(found, fine):
    chords = boss.chords(fine, found.schedules[2])

    def narrow(params, x, t, cond):
        return x[:, :1]

    with pytest.raises(ValueError, match="the velocity has shape"):
        boss.straightening_loss({}, narrow, chords)
    with pytest.raises(ValueError, match="the velocity has shape"):
        flows.flow_matching_loss({}, narrow, jnp.zeros((3, 2)), keys(3))


@pytest.mark.parametrize("budgets", [0, 101, (4, 200), -1])
def test_budget_before_anything_else(budgets):
    with pytest.raises(ValueError, match=r"budget K=.* must be in \[1, K_max=100\]"):
        boss.search(never, keys(4), (2,), budgets)


def test_stochastic_table_is_refused():
    table = flows.make_table("ode", flows.uniform_grid(4))
    noisy = table.replace(S=np.full(4, 0.1), stochastic=True)
    with pytest.raises(ValueError, match="deterministic flow"):
        boss.search(never, keys(4), (2,), 2, knots=noisy)


def test_schedule_of_other_knots_is_refused(fine):
    other = boss.search(FLOW.velocity, keys(5), (2,), (4,), knots=10).schedules[4]
    with pytest.raises(ValueError, match=r"other knots \(10 steps.*than the fine.*20"):
        boss.chords(fine, other)
    edm = boss.search(FLOW.velocity, keys(5), (2,), (4,), knots=flows.edm_grid(20))
    with pytest.raises(ValueError, match="hash"):
        boss.chords(fine, edm.schedules[4])


def test_schedule_through_knots_not_kept_is_refused(found, fine):
    schedule = found.schedules[2]
    skipped = np.setdiff1d(np.arange(21), fine.index)[0]
    moved = boss.Schedule(np.array([0, skipped, 20]), schedule.knots, 0.0)
    with pytest.raises(ValueError, match=f"passes knot {skipped}"):
        boss.chords(fine, moved)


def test_no_schedule():
    with pytest.raises(ValueError, match="give at least one"):
        boss.fine_states(FLOW.velocity, keys(4), (2,), [])


@pytest.mark.parametrize(
    "searched, options, message",
    [
        (2, {}, "which is not in the schedule"),
        (4, {"weight": "widht2"}, "weight='widht2'.*Did you mean 'width2'"),
        (4, {"steps": 0}, "steps=0"),
        (4, {"ema_half_life": 0.0}, "ema_half_life=0"),
    ],
)
def test_bad_straightening(searched, options, message, found, fine, student):
    apply_fn, params = student
    chords, schedule = boss.chords(fine, found.schedules[4]), found.schedules[searched]
    options = {"key": jax.random.key(0), **options}
    with pytest.raises(ValueError, match=message):
        boss.straighten(params, apply_fn, chords, schedule, **options)


def test_bad_chords_and_weights(found, fine, student):
    apply_fn, params = student
    chords, key = boss.chords(fine, found.schedules[4]), jax.random.key(0)
    with pytest.raises(ValueError, match="eval_fraction=1"):
        boss.split(chords, key, 1.0)
    chords["t_next"][7] = chords["t"][7]
    with pytest.raises(ValueError, match=r"chord 7 goes from.*Is a knot.*twice"):
        boss.straighten(params, apply_fn, chords, found.schedules[4], key=key)
    with pytest.raises(ValueError, match="chord 7"):
        boss.split(chords, key)
    with pytest.raises(ValueError, match="future_weight=0"):
        bellman(never, future_weight=0.0)


# Hot functions ------------------------------------------------------------------------


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

    def costs(key_data):
        return step_search._cost_sums(
            flows.as_pytree(FLOW.velocity),
            flows.as_pytree(flows.squared_l2),
            jax.random.wrap_key_data(key_data),
            None,
            jnp.linspace(1, 0, 6),
            jnp.ones(4, bool),
            (2,),
            "euler",
        )

    exported = jax.export.export(jax.jit(costs), platforms=["cuda", "tpu"])(
        jax.random.key_data(keys(4))
    )
    assert exported.out_avals[0].shape == (5, 6)
