"""Stages: the parts of an experiment, each cached under what it depends on.

The hash of a stage covers its name, version, config, seed and its parents'
hashes, so a pretrained base is made once and shared by every experiment that
describes it in the same way. A stage that was interrupted goes on from its own
checkpoints.
"""

import contextlib
import dataclasses
import logging
import pathlib
import shutil
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from tmdjax import train
from tmdjax.core.checks import check_name
from tmdjax.core.files import content_sha256, write_atomically
from tmdjax.harness.config import config_hash
from tmdjax.harness.environment import InUse, locked, peak_memory_gb, provenance
from tmdjax.harness.logs import Clock, MetricsLog, Progress, Row, read_rows
from tmdjax.harness.profile import ProfiledStep
from tmdjax.harness.writers import has_rows, open_writers

logger = logging.getLogger("tmdjax")

_RESULT = "result"
_CHECKPOINTS = "checkpoints"
_METRICS = "metrics.jsonl"
_ELAPSED = "elapsed"
PROFILE = "profile"
"""Folder of a stage's traces."""


class Paused(Exception):
    """A stage was checkpointed and left before its end."""


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What a stage leaves behind.

    Attributes:
        outputs: nested dict of arrays, for later stages and figures.
        metrics: numbers (scalars) of this arm and seed; two runs of the same stage
            have the same ones, to the last digit.
        model: spec that rebuilds the network of ``outputs['params']``, or None.
        labels: names that belong into the record, such as that of a feature net.
        meta: JSON-able facts that :func:`tmdjax.load` hands out with the model, such
            as the time grid it was trained for.
        timings: numbers of this arm and seed that depend on the clock, such as seconds
            an iteration; two runs of the same stage differ in them.
    """

    outputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: Mapping[str, Any] | None = None
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    timings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class StageContext:
    """What a running stage may use.

    Attributes:
        name: of the stage.
        seed: of this unit; 0 in a stage that is the same for every seed.
        key: typed key of this stage and seed.
        inputs: results of the parents, by name.
        directory: the stage's own folder.
        should_stop: whether the time is up, for what can be stopped within a step.
    """

    def __init__(
        self,
        name: str,
        seed: int,
        inputs: Mapping[str, StageResult],
        directory: pathlib.Path,
        should_stop: Callable[[], bool],
        writers: Sequence[str] = (),
        profiled_steps: int = 0,
        settings: Mapping[str, Any] | None = None,
    ):
        self.name = name
        self.seed = seed
        self.key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        self.inputs = inputs
        self.directory = directory
        self.should_stop = should_stop
        self._writers = writers
        self._profiled_steps = profiled_steps
        self._settings = {**(settings or {}), "seed": seed}
        self._fitted = False
        self._began = time.monotonic()
        self._earlier = _read_seconds(directory / _ELAPSED)

    def elapsed(self) -> float:
        """Seconds spent on this stage so far, earlier attempts included."""
        return self._earlier + time.monotonic() - self._began

    def note_elapsed(self) -> None:
        """Remembers the time spent, for a run that goes on later."""
        write_atomically(self.directory / _ELAPSED, repr(self.elapsed()).encode())

    def rows(self) -> list[dict[str, Any]]:
        """What :meth:`fit` has logged so far, earlier attempts included."""
        path = self.directory / _METRICS
        return read_rows(path) if path.exists() else []

    def fit(
        self,
        state: Any,
        step_fn: Callable[..., Any],
        data: train.DataIterator,
        *,
        num_steps: int,
        score: str | None = None,
        **options: Any,
    ) -> Any:
        """Runs :func:`tmdjax.train.fit` with this stage's checkpoints and logs.

        Once a stage (its checkpoints are the stage's). Resumes by itself.

        Args:
            state: initial train state.
            step_fn: jitted step.
            data: iterator with a position.
            num_steps: steps in all.
            score: metric whose lowest window marks the best checkpoint.
            **options: of :func:`tmdjax.train.fit`.

        Returns:
            The final state.

        Raises:
            Paused: the time is up; everything is saved.
            RuntimeError: a second call.
        """

        def loop(**hooks: Any) -> train.FitResult:
            traces, count = self.directory / PROFILE, self._profiled_steps
            with ProfiledStep(step_fn, traces, count) as profiled:
                options_ = {"num_steps": num_steps, "score": score, **hooks, **options}
                result = train.fit(state, profiled, data, **options_)
            if count:
                what = f"trace in {traces}" if traces.exists() else "too short to trace"
                print(f"[{self.name}] {what}")
            return result

        best = None if score is None else "min"
        return self.run_loop(loop, num_steps=num_steps, best=best)

    def run_loop(
        self,
        loop: Callable[..., train.FitResult],
        *,
        num_steps: int,
        best: str | None = None,
        table: Callable[[], Sequence[Row]] = list,
    ) -> Any:
        """Runs a loop of training with this stage's checkpoints and logs.

        Once a stage (its checkpoints are the stage's).

        Args:
            loop: such as :func:`tmdjax.runtime.fit_asynchronously` with all else bound.
                It is called with ``key``, ``checkpoints``, ``on_metrics``,
                ``on_resume`` and ``should_stop``, which are those of
                :func:`tmdjax.train.fit`, and goes on from the newest checkpoint.
            num_steps: steps in all, with those of earlier attempts.
            best: 'min' or 'max' to keep the checkpoint with that score too, or None.
            table: gives the rows that are shown below the line of progress, as
                :class:`tmdjax.harness.logs.Progress` calls it.

        Returns:
            The final state.

        Raises:
            Paused: the time is up; everything is saved.
            RuntimeError: a second call.
        """
        if self._fitted:
            raise RuntimeError(
                f"stage {self.name!r} trains a second time; make it two stages."
            )
        self._fitted = True
        checkpoints = train.Checkpoints(self.directory / _CHECKPOINTS, best=best)
        title = self.directory.name
        writers = open_writers(self._writers, self.directory, title, self._settings)
        with (
            MetricsLog(self.directory / _METRICS, writers=writers) as log,
            Progress(self.name, num_steps, table=table) as progress,
        ):
            clock = Clock()

            def on_resume(step: int) -> None:
                log.truncate(step)
                rows = log.rows()
                clock.start(rows[-1]["time/seconds"] if rows else 0.0, step)
                if step:
                    progress.say(f"[{self.name}] resumed at step {step}")

            def on_metrics(step: int, metrics: dict[str, float]) -> None:
                row = metrics | clock.columns(step)
                log.append(step, row)
                progress.update(step, row)
                self.note_elapsed()

            result = loop(
                key=self.key,
                checkpoints=checkpoints,
                on_metrics=on_metrics,
                on_resume=on_resume,
                should_stop=self.should_stop,
            )
        if not result.finished:
            raise Paused(f"{self.name} before its last step, {num_steps}")
        skipped = int(getattr(result.state, "skipped", 0))
        if skipped:
            logger.warning(
                "[%s] %d updates within %d steps were skipped: loss or gradient was "
                "not finite, or the gradient larger than allowed",
                self.name,
                skipped,
                num_steps,
            )
        return result.state


def _read_seconds(path: pathlib.Path) -> float:
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of an experiment.

    Attributes:
        name: unique in the experiment.
        run: ``context -> StageResult``.
        config: plain values that the result depends on.
        parents: names of the stages whose results it reads.
        version: raise it when the code changes what comes out.
        seeded: False for a stage that is the same for every seed.
        arm: whose stage it is, where another arm lists it to be measured against it,
            see :func:`of_other_arm`; None for a stage of the arm that lists it.
        files: files, and folders with all they hold, that the result depends on, such
            as a data set that somebody may write again under the same name. Their
            content is part of the stage's hash.

    Raises:
        ValueError: a name that cannot be that of a folder.
    """

    name: str
    run: Callable[[StageContext], StageResult]
    config: Mapping[str, Any]
    parents: tuple[str, ...] = ()
    version: int = 1
    seeded: bool = True
    arm: str | None = None
    files: tuple[pathlib.Path, ...] = ()

    def __post_init__(self) -> None:
        check_name("stage name", self.name)

    @property
    def id(self) -> str:
        """Its name among the stages that an arm lists: 'name', or 'arm/name'."""
        return self._listed(self.name)

    @property
    def reads(self) -> dict[str, str]:
        """The ids of its parents, by the names under which it reads their results."""
        return {name: self._listed(name) for name in self.parents}

    def _listed(self, name: str) -> str:
        return name if self.arm is None else f"{self.arm}/{name}"


def of_other_arm(arm: str, stages: Sequence[Stage], last: str) -> list[Stage]:
    """Stages of another arm, for an arm that is measured against what they leave.

    An arm lists them before the stage that has 'arm/last' among its parents. Under one
    seed and one cache they are run once for both arms; metrics, log and model are the
    other's alone.

    Args:
        arm: the other one.
        stages: of that arm.
        last: the name of the stage whose result is read; those that it needs come too.
    """
    return [dataclasses.replace(stage, arm=arm) for stage in select(stages, last)]


def select(stages: Sequence[Stage], last: str | None = None) -> list[Stage]:
    """The stages needed for `last` (all if None), in order.

    Raises:
        ValueError: duplicate names, a parent that does not come before, or an
            unknown `last`.
    """
    seen: dict[str, Stage] = {}
    for stage in stages:
        if stage.id in seen:
            raise ValueError(f"two stages are called {stage.id!r}; rename one.")
        for parent in stage.reads.values():
            if parent not in seen:
                raise ValueError(
                    f"stage {stage.id!r} reads {parent!r}, which does not come "
                    f"before it; the order is {[s.id for s in stages]}."
                )
        seen[stage.id] = stage
    if last is None:
        return list(stages)
    if last not in seen:
        raise ValueError(f"there is no stage {last!r}; stages: {', '.join(seen)}.")
    needed, todo = set(), [last]
    while todo:
        name = todo.pop()
        needed.add(name)
        todo.extend(seen[name].reads.values())
    return [stage for stage in stages if stage.id in needed]


def stage_hashes(stages: Sequence[Stage], seed: int) -> dict[str, str]:
    """The hash of each stage, by its id, under one seed; files it names are read."""
    hashes: dict[str, str] = {}
    for stage in stages:
        described = {
            "name": stage.name,
            "version": stage.version,
            "config": dict(stage.config),
            "seed": seed if stage.seeded else None,
            "parents": {name: hashes[id_] for name, id_ in stage.reads.items()},
        }
        if stage.files:
            described["files"] = [content_sha256(path) for path in stage.files]
        hashes[stage.id] = config_hash(described)
    return hashes


class StageCache:
    """Results of stages on disk, one folder a hash.

    Args:
        root: folder of all cached stages.
        should_stop: asked at logs; True pauses the running stage.
        writers: names of ``writers.WRITERS`` that take the metrics too.
        profiled_steps: of every training loop, traced.
    """

    def __init__(
        self,
        root: pathlib.Path,
        should_stop: Callable[[], bool] = lambda: False,
        writers: Sequence[str] = (),
        profiled_steps: int = 0,
    ):
        self.root = root
        self._should_stop = should_stop
        self._writers, self._profiled_steps = tuple(writers), profiled_steps

    def folder(self, name: str, stage_hash: str) -> pathlib.Path:
        """Where a stage's files are."""
        return self.root / f"{name}-{stage_hash}"

    def finished(self, name: str, stage_hash: str) -> bool:
        """Whether a result is stored (its files are checked when it is read)."""
        return bool(train.Checkpoints(self.folder(name, stage_hash) / _RESULT).steps())

    def metrics_path(self, name: str, stage_hash: str) -> pathlib.Path:
        """The stage's metrics.jsonl (absent if it logged nothing)."""
        return self.folder(name, stage_hash) / _METRICS

    def run(
        self,
        stage: Stage,
        stage_hash: str,
        seed: int,
        inputs: Mapping[str, StageResult],
    ) -> tuple[StageResult, dict[str, Any]]:
        """Reads a stage's result, or makes it from ``inputs``, results by id.

        Returns:
            The result as it is on disk (arrays are numpy), and a record of how it was
            made: 'wall_s', 'peak_memory_gb', 'device', 'commit', 'versions', and
            'cached', whether that was before.

        Raises:
            Paused: the stage was checkpointed and left.
            CheckpointError: the result cannot be stored.
        """
        folder = self.folder(stage.name, stage_hash)
        try:
            with locked(folder, lambda: not self._should_stop()):
                return self._run_locked(stage, folder, seed, inputs)
        except InUse:
            raise Paused(f"waiting for another run to leave {stage.name}") from None

    def _run_locked(
        self,
        stage: Stage,
        folder: pathlib.Path,
        seed: int,
        inputs: Mapping[str, StageResult],
    ) -> tuple[StageResult, dict[str, Any]]:
        store = train.Checkpoints(folder / _RESULT, keep_last=1)
        restored = store.restore()
        cached = restored is not None
        if cached and self._profiled_steps:
            logger.warning("[%s] is cached: nothing to trace", stage.name)
        if cached and (folder / _METRICS).exists():
            names = [n for n in self._writers if not has_rows(n, folder)]
            settings = {**stage.config, "seed": seed if stage.seeded else 0}
            MetricsLog(
                folder / _METRICS,
                writers=open_writers(names, folder, folder.name, settings),
            ).close()
            for name in self._writers:
                print(f"[{stage.name}] cached: its log went to {name}, {folder}")
        if not cached:
            if self._should_stop():
                raise Paused(f"before {stage.name}")
            context = StageContext(
                stage.name,
                seed if stage.seeded else 0,
                {name: inputs[id_] for name, id_ in stage.reads.items()},
                folder,
                self._should_stop,
                self._writers,
                self._profiled_steps,
                stage.config,
            )
            try:
                result = stage.run(context)
                outputs = jax.device_get(result.outputs)  # waits for the device
            except BaseException:
                with contextlib.suppress(OSError):  # the disk may be what ended it
                    context.note_elapsed()
                raise
            record = {
                "wall_s": context.elapsed(),
                "peak_memory_gb": peak_memory_gb(),
                **provenance(),
            }
            store.save(
                0,
                outputs,
                {
                    "metrics": {k: float(v) for k, v in result.metrics.items()},
                    "timings": {k: float(v) for k, v in result.timings.items()},
                    "model": result.model,
                    "labels": dict(result.labels),
                    "meta": dict(result.meta),
                    "record": record,
                },
            )
            restored = store.restore()
        extra = restored.extra
        result = StageResult(
            restored.tree,
            extra["metrics"],
            extra["model"],
            extra["labels"],
            extra.get("meta", {}),
            extra.get("timings", {}),
        )
        return result, {**extra["record"], "cached": cached}

    def discard(self, name: str, stage_hash: str) -> None:
        """Removes a stage's files, once nobody uses them; what it knows goes last."""
        folder = self.folder(name, stage_hash)
        if not folder.exists():
            return
        with locked(folder, lambda: not self._should_stop()):
            for part in (_RESULT, _CHECKPOINTS):
                train.Checkpoints(folder / part).discard()
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != ".lock":
                    path.unlink()
