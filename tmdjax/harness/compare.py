"""Runs side by side: the same metrics over the same seeds, with their significance."""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tmdjax.core.registry import suggestion
from tmdjax.harness.records import read_summary
from tmdjax.harness.summaries import Summary, by_seed, numbers
from tmdjax.metrics.intervals import adjusted_p_values, paired_interval, paired_p_value


@dataclasses.dataclass(frozen=True)
class Run:
    """Metrics of one run by seed.

    Attributes:
        name: shown for it.
        device: kind that it ran on.
        seeds: {seed: {metric: value}}; metrics of arms are called 'arm/metric', those
            of a run with one arm, or of which one was chosen, 'metric'.
    """

    name: str
    device: str
    seeds: Mapping[int, Mapping[str, float]]


def read_run(text: str) -> Run:
    """A run from 'PATH' or 'PATH:ARM'.

    PATH is a workdir, its summary.json, or a record of results/.

    Raises:
        FileNotFoundError: no summary there.
        ValueError: no such arm, or a file of another kind.
    """
    path, arm = pathlib.Path(text), None
    if not path.exists() and ":" in text:
        before, _, arm = text.rpartition(":")
        path = pathlib.Path(before)
    file = path / "summary.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is not there; give a workdir of a finished run, its summary.json, "
            f"or a record under results/, each with :ARM for one arm."
        )
    summary: Summary = read_summary(file)
    units = summary["units"]
    arms = sorted({unit["arm"] for unit in units})
    if arm is not None and arm not in arms:
        raise ValueError(
            f"{file} has no arm {arm!r}; it has {', '.join(arms)}."
            f"{suggestion(arm, arms)}"
        )
    if arm is None:
        return Run(text, summary["device"], by_seed(units))
    seeds = {unit["seed"]: numbers(unit) for unit in units if unit["arm"] == arm}
    return Run(text, summary["device"], seeds)


def comparison_rows(
    runs: Sequence[Run], metrics: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Every run against the first, on the seeds that both have.

    Args:
        runs: two or more.
        metrics: to compare, each once; all that the runs share if empty.

    Returns:
        A row a metric and run: means over shared seeds, the mean difference with its
        95 % t interval as text, the p-value of the paired t test, and that p-value
        adjusted for all rows (Holm). With one shared seed, or where all differences
        are equal, there is no p-value.

    Raises:
        ValueError: fewer than two runs, a run twice, none or an unknown metric in
            common, or no shared seed.
    """
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} run(s) to compare; give two or more.")
    for one, other in itertools.combinations(runs, 2):
        if os.path.realpath(one.name) == os.path.realpath(other.name):
            # the p-values of a table are adjusted for their number
            raise ValueError(f"{other.name} is given twice; compare different runs.")
    metrics = tuple(dict.fromkeys(metrics))
    base, *others = runs
    rows = []
    for other in others:
        seeds = sorted(base.seeds.keys() & other.seeds.keys())
        if not seeds:
            raise ValueError(
                f"{base.name} has the seeds {sorted(base.seeds)}, {other.name} "
                f"{sorted(other.seeds)}: none in common. Run them on the same seeds."
            )
        shared = set.intersection(
            *(set(run.seeds[seed]) for run in (base, other) for seed in seeds)
        )
        if not shared:
            raise ValueError(
                f"{base.name} and {other.name} share no metric on all seeds; choose "
                f"an arm of each: PATH:ARM."
            )
        for metric in metrics:
            if metric not in shared:
                raise ValueError(
                    f"{base.name} and {other.name} do not share {metric!r}; they share "
                    f"{', '.join(sorted(shared))}.{suggestion(metric, shared)}"
                )
        for metric in metrics or sorted(shared):
            ours = [other.seeds[seed][metric] for seed in seeds]
            theirs = [base.seeds[seed][metric] for seed in seeds]
            rows.append(_row(metric, base, other, seeds, ours, theirs))
    adjusted = iter(adjusted_p_values([r["p"] for r in rows if r["p"] is not None]))
    for row in rows:
        row["p (Holm)"] = None if row["p"] is None else next(adjusted)
    return rows


def _row(
    metric: str,
    base: Run,
    other: Run,
    seeds: Sequence[int],
    ours: Sequence[float],
    theirs: Sequence[float],
) -> dict[str, Any]:
    try:
        found = paired_interval(ours, theirs, "difference")
        p = paired_p_value(ours, theirs)
        interval = None if found.low is None else f"{found.low:.4g} .. {found.high:.4g}"
        difference: float | None = found.value
    except ValueError:  # a seed that diverged: shown, not averaged away
        difference, interval, p = None, None, None
    return {
        "metric": metric,
        "run": other.name,
        "mean": sum(ours) / len(ours),
        f"mean of {base.name}": sum(theirs) / len(theirs),
        "difference": difference,
        "ci95": interval,
        "seeds": len(seeds),
        "p": p,
    }
