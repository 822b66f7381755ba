"""The folder of a run: whose it is, its units, metrics and models."""

import contextlib
import json
import logging
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tmdjax import train
from tmdjax.core.files import json_of, write_atomically
from tmdjax.harness.claims import MAIN_ARM
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
from tmdjax.harness.report import format_value
from tmdjax.harness.stages import StageResult, stage_hashes
from tmdjax.harness.summaries import check_unit

logger = logging.getLogger("tmdjax")

UNITS = "units"
FIGURES = "figures"
CONFIG = "config.json"
SINGLE = "single.json"
_FILES = (
    SINGLE,
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
    """Writes config.json: whose the folder is, and under 'files' what the run writes.

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
            f"lists what it wrote; give another --workdir, or move these away."
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
        whole = whole and isinstance(files, list)
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
    path = pathlib.PurePath(*parts)
    odd = ".." in parts or "\0" in str(path) or path.is_absolute()
    return bool(parts) and not odd


def add_to_list(
    workdir: pathlib.Path, paths: Sequence[str | os.PathLike[str] | None]
) -> None:
    """Lists files of a claimed folder as the run's; None and others' are left out."""
    config = json_of(workdir / CONFIG)
    names = [_name(workdir, path) for path in paths if path is not None]
    files = list(dict.fromkeys([*config["files"], *filter(None, names)]))
    if files != config["files"]:
        write_json(workdir / CONFIG, config | {"files": files})


def _name(workdir: pathlib.Path, path: str | os.PathLike[str]) -> str | None:
    """A path as seen from a folder; None of one that is not in it."""
    root, path = workdir.absolute(), pathlib.Path(path).absolute()
    return path.relative_to(root).as_posix() if root in path.parents else None


def _discard(workdir: pathlib.Path, files: Sequence[str]) -> None:
    """Removes files, then folders that are empty; what links lead to stays as it is."""
    for name in files:
        path = workdir / name
        if not path.parent.resolve().is_relative_to(workdir.resolve()):
            continue  # a folder of somebody else was put in the place of ours
        if path.is_dir() and not path.is_symlink():
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


def read_units(workdir: pathlib.Path) -> dict[str, dict[str, Any]]:
    """What :func:`write_unit` wrote, by the name of the file; none where none did.

    Raises:
        ValueError: a file is damaged.
    """
    found = {}
    for path in sorted((workdir / UNITS).glob("[!.]*.json")):
        try:
            unit = read_json(path)
            check_unit(unit["unit"])
            dict(unit["stages"])
            for row in (row for rows in unit["logs"].values() for row in rows):
                if not all(
                    isinstance(x, int | float) for x in (row["step"], *row.values())
                ):
                    raise ValueError(f"a log holds {row!r}")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged ({error!r}); remove it and run the same command: "
                f"its stages are cached."
            ) from error
        found[path.name] = unit
    return found


def finished_units(
    experiment: Experiment, config: Any, workdir: pathlib.Path
) -> list[dict[str, Any]]:
    """What :func:`write_unit` wrote of units whose stages are those of today.

    A unit of another version of the code or of its stages is left out, with a warning.

    Raises:
        ValueError: a file is damaged.
    """
    found = []
    for name, unit in read_units(workdir).items():
        arm, seed = unit["unit"]["arm"], unit["unit"]["seed"]
        if unit["stages"] == stage_hashes(experiment.stages(config, arm), seed):
            found.append(unit)
        else:
            logger.warning("%s is of an earlier version and left out", name)
    return found


def arm_folder(workdir: pathlib.Path, arm: str) -> pathlib.Path:
    """Where the figures of single units of an arm go."""
    return workdir / FIGURES / ("" if arm == MAIN_ARM else arm)


def write_single(workdir: pathlib.Path, arm: str, shown: Report | None) -> None:
    """Notes in single.json what a run shows of one unit of an arm; None forgets it.

    A picture says no more whose it is once it lies in a folder: this file does, for
    pages of this run that are written later and for those that join it to others.

    Args:
        workdir: of the run.
        arm: of the unit.
        shown: its captions say whose it is. Figures outside the workdir are left out.
    """
    found = _read_single(workdir)
    found.pop(arm, None)
    if shown is not None:
        names = [(c, path and _name(workdir, path)) for c, path in shown.figures]
        tables = [
            (caption, [{k: _cell(v) for k, v in row.items()} for row in rows])
            for caption, rows in shown.tables
        ]
        found[arm] = {"tables": tables, "figures": [n for n in names if n[1]]}
    add_to_list(workdir, [workdir / SINGLE])
    write_json(workdir / SINGLE, found)


def read_single(workdir: pathlib.Path) -> dict[str, Report]:
    """What :func:`write_single` noted, by arm; of the figures, those that are there.

    Raises:
        ValueError: the file is damaged.
    """
    shown = {}
    for arm, found in _read_single(workdir).items():
        try:
            figures = [(str(caption), str(name)) for caption, name in found["figures"]]
            tables = [
                (str(caption), list(map(dict, rows)))
                for caption, rows in found["tables"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(workdir, repr(error)) from error
        for _, name in figures:
            if not _is_inside(pathlib.PurePath(name).parts):
                raise _damaged(workdir, f"{name!r} is no file of it")
        there = [(caption, workdir / name) for caption, name in figures]
        shown[arm] = Report(tables, [pair for pair in there if pair[1].is_file()])
    return shown


def _cell(value: Any) -> Any:
    """A cell of a table as JSON can hold it: a number, a text or None."""
    kinds = str | int | float | np.number | np.bool_ | None
    return value if isinstance(value, kinds) else format_value(value)


def _read_single(workdir: pathlib.Path) -> dict[str, Any]:
    path = workdir / SINGLE
    found = read_json(path) if path.exists() else {}
    if not isinstance(found, dict):
        raise _damaged(workdir, "no dict of arms")
    return found


def _damaged(workdir: pathlib.Path, what: str) -> ValueError:
    return ValueError(
        f"{workdir / SINGLE} is damaged ({what}); remove it and run the same command: "
        f"its stages are cached."
    )


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
