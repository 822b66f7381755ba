"""What the rows of a training tell: its ends, its pace, and its picture."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tmdjax.harness.report import line_plot


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


def learning_curve(
    values: Any, path: pathlib.Path, title: str, y_label: str, each: int = 1
) -> tuple[str, pathlib.Path | None]:
    """A curve against iterations, as a caption and the path of a PNG.

    Args:
        values: [n], of iterations ``each``, ``2 * each``, ...
        path: of the PNG.
        title: of the plot, and its caption.
        y_label: of the values.
        each: iterations a value stands for.
    """
    iterations = each * np.arange(1, len(values) + 1)
    curves = {y_label: (iterations, values)}
    return title, line_plot(curves, path, title, "iteration", y_label)
