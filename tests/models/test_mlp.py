"""VelocityMLP: size and bad inputs.

What it shares with every network stands in test_contract.py.
"""

import functools

import jax
import jax.numpy as jnp
from model_helpers import draw

from tmdjax.core import trees
from tmdjax.models import VelocityMLP, functional, init_params

X, T, COND = draw(4, 2), jnp.array([0.0, 0.3, 0.7, 1.0]), jnp.arange(4)


def test_size():
    module = VelocityMLP(hidden=16, depth=2, num_classes=3)
    params = init_params(module, jax.random.key(0), X, T, COND)
    time = 256 * 16 + 16 + 16 * 16 + 16
    body = 2 * 16 + 16 + 2 * (16 * 16 + 16) + 16 * 2 + 2
    assert trees.count(params) == time + 4 * 16 + body


def test_refusals(refused):
    def bound(**options):
        module = VelocityMLP(hidden=16, depth=1, **options)
        params = init_params(module, jax.random.key(0), X, T)
        return functools.partial(functional(module), params)

    classes = bound(num_classes=3)
    refused(r"give vectors \[batch, dim\]", classes, X[0], T, COND)
    refused(r"=4 is outside \[0, 3\]", classes, X, T, COND + 1)
    refused("built unconditional but got cond", bound(), X, T, COND)
    for name in ("hidden", "depth", "num_classes"):
        refused(f"{name}=0 must be at least 1", VelocityMLP, **{name: 0})
        message = f"{name}=2.0 is of type"
        refused(message, VelocityMLP, error=TypeError, **{name: 2.0})
