"""Contenders timed in turn in one process, and the table of their ratios."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table

Seconds = Mapping[str, float]
"""Of every phase of a run, by name."""

Contender = Callable[[], Seconds]
Row = dict[str, Any]


def timed(fn: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until all that a call returns is ready, and what it returns."""
    start = time.perf_counter()
    found = jax.block_until_ready(fn())
    return time.perf_counter() - start, found


def in_turn(
    contenders: Mapping[str, Contender], repeats: int, seed: int = 0
) -> dict[str, list[Seconds]]:
    """What each contender measured in each repeat, after one that does not count."""
    order = np.random.default_rng(seed)
    found: dict[str, list[Seconds]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(repeats):
        for name in order.permutation(list(contenders)):
            found[str(name)].append(contenders[str(name)]())
    return found


def compare(
    what: str,
    ours: Sequence[Seconds],
    rival: Sequence[Seconds],
    goals: Mapping[str, float] | None = None,
) -> list[Row]:
    """A row for each phase both measured: medians, and the ratio with its quartiles."""
    rows = []
    for phase in ours[0]:
        a, b = ([one[phase] for one in each] for each in (ours, rival))
        ratios = [x / y for x, y in zip(a, b)]
        low, high = np.quantile(ratios, [0.25, 0.75])
        rows.append(
            {
                "what": f"{what}: {phase}",
                "unit": "s",
                "ours": statistics.median(a),
                "rival": statistics.median(b),
                "ratio": statistics.median(ratios),
                "quartiles": [float(low), float(high)],
                "goal": (goals or {}).get(phase),
            }
        )
    return rows


def show(rows: Sequence[Row], title: str) -> None:
    """Prints the table."""
    table = rich.table.Table(title=title)
    for column in ("what", "ours", "rival", "ratio", "quartiles", "goal"):
        table.add_column(column, justify="left" if column == "what" else "right")

    def number(value: Any, unit: str = "") -> str:
        return "" if value is None else f"{value:.4g} {unit}".strip()

    for row in rows:
        table.add_row(
            row["what"],
            number(row["ours"], row["unit"]),
            number(row.get("rival"), row["unit"]),
            number(row.get("ratio")),
            " .. ".join(number(x) for x in row.get("quartiles", ())),
            number(row.get("goal")),
        )
    rich.console.Console(width=120).print(table)
