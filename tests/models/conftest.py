"""Helpers for the model tests."""

import collections

import jax
import numpy as np
import pytest
from model_helpers import stirred
from numpy.testing import assert_allclose

from tmdjax.core.trees import flatten


@pytest.fixture
def stir():
    return stirred


def walk_equations(jaxpr):
    """Every equation, those of inner jaxprs too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from walk_equations(inner)


def equations_of(fn, *args):
    return walk_equations(jax.make_jaxpr(fn)(*args).jaxpr)


@pytest.fixture
def equations():
    """Counts the equations of a function by the name of their primitive."""
    return lambda *call: collections.Counter(
        equation.primitive.name for equation in equations_of(*call)
    )


@pytest.fixture
def equation_list():
    """Every equation of a function."""
    return lambda *call: list(equations_of(*call))


@pytest.fixture
def equation_outputs():
    """Shapes and dtypes of everything that a function computes on its way."""
    return lambda *call: [
        variable.aval
        for equation in equations_of(*call)
        for variable in equation.outvars
    ]


@pytest.fixture
def check_slope():
    """Compares a gradient with a central difference along a random direction."""

    def check(value_and_gradient, params, eps=1e-2, rtol=1e-2):
        gradient = jax.tree.map(np.asarray, value_and_gradient(params)[1])
        rng = np.random.default_rng(1)
        direction = jax.tree.map(
            lambda g: np.sign(g) * rng.uniform(0.5, 1.5, g.shape).astype(g.dtype),
            gradient,
        )
        step = eps / sum(d.size for d in jax.tree.leaves(direction)) ** 0.5

        def value_at(step):
            host = jax.tree.map(np.asarray, params)  # where nothing is compiled
            moved = jax.tree.map(lambda p, d: p + step * d, host, direction)
            return float(value_and_gradient(moved)[0])

        plus, minus = value_at(step), value_at(-step)
        pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(direction))
        slope = sum(np.vdot(*map(np.float64, pair)) for pair in pairs)
        assert_allclose((plus - minus) / (2 * step), slope, rtol=rtol)
        silent = [k for k, g in flatten(gradient).items() if not np.abs(g).max() > 0]
        return silent

    return check
