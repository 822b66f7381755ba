"""The folder of a run: whose it is, its units, metrics, models, summary and report."""

import json
import logging
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from tmdjax import train
from tmdjax.core.files import write_atomically
from tmdjax.harness import environment, report
from tmdjax.harness.config import (
    ConfigError,
    config_hash,
    differences,
    read_json,
    to_plain,
    write_json,
)
from tmdjax.harness.experiment import Experiment, Report
from tmdjax.harness.load import MODELS, model_folder
from tmdjax.harness.logs import Row, write_csv
from tmdjax.harness.stages import StageResult, stage_hashes
from tmdjax.harness.summaries import Summary

logger = logging.getLogger("tmdjax")

UNITS = "units"
FIGURES = "figures"


def claim_workdir(workdir: pathlib.Path, config: Any, tier: str) -> None:
    """Writes config.json and environment.json.

    Raises:
        ConfigError: the folder belongs to another config; the settings that differ are
            named.
    """
    plain = to_plain(config)
    path = workdir / "config.json"
    if path.exists():
        old = json.loads(path.read_text())
        changed = differences(old["config"], plain)
        if old["tier"] != tier:
            changed.insert(0, f"tier: {old['tier']} -> {tier}")
        if changed:
            raise ConfigError(
                f"{workdir} belongs to another config ({'; '.join(changed)}); give "
                f"another --workdir, or --fresh to discard it."
            )
    write_json(path, {"tier": tier, "hash": config_hash(plain), "config": plain})
    write_json(workdir / "environment.json", environment.environment())


def discard(workdir: pathlib.Path) -> None:
    """Removes what a run wrote; nothing else that lies in the folder."""
    for name in (UNITS, FIGURES, MODELS):
        if (workdir / name).exists():
            shutil.rmtree(workdir / name)
    for name in (
        "config.json",
        "environment.json",
        "summary.json",
        "metrics.jsonl",
        "metrics.csv",
        "report.html",
    ):
        (workdir / name).unlink(missing_ok=True)


def write_unit(
    workdir: pathlib.Path,
    unit: Mapping[str, Any],
    stages: Mapping[str, str],
    logs: Mapping[str, Sequence[Row]],
) -> None:
    """Writes one finished unit.

    Args:
        workdir: of the run.
        unit: from :func:`tmdjax.harness.summaries.unit`.
        stages: hashes of its stages, by which the unit is known to be of today.
        logs: what each stage that trains logged.
    """
    path = workdir / UNITS / f"{unit['arm']}-seed{unit['seed']}.json"
    write_json(path, {"unit": unit, "logs": logs, "stages": stages})


def finished_units(
    experiment: Experiment, config: Any, workdir: pathlib.Path
) -> list[dict[str, Any]]:
    """What :func:`write_unit` wrote of units whose stages are those of today.

    A unit of another version of the code or of its stages is left out, with a warning.

    Raises:
        ValueError: a file is damaged.
    """
    found = []
    for path in sorted((workdir / UNITS).glob("*.json")):
        try:
            unit = read_json(path)
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged ({error}); remove it and run the same command: "
                f"its stages are cached."
            ) from error
        arm, seed = unit["unit"]["arm"], unit["unit"]["seed"]
        if unit["stages"] == stage_hashes(experiment.stages(config, arm), seed):
            found.append(unit)
        else:
            logger.warning("%s is of an earlier version and left out", path.name)
    return found


def write_metrics(workdir: pathlib.Path, units: Sequence[Mapping[str, Any]]) -> None:
    """Writes metrics.jsonl and metrics.csv of finished units, one row a log."""
    rows = [
        {"arm": unit["unit"]["arm"], "seed": unit["unit"]["seed"], "stage": name, **row}
        for unit in units
        for name, log in unit["logs"].items()
        for row in log
    ]
    lines = "".join(json.dumps(to_plain(row)) + "\n" for row in rows)
    write_atomically(workdir / "metrics.jsonl", lines.encode())
    write_csv(rows, workdir / "metrics.csv")


def save_model(
    workdir: pathlib.Path, results: Sequence[StageResult], facts: Mapping[str, Any]
) -> None:
    """Stores the model of a unit for :func:`tmdjax.load`, unless it is there already.

    Args:
        workdir: of the run.
        results: of its stages in order; the last with a model has the unit's.
        facts: stored with it; 'arm' and 'seed' name its folder.
    """
    for result in reversed(results):
        if result.model is not None:
            spec, facts = dict(result.model), {**facts, **result.meta}
            folder = model_folder(workdir, facts["arm"], facts["seed"])
            if train.model_meta(folder) != facts | {"spec": spec}:
                train.save_model(folder, spec, result.outputs["params"], facts)
            return


def show(workdir: pathlib.Path, summary: Summary, shown: Report) -> None:
    """Writes summary.json and report.html, and prints the tables and claims."""
    write_json(workdir / "summary.json", summary)
    for caption, rows in shown.tables:
        print(f"\n{caption}\n{report.text_table(rows)}")
    if summary["claims"]:
        rows = [report.claim_row(claim) for claim in summary["claims"]]
        print(f"\nClaims\n{report.text_table(rows)}")
    path = report.write_report(
        workdir / "report.html",
        title=f"{summary['system']}: {summary['tier']}",
        command=summary["command"],
        environment=environment.environment()
        | {
            "seeds": summary["seeds"],
            "wall_s": round(summary["wall_s"], 1),
            "peak_memory_gb": summary["peak_memory_gb"],
            "config": summary["config_hash"],
        },
        tables=shown.tables,
        figures=shown.figures,
        claims=summary["claims"],
    )
    print(f"\nwrote {path} and {workdir / 'summary.json'}")
