"""Attention in blocks against the same function made at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from tmdjax.models import attention
from tmdjax.models.attention import select_implementation
from tmdjax.models.block_attention import block_attention

BATCH, QUERIES, KEYS, HEADS, KEY_HEADS, WIDTH = 2, 7, 13, 4, 2, 8


def draw(queries=QUERIES, keys=KEYS):
    rng = np.random.default_rng(0)
    shapes = [(BATCH, queries, HEADS, WIDTH)] + 2 * [(BATCH, keys, KEY_HEADS, WIDTH)]
    return [np.asarray(rng.standard_normal(s), np.float32) for s in 3 * shapes]


def masks():
    rng = np.random.default_rng(1)
    full = rng.random((BATCH, HEADS, QUERIES, KEYS)) < 0.6
    full[0, :, 3] = False  # a query that may look nowhere
    return {
        "none": {},
        "one a head and query": {"mask": jnp.asarray(full)},
        "one a key": {"mask": jnp.asarray(full[:, :1, 5:6])},
        "lengths": {"key_lengths": jnp.array([5, KEYS])},
        "window": {"causal": True, "window": 3},
        "causal": {"causal": True, "mask": jnp.asarray(full[:, :1, 5:6, :QUERIES])},
    }


def by(fn, options):
    """Values, forward and reverse derivatives of an attention function."""

    @jax.jit
    def run(q, k, v, *moves):
        attend = functools.partial(fn, **options)
        out, moved = jax.jvp(attend, (q, k, v), moves[:3])
        gradients = jax.vjp(attend, q, k, v)[1](moves[3])
        return out, moved, *gradients

    return run


@pytest.mark.parametrize("kind", masks())
def test_values_and_derivatives_are_those_of_xla(kind):
    """Lengths that no block divides; values, forward mode and all three gradients."""
    options = masks()[kind]
    arrays = draw(keys=QUERIES) if "causal" in options else draw()
    blocks = functools.partial(block_attention, block=4)
    made = by(blocks, options)(*arrays[:7])
    at_once = functools.partial(attention, implementation="xla")
    for ours, theirs in zip(made, by(at_once, options)(*arrays[:7])):
        assert ours.dtype == theirs.dtype
        assert_allclose(ours, theirs, atol=5e-6, rtol=1e-5)


def test_the_option_takes_what_others_take():
    """Through the public function; one tile, and a batch's padding."""
    q, k, v = draw()[:3]
    padding = np.arange(KEYS) < np.array([[5], [0]])
    way = jax.jit(attention, static_argnames="implementation")
    ways = [way(q, k, v, mask=padding, implementation=i) for i in ("blocks", "xla")]
    assert_allclose(*ways, atol=2e-6)
    assert_allclose(ways[0][1, 0, 0], v[1, :, 0].mean(0), atol=2e-6)
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    out = jax.eval_shape(functools.partial(attention, implementation="blocks"), *half)
    assert (out.shape, out.dtype) == (q.shape, jnp.bfloat16)
    assert select_implementation(*half[:2], masked=False) == "xla"  # never by itself


def test_no_array_grows_with_the_square_of_the_length(equation_outputs):
    """Neither forward, nor in forward mode, nor in the gradient."""
    attend = functools.partial(attention, implementation="blocks")

    def gradient(q, k, v):
        return jax.grad(lambda *a: attend(*a).sum(), (0, 1, 2))(q, k, v)

    def forward_mode(q, k, v):
        return jax.jvp(attend, (q, k, v), (q, k, v))[1]

    x = jax.ShapeDtypeStruct((1, 32_760, 1, 128), jnp.float32)
    for fn in (attend, gradient, forward_mode):
        sizes = [output.size for output in equation_outputs(fn, x, x, x)]
        assert max(sizes) <= 64 * 512 * 128  # the array itself, padded
