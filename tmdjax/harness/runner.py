"""Runs an experiment: its units, one after another, each stage by stage."""

import contextlib
import dataclasses
import os
import pathlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tmdjax.core.checks import check_choice, check_name, check_range
from tmdjax.core.registry import suggestion
from tmdjax.harness import (
    environment,
    records,
    report,
    results_page,
    run_folder,
    run_report,
    summaries,
)
from tmdjax.harness.claims import MAIN_ARM, Claim, claims_of
from tmdjax.harness.config import ConfigError, config_hash, to_plain, write_json
from tmdjax.harness.experiment import (
    Experiment,
    Report,
    measured,
    missing_settings_named,
)
from tmdjax.harness.logs import format_duration, read_rows
from tmdjax.harness.stages import (
    Paused,
    StageCache,
    StageResult,
    select,
    stage_hashes,
)


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
        labels: facts that belong into the record of every unit, beside those of its
            stages, such as how 8-bit products were computed.
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
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)


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


def run(experiment: Experiment, config: Any, options: Options) -> Outcome:
    """Runs an experiment, or goes on with it.

    Args:
        experiment: from :func:`tmdjax.harness.check_experiment`.
        config: locked config with 'system' and, optionally, 'claims' (fields of
            :class:`~tmdjax.harness.claims.Claim` by id) and 'one_seed_arms', the arms
            that run under the first seed alone.
        options: how.

    Raises:
        ConfigError: the workdir belongs to another config, or options that do not go
            together.
        ValueError: impossible settings, an unknown stage, or a record that holds units
            or claims which this run would not have.
        OSError: the workdir cannot be written.
        RuntimeError: another run uses it.
    """
    workdir, cache_root = _places(config, options)
    units = _units(experiment, config, options)
    run_folder.check_workdir(workdir, options.fresh)
    claims, _ = check_run(experiment, config, options)
    if options.record:
        older = {} if options.fresh else run_folder.read_units(workdir)
        there = [(u["unit"]["arm"], u["unit"]["seed"]) for u in older.values()]
        path = records.record_path(options.results, config.system, options.tier)
        records.check_successor(path, units + there, [claim.id for claim in claims])
    with environment.locked(workdir), _stopper(options.max_seconds) as stopper:
        cache = StageCache(
            cache_root, stopper.should_stop, options.writers, options.profiled_steps
        )
        if options.fresh:
            for arm, seed in units:
                stages = experiment.stages(config, arm)
                hashes = stage_hashes(stages, seed)
                for stage in (stage for stage in stages if stage.arm is None):
                    cache.discard(stage.name, hashes[stage.id])
        run_folder.claim_workdir(workdir, config, options.tier, options.fresh)
        write_json(workdir / "environment.json", environment.environment())
        shown: dict[str, Report] = {}
        paused = False
        for arm, seed in units:
            try:
                results = _run_unit(
                    experiment, config, options, workdir, cache, arm, seed
                )
            except Paused as reason:
                print(f"paused: {reason}. The same command goes on from here.")
                paused = True
                break
            if arm not in shown:
                run_folder.write_single(workdir, arm, None)  # it is drawn over
                folder = run_folder.arm_folder(workdir, arm)
                more = experiment.report(config, arm, results, folder)
                run_folder.add_to_list(workdir, [path for _, path in more.figures])
                whose = f"{'' if arm == MAIN_ARM else f'{arm}, '}seed {seed}"
                shown[arm] = more.of(whose)
                run_folder.write_single(workdir, arm, shown[arm])
        code = stopper.code if paused else 0
        finished = not paused and not stopper.should_stop()
        done = run_folder.finished_units(experiment, config, workdir)
        run_folder.write_metrics(workdir, done)
        if not shown or options.stage is not None or not done:
            for path in (path for each in shown.values() for _, path in each.figures):
                print(f"wrote {path}")
            return Outcome(code, None, finished)
        found = summaries.summary(
            system=config.system,
            tier=options.tier,
            command=options.command,
            config_hash=config_hash(to_plain(config)),
            units=[each["unit"] for each in done],
            claims=claims,
            pairing=experiment.PAIRING,
        )
        figures = run_report.show(workdir, experiment, config, found, done)
        if options.record and not paused:
            record = records.write_record(options.results, found, figures)
            results_page.write_results(options.results)
            print(f"recorded {record}")
        return Outcome(code, found, finished)


@missing_settings_named()
def check_run(
    experiment: Experiment, config: Any, options: Options
) -> tuple[list[Claim], dict[str, Any]]:
    """Refuses what cannot work before anything is compiled.

    Returns:
        The claims, and the sizes that the experiment describes.

    Raises:
        ConfigError: a claim about what is not measured, a setting that is missing, a
            seed that is not trained, or options that do not go together.
        ValueError: impossible settings, or an unknown stage.
    """
    if options.record and (options.stage is not None or options.shard[1] > 1):
        raise ConfigError(
            "--record takes a whole run; leave --stage out, and join shards with "
            "python -m experiments.report --merge WORKDIRS --record."
        )
    for seed in options.seeds:  # keys hold 32 bits of it
        check_range("--seeds", seed, 0, 2**32 - 1)
    check_range("--max_seconds", options.max_seconds or 0, 0)
    claims = claims_of(to_plain(config))
    described = experiment.describe(config)
    known = measured(experiment, config)
    for claim in claims:
        for name in filter(None, (claim.ours, claim.baseline)):
            if name not in known:
                raise ConfigError(
                    f"claim {claim.id!r} is about {name!r}, which this config does not "
                    f"measure; change its settings, or keep other claims alone "
                    f"(--config.claims=ID,ID; none without any)."
                    f"{suggestion(name, known)}"
                )
    for arm in experiment.arms(config):
        select(experiment.stages(config, arm), options.stage)
        trained = experiment.seeds(config, arm)
        lost = [s for s in options.seeds if trained is not None and s not in trained]
        if trained is not None and lost:
            raise ConfigError(
                f"--seeds has {', '.join(map(str, lost))}, but arm {arm!r} trains only "
                f"{', '.join(map(str, trained))}; choose of these, or name the others "
                f"in the config too."
            )
    return claims, described


