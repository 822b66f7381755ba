"""benchmarks/rollouts.py, at a size where nothing is worth timing."""

import json

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from benchmarks import rollouts as benchmark

pytestmark = pytest.mark.nightly

TINY = ("--length=12", "--layers=2", "--width=4", "--batch=3", "--repeats=1")


@pytest.fixture(scope="module")
def given():
    return benchmark.parser().parse_args([*TINY])


@pytest.fixture(scope="module", params=list(benchmark.PROBLEMS))
def problem(request, given):
    return benchmark.PROBLEMS[request.param](given)


def test_rows_and_facts(tmp_path, capsys):
    path = tmp_path / "found.json"
    benchmark.main([*TINY, "--no-torch", f"--json={path}"])
    found = json.loads(path.read_text())
    rows = {row["what"]: row for row in found["rows"]}
    for name in benchmark.PROBLEMS:
        assert rows[f"{name}, over steps: rollout"]["ratio"] > 0
        memory = rows[f"{name}, memory: 1000 steps over 100"]
        assert memory["ours"] >= memory["rival"] > 0
        growth = rows[f"{name}, memory: a further step over its state"]
        assert growth["verdict"] == "met" and growth["ours"] <= 2 * 4 * 3  # of a row
        assert found[name]["error.steps"] < 1e-5
        assert found[name]["steps_per_second.ours"] > 0
    assert "a further step" in capsys.readouterr().out


def test_rollouts_neither_vanish_nor_break(problem):
    assert all((leaf != 0).all() for leaf in jax.tree.leaves(problem.params))
    outputs = np.asarray(benchmark.Ours(problem, 12).rollout())
    size = np.sqrt(np.square(outputs).reshape(12, -1).mean(1))
    assert np.all((size > size[0] / 10) & (size < size[0] * 10))
    assert np.abs(outputs[-1] - outputs[0]).max() > 1e-3


def test_other_rollouts_are_refused(refused):
    states = np.ones((2, 3, 4, 1), np.float32)
    words, most = "these are not the same network", benchmark._TOLERANCE
    for other in (1.01 * states, np.nan * states):
        refused(words, benchmark.check_equal, states, other, most)


def test_torch_makes_the_same_rollout(problem):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    rival = benchmark.Torch(problem, 12, compiled=False, mode="default")
    ours = np.asarray(benchmark.Ours(problem, 12).rollout())
    assert_allclose(rival.states(), ours, atol=1e-4)
    assert rival()["rollout"] > 0
