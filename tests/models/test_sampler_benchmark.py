"""benchmarks/sampler.py, at a size where nothing is worth timing."""

import json

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from benchmarks import sampler as benchmark

pytestmark = pytest.mark.nightly

TINY = (
    "--recipe=fp32", "--hidden=16", "--depth=1", "--heads=2", "--steps=3", "--side=4",
    "--channels=2", "--repeats=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def given():
    return benchmark.parser().parse_args([*TINY])


@pytest.fixture(scope="module")
def ours(given):
    module, params = benchmark.make_network(given)
    return module, params, benchmark.Ours(module, params, given, 2)


def test_rows_and_facts(given, tmp_path, capsys):
    benchmark.main([*TINY, "--batches", "2", f"--json={tmp_path / 'found.json'}"])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["rows"][0]["what"] == "batch 2, over steps: sample"
    facts = found["batch 2"]
    assert facts["error.steps"] < 1e-6 and facts["images_per_second"] > 0
    assert "batch 2" in capsys.readouterr().out


def test_no_parameter_is_zero_and_the_walk_moves(given, ours):
    _, params, walk = ours
    leaves = jax.tree.leaves(params)
    assert len(leaves) > 10 and all((leaf != 0).all() for leaf in leaves)
    samples = np.asarray(walk.sample())
    assert samples.shape == (2, 4, 4, 2)
    assert np.abs(samples - benchmark._noise(given, 2)).max() > 0.1


def test_operations_are_those_of_the_products(given, ours):
    """Steps x batch x 2 x (weights of dense layers at their positions, attention)."""
    positions, width = 4, 16
    block = 12 * width**2 * positions + 2 * positions**2 * width + 6 * width**2
    ends = positions * 2 * (8 * width) + 2 * width**2 + 256 * width + width**2
    expected = 3 * 2 * 2 * (block + ends)
    assert_allclose(ours[2].flops, expected, rtol=0.05)


def test_other_samples_are_refused(ours, refused):
    samples, check = ours[2].sample(), benchmark.check_equal
    words, most = "these are not the same network", benchmark._TOLERANCES
    refused(words, check, samples, samples * 1.01, most["fp32"])
    refused(words, check, samples, samples * np.nan, most["bf16"])


def test_torch_makes_the_same_samples(given, ours):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    module, params, walk = ours
    rival = benchmark.Torch(module, params, given, 2, compiled=False)
    benchmark.check_equal(walk.sample(), rival.sample(), 1e-5)
    assert rival()["sample"] > 0
