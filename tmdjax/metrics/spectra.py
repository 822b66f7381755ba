"""What fields, and errors of fields, hold at each wavenumber of a periodic domain."""

from typing import Any

import numpy as np

from tmdjax.core.checks import check_count, check_same_shape


def power_spectrum(fields: Any, dims: int = 1) -> np.ndarray:
    """Mean square of a field that lies at each wavenumber.

    Shell n gathers the modes whose length, in waves a domain, rounds to n; its physical
    wavenumber is 2 pi n / length. The shells add up to the mean square (Parseval); in
    two dimensions those beyond the n // 2 of a side hold the corners alone.

    Args:
        fields: [..., *space, channel], each axis of space the same periodic length.
        dims: axes of space, 1 to 3.

    Returns:
        float64 [..., shell, channel].

    Raises:
        TypeError, ValueError: dims out of range, or fewer axes than dims + 1.
    """
    fields = np.asarray(fields, np.float64)
    if check_count("dims", dims) > 3 or fields.ndim < dims + 1:
        raise ValueError(
            f"dims={dims} of fields of shape {fields.shape}; give 1 to 3, and fields "
            f"[..., *space, channel]."
        )
    axes = range(fields.ndim - 1 - dims, fields.ndim - 1)
    sizes = [fields.shape[axis] for axis in axes]
    grids = np.meshgrid(*(np.fft.fftfreq(n, 1 / n) for n in sizes), indexing="ij")
    shell = np.rint(np.sqrt(sum(grid**2 for grid in grids))).astype(int).ravel()
    count = int(np.prod(sizes))
    power = np.square(np.abs(np.fft.fftn(fields, axes=axes) / count))
    power = power.reshape(*fields.shape[: -1 - dims], count, fields.shape[-1])
    order = np.argsort(shell, kind="stable")
    starts = np.searchsorted(shell[order], np.arange(shell.max() + 1))
    return np.add.reduceat(power[..., order, :], starts, axis=-2)


def error_by_wavenumber(prediction: Any, target: Any, dims: int = 1) -> np.ndarray:
    """Relative error at each wavenumber, over all leading axes at once.

    sqrt(power of prediction - target / power of target) by shells of
    :func:`power_spectrum`: 1 where nothing was learned and 0 is predicted.

    Args:
        prediction: [..., *space, channel], such as one-step predictions of a batch.
        target: of the same shape.
        dims: axes of space, 1 to 3.

    Returns:
        float64 [shell]; infinite or NaN where the target holds nothing.

    Raises:
        ValueError: other shapes, or dims out of range.
    """
    check_same_shape("prediction", prediction, "target", target)
    target = np.asarray(target, np.float64)
    error = power_spectrum(np.asarray(prediction, np.float64) - target, dims)
    scale = power_spectrum(target, dims)
    over = (*range(error.ndim - 2), error.ndim - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(error.sum(over) / scale.sum(over))
