"""How varied samples of one condition are: mode collapse passes other measures."""

from typing import Any

import numpy as np

from tmdjax.core.checks import check_batch, check_range


def position_entropy(positions: Any, groups: Any, *, cell: float = 1.0) -> float:
    """Entropy of where samples are, given their group; the mean over groups.

    -sum_b p_b log p_b over the histogram of a group's positions, in nats. 0 is one
    place for all; places that are all equally likely give the log of their number.

    With few samples a group the estimate is low, by about (places - 1) / (2 n):
    compare at equal n, with real samples beside.

    Args:
        positions: [n, dim]; a row that is not finite (nothing was there) is left out,
            and a group without any other counts as 0.
        groups: integers [n], such as prompts.
        cell: side of a bin, > 0. Bins begin a quarter of a cell below the whole
            numbers, so whole and half multiples, where sprites have their middles, lie
            off their edges.

    Returns:
        The mean, >= 0.

    Raises:
        ValueError: other axes, no sample, lengths that differ, or cell <= 0.
    """
    check_range("cell", cell, 0, open_low=True)
    positions, groups = np.asarray(positions, np.float64), np.asarray(groups)
    if positions.ndim != 2 or groups.ndim != 1 or not len(groups):
        raise ValueError(
            f"positions have shape {positions.shape} and groups {groups.shape}; give "
            f"[n, dim] and [n] with n >= 1."
        )
    check_batch("positions", positions, len(groups))
    entropies = []
    for group in np.unique(groups):
        rows = positions[groups == group]
        rows = rows[np.isfinite(rows).all(1)]
        if not len(rows):
            entropies.append(0.0)
            continue
        bins = np.floor(rows / cell + 0.25)
        counts = np.unique(bins, axis=0, return_counts=True)[1]
        share = counts / len(rows)
        entropies.append(-float(np.sum(share * np.log(share))))
    return max(0.0, float(np.mean(entropies)))
