"""PolicyFlow: the invariants of its sheet, by number."""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from checks import same
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import models, rl
from tmdjax.core import prng
from tmdjax.systems import policyflow, ppo
from tmdjax.systems.policyflow import PATHS, PolicyFlow, brownian_penalty
from tmdjax.train.on_policy import Samples

BATCH = 64
KEYS = prng.sample_keys(jax.random.key(7), BATCH)
COEFFICIENTS = {"clip_range": 0.2, "entropy_coefficient": 0.01}
COEFFICIENTS["brownian_coefficient"] = 0.25


# one program each for a method and shapes
act, loss_of, velocities, flow, diagnose = (
    jax.jit(getattr(PolicyFlow, name), static_argnums=0)
    for name in ("act", "loss", "velocities", "flow", "diagnose")
)
shifted_log_ratio = jax.jit(rl.shifted_log_ratio)


def method_of(**options):
    return PolicyFlow(**{"hidden": (16, 16), "steps": 4, "out_scale": 1.0} | options)


@functools.cache
def acted(out_scale, deterministic_start):
    method = method_of(out_scale=out_scale, deterministic_start=deterministic_start)

    @jax.jit
    def begin(key):
        seen = jax.random.normal(jax.random.fold_in(key, 1), (BATCH, 4))
        params = method.init(key, seen[:1], 2)
        params = {**params, "log_std": jnp.array([-0.3, 0.2])}
        _, record = method.act(params, seen, KEYS)
        advantage = jax.random.normal(jax.random.fold_in(key, 2), (BATCH,))
        return params, Samples(seen, record, advantage)

    with jax.enable_x64(False):  # whoever asks first
        return begin(jax.random.key(0))


def made(out_scale=1.0, deterministic_start=False, **options):
    """Method, parameters, and what they did."""
    start = {"out_scale": out_scale, "deterministic_start": deterministic_start}
    return method_of(**start, **options), *acted(**start)


def nudged(params, size=0.05):
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda x: x + np.float32(rng.normal(0, size, x.shape)), params)


def zeroed(network, *names):
    return {**network, **{n: jax.tree.map(np.zeros_like, network[n]) for n in names}}


@pytest.mark.parametrize("path, times", [(PATHS[0], 1), *((path, 3) for path in PATHS)])
def test_1_equal_parameters_give_a_ratio_of_one_bit_for_bit(path, times):
    method, params, samples = made(path=path, times=times)
    for i in range(3):
        keys = prng.fold_in(KEYS, i)
        _, metrics = loss_of(method, params, params, samples, keys, COEFFICIENTS)
        assert (metrics["ratio_error"] == 0).all() and (metrics["kl"] == 0).all()


def test_1_every_node_is_drawn():
    method, params, samples = made(times=20)
    t = velocities(method, params, params, samples, KEYS)[1]
    nodes, counts = np.unique(np.asarray(t), return_counts=True)
    assert_allclose(nodes, np.arange(9) / 8, atol=1e-6)
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


def test_2_gradient_of_the_ratio(x64):
    """d rho / d theta = -(delta / std^2)^T dv / dtheta where theta = behaviour."""
    method, params, samples = made()
    params, samples = jax.tree.map(lambda x: x.astype(jnp.float64), (params, samples))
    delta, log_std = samples.record["delta"], method.log_std(params)

    def ratio_and_linear(network):
        new = {**params, "network": network}
        _, _, v, v_old = method.velocities(new, params, samples, KEYS)
        ratio = jnp.exp(rl.shifted_log_ratio(delta, -(v - v_old)[0], log_std, log_std))
        return ratio.sum(), -jnp.sum(delta / jnp.exp(2 * log_std) * v[0])

    ours, theirs = jax.jit(jax.jacrev(ratio_and_linear))(params["network"])
    same(ours, theirs, rtol=1e-8, atol=1e-10)
    # and of the ratio by the shift, against finite differences
    shift = jnp.full_like(delta, 0.1)
    direction = jax.random.normal(jax.random.key(9), delta.shape, jnp.float64)

    @jax.jit
    def moved(h):
        given = (delta, shift + h * direction, log_std, log_std - 0.1)
        return jnp.exp(rl.shifted_log_ratio(*given)).sum()

    slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    assert_allclose(jax.jit(jax.grad(moved))(0.0), slope, rtol=1e-6)