@missing_settings_named()
def dry_run(experiment: Experiment, config: Any, options: Options) -> None:
    """Prints sizes and stages without training or allocating anything.

    Raises:
        ConfigError, ValueError: as :func:`run` would.
    """
    _, sizes = check_run(experiment, config, options)
    cache = StageCache(_places(config, options)[1])
    rows = []
    for arm, seed in _units(experiment, config, options):
        stages = select(experiment.stages(config, arm), options.stage)
        hashes = stage_hashes(stages, seed)
        for stage in stages:
            hash_ = hashes[stage.id]
            done = cache.finished(stage.name, hash_)
            rows.append(
                {
                    "arm": arm,
                    "seed": seed,
                    "stage": stage.id,
                    "hash": hash_,
                    "state": "cached" if done else "to run",
                }
            )
    described = [{"what": name, "value": value} for name, value in sizes.items()]
    print(report.text_table(described))
    print()
    print(report.text_table(rows))


def _places(config: Any, options: Options) -> tuple[pathlib.Path, pathlib.Path]:
    """The workdir and the folder of cached stages."""
    name = f"{check_name('system', config.system)}-{options.tier}"
    workdir = options.workdir or pathlib.Path("runs") / name
    return workdir, options.cache or workdir.parent / "stages"


def _units(
    experiment: Experiment, config: Any, options: Options
) -> list[tuple[str, int]]:
    index, count = options.shard
    if not 0 <= index < count:
        raise ConfigError(
            f"--shard={index}/{count}: the index must be in [0, {count})."
        )
    arms = tuple(check_name("arm", arm) for arm in experiment.arms(config))
    alone = tuple(config.get("one_seed_arms", ()))
    for arm in alone:
        check_choice("one_seed_arms", arm, arms)
    units = [
        (arm, seed)
        for arm in arms
        for seed in (options.seeds[:1] if arm in alone else options.seeds)
    ]
    together = experiment.PAIRING == "vmapped"
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
    """SIGTERM and the first SIGINT pause at the next log.

    The SIGINT after them ends the process as SIGKILL would, in a compilation or a save
    too: raised as an exception, it would wait for what runs outside Python. What was
    saved is whole at any moment.
    """
    stopper = _Stopper(max_seconds)
    if threading.current_thread() is not threading.main_thread():
        yield stopper
        return

    def handle(number: int, frame: Any) -> None:
        stopper.signal = number
        # not print: the handler may have interrupted one
        line = (
            "stopping at the next log; interrupt again to end at once, at the last "
            "checkpoint"
        )
        show_cursor = "\x1b[?25h" if os.isatty(2) else ""  # the live line hides it
        os.write(2, f"{show_cursor}{line}\n".encode())
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    before = {n: signal.signal(n, handle) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopper
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _run_unit(
    experiment: Experiment,
    config: Any,
    options: Options,
    workdir: pathlib.Path,
    cache: StageCache,
    arm: str,
    seed: int,
) -> dict[str, StageResult]:
    """The results of the stages of one unit; once all are there, the unit is stored.

    Raises:
        Paused: it is time to leave, or another run holds a stage.
        ValueError: two stages report a metric of one name.
    """
    stages = select(experiment.stages(config, arm), options.stage)
    hashes = stage_hashes(stages, seed)
    results: dict[str, StageResult] = {}
    made: dict[str, dict[str, Any]] = {}
    metrics: dict[str, float] = {}
    timings: dict[str, float] = {}
    labels = dict(options.labels)
    logs: dict[str, Any] = {}
    for stage in stages:
        hash_ = hashes[stage.id]
        result, record = cache.run(stage, hash_, seed, results)
        took = "cached" if record["cached"] else format_duration(record["wall_s"])
        print(f"[{stage.id}] {arm} seed {seed}: done ({took})", flush=True)
        results[stage.id], made[hash_] = result, record
        if stage.arm is not None:  # a unit of that arm tells of it
            continue
        given = {*result.metrics, *result.timings}
        repeated = given & {*metrics, *timings}
        if repeated:
            raise ValueError(
                f"stage {stage.name!r} reports {sorted(repeated)}, which an earlier "
                f"stage reports too; rename one."
            )
        metrics |= result.metrics
        timings |= result.timings
        labels |= result.labels
        rows = cache.metrics_path(stage.name, hash_)
        if rows.exists():
            logs[stage.name] = read_rows(rows)
    if options.stage is None:
        facts = {
            "config": to_plain(config),
            "tier": options.tier,
            "arm": arm,
            "seed": seed,
            "metrics": metrics,
            "stages": hashes,
        }
        own = [results[stage.id] for stage in stages if stage.arm is None]
        run_folder.save_model(workdir, own, facts)
        unit = summaries.unit(arm, seed, metrics, timings, labels, made)
        run_folder.write_unit(workdir, unit, hashes, logs)
    return results
