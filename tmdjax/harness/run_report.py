"""The report of a run, or of joined ones: all units, then pictures of single ones."""

import datetime
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tmdjax.core.files import write_atomically
from tmdjax.harness import environment, plots, report, run_folder, summaries
from tmdjax.harness.claims import MAIN_ARM, metric_name
from tmdjax.harness.config import ConfigError, config_hash, to_plain, write_json
from tmdjax.harness.experiment import Experiment, Report
from tmdjax.harness.load import MODELS
from tmdjax.harness.logs import format_duration
from tmdjax.harness.run_folder import CONFIG, FIGURES, UNITS, add_to_list
from tmdjax.metrics.intervals import Interval, finite_interval

Figures = list[tuple[str, pathlib.Path | None]]
_FILES = ("metrics.csv", CONFIG, "environment.json", "summary.json")
"""Beside the page, in the order of its links."""


def show(
    workdir: pathlib.Path,
    experiment: Experiment,
    config: Any,
    summary: summaries.Summary,
    units: Sequence[Mapping[str, Any]],
    made: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> Figures:
    """Writes summary.json, report.html and figures; prints the tables and claims.

    Tables and figures of single units are those that the workdir has noted, see
    :func:`tmdjax.harness.run_folder.write_single`.

    Args:
        workdir: of the run.
        experiment: that was run.
        config: of the run.
        summary: of all units.
        units: as :func:`tmdjax.harness.run_folder.finished_units` reads them.
        made: versions and so on of where the run was made; None is this process.
        notes: facts for the line below the title, after its own.

    Returns:
        (caption, path) of every figure; a caption says of which arms and seeds it is.
    """
    write_json(workdir / "summary.json", summary)
    found = summaries.intervals(summary["units"])
    rows = experiment.summary_rows(config, found)
    single = sum(run_folder.read_single(workdir).values(), Report())
    tables = [(f"Results: {_over(summary['seeds'])}", rows), *single.tables]
    figures = [
        (f"{caption} ({_over(summary['seeds'], '')})", path)
        for caption, path in experiment.summary_figures(
            config, found, workdir / FIGURES
        )
    ]
    figures += training_curves(units, experiment.CURVES, workdir / FIGURES)
    add_to_list(workdir, [path for _, path in figures])
    for caption, rows in tables:
        print(f"\n{caption}\n{report.text_table(rows)}")
    if summary["claims"]:
        rows = [report.claim_row(claim) for claim in summary["claims"]]
        print(f"\nClaims\n{report.text_table(rows)}")
    now = datetime.datetime.now(datetime.UTC)
    path = report.write_report(
        workdir / "report.html",
        title=f"{summary['system']}, {summary['tier']} tier",
        command=summary["command"],
        facts=[
            f"{now:%Y-%m-%d %H:%M} UTC",
            f"commit {summary['commit']}",
            summary["device"],
            f"seed{'s' * (len(summary['seeds']) > 1)} "
            + ", ".join(map(str, summary["seeds"])),
            f"{format_duration(summary['wall_s'])} in all stages",
            *notes,
        ],
        links=[
            *(name for name in _FILES if (workdir / name).exists()),
            *(f"{MODELS}/{p.name}/" for p in sorted((workdir / MODELS).glob("*"))),
        ],
        environment={
            **(environment.environment() if made is None else made),
            "peak_memory_gb": summary["peak_memory_gb"],
            "config": summary["config_hash"],
        },
        tables=tables,
        meanings=_meanings(experiment, summary, rows=tables[0][1]),
        figures=[*figures, *single.figures],
        claims=summary["claims"],
        details=[
            (title, _every(summary["units"], found, of))
            for title, of in (("All metrics", "metrics"), ("Timings", "timings"))
            if any(unit.get(of) for unit in summary["units"])
        ],
    )
    print(f"\nwrote {path} and {workdir / 'summary.json'}")
    return [*figures, *single.figures]


def show_joined(
    workdir: pathlib.Path,
    experiment: Experiment,
    config: Any,
    summary: summaries.Summary,
    folders: Sequence[pathlib.Path],
) -> Figures:
    """Writes what :func:`show` does of a run whose units lie in several workdirs.

    Logs and pictures of single units are taken from these; of each arm, the pictures
    of the first that has some.

    Args:
        workdir: a folder of its own for all of it.
        experiment: that was run.
        config: of the run.
        summary: of all units, from :func:`tmdjax.harness.summaries.merge`.
        folders: workdirs; of a unit that is in none there is no training curve.

    Returns:
        As :func:`show`.

    Raises:
        ConfigError: workdir holds a run of its own, or files that no run wrote.
    """
    if (workdir / UNITS).is_dir() or workdir.resolve() in map(
        pathlib.Path.resolve, folders
    ):
        raise ConfigError(
            f"{workdir} holds a run of its own; name a folder for the joined one."
        )
    with environment.locked(workdir):
        run_folder.claim_workdir(workdir, config, summary["tier"])
        logged = {
            _identity(each["unit"]): each
            for folder in reversed(folders)
            for each in run_folder.read_units(folder).values()
        }
        units = [
            logged.get(_identity(unit), {"unit": unit, "logs": {}, "stages": {}})
            for unit in summary["units"]
        ]
        run_folder.write_metrics(workdir, units)
        for arm in run_folder.read_single(workdir):  # of an earlier call
            run_folder.write_single(workdir, arm, None)
        taken = {}
        for folder in folders:
            for arm, shown in run_folder.read_single(folder).items():
                taken.setdefault(arm, (folder, shown))
        for arm, (folder, shown) in taken.items():
            figures = []
            for caption, path in shown.figures:
                copy = workdir / path.relative_to(folder)
                write_atomically(copy, path.read_bytes())
                figures.append((caption, copy))
            add_to_list(workdir, [path for _, path in figures])
            run_folder.write_single(workdir, arm, Report(shown.tables, figures))
        made = {"device": summary["device"], **summary["versions"]}
        now, then = config_hash(to_plain(config)), summary["config_hash"]
        changed = f"drawn by a config that was changed since ({then}, now {now})"
        notes = [f"joined from {len(folders)} run{'s' * (len(folders) > 1)}"]
        notes *= bool(folders)
        notes += [changed] * (now != then)
        return show(workdir, experiment, config, summary, units, made, notes)


def _identity(unit: Mapping[str, Any]) -> tuple[str, int, str]:
    """What a unit is known by; compared as text, for NaN does not equal itself."""
    return unit["arm"], unit["seed"], repr(unit["metrics"])


def training_curves(
    units: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str],
    folder: pathlib.Path,
) -> Figures:
    """One figure a stage that trains and a column of its log: a line an arm.

    A line is the mean over seeds, its shade their 95 % interval. A training that all
    arms share is one line.

    Args:
        units: as :func:`tmdjax.harness.run_folder.finished_units` reads them.
        columns: the name of the axis by column of the log; logs without it have no
            figure.
        folder: where figures go.
    """
    figures: Figures = []
    for stage in dict.fromkeys(name for unit in units for name in unit["logs"]):
        for column, label in columns.items():
            by_arm: dict[str, dict[Any, dict[int, float]]] = {}
            for unit in units:
                arm, seed = unit["unit"]["arm"], unit["unit"]["seed"]
                rows, own = unit["logs"].get(stage, ()), f"{column}.seed{seed}"
                name = own if any(own in row for row in rows) else column
                curve = {row["step"]: float(row[name]) for row in rows if name in row}
                if curve:
                    training = (unit["stages"][stage], name)
                    by_arm.setdefault(arm, {})[training] = curve
            if not by_arm:
                continue
            kept = list(by_arm.items())
            if len(kept) > 1 and len({frozenset(t) for t in by_arm.values()}) == 1:
                kept = [("all arms", kept[0][1])]
            path = plots.line_plot(
                {arm: _mean_curve(list(curves.values())) for arm, curves in kept},
                folder / f"training-{stage}-{column.replace('/', '-')}.png",
                title=f"Training of stage {stage}",
                x_label="step",
                y_label=label,
            )
            count = max(len(curves) for _, curves in kept)
            alone = kept[0][0] if len(kept) == 1 and kept[0][0] != MAIN_ARM else ""
            whose = f", {alone}" * bool(alone)
            whose += f", mean and 95 % interval of {count} trainings" * (count > 1)
            figures.append((f"Training of stage {stage}: {label}{whose}", path))
    return figures


