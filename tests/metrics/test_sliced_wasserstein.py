import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.stats import wasserstein_distance

from tmdjax.metrics import sliced_wasserstein


def exact_w2(x, y):
    """1-D W2 as an assignment problem between copies, without quantiles."""
    n, m = len(x), len(y)
    common = np.lcm(n, m)
    x, y = np.repeat(x, common // n), np.repeat(y, common // m)
    cost = (x[:, None] - y[None, :]) ** 2
    rows, columns = linear_sum_assignment(cost)
    return np.sqrt(cost[rows, columns].mean())


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 10**6))
def test_one_dimension_is_the_exact_assignment(n, m, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=n), 2 * rng.normal(size=m) + 1
    found = sliced_wasserstein(x, y, projections=3)
    assert found == pytest.approx(exact_w2(x, y), rel=1e-10)


def test_one_dimensional_shift_agrees_with_scipy():
    # Under a shift every mass moves equally far, so W1 = W2.
    x = np.random.default_rng(0).normal(size=50)
    y = np.concatenate([x, x]) + 0.7  # the same law from twice the samples
    expected = pytest.approx(wasserstein_distance(x, y), rel=1e-12)
    assert sliced_wasserstein(x, y) == expected


@pytest.mark.parametrize("dim", [2, 8])
def test_shift_is_per_dimension(dim):
    # E (theta . a)^2 = |a|^2 / dim; relative error of the mean square ~ sqrt(2 / k).
    rng = np.random.default_rng(0)
    x, a = rng.normal(size=(40, dim)), rng.normal(size=dim)
    found = sliced_wasserstein(x, x + a, projections=20_000)
    assert found == pytest.approx(np.linalg.norm(a) / np.sqrt(dim), rel=0.02)


def test_two_isotropic_gaussians():
    # W2 of N(0, 1) and N(0, s^2) is |s - 1| in every direction.
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(20_000, 3)), 2.5 * rng.normal(size=(15_000, 3))
    assert sliced_wasserstein(x, y, projections=32) == pytest.approx(1.5, abs=0.03)


def test_invariances():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(30, 5)), rng.normal(size=(20, 5)) + 1
    base = sliced_wasserstein(x, y)
    assert base > 0.5
    assert sliced_wasserstein(rng.permutation(x), y) == pytest.approx(base, rel=1e-12)
    assert sliced_wasserstein(y, x) == pytest.approx(base, rel=1e-12)
    assert sliced_wasserstein(x + 7, y + 7) == pytest.approx(base, rel=1e-10)
    assert sliced_wasserstein(3 * x, 3 * y) == pytest.approx(3 * base, rel=1e-12)
    assert sliced_wasserstein(np.repeat(x, 3, 0), y) == pytest.approx(base, rel=1e-12)
    assert sliced_wasserstein(x, x) == 0
    rotation, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    turned = sliced_wasserstein(x @ rotation, y @ rotation, projections=20_000)
    still = sliced_wasserstein(x, y, projections=20_000, seed=1)
    assert turned == pytest.approx(still, rel=0.02)


def test_chunks_do_not_change_the_result(monkeypatch):
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(12, 3)), rng.normal(size=(9, 3))
    whole = sliced_wasserstein(x, y, projections=10)
    module = sys.modules["tmdjax.metrics.sliced_wasserstein"]
    monkeypatch.setattr(module, "_CHUNK_VALUES", 100)
    assert sliced_wasserstein(x, y, projections=10) == pytest.approx(whole, rel=1e-14)


def test_images_are_flattened_and_computed_in_double():
    rng = np.random.default_rng(5)
    x = rng.integers(-4, 5, (6, 2, 2, 1)) / 4
    y = rng.integers(-4, 5, (8, 2, 2, 1)) / 4
    flat = sliced_wasserstein(x.reshape(6, 4), y.reshape(8, 4))
    assert sliced_wasserstein(x, y) == flat
    # Quarters are exact in bfloat16, so only the arithmetic could differ.
    low = sliced_wasserstein(jnp.asarray(x, jnp.bfloat16), jnp.asarray(y, jnp.float32))
    assert low == flat


def test_bad_inputs_are_named(refused):
    x, y = np.zeros((3, 2)), jnp.array([[0, jnp.nan]], jnp.bfloat16)
    for message, *sets in (
        (r"y has shape \(0, 2\).*at least one sample", x, np.zeros((0, 2))),
        ("x has 2 values a sample but y has 3", x, np.zeros((3, 3))),
        ("x has 1 non-finite", np.array([[0.0], [np.inf]]), np.zeros((2, 1))),
        ("y has 1 non-finite", x, y),
    ):
        refused(message, sliced_wasserstein, *sets)
    refused("projections=0 is outside", sliced_wasserstein, x, x, projections=0)
