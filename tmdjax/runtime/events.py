"""What every worker of a run did and when: written as it happens, read as usage.

One event a step of a worker. Its order among the steps of that worker, and the message
that the step answered, are what a replay needs (``order=`` of an executor); its clock
and amounts are what costs are calibrated from (:mod:`tmdjax.runtime.executors.costs`).
"""

import collections
import dataclasses
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tmdjax.core.checks import brief, check_choice, check_count
from tmdjax.core.files import text_of

CONTROL = "control"
"""The worker whose notes say why the others wait. It is told when a run is to stop, and
when another worker died."""

_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """A step of a worker.

    Attributes:
        worker: its name: the role, or the role, '/' and a number, as in 'generate/0'.
        step: number among the steps of this worker, from 0.
        what: was done, such as 'decode' or 'learn'.
        begin: seconds since the run began.
        end: the same, >= begin.
        message: the one that was answered, ``(sender, its number among those of that
            sender)``; None for work of its own.
        amounts: how much was done, by name, such as tokens; >= 0.
        requests: numbers of the requests that it was about.
        version: of the weights, or None.
        notes: anything else that JSON can hold. Of the controller's, 'waits' says why
            each role waits from now on (``{role: reason}``), and 'lags' how stale the
            tokens of a batch are (``{versions: tokens}``).
    """

    worker: str
    step: int
    what: str
    begin: float
    end: float
    message: tuple[str, int] | None = None
    amounts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    requests: Sequence[int] = ()
    version: int | None = None
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def role(self) -> str:
        """The name of the worker without its number."""
        return role_of(self.worker)


def role_of(worker: str) -> str:
    """The name of a worker without its number: 'generate' of 'generate/0'."""
    return worker.partition("/")[0]


class EventLog:
    """A file to which events are appended, a JSON object a line."""

    def __init__(self, path: str | os.PathLike[str]):
        """Begins a file; folders are made.

        Raises:
            FileExistsError: there is one: a run that goes on has a clock of its own,
                and begins a log of its own.
            OSError: it cannot be written.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "x", encoding="utf-8")

    def __call__(self, event: Event) -> None:
        """Appends an event; a kill afterwards does not lose it."""
        self._file.write(json.dumps(vars(event)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Ends the file."""
        self._file.close()

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def read_events(path: str | os.PathLike[str]) -> list[Event]:
    """The events of a log, in the order they ended.

    A last line that a kill has cut is left out, with a warning.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no event; names it.
    """
    lines = text_of(path, most=10**11).split("\n")
    if lines.pop():
        _LOGGER.warning("%s: its last line was cut off and is left out", path)
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(_event(json.loads(line)))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"line {number} of {os.fspath(path)} is no event ({error}): "
                f"{brief(line)}. Remove it, or the lines from there on."
            ) from error
    return found


def logs_of(folder: str | os.PathLike[str]) -> list[Path]:
    """The logs of a run's starts, ``events_000.jsonl`` and so on, in their order."""
    found = Path(folder).glob("events_*.jsonl")
    return sorted(found, key=lambda path: (len(path.name), path.name))


def read_run(path: str | os.PathLike[str]) -> list[Event]:
    """The events of a run, of all its starts one after the other.

    For usage: the time between two starts is left out, and every start begins with the
    reason 'start' for all roles. What a kill has undone was done all the same, so that
    it counts as often as it was done. A replay needs the events of one start.

    Args:
        path: of a log, or of the folder of a run, in which the starts are
            ``events_000.jsonl``, ``events_001.jsonl`` and so on.

    Raises:
        FileNotFoundError: there is no such file, or a folder without a log.
        ValueError: a line is no event; names it.
    """
    path, paths = Path(path), [Path(path)]
    if path.is_dir():
        paths = logs_of(path)
        if not paths:
            raise FileNotFoundError(
                f"{path} has no events_*.jsonl; name the folder of a run that "
                f"fit_asynchronously was given, or a log."
            )
    found: list[Event] = []
    steps: collections.Counter[str] = collections.Counter()
    for each in paths:
        own = read_events(each)
        if found and own:
            now = max(event.end for event in found)
            roles = {role for e in found for role in e.notes.get("waits", {})}
            again = Event(
                worker=CONTROL,
                step=steps[CONTROL],
                what="start",
                begin=now,
                end=now,
                notes={"waits": dict.fromkeys(sorted(roles), "start")},
            )
            steps[CONTROL] += 1
            own = [
                dataclasses.replace(
                    event,
                    step=event.step + steps[event.worker],
                    begin=event.begin + now,
                    end=event.end + now,
                )
                for event in own
            ]
            found.append(again)
        steps.update(event.worker for event in own)
        found += own
    return found


