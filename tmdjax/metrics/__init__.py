"""Numbers that compare samples, and intervals over seeds and samples."""

from tmdjax.metrics.diversity import position_entropy
from tmdjax.metrics.frechet import (
    GaussianStatistics,
    frechet_distance,
    frechet_label,
    gaussian_statistics,
)
from tmdjax.metrics.intervals import (
    STATISTICS,
    Interval,
    bootstrap_interval,
    paired_interval,
    t_interval,
)
from tmdjax.metrics.precision_recall import precision_recall
from tmdjax.metrics.sliced_wasserstein import sliced_wasserstein
from tmdjax.metrics.video_features import (
    conv3d_layers,
    random_conv3d,
    video_features,
)

__all__ = [
    "STATISTICS",
    "GaussianStatistics",
    "Interval",
    "bootstrap_interval",
    "conv3d_layers",
    "frechet_distance",
    "frechet_label",
    "gaussian_statistics",
    "paired_interval",
    "position_entropy",
    "precision_recall",
    "random_conv3d",
    "sliced_wasserstein",
    "t_interval",
    "video_features",
]
