"""Workers whose process may die: the controller is told, and has them made anew.

    it dies in a step     'lost' (message, why)  -->  control
    it is made anew       'again'                <--  control

Between the two, what is sent to the worker is dropped. When the controller says
'again' it knows of the death: what it sent before is gone with the old worker, what it
sends after reaches the new one, and nothing is ever taken for the other.

A death is a step like any other, and stands in the log. A replay of that log
(``order=`` of an executor) has the worker die in the same step, whatever runs it.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping

from tmdjax.runtime.events import CONTROL, Event
from tmdjax.runtime.executors.messages import Message, Send, Step, Worker

_LOGGER = logging.getLogger(__name__)
AGAIN = "again"
"""The message by which the controller has a worker made anew. No worker sees it."""

LOST = "lost"
"""The message by which the controller hears that a worker died."""

DIED = "died"
"""What is done in the step in which a worker dies."""


class WorkerDiedError(Exception):
    """What a worker raises, or what makes it, where the process behind it died.

    It costs what that worker held, not the run.
    """


def survivable(
    workers: Mapping[str, Callable[[], Worker]],
    order: Iterable[Event],
    restarts: int,
) -> dict[str, Callable[[], Worker]]:
    """What makes workers whose deaths the controller is told of, but for itself.

    Args:
        workers: what makes each, by name.
        order: of a run that is replayed; whoever died there dies in the same step.
        restarts: how often one worker may die, >= 0, those deaths left out.
    """
    deaths: dict[str, set[int]] = {name: set() for name in workers}
    for event in order:
        if event.what == DIED and event.worker in deaths:
            deaths[event.worker].add(event.step)

    def maker(name: str, make: Callable[[], Worker]) -> Callable[[], Worker]:
        if name == CONTROL:
            return make
        return lambda: _Survivable(name, make, deaths[name], restarts)

    return {name: maker(name, make) for name, make in workers.items()}


class _Survivable:
    """A worker that is dropped when it dies, and made anew when it is told to."""

    def __init__(
        self,
        name: str,
        make: Callable[[], Worker],
        deaths: Collection[int],
        restarts: int,
    ):
        self._name, self._make, self._restarts = name, make, restarts
        self._forced, self._died, self._steps = deaths, 0, 0
        self._worker: Worker | None = self._made()

    def __call__(self, message: Message | None) -> Step | None:
        step = self._step(message)
        self._steps += step is not None
        return step

    def _step(self, message: Message | None) -> Step | None:
        if self._worker is None:
            if message is None:
                return None
            if message.kind != AGAIN:
                return Step(what="drop")
            self._worker = self._made()
            return Step(what="restart")
        try:
            if self._steps in self._forced:
                return self._dead(message, "as in the run that is replayed")
            return self._worker(message)
        except WorkerDiedError as error:
            self._count(error)
            return self._dead(message, str(error))

    def _dead(self, message: Message | None, why: str) -> Step:
        self._worker = None
        sends = [Send(CONTROL, LOST, (message, why))]
        return Step(what=DIED, sends=sends, notes={"error": why})

    def _made(self) -> Worker:
        """A new worker; one that dies while it is made has held nothing."""
        while True:
            try:
                return self._make()
            except WorkerDiedError as error:
                self._count(error)

    def _count(self, error: WorkerDiedError) -> None:
        """Notes a death.

        Raises:
            RuntimeError: it is one too many.
        """
        self._died += 1
        if self._died > self._restarts:
            raise RuntimeError(
                f"{self._name} died {self._died} times, more often than "
                f"restarts={self._restarts} allows, at last so: {error}. Mend what "
                f"kills it (memory is the usual cause), or raise restarts."
            ) from error
        _LOGGER.warning(
            "%s died (%s); that is %d of restarts=%d",
            self._name,
            error,
            self._died,
            self._restarts,
        )
