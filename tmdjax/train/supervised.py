"""The supervised loop: a jitted step called over a data iterator, resumable."""

import functools
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from tmdjax.core.checks import check_count
from tmdjax.train.checkpoint import Checkpoints
from tmdjax.train.iteration import Interrupted


@runtime_checkable
class DataIterator(Protocol):
    """Endless batches whose position can be saved."""

    def __next__(self) -> Any:
        """The next batch, a pytree of [batch, ...] arrays."""
        ...

    def get_state(self) -> dict[str, Any]:
        """The position, JSON-able."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position."""
        ...


class NoData:
    """A :class:`DataIterator` for steps that make their own data: batches are None."""

    def __next__(self) -> None:
        """Nothing, without end."""

    def get_state(self) -> dict[str, Any]:
        """There is no position."""
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        """There is no position."""


class NonFiniteError(RuntimeError):
    """Updates kept being non-finite; the last good checkpoint is kept."""


class FitResult(NamedTuple):
    """Final state, and whether all steps were done (False: paused in between)."""

    state: Any
    finished: bool


def fit(
    state: Any,
    step_fn: Callable[..., tuple[Any, dict[str, Any]]],
    data: DataIterator,
    *,
    key: Any,
    num_steps: int,
    checkpoints: Checkpoints | None = None,
    place: Callable[[Any], Any] | None = None,
    log_every: int = 50,
    checkpoint_seconds: tuple[float, float] = (10.0, 900.0),
    on_metrics: Callable[[int, dict[str, float]], None] | None = None,
    on_resume: Callable[[int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    score: str | None = None,
    max_skipped: int = 20,
    diagnose: Callable[[Any, Any, Any], str] | None = None,
) -> FitResult:
    """Runs `step_fn` up to `num_steps`, going on from a checkpoint if there is one.

    The device is not waited for between logs, and a log happens every `log_every`
    steps; checkpoints, pauses and the non-finite check happen at logs alone, so a
    resumed run logs the same windows as one that was never interrupted.

    Args:
        state: initial :class:`~tmdjax.train.state.TrainState` (donated).
        step_fn: jitted ``(state, batch, key) -> (state, metrics)``, metrics a flat
            dict of scalars. Where the state has the fields 'skipped' and
            'skipped_in_a_row' of a :class:`~tmdjax.train.state.TrainState`, skipped
            updates are counted and looked at. An iteration that draws its own problems
            may be stopped within (:class:`~tmdjax.train.iteration.Interrupted`): its
            state is saved, metrics since the last log are not, and the run goes on
            from there.
        data: endless iterator with a position.
        key: typed key of the run; the step folds its number in.
        num_steps: steps in all, resumed ones included.
        checkpoints: where to save; None saves nothing.
        place: puts a batch on devices; None leaves it to jit.
        log_every: steps a window; metrics are means over the window, and 'skipped' is
            how many updates were skipped in it. Where some were, values that are not
            finite are left out of the means.
        checkpoint_seconds: shortest and longest time between saves; within it, saving
            takes about 1 % of the time.
        on_metrics: called with (step, metrics) at each log.
        on_resume: called with the step that a resumed run starts from (0 if none).
        should_stop: asked at each log; True saves and returns unfinished.
        score: metric whose lowest window marks the best checkpoint.
        max_skipped: so many consecutive non-finite updates stop the run.
        diagnose: ``(state, batch, key) -> str`` adds where the fault is; it receives
            the key that the step folded its number into.

    Returns:
        The state and whether it is finished.

    Raises:
        NonFiniteError: `max_skipped` consecutive updates were skipped.
        TypeError: data whose position cannot be saved, where checkpoints are asked for.
        ValueError: num_steps or log_every below 1; fewer num_steps than the checkpoint
            has done.
        CheckpointError: a save failed; earlier checkpoints are intact.
    """
    check_count("num_steps", num_steps)
    check_count("log_every", log_every)
    start = 0
    if checkpoints is not None:
        _check_saveable(data)
        restored = checkpoints.restore(like=state)
        if restored is not None:
            start, state = restored.step, restored.tree
            if start > num_steps:
                raise ValueError(
                    f"num_steps={num_steps}, but the checkpoint in "
                    f"{checkpoints.directory} is of step {start}. Give num_steps >= "
                    f"{start}, or another folder for a shorter run."
                )
            data.set_state(restored.extra["data"])
    if on_resume is not None:
        on_resume(start)
    window: list[dict[str, Any]] = []
    skipped = getattr(state, "skipped", None)
    before = None if skipped is None else int(skipped)
    saved_at, interval = time.monotonic(), checkpoint_seconds[0]
    for step in range(start + 1, num_steps + 1):
        batch = next(data)
        if place is not None:
            batch = place(batch)
        try:
            state, metrics = step_fn(state, batch, key)
        except Interrupted as stopped:
            if checkpoints is not None:
                extra = {"data": data.get_state()}
                checkpoints.save(step - 1, stopped.state, extra)
            return FitResult(stopped.state, False)
        window.append(metrics)
        if step % log_every and step != num_steps:
            continue
        means, before = _window_means(window, state, before)
        window.clear()
        where = functools.partial(_diagnosed, diagnose, state, batch, key, step)
        check_skipped(state, step, max_skipped, checkpoints, where)
        if on_metrics is not None:
            on_metrics(step, means)
        finished = step == num_steps
        stop = should_stop is not None and should_stop() and not finished
        if checkpoints is not None:
            began = time.monotonic()
            if finished or stop or began - saved_at >= interval:
                checkpoints.save(
                    step,
                    state,
                    {"data": data.get_state()},
                    score=None if score is None else means[score],
                )
                saved_at = time.monotonic()
                interval = float(np.clip(100 * (saved_at - began), *checkpoint_seconds))
        if stop:
            return FitResult(state, False)
    return FitResult(state, True)


def check_skipped(
    state: Any,
    step: int,
    max_skipped: int,
    checkpoints: Checkpoints | None,
    where: Callable[[], str] = lambda: "",
) -> None:
    """Stops a run of which too many updates in a row were skipped.

    Args:
        state: after an update; one without the field 'skipped_in_a_row' passes.
        step: its number.
        max_skipped: so many are too many.
        checkpoints: of the run, or None.
        where: a sentence on where the fault is, after a space.

    Raises:
        NonFiniteError: there were; names the last good checkpoint.
    """
    in_a_row = int(getattr(state, "skipped_in_a_row", 0))
    if in_a_row < max_skipped:
        return
    kept = checkpoints.steps() if checkpoints is not None else []
    raise NonFiniteError(
        f"{in_a_row} consecutive updates up to step {step} had a non-finite loss, "
        f"gradient or outcome and were skipped.{where()} Last good checkpoint: "
        f"{f'step {kept[-1]}' if kept else 'none'}."
    )


def _diagnosed(
    diagnose: Callable[[Any, Any, Any], str] | None,
    state: Any,
    batch: Any,
    key: Any,
    step: int,
) -> str:
    if diagnose is None:
        return ""
    return f" {diagnose(state, batch, jax.random.fold_in(key, step - 1))}."


def _check_saveable(data: Any) -> None:
    """Raises TypeError, before the first step, for data without a position to save."""
    lacks = [
        name
        for name in ("__next__", "get_state", "set_state")
        if not hasattr(data, name)
    ]
    if lacks:
        raise TypeError(
            f"data is of type {type(data).__name__}, which lacks {', '.join(lacks)}: a "
            f"checkpoint could not say where to go on. Give batches that have a "
            f"position (data.in_memory), or checkpoints=None."
        )
    try:
        json.dumps(data.get_state())
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"get_state() of {type(data).__name__} is not JSON-able ({error}); return "
            f"numbers, texts, lists and dicts of these, or set checkpoints=None."
        ) from error


def _window_means(
    window: list[dict[str, Any]], state: Any, before: int | None
) -> tuple[dict[str, float], int | None]:
    """Means over a window, and how many updates were skipped until its end.

    ``before`` is how many were until its start, None where the state does not count
    them. Where some were skipped in it, values that are not finite are left out of the
    means, which are NaN where nothing is left.
    """
    host = jax.device_get(window)
    columns = {name: np.array([float(m[name]) for m in host]) for name in host[0]}
    if before is None:
        return {name: float(column.mean()) for name, column in columns.items()}, None
    now = int(state.skipped)
    if now > before:
        columns = {k: v[np.isfinite(v)] for k, v in columns.items()}
    means = {k: float(v.mean()) if v.size else float("nan") for k, v in columns.items()}
    return means | {"skipped": float(now - before)}, now
