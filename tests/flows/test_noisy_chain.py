"""Chains of Gaussian steps: the invariants of ReinFlow's sheet, by number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import flows
from tmdjax.core import prng

COUNT, DIM, STEPS = 40_000, 2, 3
KEYS = prng.sample_keys(jax.random.key(0), COUNT)
ROWS = flows.make_table("ode", flows.uniform_grid(STEPS)).rows(slice(None), jnp.float32)
CLIPS = {"clip_noise": 3.0, "clip_last": 1.0}


def linear(a, b, std, clip_mean=None):
    return flows.euler_transition(
        lambda x, t, cond: a * x + b, lambda t, cond: std, clip_mean=clip_mean
    )


@functools.partial(jax.jit, static_argnames="clipped")
def program(a, b, std, clipped=False):
    """A walk, the same scored again, and the walk and the ODE without noise."""
    x = flows.initial_noise(KEYS, (DIM,))
    transition = linear(a, b, std, 1.0 if clipped else None)
    clips = CLIPS if clipped else {}
    chain = flows.noisy_chain(KEYS, transition, x, ROWS, **clips)
    quiet = flows.noisy_chain(None, transition, x, ROWS)
    ode = flows.rollout(
        None,
        lambda x, t, cond: a * x + b,
        x,
        flows.make_table("ode", flows.uniform_grid(STEPS)),
        unroll=STEPS,
    )
    again = flows.rescore_chain(chain.states, transition, ROWS)
    reduced = {
        (kind, start): (
            flows.chain_log_prob(again, kind, count_start=start),
            flows.chain_entropy(again, kind, count_start=start),
        )
        for kind in ("mean", "sum")
        for start in (False, True)
    }
    return chain, again, quiet.states, ode.states, list(reduced.values())


@functools.cache
def walked(a=0.0, b=0.0, std=0.2, clipped=False):
    return jax.device_get(program(a, b, std, clipped))


def test_1_and_9_the_score_is_that_of_the_walk_where_clips_are_active():
    chain, again, *_ = walked(-0.8, 0.3, 0.4, clipped=True)
    assert_allclose(again.log_density, chain.log_density, atol=1e-5)
    ratio = np.exp((again.log_density - chain.log_density).sum((0, 2)))
    assert abs(ratio.mean() - 1) < 1e-6
    x = chain.states
    mean = np.clip(x[:-1] - (-0.8 * x[:-1] + 0.3) / STEPS, -1, 1)
    noise = np.abs(x[1:] - mean) / 0.4
    assert noise.max() <= 3 + 1e-5
    assert (noise[:-1] > 3 - 1e-4).any() and (np.abs(mean) == 1).any()
    assert np.abs(x[-1]).max() == 1 and np.abs(x[:-1]).max() > 1


def test_2_no_velocity_and_one_deviation_is_independent_gaussians():
    chain, again, *_, reduced = walked(std=0.3)
    law = scipy.stats.norm(0, 0.3)
    expected = law.logpdf(np.diff(chain.states, axis=0))
    assert_allclose(again.log_density, expected, atol=1e-4)
    joint = expected.sum((0, 2))
    start = scipy.stats.norm.logpdf(chain.states[0]).sum(1)
    entropy, first = DIM * STEPS * law.entropy(), DIM * scipy.stats.norm.entropy()
    counts, terms = (0, 1, 0, 1), (DIM * STEPS, DIM * (STEPS + 1), 1, 1)
    for (log_prob, found), counted, count in zip(reduced, counts, terms, strict=True):
        assert_allclose(log_prob, (joint + counted * start) / count, atol=2e-3)
        assert_allclose(found, (entropy + counted * first) / count, rtol=1e-5)


def test_4_bounds_of_the_deviation():
    raw = np.float32([-np.inf, 0, np.inf, -0.7])
    std = jax.jit(flows.bounded_std)(raw, 0.1, 0.24)
    assert_allclose(std[:3], [0.1, np.sqrt(0.024), 0.24], rtol=1e-6)
    variance = np.log(0.01) + (np.log(0.0576) - np.log(0.01)) * (np.tanh(-0.7) + 1) / 2
    assert_allclose(std[3], np.exp(variance / 2), rtol=1e-6)


def test_3_equal_bounds_leave_nothing_to_learn():
    both = jax.jit(jax.value_and_grad(flows.bounded_std))
    value, slope = both(0.4, 0.2, 0.2)
    assert_allclose(value, 0.2, rtol=1e-6)
    assert slope == 0


def test_5_without_noise_it_is_the_ode_bit_for_bit():
    *_, quiet, ode, _ = walked(0.7, -0.2)
    assert_array_equal(quiet, ode)


def test_6_gradient_of_the_log_prob(x64):
    """Of a network with two layers, mean and deviation, against finite differences."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(DIM + 1, 5)), rng.normal(size=(5, 2 * DIM))]
    way = [rng.normal(size=w.shape) for w in weights]
    rows = {
        k: jnp.asarray(v, v.dtype if k == "step" else float) for k, v in ROWS.items()
    }
    states = jnp.asarray(rng.normal(size=(STEPS + 1, 4, DIM)))

    @jax.jit
    def moved(h):
        first, second = (w + h * d for w, d in zip(weights, way))

        def transition(x, row, cond):
            hidden = jnp.tanh(jnp.concatenate([x, row["t"][:, None]], 1) @ first)
            v, raw = jnp.split(hidden @ second, 2, 1)
            std = lambda t, cond: flows.bounded_std(raw, 0.1, 0.3)  # noqa: E731
            return flows.euler_transition(lambda *_: v, std)(x, row, cond)

        chain = flows.rescore_chain(states, transition, rows)
        return flows.chain_log_prob(chain, "sum").sum()

    slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    _, exact = jax.jit(lambda: jax.jvp(moved, (0.0,), (1.0,)))()
    assert abs(exact) > 1 and abs(slope / exact - 1) < 1e-6


