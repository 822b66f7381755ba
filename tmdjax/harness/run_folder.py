"""The folder of a run: whose it is, its units, metrics and models."""

import contextlib
import json
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tmdjax import train
from tmdjax.core.files import json_of, write_atomically
from tmdjax.harness import environment
from tmdjax.harness.config import (
    ConfigError,
    config_hash,
    differences,
    read_json,
    to_plain,
    write_json,
)
from tmdjax.harness.experiment import Experiment
from tmdjax.harness.load import MODELS, model_folder
from tmdjax.harness.logs import Row, write_csv
from tmdjax.harness.stages import StageResult, stage_hashes

logger = logging.getLogger("tmdjax")

UNITS = "units"
FIGURES = "figures"
CONFIG = "config.json"
_FILES = (
    "environment.json",
    "summary.json",
    "metrics.jsonl",
    "metrics.csv",
    "report.html",
)
_FOLDERS = (UNITS, FIGURES, MODELS)


def claim_workdir(
    workdir: pathlib.Path, config: Any, tier: str, fresh: bool = False
) -> None:
    """Writes config.json and environment.json.

    config.json says whose the folder is and lists, under 'files', what the run writes
    in it.

    Args:
        workdir: of the run.
        config: of the run.
        tier: of the config.
        fresh: first removes what the run that was there lists as its own, and nothing
            else that lies in the folder.

    Raises:
        ConfigError: the folder belongs to another config (the settings that differ are
            named), or holds files of such names that no run wrote.
    """
    check_workdir(workdir, fresh)
    plain, found = to_plain(config), _read_config(workdir)
    files = list(_FILES) if found is None or fresh else found["files"]
    if found is not None and fresh:
        _discard(workdir, found["files"])
    elif found is not None:
        changed = differences(found["config"], plain)
        if found["tier"] != tier:
            changed.insert(0, f"tier: {found['tier']} -> {tier}")
        if changed:
            raise ConfigError(
                f"{workdir} belongs to another config ({'; '.join(changed)}); give "
                f"another --workdir, or --fresh to discard it."
            )
    owner = {"tier": tier, "hash": config_hash(plain), "config": plain, "files": files}
    write_json(workdir / CONFIG, owner)
    write_json(workdir / "environment.json", environment.environment())


def check_workdir(workdir: pathlib.Path, fresh: bool = False) -> None:
    """Refuses a folder whose files a run might write over or remove.

    Args:
        workdir: that a run is to use; it may be absent.
        fresh: whether the run there is to be discarded: then all files of a folder
            must be known to be a run's or not.

    Raises:
        ConfigError: it holds such files, and no config.json of a run.
    """
    if _read_config(workdir) is not None or not workdir.is_dir():
        return
    there = sorted({path.name for path in workdir.iterdir()} - {".lock"})
    foreign = [name for name in there if fresh or name in (*_FILES, *_FOLDERS)]
    if foreign:
        raise ConfigError(
            f"{workdir} holds {', '.join(foreign[:5])} but no {CONFIG} of a run, which "
            f"lists what it wrote; give another --workdir, or remove the folder "
            f"yourself."
        )


def _read_config(workdir: pathlib.Path) -> dict[str, Any] | None:
    """What a run's config.json says; None where there is none.

    Raises:
        ConfigError: it is of another program, or of an earlier version.
    """
    path = workdir / CONFIG
    if not path.exists():
        return None
    try:
        found = json_of(path)
        tier, config, files = (found[key] for key in ("tier", "config", "files"))
        parts = [pathlib.PurePath(name).parts for name in files]
        whole = isinstance(tier, str) and isinstance(config, dict)
    except (ValueError, KeyError, TypeError):
        parts, whole = [], False
    if not whole or not all(map(_is_inside, parts)):
        raise ConfigError(
            f"{path} is not of a run of this version: it lacks 'tier', 'config' or "
            f"'files', the list of what the run wrote. Give another --workdir, or "
            f"remove {workdir} yourself."
        )
    return found


def _is_inside(parts: tuple[str, ...]) -> bool:
    return (
        bool(parts) and ".." not in parts and not pathlib.PurePath(*parts).is_absolute()
    )


def add_to_list(
    workdir: pathlib.Path, paths: Sequence[str | os.PathLike[str] | None]
) -> None:
    """Lists files of a claimed folder as the run's; None and others' are left out."""
    config = json_of(workdir / CONFIG)
    root, given = workdir.absolute(), [p for p in paths if p is not None]
    inside = [p for p in map(pathlib.Path.absolute, map(pathlib.Path, given))]
    names = [p.relative_to(root).as_posix() for p in inside if root in p.parents]
    files = list(dict.fromkeys([*config["files"], *names]))
    if files != config["files"]:
        write_json(workdir / CONFIG, config | {"files": files})


def _discard(workdir: pathlib.Path, files: Sequence[str]) -> None:
    for name in files:
        path = workdir / name
        if path.is_dir():
            train.Checkpoints(path).discard()
        else:
            path.unlink(missing_ok=True)
    folders = {folder for name in files for folder in pathlib.PurePath(name).parents}
    for folder in sorted(folders - {pathlib.PurePath()}, reverse=True):
        with contextlib.suppress(OSError):  # absent, or not empty
            (workdir / folder).rmdir()


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
    add_to_list(workdir, [path])
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
            arm, seed = unit["unit"]["arm"], unit["unit"]["seed"]
            unit["stages"], unit["logs"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged ({error!r}); remove it and run the same command: "
                f"its stages are cached."
            ) from error
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
                add_to_list(workdir, [folder])
                train.save_model(folder, spec, result.outputs["params"], facts)
            return
