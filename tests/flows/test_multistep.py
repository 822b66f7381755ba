"""Multistep solvers: parity with diffusers, order, where they are not defined."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import flows
from tmdjax.systems import boss

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens" / "schedulers.json"
PEER = json.loads(GOLDENS.read_text())
START = np.float32(PEER["start"])


def velocity(x, t, shift):
    """As in tests/goldens/make_schedulers.py."""
    t, shift = (a[:, None] for a in (t, shift))
    return (1.3 - t) * jnp.tanh(2 * x - shift) + t * (x - shift) + 0.1 * x


GUIDED = flows.classifier_free_guidance(velocity, PEER["guidance"], np.float32(0))
walk = jax.jit(
    lambda table, method, guided: flows.rollout(
        None,
        GUIDED if guided else velocity,
        jnp.asarray(START),
        table,
        jnp.full(2, 0.5),
        method=method,
    ),
    static_argnums=(1, 2),
)


@pytest.mark.parametrize("case", ["6 guided", "20 plain"])
@pytest.mark.parametrize("method", flows.MULTISTEP)
def test_states_are_those_of_diffusers(method, case):
    """Of every step."""
    want = PEER["solvers"][f"{method} {case}"]
    table = flows.make_table("ode", np.array(want["grid"]))
    got = walk(table, method, case.endswith("guided"))
    assert_array_equal(got.states[0], START)
    assert_allclose(got.states[1:], want["states"], rtol=2e-5, atol=2e-5)
    assert_array_equal(got.x0_hat, got.states[-1])  # the last step is Euler's
    assert flows.nfe(table, method) == len(table)


@pytest.mark.parametrize("method", flows.MULTISTEP)
def test_a_sampler_takes_them_by_name(method, refused):
    cond = jnp.full(2, 0.5)
    for case, guided in (("20 plain", False), ("6 guided", True)):
        want = PEER["solvers"][f"{method} {case}"]
        given = (GUIDED if guided else velocity, START, np.array(want["grid"]), cond)
        got = boss.sample(*given, method=method)
        assert_allclose(got, want["states"][-1], rtol=2e-5, atol=2e-5)
    own = boss.on_grid(velocity, np.array([1.0, 0.5, 0.0]))
    refused(
        "straightened for Euler", boss.sample, own, START, None, cond, method=method
    )


@pytest.mark.parametrize("method, order", [("dpmpp_2m", 2), ("unipc", 3)])
def test_measured_order(x64, method, order):
    """Where steps shrink towards both ends; else log(1 / h) more, for they begin and
    end by one of Euler's."""
    mixture = flows.gaussian_mixture([1.0], [[1.0, -1.0]], [0.5])
    noise = np.random.default_rng(0).normal(size=(16, 2))
    truth = np.array([1.0, -1.0]) + 0.5 * noise  # of one Gaussian, in closed form

    def error(steps):
        s = np.linspace(0, 1, steps + 1)
        grid = 1 - s**2 * (3 - 2 * s)
        start = jnp.asarray(noise)
        end = flows.endpoints(mixture.velocity, start, grid, method=method)
        return np.sqrt(np.mean((end - truth) ** 2))

    coarse, fine = error(80), error(160)
    assert abs(np.log2(coarse / fine) - order) < 0.2


def test_steps_without_a_past_are_steps_of_euler():
    """The first, the last, and the second where the first began at pure noise."""
    table = flows.make_table("ode", np.array([1.0, 0.7, 0.4, 0.0]))
    euler = walk(table, "euler", False)
    for method in flows.MULTISTEP:
        got = walk(table, method, False)
        assert_array_equal(got.states[1], euler.states[1])
        same = np.allclose(got.states[2], euler.states[2], atol=1e-6)
        assert same == (method == "dpmpp_2m")  # UniPC corrects the state in between
    # a slice knows nothing of what came before it
    table = flows.make_table("ode", flows.uniform_grid(6))[3:5]
    first = walk(table, "euler", False).states[1]
    for method in flows.MULTISTEP:
        assert_array_equal(walk(table, method, False).states[1], first)


def test_where_no_step_before_is_of_the_same_flow(refused):
    keys = jax.random.split(jax.random.key(0), 2)
    x, cond = jnp.asarray(START), jnp.full(2, 0.5)
    run = functools.partial(flows.rollout, keys, velocity, x)
    grid = flows.uniform_grid(4)
    ode = flows.make_table("ode", grid)
    for method in flows.MULTISTEP:
        noisy = flows.make_table("dance_grpo", grid)
        refused("rows without noise", run, noisy, cond, method=method)
        still = flows.make_table("dance_grpo", grid, c=0.0)
        refused(r"rows of the ODE .*k = \[0.7", run, still, cond, method=method)
        pull = {"g": lambda x, t, cond: x, "method": method}
        refused("a gradient g", run, ode, cond, **pull)
        search = functools.partial(flows.local_error_costs, velocity, keys, (2,), cond)
        refused("is not one of 'euler', 'midpoint'", search, knots=4, method=method)
        own = boss.on_grid(velocity, grid)
        with pytest.warns(UserWarning, match="by method='euler', or .*flows.without"):
            flows.check_times(own, grid, method)
        flows.check_times(flows.without(own, flows.OnGrid), grid, method)
    refused("Did you mean 'dpmpp_2m'", run, ode, cond, method="dpmpp2m")
