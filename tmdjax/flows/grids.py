"""Time grids: host float64 arrays in the order they are walked, 1 down to 0."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tmdjax.core.checks import check_count, check_range, check_time
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
    """N + 1 equidistant knots from exactly 1 to exactly 0; N at least 1."""
    return np.linspace(1.0, 0.0, check_count("steps", steps) + 1)


def shift_time(t: Any, shift: float) -> Any:
    """Moves times to shift t / (1 + (shift - 1) t): towards the noise for shift > 1.

    References:
        Esser et al., arXiv 2403.03206, eq. 23 (resolution-dependent shifting).
    """
    check_range("shift", shift, 0, open_low=True, open_high=True)
    return shift * t / (1 + (shift - 1) * t)


def shifted_grid(steps: int, shift: float) -> Grid:
    """The uniform grid under :func:`shift_time`; shift=1 leaves it as it is.

    Raises:
        TypeError: steps that are no integer.
        ValueError: steps < 1, or a shift out of (0, inf) or so large that two knots
            are one.
    """
    return custom_grid(shift_time(uniform_grid(steps), shift))


def discrete_shifted_grid(steps: int, shift: float, training_steps: int = 1000) -> Grid:
    """The shifted grid of schedulers that count in training steps, as for SD3.

    Times from 1 down to the shifted 1 / training_steps, equidistant, are shifted once
    more, and 0 is appended: the last step before data is shorter than that of
    :func:`shifted_grid`. For FLUX the two agree, as its pipelines set the times: there
    the grid is ``shifted_grid(steps, resolution_shift(tokens))``. That of Wan's own
    solvers is ``shift_time(0.999 * uniform_grid(steps), shift)``.

    Args:
        steps: N, at least 2.
        shift: > 0; 3 for SD3 and SD3.5.
        training_steps: at least 2.

    Returns:
        N + 1 float64 times from exactly 1 to exactly 0.

    Raises:
        TypeError: counts that are no integers.
        ValueError: a number out of range.

    References:
        ``FlowMatchEulerDiscreteScheduler`` of diffusers, without dynamic shifting.
    """
    check_count("steps", steps, 2)
    check_count("training_steps", training_steps, 2)
    last = shift_time(1 / training_steps, shift)
    return custom_grid([*shift_time(np.linspace(1.0, last, steps), shift), 0.0])


def resolution_shift(
    tokens: int,
    low: tuple[int, float] = (256, 0.5),
    high: tuple[int, float] = (4096, 1.15),
) -> float:
    """The shift for an image of so many tokens: exp(mu), mu linear in their number.

    Args:
        tokens: positions of the transformer, at least 1.
        low: a number of tokens, and mu there: base_image_seq_len and base_shift of a
            ``scheduler_config.json``. Those of FLUX by default.
        high: another number, and mu there: max_image_seq_len and max_shift; (8192,
            0.9) for Qwen-Image.

    Raises:
        TypeError: a number of tokens that is no integer.
        ValueError: one below 1, or so many that the shift is infinite; high at no more
            tokens than low.

    References:
        ``calculate_shift`` of the pipelines in diffusers, which hand
        ``FlowMatchEulerDiscreteScheduler`` mu where it has use_dynamic_shifting.
    """
    (fewest, least), (most, last) = low, high
    check_count("tokens of high", most, check_count("tokens of low", fewest) + 1)
    slope = (last - least) / (most - fewest)
    mu = least + slope * (check_count("tokens", tokens) - fewest)
    check_range(f"mu of {tokens} tokens", mu, -700, 700)  # exp holds no more
    return float(np.exp(mu))


def stretched_grid(grid: Grid, terminal: float) -> Grid:
    """A grid whose last time before 0 is moved to ``terminal``, the others with it.

    Distances from 1 are scaled by one number; for Qwen-Image and LTX-Video,
    ``stretched_grid(shifted_grid(steps, resolution_shift(...)), terminal)``.

    Args:
        grid: N + 1 times that begin at 1 and end at 0, N at least 2.
        terminal: in (0, 1); shift_terminal of a ``scheduler_config.json``, 0.02 for
            Qwen-Image.

    Raises:
        ValueError: no grid, one of a single step or that does not begin at 1, or a
            terminal out of range.

    References:
        ``FlowMatchEulerDiscreteScheduler.stretch_shift_to_terminal`` of diffusers.
    """
    grid = custom_grid(grid)
    check_range("terminal", terminal, 0, 1, open_low=True, open_high=True)
    if len(grid) < 3 or grid[0] != 1:
        raise ValueError(
            f"the grid {grid.tolist()} cannot be stretched; give one of two steps or "
            f"more that begins at 1."
        )
    inner = grid[:-1]
    return np.append(1 - (1 - inner) * (1 - terminal) / (1 - inner[-1]), 0.0)


def truncated_grid(steps: int, shift: float, start: float = 0.999) -> Grid:
    """Knots start, shift(i start / steps), ..., 0: few steps from just below noise.

    Only the knots between are shifted. Networks pretrained on t <= start are thus
    never evaluated beyond it.

    Args:
        steps: at least 1.
        shift: at least 1; larger moves the knots between towards the noise.
        start: the first knot, in (0, 1].

    Returns:
        steps + 1 float64 times from exactly start to exactly 0.

    Raises:
        ValueError: steps < 1, shift < 1, start outside (0, 1], or a shift so large
            that the first knots do not decrease.

    References:
        arXiv 2601.09881, appendix A; footnote 2 for start.
    """
    check_count("steps", steps)
    check_range("shift", shift, 1)
    check_range("start", start, 0, 1, open_low=True)
    grid = shift_time(np.arange(steps, -1, -1) / steps * start, shift)
    grid[0] = start
    return custom_grid(grid)


def edm_grid(
    steps: int, *, rho: float = 7.0, sigma_min: float = 0.002, sigma_max: float = 80.0
) -> Grid:
    """Knots at the noise levels of EDM: sigma^(1/rho) equidistant, then data.

    sigma = t / (1 - t) is the noise-to-data ratio of the linear path; the first knot
    is moved from sigma_max to exactly 1 (pure noise), where every grid begins.

    Args:
        steps: N, at least 1.
        rho: how strongly knots gather near the data, > 0.
        sigma_min: ratio at the last knot before 0, > 0.
        sigma_max: ratio at the first knot, > sigma_min.

    Returns:
        N + 1 float64 times from exactly 1 to exactly 0.

    References:
        Karras et al., arXiv 2206.00364, eq. 5.
    """
    check_count("steps", steps)
    check_range("rho", rho, 0, open_low=True, open_high=True)
    check_range("sigma_min", sigma_min, 0, open_low=True)
    check_range("sigma_max", sigma_max, sigma_min, open_low=True, open_high=True)
    s = np.linspace(1.0, 0.0, steps)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigma = (low + s * (high - low)) ** rho
    grid = np.append(sigma / (1 + sigma), 0.0)
    grid[0] = 1.0
    return custom_grid(grid)
