"""Numbers that compare samples, and intervals over seeds."""

from tmdjax.metrics.frechet import (
    GaussianStatistics,
    frechet_distance,
    frechet_label,
    gaussian_statistics,
)
from tmdjax.metrics.intervals import STATISTICS, Interval, paired_interval, t_interval
from tmdjax.metrics.sliced_wasserstein import sliced_wasserstein

__all__ = [
    "STATISTICS",
    "GaussianStatistics",
    "Interval",
    "frechet_distance",
    "frechet_label",
    "gaussian_statistics",
    "paired_interval",
    "sliced_wasserstein",
    "t_interval",
]
