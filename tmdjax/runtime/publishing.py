"""What the engine is given of the trained parameters, made once an update."""

from collections.abc import Callable
from typing import Any

import jax

from tmdjax.core.types import Params


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
