"""What the engine is given of the trained parameters, made once an update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tmdjax.core.types import Params, PyTree


class Publisher:
    """Makes what rollouts read of parameters, such as quantised weights.

    It is made once for each new set of parameters: whoever asks again before the next
    update gets the very arrays that were made.
    """

    def __init__(self, generation_params: Callable[[Params], Params]):
        """Of a function of parameters."""
        self._make = generation_params
        self._read: list[Any] = []
        self._made: Params = {}

    def __call__(self, params: Params) -> Params:
        """What rollouts read of these parameters."""
        leaves = jax.tree.leaves(params)
        alike = len(leaves) == len(self._read)
        if not (alike and all(a is b for a, b in zip(self._read, leaves))):
            self._read, self._made = leaves, self._make(params)
        return self._made


def apart(published: Params, state: PyTree) -> Params:
    """What was published, with copies of the arrays that share memory with a state.

    An update reuses the memory of the state that it is given. Whoever reads what was
    published of that state while the update runs needs arrays of its own; those that
    were made for publishing, such as quantised weights, are so already.

    Args:
        published: arrays that rollouts read.
        state: of which they were published.
    """
    owned = set().union(*map(_memory, jax.tree.leaves(state)))
    return jax.tree.map(
        lambda leaf: jnp.array(leaf) if owned & _memory(leaf) else leaf, published
    )


def _memory(leaf: Any) -> set[int]:
    """Addresses of the buffers behind an array on devices of this process."""
    if not isinstance(leaf, jax.Array):
        return set()
    return {shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards}
