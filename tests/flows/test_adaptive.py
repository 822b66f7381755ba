"""The adaptive reference solver."""

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax import flows


def test_linear_flow_to_its_exponential():
    x = jnp.array([[1.0, -2.0], [0.5, 3.0]])
    found = flows.rk45(lambda x, t, cond: x, x)  # dx/dt = x, from t = 1 to 0
    np.testing.assert_allclose(found.x, x * np.exp(-1), rtol=2e-5)
    assert found.nfe > 6 and found.x.dtype == jnp.float32


def test_tighter_tolerance_costs_more_and_comes_closer():
    flow = flows.gaussian_mixture([0.5, 0.5], [[-2.0, 0.0], [2.0, 0.0]], [0.5, 0.3])
    x = jax.random.normal(jax.random.key(0), (50, 2))
    fine = flows.endpoints(flow.velocity, x, flows.uniform_grid(500), method="rk4")
    coarse, tight = (
        flows.rk45(flow.velocity, x, rtol=tol, atol=tol) for tol in (1e-2, 1e-5)
    )
    errors = [float(jnp.abs(s.x - fine).max()) for s in (coarse, tight)]
    assert errors[1] < 1e-3 and errors[1] < errors[0]
    assert tight.nfe > coarse.nfe


def test_counts_its_evaluations():
    calls = []

    def velocity(x, t, cond):
        jax.debug.callback(lambda: calls.append(1))
        return -jnp.sin(x) + cond[:, None]

    found = flows.rk45(velocity, jnp.ones((3, 2)), jnp.arange(3.0))
    jax.effects_barrier()
    assert found.nfe == len(calls)


def test_bad_input(refused):
    x = jnp.ones((2, 1))
    refused("rtol=0", flows.rk45, lambda x, t, c: x, x, rtol=0.0)
    refused("must agree", flows.rk45, lambda x, t, c: x[:, 0], x)
    nan = lambda x, t, c: x * jnp.nan  # noqa: E731
    refused("velocity at t=1 is not finite", flows.rk45, nan, x)
