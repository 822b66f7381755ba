"""Models by name and as functions of their parameters."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from model_helpers import equal, shapes_of, small_decoder
from numpy.testing import assert_array_equal

from tmdjax.models import (
    MODELS,
    Classifier,
    Decoder,
    DiT,
    VelocityMLP,
    build,
    functional,
    init_params,
    spec_of,
    with_recipe,
)
from tmdjax.quant import rounding_recipe

X, T = jnp.ones((2, 3)), jnp.array([0.1, 0.9])


def test_names():
    assert build({"name": "dit", "hidden": 32, "heads": 4}) == DiT(hidden=32, heads=4)
    assert build({"name": "mlp", "depth": 1}) == VelocityMLP(depth=1)
    assert build({"name": "classifier", "num_classes": 2}) == Classifier(2)
    assert {"dit", "mlp", "classifier"} <= set(MODELS)


def test_bad_specs(refused):
    for spec, message in (
        ({"hidden": 3}, r"a model needs a name, one of .*dit.*got \['hidden'\]"),
        ({"name": "ditt"}, "unknown model 'ditt'.*Did you mean 'dit'"),
        ({"name": "dit", "hiden": 3}, "no attribute 'hiden'.*Did you mean 'hidden'"),
        ({"name": "mlp", "parent": None}, "no attribute 'parent'"),
        ({"name": "classifier"}, "also needs num_classes"),
        ({"name": "mlp", "hidden": -1}, "hidden=-1 must be at least 1"),
    ):
        refused(message, build, spec)
    raw = jnp.zeros(2, jnp.uint32)
    refused("typed key", init_params, VelocityMLP(), raw, X, T, error=TypeError)


def test_parameters_from_arrays_shapes_and_nothing():
    module = build({"name": "mlp", "hidden": 8, "depth": 1})
    key = jax.random.key(1)
    params = init_params(module, key, X, T, None)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (X, T)]
    equal(init_params(module, key, *shapes), params)
    equal(init_params(module, key, X, 0.5), params)
    described = jax.eval_shape(lambda: params)
    assert {leaf.dtype for leaf in jax.tree.leaves(described)} == {jnp.dtype("float32")}
    passed = jax.eval_shape(functools.partial(init_params, module), key, X, T)
    assert passed == shapes_of(module, *shapes) == described
    keys = jax.random.split(key, 3)
    seeds = jax.vmap(lambda key: init_params(module, key, X, T))(keys)
    assert seeds["out"]["kernel"].shape == (3, 8, 3)
    assert type(params) is dict and {type(node) for node in params.values()} == {dict}


def test_functional_is_module_apply():
    module = VelocityMLP(hidden=8, depth=1)
    params = init_params(module, jax.random.key(0), X, T)
    v = functional(module)(params, X, T)
    assert_array_equal(v, module.apply({"params": params}, X, T))
    assert_array_equal(functional(module)(params, X, T, method="__call__"), v)


def test_a_network_under_another_recipe(refused):
    video = dict(name="video_dit", heads=2, head_dim=6, depth=2, mlp_width=8)
    for spec in (
        {"name": "mlp"},
        {"name": "two_time_dit", "shared": video},
        spec_of(Decoder(small_decoder())),
    ):
        module = build(spec)
        half = with_recipe(module, "bf16")
        assert half != module and build(spec_of(half)) == half
        # one function, hence one program, where nothing changes
        assert functional(with_recipe(module, "fp32")) is functional(module)
    exact_head = Decoder(small_decoder(head_recipe="fp32"))
    assert with_recipe(exact_head, "bf16").config.output_recipe.name == "fp32"
    assert with_recipe(module, "bf16").config.output_recipe.name == "bf16"
    refused("VisionNet has no attribute 'recipe'", with_recipe, VisionNet(), "bf16")
    refused("unknown GEMM recipe 'bf61'", with_recipe, module, "bf61")
    own = with_recipe(build({"name": "mlp"}), rounding_recipe("bf16", jnp.bfloat16))
    refused(r"Recipe\('bf16'\) is not quant.RECIPES\['bf16'\]", spec_of, own)


class VisionNet(nn.Module):
    """It computes as it pleases."""

    width: int = 3
