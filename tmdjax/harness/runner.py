"""Runs an experiment: units, stages, records, figures, report.

An experiment is a module (or any object) with

    stages(config, arm) -> list[Stage]
    report(config, results, folder) -> Report      figures and tables of one unit
    describe(config) -> dict[str, Any]             sizes, without allocating

and optionally ``arms(config)``, the names of its arms (``("main",)`` if absent), and
``measures(config)``, the metrics that its units will have, named as in a summary:
claims about others are then refused before the run. ``planned(config)`` names steps for
``experiments.plan``. A unit is one arm under one seed; shards share the units out.
``PAIRING = "vmapped"`` says that a stage trains all seeds side by side. Arms that the
config names in ``one_seed_arms`` (ablations) run under the first seed alone, and claims
about them are 'reported'.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tmdjax import train
from tmdjax.core.checks import check_choice
from tmdjax.core.files import write_atomically
from tmdjax.core.registry import suggestion
from tmdjax.harness import environment, ledger, report, results_page
from tmdjax.harness.config import (
    ConfigError,
    config_hash,
    differences,
    from_plain,
    to_plain,
)
from tmdjax.harness.load import model_folder
from tmdjax.harness.logs import format_duration, read_rows, write_csv
from tmdjax.harness.stages import (
    Paused,
    StageCache,
    StageResult,
    select,
    stage_hashes,
)

logger = logging.getLogger("tmdjax")

UNITS = "units"


@dataclasses.dataclass(frozen=True)
class Report:
    """What an experiment shows.

    Attributes:
        tables: (caption, rows), printed and in report.html.
        figures: (caption, path of a PNG or HTML page, or None).
    """

    tables: list[tuple[str, list[dict[str, Any]]]] = dataclasses.field(
        default_factory=list
    )
    figures: list[tuple[str, pathlib.Path | None]] = dataclasses.field(
        default_factory=list
    )

    def __add__(self, other: "Report") -> "Report":
        """Both, one after the other."""
        return Report(self.tables + other.tables, self.figures + other.figures)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How to run, as the command line says it.

    Attributes:
        command: what to type to get the same result, but for seeds and shards (no
            paths of a machine).
        tier: of the config.
        workdir: of this run; None is runs/<system>-<tier>.
        cache: of stages, shared between runs; None is 'stages' beside workdir.
        seeds: one unit an arm each.
        shard: (i, n): this process takes every n-th unit from i on.
        stage: stop after this stage; None runs all.
        fresh: discard the workdir and its cached stages first.
        max_seconds: checkpoint and leave after this long.
        record: write results/<system>/<tier>.json, its figures and RESULTS.md.
        results: the folder of records.
        writers: 'tensorboard' and 'wandb' take the metrics too.
        profiled_steps: of every training loop, traced into the stage's folder.
    """

    command: str
    tier: str
    workdir: pathlib.Path | None = None
    cache: pathlib.Path | None = None
    seeds: tuple[int, ...] = (0,)
    shard: tuple[int, int] = (0, 1)
    stage: str | None = None
    fresh: bool = False
    max_seconds: float | None = None
    record: bool = False
    results: pathlib.Path = pathlib.Path("results")
    writers: tuple[str, ...] = ()
    profiled_steps: int = 0


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
        code: exit status: 0, or 128 + signal.
        summary: of all units in the workdir; None if nothing finished.
        finished: whether every unit was run, and nobody asked to stop meanwhile.
    """

    code: int
    summary: dict[str, Any] | None
    finished: bool = True


def run(experiment: Any, config: Any, options: Options) -> Outcome:
    """Runs an experiment, or goes on with it.

    Args:
        experiment: see the module.
        config: locked config with 'system' and, optionally, 'claims' (fields of
            :class:`~tmdjax.harness.ledger.Claim` by id).
        options: how.

    Raises:
        ConfigError: the workdir belongs to another config.
        OSError: the workdir cannot be written.
        RuntimeError: another run uses it.
    """
    workdir, cache_root = _places(config, options)
    units = _units(experiment, config, options)
    if options.record and (options.stage is not None or options.shard[1] > 1):
        raise ConfigError(
            "--record takes a whole run; leave --stage out, and join shards with "
            "python -m experiments.report --merge WORKDIRS --record."
        )
    claims = check_run(experiment, config, options)
    with environment.locked(workdir), _stopper(options.max_seconds) as stopper:
        cache = StageCache(
            cache_root, stopper.should_stop, options.writers, options.profiled_steps
        )
        if options.fresh:
            _discard(experiment, config, options, workdir, cache)
        _claim_workdir(workdir, config, options)
        shown: Report | None = None
        reported: set[str] = set()
        finished = True
        for arm, seed in units:
            try:
                results = _run_unit(
                    experiment, config, options, workdir, cache, arm, seed
                )
            except Paused as paused:
                print(f"paused: {paused}. The same command goes on from here.")
                finished = False
                break
            if shown is None or (
                getattr(experiment, "REPORT_ARMS", False) and arm not in reported
            ):
                reported.add(arm)
                more = experiment.report(config, results, workdir / "figures")
                shown = more if shown is None else shown + more
        done = _finished_units(experiment, config, workdir)
        _collect_metrics(done, workdir)
        if shown is None or options.stage is not None or not done:
            for _, path in shown.figures if shown else []:
                print(f"wrote {path}")
            code = 0 if finished else stopper.code
            return Outcome(code, None, finished and not stopper.should_stop())
        summary = _summarise(experiment, config, options, done, claims)
        _write_json(workdir / "summary.json", summary)
        _show(config, options, workdir, summary, shown)
        if options.record and finished:
            path = ledger.write_record(options.results, summary)
            for _, figure in shown.figures:
                if figure is not None:
                    copy = path.with_name(f"{path.stem}-{figure.name}")
                    write_atomically(copy, figure.read_bytes())
            results_page.write_results(options.results)
            print(f"recorded {path}")
        code = 0 if finished else stopper.code
        return Outcome(code, summary, finished and not stopper.should_stop())


def check_run(experiment: Any, config: Any, options: Options) -> list[ledger.Claim]:
    """Refuses what cannot work before anything is compiled; returns the claims.

    Raises:
        ConfigError: a claim about what is not measured.
        ValueError: impossible settings, or an unknown stage.
    """
    claims = [
        ledger.Claim(id=name, **fields)
        for name, fields in to_plain(config.get("claims", {})).items()
    ]
    experiment.describe(config)
    _check_claims(experiment, config, claims)
    for arm in _arms(experiment, config):
        select(experiment.stages(config, arm), options.stage)
    return claims


def dry_run(experiment: Any, config: Any, options: Options) -> None:
    """Prints sizes and stages without training or allocating anything."""
    cache = StageCache(_places(config, options)[1])
    rows = []
    for arm, seed in _units(experiment, config, options):
        stages = select(experiment.stages(config, arm), options.stage)
        hashes = stage_hashes(stages, seed)
        for stage in stages:
            hash_ = hashes[stage.name]
            done = cache.finished(stage.name, hash_)
            rows.append(
                {
                    "arm": arm,
                    "seed": seed,
                    "stage": stage.name,
                    "hash": hash_,
                    "state": "cached" if done else "to run",
                }
            )
    described = [
        {"what": name, "value": value}
        for name, value in experiment.describe(config).items()
    ]
    print(report.text_table(described))
    print()
    print(report.text_table(rows))


def _places(config: Any, options: Options) -> tuple[pathlib.Path, pathlib.Path]:
    """The workdir and the folder of cached stages."""
    name = f"{config.system}-{options.tier}"
    workdir = options.workdir or pathlib.Path("runs") / name
    return workdir, options.cache or workdir.parent / "stages"


def _arms(experiment: Any, config: Any) -> tuple[str, ...]:
    if not hasattr(experiment, "arms"):
        return (ledger.MAIN_ARM,)
    return tuple(experiment.arms(config))


def _check_claims(experiment: Any, config: Any, claims: Sequence[ledger.Claim]) -> None:
    if not hasattr(experiment, "measures"):
        return
    measured = set(experiment.measures(config))
    for claim in claims:
        for name in filter(None, (claim.ours, claim.baseline)):
            if name not in measured:
                raise ConfigError(
                    f"claim {claim.id!r} is about {name!r}, which this config does not "
                    f"measure; change its settings or clear the claim."
                    f"{suggestion(name, measured)}"
                )


def _units(experiment: Any, config: Any, options: Options) -> list[tuple[str, int]]:
    index, count = options.shard
    if not 0 <= index < count:
        raise ConfigError(
            f"--shard={index}/{count}: the index must be in [0, {count})."
        )
    arms = _arms(experiment, config)
    alone = tuple(config.get("one_seed_arms", ()))
    for arm in alone:
        check_choice("one_seed_arms", arm, arms)
    units = [
        (arm, seed)
        for arm in arms
        for seed in (options.seeds[:1] if arm in alone else options.seeds)
    ]
    together = getattr(experiment, "PAIRING", "separate") == "vmapped"
    what, size = "units (arms x seeds)", len(units)
    if together:  # all seeds of an arm are one training, and stay in one shard
        what, size = "arms, whose seeds are trained together", len(arms)
    if count > size:
        raise ConfigError(
            f"--shard={index}/{count}: there are only {size} {what}; use at most that "
            f"many shards."
        )
    if together:
        return [unit for unit in units if unit[0] in arms[index::count]]
    return units[index::count]


class _Stopper:
    """Says when to leave: the time is up or a signal came."""

    def __init__(self, max_seconds: float | None):
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds
        self.signal: int | None = None

    def should_stop(self) -> bool:
        late = self._deadline is not None and time.monotonic() >= self._deadline
        return late or self.signal is not None

    @property
    def code(self) -> int:
        return 0 if self.signal is None else 128 + self.signal


@contextlib.contextmanager
def _stopper(max_seconds: float | None) -> Iterator[_Stopper]:
    """SIGTERM and the first SIGINT pause at the next log; a second SIGINT kills."""
    stopper = _Stopper(max_seconds)
    if threading.current_thread() is not threading.main_thread():
        yield stopper
        return

    def handle(number: int, frame: Any) -> None:
        stopper.signal = number
        # not print: the handler may have interrupted one
        os.write(2, b"stopping at the next log; interrupt again to kill\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {n: signal.signal(n, handle) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopper
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _discard(
    experiment: Any,
    config: Any,
    options: Options,
    workdir: pathlib.Path,
    cache: StageCache,
) -> None:
    """Removes what a run wrote; nothing else that lies in the workdir."""
    for arm, seed in _units(experiment, config, options):
        for name, hash_ in stage_hashes(experiment.stages(config, arm), seed).items():
            cache.discard(name, hash_)
    for name in (UNITS, "figures", "models"):
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


def _write_json(path: pathlib.Path, value: Any) -> None:
    text = json.dumps(to_plain(value), indent=1, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def _claim_workdir(workdir: pathlib.Path, config: Any, options: Options) -> None:
    """Writes config.json, or refuses a workdir that belongs to another config."""
    plain = to_plain(config)
    path = workdir / "config.json"
    if path.exists():
        old = json.loads(path.read_text())
        changed = differences(old["config"], plain)
        if old["tier"] != options.tier:
            changed.insert(0, f"tier: {old['tier']} -> {options.tier}")
        if changed:
            raise ConfigError(
                f"{workdir} belongs to another config ({'; '.join(changed)}); give "
                f"another --workdir, or --fresh to discard it."
            )
    _write_json(
        path, {"tier": options.tier, "hash": config_hash(plain), "config": plain}
    )
    _write_json(workdir / "environment.json", environment.environment())


def _run_unit(
    experiment: Any,
    config: Any,
    options: Options,
    workdir: pathlib.Path,
    cache: StageCache,
    arm: str,
    seed: int,
) -> dict[str, StageResult]:
    stages = select(experiment.stages(config, arm), options.stage)
    hashes = stage_hashes(stages, seed)
    results: dict[str, StageResult] = {}
    metrics: dict[str, float] = {}
    records = []
    labels: dict[str, str] = {}
    logs: dict[str, Any] = {}
    for stage in stages:
        hash_ = hashes[stage.name]
        result, record = cache.run(stage, hash_, seed, results)
        took = "cached" if record["cached"] else format_duration(record["wall_s"])
        print(f"[{stage.name}] {arm} seed {seed}: done ({took})", flush=True)
        repeated = metrics.keys() & result.metrics.keys()
        if repeated:
            raise ValueError(
                f"stage {stage.name!r} reports {sorted(repeated)}, which an earlier "
                f"stage reports too; rename one."
            )
        metrics |= result.metrics
        labels |= result.labels
        results[stage.name] = result
        records.append(record)
        rows = cache.metrics_path(stage.name, hash_)
        if rows.exists():
            logs[stage.name] = read_rows(rows)
    if options.stage is not None:
        return results
    meta = {
        "config": to_plain(config),
        "tier": options.tier,
        "arm": arm,
        "seed": seed,
        "metrics": metrics,
        "stages": hashes,
    }
    trained = [(r, r.model) for r in results.values() if r.model is not None]
    if trained:
        result, model = trained[-1]  # the last one is the model of the run
        spec, facts = dict(model), meta | dict(result.meta)
        folder = model_folder(workdir, arm, seed)
        if train.model_meta(folder) != facts | {"spec": spec}:
            train.save_model(folder, spec, result.outputs["params"], facts)
    unit = {
        "arm": arm,
        "seed": seed,
        "metrics": metrics,
        # what this unit costs alone: stages shared with others count in each
        "wall_s": sum(record["wall_s"] for record in records),
        "stage_s": {
            hashes[stage.name]: record["wall_s"]
            for stage, record in zip(stages, records)
        },
        "peak_memory_gb": max(record["peak_memory_gb"] for record in records),
        "device": ledger.side_by_side(
            (record["device"] for record in records), " and "
        ),
        "commit": ledger.side_by_side(record["commit"] for record in records),
        "versions": {
            name: ledger.side_by_side(
                r["versions"][name] for r in records if name in r["versions"]
            )
            for name in records[-1]["versions"]
        },
        "labels": labels,
    }
    _write_json(
        workdir / UNITS / f"{arm}-seed{seed}.json",
        {"unit": unit, "logs": logs, "stages": hashes},
    )
    return results


def _finished_units(
    experiment: Any, config: Any, workdir: pathlib.Path
) -> list[dict[str, Any]]:
    """Units in the workdir whose stages are those of today's code and config."""
    found = []
    for path in sorted((workdir / UNITS).glob("*.json")):
        try:
            unit = from_plain(json.loads(path.read_text()))
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


