import csv
import io
import json
import math
import sys
import time
import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tmdjax.harness.logs import (
    MetricsLog,
    Progress,
    format_duration,
    read_rows,
    without_timings,
    write_csv,
)
from tmdjax.harness.writers import open_writers

ROWS = [
    (1, {"loss": 0.1, "time/step": 2.0}),
    (2, {"loss": math.nan, "note": 'a "b"\n}'}),
    (5, {"loss": -math.inf, "count": 3}),
]


def written(path):
    with MetricsLog(path) as log:
        for step, metrics in ROWS:
            log.append(step, metrics)
    return path


def same(rows, others):
    """Equality under which NaN equals NaN."""
    return repr(rows) == repr(others)


EXPECTED = [{"step": step, **metrics} for step, metrics in ROWS]


def test_rows_come_back_and_every_line_is_strict_json(tmp_path):
    path = written(tmp_path / "deep" / "metrics.jsonl")
    assert same(read_rows(path), EXPECTED)

    def refuse(constant):
        raise AssertionError(constant)

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_a_row_is_on_disk_when_append_returns(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for n, (step, metrics) in enumerate(ROWS, start=1):
        log.append(step, metrics)
        assert same(read_rows(path), EXPECTED[:n])
        assert same(log.rows(), EXPECTED[:n])
    log.close()


def test_appending_goes_on_where_a_file_ends(tmp_path):
    path = written(tmp_path / "metrics.jsonl")
    with MetricsLog(path) as log:
        log.append(6, {"loss": 0.0})
    assert same(read_rows(path), [*EXPECTED, {"step": 6, "loss": 0.0}])


def test_array_scalars_are_stored_exactly(tmp_path, as_shipped):
    path = tmp_path / "metrics.jsonl"
    step: Any = np.int64(3)
    with MetricsLog(path) as log:
        log.append(
            step,
            {
                "f32": jnp.float32(0.1),
                "bf16": jnp.bfloat16(0.1),
                "i": jnp.int32(7),
                "np": np.float32("nan"),
            },
        )
    (row,) = read_rows(path)
    assert row["step"] == 3
    assert np.float32(row["f32"]) == np.float32(0.1)
    assert row["bf16"] == float(jnp.bfloat16(0.1))
    assert row["i"] == 7
    assert math.isnan(row["np"])


@pytest.mark.parametrize(
    "value, what",
    [
        (np.zeros(3), "metric 'x' is of shape (3,); log one number"),
        ([1.0], "metric 'x' is list"),
        (None, "metric 'x' is NoneType"),
        (True, "metric 'x' is bool"),
    ],
)
def test_other_values_are_refused_by_name_and_leave_no_trace(tmp_path, value, what):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        with pytest.raises(TypeError) as caught:
            log.append(1, {"loss": 0.0, "x": value})
        assert what in str(caught.value)
        with pytest.raises(ValueError, match="'step' is the row's own"):
            log.append(1, {"step": 2})
        assert log.rows() == []


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_line_torn_at_any_byte_is_repaired(tmp_path_factory, data):
    path = written(tmp_path_factory.mktemp("torn") / "metrics.jsonl")
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    kept = sum(end <= cut for end in ends)  # a row that lacks its newline alone counts
    assert same(read_rows(path), EXPECTED[:kept])
    with MetricsLog(path) as log:
        log.append(9, {"loss": 1.0})
        assert same(log.rows(), [*EXPECTED[:kept], {"step": 9, "loss": 1.0}])
        log.truncate(8)
        assert same(log.rows(), EXPECTED[:kept])


def test_truncate_drops_later_rows_and_appending_goes_on(tmp_path):
    path = written(tmp_path / "metrics.jsonl")
    before = path.read_bytes()
    with MetricsLog(path) as log:
        log.truncate(5)
        assert path.read_bytes() == before
        log.truncate(2)
        log.append(3, {"loss": 0.5})
        assert same(log.rows(), [*EXPECTED[:2], {"step": 3, "loss": 0.5}])
        log.truncate(-1)
        assert log.rows() == []


@pytest.mark.parametrize("broken", ["{", "3", '{"loss": 1}', ""])
def test_a_broken_line_within_is_named(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{broken}\n{{"step": 2}}\n')
    with pytest.raises(ValueError) as caught:
        read_rows(path)
    assert "line 2 is not a metrics row" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_timings_are_set_apart():
    rows = without_timings([{"step": 1, "time/step": 2.0, "times": 1.0}])
    assert rows == [{"step": 1, "times": 1.0}]


@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.floats(), min_size=1, max_size=5))
def test_csv_values_round_trip(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("csv") / "metrics.csv"
    write_csv([{"step": i, "loss": v} for i, v in enumerate(values)], path)
    with path.open(newline="") as file:
        back = list(csv.DictReader(file))
    assert [int(row["step"]) for row in back] == list(range(len(values)))
    assert repr([float(row["loss"]) for row in back]) == repr(values)


def test_csv_columns_are_the_union_in_order_of_appearance(tmp_path):
    path = tmp_path / "metrics.csv"
    write_csv([{"step": 1, "b": 0.5}, {"step": 2, "a": "x,y", "b": 3}], path)
    assert path.read_text() == 'step,b,a\n1,0.5,\n2,3,"x,y"\n'


def test_tensorboard_absent_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(
        ImportError, match=r"needs tensorboardX: pip install 'tmdjax\[logging\]'"
    ):
        open_writers(["tensorboard"], tmp_path, "run", {})


def test_tensorboard_receives_rows_and_purges_what_is_truncated(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, **options):
            calls.append(("open", options))

        def add_scalar(self, *arguments):
            calls.append(("scalar", *arguments))

        def add_text(self, *arguments):
            calls.append(("text", *arguments))

        def close(self):
            calls.append(("close",))

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    writers = open_writers(["tensorboard"], tmp_path, "run", {})
    with MetricsLog(tmp_path / "metrics.jsonl", writers=writers) as log:
        log.append(4, {"loss": 0.5, "note": "x"})
        log.truncate(3)
    folder = str(tmp_path)
    assert calls == [
        ("open", {"logdir": folder}),
        ("scalar", "loss", 0.5, 4),
        ("text", "note", "x", 4),
        ("close",),
        ("open", {"logdir": folder, "purge_step": 4}),
        ("close",),
    ]


def test_wandb_goes_on_with_the_run_of_the_folder(tmp_path, monkeypatch):
    calls = []

    class Started:
        def __init__(self, **options):
            calls.append(("init", options))

        def define_metric(self, *arguments, **options):
            calls.append(("define", *arguments, options))

        def log(self, values):
            calls.append(("log", values))

        def finish(self, exit_code):
            calls.append(("finish", exit_code))

    module = types.SimpleNamespace(init=Started)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    path = tmp_path / "a" / "metrics.jsonl"
    for step in (4, 5):  # a run that was stopped, and its going on
        writers = open_writers(["wandb"], path.parent, "train-1", {"lr": 0.1})
        with MetricsLog(path, writers=writers) as log:
            log.truncate(4)
            log.append(step, {"loss": 0.5})
    open_writers(["wandb"], tmp_path / "b", "train-2", {})
    starts = [call[1] for call in calls if call[0] == "init"]
    first, again, other = (s["id"] for s in starts)
    assert first == again != other and starts[0]["config"] == {"lr": 0.1}
    assert {s["project"] for s in starts} == {"tmdjax"}
    assert [s["name"] for s in starts] == ["train-1", "train-1", "train-2"]
    assert {s["resume"] for s in starts} == {"allow"}
    assert [c[1] for c in calls if c[0] == "log"] == [
        {"step": 4, "loss": 0.5},
        {"step": 5, "loss": 0.5},
    ]
    assert ("define", "*", {"step_metric": "step"}) in calls
    assert [call[1] for call in calls if call[0] == "finish"] == [0, 0]
    with pytest.raises(ZeroDivisionError):
        with MetricsLog(path, writers=open_writers(["wandb"], path.parent, "x", {})):
            raise ZeroDivisionError
    assert calls[-1] == ("finish", 1)


def test_writers_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ImportError, match=r"--wandb needs wandb: pip install 'tmdjax\[logging\]'"
    ):
        open_writers(["wandb"], tmp_path, "run", {})
    with pytest.raises(ValueError, match="'tensorbord' is not one of.*Did you mean"):
        open_writers(["tensorbord"], tmp_path, "run", {})


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def plain(**options):
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, force_terminal=False, width=40)
    return Progress("train", console=console, clock=clock, **options), clock, out


