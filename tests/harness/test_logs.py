import contextlib
import csv
import io
import json
import math
import sys
import time
import types

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


def test_array_scalars_are_stored_exactly(tmp_path, as_shipped):
    metrics = {"f32": jnp.float32(0.1), "bf16": jnp.bfloat16(0.1)}
    metrics |= {"i": jnp.int32(7), "np": np.float32("nan")}
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.append(np.int64(3), metrics)
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert row["step"] == 3 and row["i"] == 7
    assert np.float32(row["f32"]) == np.float32(0.1)
    assert row["bf16"] == float(jnp.bfloat16(0.1))
    assert math.isnan(row["np"])


def test_other_values_are_refused_by_name_and_leave_no_trace(tmp_path, refused):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for value, what in (
            (np.zeros(3), r"of shape \(3,\); log one number"),
            ([1.0], "list"),
            (None, "NoneType"),
            (True, "bool"),
        ):
            metrics, words = {"loss": 0.0, "x": value}, f"metric 'x' is {what}"
            refused(words, log.append, 1, metrics, error=TypeError)
        refused("'step' is the row's own", log.append, 1, {"step": 2})
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
        words = rf"--{name} needs {package}: pip install 'tmdjax\[logging\]'"
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


def test_tensorboard_receives_rows_and_purges_what_is_truncated(tmp_path, package):
    calls = package("tensorboardX", "SummaryWriter")
    writers = open_writers(["tensorboard"], tmp_path, "run", {})
    with MetricsLog(tmp_path / "metrics.jsonl", writers=writers) as log:
        log.append(4, {"loss": 0.5, "note": "x"})
        log.truncate(3)
    folder = str(tmp_path)
    assert calls == [
        ("open", {"logdir": folder}),
        ("add_scalar", "loss", 0.5, 4),
        ("add_text", "note", "x", 4),
        ("close",),
        ("open", {"logdir": folder, "purge_step": 4}),
        ("close",),
    ]


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


def plain(**options):
    clock, out = types.SimpleNamespace(now=100.0), io.StringIO()
    options["console"] = Console(file=out, force_terminal=False, width=40)
    return Progress("train", clock=lambda: clock.now, **options), clock, out


def terminal(name):
    clock, out = types.SimpleNamespace(now=100.0), io.StringIO()
    console = Console(
        file=out,
        force_terminal=True,
        color_system=None,
        width=120,
        _environ={"TERM": "xterm"},
    )
    progress = Progress(name, 10, console=console, clock=lambda: clock.now)
    return progress, clock, out


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
    for steps in ((), (1,), (1, 2)):
        progress, _, out = plain()
        fails = len(steps) > 1
        ending = pytest.raises(RuntimeError) if fails else contextlib.nullcontext()
        with ending, progress:
            for step in steps:
                progress.update(step)
            if fails:
                raise RuntimeError
        lines = [f"[train]  step {step}" for step in steps]
        assert out.getvalue().splitlines() == lines


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
    progress, _, out = terminal("train")
    with progress:
        progress.update(3, {"loss": 0.25})
        progress.say(text)
    assert text in out.getvalue()


def test_live_display_shows_stage_step_and_metrics():
    progress, clock, out = terminal("distil")
    with progress:
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
    shown = ["step 1", "step 2  loss 0.5", "step 3", "step 4  loss 2"]
    assert out.getvalue().splitlines() == [f"[train]  {line}" for line in shown]


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


def test_durations():
    seconds = (0, 59.4, 59.6, 200, 3720)
    found = [format_duration(s) for s in seconds]
    assert found == ["0s", "59s", "1m00s", "3m20s", "1h02m"]
