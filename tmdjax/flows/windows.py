"""Which steps of a grid are stochastic: windows, and how they move over a run.

A window is a bool [steps] on the host, True where a step keeps its noise; the others
become ODE steps (``flows.make_table(..., window=...)``), which cost no storage and are
not trained.
"""

import numpy as np

from tmdjax.core.checks import check_choice, check_count, check_range

WINDOW_SCHEDULES = ("fixed", "progressive", "random", "decay", "exp_decay")


def window(steps: int, start: int, size: int) -> np.ndarray:
    """True on ``start .. start + size - 1`` of so many steps.

    Raises:
        ValueError: the window leaves the grid or is empty.
    """
    check_count("size", size)
    check_range("start", start, 0, steps - size)
    index = np.arange(steps)
    return (index >= start) & (index < start + size)


def periodic_windows(steps: int, stride: int, size: int) -> np.ndarray:
    """True on ``q stride .. q stride + size - 1`` for every q.

    References:
        The ODE/SDE mix of BranchGRPO, arXiv 2509.06040 (its code).
    """
    check_count("stride", stride)
    check_count("size", size)
    return np.arange(steps) % stride < size


def window_start(
    iteration: int,
    *,
    low: int = 0,
    high: int,
    size: int,
    schedule: str = "progressive",
    stride: int = 1,
    iterations: int = 25,
    at_end: str = "restart",
    seed: int = 0,
    decay_rate: float = 0.1,
    decay_from: int = 13,
) -> int:
    """First step of the window in a training iteration.

    Positions run from ``low`` by ``stride`` up to ``high - size``, which is always the
    last of them: no window is ever cut or empty.

    Args:
        iteration: counted from 0.
        low: first position.
        high: windows end at or before it; at most the number of steps.
        size: of the window.
        schedule: 'fixed' (always ``low``); 'progressive' (every position for so many
            iterations); 'random' (any start in low .. high - size, drawn anew every
            iteration from the seed); 'decay' (iterations a position fall linearly
            from ``iterations`` to 1); 'exp_decay' (ceil(iterations exp(-decay_rate
            max(position - decay_from, 0)))).
        stride: how far a position is from the next: 1 overlaps, ``size`` does not.
        iterations: spent at the first position.
        at_end: after the last position 'restart' from the first, or 'stay'.
        seed: of 'random'.
        decay_rate: of 'exp_decay', >= 0.
        decay_from: position after which 'exp_decay' sets in.

    Returns:
        The start, in [low, high - size].

    Raises:
        ValueError: settings out of range, or a window that does not fit.

    References:
        MixGRPO, arXiv 2507.21802 (progressive 25 iterations, stride 1, restart;
        decay from 10; exp_decay from 13). Random windows: Flow-GRPO's fast variant.
    """
    check_choice("schedule", schedule, WINDOW_SCHEDULES)
    check_choice("at_end", at_end, ("restart", "stay"))
    check_count("iteration", iteration, 0)
    check_count("size", size)
    check_count("stride", stride)
    check_count("iterations", iterations)
    check_range("decay_rate", decay_rate, 0)
    check_range("low", low, 0, high - size)
    last = high - size
    if schedule == "fixed":
        return low
    if schedule == "random":
        rng = np.random.default_rng([seed, iteration])
        return int(rng.integers(low, last, endpoint=True))
    positions = np.append(np.arange(low, last, stride), last)
    if schedule == "progressive":
        spent = np.full(len(positions), iterations)
    elif schedule == "decay":
        spent = np.rint(np.linspace(iterations, 1, len(positions))).astype(int)
    else:
        late = np.maximum(positions - decay_from, 0)
        spent = np.ceil(iterations * np.exp(-decay_rate * late)).astype(int)
    ends = np.cumsum(spent)
    if at_end == "restart":
        iteration %= int(ends[-1])
    index = int(np.searchsorted(ends, iteration, side="right"))
    return int(positions[min(index, len(positions) - 1)])
