"""Modules of flax.nnx under the contract of this project."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import models


class Velocity(nnx.Module):
    """A small network with what makes nnx hard: lists, dropout, a shared layer."""

    def __init__(self, rngs, rate=0.0):
        self.first = nnx.Linear(3, 16, rngs=rngs)
        self.middle = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(2)])
        self.again = self.middle[0]
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.last = nnx.Linear(16, 2, rngs=rngs)

    def __call__(self, x, t, cond=None):
        h = nnx.silu(self.first(jnp.concatenate([x, t[:, None]], -1)))
        for layer in (*self.middle, self.again):
            h = nnx.silu(self.dropout(layer(h)))
        return self.last(h)


X, T = jnp.linspace(-1, 1, 10).reshape(5, 2), jnp.full(5, 0.3)


def test_equals_the_module_and_leaves_it_alone():
    module = Velocity(nnx.Rngs(0), rate=0.5)
    apply_fn, params = models.from_nnx(module)
    assert len(jax.tree.leaves(params)) == 2 * 4  # a shared layer stands once
    assert params["middle"]["1"]["kernel"].shape == (16, 16)
    module.eval()
    assert_array_equal(apply_fn(params, X, T), module(X, T))
    changed = jax.tree.map(lambda leaf: leaf + 1, params)
    assert (apply_fn(changed, X, T) != module(X, T)).all()
    assert_array_equal(apply_fn(params, X, T), module(X, T))


def test_parameters_may_be_donated():
    module = Velocity(nnx.Rngs(0))
    _, params = models.from_nnx(module)
    for leaf in jax.tree.leaves(params):
        leaf.delete()
    assert np.isfinite(module(X, T)).all()


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(self.linear(x))


class Stacked(nnx.Module):
    """Layers of which each parameter, and each random stream, has a leading axis."""

    def __init__(self, rngs):
        make = nnx.split_rngs(splits=3)(nnx.vmap(Layer, in_axes=0, out_axes=0))
        self.layers = make(rngs)

    def __call__(self, x):
        axes = dict(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return nnx.scan(lambda h, layer: layer(h), **axes)(x, self.layers)


@pytest.mark.parametrize("stacked", [False, True])
def test_dropout_follows_the_key_and_is_off_without_one(stacked):
    module = Stacked(nnx.Rngs(0)) if stacked else Velocity(nnx.Rngs(0), rate=0.5)
    apply_fn, params = models.from_nnx(module)
    inputs = (X,) if stacked else (X, T)
    keys = [jax.random.key(seed) for seed in (1, 1, 2)]
    one, again, other = (apply_fn(params, *inputs, key=key) for key in keys)
    assert_array_equal(one, again)
    assert (one != other).any() and (one != apply_fn(params, *inputs)).any()
    if stacked:
        assert params["layers"]["linear"]["kernel"].shape == (3, 2, 2)


def test_gradients_are_those_of_nnx():
    module = Velocity(nnx.Rngs(3))
    apply_fn, params = models.from_nnx(module)
    ours = jax.jit(jax.grad(lambda p: jnp.square(apply_fn(p, X, T)).sum()))(params)
    theirs = nnx.grad(lambda m: jnp.square(m(X, T)).sum())(module)["again"]["kernel"]
    assert_allclose(ours["again"]["kernel"], theirs[...], rtol=1e-5)


def test_running_statistics_stay(refused):
    module = nnx.Sequential(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    module(X + 5)  # moves them
    apply_fn, params = models.from_nnx(module)
    module.eval()
    expected = module(X)
    assert_array_equal(apply_fn(params, X), expected)
    module.train()
    module(X - 9)  # the module goes its own way
    assert (module(X) != expected).any()
    assert_array_equal(apply_fn(params, X), expected)
    key = jax.random.key(0)
    refused("layers/0/mean, layers/0/var would be", apply_fn, params, X, key=key)


def test_bad_inputs(refused):
    refused("is of type Dense; give", models.from_nnx, nn.Dense(3), error=TypeError)
    apply_fn, params = models.from_nnx(Velocity(nnx.Rngs(0)))
    refused(
        "another structure than the module: without",
        apply_fn,
        {"first": params["first"]},
        X,
        T,
    )
    old = jax.random.PRNGKey(0)
    refused("key must be a typed key", apply_fn, params, X, T, key=old, error=TypeError)
