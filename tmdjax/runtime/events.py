"""What every worker of a run did and when: written as it happens, read as usage.

One event a step of a worker. Its order among the steps of that worker, and the message
that the step answered, are what a replay needs (``order=`` of an executor); its clock
and amounts are what costs are calibrated from (:mod:`tmdjax.runtime.executors.costs`).
"""

import dataclasses
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tmdjax.core.checks import brief
from tmdjax.core.files import text_of

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
        return self.worker.partition("/")[0]


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
    events: Sequence[Event], workers: Iterable[str] = (), *, control: str = "control"
) -> dict[str, Usage]:
    """How much each role was busy, and why it waited when it was not.

    The run ends with the last step of the controller; what goes on longer is cut there.

    Args:
        events: of a run.
        workers: names of all workers; those that never did anything are seen only here.
        control: name of the controller, whose notes give the reasons.

    Returns:
        Usage by role; seconds of 'busy' and 'waits' add up to ``Usage.seconds``.
    """
    ends = [e.end for e in events if e.worker == control] or [e.end for e in events]
    last = max(ends, default=0.0)
    reasons: dict[str, list[tuple[float, str]]] = {}
    for event in sorted((e for e in events if e.worker == control), key=_by_step):
        for role, reason in event.notes.get("waits", {}).items():
            reasons.setdefault(role, [(0.0, "start")]).append((event.end, reason))
    steps: dict[str, list[Event]] = {name: [] for name in workers}
    for event in events:
        steps.setdefault(event.worker, []).append(event)
    found: dict[str, Usage] = {}
    for name, own in steps.items():
        role = name.partition("/")[0]
        waits: dict[str, float] = dict(found[role].waits) if role in found else {}
        busy, free = 0.0, 0.0
        for begin, end in [
            *((e.begin, e.end) for e in sorted(own, key=_by_step)),
            (last, last),
        ]:
            begin, end = min(begin, last), min(end, last)
            for reason, seconds in _split(reasons.get(role, []), free, begin):
                waits[reason] = waits.get(reason, 0.0) + seconds
            busy, free = busy + end - begin, end
        known = found.get(role, Usage(0, 0.0, 0.0, {}))
        found[role] = Usage(
            known.workers + 1, known.seconds + last, known.busy + busy, waits
        )
    return found


def _by_step(event: Event) -> int:
    return event.step


def _split(
    reasons: Sequence[tuple[float, str]], begin: float, end: float
) -> Iterable[tuple[str, float]]:
    """Reasons that held between two times, with seconds; 'idle' where none is given."""
    reasons = reasons or [(0.0, "idle")]
    for (since, reason), (until, _) in zip(reasons, [*reasons[1:], (math.inf, "")]):
        seconds = min(until, end) - max(since, begin)
        if seconds > 0:
            yield reason, seconds


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