def _collect_metrics(units: Iterable[dict[str, Any]], workdir: pathlib.Path) -> None:
    """metrics.jsonl and metrics.csv of finished units, one row a log."""
    rows = [
        {"arm": unit["unit"]["arm"], "seed": unit["unit"]["seed"], "stage": name, **row}
        for unit in units
        for name, log in unit["logs"].items()
        for row in log
    ]
    lines = "".join(json.dumps(to_plain(row)) + "\n" for row in rows)
    write_atomically(workdir / "metrics.jsonl", lines.encode())
    write_csv(rows, workdir / "metrics.csv")


def _summarise(
    experiment: Any,
    config: Any,
    options: Options,
    finished: Sequence[dict[str, Any]],
    claims: Sequence[ledger.Claim],
) -> dict[str, Any]:
    units = [unit["unit"] for unit in finished]
    return ledger.summary(
        system=config.system,
        tier=options.tier,
        command=options.command,
        config_hash=config_hash(to_plain(config)),
        units=units,
        claims=claims,
        pairing=getattr(experiment, "PAIRING", "separate"),
        complete={unit["arm"] for unit in units} == set(_arms(experiment, config)),
    )


def _show(
    config: Any,
    options: Options,
    workdir: pathlib.Path,
    summary: Mapping[str, Any],
    shown: Report,
) -> None:
    for caption, rows in shown.tables:
        print(f"\n{caption}\n{report.text_table(rows)}")
    if summary["claims"]:
        rows = [report.claim_row(claim) for claim in summary["claims"]]
        print(f"\nClaims\n{report.text_table(rows)}")
    path = report.write_report(
        workdir / "report.html",
        title=f"{config.system}: {options.tier}",
        command=summary["command"],
        environment=environment.environment()
        | {
            "seeds": summary["seeds"],
            "wall_s": round(summary["wall_s"], 1),
            "peak_memory_gb": summary["peak_memory_gb"],
            "config": config_hash(to_plain(config)),
        },
        tables=shown.tables,
        figures=shown.figures,
        claims=summary["claims"],
    )
    print(f"\nwrote {path} and {workdir / 'summary.json'}")
