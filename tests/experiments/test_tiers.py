"""Every tier of every config: it builds, and it claims only what it measures."""

import pathlib

import pytest

from benchmarks import training_steps
from experiments import run
from tests.harness import kill_campaign
from tmdjax.harness import load_config
from tmdjax.harness.config import load_module
from tmdjax.harness.experiment import measured

TIERS = [
    f"{path}:{tier}"
    for path in sorted(pathlib.Path("configs").glob("*.py"))
    for tier in load_module(path).TIERS
]
# smokes are run by .ci/run; these take seconds to trace, or to draw problems
PAPERS = ("branchgrpo", "boss", "grpo", "pde_refiner", "policyflow", "reinflow", "tmd")
PAPERS = [f"{name}.py:paper" for name in PAPERS]
DEAR = ("boss.py:gpu", "pde_refiner.py:gpu", *PAPERS)
DEAR += ("reinflow.py:cpu", "reinflow.py:gpu")
DEAR += tuple(f"xrpo.py:{tier}" for tier in ("cpu", "gpu", "paper"))
DEAR += tuple(f"jet_rl.py:{tier}" for tier in ("cpu", "gpu", "paper"))
DEAR += tuple(f"areal.py:{tier}" for tier in ("cpu", "gpu", "paper"))
DEAR += tuple(f"april.py:{tier}" for tier in ("cpu", "gpu", "paper"))
DEAR += ("fp8_training.py:cpu", "fp8_training.py:gpu")
DEAR += ("scheduling.py:gpu", "scheduling.py:paper")
DEAR += tuple(f"flow_equivariant.py:{tier}" for tier in ("cpu", "gpu", "paper"))
BUILT = [
    pytest.param(spec, marks=[pytest.mark.nightly] * spec.endswith(DEAR))
    for spec in TIERS
    if not spec.endswith(":smoke")
]
SIZES = {
    # arXiv 2212.09748, table 4: 675 M (theirs also predicts variances)
    "flow_matching.py:paper": {"parameters": (0.998 * 675e6, 1.002 * 675e6)},
    "flow_matching.py:cpu": {"parameters": (1e6, 2e6)},
    # the published networks in 2-D and 3-D
    "flow_equivariant.py:paper": {
        "full/parameters": (74_880, 74_880),
        "blocks/parameters": (12_830_976, 12_830_976),
    },
    # the 256 x 256 network of the reference has 65.6 M parameters
    "boss.py:paper": {"parameters": (59e6, 72e6), "search, GB": (0, 4)},
    "boss.py:gpu": {f"{a}/parameters": (5e6, 20e6) for a in ("fashion", "sprites")},
}


@pytest.mark.parametrize("spec", BUILT)
def test_it_builds(spec):
    if spec.endswith("flow_grpo.py:gpu"):  # its words are read
        pytest.importorskip("onnxruntime", reason="needs tmdjax[ocr]")
    config = load_config(spec)
    experiment = run.find_experiment(config, spec)
    sizes = experiment.describe(config)
    assert any("parameters" in name for name in sizes)
    if config.system in ("flow_grpo", "branchgrpo"):
        assert any("stored states, GB" in name for name in sizes)
    for name, (low, high) in SIZES.get(pathlib.Path(spec).name, {}).items():
        assert low <= sizes[name] <= high, name


@pytest.mark.parametrize("spec", TIERS)
def test_it_claims_only_what_it_measures(spec):
    assert spec.rpartition(":")[2] in ("smoke", "cpu", "gpu", "paper")
    config = load_config(spec)
    experiment = run.find_experiment(config, spec)
    claims = config.get("claims", {}).values()
    about = {name for c in claims for name in (c.ours, c.get("baseline")) if name}
    assert about <= measured(experiment, config)
    for arm in experiment.arms(config):
        stages = experiment.stages(config, arm)
        names = [stage.id for stage in stages]
        assert len(set(names)) == len(names)
        for i, stage in enumerate(stages):
            assert set(stage.reads.values()) <= set(names[:i])


@pytest.mark.parametrize("spec", [spec for spec in TIERS if spec.endswith(":smoke")])
def test_both_recipes_are_known_before_anything_compiles(spec, refused):
    for side in ("rollout", "train"):
        config = load_config(spec, [f"precision.{side}=fp23"])
        describe = run.find_experiment(config, spec).describe
        refused(f"precision.{side}: unknown GEMM recipe 'fp23'.*fp32", describe, config)


def test_the_list_names_every_tier(capsys):
    assert run.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(spec in out for spec in TIERS)


def test_every_system_is_killed_at_night_and_tried_on_a_gpu():
    systems = {path.stem for path in pathlib.Path("configs").glob("*.py")}
    assert systems == {*kill_campaign.CASES} == {*training_steps.CASES}