def test_3_a_constant_shift_has_the_exact_ratio():
    """dv = c moves the end by -c: scipy's densities of the executed action."""
    x_1, delta = np.random.default_rng(0).normal(size=(2, 50, 3))
    c, std, old = np.array([0.3, -0.2, 0.1]), np.exp([0.1, -0.4, 0]), np.exp([0.2] * 3)
    laws = ((x_1 - c, std), (x_1, old))
    new, before = (scipy.stats.norm(*law).logpdf(x_1 + delta) for law in laws)
    exact = (new - before).sum(1)
    given = (delta, np.tile(-c, (50, 1)), np.log(std), np.log(old))
    ours = shifted_log_ratio(*map(np.float32, given))
    assert_allclose(ours, exact, rtol=1e-4, atol=1e-4)


def test_3_a_shifted_network_moves_every_dv_and_the_end():
    (method, params, samples), shift = made(), np.float32([0.05, -0.1])

    def shifted(params):
        out = params["network"]["out"]
        out = {**out, "bias": out["bias"] + shift}
        return {**params, "network": {**params["network"], "out": out}}

    new = shifted(params)
    v, v_old = map(np.asarray, velocities(method, new, params, samples, KEYS)[2:])
    assert_allclose(v - v_old, np.broadcast_to(shift, v.shape), atol=1e-6)
    # where the field does not depend on x the whole flow moves by -c
    old = {**params, "network": zeroed(params["network"], "from_action")}
    moved = shifted(old)
    x_0 = samples.record["x_0"]
    ends = [np.asarray(flow(method, p, samples.observation, x_0)) for p in (old, moved)]
    assert_allclose(ends[1] - ends[0], -np.tile(shift, (BATCH, 1)), atol=1e-5)
    record = {**samples.record, "x_1": ends[0]}
    found = diagnose(method, moved, old, samples._replace(record=record), KEYS)
    assert found["ratio_correlation"] > 0.9999 and abs(found["ratio_bias"]) < 1e-5


def test_4_shifts_that_depend_on_time_are_averaged():
    """Only the network's time input differs: dv = c(t), drawn with equal weights."""
    method, params, samples = made(times=200)
    flat = zeroed(params["network"], "from_action", "from_observation")
    doubled = {**flat, "from_time": jax.tree.map(lambda x: 2 * x, flat["from_time"])}
    new, old = ({**params, "network": network} for network in (doubled, flat))
    v, v_old = map(np.asarray, velocities(method, new, old, samples, KEYS)[2:])
    drawn = (v - v_old).mean((0, 1))
    apply_fn = jax.jit(models.functional(method._module(2)))
    nowhere = (np.zeros((9, 2), np.float32), jnp.asarray(method.nodes))
    blind = np.zeros((9, 4), np.float32)
    expected = np.subtract(*(apply_fn(n, *nowhere, blind) for n in (doubled, flat)))
    error = expected.std(0) / np.sqrt(200 * BATCH)
    assert (np.abs(drawn - expected.mean(0)) < 4 * error).all()


