"""PDE-Refiner: the invariants of its sheet, by number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import lowered
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import models
from tmdjax.core import prng
from tmdjax.data import pde
from tmdjax.systems import pde_refiner
from tmdjax.systems.pde_refiner import PDERefiner
from tmdjax.train import neural_solvers as solvers

BATCH, POINTS = 5, 6
KEYS = prng.sample_keys(jax.random.key(3), BATCH)
RNG = np.random.default_rng(0)
STATES = np.float32(RNG.normal(size=(BATCH, 2, POINTS, 1)))
VARIANTS = pytest.mark.parametrize("variant", ["reference", "paper"])
LINEAR = {"u": np.float32(0.3), "x": np.float32(-0.4), "t": np.float32(0.2)}


def linear(params, x, t, cond):
    """Answers by hand: any network would do."""
    out = params["u"] * x[..., :1] + params["x"] * x[..., 1:]
    return jnp.tanh(out + params["t"] * t[:, None, None])


def answer(weight=0.3):
    return (STATES[:, 1] - STATES[:, 0]) / weight


def test_the_schedule_is_the_references_1():
    schedule = pde_refiner.preset().noise_schedule()
    assert_allclose(schedule.beta, [4e-7, 5.4288e-5, 7.3681e-3, 1], rtol=1e-4)
    kept = schedule.alpha_bar
    assert_allclose(kept[:3], [0.9999996, 0.9999453, 0.9925776], rtol=1e-7)
    assert kept[3] == 0 and np.all(np.diff(kept) < 0)
    for variance in (2e-7, 4e-7, 1e-3):
        settings = PDERefiner(min_variance=variance)
        assert settings.noise_schedule().beta[0] == variance
        root = settings.rows(0)["noise"]
        assert root.dtype == jnp.float32
        assert_allclose(float(root) ** 2, variance, rtol=1e-6)


@VARIANTS
@pytest.mark.parametrize("options", [{}, {"refinements": 1}, {"schedule": "cosine"}])
def test_targets_stand_for_the_answer_2_6(variant, options):
    if variant == "paper" and "schedule" in options:
        return
    settings = PDERefiner(variant=variant, **options)
    y, e = RNG.normal(size=(2, 7))
    columns = settings.columns()
    k = {name: column[:, None] for name, column in columns.items()}
    x = k["data"] * y + k["noise"] * e
    target = k["to_noise"] * e + k["to_data"] * y
    assert_allclose(k["keep_x"] * x + k["take"] * target, np.tile(y, (len(x), 1)))
    # the noise of the next input is that of its level, at an exact answer
    before, after = slice(1, None), slice(None, -1)
    from_x = columns["from_x"][before]
    mean = columns["from_data"][before] + from_x * columns["data"][before]
    variance = (from_x * columns["noise"][before]) ** 2 + columns["std"][before] ** 2
    assert_allclose(mean, columns["data"][after])
    assert_allclose(np.sqrt(variance), columns["noise"][after])
    last = {name: columns[name][0] for name in ("from_data", "from_x", "std")}
    assert_allclose(list(last.values()), [1, 0, 0])
    if variant == "reference":
        assert_allclose(
            np.sqrt(1 - k["data"] ** 2) * x + k["data"] * target, [e] * len(x)
        )


def oracle(settings):
    """The exact answer to any input, for a true one that comes as the condition."""
    columns = {k: jnp.float32(c) for k, c in settings.columns().items()}

    def apply_fn(params, x, t, y):
        level = jnp.int32(jnp.round(t * settings.refinements))
        row = {k: c[level][:, None, None] for k, c in columns.items()}
        x = x[..., 1:]
        return (y - row["keep_x"] * x) / row["take"]

    return apply_fn


@VARIANTS
@pytest.mark.parametrize("count", [1, 3])
def test_an_exact_network_gives_the_next_state_3(variant, count):
    settings = PDERefiner(refinements=count, variant=variant, min_variance=1e-4)
    step = jax.jit(
        lambda keys: settings.step({}, oracle(settings), STATES[:, :1], keys, answer())
    )
    found = step(KEYS)
    assert_allclose(found, STATES[:, 1], atol=1e-5)
    assert_array_equal(found, step(KEYS))


def by_hand(settings, noise):
    """The published step, level by level, in float64; noise [K + 1, ...]."""
    count, s = settings.refinements, settings.min_variance
    beta = s ** ((count - np.arange(count + 1)) / count)
    bar = np.cumprod(1 - beta)
    u, x, z = STATES[:, 0].astype(float), noise[0], iter(noise[1:])
    if settings.initial_input == "zeros":
        x = 0 * x

    def network(x, k):
        out = LINEAR["u"] * u + LINEAR["x"] * x + LINEAR["t"] * k / count
        return np.tanh(out)

    if settings.variant == "paper":
        y = network(x, count)
        for k in range(count - 1, -1, -1):
            sigma = np.sqrt(s) ** ((count - k) / count)
            x = y + sigma * next(z)
            y = x - sigma * network(x, k)
        return u + settings.difference_weight * y
    for k in range(count, -1, -1):
        v = network(x, k)
        y = np.sqrt(bar[k]) * x - np.sqrt(1 - bar[k]) * v
        if k == 0:
            return u + settings.difference_weight * y
        down, b = bar[k - 1], beta[k]
        mean = np.sqrt(down) * b / (1 - bar[k]) * y
        mean += np.sqrt(1 - b) * (1 - down) / (1 - bar[k]) * x
        x = mean + np.sqrt((1 - down) / (1 - bar[k]) * b) * next(z)


@VARIANTS
@pytest.mark.parametrize("initial", ["noise", "zeros"])
def test_a_step_is_the_published_one_5(variant, initial):
    settings = PDERefiner(3, 1e-2, variant=variant, initial_input=initial)
    noise = np.float32(RNG.normal(size=(4, BATCH, POINTS, 1)))

    @jax.jit
    def run(keys, noise):
        step = functools.partial(settings.step, LINEAR, linear, STATES[:, :1])
        return step(keys, noise=noise), step(keys)

    given, drawn = run(KEYS, noise)
    assert_allclose(given, by_hand(settings, noise), atol=1e-5)
    # what a key draws is what is given: the input, then one a call but the last
    shape = (POINTS, 1)
    own = [prng.normal(prng.fold_in(KEYS, step), shape) for step in range(4)]
    assert_allclose(drawn, by_hand(settings, np.stack(own)), atol=1e-5)
    other = run(KEYS[::-1], noise)[1]
    assert np.abs(other - drawn).max() > 1e-3
    assert_array_equal(run(KEYS[::-1], noise)[0], given)


@jax.jit
def losses(level, noise):
    """Of networks that say nothing, everything, and something; d and 1 / d."""
    batch = {"states": STATES}
    settings, half = PDERefiner(), PDERefiner(difference_weight=0.15)
    zeros = PDERefiner(initial_input="zeros")
    given = {"level": level, "noise": noise}

    def quiet(params, x, t, cond):
        return 0 * x[..., 1:]

    def right(params, x, t, cond):
        return oracle(settings)(params, x, t, answer())

    def blind(params, x, t, cond):
        return 0.7 * x[..., 1:] + t[:, None, None]

    loss = settings.loss({}, quiet, batch, KEYS, **given)
    return {
        "quiet": loss,
        "half": half.loss({}, quiet, batch, KEYS, **given),
        "right": settings.loss({}, right, batch, KEYS, **given),
        "zeros": zeros.loss({}, blind, batch, KEYS, **given),
        "drawn": settings.loss({}, quiet, batch, KEYS),
    }


def test_losses_of_known_networks_4_7():
    y, noise = answer(), np.float32(RNG.normal(size=(BATCH, POINTS, 1)))
    first = losses(np.full(BATCH, 3), noise)
    assert_allclose(first["quiet"], np.square(y).mean((1, 2)), rtol=1e-5)
    assert_allclose(first["half"], 4 * first["quiet"], rtol=1e-5)
    assert_allclose(first["zeros"], np.square(1 + y).mean((1, 2)), rtol=1e-5)
    assert_allclose(first["right"], 0, atol=1e-9)
    levels = np.array([0, 0, 1, 2, 3])
    found = losses(levels, noise)
    small = np.square(noise).mean((1, 2))
    assert_allclose(found["quiet"][:2], small[:2], rtol=0.02)  # abar is nearly 1
    assert_allclose(found["right"], 0, atol=1e-5)
    assert np.all(np.abs(found["drawn"] - found["quiet"]) > 1e-4)


def test_every_level_is_drawn_as_often_as_another_4():
    keys = prng.sample_keys(jax.random.key(0), 4000)
    states = np.zeros((4000, 2, 1, 1), np.float32)

    def level(params, x, t, cond):
        return jnp.broadcast_to(t[:, None, None], (4000, 1, 1))

    noise = np.zeros((4000, 1, 1), np.float32)
    loss = jax.jit(
        lambda: PDERefiner().loss({}, level, {"states": states}, keys, noise=noise)
    )()
    counts = [np.sum(np.isclose(loss, (k / 3) ** 2)) for k in range(4)]
    assert sum(counts) == 4000 and np.abs(np.array(counts) - 1000).max() < 120


def test_without_refinement_it_is_a_regression_4():
    gain = {"a": 0.4}
    settings = PDERefiner(0, allow_no_refinement=True, initial_input="zeros")
    assert len(settings.columns()["t"]) == 1 and settings.columns()["t"][0] == 1
    plain = solvers.OneStep()

    def regress(params, x, t, cond):
        return params["a"] * x[..., :1] + t[:, None, None]

    def negative(params, x, t, cond):
        return -regress(params, x, t, cond)

    @jax.jit
    def both(batch):
        one = plain.loss(gain, regress, batch), plain.step(gain, regress, STATES[:, :1])
        refined = settings.loss(gain, negative, batch, KEYS)
        return one, (refined, settings.step(gain, negative, STATES[:, :1], KEYS))

    one, refined = both({"states": STATES})
    assert_allclose(refined[0], one[0], rtol=1e-5)
    assert_allclose(refined[1], one[1], rtol=1e-5)
    target = answer() - (0.4 * STATES[:, 0] + 1)
    assert_allclose(one[0], np.square(target).mean((1, 2)), rtol=1e-5)


def test_gradients_pass_through_unrolled_steps_and_not_when_pushed_forward_15():
    states = np.float32(RNG.normal(size=(BATCH, 3, POINTS, 1)))

    def gradient(**options):
        calls = iter(("first", "second"))

        def network(params, x, t, cond):
            return params[next(calls)] * x

        settings = solvers.OneStep(steps=2, **options)
        return jax.grad(lambda p: settings.loss(p, network, {"states": states}).sum())(
            {"first": 0.2, "second": 0.5}
        )

    both = jax.jit(lambda: (gradient(), gradient(pushforward=True)))
    unrolled, pushed = both()
    assert pushed["first"] == 0 and abs(unrolled["first"]) > 0.1
    # by hand: u1 = u0 (1 + 0.2 d), the error of the second step alone
    d, (u0, _, u2) = 0.3, np.moveaxis(states, 1, 0)
    u1 = u0 * (1 + 0.2 * d)
    error = 0.5 * u1 - (u2 - u1) / d
    assert_allclose(pushed["second"], (2 * error * u1).mean((1, 2)).sum(), rtol=1e-4)


def test_a_correction_is_added_to_what_a_solver_says():
    """The network is given the last state and the solver's next one; two steps."""
    states, d = np.float32(RNG.normal(size=(BATCH, 3, POINTS, 1))), 0.05

    def solver(u):
        return 0.9 * u + 0.2 * jnp.roll(u, 1, 1)

    def network(params, x, t, cond):
        return params["u"] * x[..., :1] + params["x"] * x[..., 1:]

    settings = solvers.OneStep(d, steps=2, solver=solver)

    @jax.jit
    def run(states):
        loss = settings.loss(LINEAR, network, {"states": states})
        return loss, settings.step(LINEAR, network, states[:, :1])

    def by_hand(u):
        coarse = 0.9 * u + 0.2 * np.roll(u, 1, 1)
        answer = LINEAR["u"] * u + LINEAR["x"] * coarse
        return coarse, answer, coarse + d * answer

    loss, after = run(states)
    u, total = states[:, 0], 0
    for target in (states[:, 1], states[:, 2]):
        coarse, answer, u = by_hand(u)
        total = total + np.square(answer - (target - coarse) / d).mean((1, 2)) / 2
    assert_allclose(after, by_hand(states[:, 0])[2], rtol=1e-5, atol=1e-6)
    assert_allclose(loss, total, rtol=1e-4)


