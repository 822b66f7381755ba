"""VelocityMLP: size and bad inputs.

What it shares with every network stands in test_contract.py.
"""

import jax
import jax.numpy as jnp
from model_helpers import draw

from tmdjax.core import trees
from tmdjax.models import VelocityMLP, functional, init_params


def test_size_and_refusal(refused):
    module = VelocityMLP(hidden=16, depth=2, num_classes=3)
    x, t, cond = draw(4, 2), jnp.array([0.0, 0.3, 0.7, 1.0]), jnp.arange(4)
    params = init_params(module, jax.random.key(0), x, t, cond)
    time = 256 * 16 + 16 + 16 * 16 + 16
    body = 2 * 16 + 16 + 2 * (16 * 16 + 16) + 16 * 2 + 2
    assert trees.count(params) == time + 4 * 16 + body
    message = r"give vectors \[batch, dim\]"
    refused(message, functional(module), params, x[0], t, cond)