def _event(fields: Mapping[str, Any]) -> Event:
    """An event of JSON values.

    Raises:
        TypeError: fields that are absent, unknown or of another type.
        ValueError: numbers out of range.
    """
    event = Event(**fields)
    texts = isinstance(event.worker, str) and isinstance(event.what, str)
    steps = [event.step, *event.requests]
    steps += [] if event.version is None else [event.version]
    if event.message is not None:
        sender, number = event.message
        texts, steps = texts and isinstance(sender, str), [*steps, number]
        event = dataclasses.replace(event, message=(sender, number))
    amounts = [*dict(event.amounts).values(), event.begin, event.end]
    if (
        not texts
        or not all(type(n) is int for n in steps)
        or not all(type(x) in (int, float) for x in amounts)
    ):
        raise TypeError("a field is of another type")
    dict(event.notes)
    if (
        min(steps) < 0
        or not event.begin <= event.end
        or not all(math.isfinite(x) and x >= 0 for x in amounts)
    ):
        raise ValueError("a number is out of range")
    return dataclasses.replace(event, requests=tuple(event.requests))


class Timeline(NamedTuple):
    """How some workers spent their time, by periods of the run.

    Attributes:
        workers: how many there are.
        edges: [period + 1] float64, seconds since the run began, where periods begin
            and end.
        busy: [period] float64, seconds of all these workers in steps.
        waits: [period] float64, the others, by reason, as the controller gave them;
            'start' before it gave any, 'idle' for a role that it gives none for.
            Reasons for which nobody ever waited are left out.
    """

    workers: int
    edges: np.ndarray
    busy: np.ndarray
    waits: Mapping[str, np.ndarray]

    @property
    def shares(self) -> dict[str, np.ndarray]:
        """Of the time of each period, in [0, 1]: 'busy', and waits by reason."""
        seconds = self.workers * np.diff(self.edges)
        return {
            name: np.divide(spent, seconds, np.zeros_like(spent), where=seconds > 0)
            for name, spent in {"busy": self.busy, **self.waits}.items()
        }


def timelines(
    events: Sequence[Event],
    workers: Iterable[str] = (),
    *,
    periods: int = 1,
    by: str = "role",
) -> dict[str, Timeline]:
    """When workers were busy, and why they waited when they were not.

    The run ends with the last step of the controller; what goes on longer is cut there.
    However many events and workers there are, what comes back has ``periods`` numbers
    for each row and reason.

    Args:
        events: of a run, of which a worker does one at a time.
        workers: names of all workers; those that never did anything are seen only here.
        periods: into how many of equal length the run is cut, >= 1.
        by: what a row is of: 'role', or 'worker'. Reasons are those of the role.

    Returns:
        By name of role or worker, as they first appear; seconds of 'busy' and 'waits'
        add up to the length of each period times workers.

    Raises:
        TypeError: periods is no integer.
        ValueError: periods below 1, or rows by anything else.
    """
    check_count("periods", periods)
    check_choice("by", by, ("role", "worker"))
    told = sorted((e for e in events if e.worker == CONTROL), key=lambda e: e.step)
    ends = [e.end for e in told] or [e.end for e in events]
    edges = np.linspace(0.0, max(ends, default=0.0), periods + 1)
    reasons: dict[str, list[tuple[float, str]]] = {}
    for event in told:
        for role, reason in event.notes.get("waits", {}).items():
            known = reasons.setdefault(role, [(0.0, "start")])
            if known[-1][1] != reason:
                known.append((event.end, reason))
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    for event in events:
        steps.setdefault(event.worker, []).append((event.begin, event.end))
    rows: dict[str, list[str]] = {}
    for name in steps:
        rows.setdefault(role_of(name) if by == "role" else name, []).append(name)
    return {
        row: _timeline(
            [span for name in names for span in steps[name]],
            len(names),
            reasons.get(role_of(row), [(0.0, "idle")]),
            edges,
        )
        for row, names in rows.items()
    }


