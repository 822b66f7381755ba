"""Workers in threads of this process, a thread each."""

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping

from tmdjax.core.checks import check_count, check_range
from tmdjax.runtime.events import Event
from tmdjax.runtime.executors.deaths import survivable
from tmdjax.runtime.executors.messages import Log, Post, Worker

_LOGGER = logging.getLogger(__name__)
_LOOK_EVERY = 0.05  # seconds


@dataclasses.dataclass(frozen=True)
class Threads:
    """An :class:`tmdjax.runtime.executors.Executor` on the clock of the machine.

    JAX releases the interpreter while it computes: workers on devices of their own
    compute at the same time; on one device their programs take turns.

    Attributes:
        longest_step: seconds that a step may take, and then the log of it, > 0;
            compiling counts. A run in which one takes longer ends with an error that
            names the worker.
        grace: seconds that workers have, once a run is over, to end the step that they
            are in, >= 0. Those that do not are left behind, with a warning, and what
            they do then is not logged.
        restarts: how often a worker may die (:exc:`WorkerDiedError`), >= 0.
    """

    longest_step: float = 3600.0
    grace: float = 60.0
    restarts: int = 3

    def __post_init__(self) -> None:
        check_count("restarts", self.restarts, 0)
        check_range("longest_step", self.longest_step, 0, open_low=True)
        check_range("grace", self.grace, 0)

    def run(
        self,
        workers: Mapping[str, Callable[[], Worker]],
        log: Log,
        *,
        order: Iterable[Event] = (),
        should_stop: Callable[[], bool] = lambda: False,
    ) -> float:
        """Runs to the end, see :meth:`tmdjax.runtime.executors.Executor.run`."""
        order = list(order)
        run = _Run(survivable(workers, order, self.restarts), log, order)
        threads = [
            threading.Thread(target=run.work, args=(name,), name=name, daemon=True)
            for name in workers
        ]
        for thread in threads:
            thread.start()
        try:
            run.watch(should_stop, self.longest_step)
        finally:
            run.leave()
            deadline = time.monotonic() + self.grace
            for thread in threads:
                if thread.name != run.hangs:
                    thread.join(max(0.0, deadline - time.monotonic()))
            late = [t.name for t in threads if t.is_alive() and t.name != run.hangs]
            if late:
                _LOGGER.warning(
                    "the run is over, but %s did not end the step they are in within "
                    "grace=%g s; they are left behind",
                    ", ".join(late),
                    self.grace,
                )
            # what is being logged is logged whole, unless a log may never return
            with contextlib.nullcontext() if run.hangs else run.logging, run.changed:
                run.is_left = True
        if run.error is not None:
            raise run.error
        return run.seconds


class _Run:
    """What the threads of a run share; ``changed`` guards all of it.

    A step ends, is logged and has its messages delivered while its thread holds
    ``logging``, which is taken before ``changed``: the log is called with one step at a
    time, in the order in which they ended, and with none before what it answers.
    """

    def __init__(
        self,
        workers: Mapping[str, Callable[[], Worker]],
        log: Log,
        order: Iterable[Event],
    ):
        self.logging, self.changed = threading.Lock(), threading.Condition()
        self.post = Post(list(workers), order)
        self.makers, self.log = workers, log
        self.start = time.monotonic()
        self.waiting: set[str] = set()
        self.busy: dict[str, float] = {}  # since when
        self.over = self.is_left = False
        self.seconds = 0.0
        self.logs = self.hangs = ""  # names of workers
        self.error: BaseException | None = None

    def now(self) -> float:
        return time.monotonic() - self.start

    def work(self, name: str) -> None:
        """The thread of a worker."""
        try:
            with self.changed:
                self.busy[name] = self.now()
            worker = self.makers[name]()
            with self.changed:
                del self.busy[name]
            while self.step(name, worker):
                pass
        except BaseException as error:  # it is raised where the run was started
            with self.changed:
                self.busy.pop(name, None)
                self.fail(error)

    def step(self, name: str, worker: Worker) -> bool:
        """Waits for a step to do and does it; False once the run is over."""
        inbox = self.post.inboxes[name]
        with self.changed:
            self.waiting.add(name)
            while not self.over and not inbox.is_ready:
                if len(self.waiting) == len(self.makers) and not any(
                    other.is_ready for other in self.post.inboxes.values()
                ):
                    self.fail(self.post.stalled(self.now()))
                    break
                self.changed.wait()
            self.waiting.discard(name)
            if self.over:
                return False
            message = inbox.take()
            begin = self.busy[name] = self.now()
        step = self.post.call(name, worker, message)
        with self.changed:
            del self.busy[name]
            if step is None:
                inbox.rest()
                return True
        with self.logging:
            with self.changed:
                if self.is_left:  # the log may be closed by now
                    return False
                self.logs = name
                end = self.busy[name] = self.now()
            self.log(self.post.ended(name, message, begin, end, step))
            with self.changed:
                self.logs = ""
                del self.busy[name]
                self.post.deliver(name, step.sends)
                if step.last and not self.over:
                    self.over, self.seconds = True, end
                self.changed.notify_all()
        return True

    def fail(self, error: BaseException) -> None:
        """Ends the run by the first error."""
        if self.error is None and not self.over:
            self.error = error
        self.over = True
        self.changed.notify_all()

    def leave(self) -> None:
        """Threads end after the step that they are in."""
        with self.changed:
            self.over = True
            self.changed.notify_all()

    def watch(self, should_stop: Callable[[], bool], longest_step: float) -> None:
        """Until the run is over; ends it where a step takes too long."""
        while True:
            stop = should_stop()
            with self.changed:
                if self.over:
                    return
                if stop:
                    self.post.stop()
                    self.changed.notify_all()
                for name, since in self.busy.items():
                    if self.now() - since > longest_step:
                        self.hangs = name
                        where = "the log of a step" if name == self.logs else "one step"
                        self.fail(
                            RuntimeError(
                                f"{name} has been in {where} for more than "
                                f"longest_step={longest_step:g} s. Mend what it waits "
                                f"for, or raise longest_step."
                            )
                        )
                        return
                self.changed.wait(_LOOK_EVERY)
