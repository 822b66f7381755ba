"""Helpers for the model tests."""

import collections

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from tmdjax.core.trees import flatten


@pytest.fixture
def stir():
    """Adds noise to every leaf: networks that start at zero then do something."""

    def stirred(params, scale=0.2, seed=0):
        rng = np.random.default_rng(seed)
        return jax.tree.map(
            lambda leaf: leaf + scale * rng.normal(size=leaf.shape).astype(leaf.dtype),
            params,
        )

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


@pytest.fixture
def equations():
    """Counts the equations of a function by the name of their primitive."""

    def counted(fn, *args):
        return collections.Counter(
            equation.primitive.name
            for equation in walk_equations(jax.make_jaxpr(fn)(*args).jaxpr)
        )

    return counted


@pytest.fixture
def equation_outputs():
    """Shapes and dtypes of everything that a function computes on its way."""

    def outputs(fn, *args):
        return [
            variable.aval
            for equation in walk_equations(jax.make_jaxpr(fn)(*args).jaxpr)
            for variable in equation.outvars
        ]

    return outputs


@pytest.fixture
def check_slope():
    """Compares a gradient with a central difference along a random direction."""

    def check(value_and_gradient, params, eps=1e-2, rtol=1e-2):
        _, gradient = value_and_gradient(params)
        rng = np.random.default_rng(1)
        direction = jax.tree.map(
            lambda g: np.sign(g) * rng.uniform(0.5, 1.5, g.shape).astype(g.dtype),
            gradient,
        )
        size = sum(d.size for d in jax.tree.leaves(direction)) ** 0.5
        step = eps / size
        plus, minus = (
            float(value_and_gradient(moved)[0])
            for moved in (
                jax.tree.map(lambda p, d, s=s: p + s * d, params, direction)
                for s in (step, -step)
            )
        )
        slope = sum(
            float(np.vdot(np.asarray(g, np.float64), np.asarray(d, np.float64)))
            for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction))
        )
        assert_allclose((plus - minus) / (2 * step), slope, rtol=rtol)
        silent = [k for k, g in flatten(gradient).items() if not np.abs(g).max() > 0]
        return silent

    return check