def test_5_the_flow_is_the_midpoint_rule(monkeypatch):
    """A network made linear in x: (I - hA + h^2 A^2 / 2)^K x_0, and order two."""
    a = jnp.array([[0.4, -1.0], [0.7, 0.2]])
    x_0, errors = jnp.array([[1.0, -2.0], [0.5, 0.3]]), []

    def linear(network, x, *_, method=None):
        return x @ a.T if method == "velocity" else x

    monkeypatch.setattr(policyflow.models, "functional", lambda module: linear)
    for steps in (4, 8, 16):
        method, h = PolicyFlow(hidden=(8,), steps=steps), 1 / steps
        x_1 = method.flow({"network": {}}, jnp.zeros((2, 1)), x_0)
        step = np.eye(2) - h * np.asarray(a) + h**2 * np.asarray(a @ a) / 2
        expected = np.asarray(x_0) @ np.linalg.matrix_power(step, steps).T
        assert_allclose(x_1, expected, atol=1e-5)
        exact = np.asarray(x_0) @ scipy.linalg.expm(-np.asarray(a)).T
        errors.append(np.abs(x_1 - exact).max())
    assert 3.3 < errors[0] / errors[1] < 4.8 and 3.3 < errors[1] / errors[2] < 4.8


def test_6_without_start_noise_it_is_gaussian_ppo():
    """v that depends on the observation alone: the end is -v, a Gaussian's mean."""
    method, params, samples = made(deterministic_start=True, brownian_coefficient=0.0)
    blind = zeroed(params["network"], "from_action", "from_time")
    params = {**params, "network": blind}
    action, record = act(method, params, samples.observation, KEYS)
    again, other = act(method, params, samples.observation, prng.fold_in(KEYS, 1))
    assert_array_equal(record["x_1"], other["x_1"])
    assert (np.asarray(action) != again).any()
    options = {"entropy_coefficient": 0.01, "log_std_bounds": (-5.0, 2.0)}
    gaussian = ppo.GaussianPolicy(hidden=(16, 16), **options)

    def as_mean(network):
        """The same numbers as an MLP of the observation, with the sign of an end."""
        return {
            "hidden_0": network["from_observation"],
            "hidden_1": network["layers_0"],
            "out": jax.tree.map(jnp.negative, network["out"]),
        }

    same_numbers = {"network": as_mean(blind), "log_std": params["log_std"]}
    moments = jax.jit(gaussian.mean_and_log_std)
    mean, log_std = moments(same_numbers, samples.observation)
    assert_allclose(mean, record["x_1"], atol=1e-5)
    log_prob = scipy.stats.norm(mean, np.exp(log_std)).logpdf(action).sum(1)
    told = {"action": action, "mean": mean, "log_prob": jnp.float32(log_prob)}
    ours, theirs = (samples._replace(record=r) for r in (record, told))

    @jax.jit
    def losses(network):
        given = {**COEFFICIENTS, "brownian_coefficient": 0.0}
        new = {**params, "network": network}
        a = method.loss(new, params, ours, KEYS, given)[0].mean()
        new = {**params, "network": as_mean(network)}
        return a, gaussian.loss(new, params, theirs, KEYS, COEFFICIENTS)[0].mean()

    slopes = jax.jit(jax.jacrev(losses))
    unseen = {name: blind[name] for name in ("from_action", "from_time")}
    for new in (blind, nudged(blind, 0.02) | unseen):
        assert_allclose(*losses(new), rtol=1e-4, atol=1e-5)
        a, b = slopes(new)
        for name in ("from_observation", "layers_0", "out"):
            same(a[name], b[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("path", PATHS)
def test_7_brownian_penalty(path):
    x_t, v, v_old = np.float32(np.random.default_rng(0).normal(size=(3, 6, 3)))
    t = np.float32([0.0, 0.2, 0.5, 0.7, 0.9, 1.0])

    @jax.jit
    def each(v, v_old):
        return brownian_penalty(path, *map(jnp.asarray, (x_t, t, v, v_old)))

    slope = jax.jit(jax.grad(lambda v: each(v, v_old).sum()))(v)
    quiet = (t == 0) & (path != "stochastic_interpolant")  # the term has no weight
    assert ((np.asarray(slope) == 0) == quiet[:, None]).all()
    # as the paper writes it: tau = 1 - t from noise to action, u = -v
    tau, u, u_old, x = 1 - t[:, None], -v, -v_old, x_t
    if path == "trigflow":
        angle = 0.5 * np.pi * tau
        paper = np.cos(angle) * u - (np.cos(angle) * x - np.sin(angle) * u_old)
    else:
        lead = 1 - tau if path == "rectified_flow" else 2 * (tau - 0.5) ** 2 + 0.5
        paper = lead * u - (x - tau * u_old)
    assert_allclose(each(v, v_old), (paper**2).mean(1), rtol=1e-4)
    if path == "rectified_flow":
        assert_allclose(each(-x_t, -x_t), 0, atol=1e-6)
        # at pure noise the target is -x: outwards
        assert_allclose(each(-x_t, v_old)[-1], 0, atol=1e-6)


def test_7_no_gradient_into_the_behaviour_and_the_two_reductions():
    method, params, samples = made(brownian_coefficient=1.0)
    new = nudged(params)

    @jax.jit
    @jax.grad
    def slope(behaviour):
        loss, _ = method.loss(new, behaviour, samples, KEYS, COEFFICIENTS)
        return loss.sum()

    found = jax.tree.leaves(slope(params)["network"])
    assert all((np.asarray(x) == 0).all() for x in found)
    summed = made(brownian_reduction="sum")[0]
    given = (new, params, samples, KEYS, COEFFICIENTS)
    a, b = (loss_of(m, *given)[1]["brownian"] for m in (method, summed))
    assert_allclose(b, 2 * np.asarray(a), rtol=1e-6)


def test_8_the_brownian_term_raises_entropy():
    method, params, _ = made(out_scale=0.0)
    x_0 = jax.random.normal(jax.random.key(4), (1000, 2))
    seen = jnp.zeros((1000, 4))
    ends = functools.partial(flow, method)

    def penalty(network, behaviour, key):
        new, old = ({**params, "network": n} for n in (network, behaviour))
        record = {"x_0": x_0, "x_1": ends(old, seen, x_0), "delta": x_0}
        inputs = Samples(seen, jax.lax.stop_gradient(record), jnp.zeros(1000))
        keys = prng.sample_keys(key, 1000)
        x_t, t, v, v_old = method.velocities(new, old, inputs, keys)
        return brownian_penalty("rectified_flow", x_t, t, v, v_old).mean()

    @jax.jit
    def train(network):
        def body(network, key):
            slope = jax.grad(penalty)(network, network, key)
            return jax.tree.map(lambda p, g: p - 0.1 * g, network, slope), None

        return jax.lax.scan(body, network, jax.random.split(jax.random.key(5), 200))[0]

    after = {**params, "network": train(params["network"])}
    spread, wider = (np.cov(ends(p, seen, x_0).T).trace() for p in (params, after))
    assert_allclose(spread, np.cov(x_0.T).trace(), rtol=1e-5)
    assert wider > 1.5 * spread


def test_9_kl_is_that_of_samples():
    shift, std, old = np.array([0.3, -0.1]), np.array([0.8, 1.3]), np.array([1.0, 0.7])
    z = old * np.random.default_rng(0).normal(size=(200_000, 2))
    laws = ((0, old), (shift, std))
    before, after = (scipy.stats.norm(*law).logpdf(z).sum(1) for law in laws)
    error = (before - after).std() / np.sqrt(len(z))
    ours = float(rl.gaussian_kl(shift, jnp.log(std), jnp.log(old)))
    assert abs(ours - (before - after).mean()) < 3 * error
    same = jnp.linspace(-3, 1, 7)
    assert rl.gaussian_kl(jnp.zeros(7), same, same) == 0
    expected = scipy.stats.norm(0, std).entropy().sum()
    assert_allclose(rl.gaussian_entropy(jnp.log(std)), expected, rtol=1e-6)


def test_10_the_standard_deviation_is_bounded():
    method, params, samples = made()
    wide = {**params, "log_std": jnp.array([-9.0, 5.0])}
    assert_array_equal(method.log_std(wide), [-5, 2])

    @jax.jit
    @jax.grad
    def slope(log_std):
        new = {**params, "log_std": log_std}
        return method.loss(new, params, samples, KEYS, COEFFICIENTS)[0].mean()

    assert (np.asarray(slope(wide["log_std"])) == 0).all()
    assert (np.asarray(slope(params["log_std"])) != 0).all()
    for log_std, share in (([-9.0, 5.0], 1), ([0.0, 2.0], 0.5), ([0.0, 1.0], 0)):
        new = {**params, "log_std": jnp.array(log_std)}
        _, metrics = loss_of(method, new, params, samples, KEYS, COEFFICIENTS)
        assert (np.asarray(metrics["std_at_bound"]) == share).all()


def products(jaxpr, looped=False):
    """Products of matrices in a program: [inside a scan or while, outside]."""
    counts = np.zeros(2, int)
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        counts[0 if looped else 1] += name == "dot_general"
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            counts += products(inner, looped or name in ("scan", "while"))
    return list(counts)


def test_17_the_loss_solves_nothing():
    method, params, samples = made()

    def of_gradient(steps):
        other, given = dataclasses.replace(method, steps=steps), (KEYS, COEFFICIENTS)
        loss = lambda p: other.loss(p, params, samples, *given)[0].mean()  # noqa: E731
        return products(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)

    counts = of_gradient(4)
    assert counts == of_gradient(40) and counts[0] == 0 < counts[1]
    flow = jax.make_jaxpr(lambda x: method.flow(params, samples.observation, x))
    assert products(flow(samples.record["x_0"]).jaxpr)[0] > 0


def test_paths_begin_at_the_end_and_end_in_noise():
    path_point = jax.jit(policyflow.path_point, static_argnums=0)
    x_0, x_1, z = (np.full((2, 3), v, np.float32) for v in (5, 1, 1))
    for path in PATHS:
        ends = path_point(path, x_0, x_1, np.float32([0, 1]), 0 * z)
        assert_allclose(ends, [[1.0] * 3, [5.0] * 3], atol=1e-5)
    half = np.float32([0.5, 0.5])
    middle = path_point("trigflow", x_0, x_1, half)
    assert_allclose(middle, 6 / np.sqrt(2), rtol=1e-6)
    middle = path_point("stochastic_interpolant", x_0, x_1, half, z)
    assert_allclose(middle, 3 + np.sqrt(0.5), rtol=1e-6)


def test_the_diagnostic_sees_a_bad_approximation():
    method, params, samples = made(times=9)
    given = (params, samples, KEYS)
    near, far = (diagnose(method, nudged(params, s), *given) for s in (0.01, 0.3))
    assert near["ratio_correlation"] > 0.8
    assert far["ratio_rms_error"] > 3 * near["ratio_rms_error"]


def test_bad_settings_and_shapes(refused):
    refused("Did you mean 'rectified_flow'", PolicyFlow, path="rectified")
    refused("steps=0 must be at least 1", PolicyFlow, steps=0)
    refused("coefficient=-0.1 is outside", PolicyFlow, brownian_coefficient=-0.1)
    refused(r"clip_range=1.0 is outside \(0, 1\)", PolicyFlow, clip_range=1.0)
    refused(r"clip_range=0.0 is outside \(0, 1\)", PolicyFlow, clip_range=0.0)
    refused("times=0", PolicyFlow, times=0)
    refused("bounds, lower=2.0 is outside", PolicyFlow, log_std_bounds=(2.0, 1.0))
    refused("initial_std=9.0 is outside", PolicyFlow, initial_std=9.0)
    given = (np.zeros((4, 1)), *map(np.zeros, (4, 1, 1)))
    refused(r"delta has shape \(4, 1\) but shift", rl.shifted_log_ratio, *given)
    method, params, samples = made()
    record = {**samples.record, "x_1": samples.record["x_1"][:, :1]}
    given = (params, params, samples._replace(record=record), KEYS, COEFFICIENTS)
    refused(r"x_0 has shape .* but x_1 has shape", method.loss, *given)