def _timeline(
    spans: Sequence[tuple[float, float]],
    workers: int,
    reasons: Sequence[tuple[float, str]],
    edges: np.ndarray,
) -> Timeline:
    """Of the steps of workers and of when each reason began to hold, from 0 on.

    Between two neighbours of all these times and edges, how many are busy is one
    number, and the reason why the others wait is one.
    """
    begin, end = np.minimum(np.reshape(np.array(spans, float), (-1, 2)).T, edges[-1])
    since = np.array([time for time, _ in reasons])
    times = np.unique(np.concatenate([edges, begin, end, since[since < edges[-1]]]))
    at, seconds = times[:-1], np.diff(times)
    period = np.searchsorted(edges, at, side="right") - 1
    busy = np.searchsorted(np.sort(begin), at, side="right")
    busy = busy - np.searchsorted(np.sort(end), at, side="right")
    names = list(dict.fromkeys(name for _, name in reasons))
    holds = np.array([names.index(name) for _, name in reasons])
    holds = holds[np.searchsorted(since, at, side="right") - 1]

    def summed(spent: np.ndarray) -> np.ndarray:
        found = np.bincount(period, spent, minlength=len(edges) - 1)
        return found.astype(float)  # nothing is summed to whole zeros

    waits = {
        name: summed(seconds * (workers - busy) * (holds == number))
        for number, name in enumerate(names)
    }
    waits = {name: spent for name, spent in waits.items() if spent.any()}
    return Timeline(workers, edges, summed(seconds * busy), waits)


@dataclasses.dataclass(frozen=True)
class Usage:
    """How the workers of a role spent their time.

    Attributes:
        workers: how many there are.
        seconds: of the run, times workers.
        busy: seconds of these in steps.
        waits: the others, by reason, as the controller gave them; 'start' before it
            gave any.
    """

    workers: int
    seconds: float
    busy: float
    waits: Mapping[str, float]

    @property
    def share(self) -> float:
        """The part of the time in which they were busy, in [0, 1]."""
        return self.busy / self.seconds if self.seconds else 0.0


def utilisation(
    events: Sequence[Event], workers: Iterable[str] = ()
) -> dict[str, Usage]:
    """How much each role was busy, and why it waited when it was not.

    The run ends with the last step of the controller; what goes on longer is cut there.

    Args:
        events: of a run.
        workers: names of all workers; those that never did anything are seen only here.

    Returns:
        Usage by role; seconds of 'busy' and 'waits' add up to ``Usage.seconds``.
    """
    return {
        role: Usage(
            found.workers,
            found.workers * float(found.edges[-1]),
            float(found.busy.sum()),
            {reason: float(spent.sum()) for reason, spent in found.waits.items()},
        )
        for role, found in timelines(events, workers).items()
    }


def staleness(events: Iterable[Event]) -> dict[int, int]:
    """Tokens of all batches by how many versions they were behind the weights."""
    found: dict[int, int] = {}
    for event in events:
        for lag, tokens in event.notes.get("lags", {}).items():
            found[int(lag)] = found.get(int(lag), 0) + tokens
    return dict(sorted(found.items()))


def total(events: Iterable[Event], what: str, amount: str) -> float:
    """The sum of an amount over all steps of a kind, such as tokens of 'decode'."""
    return sum(e.amounts.get(amount, 0) for e in events if e.what == what)


def rate(events: Iterable[Event], what: str, amount: str, edges: Any) -> np.ndarray:
    """An amount a second over time, such as tokens of 'decode'.

    What a step has done is spread evenly from its begin to its end.

    Args:
        events: of a run.
        what: the kind of step.
        amount: its name in ``Event.amounts``; a step without it has done none.
        edges: [period + 1] seconds since the run began, which rise, such as
            ``Timeline.edges``; what was done before and after is not counted.

    Returns:
        [period] float64, a second.
    """
    rows = [
        (e.end, e.end - e.begin, e.amounts[amount])
        for e in events
        if e.what == what and amount in e.amounts
    ]
    end, seconds, amounts = np.reshape(np.array(rows, float), (-1, 3)).T
    seconds = np.maximum(seconds, 1e-9)  # of one that took no time
    edges = np.asarray(edges, float)
    done = [np.sum(amounts * np.clip(1 - (end - t) / seconds, 0, 1)) for t in edges]
    return np.diff(done) / np.diff(edges)


def lengths(events: Iterable[Event]) -> dict[str, np.ndarray]:
    """Lengths of responses in tokens, for the question whether short ones train first.

    What was not written to its end is in neither:
    :func:`tmdjax.runtime.length_bias` estimates it, from the account of a run.

    Args:
        events: of a run.

    Returns:
        'written': [response] int64, of all that were judged, by number; 'trained': of
        those among them that updates were made by.
    """
    judged: dict[int, int] = {}
    learnt: set[int] = set()
    for event in events:
        if event.what == "judge":
            tokens = int(event.amounts.get("tokens", 0))
            judged |= dict.fromkeys(event.requests, tokens)
        elif event.what == "learn":
            learnt |= set(event.requests)
    numbers = sorted(judged)
    return {
        "written": np.array([judged[n] for n in numbers], np.int64),
        "trained": np.array([judged[n] for n in numbers if n in learnt], np.int64),
    }
