"""Metrics on disk and progress on the screen."""

import csv
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tmdjax.core.files import write_atomically
from tmdjax.harness.config import from_plain, to_plain
from tmdjax.harness.report import format_value, text_table
from tmdjax.harness.writers import Writer

TIME_PREFIX = "time/"
"""Columns that hold timings start so; two equal runs may differ in them."""

INTERVAL = 10.0
"""Seconds between plain lines of progress."""

Row = dict[str, Any]

_TOLD_FIRST = ("loss", "reward_mean", "score", "accuracy")
"""Metrics that the line of progress shows before others."""


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """Rows of a metrics.jsonl; a torn last line (a killed writer) is left out.

    Raises:
        ValueError: a line before the last is not a row; names it.
    """
    return [from_plain(row) for row in _parse_lines(Path(path))]


def write_csv(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Writes rows as CSV, atomically.

    Columns are the union over rows in order of first appearance; floats carry 17
    significant digits, so they read back exactly; what a row lacks stays empty.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_csv_cell(row.get(name)) for name in columns])
    write_atomically(path, text.getvalue().encode())


class MetricsLog:
    """An append-only metrics.jsonl of flat rows ``{'step': int, name: value}``.

    A line is flushed when it is written, so a killed process loses at most the
    line under its pen, which the next opening repairs. NaN and infinities are
    stored as strings (JSON has none) and read back as floats.

    Args:
        path: the file; folders are made, an existing file is continued.
        writers: take every row too, and the rows that the file already has where they
            have nothing of it yet; they are closed with the log.

    Raises:
        ValueError: the file holds a broken line before its last.
    """

    def __init__(self, path: str | os.PathLike[str], *, writers: Sequence[Writer] = ()):
        self.path = Path(path)
        self._writers = tuple(writers)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        if _is_torn(self.path):
            self._rewrite(_parse_lines(self.path))
        self._file = self.path.open("ab")
        for writer in self._writers:
            for row in self.rows() if writer.new else ():
                writer.write(row["step"], {k: v for k, v in row.items() if k != "step"})

    def append(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one row and flushes it.

        Args:
            step: the training step.
            metrics: numbers by name.

        Raises:
            ConfigError: a value that JSON cannot hold; names the metric.
            ValueError: a metric called 'step'.
            OSError: the disk is full; names the file.
        """
        if "step" in metrics:
            raise ValueError("metric 'step' is the row's own; give it another name.")
        try:
            self._file.write(_line({"step": step, **metrics}))
            self._file.flush()
        except OSError as error:
            raise OSError(
                f"cannot write {self.path}: {error.strerror or error}. Free space or "
                f"mend permissions, then run the same command to go on."
            ) from error
        for writer in self._writers:
            writer.write(step, metrics)

    def truncate(self, step: int) -> None:
        """Drops the rows beyond a step, which a resumed run writes again."""
        self._file.close()
        self._rewrite(row for row in _parse_lines(self.path) if row["step"] <= step)
        self._file = self.path.open("ab")
        for writer in self._writers:
            writer.rewind(step)

    def rows(self) -> list[Row]:
        """All rows written so far."""
        return read_rows(self.path)

    def close(self, failed: bool = False) -> None:
        """Closes the files; appending ends here."""
        self._file.close()
        for writer in self._writers:
            writer.close(failed)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: Any, *exception: Any) -> None:
        self.close(failed=kind is not None)

    def _rewrite(self, rows: Iterable[Row]) -> None:
        write_atomically(self.path, b"".join(_line(row) for row in rows))


class Clock:
    """Seconds of training, pauses left out, and the rate since the last row."""

    def __init__(self) -> None:
        self.start(0.0, 0)

    def start(self, seconds: float, step: int) -> None:
        """Goes on from a step that was reached after some seconds."""
        self._began = time.monotonic() - seconds
        self._last = (seconds, step)

    def columns(self, step: int) -> dict[str, float]:
        """Columns of the row of a step: seconds so far, and steps a second."""
        seconds = time.monotonic() - self._began
        last_seconds, last_step = self._last
        self._last = (seconds, step)
        rate = (step - last_step) / max(seconds - last_seconds, 1e-9)
        return {
            f"{TIME_PREFIX}seconds": seconds,
            f"{TIME_PREFIX}steps_per_second": rate,
        }


class Progress:
    """What a stage is doing: a live line in a terminal, plain lines elsewhere.

    Plain lines come at the first update, then at most every ``INTERVAL`` seconds,
    and at the end; four metrics that are not timings are shown, first those that say
    how well it goes (loss, reward_mean, score, accuracy). The live line is as wide as
    the terminal at most. A table stands below it, in plain lines a row a line.

    Args:
        stage: name of the stage.
        total: number of steps, for the ETA.
        table: gives the rows of a table, such as ``rows`` of
            :class:`tmdjax.runtime.Activity`. It is called whenever something is shown:
            in a terminal by the thread of the display, elsewhere by who updates.
        console: a rich console; by default standard output.
        clock: seconds that only grow.

    Example:
        >>> with Progress("train", 2) as progress:  # doctest: +SKIP
        ...     for step in range(1, 3):
        ...         progress.update(step, {"loss": 0.5})
    """

    def __init__(
        self,
        stage: str,
        total: int,
        *,
        table: Callable[[], Sequence[Row]] = list,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stage = stage
        self._total = total
        self._rows = table
        self._console = console or Console()
        self._clock = clock
        self._step: int | None = None
        self._metrics: Mapping[str, Any] = {}
        self._origin = (0.0, 0)
        self._printed: int | None = None
        self._due = -math.inf
        self._live: Live | None = None

    def __enter__(self) -> "Progress":
        if self._console.is_interactive:
            self._live = Live(
                get_renderable=self._shown, console=self._console, refresh_per_second=4
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._step is not None and self._printed != self._step:
            self._print(self._clock())

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Notes the step reached, and the latest metrics."""
        now = self._clock()
        if self._step is None:
            self._origin = (now, step)
        self._step, self._metrics = step, metrics
        if self._live is None and now >= self._due:
            self._print(now)

    def say(self, text: str) -> None:
        """Prints a plain line, above the live display where there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _print(self, now: float) -> None:
        self._due = now + INTERVAL
        self._printed = self._step
        self.say("  ".join([f"[{self._stage}]", *self._parts(now)]))
        for row in self._rows():
            told = [f"{k} {format_value(v)}" for k, v in row.items() if v is not None]
            self.say("  ".join([f"[{self._stage}]", *told]))

    def _shown(self) -> Group:
        """The line of progress, and below it the table where it has rows."""
        rows = self._rows()
        if not rows:
            return Group(self._progress_line())
        table = Text(text_table(rows), no_wrap=True, overflow="crop")
        return Group(self._progress_line(), table)

    def _progress_line(self) -> Table:
        """One line of the terminal, the last metrics left out where it is narrow."""
        width = self._console.width
        size = max(8, min(24, width // 8))
        parts = [self._stage, "=" * size, *self._parts(self._clock())]
        while len(parts) > 3 and len(" ".join(parts)) > width:
            parts.pop()
        table = Table.grid(padding=(0, 1))
        for _ in parts:
            table.add_column(no_wrap=True)
        bar = ProgressBar(total=self._total, completed=self._step or 0, width=size)
        table.add_row(parts[0], bar, *parts[2:])
        return table

    def _parts(self, now: float) -> list[str]:
        if self._step is None:
            return ["starting"]
        parts = [f"step {self._step}/{self._total}"]
        start, first = self._origin
        done = self._step - first
        if done > 0 and now > start:
            rate = done / (now - start)
            left = max(self._total - self._step, 0) / rate
            parts.append(f"{format_value(rate)} steps/s")
            parts.append(f"ETA {format_duration(left)}")
        keys = [k for k in self._metrics if not k.startswith(TIME_PREFIX)]
        keys = sorted(keys, key=lambda k: k not in _TOLD_FIRST)[:4]
        return parts + [f"{key} {format_value(self._metrics[key])}" for key in keys]


def format_duration(seconds: float) -> str:
    """Seconds as '12s', '3m20s' or '1h02m'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _line(row: Row) -> bytes:
    return json.dumps(to_plain(row), allow_nan=False).encode() + b"\n"


def _parse_lines(path: Path) -> list[Row]:
    """Rows as stored (non-finite values as strings), without a torn last line."""
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
        elif number < len(lines):
            raise ValueError(
                f"{path} line {number} is not a metrics row: {line[:80]!r}; "
                f"remove that line."
            )
    return rows


def _csv_cell(value: Any) -> Any:
    return format(value, ".17g") if isinstance(value, float) else value


def _is_torn(path: Path) -> bool:
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"
