"""Models by name and as functions of their parameters."""

import functools

import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_array_equal

from tmdjax.models import (
    MODELS,
    Classifier,
    DiT,
    VelocityMLP,
    build,
    functional,
    init_params,
)

X, T = jnp.ones((2, 3)), jnp.array([0.1, 0.9])


def test_names():
    assert build({"name": "dit", "hidden": 32, "heads": 4}) == DiT(hidden=32, heads=4)
    assert build({"name": "mlp", "depth": 1}) == VelocityMLP(depth=1)
    assert build({"name": "classifier", "num_classes": 2}) == Classifier(2)
    assert {"dit", "mlp", "classifier"} <= set(MODELS)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"hidden": 3}, r"a model needs a name, one of .*dit.*got \['hidden'\]"),
        ({"name": "ditt"}, "unknown model 'ditt'.*Did you mean 'dit'"),
        ({"name": "dit", "hiden": 3}, "no attribute 'hiden'.*Did you mean 'hidden'"),
        ({"name": "mlp", "parent": None}, "no attribute 'parent'"),
        ({"name": "classifier"}, "also needs num_classes"),
        ({"name": "mlp", "hidden": -1}, "hidden=-1 must be at least 1"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        build(spec)


def test_parameters_from_arrays_shapes_and_nothing():
    module = build({"name": "mlp", "hidden": 8, "depth": 1})
    key = jax.random.key(1)
    params = init_params(module, key, X, T, None)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (X, T)]
    jax.tree.map(assert_array_equal, params, init_params(module, key, *shapes))
    jax.tree.map(assert_array_equal, params, init_params(module, key, X, 0.5))
    passed = jax.eval_shape(functools.partial(init_params, module), key, X, T)
    closed = jax.eval_shape(lambda key: init_params(module, key, *shapes), key)
    described = jax.tree.map(lambda a: (a.shape, a.dtype), params)
    for abstract in (passed, closed):
        assert jax.tree.map(lambda a: (a.shape, a.dtype), abstract) == described
    seeds = jax.vmap(lambda key: init_params(module, key, X, T))(
        jax.random.split(key, 3)
    )
    assert seeds["out"]["kernel"].shape == (3, 8, 3)

    def plain(tree):
        return type(tree) is dict and all(
            plain(v) if not hasattr(v, "shape") else True for v in tree.values()
        )

    assert plain(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_raw_keys_are_refused():
    with pytest.raises(TypeError, match="typed key"):
        init_params(VelocityMLP(), jnp.zeros(2, jnp.uint32), X, T)


def test_functional_is_module_apply():
    module = VelocityMLP(hidden=8, depth=1)
    params = init_params(module, jax.random.key(0), X, T)
    apply_fn = functional(module)
    assert_array_equal(apply_fn(params, X, T), module.apply({"params": params}, X, T))
    assert_array_equal(
        apply_fn(params, X, T, method="__call__"), apply_fn(params, X, T)
    )
