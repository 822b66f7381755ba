"""Workers on a virtual clock: every step takes what costs say, whoever computes it."""

import dataclasses
import heapq
from collections.abc import Callable, Iterable, Mapping

from tmdjax.core.checks import check_count
from tmdjax.runtime.events import CONTROL, Event
from tmdjax.runtime.executors.costs import Costs
from tmdjax.runtime.executors.deaths import survivable
from tmdjax.runtime.executors.messages import Log, Message, Post, Step, Worker


@dataclasses.dataclass(frozen=True)
class Simulated:
    """An :class:`tmdjax.runtime.executors.Executor` that is deterministic.

    Workers run side by side on the clock of the costs, and one after the other in this
    process. What happens at the same time happens in the order in which it was
    scheduled: two runs of the same workers have the same events.

    Attributes:
        costs: seconds of each step.
        restarts: how often a worker may die (:exc:`WorkerDiedError`), >= 0.
    """

    costs: Costs
    restarts: int = 3

    def __post_init__(self) -> None:
        check_count("restarts", self.restarts, 0)

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
        post = Post(list(workers), order)
        makers = survivable(workers, order, self.restarts)
        made = {name: make() for name, make in makers.items()}
        # what has begun: (end, number, worker, message, begin, step)
        under_way: list[tuple[float, int, str, Message | None, float, Step]] = []
        busy: set[str] = set()
        now, begun, over = 0.0, 0, False
        awake = list(made)  # those that may have something to do, in this order
        while True:
            if should_stop():
                post.stop()
                awake.append(CONTROL)
            for name in () if over else awake:
                inbox = post.inboxes[name]
                while name not in busy and inbox.is_ready:
                    message = inbox.take()
                    step = post.call(name, made[name], message)
                    if step is None:
                        inbox.rest()
                        continue
                    end = now + self.costs.seconds(step.what, step.amounts)
                    ends = (end, begun, name, message, now, step)
                    heapq.heappush(under_way, ends)
                    busy.add(name)
                    begun += 1
            if not under_way:
                if over:
                    return now
                raise post.stalled(now)
            end, _, name, message, begin, step = heapq.heappop(under_way)
            busy.discard(name)
            log(post.ended(name, message, begin, end, step))
            post.deliver(name, step.sends)
            awake = [name, *(send.to for send in step.sends)]
            # after the last step, those that have begun come to their end
            now, over = (now, True) if over else (end, step.last)
