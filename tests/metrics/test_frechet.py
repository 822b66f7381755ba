import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import sqrtm

from tmdjax.core.trees import content_hash
from tmdjax.metrics import frechet_distance, frechet_label, gaussian_statistics


def samples(n, d, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def whitened(n, d, seed=0):
    """Samples whose mean is 0 and whose unbiased covariance is the identity."""
    x = np.random.default_rng(seed).normal(size=(n, d))
    q, _ = np.linalg.qr(x - x.mean(0))
    return q * np.sqrt(n - 1)


def test_statistics_are_numpys():
    x = samples(20, 4)
    fit = gaussian_statistics(x)
    np.testing.assert_allclose(fit.mean, np.mean(x, 0))
    np.testing.assert_allclose(fit.covariance, np.cov(x, rowvar=False), atol=1e-12)
    assert fit.mean.dtype == fit.covariance.dtype == np.float64


def test_textbook_formula_with_scipys_matrix_root():
    x, y = samples(40, 5), samples(30, 5, seed=1)
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    spread = np.trace(cov_x + cov_y - 2 * np.real(sqrtm(cov_x @ cov_y)))
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + spread
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_diagonal_gaussians_have_a_closed_form():
    # |mean difference|^2 + sum (s_i - r_i)^2 for standard deviations s, r.
    s, r = np.array([1.0, 2.0, 0.5]), np.array([3.0, 0.1, 0.5])
    x, y = whitened(30, 3) * s, whitened(25, 3, seed=1) * r + [1.0, -2.0, 0.0]
    expected = 5 + np.sum((s - r) ** 2)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-12)


def test_rank_deficient_covariances_keep_precision():
    # Two orthogonal unit segments in 6 dimensions: commuting covariances with
    # zero product, so the distance is the sum of both traces, 1 + 1.
    line = whitened(20, 1)
    x, y = np.zeros((20, 6)), np.zeros((20, 6))
    x[:, :1], y[:, 1:2] = line, line
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))
    assert frechet_distance(x @ turn, y @ turn) == pytest.approx(2, rel=1e-13)
    assert frechet_distance(x @ turn, 3 * x @ turn) == pytest.approx(4, rel=1e-13)
    assert frechet_distance(x @ turn, x @ turn) < 1e-13


def test_small_variances_survive():
    # Squaring 1e-9 beside 1 would lose it in float64.
    x = whitened(30, 2) * np.array([1.0, 1e-9])
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(2, 2)))
    smallest = np.linalg.svd(gaussian_statistics(x @ turn).factor, compute_uv=False)[-1]
    assert smallest == pytest.approx(1e-9, rel=1e-5)


def test_invariances():
    x, y = samples(30, 4), samples(50, 4, seed=1)
    base = frechet_distance(x, y)
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(4, 4)))
    assert frechet_distance(y, x) == pytest.approx(base, rel=1e-10)
    assert frechet_distance(x @ turn + 3, y @ turn + 3) == pytest.approx(base, rel=1e-9)
    assert frechet_distance(x[::-1], y) == pytest.approx(base, rel=1e-10)
    assert frechet_distance(2 * x, 2 * y) == pytest.approx(4 * base, rel=1e-10)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(gaussian_statistics(x), y) == base
    # float32 features are taken in double
    narrow = np.float32(x)
    double = frechet_distance(narrow.astype(np.float64), y)
    assert frechet_distance(jnp.asarray(narrow), y) == double


def test_too_few_samples_warn():
    few, many = samples(4, 4), samples(30, 4)
    with pytest.warns(UserWarning, match="features_y has 4 samples of width 4"):
        frechet_distance(many, few)


def test_label_names_the_network_and_its_weights():
    params = {"dense": {"kernel": np.ones((2, 2), np.float32)}}
    label = frechet_label("digits", params)
    assert label == f"FD-digits@{content_hash(params)[:8]}"
    changed = {"dense": {"kernel": np.full((2, 2), 2, np.float32)}}
    assert frechet_label("digits", changed) != label


def test_bad_inputs_are_named(refused):
    x = samples(10, 3)
    refused(r"shape \(1, 3\).*at least two samples", frechet_distance, x[:1], x)
    refused(r"shape \(10,\); give \[n, d\]", gaussian_statistics, x[:, 0])
    widths = "features_x has width 3 but features_y has 2"
    refused(widths, frechet_distance, x, x[:, :2])
    x[4, 1] = np.nan
    refused(r"1 non-finite value.*\(4, 1\)", frechet_distance, x, samples(10, 3))
