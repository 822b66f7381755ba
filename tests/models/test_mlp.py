"""VelocityMLP: contract, conditions, precision, gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax.core import trees
from tmdjax.models import VelocityMLP, functional, init_params

MODULE = VelocityMLP(hidden=16, depth=2, num_classes=3)
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)), jnp.float32)
T = jnp.array([0.0, 0.3, 0.7, 1.0])
COND = jnp.array([0, 1, 2, 3])


@functools.cache
def initial(module=MODULE):
    cond = COND if module.num_classes else None
    return init_params(module, jax.random.key(0), X, T, cond)


def test_size_and_output():
    v = jax.jit(functional(MODULE))(initial(), X, T, COND)
    assert v.shape == X.shape and v.dtype == jnp.float32
    assert np.isfinite(v).all() and np.abs(v).max() > 1e-3
    time = 256 * 16 + 16 + 16 * 16 + 16
    body = 2 * 16 + 16 + 2 * (16 * 16 + 16) + 16 * 2 + 2
    assert trees.count(initial()) == time + 4 * 16 + body


def test_no_condition_is_the_null_class():
    apply_fn = jax.jit(functional(MODULE))
    given, dropped = (apply_fn(initial(), X, T, c) for c in (COND, None))
    assert_array_equal(given[3], dropped[3])
    assert np.abs(given[:3] - dropped[:3]).max(1).min() > 0
    assert_array_equal(
        apply_fn(initial(), X, 0.3, None),
        apply_fn(initial(), X, jnp.full(4, 0.3), None),
    )


def test_spatial_derivative_against_finite_differences():
    @jax.jit
    def velocity(x):
        return functional(MODULE)(initial(), x, T, COND)

    tangent = jnp.ones_like(X)
    _, slope = jax.jvp(velocity, (X,), (tangent,))
    step = 1e-2
    central = (velocity(X + step * tangent) - velocity(X - step * tangent)) / (2 * step)
    assert_allclose(slope, central, rtol=1e-3, atol=1e-3)


def test_refusals(as_shipped):
    apply_fn = functional(MODULE)
    with pytest.raises(ValueError, match=r"give vectors \[batch, dim\]"):
        apply_fn(initial(), X[0], T, COND)
    with pytest.raises(ValueError, match="one time a sample"):
        apply_fn(initial(), X, T[:2], COND)
    with pytest.raises(ValueError, match=r"=4 is outside \[0, 3\]"):
        apply_fn(initial(), X, T, COND + 1)
    with pytest.raises(ValueError, match=r"t has 1 value\(s\) outside \[0, 1\]"):
        apply_fn(initial(), X, T + 0.1, COND)
    plain = VelocityMLP(hidden=16, depth=1)
    with pytest.raises(ValueError, match="built unconditional but got cond"):
        apply = functional(plain)
        apply(initial(plain), X, T, COND)
    for options, message in (
        (dict(hidden=0), "hidden=0 must be at least 1"),
        (dict(depth=0), "depth=0 must be at least 1"),
        (dict(num_classes=0), "num_classes=0 must be at least 1"),
        (dict(recipe="bf17"), "Did you mean 'bf16'"),
    ):
        with pytest.raises(ValueError, match=message):
            VelocityMLP(**options)
    for options in (dict(hidden="32"), dict(depth=2.0), dict(num_classes=3.0)):
        ((name, value),) = options.items()
        with pytest.raises(TypeError, match=f"{name}={value!r} is of type"):
            VelocityMLP(**options)
