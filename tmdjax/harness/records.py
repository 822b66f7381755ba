"""Records: the summaries that count, ``results/<system>/<tier>.json``."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tmdjax.core.checks import check_name
from tmdjax.core.files import write_atomically
from tmdjax.harness.config import read_json, write_json
from tmdjax.harness.summaries import SUMMARY_KEYS, Summary

TIERS = ("smoke", "cpu", "gpu", "paper")


def write_record(results_dir: str | os.PathLike[str], record: Summary) -> Path:
    """Writes ``<results_dir>/<system>/<tier>.json`` atomically; returns its path.

    Raises:
        ValueError: a key is missing, a claim has no seed (shards still to merge), or
            system or tier is no name of a file.
    """
    _check_summary(record, "the summary")
    system, tier = (check_name(key, record[key]) for key in ("system", "tier"))
    for claim in record["claims"]:
        if not claim["ours"]:
            about = (claim["ours_metric"], claim["baseline_metric"])
            metrics = [repr(name) for name in about if name is not None]
            raise ValueError(
                f"claim {claim['id']!r} has no seed with {' and '.join(metrics)}; run "
                f"or merge the missing shards before recording."
            )
    path = Path(results_dir, system, f"{tier}.json")
    write_json(path, record)
    return path


def copy_figures(workdirs: Iterable[Path], record: Path) -> None:
    """Puts the figures of workdirs beside a record, each from the first that has it."""
    figures: dict[str, Path] = {}
    for workdir in workdirs:
        for path in sorted((workdir / "figures").glob("*")):
            figures.setdefault(path.name, path)
    for name, path in figures.items():
        target = record.with_name(f"{record.stem}-{name}")
        write_atomically(target, path.read_bytes())


def read_records(results_dir: str | os.PathLike[str]) -> list[Summary]:
    """All records of a folder, by system, then from smoke to paper.

    Raises:
        ValueError: a file that is not a record, or lies under another name than its
            own; names it.
    """
    records = []
    for path in sorted(Path(results_dir).glob("*/*.json")):
        try:
            record = read_json(path)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}.") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path} holds no record; write it with --record.")
        _check_summary(record, str(path))
        if (record["system"], record["tier"]) != (path.parent.name, path.stem):
            raise ValueError(
                f"{path} is the record of {record['system']}/{record['tier']}; "
                f"records are written by --record, never moved by hand."
            )
        records.append(record)
    return sorted(records, key=order)


def _check_summary(summary: Mapping[str, Any], where: str) -> None:
    missing = [key for key in SUMMARY_KEYS if key not in summary]
    if missing:
        raise ValueError(
            f"{where} lacks {', '.join(missing)}; a record needs "
            f"{', '.join(SUMMARY_KEYS)}. Build it with summaries.summary."
        )


def order(record: Summary) -> tuple[str, int, str]:
    """Sorts records by system, then from smoke to paper."""
    tier = record["tier"]
    return record["system"], (*TIERS, tier).index(tier), tier
