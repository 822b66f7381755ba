"""RL on a language model whose responses are written while others are trained on.

:func:`fit_asynchronously` puts a learner, engines and a scorer into the workers of
:mod:`tmdjax.runtime.roles`, and an executor runs them. It stands beside
:func:`tmdjax.train.fit` and takes the same hooks: it goes on from the newest checkpoint
by itself, and tells the metrics of each update. In the folder of a run are

    trajectories.sqlite    what became of every request, see TrajectoryStore
    events_000.jsonl       what every worker did, a file for each start
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tmdjax import rl
from tmdjax.core.checks import check_count
from tmdjax.core.types import Params
from tmdjax.generation import Engine
from tmdjax.runtime.cohorts import Cohorts
from tmdjax.runtime.control import Controller
from tmdjax.runtime.events import CONTROL, Event, EventLog
from tmdjax.runtime.executors import Executor, Message, Step, Threads, Worker
from tmdjax.runtime.executors.messages import Log
from tmdjax.runtime.learner import Learner, LMState, check_engine
from tmdjax.runtime.publishing import apart
from tmdjax.runtime.roles import Batch, Generator, Scorer, Trainer, WritingEngine
from tmdjax.runtime.rounds import Planner
from tmdjax.runtime.schedule import Schedule
from tmdjax.runtime.scheduling import rollout_metrics
from tmdjax.runtime.scoring import judge_of
from tmdjax.runtime.settings import Draw, Prompt, Score
from tmdjax.runtime.trajectories import TrajectoryStore
from tmdjax.runtime.watchdog import Watchdog
from tmdjax.train.checkpoint import Checkpoints
from tmdjax.train.supervised import FitResult, check_skipped

_LOGGER = logging.getLogger(__name__)
_TRAINER = "train"


def fit_asynchronously(
    state: LMState,
    learner: Learner,
    make_engine: Callable[[int], WritingEngine],
    draw: Draw,
    score: Score,
    schedule: Schedule,
    *,
    key: Any,
    executor: Executor | None = None,
    folder: str | os.PathLike[str] | None = None,
    generators: int = 1,
    scorers: int = 1,
    interruptible: bool = True,
    recompute: bool = True,
    accept: Callable[[Sequence[float]], bool] | None = None,
    checkpoints: Checkpoints | None = None,
    checkpoint_every: int = 1,
    logs: Sequence[Log] = (),
    order: Iterable[Event] = (),
    on_metrics: Callable[[int, dict[str, float]], None] | None = None,
    on_resume: Callable[[int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    max_skipped: int = 20,
    longest_wait: float = 14400.0,
) -> FitResult:
    """Trains up to ``schedule.updates``, going on from a checkpoint if there is one.

    With ``schedule.eta=0`` its updates are those of
    :func:`tmdjax.runtime.make_iteration`, bit for bit. With more, responses may hold
    tokens of older weights: ``LanguageSettings(proximal='recompute')`` and a correction
    for the policy that wrote are what keeps that stable.

    Killed at any moment and called again with the same arguments, it trains on nothing
    twice, relative to the checkpoint that it goes on from, and no token is staler than
    eta. What was written and reported by then is kept, but for what weights wrote that
    are newer than the checkpoint.

    Args:
        state: of ``learner.init``, donated. Where nothing is restored, training begins
            with it.
        learner: all updates by a batch; its settings agree with the schedule. Where
            its objective is a :class:`tmdjax.runtime.Planner`, it says how many
            responses each prompt of a draw gets, in ``schedule.rounds``.
        make_engine: makes the engine of a generator by its number, from 0, where that
            generator runs. All of them are given one key, so that a text is the same
            whoever writes it, and length for ``learner.length`` tokens. Weights come
            from the trainer before the first text.
        draw: prompts, ``draw(i, 0)`` for the i-th ``schedule.batch`` groups.
        score: rewards. A response whose scorer raises, or takes longer than
            ``score_timeout`` of the settings, is lost, which the account says; the run
            goes on. A group trains without the responses that it lost as long as 2 are
            left, and ``minibatches / batch`` of them; if not it is discarded, and
            another takes its place.
        schedule: how far writing may be ahead.
        key: typed key of the run; the version of the weights is folded in.
        executor: runs the workers; None takes
            :class:`tmdjax.runtime.executors.Threads`.
        folder: of account and events, one run's alone; None keeps the account in memory
            and no events.
        generators: how many, >= 1: 'generate/0' and so on.
        scorers: how many, >= 1: 'reward/0' and so on; ``score`` is called by each in a
            thread of its own.
        interruptible: see :class:`tmdjax.runtime.Generator`.
        recompute: see :meth:`tmdjax.generation.Engine.update_weights`.
        accept: whether a group may train, by the scores of its responses; None goes by
            ``dynamic_sampling`` of the settings, and the run ends where the groups of
            ``max_attempts`` batches in a row may not.
        checkpoints: where the state is saved; they go with the folder.
        checkpoint_every: updates from one save to the next, >= 1. The last update, and
            the one that a run is stopped at, are saved too.
        logs: are called with each event too, such as
            :class:`tmdjax.runtime.Activity`.
        order: events of a run that is to be replayed from its first update on, see
            :meth:`tmdjax.runtime.executors.Executor.run`.
        on_metrics: called with (updates done, metrics) after each: those of
            ``learner.learn``, those of the batch that :func:`tmdjax.runtime.collect`
            reports of a rollout, and 'skipped', the updates that were not finite.
        on_resume: called once with the number of updates that the run starts from.
        should_stop: asked again and again; True ends the run after the update that is
            under way, and what was written so far is kept in the account.
        max_skipped: so many updates in a row that are not finite end the run.
        longest_wait: seconds of the executor's clock, > 0, that the trainer may wait
            for a batch; a longer wait ends the run, see
            :class:`tmdjax.runtime.Watchdog`. ``math.inf`` for no bound.

    Returns:
        The state, and whether ``schedule.updates`` are done. Where the executor has the
        trainer in another process, the state is that of its newest checkpoint.

    Raises:
        CheckpointError: a save failed, or the checkpoint is of another model.
        NonFiniteError: ``max_skipped`` updates in a row were skipped.
        RuntimeError: no batch came for ``longest_wait``, or too many groups or texts
            in a row cannot train (``max_rejected``, ``max_unscored`` of the schedule).
        ValueError: what does not fit together; says what and how to mend it, before
            anything is compiled.
        Exception: what a worker raised, see
            :meth:`tmdjax.runtime.executors.Executor.run`.
    """
    _check(schedule, learner, state, generators)
    check_count("scorers", scorers)
    check_count("checkpoint_every", checkpoint_every)
    watchdog = Watchdog(longest_wait)
    if checkpoints is not None and folder is None:
        raise ValueError(
            "checkpoints without folder=: a run that goes on from one needs the "
            "account of what was trained on and what was written; give a folder too."
        )
    settings, length = learner.settings, learner.length
    if accept is None and settings.dynamic_sampling:
        accept = rl.is_informative
        most = settings.max_attempts * schedule.batch
        fewer = min(schedule.max_rejected, most)
        schedule = dataclasses.replace(schedule, max_rejected=fewer)
    least_scored = max(2, math.ceil(settings.minibatches / schedule.batch))
    start, metrics, paused = int(state.iteration), {}, False
    if checkpoints is not None:
        restored = checkpoints.restore(like=state)
        if restored is not None:
            state, extra = restored.tree, restored.extra
            metrics, paused = extra.get("metrics", {}), extra.get("paused", False)
    version = int(state.iteration)
    if version > schedule.updates:
        raise ValueError(
            f"updates={schedule.updates}, but the weights are of version {version}. "
            f"Give updates >= {version}, or another folder for a shorter run."
        )
    if version == schedule.updates:  # its row may not have been written any more
        if on_resume is not None:
            on_resume(version - 1 if metrics else version)
        if on_metrics is not None and metrics:
            on_metrics(version, metrics)
        return FitResult(state, True)
    if on_resume is not None:
        on_resume(version)
    training = _Training(
        learner, state, key, checkpoints, schedule.updates, max_skipped
    )
    accounts = contextlib.ExitStack()
    writers = [f"generate/{i}" for i in range(generators)]
    judges = [f"reward/{i}" for i in range(scorers)]

    def oldest() -> int:
        """The version of the oldest state that may be restored."""
        steps = [] if checkpoints is None else checkpoints.steps()
        return steps[0] if len(steps) > 1 else start  # a single one may be damaged

    def control() -> Worker:
        store = accounts.enter_context(TrajectoryStore(folder))
        store.restore(version, paused=paused)
        store.forget(oldest())
        controller = Controller(
            schedule,
            store,
            _prompts(draw, schedule.batch),
            writers,
            judges,
            trainer=_TRAINER,
            accept=accept or (lambda scores: True),
            least_scored=least_scored,
            planner=_planner(learner),
        )

        def work(message: Message | None) -> Step | None:
            step = controller(message)
            if message is not None and message.kind == "weights":
                store.forget(oldest())
            return step

        return work

    def generator(number: int) -> Worker:
        engine = make_engine(number)
        if isinstance(engine, Engine):
            check_engine(engine, length)
        return Generator(engine, interruptible=interruptible, recompute=recompute)

    workers: dict[str, Callable[[], Worker]] = {
        CONTROL: control,
        **{name: functools.partial(generator, i) for i, name in enumerate(writers)},
        **{name: lambda: Scorer(judge_of(score, settings)) for name in judges},
        _TRAINER: lambda: Trainer(
            training.publish,
            training.learn,
            version,
            save=None if checkpoints is None else training.save,
            save_every=checkpoint_every,
        ),
    }
    reached = version
    with _event_log(folder) as events, accounts:

        def log(event: Event) -> None:
            nonlocal reached
            for each in (events, *logs, watchdog):
                each(event)
            if event.worker == _TRAINER and event.what == "learn":
                reached += 1
                if on_metrics is not None:
                    on_metrics(reached, dict(event.notes["metrics"]))

        (executor or Threads()).run(
            workers, log, order=order, should_stop=should_stop or (lambda: False)
        )
    if training.version != reached:
        state, reached = _saved(checkpoints, state)
    else:
        state = training.state
        if reached < schedule.updates and checkpoints is not None:
            training.save(paused=True)
    return FitResult(state, reached == schedule.updates)


class _Training:
    """The state of the trainer; it lives where that worker does."""

    def __init__(
        self,
        learner: Learner,
        state: LMState,
        key: Any,
        checkpoints: Checkpoints | None,
        last: int,
        max_skipped: int,
    ):
        self.state = state
        self._learner, self._key, self._checkpoints = learner, key, checkpoints
        self._last, self._max_skipped = last, max_skipped
        self._metrics: dict[str, float] = {}
        self._saved = -1  # version

    @property
    def version(self) -> int:
        """Of its weights: how many updates are done."""
        return int(self.state.iteration)

    def publish(self) -> Params:
        """What generators read, in arrays that no later update touches."""
        return apart(self._learner.publish(self.state), self.state)

    def learn(self, batch: Batch) -> dict[str, float]:
        """All updates by a batch."""
        records = [
            dataclasses.replace(record, group=number)
            for number, group in enumerate(batch.groups)
            for record in group.records
        ]
        before = int(self.state.skipped)
        self.state, found = self._learner.learn(self.state, records, self._key)
        check_skipped(self.state, self.version, self._max_skipped, self._checkpoints)
        found = rollout_metrics(batch.groups, batch.version) | found
        self._metrics = {name: float(value) for name, value in found.items()}
        self._metrics["skipped"] = float(int(self.state.skipped) - before)
        if self.version == self._last and self._checkpoints is not None:
            self.save()  # after it nothing else may come
        return self._metrics

    def save(self, *, paused: bool = False) -> None:
        """Saves the state, once; ``paused`` where the account has all that was written.

        A run that goes on from there keeps what the weights of this version wrote.
        """
        assert self._checkpoints is not None
        if self._saved == self.version and not paused:
            return
        self._saved = self.version
        extra = {"metrics": self._metrics, "paused": paused}
        self._checkpoints.save(self.version, self.state, extra)


def _check(
    schedule: Schedule, learner: Learner, state: LMState, generators: int
) -> None:
    """Refuses what does not fit together, and warns of what cannot pay."""
    settings = learner.settings
    for ours, theirs in (
        ("batch", "prompts"),
        ("samples", "samples"),
        ("max_new_tokens", "max_new_tokens"),
        ("max_lag", "max_lag"),
    ):
        given, wanted = getattr(schedule, ours), getattr(settings, theirs)
        if given != wanted:
            raise ValueError(
                f"the schedule has {ours}={given}, but the settings of the learner "
                f"have {theirs}={wanted}; make these by schedule.settings()."
            )
    if schedule.max_new_tokens >= learner.length:
        raise ValueError(
            f"max_new_tokens={schedule.max_new_tokens} leaves no room for a prompt in "
            f"texts of length={learner.length}, the learner's; lower it, or raise "
            f"length."
        )
    Cohorts(schedule, lambda number: None, _planner(learner))  # refuses what it must
    if state.pending.size:
        raise ValueError(
            "the state has responses of an iteration that was stopped while it "
            "collected; let runtime.make_iteration finish it, or empty state.pending."
        )
    places = check_count("generators", generators) * schedule.slots
    most = schedule.most_ahead * schedule.samples
    if most < places:
        _LOGGER.warning(
            "the engines can never be full: the schedule lets %g responses be ahead of "
            "training, and generators=%d with slots=%d have place for %d. Raise eta or "
            "ahead, or lower slots.",
            most,
            generators,
            schedule.slots,
            places,
        )


def _planner(learner: Learner) -> Planner | None:
    """The objective, where it plans how many responses each prompt has."""
    return learner.objective if isinstance(learner.objective, Planner) else None


def _prompts(draw: Draw, size: int) -> Callable[[int], Prompt]:
    """The prompt of a group by its number, of draws of ``size`` prompts."""

    @functools.lru_cache(maxsize=8)
    def drawn(number: int) -> Sequence[Prompt]:
        found = draw(number, 0)
        if len(found) != size:
            raise ValueError(
                f"the draw gave {len(found)} prompts; the schedule has batch={size}."
            )
        return found

    return lambda number: drawn(number // size)[number % size]


def _event_log(
    folder: str | os.PathLike[str] | None,
) -> contextlib.AbstractContextManager[Log]:
    """A new file of events, of the first number that is free; no log without folder."""
    if folder is None:
        return contextlib.nullcontext(lambda event: None)
    paths = (Path(folder) / f"events_{i:03d}.jsonl" for i in itertools.count())
    return EventLog(next(path for path in paths if not path.exists()))


def _saved(checkpoints: Checkpoints | None, like: LMState) -> tuple[LMState, int]:
    """State and version that a trainer of another process has saved last.

    Raises:
        RuntimeError: nothing was saved.
    """
    restored = None if checkpoints is None else checkpoints.restore(like=like)
    if restored is None:
        raise RuntimeError(
            "the trainer has run in another process and saved nothing, so that what it "
            "has learned is gone; give checkpoints and a folder that both can reach."
        )
    return restored.tree, restored.step