@pytest.mark.parametrize("sides", [(8,), (8, 6)])
def test_the_sobolev_norm_weighs_waves_15(sides):
    """An error of n waves counts (1 + n^2)^p; constants count as they are."""
    x = np.arange(8) / 8 * 2 * np.pi
    wave = np.float32(np.cos(3 * x) + 0.5).reshape(8, *(1,) * (len(sides) - 1))
    target = np.broadcast_to(wave, sides)[None, None, ..., None]
    states = np.concatenate([0 * target, target], 1)

    def nothing(params, x, t, cond):
        return 0 * x

    def loss(p):
        settings = solvers.OneStep(difference_weight=None, sobolev=p)
        return settings.loss({}, nothing, {"states": states})

    plain, weighed = jax.jit(lambda: (loss(0.0), loss(1.5)))()
    assert_allclose(plain, 0.5 + 0.25, rtol=1e-6)
    assert_allclose(weighed, 0.5 * 10**1.5 + 0.25, rtol=1e-5)


def test_a_rollout_feeds_its_own_states_16_17():
    settings = PDERefiner(1, 1e-2, history=2)
    start = np.float32(RNG.normal(size=(BATCH, 2, POINTS, 1)))

    def network(params, x, t, cond):
        older, newer, noised = jnp.split(x, 3, -1)
        return jnp.tanh(0.5 * newer - 0.3 * older + 0.2 * noised)

    step = functools.partial(settings.step, {}, network)

    @jax.jit
    def run(start):
        options = {"members": 2, "bound": 1e3}
        whole = solvers.ensemble_rollout(step, start, KEYS, 3, **options)
        history, states = start, []
        for i in range(3):
            state = step(history, prng.fold_in(prng.fold_in(KEYS, 1), i))
            states.append(state)
            history = jnp.stack([history[:, 1], state], 1)
        return whole, jnp.stack(states)

    whole, states = run(start)
    assert_allclose(whole.outputs[1], states, atol=1e-6)
    assert np.abs(whole.outputs[0] - whole.outputs[1]).max() > 1e-4
    assert_array_equal(whole.first_bad, np.full((2, BATCH), 3))
    assert whole.valid.shape == (2, 3, BATCH) and np.all(whole.valid)
    time = solvers.reliable_time(whole.outputs, dt=np.full(BATCH, 0.8))
    assert np.all((time.time > 0) & (time.time <= 2.4 + 1e-9))
    same = solvers.reliable_time(np.stack([states] * 3), dt=0.8)
    assert np.all(same.censored)
    assert_allclose(same.time, 2.4)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_horizon_16():
    step = functools.partial(PDERefiner(1).step, LINEAR, linear)

    def needed(length):
        def last(start):
            return solvers.rollout(step, start, KEYS, length).amplitude

        compiled = jax.jit(last).lower(STATES[:, :1]).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    growth = (needed(220) - needed(20)) / 200
    assert growth <= 2 * 4 * BATCH  # bytes: an amplitude a row is kept, and no state
    assert 2 * 4 * BATCH < STATES[:, 0].nbytes