def test_7_reductions():
    _, _, _, _, reduced = walked(0.7, -0.2, 0.25)
    (mean, _), (counted, _), (joint, _), (whole, _) = reduced
    assert_allclose(mean * DIM * STEPS, joint, rtol=1e-4, atol=1e-4)
    assert_allclose(counted * DIM * (STEPS + 1), whole, rtol=1e-4, atol=1e-4)
    # the start is the same under every policy, and leaves a ratio of sums as it is
    chain = walked(0.7, -0.2, 0.25)[0]
    start = scipy.stats.norm.logpdf(chain.states[0]).sum(1)
    assert_allclose(whole - joint, start, atol=1e-4)


@jax.jit
def last_density(states, a, b, std, rows):
    return flows.rescore_chain(states, linear(a, b, std), rows).log_density


def test_8_a_linear_field_has_the_moments_of_its_recursion():
    a, b, std = 0.7, -0.2, 0.25
    chain, *_ = walked(a, b, std)
    mean, variance = 0.0, 1.0
    for _ in range(STEPS):
        mean = mean - (a * mean + b) / STEPS
        variance = (1 - a / STEPS) ** 2 * variance + std**2
    last = chain.states[-1].astype(np.float64).reshape(-1)
    error = np.sqrt(variance / last.size)
    assert abs(last.mean() - mean) < 4 * error
    assert abs(last.var() - variance) < 4 * variance * np.sqrt(2 / last.size)
    # the density of the last step, averaged over those before, is the marginal
    x = chain.states[-2].astype(np.float64)
    for y in (-0.5, 0.4, 1.1):
        density = scipy.stats.norm(x - (a * x + b) / STEPS, std).pdf(y)[:, 0]
        states = np.stack([chain.states[-2], np.full_like(chain.states[-2], y)])
        rows = {name: c[-1:] for name, c in ROWS.items()}
        found = last_density(states, a, b, std, rows)
        ours = np.exp(np.asarray(found)[0, :, 0])
        assert_allclose(ours, density, rtol=1e-3, atol=1e-6)
        expected = scipy.stats.norm(mean, np.sqrt(variance)).pdf(y)
        assert abs(ours.mean() - expected) < 4 * ours.std() / np.sqrt(COUNT)


def test_noise_belongs_to_a_sample_and_a_step():
    @jax.jit
    def walks(few, x):
        walk = functools.partial(flows.noisy_chain, transition=linear(0.5, 0.1, 0.3))
        whole = walk(few, x=x, rows=ROWS).states
        last = {name: c[1:] for name, c in ROWS.items()}
        rest = walk(few, x=whole[1], rows=last).states
        return whole, rest, walk(few[1:], x=x[1:], rows=ROWS).states

    whole, rest, own = walks(KEYS[:3], jnp.zeros((3, DIM)))
    assert_allclose(rest, whole[1:], atol=1e-6)
    assert_allclose(own, whole[:, 1:], atol=1e-6)


