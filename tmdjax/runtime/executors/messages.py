"""What a worker is, and how the steps of several are put in order and replayed.

A worker is a function of one message, or of None where there is none for it, that says
what it did. It knows no clock, no thread and no other worker but by name: whatever runs
it, it does the same for the same messages in the same order, between the same pieces of
its own work. That order is the whole trace of a run, and executors can be made to keep
it (``order=``).
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from tmdjax.core.checks import first_few
from tmdjax.core.registry import suggestion
from tmdjax.runtime.events import CONTROL, Event

EXECUTOR = "executor"
"""The sender of the message 'stop'."""


class Send(NamedTuple):
    """A message that a step sends.

    Attributes:
        to: name of a worker.
        kind: of message, by which the worker knows what to do.
        body: of it; from then on it belongs to that worker.
    """

    to: str
    kind: str
    body: Any = None


class Message(NamedTuple):
    """A message that arrives.

    Attributes:
        sender: name of a worker.
        number: among the messages of that sender, from 0.
        kind: what to do.
        body: what with.
    """

    sender: str
    number: int
    kind: str
    body: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """What a worker did.

    Attributes:
        what: in a word, by which its cost is known.
        sends: messages, in order; they arrive when the step ends.
        amounts: how much was done, by name: what costs are proportional to.
        requests: numbers of the requests that it was about, for the log.
        version: of the weights, for the log.
        notes: for the log, see :class:`tmdjax.runtime.events.Event`.
        last: the run is over.
    """

    what: str
    sends: Sequence[Send] = ()
    amounts: Mapping[str, float] = dataclasses.field(default_factory=dict)
    requests: Sequence[int] = ()
    version: int | None = None
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    last: bool = False


Worker = Callable[[Message | None], Step | None]
"""Called with the message that arrived first of those it has not seen; with None where
there is none. Then it does a piece of work of its own, or, with nothing to do, returns
None and changes nothing; it is called again once there is a message."""

Log = Callable[[Event], None]
"""Called with each step after it ended, such as ``EventLog`` or ``list.append``."""


class Executor(Protocol):
    """Runs workers until one of them says that the run is over."""

    def run(
        self,
        workers: Mapping[str, Callable[[], Worker]],
        log: Log,
        *,
        order: Iterable[Event] = (),
        should_stop: Callable[[], bool] = lambda: False,
    ) -> float:
        """Runs to the end.

        A worker that raises :exc:`tmdjax.runtime.executors.WorkerDiedError` does not
        end the run: 'control' gets the message 'lost', and answers with 'again' to have
        the worker made anew (:mod:`tmdjax.runtime.executors.deaths`).

        Args:
            workers: what makes each, by name ('generate/0'). It is made where it runs,
                before any step.
            log: is called from one thread at a time.
            order: of a run that is to be replayed: every worker sees the same messages
                in the same order as there, between the same pieces of work of its own,
                whatever the clock says; once it has done all of these it is free.
            should_stop: asked again and again; once it says True, 'control' gets the
                message 'stop', and brings the run to its end.

        Returns:
            Seconds that the run took, on its own clock.

        Raises:
            Exception: what a worker raised, with a note that says which and where.
            RuntimeError: all workers wait for each other, or the replay cannot follow
                its order; says who waits for what. Or a worker died too often.
            ValueError: a message to nobody, or an order of other workers.
        """
        ...


class Inbox:
    """What has arrived for a worker, and which of it is next."""

    def __init__(self, order: Iterable[tuple[str, int] | None] = ()):
        """Of what the steps of a run to be replayed answered, None for no message."""
        self._messages: list[Message] = []
        self._order = collections.deque(order)
        self._rests = self._replayed = False

    def put(self, message: Message) -> None:
        """A message arrives."""
        self._messages.append(message)

    @property
    def is_ready(self) -> bool:
        """Whether there is a step to do."""
        if self._order:
            return self._order[0] is None or self._place() is not None
        return bool(self._messages) or not self._rests

    def take(self) -> Message | None:
        """What the next step answers; call it once there is a step to do."""
        place, self._replayed = self._place(), bool(self._order)
        if self._order:
            self._order.popleft()
        if place is None:
            return None
        self._rests = False  # whatever was said before it came
        return self._messages.pop(place)

    def rest(self) -> None:
        """The worker has nothing to do of its own until a message arrives.

        Raises:
            RuntimeError: in the run that is replayed it had.
        """
        if self._replayed:
            raise RuntimeError(
                "a worker has nothing to do where it had in the run that is replayed; "
                "replay a run with the same workers, settings and inputs."
            )
        self._rests = True

    @property
    def awaits(self) -> str:
        """What is waited for, in words."""
        if self._order and self._order[0] is not None:
            sender, number = self._order[0]
            return f"message {number} of {sender}, as in the order it replays"
        return "a message"

    def _place(self) -> int | None:
        """Of the next message among those that have arrived."""
        if not self._order:
            return 0 if self._messages else None
        names = [(message.sender, message.number) for message in self._messages]
        head = self._order[0]
        return names.index(head) if head in names else None


class Post:
    """The inboxes of all workers of a run, and the numbers of messages and steps."""

    def __init__(self, names: Sequence[str], order: Iterable[Event]):
        """Of the names of the workers, and of the events of a run to be replayed.

        Raises:
            ValueError: the order has other workers.
        """
        recorded: dict[str, list[Event]] = {name: [] for name in names}
        for event in order:
            if event.worker not in recorded:
                raise ValueError(
                    f"the order has steps of {event.worker!r}, but the workers are "
                    f"{', '.join(names)}; replay a run with the workers it had."
                )
            recorded[event.worker].append(event)
        self.inboxes = {
            name: Inbox(e.message for e in sorted(events, key=lambda e: e.step))
            for name, events in recorded.items()
        }
        self._sent: collections.Counter[str] = collections.Counter()
        self._steps: collections.Counter[str] = collections.Counter()
        self._latest: dict[str, Event] = {}
        if any(e.message == (EXECUTOR, 0) for e in recorded.get(CONTROL, [])):
            self.stop()  # the run to be replayed was told to

    def stop(self) -> None:
        """Tells the controller to bring the run to its end; once."""
        if not self._sent[EXECUTOR]:
            self.deliver(EXECUTOR, [Send(CONTROL, "stop")])

    def deliver(self, sender: str, sends: Iterable[Send]) -> None:
        """Puts messages into inboxes, numbered.

        Raises:
            ValueError: there is no such worker.
        """
        for to, kind, body in sends:
            if to not in self.inboxes:
                raise ValueError(
                    f"{sender} sent {kind!r} to {to!r}; the workers are "
                    f"{', '.join(self.inboxes)}.{suggestion(to, self.inboxes)}"
                )
            self.inboxes[to].put(Message(sender, self._sent[sender], kind, body))
            self._sent[sender] += 1

    def call(self, name: str, worker: Worker, message: Message | None) -> Step | None:
        """One step of a worker.

        Raises:
            Exception: what it raised, with a note.
            TypeError: it gave no step.
        """
        try:
            step = worker(message)
        except BaseException as error:
            what = "its own work" if message is None else f"{message.kind!r}"
            error.add_note(f"in step {self._steps[name]} of {name}, at {what}")
            raise
        if isinstance(step, Step):
            return step
        if step is None and message is None:
            return None
        raise TypeError(f"{name} gave {step!r} for {message!r}; give a Step.")

    def ended(
        self, name: str, message: Message | None, begin: float, end: float, step: Step
    ) -> Event:
        """The event of a step that has ended. Log it, then deliver its messages."""
        event = Event(
            worker=name,
            step=self._steps[name],
            what=step.what,
            begin=begin,
            end=end,
            message=None if message is None else (message.sender, message.number),
            amounts=dict(step.amounts),
            requests=tuple(step.requests),
            version=step.version,
            notes=step.notes,
        )
        self._steps[name] += 1
        self._latest[name] = event
        return event

    def stalled(self, now: float) -> RuntimeError:
        """The error of a run in which everybody waits."""
        told = []
        for name, inbox in self.inboxes.items():
            latest = self._latest.get(name)
            since = "did nothing yet"
            if latest is not None:
                since = f"{latest.what!r} ended {now - latest.end:.3g} s ago"
                if latest.notes:
                    since += f" with {dict(latest.notes)}"
            told.append(f"{name} waits for {inbox.awaits} ({since})")
        return RuntimeError(
            f"the run is stalled after {now:.6g} s: no message is under way and nobody "
            f"has work of its own. {first_few(told)}."
        )