def test_conditions_are_scaled_as_published_10(refused):
    found = pde.conditions(np.array([0.2, 0.15]), np.array([0.25, 0.3]))
    assert_allclose(found, [[5, 5], [0, 10]], atol=1e-4)
    three = pde.conditions(np.array([0.2]), np.array([0.25]), np.array([1.5]))
    assert_allclose(three, [[5, 5, 100]], atol=1e-4)
    outside = np.array([0.2, 0.3]), np.array([0.25, 0.25])
    words = r"dt has 1 value\(s\) outside \[0.15, 0.25\], the first is 0.3"
    refused(words, pde.conditions, *outside)
    free = pde.conditions(*outside, allow_extrapolation=True)
    assert_allclose(free[1], [15, 5], atol=1e-4)
    refused("viscosity has shape", pde.conditions, *outside[1:] * 2, np.ones(3))


def test_levels_are_counted_from_both_ends(refused):
    assert [pde_refiner.paper_level(k, 3) for k in range(4)] == [3, 2, 1, 0]
    refused("level=4 is outside", pde_refiner.paper_level, 4, 3)


def test_training_lowers_for_accelerators():
    network = models.DilatedResNet(4, 1, scalars=2, out_channels=1)
    x, cond = jnp.zeros((BATCH, POINTS, 2)), jnp.ones((BATCH, 2))
    shapes = jax.eval_shape(
        lambda key: network.init(key, x, jnp.ones(BATCH), cond),
        jax.random.key(0),
    )["params"]

    def update(params, states):
        def total(params):
            batch = {"states": states, "cond": cond}
            return (
                PDERefiner()
                .loss(params, models.functional(network), batch, KEYS)
                .mean()
            )

        gradient = jax.grad(total)(params)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradient)

    lowered(jax.jit(update), shapes, STATES)