def test_noise_in_one_step_alone_and_the_ode_around_it(refused):
    """Its density is that of this step, and no other step is asked again."""
    a, b, std, count = 0.7, -0.2, 0.3, 1

    @jax.jit
    def walk(keys, x):
        chain = flows.noisy_chain(
            keys, linear(a, b, std), x, ROWS, noisy_steps=count, clip_last=1.0
        )
        asked = []

        def velocity(x, t, cond):
            asked.append(x.shape)
            return a * x + b

        transition = flows.euler_transition(velocity, lambda t, cond: std)
        again = flows.rescore_chain(chain.states, transition, ROWS, step=chain.step)
        assert asked == [(count * len(x), DIM)]
        return chain, again, flows.chain_log_prob(again, "sum")

    x = np.float32(np.random.default_rng(0).normal(size=(3000, DIM)))
    chain, again, log_prob = jax.device_get(walk(KEYS[:3000], x))
    first = chain.step[0]
    assert scipy.stats.chisquare(np.bincount(first, minlength=STEPS)).pvalue > 1e-4
    steps = np.arange(STEPS)[:, None]
    ode = lambda x: x - (a * x + b) / STEPS  # noqa: E731
    before, y = x, chain.states[-1]
    for i in steps:
        before = np.where((i < first)[:, None], ode(before), before)
        y = np.where((i > first)[:, None], ode(y), y)
    assert_allclose(chain.states[0], before, atol=1e-6)
    assert_allclose(chain.end, np.clip(y, -1, 1), atol=1e-6)
    noise = scipy.stats.norm(ode(before), std).logpdf(chain.states[1])
    assert_allclose(log_prob, noise.sum(1), atol=1e-4)
    assert_allclose(again.log_density, chain.log_density, atol=1e-5)
    words = "this chain is of its noisy steps alone, without its start"
    refused(words, flows.chain_log_prob, again, count_start=True)


def test_deviations_of_any_shape_and_conditions_go_with_their_sample():
    cond = {"shift": jnp.float32([[1.0], [2.0]]), "std": jnp.float32([0.1, 0.2])}
    transition = flows.euler_transition(
        lambda x, t, cond: cond["shift"] * t[:, None] + 0 * x,
        lambda t, cond: cond["std"] * (1 + t),
    )

    @jax.jit
    def both(keys, x):
        chain = flows.noisy_chain(keys, transition, x, ROWS, cond)
        return chain, flows.rescore_chain(chain.states, transition, ROWS, cond)

    chain, again = jax.device_get(both(KEYS[:2], jnp.zeros((2, DIM))))
    t = 1 - np.arange(STEPS) / STEPS
    expected = np.float32([0.1, 0.2]) * (1 + t[:, None])
    assert_allclose(chain.std, np.repeat(expected[..., None], DIM, 2), rtol=1e-5)
    assert_allclose(again.log_density, chain.log_density, atol=1e-5)
    mean = chain.states[:-1] - (np.float32([1, 2]) * t[:, None])[..., None] / STEPS
    law = scipy.stats.norm(mean, expected[..., None])
    assert_allclose(again.log_density, law.logpdf(chain.states[1:]), atol=1e-3)


def test_bad_inputs(refused):
    x, transition = jnp.zeros((2, DIM)), linear(0.0, 0.0, 0.1)
    walk, few = flows.noisy_chain, KEYS[:2]
    refused(
        "float16; give float32",
        walk,
        few,
        transition,
        x.astype(jnp.float16),
        ROWS,
        error=TypeError,
    )
    refused("leading axis must be the batch, 2", walk, KEYS[:3], transition, x, ROWS)
    refused(
        "must be a typed key", walk, jnp.zeros(2), transition, x, ROWS, error=TypeError
    )
    refused("clip_noise=0 is outside", walk, few, transition, x, ROWS, clip_noise=0)
    refused(r"noisy_steps=4 is outside \[1, 3\]", walk, few, transition, x, ROWS,
            noisy_steps=4)  # fmt: skip
    refused(r"a chain of 3 steps has shape \(3, 2, 2\); its states are \[4, batch",
            flows.rescore_chain, jnp.zeros((3, 2, 2)), transition, ROWS)  # fmt: skip
    narrow = flows.euler_transition(lambda x, t, c: x[:, :1], lambda t, c: 0.1)
    refused("must agree", walk, few, narrow, x, ROWS)
    quiet = walk(None, transition, x, ROWS)
    refused("without noise and has no density", flows.chain_log_prob, quiet)
    refused("without noise and has no entropy", flows.chain_entropy, quiet)
    chain = walk(few, transition, x, ROWS)
    refused("reduction='max' is not one of", flows.chain_log_prob, chain, "max")


@pytest.mark.parametrize("steps", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_any_number_of_steps(steps):
    rows = flows.make_table("ode", flows.uniform_grid(steps)).rows(
        slice(None), jnp.float32
    )
    walk = functools.partial(flows.noisy_chain, transition=linear(0.5, 0, 0.1))
    chain = jax.eval_shape(walk, KEYS[:2], x=jnp.ones((2, DIM)), rows=rows)
    assert chain.states.shape == (steps + 1, 2, DIM)
    assert chain.std.shape == chain.log_density.shape == (steps, 2, DIM)
