"""Stages: the parts of an experiment, each cached under what it depends on.

The hash of a stage covers its name, version, config, seed and its parents'
hashes, so a pretrained base is made once and shared by every experiment that
describes it in the same way. A stage that was interrupted goes on from its own
checkpoints.
"""

import dataclasses
import logging
import pathlib
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from tmdjax import train
from tmdjax.harness.config import config_hash
from tmdjax.harness.environment import locked, peak_memory_gb
from tmdjax.harness.logs import MetricsLog, Progress

logger = logging.getLogger("tmdjax")

_RESULT = "result"
_CHECKPOINTS = "checkpoints"
_METRICS = "metrics.jsonl"


class Paused(Exception):
    """A stage was checkpointed and left before its end."""


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What a stage leaves behind.

    Attributes:
        outputs: nested dict of arrays, for later stages and figures.
        metrics: numbers (scalars) of this arm and seed.
        model: spec that rebuilds the network of ``outputs['params']``, or None.
        labels: names that belong into the record, such as that of a feature net.
    """

    outputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: Mapping[str, Any] | None = None
    labels: Mapping[str, str] = dataclasses.field(default_factory=dict)


class StageContext:
    """What a running stage may use.

    Attributes:
        name: of the stage.
        seed: of this unit.
        key: typed key of this stage and seed.
        inputs: results of the parents, by name.
        directory: the stage's own folder.
    """

    def __init__(
        self,
        name: str,
        seed: int,
        inputs: Mapping[str, StageResult],
        directory: pathlib.Path,
        should_stop: Callable[[], bool],
        tensorboard: bool = False,
    ):
        self.name = name
        self.seed = seed
        self.key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
        self.inputs = inputs
        self.directory = directory
        self._should_stop = should_stop
        self._tensorboard = tensorboard

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

        Once a stage. Resumes by itself.

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
        """
        checkpoints = train.Checkpoints(
            self.directory / _CHECKPOINTS, best=None if score is None else "min"
        )
        with (
            MetricsLog(self.directory / _METRICS, tensorboard=self._tensorboard) as log,
            Progress(self.name, num_steps) as progress,
        ):
            clock = _Clock()

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

            result = train.fit(
                state,
                step_fn,
                data,
                key=self.key,
                num_steps=num_steps,
                checkpoints=checkpoints,
                on_metrics=on_metrics,
                on_resume=on_resume,
                should_stop=self._should_stop,
                score=score,
                **options,
            )
        if not result.finished:
            raise Paused(f"{self.name} at step {int(result.state.step)} of {num_steps}")
        skipped = int(result.state.skipped)
        if skipped:
            logger.warning(
                "[%s] %d of %d updates were not finite and were skipped",
                self.name,
                skipped,
                num_steps,
            )
        return result.state


class _Clock:
    """Seconds of training, pauses left out, and the rate since the last row."""

    def __init__(self) -> None:
        self.start(0.0, 0)

    def start(self, seconds: float, step: int) -> None:
        self._began = time.monotonic() - seconds
        self._last = (seconds, step)

    def columns(self, step: int) -> dict[str, float]:
        seconds = time.monotonic() - self._began
        last_seconds, last_step = self._last
        self._last = (seconds, step)
        rate = (step - last_step) / max(seconds - last_seconds, 1e-9)
        return {"time/seconds": seconds, "time/steps_per_second": rate}


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
    """

    name: str
    run: Callable[[StageContext], StageResult]
    config: Mapping[str, Any]
    parents: tuple[str, ...] = ()
    version: int = 1
    seeded: bool = True


def select(stages: Sequence[Stage], last: str | None = None) -> list[Stage]:
    """The stages needed for `last` (all if None), in order.

    Raises:
        ValueError: duplicate names, a parent that does not come before, or an
            unknown `last`.
    """
    seen: dict[str, Stage] = {}
    for stage in stages:
        if stage.name in seen:
            raise ValueError(f"two stages are called {stage.name!r}; rename one.")
        for parent in stage.parents:
            if parent not in seen:
                raise ValueError(
                    f"stage {stage.name!r} reads {parent!r}, which does not come "
                    f"before it; the order is {[s.name for s in stages]}."
                )
        seen[stage.name] = stage
    if last is None:
        return list(stages)
    if last not in seen:
        raise ValueError(f"there is no stage {last!r}; stages: {', '.join(seen)}.")
    needed, todo = set(), [last]
    while todo:
        name = todo.pop()
        needed.add(name)
        todo.extend(seen[name].parents)
    return [stage for stage in stages if stage.name in needed]


def stage_hashes(stages: Sequence[Stage], seed: int) -> dict[str, str]:
    """The hash of each stage under one seed."""
    hashes: dict[str, str] = {}
    for stage in stages:
        hashes[stage.name] = config_hash(
            {
                "name": stage.name,
                "version": stage.version,
                "config": dict(stage.config),
                "seed": seed if stage.seeded else None,
                "parents": {name: hashes[name] for name in stage.parents},
            }
        )
    return hashes


class StageCache:
    """Results of stages on disk, one folder a hash.

    Args:
        root: folder of all cached stages.
        should_stop: asked at logs; True pauses the running stage.
        tensorboard: also write event files beside the metrics.
    """

    def __init__(
        self,
        root: pathlib.Path,
        should_stop: Callable[[], bool] = lambda: False,
        tensorboard: bool = False,
    ):
        self.root = root
        self._should_stop = should_stop
        self._tensorboard = tensorboard

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
        """Reads a stage's result, or makes it.

        Returns:
            The result as it is on disk (arrays are numpy), and a record with
            'wall_s', 'peak_memory_gb' and 'cached'.

        Raises:
            Paused: the stage was checkpointed and left.
        """
        folder = self.folder(stage.name, stage_hash)
        with locked(folder, wait=True):
            store = train.Checkpoints(folder / _RESULT, keep_last=1)
            restored = store.restore()
            cached = restored is not None
            if not cached:
                if self._should_stop():
                    raise Paused(f"before {stage.name}")
                started = time.monotonic()
                context = StageContext(
                    stage.name,
                    seed,
                    {name: inputs[name] for name in stage.parents},
                    folder,
                    self._should_stop,
                    self._tensorboard,
                )
                result = stage.run(context)
                record = {
                    "wall_s": time.monotonic() - started,
                    "peak_memory_gb": peak_memory_gb(),
                }
                store.save(
                    0,
                    result.outputs,
                    {
                        "metrics": {k: float(v) for k, v in result.metrics.items()},
                        "model": result.model,
                        "labels": result.labels,
                        "record": record,
                    },
                )
                restored = store.restore()
        extra = restored.extra
        result = StageResult(
            restored.tree, extra["metrics"], extra["model"], extra["labels"]
        )
        return result, {**extra["record"], "cached": cached}
