"""benchmarks/runtime.py, at a size where nothing is worth timing."""

import json

import numpy as np
import pytest

from benchmarks import runtime as benchmark

TINY = (
    "--updates=3", "--batch=2", "--samples=2", "--tokens=5", "--megabytes=0.1",
    "--executors", "sim", "threads",
)  # fmt: skip


def table(tmp_path, *arguments):
    path = tmp_path / "found.json"
    benchmark.main([*TINY, *arguments, f"--json={path}"])
    found = json.loads(path.read_text())
    return found, {row["what"]: row for row in found["rows"]}


def test_every_executor_trains_on_the_texts_of_the_plain_loop(tmp_path, monkeypatch):
    """All of them run; by a clock of ours, so that what is told of them is known."""
    clock = {"loop": 1.0, "memory": 1.5, "disk": 2.0, "copies": 8e9, "threads": 2e9}

    def in_turn(contenders, repeats):
        found = {}
        for title, measure in contenders.items():
            ((phase, value),) = measure().items()
            assert value > 0
            found[title] = [{phase: clock[title.rpartition(", ")[2]]}] * repeats
        return found

    monkeypatch.setattr(benchmark, "in_turn", in_turn)
    found, rows = table(tmp_path, "--repeats=2")
    count = 2 * 2 * 2  # trajectories of the updates after the first
    for name, goal in (("sim", None), ("threads", 2e-3)):
        for place, more in (("memory", 0.5), ("disk", 1.0)):
            row = rows[f"a trajectory, {name}, {place}: more than in a plain loop"]
            assert row["goal"] == goal and row["ours"] == more / count
    weights = rows["weights of 0.1 MB, threads, over plain copies"]
    assert weights["ratio"] == 0.25 and weights["rival"] == 8 and weights["ours"] == 2
    assert found["updates"] == 3


def test_other_texts_are_refused(refused, monkeypatch):
    given = benchmark.parser().parse_args([*TINY, "--repeats=1"])
    other = benchmark.Batches()
    other.add([0])
    monkeypatch.setattr(benchmark, "loop", lambda given: other)
    refused("trained on other texts than the plain loop", benchmark.overhead, given)
    refused("updates=1 must be at least 2", benchmark.main, ["--updates=1"])


def test_a_soak_runs_for_its_time_and_keeps_what_a_checkpoint_needs(tmp_path):
    found, rows = table(tmp_path, "--soak_minutes=0.01")
    (row,) = rows.values()
    assert row["goal"] == 0.02 and np.isfinite(row["ours"])
    assert found["soak"]["trajectories"] == 4 * found["soak"]["updates"] > 0
    assert 0.6 <= found["soak"]["seconds"] < 30
    assert set(found["soak"]["disk_mb"]) == {"events.jsonl", "trajectories.sqlite"}


def test_growth_is_that_of_a_line_without_the_warm_up(refused):
    seconds = np.arange(101.0)
    memory = np.where(seconds < 20, 10 * seconds, 1000 + 0.25 * (seconds - 20))
    assert benchmark.growth(seconds, memory) == pytest.approx(0.25 * 80 / 1000)
    wave = 1000 + np.where(np.arange(101) % 2, 1, -1)
    assert abs(benchmark.growth(seconds, wave)) < 1e-3
    refused("2 measurements are too few", benchmark.growth, [0, 1], [5, 5])
