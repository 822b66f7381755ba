"""A run whose trainer waits too long for a batch ends with what is known of it."""

from collections.abc import Mapping
from typing import Any

from tmdjax.core.checks import check_range
from tmdjax.runtime.events import CONTROL, Event


class Watchdog:
    """A log that ends a run in which no batch comes; it keeps no events.

    An executor ends a run in which nobody has anything to do, or in which one step does
    not end. This one ends a run in which generators write on and on, but a batch is
    never full. It goes by the clock of the executor, and by the controller's notes.
    """

    def __init__(self, longest_wait: float):
        """Of a run that begins now.

        Args:
            longest_wait: seconds that the trainer may wait for a batch, > 0. The first
                wait begins with the run, so that compiling counts.
        """
        check_range("longest_wait", longest_wait, 0, open_low=True)
        self._longest = longest_wait
        self._since: float | None = 0.0  # None while the trainer has a batch
        self._notes: Mapping[str, Any] = {}
        self._handed_out: dict[int, tuple[float, str]] = {}  # first when, last to whom

    def __call__(self, event: Event) -> None:
        """Notes an event.

        Raises:
            RuntimeError: the trainer has waited for longer than it may; says for what,
                how many groups were asked for, run and are complete, and how old the
                oldest request is.
        """
        if event.worker == CONTROL:
            self._notes = event.notes
            if event.what == "batch":
                self._since, oldest = None, event.notes.get("oldest")
                known = self._handed_out.items()  # those before the oldest are over
                self._handed_out = {n: x for n, x in known if n >= (oldest or 0)}
        elif event.what == "learn":
            self._since = event.end
        elif event.what == "write":
            for number in event.requests:
                since, _ = self._handed_out.get(number, (event.end, ""))
                self._handed_out[number] = since, event.worker
        reason = self._notes.get("waits", {}).get("train")
        if self._since is None or reason == "end":
            return
        if event.end - self._since > self._longest:
            raise RuntimeError(
                f"the trainer has waited {event.end - self._since:.6g} s for a batch, "
                f"longer than longest_wait={self._longest:g}; the controller says "
                f"{reason!r}. Groups: {self._groups()}; responses under way: "
                f"{self._notes.get('responses', 0)}; {self._oldest(event.end)}. Look "
                f"at what the oldest waits for, lower max_new_tokens or batch, or "
                f"raise longest_wait."
            )

    def _groups(self) -> str:
        counts = dict(self._notes.get("groups", {}))
        return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"

    def _oldest(self, now: float) -> str:
        number = self._notes.get("oldest")
        if number is None:
            return "no request is under way"
        if number not in self._handed_out:
            return f"the oldest request, {number}, was handed to nobody yet"
        since, worker = self._handed_out[number]
        return (
            f"the oldest request, {number}, was first handed out {now - since:.6g} s "
            f"ago and is at {worker}"
        )
