"""What tests of several folders compare and compile in the same way."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal


def same(a, b, **tolerance):
    """Two trees have the same leaves: to the bit, or within the tolerance given."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        if tolerance:
            assert_allclose(x, y, **tolerance)
        else:
            assert_array_equal(x, y)


def lowered(program, *given, **options):
    """A compiled function, exported for GPUs and TPUs, neither of which is needed."""
    platforms = ("cuda", "tpu")
    exported = jax.export.export(program, platforms=platforms, **options)(*given)
    assert exported.platforms == platforms
    return exported


def lowered_iteration(iteration, method, state, batch, chunks=1):
    """Both programs of `train.flow_rl` are lowered; returns what the first one draws."""
    (table, plan), key, zero = method.plan(0), jax.random.key(0), np.int32(0)
    part = jax.tree.map(lambda x: x[: len(x) // chunks], batch)
    given = (state.params, (), part, key, zero, zero, table, plan)
    samples, record = jax.eval_shape(iteration.collect, *given)
    lowered(iteration.collect, *given)
    rewards = np.zeros(chunks * samples.shape[0], np.float32)
    records = (record,) * chunks
    given = (state, (), batch, records, rewards, key, zero, table, plan)
    lowered(iteration.learn, *given)
    return samples, record
