"""Precision and recall of a generator, by balls around nearest neighbours."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from tmdjax.core.checks import check_count, check_finite

# Distances held at a time (float64): 32 MiB.
_CHUNK_VALUES = 2**22


def precision_recall(
    features: Any, reference: Any, neighbours: int = 3
) -> tuple[float, float]:
    """Improved precision and recall of generated features.

    Around every point of a set stands the closed ball that reaches to its k-th
    nearest neighbour in the set, itself not counted. Precision is the fraction of
    generated points inside some ball of the reference (quality); recall is the
    fraction of reference points inside some ball of the generated set (coverage).

    Both numbers depend on the sizes of the sets and on k, and mean something only
    with the network that made the features: compare at equal n, m and k. One
    outlier in a set has a large ball, which takes in whatever lies around it.

    Beside float64 copies of both sets, up to three buffers of 32 MiB (or of one row
    of distances to a set, where that is more) are held.

    Args:
        features: generated, [n, d] with n > neighbours.
        reference: real, [m, d] with m > neighbours; from the same network.
        neighbours: k, at least 1; the paper takes 3.

    Returns:
        (precision, recall), each in [0, 1], computed in float64 on the host.
        Distances equal up to rounding count as equal, so identical sets give
        (1, 1), repeated points too.

    Raises:
        ValueError: a set is not [n, d], is too small or holds a non-finite value;
            widths that differ; neighbours < 1.
        TypeError: neighbours is no integer.

    References:
        Kynkaanniemi et al. 2019, arXiv 1904.06991, equations 1 and 2.
    """
    k = check_count("neighbours", neighbours)
    x, y = _checked(features, "features", k), _checked(reference, "reference", k)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"features have width {x.shape[1]} but reference has {y.shape[1]}; use "
            f"one network for both."
        )
    # A common offset would cancel in the distances and cost digits.
    centre = y.mean(0)
    x, y = x - centre, y - centre
    radii_x, radii_y = _radii(x, k), _radii(y, k)
    precise, recalled = 0, np.zeros(len(y), bool)
    for rows, squares in _squared_distances(x, y, -_rounding(x)):
        precise += int((squares <= radii_y).any(1).sum())
        recalled |= (squares <= radii_x[rows, None]).any(0)
    return precise / len(x), float(recalled.mean())


def _checked(features: Any, name: str, k: int) -> np.ndarray:
    array = np.asarray(features)
    if array.ndim != 2 or array.shape[1] < 1:
        raise ValueError(f"{name} has shape {array.shape}; give features [n, d].")
    if len(array) <= k:
        raise ValueError(
            f"{name} has {len(array)} sample(s), too few for neighbours={k}; give at "
            f"least {k + 1}."
        )
    array = array.astype(np.float64)
    check_finite(array, name)
    return array


def _rounding(x: np.ndarray) -> float:
    """Error of |x|² + |y|² - 2 x·y over |x|² + |y|²: three sums of d products."""
    return (2 * x.shape[1] + 4) * float(np.finfo(np.float64).eps)


def _squared_distances(
    x: np.ndarray, y: np.ndarray, slack: float
) -> Iterator[tuple[slice, np.ndarray]]:
    """Squared distances of some rows of x to all of y, and which rows.

    With the slack of :func:`_rounding` they are upper bounds of the exact ones,
    with its negative lower bounds.
    """
    squares_x, squares_y = (np.einsum("nd,nd->n", z, z) for z in (x, y))
    size = max(1, _CHUNK_VALUES // len(y))
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        part = np.add.outer(squares_x[rows], squares_y)
        part *= 1 + slack
        part -= (2 * x[rows]) @ y.T
        yield rows, part


def _radii(x: np.ndarray, k: int) -> np.ndarray:
    """Squared distance [n] of every point to its k-th nearest other point."""
    radii = np.empty(len(x))
    for rows, squares in _squared_distances(x, x, _rounding(x)):
        own = np.arange(len(x))[rows]
        squares[own - rows.start, own] = np.inf
        squares.partition(k - 1, axis=1)
        radii[rows] = squares[:, k - 1]
    return radii
