"""How close images are to others: peak signal-to-noise ratio, structural similarity."""

from typing import Any

import numpy as np
from scipy import ndimage

from tmdjax.core.checks import check_range, check_same_shape

_RADIUS = 5  # of the window of 11 x 11
_SIGMA = 1.5


def psnr(prediction: Any, target: Any, *, data_range: float = 1.0) -> np.ndarray:
    """Peak signal-to-noise ratio of each image, in decibels.

    10 log10(data_range^2 / mean squared error). Average it over images, not the error:
    the two differ.

    Args:
        prediction: [..., height, width, channel]; clip it to the range of the target
            first, if that is what is shown.
        target: of the same shape.
        data_range: largest less smallest possible value, > 0.

    Returns:
        float64 [...]; infinite for equal images.

    Raises:
        ValueError: other shapes, fewer than 3 axes, or a range that is not positive.
    """
    prediction, target = _images(prediction, target, data_range)
    error = np.square(prediction - target).mean((-3, -2, -1))
    with np.errstate(divide="ignore"):
        return np.asarray(10 * np.log10(data_range**2 / error))


def ssim(prediction: Any, target: Any, *, data_range: float = 1.0) -> np.ndarray:
    """Structural similarity of each image, the mean over places and channels.

    The published index: Gaussian windows of 11 x 11 with deviation 1.5 that lie whole
    in the image, biased variances, K1 = 0.01, K2 = 0.03. It is skimage's
    ``structural_similarity(gaussian_weights=True, use_sample_covariance=False)``.

    Args:
        prediction: [..., height, width, channel], sides of at least 11; clip it to the
            range of the target first, if that is what is shown.
        target: of the same shape.
        data_range: largest less smallest possible value, > 0.

    Returns:
        float64 [...] in [-1, 1]; 1 for equal images.

    Raises:
        ValueError: other shapes, images smaller than a window, or a range that is not
            positive.

    References:
        Wang et al. 2004, Image quality assessment: from error visibility to structural
        similarity.
    """
    x, y = _images(prediction, target, data_range)
    if min(x.shape[-3:-1]) <= 2 * _RADIUS:
        raise ValueError(
            f"images of {x.shape[-3]} x {x.shape[-2]} are smaller than the window, "
            f"{2 * _RADIUS + 1} x {2 * _RADIUS + 1}; compare larger ones, or by psnr."
        )
    weights = np.exp(-0.5 * (np.arange(-_RADIUS, _RADIUS + 1) / _SIGMA) ** 2)
    weights /= weights.sum()

    def local(values: np.ndarray) -> np.ndarray:
        for axis in (-3, -2):
            values = ndimage.correlate1d(values, weights, axis)
        return values[..., _RADIUS:-_RADIUS, _RADIUS:-_RADIUS, :]

    mean_x, mean_y = local(x), local(y)
    variances = local(x * x) + local(y * y) - mean_x**2 - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    index = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    index /= (mean_x**2 + mean_y**2 + c1) * (variances + c2)
    return np.asarray(index.mean((-3, -2, -1)))


def _images(
    prediction: Any, target: Any, data_range: float
) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64 (uint8 would wrap around)."""
    check_same_shape("prediction", prediction, "target", target)
    check_range("data_range", data_range, 0, open_low=True)
    prediction, target = (np.asarray(x, np.float64) for x in (prediction, target))
    if prediction.ndim < 3:
        raise ValueError(
            f"images have shape {prediction.shape}; give [..., height, width, channel]."
        )
    return prediction, target
