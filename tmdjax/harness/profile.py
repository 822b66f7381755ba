"""A trace of a few training steps, for TensorBoard's or Perfetto's viewer."""

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

SKIPPED = 2
"""Steps before the trace: the first compiles, the second may still allocate."""


class ProfiledStep:
    """A step function of which some calls are traced; a context manager.

    The trace begins after ``SKIPPED`` calls, once the device has finished them, and
    ends once it has finished ``steps`` more (or the block is left). With 0 steps it is
    the function itself.

    Args:
        step_fn: ``(state, batch, key) -> (state, metrics)``.
        folder: where the trace goes, ``plugins/profile/...`` below it.
        steps: to trace.
    """

    def __init__(
        self,
        step_fn: Callable[..., Any],
        folder: str | os.PathLike[str],
        steps: int,
    ):
        self._step_fn, self._folder, self._steps = step_fn, Path(folder), steps
        self._calls, self._tracing = 0, False

    def __call__(self, state: Any, batch: Any, key: Any) -> Any:
        """One step."""
        if self._calls == SKIPPED and self._steps:
            jax.block_until_ready(state)
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        self._calls += 1
        if not self._tracing:
            return self._step_fn(state, batch, key)
        with jax.profiler.StepTraceAnnotation("train", step_num=self._calls):
            found = self._step_fn(state, batch, key)
        if self._calls == SKIPPED + self._steps:
            jax.block_until_ready(found)
            self._stop()
        return found

    def _stop(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()

    def __enter__(self) -> "ProfiledStep":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()
