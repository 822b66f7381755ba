"""Where the time of an asynchronous run went, from its log of events alone.

    python -m experiments.timeline RUN [--workdir FOLDER]

RUN is the folder that ``runtime.fit_asynchronously`` was given, with the logs of all
its starts, or a single log. Prints who was busy and who waited for what, and writes
report.html and its figures into FOLDER, by default RUN/timeline. However long a log is,
figures have a bounded number of bands, bars and points.
"""

import argparse
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.run import Parser
from tmdjax.core.failures import exit_with
from tmdjax.core.files import named_path
from tmdjax.harness import Report
from tmdjax.harness.plots import bar_plot, histogram_plot, line_plot, timeline_plot
from tmdjax.harness.report import text_table, write_report
from tmdjax.runtime.events import (
    Event,
    Timeline,
    lengths,
    rate,
    read_run,
    staleness,
    timelines,
    total,
)
from tmdjax.runtime.executors.deaths import DIED

MOST_BANDS = 40  # a worker each; of more workers there is a band a role
MOST_BARS = 40
PERIODS = 900  # of the timeline
POINTS = 60  # of the tokens a second
RATES = {
    "written": ("decode", "drawn"),
    "trained on, with prompts": ("learn", "tokens"),
}
"""Tokens a second, by the step and the amount that has them."""


