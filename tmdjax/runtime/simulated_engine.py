"""An engine without a model, to study schedules by lengths and costs alone."""

import collections
from collections.abc import Callable, Iterable

from tmdjax.core.checks import check_count
from tmdjax.core.types import Params
from tmdjax.rl import TokenRecord


class SimulatedEngine:
    """A :class:`tmdjax.runtime.roles.WritingEngine` whose texts have given lengths.

    Like :class:`tmdjax.generation.Engine` it fills free slots, writes in chunks of
    ``steps`` tokens, and lets a text end in the middle of one; tokens are 0, and their
    log-probs too.

    Attributes:
        version: of the weights in use, which write nothing but this number.
        counts: 'chunks', 'slot_steps' (steps of all slots, idle ones too), 'drawn' and
            'prefilled' (tokens), as the engine counts them, but that responses to one
            prompt do not share its prefill.
    """

    def __init__(
        self,
        length_of: Callable[[int], int],
        *,
        slots: int,
        steps: int,
        version: int = 0,
    ):
        """Without texts.

        Args:
            length_of: tokens, >= 1, of the response to a request, by its number.
            slots: texts written side by side, >= 1.
            steps: tokens of each a chunk, >= 1.
            version: of the weights at first.
        """
        self._length_of, self.version = length_of, version
        self._slots = check_count("slots", slots)
        self._steps = check_count("steps", steps)
        self._active: list[TokenRecord] = []
        self._queue: collections.deque[TokenRecord] = collections.deque()
        self._ends: dict[int, tuple[int, str]] = {}
        self.counts: collections.Counter[str] = collections.Counter()

    @property
    def active(self) -> int:
        """Texts in slots."""
        return len(self._active)

    @property
    def queued(self) -> int:
        """Texts that wait for a slot."""
        return len(self._queue)

    def resume(self, record: TokenRecord, *, max_new_tokens: int) -> None:
        """Goes on with an aborted record, or begins one without tokens.

        Raises:
            ValueError: it is not aborted, under way already, or as long as it will be.
        """
        if record.number in self._ends:
            raise ValueError(
                f"request {record.number} is already under way; numbers are unique."
            )
        if record.status != "aborted":
            raise ValueError(
                f"record {record.number} is {record.status!r}; only an aborted one can "
                f"be resumed."
            )
        length = check_count("a length", self._length_of(record.number))
        ends = "stop" if length <= max_new_tokens else "length"
        length = min(length, max_new_tokens)
        if len(record) >= length:
            raise ValueError(
                f"record {record.number} has {len(record)} tokens, of {length}; "
                f"only a shorter one can be resumed."
            )
        self._ends[record.number] = length, ends
        record.status, record.segments = "running", record.segments + 1
        self._queue.append(record)

    def advance(self) -> list[TokenRecord]:
        """Fills free slots, writes a chunk, and returns the texts that ended in it."""
        while self._queue and self.active < self._slots:
            record = self._queue.popleft()
            self._active.append(record)
            self._prefill(record)
        if not self._active:
            return []
        self.counts["chunks"] += 1
        self.counts["slot_steps"] += self._slots * self._steps
        ended = []
        for record in self._active:
            length, ends = self._ends[record.number]
            new = min(self._steps, length - len(record))
            record.extend([0] * new, [0.0] * new, self.version)
            self.counts["drawn"] += new
            if len(record) == length:
                record.status = ends
                ended.append(record)
                del self._ends[record.number]
        self._active = [record for record in self._active if not record.finished]
        return ended

    def abort(self, numbers: Iterable[int] | None = None) -> list[TokenRecord]:
        """Stops some texts, or all; their records in the order of their numbers."""
        wanted = set(self._ends if numbers is None else numbers)
        there = [*self._active, *self._queue]
        found = [record for record in there if record.number in wanted]
        self._active = [r for r in self._active if r.number not in wanted]
        self._queue = collections.deque(
            r for r in self._queue if r.number not in wanted
        )
        for record in found:
            record.status = "aborted"
            del self._ends[record.number]
        return sorted(found, key=lambda record: record.number)

    def update_weights(
        self, params: Params, version: int, *, recompute: bool = True
    ) -> None:
        """Goes on with another version; ``recompute`` reads all texts again."""
        del params
        self.version = version
        for record in self._active if recompute else ():
            self._prefill(record)

    def _prefill(self, record: TokenRecord) -> None:
        self.counts["prefilled"] += len(record.prompt) + len(record) - 1
