import contextlib
import csv
import io
import json
import math
import re
import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tmdjax.harness.logs import (
    MetricsLog,
    Progress,
    format_duration,
    read_rows,
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


def test_a_row_is_on_disk_when_append_returns(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    with MetricsLog(path) as log:
        for n, (step, metrics) in enumerate(ROWS, start=1):
            log.append(step, metrics)
            assert same(read_rows(path), EXPECTED[:n])
            assert same(log.rows(), EXPECTED[:n])

    def refuse(constant):
        raise AssertionError(constant)

    for line in path.read_text().splitlines():  # strict JSON
        json.loads(line, parse_constant=refuse)


def test_appending_goes_on_where_a_file_ends(tmp_path):
    path = written(tmp_path / "metrics.jsonl")
    with MetricsLog(path) as log:
        log.append(6, {"loss": 0.0})
    assert same(read_rows(path), [*EXPECTED, {"step": 6, "loss": 0.0}])


def test_rows_that_cannot_be_written_are_refused_and_leave_no_trace(tmp_path, refused):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        refused("'step' is the row's own", log.append, 1, {"step": 2})
        refused("x is of type object", log.append, 1, {"loss": 0.0, "x": object()})
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


def test_a_broken_line_within_is_named(tmp_path, refused):
    path = tmp_path / "metrics.jsonl"
    for broken in ("{", "3", '{"loss": 1}', ""):
        path.write_text(f'{{"step": 1}}\n{broken}\n{{"step": 2}}\n')
        refused(r"^.*line 2 is not a metrics row.*$", read_rows, path)


def test_what_is_absent_is_named(tmp_path, monkeypatch, refused):
    for name, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, package, None)
        words = rf"--{name} needs {package}: .*pip install 'tmdjax\[logging\]'"
        given = (open_writers, [name], tmp_path, "run", {})
        refused(words, *given, error=ImportError)
    words = "'tensorbord' is not one of.*Did you mean"
    refused(words, open_writers, ["tensorbord"], tmp_path, "run", {})


class Calls:
    """A class of a package that writes down what is called; all else is made up."""

    def __init__(self, **options):
        self.calls.append(("open", options))

    def __getattr__(self, name):
        def call(*arguments, **options):
            self.calls.append((name, *arguments, *([options] if options else [])))

        return call


@pytest.fixture
def package(monkeypatch):
    """Stands in for a module by a class; returns the list of calls."""

    def stand_in(module, name):
        double = type(name, (Calls,), {"calls": []})
        package = types.SimpleNamespace(**{name: double})
        monkeypatch.setitem(sys.modules, module, package)
        return double.calls

    return stand_in


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


def test_tensorboard_receives_rows_and_purges_what_is_truncated(tmp_path, package):
    calls = package("tensorboardX", "SummaryWriter")
    writers = open_writers(["tensorboard"], tmp_path, "run", {})
    with MetricsLog(tmp_path / "metrics.jsonl", writers=writers) as log:
        log.append(4, {"loss": 0.5})
        log.truncate(3)
    folder = str(tmp_path)
    assert calls == [
        ("open", {"logdir": folder}),
        ("add_scalar", "loss", 0.5, 4),
        ("close",),
        ("open", {"logdir": folder, "purge_step": 4}),
        ("close",),
    ]


def test_a_writer_that_comes_late_gets_all_rows(tmp_path, package):
    """And one that had them does not get them twice."""
    calls = package("tensorboardX", "SummaryWriter")
    path = written(tmp_path / "metrics.jsonl")
    with MetricsLog(
        path, writers=open_writers(["tensorboard"], tmp_path, "run", {})
    ) as log:
        log.truncate(2)
        log.append(3, {"loss": 0.25})
    (tmp_path / "events.out.tfevents.1.host").write_text(
        ""
    )  # what the package would leave
    with MetricsLog(path, writers=open_writers(["tensorboard"], tmp_path, "run", {})):
        pass
    given = [call[1:] for call in calls if call[0] == "add_scalar"]
    assert given[:2] == [("loss", 0.1, 1), ("time/step", 2.0, 1)]
    assert [row[2] for row in given] == [1, 1, 2, 2, 5, 5, 3]
    assert ("open", {"logdir": str(tmp_path), "purge_step": 3}) in calls


def test_wandb_goes_on_with_the_run_of_the_folder(tmp_path, package, monkeypatch):
    calls = package("wandb", "init")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    path = tmp_path / "a" / "metrics.jsonl"
    for step in (4, 5):  # a run that was stopped, and its going on
        writers = open_writers(["wandb"], path.parent, "train-1", {"lr": 0.1})
        with MetricsLog(path, writers=writers) as log:
            log.truncate(4)
            log.append(step, {"loss": 0.5})
    open_writers(["wandb"], tmp_path / "b", "train-2", {})
    starts = [call[1] for call in calls if call[0] == "open"]
    first, again, other = (s["id"] for s in starts)
    assert first == again != other and starts[0]["config"] == {"lr": 0.1}
    assert {(s["project"], s["resume"]) for s in starts} == {("tmdjax", "allow")}
    assert [s["name"] for s in starts] == ["train-1", "train-1", "train-2"]
    logged = [call[1] for call in calls if call[0] == "log"]
    assert logged == [{"step": step, "loss": 0.5} for step in (4, 5)]
    assert ("define_metric", "*", {"step_metric": "step"}) in calls
    assert [c for c in calls if c[0] == "finish"] == [("finish", {"exit_code": 0})] * 2
    with pytest.raises(ZeroDivisionError):
        with MetricsLog(path, writers=open_writers(["wandb"], path.parent, "x", {})):
            raise ZeroDivisionError
    assert calls[-1] == ("finish", {"exit_code": 1})


def plain(total, **options):
    clock, out = types.SimpleNamespace(now=100.0), io.StringIO()
    console = Console(file=out, force_terminal=False, width=40)
    options |= {"console": console, "clock": lambda: clock.now}
    progress = Progress("train", total, **options)
    return progress, clock, out


def terminal(name, **options):
    clock, out = types.SimpleNamespace(now=100.0), io.StringIO()
    console = Console(
        file=out,
        force_terminal=True,
        color_system=None,
        width=120,
        _environ={"TERM": "xterm"},
    )
    options |= {"console": console, "clock": lambda: clock.now}
    progress = Progress(name, 10, **options)
    return progress, clock, out


def test_plain_lines_first_at_intervals_and_last():
    progress, clock, out = plain(100)
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
    for steps in ((), (1,), (1, 2)):
        progress, _, out = plain(2)
        fails = len(steps) > 1
        ending = pytest.raises(RuntimeError) if fails else contextlib.nullcontext()
        with ending, progress:
            for step in steps:
                progress.update(step, {})
            if fails:
                raise RuntimeError
        lines = [f"[train]  step {step}/2" for step in steps]
        assert out.getvalue().splitlines() == lines


def test_rate_and_eta_of_a_resumed_stage_start_at_its_first_step():
    progress, clock, out = plain(1000)
    with progress:
        progress.update(500, {})
        clock.now += 10
        progress.update(520, {})
    assert "2 steps/s  ETA 4m00s" in out.getvalue()


def test_text_is_printed_as_it_is_in_both_modes():
    text = "[bold]not markup[/bold] " + "x" * 60
    progress, _, out = plain(10)
    with progress:
        progress.say(text)
    assert out.getvalue() == text + "\n"
    progress, _, out = terminal("train")
    with progress:
        progress.update(3, {"loss": 0.25})
        progress.say(text)
    assert text in out.getvalue()


@pytest.mark.parametrize("width", [30, 60, 80, 120])
def test_the_live_line_fits_the_terminal(width):
    """Long names and all numbers; what is left out are the last metrics."""
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=True, color_system=None, width=width,
        _environ={"TERM": "xterm"},
    )  # fmt: skip
    metrics = {
        "clip_fraction_first": 0.12345,
        "grad_norm": 1e-9,
        "kl": 0.5,
        "loss": -1.5,
    }
    clock = types.SimpleNamespace(now=0.0)
    progress = Progress("straighten8", 12500, console=console, clock=lambda: clock.now)
    with progress:
        progress.update(1, metrics)
        clock.now = 7.0
        progress.update(11999, metrics)
    lines = re.split("[\r\n]", re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", out.getvalue()))
    last = [line for line in lines if "strai" in line][-1]
    assert len(last.rstrip()) <= width
    assert all(len(line.rstrip()) <= width for line in lines)
    assert ("loss -1.5" in last) == (width >= 80)
    assert ("grad_norm" in last) == (width >= 120)


def test_live_display_shows_stage_step_and_metrics():
    progress, clock, out = terminal("distil")
    with progress:
        progress.update(1, {})
        clock.now += 2
        progress.update(5, {"loss": 0.25})
    for shown in ("distil", "step 5/10", "2 steps/s", "ETA 2s", "loss 0.25"):
        assert shown in out.getvalue()


def test_durations():
    seconds = (0, 59.4, 59.6, 200, 3720)
    found = [format_duration(s) for s in seconds]
    assert found == ["0s", "59s", "1m00s", "3m20s", "1h02m"]


def test_a_table_stands_below_the_line_in_both_modes():
    rows = [{"role": "generate", "busy %": 93, "waits for": None}]
    rows += [{"role": "train", "busy %": 7, "waits for": "scores"}]
    progress, _, out = terminal("areal", table=lambda: rows)
    with progress:
        progress.update(5, {})
    text = re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    shown = [line.split() for line in text.splitlines()]
    assert ["role", "busy", "%", "waits", "for"] in shown
    assert ["train", "7", "scores"] in shown
    progress, _, out = plain(10, table=lambda: rows[1:])
    with progress:
        progress.update(5, {})
    assert out.getvalue().splitlines() == [
        "[train]  step 5/10",
        "[train]  role train  busy % 7  waits for scores",
    ]