def terminal(out):
    return Console(
        file=out,
        force_terminal=True,
        color_system=None,
        width=120,
        _environ={"TERM": "xterm"},
    )


def test_plain_lines_first_at_intervals_and_last():
    progress, clock, out = plain(total=100, interval=10)
    with progress:
        for step in range(1, 32):
            clock.now += 1
            progress.update(step, {"loss": 1 / step, "time/step": 1.0})
    lines = out.getvalue().splitlines()
    steps = [line.split()[2] for line in lines]
    assert steps == ["1/100", "11/100", "21/100", "31/100"]
    assert lines[0] == "[train]  step 1/100  loss 1"
    assert lines[1] == "[train]  step 11/100  1 steps/s  ETA 1m29s  loss 0.09091"


def test_the_last_line_comes_once_and_after_an_error_too():
    progress, _, out = plain()
    with progress:
        progress.update(1)
    assert out.getvalue() == "[train]  step 1\n"
    progress, _, out = plain()
    with pytest.raises(RuntimeError), progress:
        progress.update(1)
        progress.update(2)
        raise RuntimeError
    assert out.getvalue().splitlines() == ["[train]  step 1", "[train]  step 2"]
    progress, _, out = plain()
    with progress:
        pass
    assert out.getvalue() == ""


def test_rate_and_eta_of_a_resumed_stage_start_at_its_first_step():
    progress, clock, out = plain(total=1000, interval=0)
    with progress:
        progress.update(500)
        clock.now += 4
        progress.update(508)
    assert "2 steps/s  ETA 4m06s" in out.getvalue()


