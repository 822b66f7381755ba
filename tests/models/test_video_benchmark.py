"""benchmarks/video.py at a size where nothing is worth timing."""

import json

import pytest

from benchmarks import video as benchmark

pytestmark = pytest.mark.nightly

SMALL = (
    "--depth=1 --heads=2 --head-dim=8 --mlp-width=16 --grid 1 4 4 --channels=2 "
    "--text-length=4 --text-width=8 --recipe=fp32 --repeats=2 --head=0"
).split()


def test_ours_alone_is_measured_and_written(tmp_path, capsys):
    path = tmp_path / "video.json"
    benchmark.main([*SMALL, "--no-torch", f"--json={path}"])
    found = json.loads(path.read_text())
    rows = {row["what"]: row for row in found["rows"]}
    assert rows["video: forward"]["ours"] > 0
    assert rows["memory: program"]["ours"] > 4 * found["parameters"]
    assert found["positions"] == 4 and "forward" in capsys.readouterr().out


def test_operations_are_those_of_the_compiled_products():
    """XLA counts norms and activations too: a little more than the products."""
    flags = "--no-torch --heads=8 --grid 2 8 8"
    given = benchmark.parse([*SMALL, *flags.split()])
    module = benchmark.make_network(given)
    ours = benchmark.Ours(module, benchmark.make_tensors(module, 2), given)
    counted = ours.compiled.cost_analysis()["flops"]
    time = 2 * (256 * 64 + 7 * 64**2)  # its embedding, left out there
    text = 2 * 4 * (8 * 64 + 64**2)
    least = benchmark.operations(module, given)
    assert least < counted - time - text < 1.3 * least


def test_student_is_held_against_its_evaluations():
    flags = "--no-torch --depth=12 --head=2 --grid 2 16 16 --heads=4"
    given = benchmark.parse([*SMALL, *flags.split()])
    rows = {row["what"]: row for row in benchmark.measure(given)[0]}
    assert rows["NFE 2.33: student"]["goal"] == 1.02
    assert rows["NFE 2.33: student"]["ratio"] > 0
    # beyond its evaluations: fusion, both patch embeddings and outputs
    assert 1 < rows["NFE 2.33: student, operations"]["ratio"] < 1.2


@pytest.mark.parametrize("recipe", ["fp32", "bf16"])
def test_rival_computes_the_same(recipe):
    pytest.importorskip("torch", reason="needs tmdjax[parity]")
    pytest.importorskip("diffusers", reason="needs tmdjax[parity]")
    given = benchmark.parse([*SMALL, f"--recipe={recipe}", "--no-compiled"])
    rows, notes = benchmark.measure(given)
    assert notes["difference"] < benchmark._TOLERANCES[recipe]
    assert rows[0]["goal"] == 1.0 and rows[0]["ratio"] > 0
