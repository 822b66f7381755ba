"""Dense, embeddings, norms and patches against independent numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax.models import layers


def test_dense_is_affine_and_keeps_float32_parameters():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.float32)
    bounds = ("fp32", jnp.float32, 1e-6), ("bf16", jnp.bfloat16, 3e-2)
    for recipe, dtype, tolerance in bounds:
        module = layers.Dense(4, recipe)
        params = module.init(jax.random.key(0), x)["params"]
        params["bias"] = params["bias"] + jnp.arange(4.0)
        assert params["kernel"].shape == (5, 4)
        assert params["kernel"].dtype == params["bias"].dtype == jnp.float32
        y = module.apply({"params": params}, x)
        assert y.dtype == dtype
        expected = np.einsum("abi,io->abo", x, params["kernel"]) + np.arange(4)
        y = np.asarray(y, np.float32)
        assert_allclose(y, expected, atol=tolerance, rtol=tolerance)
    bare = layers.Dense(4, use_bias=False).init(jax.random.key(0), x)["params"]
    assert set(bare) == {"kernel"}


def test_layer_norm_statistics_are_float32():
    # Around 100 a bfloat16 mean would be off by a whole standard deviation.
    rng = np.random.default_rng(0)
    x = jnp.asarray(100 + rng.normal(size=(3, 64)), jnp.bfloat16)
    y = layers.layer_norm(x)
    assert y.dtype == jnp.float32
    x = np.asarray(x, np.float64)
    expected = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    assert_allclose(y, expected, atol=1e-4)
    assert_allclose(layers.layer_norm(jnp.full((1, 8), 3.0)), 0.0)


def test_timestep_embedding_turns_by_known_angles():
    t = jnp.array([0.0, 0.25, 1.0])
    e = layers.timestep_embedding(t, 8, time_scale=8.0)
    e = np.asarray(e, np.float64)
    assert e.shape == (3, 8)
    for i, frequency in enumerate([1.0, 0.1, 0.01, 0.001]):
        angles = np.array([0.0, 2.0, 8.0]) * frequency
        assert_allclose(e[:, i] + 1j * e[:, 4 + i], np.exp(1j * angles), atol=1e-6)
    assert layers.timestep_embedding(t.astype(jnp.bfloat16), 6).dtype == jnp.float32


def test_timestep_embedding_default_scale_is_a_thousand():
    e = np.asarray(layers.timestep_embedding(jnp.array([0.002]), 4))
    assert_allclose(e[0, [0, 2]], [np.cos(2.0), np.sin(2.0)], atol=1e-5)


def test_refusals(refused):
    dense, x = layers.Dense(4, "bf61"), jnp.ones((1, 2))
    refused("Did you mean 'bf16'", dense.init, jax.random.key(0), x)
    refused("dim=5 must be even", layers.timestep_embedding, jnp.zeros(2), 5)
    refused("one time a sample", layers.timestep_embedding, jnp.zeros((2, 1)), 4)
    message = r"patch_size=4 does not divide .* 6 x 8"
    refused(message, layers.patchify, jnp.zeros((1, 6, 8, 1)), 4)
    refused("give images", layers.patchify, jnp.zeros((6, 8, 1)), 2)
    refused("needs 4 positions", layers.unpatchify, jnp.zeros((1, 5, 4)), 2, 4, 4)
    refused("multiple of 4", layers.position_embedding_2d, 2, 2, 6)


def test_patches_are_slices_row_by_row():
    x = jnp.arange(2 * 4 * 6 * 3, dtype=jnp.float32).reshape(2, 4, 6, 3)
    tokens = layers.patchify(x, 2)
    assert tokens.shape == (2, 6, 12)
    for row, column in np.ndindex(2, 3):
        patch = x[1, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert_array_equal(tokens[1, 3 * row + column], patch.reshape(-1))
    assert_array_equal(layers.unpatchify(tokens, 2, 4, 6), x)


def test_position_embedding_products_depend_on_offsets_alone():
    grid = layers.position_embedding_2d(3, 4, 16).reshape(3, 4, 16)
    assert grid.dtype == np.float32
    gram = np.einsum("abi,cdi->abcd", grid, grid)
    assert_allclose(gram[0, 0, 1, 2], gram[1, 1, 2, 3], rtol=1e-5)
    assert_allclose(np.einsum("abab->ab", gram), 8.0, rtol=1e-5)
    # The first half speaks of the column, the second of the row.
    assert_array_equal(grid[0, :, :8], grid[2, :, :8])
    assert_array_equal(grid[:, 0, 8:], grid[:, 3, 8:])
    assert len(np.unique(grid.reshape(12, 16).round(5), axis=0)) == 12
    assert_allclose(grid[0, 2, 0], np.sin(2.0), rtol=1e-6)


def test_class_embedding_null_and_refusals(refused):
    module = layers.ClassEmbedding(3, 4)
    variables = module.init(jax.random.key(0), None, 2)
    embed = functools.partial(module.apply, variables)
    table = variables["params"]["embedding"]
    assert table.shape == (4, 4)
    assert_array_equal(embed(jnp.array([2, 0]), 2), table[jnp.array([2, 0])])
    assert_array_equal(embed(None, 2), jnp.stack([table[3]] * 2))
    for cond, kind, message in (
        (jnp.array([0, 4]), ValueError, r"cond .*=4 is outside \[0, 3\]"),
        (jnp.array([-1, 0]), ValueError, r"cond .*=-1 is outside"),
        (jnp.zeros((2, 1), int), ValueError, "one class a sample"),
        (jnp.zeros(3, int), ValueError, "leading axis must be the batch, 2"),
        (jnp.zeros(2), TypeError, r"classes\) must be an integer array"),
        ("cat", TypeError, r"classes\) must be an integer array; got str"),
    ):
        refused(message, embed, cond, 2, error=kind)
    # A concrete class is checked inside a trace too.
    cond = jnp.array([0, 9])
    refused("outside", jax.jit(lambda v: module.apply(v, cond, 2)), variables)


def test_class_out_of_range_under_jit_is_loud():
    module = layers.ClassEmbedding(3, 4)
    variables = module.init(jax.random.key(0), None, 1)
    lookup = jax.jit(lambda c: module.apply(variables, c, 2))
    for dtype in ("int32", "int8"):
        out = lookup(jnp.array([7, 3], dtype))
        assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()
        assert np.isnan(lookup(jnp.array([-1, -4], dtype))).all()
