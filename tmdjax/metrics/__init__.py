"""Numbers that compare samples, and intervals over seeds."""

from tmdjax.metrics.frechet import (
    GaussianStatistics,
    frechet_distance,
    frechet_label,
    gaussian_statistics,
)
from tmdjax.metrics.intervals import STATISTICS, Interval, paired_interval, t_interval
from tmdjax.metrics.precision_recall import precision_recall
from tmdjax.metrics.sliced_wasserstein import sliced_wasserstein

__all__ = [
    "STATISTICS",
    "GaussianStatistics",
    "Interval",
    "frechet_distance",
    "frechet_label",
    "gaussian_statistics",
    "paired_interval",
    "precision_recall",
    "sliced_wasserstein",
    "t_interval",
]
