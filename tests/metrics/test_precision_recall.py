"""Precision and recall against brute force and by hand."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax.metrics import precision_recall


def brute_force(x, y, k):
    """Loops over points, one sorted list of distances each."""

    def covered(points, centres):
        inside = np.zeros(len(points), bool)
        for i, centre in enumerate(centres):
            others = np.delete(centres, i, axis=0)
            radius = np.sort(np.square(others - centre).sum(1))[k - 1]
            inside |= np.square(points - centre).sum(1) <= radius
        return inside.mean()

    return covered(x, y), covered(y, x)


def draw(n, m, d, shift=0.7, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) + shift, 1.3 * rng.normal(size=(m, d))


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize(("n", "m", "d"), [(40, 40, 2), (31, 57, 5), (7, 9, 1)])
def test_brute_force(n, m, d, k):
    x, y = draw(n, m, d)
    want = brute_force(x, y, k)
    assert precision_recall(x, y, neighbours=k) == want
    assert 0 < min(want)
    assert precision_recall(y, x, neighbours=k) == want[::-1]
    # three neighbours unless said
    assert (precision_recall(x, y) == want) == (k == 3)


@pytest.mark.parametrize("offset", [0, 2**20])
def test_ties_are_inside(offset):
    """On integers brute force is exact, and half the distances are ties."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(-4, 5, (30, 3)), rng.integers(-3, 7, (25, 3))
    want = brute_force(x, y, 2)
    assert min(want) < 1
    assert precision_recall(x + offset, y + offset, 2) == want


def test_hand_computed_line():
    """Radii 1, 1, 2 of the reference; 0.5 each of the generated."""
    reference = np.array([[0.0], [1.0], [3.0]])
    generated = np.array([[-1.0], [-1.5], [5.5], [6.0]])
    # -1 lies on the ball of 0; the generated balls reach no reference point.
    assert precision_recall(generated, reference, 1) == (0.25, 0)
    # k = 2: radii 3, 2, 3 of the reference; 7, 7.5, 6.5, 7 of the generated.
    assert precision_recall(generated, reference, 2) == (1, 1)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_identical_sets(scale):
    x = scale * (draw(50, 4, 6)[0] + 100)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, np.random.default_rng(0).permutation(x)) == (1, 1)
    # repeated points have balls of radius zero
    x = np.repeat(x, 5, 0)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 1e-3 * scale) == (0, 0)


def test_chunks_bound_the_memory_and_change_nothing(monkeypatch):
    x, y = draw(40, 33, 3)
    whole = precision_recall(x, y)
    module = sys.modules["tmdjax.metrics.precision_recall"]
    seen = []
    inner = module._squared_distances

    def watched(*args):
        for rows, part in inner(*args):
            seen.append(part.size)
            yield rows, part

    monkeypatch.setattr(module, "_squared_distances", watched)
    for values, most in ((100, 99), (1, 40)):
        monkeypatch.setattr(module, "_CHUNK_VALUES", values)
        seen.clear()
        assert precision_recall(x, y) == whole
        assert max(seen) == most and sum(seen) == 40 * 40 + 33 * 33 + 40 * 33


def test_narrow_inputs_are_computed_in_double():
    rng = np.random.default_rng(5)
    x, y = (rng.integers(-4, 5, (n, 4)) / 4 + 1 for n in (30, 20))
    want = brute_force(x, y, 3)
    # Quarters are exact in bfloat16, so only the arithmetic could differ.
    got = precision_recall(jnp.asarray(x, jnp.bfloat16), jnp.asarray(y, jnp.float16))
    assert got == want and all(type(value) is float for value in got)


def test_bad_inputs_are_named(refused):
    x, infinite = np.zeros((4, 2)), jnp.zeros((4, 2), jnp.bfloat16).at[0, 1].set(np.inf)
    holed = [[0, 0], [0, np.nan], [1, 0], [0, 1]]
    for message, features, reference, options in (
        (r"features has shape \(4,\); give features", np.zeros(4), x, {}),
        (r"reference has shape \(4, 2, 2\)", x, np.zeros((4, 2, 2)), {}),
        (r"features has shape \(4, 0\)", np.zeros((4, 0)), np.zeros((4, 0)), {}),
        ("width 2 but reference has 3; use one", x, np.zeros((4, 3)), {}),
        (r"reference has 3 sample.*give at least 4", x, x[:3], {}),
        (r"has 4 .*neighbours=4; .* least 5", x, np.zeros((5, 2)), {"neighbours": 4}),
        ("reference has 1 non-finite", x, holed, {}),
        ("features has 1 non-finite", infinite, x, {}),
        ("neighbours=0 must be at least 1", x, x, {"neighbours": 0}),
    ):
        refused(message, precision_recall, features, reference, **options)
    integer = r"neighbours=3\.0 is of type float"
    refused(integer, precision_recall, x, x, neighbours=3.0, error=TypeError)