def report(events: Sequence[Event], folder: pathlib.Path) -> Report:
    """What a run's report shows of its events: two tables and up to five figures.

    Args:
        events: of a run, from :func:`tmdjax.runtime.events.read_run`.
        folder: where figures go.

    Raises:
        ValueError: the events took no time, or there is none.
    """
    roles = in_order(timelines(events, periods=PERIODS))
    if not any(found.edges[-1] > 0 for found in roles.values()):
        raise ValueError(
            "the log has no step that took time, so there is nothing to show; ask "
            "again once the run has done something."
        )
    kind, rows = "role", roles
    if len({event.worker for event in events}) <= MOST_BANDS:
        kind = "worker"
        rows = in_order(timelines(events, periods=PERIODS, by=kind))
    edges = next(iter(roles.values())).edges
    spent = spent_by_role(roles)
    busiest = max(spent, key=lambda role: spent[role]["busy"])
    bars = "share of the time of all workers of a role"
    told = (
        f"Where the time went; the busiest is {busiest}, {spent[busiest]['busy']:.0%}"
    )
    nothing = dict.fromkeys(spent[busiest], np.zeros(PERIODS))
    bands = {name: nothing | found.shares for name, found in rows.items()}
    figures = [
        (
            f"Busy, and reasons to wait: a band a {kind}",
            timeline_plot(bands, edges, folder / "timeline.png", "Timeline", "seconds"),
        ),
        (told, bar_plot(spent, folder / "utilisation.png", "Utilisation", bars)),
    ]
    if by_lag := staleness(events):
        heights, bins = whole_histogram(list(by_lag), list(by_lag.values()))
        path, label = folder / "staleness.png", "versions behind the weights they train"
        given = ({"": heights}, bins, path, "Staleness", label, "tokens trained on")
        figures.append(("Staleness of tokens", histogram_plot(*given)))
    found = lengths(events)
    if found["written"].size:
        series, bins = shares_by_length(found)
        path, label = folder / "lengths.png", "tokens of a response"
        given = (series, bins, path, "Lengths", label, "share of responses")
        figures.append(
            ("Lengths of responses, trained and all", histogram_plot(*given))
        )
    edges = np.linspace(0.0, edges[-1], POINTS + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    curves = {name: (middles, rate(events, *of, edges)) for name, of in RATES.items()}
    path = folder / "throughput.png"
    path = line_plot(curves, path, "Throughput", "seconds", "tokens a second")
    figures.append(("Tokens a second", path))
    return Report(
        [
            (told, [{"role": role} | parts for role, parts in spent.items()]),
            ("What was done", [totals(events, float(edges[-1]), by_lag)]),
        ],
        figures,
    )


def in_order(found: Mapping[str, Timeline]) -> dict[str, Timeline]:
    """By role and number of the worker, the controller last."""

    def place(name: str) -> tuple[Any, ...]:
        role, _, number = name.partition("/")
        return role == "control", role, len(number), number

    return {name: found[name] for name in sorted(found, key=place)}


def spent_by_role(roles: Mapping[str, Timeline]) -> dict[str, dict[str, float]]:
    """Shares of the whole run: 'busy', and waits by reason; all roles have all."""
    reasons = dict.fromkeys(name for found in roles.values() for name in found.waits)
    return {
        role: {
            name: float(np.sum(spent)) / (found.workers * float(found.edges[-1]))
            for name, spent in {
                "busy": found.busy,
                **{reason: found.waits.get(reason, 0.0) for reason in reasons},
            }.items()
        }
        for role, found in roles.items()
    }


def totals(
    events: Sequence[Event], seconds: float, by_lag: Mapping[int, int]
) -> dict[str, Any]:
    """Counts of a run that took some seconds, by tokens of each lag that it trained."""
    tokens = sum(by_lag.values())
    lag = sum(behind * count for behind, count in by_lag.items())
    written = total(events, *RATES["written"])
    return {
        "seconds": seconds,
        "updates": sum(e.what == "learn" for e in events),
        "tokens written": written,
        "tokens written a second": written / seconds,
        "tokens trained on": tokens,
        "mean lag": lag / tokens if tokens else None,
        "largest lag": max(by_lag, default=None),
        "responses trained on": lengths(events)["trained"].size,
        "workers that died": sum(e.what == DIED for e in events),
    }


def whole_histogram(
    values: Any, weights: Any = None, edges: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Counts of whole numbers in at most ``MOST_BARS`` bins of equal, whole width.

    Args:
        values: [n] integers, at least one.
        weights: [n], how much each counts; None counts each once.
        edges: where bins begin and end; None has them hold all values.

    Returns:
        Heights [bin], and edges [bin + 1], which lie between whole numbers.
    """
    if edges is None:
        low, high = int(np.min(values)), int(np.max(values))
        width = -(-(high - low + 1) // MOST_BARS)
        bins = -(-(high - low + 1) // width)
        edges = low - 0.5 + width * np.arange(bins + 1)
    return np.histogram(values, edges, weights=weights)


def shares_by_length(
    found: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Histograms of lengths over the same bins, each of sum 1; and the edges.

    Args:
        found: by name, from :func:`tmdjax.runtime.events.lengths`; one without a
            response is left out.
    """
    _, edges = whole_histogram(np.concatenate(list(found.values())))
    shares = {
        name: whole_histogram(values, edges=edges)[0] / values.size
        for name, values in found.items()
        if values.size
    }
    return shares, edges


def main(arguments: Sequence[str]) -> int:
    """Parses and writes; returns the exit status."""
    flags = Parser(
        prog="experiments.timeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("run", type=named_path, metavar="RUN")
    flags.add_argument("--workdir", type=named_path, help="default RUN/timeline")
    given = flags.parse_args(arguments)
    run: pathlib.Path = given.run
    events = read_run(run)
    folder = given.workdir or (run if run.is_dir() else run.parent) / "timeline"
    shown = report(events, folder)
    for caption, rows in shown.tables:
        print(f"\n{caption}\n{text_table(rows)}")
    command = ["python", "-m", "experiments.timeline", str(run)]
    if given.workdir:
        command.append(f"--workdir={given.workdir}")
    path = write_report(
        folder / "report.html",
        title=f"Where the time of {run} went",
        command=shlex.join(command),
        environment={"events": len(events)},
        tables=shown.tables,
        figures=shown.figures,
    )
    print(f"\nwrote {path}")
    return 0


if __name__ == "__main__":
    exit_with(main)