def test_chosen_metrics_are_shown_in_the_given_order():
    progress, _, out = plain(keys=("b", "gone", "time/x"))
    with progress:
        progress.update(1, {"a": 1.0, "time/x": 2.0, "b": 123456.789})
    assert out.getvalue() == "[train]  step 1  b 1.235e+05  time/x 2\n"


def test_text_is_printed_as_it_is_in_both_modes():
    text = "[bold]not markup[/bold] " + "x" * 60
    progress, _, out = plain()
    with progress:
        progress.say(text)
    assert out.getvalue() == text + "\n"
    out = io.StringIO()
    with Progress("train", 10, console=terminal(out)) as progress:
        progress.update(3, {"loss": 0.25})
        progress.say(text)
    assert text in out.getvalue()


def test_live_display_shows_stage_step_and_metrics():
    out, clock = io.StringIO(), Clock()
    with Progress("distil", 10, console=terminal(out), clock=clock) as progress:
        progress.update(1)
        clock.now += 2
        progress.update(5, {"loss": 0.25})
    for shown in ("distil", "step 5/10", "2 steps/s", "ETA 2s", "loss 0.25"):
        assert shown in out.getvalue()


class Pending:
    """A device array that is still being computed."""

    shape = ()
    ready = False
    deleted = False

    def is_ready(self):
        return self.ready

    def is_deleted(self):
        return self.deleted

    def item(self):
        assert self.ready and not self.deleted, "waited for the device"
        return 0.5


def test_a_metric_still_on_its_way_is_not_waited_for():
    progress, _, out = plain(interval=0)
    loss = Pending()
    with progress:
        progress.update(1, {"loss": loss})
        loss.ready = True
        progress.update(2, {"loss": loss})
        loss.deleted = True
        progress.update(3, {"loss": loss})
        progress.update(4, {"loss": jnp.float32(2).block_until_ready()})
    assert out.getvalue().splitlines() == [
        "[train]  step 1",
        "[train]  step 2  loss 0.5",
        "[train]  step 3",
        "[train]  step 4  loss 2",
    ]


def test_an_update_that_draws_nothing_is_cheap():
    console = Console(file=io.StringIO(), force_terminal=False)
    progress = Progress("train", 10**9, interval=1e9, console=console)
    metrics = {"loss": 1.0}
    progress.update(0, metrics)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        for step in range(2000):
            progress.update(step, metrics)
        best = min(best, (time.perf_counter() - start) / 2000)
    assert best < 20e-6


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (200, "3m20s"), (3720, "1h02m")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
