"""What the workers of a run are doing, counted while it runs."""

from collections.abc import Mapping
from typing import Any

from tmdjax.runtime.events import CONTROL, Event, role_of


class Activity:
    """A log that keeps counts alone, for a table of a run that is under way.

    It costs a run a few additions an event, and its memory is that of the workers'
    names. Give it beside the log on disk, and show its rows
    (:class:`tmdjax.harness.logs.Progress`)::

        activity = runtime.Activity()
        with Progress("areal", schedule.updates, table=activity.rows) as progress:
            runtime.fit_asynchronously(
                ..., logs=[activity], on_metrics=progress.update
            )
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._busy: dict[str, float] = {}  # seconds by worker
        self._tokens: dict[str, float] = {}  # by role
        self._versions: dict[str, int] = {}  # by role, of the latest step
        self._notes: Mapping[str, Any] = {}  # of the controller's latest step

    def __call__(self, event: Event) -> None:
        """Counts an event."""
        role = event.role
        self._now = max(self._now, event.end)
        spent = event.end - event.begin
        self._busy[event.worker] = self._busy.get(event.worker, 0.0) + spent
        amounts = event.amounts
        if tokens := amounts.get("drawn", amounts.get("tokens", 0)):
            self._tokens[role] = self._tokens.get(role, 0) + tokens
        if event.version is not None:
            self._versions[role] = event.version
        if event.worker == CONTROL:
            self._notes = event.notes

    def rows(self) -> list[dict[str, Any]]:
        """A row a role, of what has happened so far; may be called from any thread.

        Returns:
            'role'; 'workers' that have done a step; 'busy %', their share of the time
            since the run began that went into steps that have ended;
            'waits for', the controller's reason, or None; 'version' of the weights in
            the latest step; 'tokens/s', written, judged or trained on (with prompts)
            since the run began, on the clock of the executor; 'groups', of the
            controller, such as '3 open, 2 complete'.
        """
        busy, tokens, notes = dict(self._busy), dict(self._tokens), self._notes
        groups = notes.get("groups", {})
        counts = [f"{groups[n]} {n}" for n in ("open", "complete") if n in groups]
        found: dict[str, list[float]] = {}
        for worker, seconds in busy.items():
            found.setdefault(role_of(worker), []).append(seconds)
        now = self._now or 1.0
        return [
            {
                "role": role,
                "workers": len(spent),
                "busy %": round(100 * sum(spent) / (len(spent) * now)),
                "waits for": notes.get("waits", {}).get(role),
                "version": self._versions.get(role),
                "tokens/s": tokens[role] / now if role in tokens else None,
                "groups": ", ".join(counts) if role == CONTROL and counts else None,
            }
            for role, spent in found.items()
        ]
