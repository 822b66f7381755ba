"""What the rows of a training tell: its ends and its pace."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def ends(values: Any, parts: int) -> tuple[float, float]:
    """Means of the first and the last of so many equal parts of a curve [n]."""
    size = max(1, len(values) // parts)
    return float(values[:size].mean()), float(values[-size:].mean())


def seconds_per_step(rows: Sequence[Mapping[str, Any]]) -> float:
    """By the median rate of all rows but the first quarter, in which programs compile.

    Args:
        rows: what ``StageContext.fit`` logged.
    """
    rate = np.array([row["time/steps_per_second"] for row in rows])
    return float(1 / np.median(rate[len(rows) // 4 :]))
