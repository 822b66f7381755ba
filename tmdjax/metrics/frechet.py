"""Frechet distance between Gaussian fits of two sets of features."""

import warnings
from typing import Any, NamedTuple

import numpy as np

from tmdjax.core.checks import check_finite
from tmdjax.core.trees import content_hash
from tmdjax.core.types import PyTree


class GaussianStatistics(NamedTuple):
    """A Gaussian fit, float64.

    Attributes:
        mean: [d].
        factor: [min(n, d), d], the covariance's triangular factor R, RᵀR = Σ.
        count: the number of samples n behind it.
    """

    mean: np.ndarray
    factor: np.ndarray
    count: int

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance [d, d] (ddof 1)."""
        return self.factor.T @ self.factor


def gaussian_statistics(features: Any) -> GaussianStatistics:
    """Mean and covariance factor of features; make those of a reference set once.

    Args:
        features: [n, d], n >= 2.

    Returns:
        The fit. Its factor comes from a QR decomposition of the centred
        features, so small variances are not lost to the square in XᵀX.

    Raises:
        ValueError: not [n, d], fewer than two samples, or a non-finite value.
    """
    x = np.asarray(features)
    if x.ndim != 2 or x.shape[0] < 2 or x.shape[1] < 1:
        raise ValueError(
            f"features have shape {x.shape}; give [n, d] with at least two samples."
        )
    x = x.astype(np.float64)
    check_finite(x, "features")
    mean = x.mean(0)
    factor = np.linalg.qr((x - mean) / np.sqrt(len(x) - 1), mode="r")
    return GaussianStatistics(mean, np.asarray(factor), len(x))


def frechet_distance(
    features_x: Any | GaussianStatistics, features_y: Any | GaussianStatistics
) -> float:
    """Squared 2-Wasserstein distance between the Gaussian fits of two sets.

    |μx - μy|² + tr(Σx + Σy - 2 (Σx^½ Σy Σx^½)^½), the form that FID reports.
    With Σ = RᵀR the last trace is the sum of the singular values of Rx Ryᵀ:
    no matrix square root, so rank-deficient covariances keep full precision.

    The number means something only with the network that made the features;
    label it with :func:`frechet_label`. It is biased upward for small n, so
    compare at equal n and report the distance between two halves of the real
    data beside it.

    Args:
        features_x: [n, d] with n >= 2, or its :func:`gaussian_statistics`.
        features_y: [m, d] with m >= 2, or its :func:`gaussian_statistics`.

    Returns:
        The distance (>= 0), computed in float64 on the host.

    Warns:
        UserWarning: a set has no more than d samples. Its covariance is singular
            whatever the law, and the bias can exceed the distance.

    Raises:
        ValueError: not [n, d], widths that differ, fewer than two samples, or a
            non-finite value.

    References:
        Dowson and Landau 1982; Heusel et al. 2017, arXiv 1706.08500.
    """
    x, y = _statistics(features_x), _statistics(features_y)
    if x.mean.shape != y.mean.shape:
        raise ValueError(
            f"features_x has width {x.mean.size} but features_y has {y.mean.size}; "
            f"use one network for both."
        )
    for name, fit in (("features_x", x), ("features_y", y)):
        if fit.count <= fit.mean.size:
            warnings.warn(
                f"{name} has {fit.count} samples of width {fit.mean.size}: the "
                f"covariance is singular and the distance biased. Use more samples "
                f"than features.",
                UserWarning,
                stacklevel=2,
            )
    cross = np.linalg.svd(x.factor @ y.factor.T, compute_uv=False).sum()
    spread = np.square(x.factor).sum() + np.square(y.factor).sum() - 2 * cross
    return max(0.0, float(np.square(x.mean - y.mean).sum() + spread))


def frechet_label(network: str, params: PyTree) -> str:
    """Name of a Frechet distance that says which features it used.

    Args:
        network: short name of the feature network.
        params: its parameter tree.

    Returns:
        ``'FD-<network>@<hash>'``, the first 8 hex digits of the parameters' hash.
    """
    return f"FD-{network}@{content_hash(params)[:8]}"


def _statistics(features: Any | GaussianStatistics) -> GaussianStatistics:
    if isinstance(features, GaussianStatistics):
        return features
    return gaussian_statistics(features)
