import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import same

from tmdjax.core import unroll

RATES = jnp.array([0.5, -0.9, 1.0])
START = jnp.array([[1.0, -2.0], [0.5, 3.0], [2.0, 0.1]])


def logistic(state, number):
    """Three maps with memory, an output of floats beside one of integers."""
    u, before = state
    new = RATES[:, None] * u * (1 - 0.1 * before) + 0.01 * number
    return (new, u), {"u": new, "number": jnp.full(3, number)}


@jax.jit
def by_hand(start):
    """A Python loop, its outputs, last state and the gradient of a loss of them."""

    def outputs_of(start):
        state, outputs = (start, start), []
        for number in jnp.arange(5):
            state, output = logistic(state, number)
            outputs.append(output)
        return state, jax.tree.map(lambda *rows: jnp.stack(rows), *outputs)

    def loss(start):
        return jnp.sum(outputs_of(start)[1]["u"] ** 2)

    return *outputs_of(start), jax.grad(loss)(start)


@pytest.mark.parametrize(
    "options",
    [{}, {"remat_steps": 2}, {"remat_steps": 9}, {"remat_steps": 2, "loop": False}],
)
def test_an_unrolled_step_is_a_python_loop_and_so_are_gradients_16(options):
    def loss(start):
        found = unroll(logistic, (start, start), 5, jnp.arange(5), **options)
        return jnp.sum(found.outputs["u"] ** 2), found

    gradient, found = jax.jit(jax.grad(loss, has_aux=True))(START)
    state, outputs, expected = by_hand(START)
    same((found.outputs, found.state, gradient), (outputs, state, expected), rtol=1e-5)
    assert found.outputs["number"].dtype == jnp.int32
    assert found.first_bad.tolist() == [5] * 3 and not np.any(found.failed)
    last = np.abs(outputs["u"][-1]).max(-1)
    np.testing.assert_allclose(found.amplitude, last, rtol=1e-6)


def test_the_first_bad_step_of_each_rollout_is_told():
    def doubled(u, scale):
        u = 2 * u * scale
        return u, u

    scale = np.float32([1, 1, 1, 1, np.nan, 1])
    start = np.float32([[1.0, 0.0], [1e38, 0.0], [-4.0, 0.0], [0.0, 0.0]])
    found = jax.jit(lambda u: unroll(doubled, u, 6, scale, bound=20.0))(start)
    assert found.first_bad.tolist() == [4, 0, 2, 4]
    np.testing.assert_array_equal(
        found.amplitude, np.float32([np.nan, 2e38, 32, np.nan])
    )
    np.testing.assert_array_equal(np.isfinite(found.outputs).all(-1), found.valid)
    np.testing.assert_array_equal(found.outputs[:4, 0, 0], [2, 4, 8, 16])
    assert np.isnan(np.mean(found.outputs))  # no average takes it in
    free = jax.jit(lambda u: unroll(doubled, u, 4, np.ones(4, np.float32)))(start)
    assert free.first_bad.tolist() == [4, 1, 4, 4]
    assert np.isinf(free.amplitude[1])


def test_what_cannot_be_unrolled_is_refused(refused):
    def step(state, inputs):
        return state, state

    u = jnp.ones((2, 3))
    refused("length=0 must be at least 1", unroll, step, u, 0)
    refused(r"length=2.0 is of type float", unroll, step, u, 2.0, error=TypeError)
    refused("remat_steps=0", unroll, step, u, 2, remat_steps=0)
    refused(r"bound=0 is outside \(0", unroll, step, u, 2, bound=0)
    refused(r"shape \(3,\).*length=2", unroll, step, u, 2, jnp.ones(3))
    refused("batch as its leading axis", unroll, step, {"u": u, "a": u[:1]}, 2)
    refused("batch as its leading axis", unroll, step, u.sum(), 2)
    whole = u.astype(jnp.int32)
    refused("no array of floats", unroll, step, whole, 2, error=TypeError)
