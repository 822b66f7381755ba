"""A run killed in the middle ends as one that was left alone (make nightly)."""

import pytest

SCRIPT = """
import functools, importlib, pathlib, sys
from experiments import run
from tmdjax import train
from tmdjax.harness import load_config

# as if steps were slow: a checkpoint every fraction of a second
train.fit = functools.partial(train.fit, checkpoint_seconds=(0.2, 0.2))
config = load_config("configs/SYSTEM.py:smoke", CHANGES)
with config.unlocked():
    config.claims = {}
    if ARM:
        config.arms = {ARM: config.arms[ARM]}
options = run.Options(command="test", tier="smoke", workdir=pathlib.Path(sys.argv[1]))
experiment = importlib.import_module("experiments.SYSTEM")
sys.exit(run.run(experiment, config, options).code)
"""
CLOCKS = ("seconds", "seconds_per_iteration", "reward_at_time")


@pytest.mark.slow
@pytest.mark.parametrize(
    "system, arm, changes, killed_at",
    [
        ("boss", None, [], "stages/distill4-*"),
        (
            "branchgrpo",
            "branch_depth",
            ["rl.iterations=100"],
            "stages/align-*/checkpoints/*/manifest.json",
        ),
        (
            "policyflow",
            "policyflow",
            ["train.envs=16", "train.iterations=400", "train.iterations_per_call=2"],
            "stages/train-*/checkpoints/*/manifest.json",
        ),
        (
            "tmd",
            "tmd",
            ["distill.cycles=40", "distill.adversarial_weight=0.03"],
            "stages/distill-*/checkpoints/*/manifest.json",
        ),
    ],
)
def test_killed_and_resumed(system, arm, changes, killed_at, killed_and_resumed):
    code = SCRIPT.replace("SYSTEM", system).replace("ARM", repr(arm))
    found = killed_and_resumed(code.replace("CHANGES", repr(changes)), killed_at)
    a, b = ({k: v for k, v in x.items() if not k.endswith(CLOCKS)} for x in found)
    assert a == b and len(a) > 8