def test_bad_settings_and_inputs(refused):
    refused("refinements=-1 must be at least 1", PDERefiner, -1)
    refused("refinements=0 must be at least 1", PDERefiner, 0)
    for variance in (0, 1, -1e-3):
        refused(r"min_variance=.* is outside \(0, 1\)", PDERefiner, 3, variance)
    refused("difference_weight=0 is outside", PDERefiner, difference_weight=0)
    refused("has no setting 'k'", pde_refiner.preset, k=4, error=TypeError)
    refused("history=0 must be", PDERefiner, history=0)
    refused("variant='papers' is not one of", PDERefiner, variant="papers")
    refused("initial_input='zero'.*'zeros'", PDERefiner, initial_input="zero")
    refused("of variant='reference'", PDERefiner, variant="paper", schedule="cosine")
    with pytest.warns(UserWarning, match="below the resolution of states"):
        PDERefiner(min_variance=1e-10)
    refused("steps=1 must be at least 2", solvers.OneStep, pushforward=True)
    refused(r"sobolev=-1 is outside", solvers.OneStep, sobolev=-1)
    words = "difference_weight=None beside a solver: .*give the deviation"
    refused(words, solvers.OneStep, None, solver=lambda u: u)
    wrong = solvers.OneStep(solver=lambda u: u[:, 1:])
    words = "the solver's next state has shape"
    refused(words, wrong.step, LINEAR, linear, STATES[:, :1])
    loss = PDERefiner().loss
    half = jnp.asarray(STATES, jnp.bfloat16)
    words = "states are bfloat16; .*give float32"
    refused(words, loss, LINEAR, linear, {"states": half}, KEYS, error=TypeError)
    three = {"states": np.concatenate([STATES, STATES[:, :1]], 1)}
    refused(r"take 2 frame\(s\)", loss, LINEAR, linear, three, KEYS)
    given = LINEAR, linear, {"states": STATES}, KEYS
    for level, words in ((4, "level=4 is outside"), (-1, "level=-1 is outside")):
        refused(words, loss, *given, level=np.full(BATCH, level))
    refused(r"level has shape \(1,\)", loss, *given, level=np.ones(1, int))
    few = np.zeros((3, BATCH, POINTS, 1), np.float32)  # one is missing
    words = r"noise has shape \(3, 5, 6, 1\); refinements=3 take \(4, 5, 6, 1\)"
    step = PDERefiner().step
    refused(words, step, LINEAR, linear, STATES[:, :1], KEYS, noise=few)

    def short(params, x, t, cond):
        return x.astype(jnp.bfloat16)[..., 1:]

    def wide(params, x, t, cond):
        return x

    batch = {"states": STATES}
    words = "answers in bfloat16"
    refused(words, loss, LINEAR, short, batch, KEYS, error=TypeError)
    refused("the answer has shape", loss, LINEAR, wide, batch, KEYS)
    words = "members=1 must be at least 2"
    refused(words, solvers.ensemble_rollout, None, STATES, KEYS, 3, 1)
