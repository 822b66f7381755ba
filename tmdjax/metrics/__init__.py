"""Numbers that compare samples, and intervals over seeds and samples."""

from tmdjax.metrics.diversity import position_entropy as position_entropy
from tmdjax.metrics.frechet import GaussianStatistics as GaussianStatistics
from tmdjax.metrics.frechet import frechet_distance as frechet_distance
from tmdjax.metrics.frechet import frechet_label as frechet_label
from tmdjax.metrics.frechet import gaussian_statistics as gaussian_statistics
from tmdjax.metrics.image_quality import psnr as psnr
from tmdjax.metrics.image_quality import ssim as ssim
from tmdjax.metrics.intervals import Interval as Interval
from tmdjax.metrics.intervals import bootstrap_interval as bootstrap_interval
from tmdjax.metrics.intervals import paired_interval as paired_interval
from tmdjax.metrics.intervals import t_interval as t_interval
from tmdjax.metrics.precision_recall import precision_recall as precision_recall
from tmdjax.metrics.rollouts import HighCorrelationTime as HighCorrelationTime
from tmdjax.metrics.rollouts import ensemble_correlation as ensemble_correlation
from tmdjax.metrics.rollouts import growth as growth
from tmdjax.metrics.rollouts import high_correlation_time as high_correlation_time
from tmdjax.metrics.rollouts import horizon_errors as horizon_errors
from tmdjax.metrics.rollouts import pearson_correlation as pearson_correlation
from tmdjax.metrics.sliced_wasserstein import sliced_wasserstein as sliced_wasserstein
from tmdjax.metrics.spectra import error_by_wavenumber as error_by_wavenumber
from tmdjax.metrics.spectra import power_spectrum as power_spectrum
from tmdjax.metrics.video_features import conv3d_layers as conv3d_layers
from tmdjax.metrics.video_features import random_conv3d as random_conv3d
from tmdjax.metrics.video_features import video_features as video_features