def _mean_curve(curves: Sequence[Mapping[int, float]]) -> tuple[Any, list[Interval]]:
    """Steps that all curves have, and the values there."""
    steps = sorted(set.intersection(*map(set, curves)))
    values = [[curve[step] for curve in curves] for step in steps]
    return np.array(steps, int), [finite_interval(each) for each in values]


def _over(
    seeds: Sequence[int], alone: str = "; without ±: equal in all, or of one"
) -> str:
    """What a number of the tables is; ``alone`` says what one without interval is."""
    if len(seeds) == 1:
        return f"seed {seeds[0]} alone"
    return f"mean ± 95 % interval over seeds {', '.join(map(str, seeds))}{alone}"


def _every(
    units: Sequence[Mapping[str, Any]], found: Mapping[str, Interval], of: str
) -> list[dict[str, Any]]:
    """A row a metric, a column an arm."""
    arms = sorted({unit["arm"] for unit in units})
    names = sorted({name for unit in units for name in unit.get(of, {})})
    return [
        {"metric": name} | {arm: found.get(metric_name(arm, name)) for arm in arms}
        for name in names
    ]


def _meanings(
    experiment: Experiment, summary: summaries.Summary, rows: Sequence[report.Row]
) -> dict[str, str]:
    """Of the sentences of an experiment, those about what this run measured."""
    names = {name for row in rows for name in row}
    for name in summaries.numbers(summary):
        names |= {name.rpartition("/")[2].rpartition(".")[2], name.rpartition("/")[2]}
    return {k: what for k, what in experiment.MEANINGS.items() if k in names}
