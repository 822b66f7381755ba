"""Figures of what all units measured, an arm a row."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

from tmdjax.harness.plots import interval_plot


def side_by_side(
    found: Mapping[str, Any],
    rows: Mapping[str, Mapping[str, str]],
    path: pathlib.Path,
    title: str,
    label: str,
) -> list[tuple[str, pathlib.Path | None]]:
    """One figure, as a list for ``summary_figures``; none where nothing is measured.

    Args:
        found: intervals by metric, as ``summary_figures`` is given them.
        rows: by the text beside a row, metrics by the name of their series.
        path: of the PNG.
        title: of the figure.
        label: of its one axis.
    """
    kept = {
        row: {
            series: found[metric]
            for series, metric in metrics.items()
            if metric in found and math.isfinite(found[metric].value)
        }
        for row, metrics in rows.items()
    }
    kept = {row: intervals for row, intervals in kept.items() if intervals}
    if not kept:
        return []
    return [(f"{title}: {label}", interval_plot(kept, path, title, label))]
