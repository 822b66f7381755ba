"""Time grids: host float64 arrays in the order they are walked, 1 down to 0."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tmdjax.core.checks import check_range, check_time
from tmdjax.core.types import Grid


def custom_grid(times: Sequence[float] | np.ndarray) -> Grid:
    """Checks a hand-made grid and returns it as float64.

    Args:
        times: strictly decreasing, within [0, 1], ending at 0.

    Returns:
        Float64 array of N + 1 knots for N steps.

    Raises:
        ValueError: too short, increasing somewhere, outside [0, 1], or not
            ending at 0; the offending values are named.
    """
    grid = np.asarray(times, np.float64)
    if grid.ndim != 1 or grid.size < 2:
        raise ValueError(
            f"a grid needs at least two knots in one dimension, got shape {grid.shape}."
        )
    check_time(grid, "grid")
    rising = np.flatnonzero(np.diff(grid) >= 0)
    if rising.size:
        i = int(rising[0])
        raise ValueError(
            f"a grid must strictly decrease (1 is noise, 0 is data), but knot {i} is "
            f"{grid[i]} and knot {i + 1} is {grid[i + 1]}."
        )
    if grid[-1] != 0:
        raise ValueError(f"a grid must end at 0 (data), the last knot is {grid[-1]}.")
    return grid


def uniform_grid(steps: int) -> Grid:
    """N + 1 equidistant knots from exactly 1 to exactly 0."""
    if steps < 1:
        raise ValueError(f"steps={steps}; a grid needs at least one step.")
    return np.linspace(1.0, 0.0, steps + 1)


def shift_time(t: Any, shift: float) -> Any:
    """T -> shift t / (1 + (shift - 1) t): more time near the noise for shift > 1.

    References:
        Esser et al., arXiv 2403.03206, eq. 23 (resolution-dependent shifting).
    """
    check_range("shift", shift, 0, open_low=True)
    return shift * t / (1 + (shift - 1) * t)


def shifted_grid(steps: int, shift: float) -> Grid:
    """The uniform grid under :func:`shift_time`; shift=1 leaves it as it is."""
    return shift_time(uniform_grid(steps), shift)
