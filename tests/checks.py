"""What tests of several folders compare and compile in the same way."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import models


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


class Numbered:
    """Batches that are a function of their number; the next one's is the state."""

    def __init__(self, draw):
        self.draw, self.number = draw, 0

    def __next__(self):
        self.number += 1
        return self.draw(self.number - 1)

    def get_state(self):
        return {"number": self.number}

    def set_state(self, state):
        self.number = state["number"]


def drawn(shapes, seed=0):
    """Parameters of given shapes: kernels of variance 1 / rows, all else 0.

    By numpy: the random numbers of an initialiser take seconds to compile.
    """
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if len(leaf.shape) < 2:
            return np.zeros(leaf.shape, np.float32)
        return np.float32(rng.normal(0, leaf.shape[-2] ** -0.5, leaf.shape))

    return jax.tree.map(draw, shapes)


def mlp(**options):
    """The function of a small network on the plane, and its first parameters."""
    module = models.build({"name": "mlp", **options})
    inputs = (jnp.zeros((1, 2)), jnp.zeros(1), None)
    params = models.init_params(module, jax.random.key(0), *inputs)
    return models.functional(module), params
