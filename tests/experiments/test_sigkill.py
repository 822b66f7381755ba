"""A run killed in the middle ends as one that was left alone (make nightly)."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tmdjax.harness.logs import TIME_PREFIX, read_rows

SCRIPT = """
import functools, pathlib, sys
from experiments import run
from experiments.run import find_experiment
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
experiment = find_experiment(config, "configs/SYSTEM.py:smoke")
sys.exit(run.run(experiment, config, options).code)
"""
STEPS = "checkpoints/*/manifest.json"


def left_alone_and_killed(code, checkpoint, folder):
    """Runs a script whose argument is a workdir, twice; the two workdirs.

    The second process is killed by SIGKILL a moment after a file matches ``checkpoint``
    under its folder, and started again.
    """

    def start(workdir):
        return subprocess.Popen(
            [sys.executable, "-c", code, str(workdir)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )

    whole, killed = folder / "a" / "run", folder / "b" / "run"
    left_alone, process = start(whole), start(killed)
    deadline = time.monotonic() + 120
    while not list((folder / "b").glob(checkpoint)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    for finishing in (left_alone, start(killed)):
        out, _ = finishing.communicate(timeout=240)
        assert finishing.returncode == 0, out
    return whole, killed


@pytest.mark.slow
@pytest.mark.parametrize(
    "system, arm, changes, killed_at",
    [
        ("boss", None, [], "stages/distill4-*"),
        ("flow_matching", None, ["train.steps=300"], f"stages/train-*/{STEPS}"),
        (
            "branchgrpo",
            "branch_depth",
            ["rl.iterations=100"],
            f"stages/align-*/{STEPS}",
        ),
        (
            "policyflow",
            "policyflow",
            ["train.envs=16", "train.iterations=400", "train.iterations_per_call=2"],
            f"stages/train-*/{STEPS}",
        ),
        (
            "tmd",
            "tmd",
            ["distill.cycles=40", "distill.adversarial_weight=0.03"],
            f"stages/distill-*/{STEPS}",
        ),
    ],
)
def test_killed_and_resumed(system, arm, changes, killed_at, tmp_path):
    code = SCRIPT.replace("SYSTEM", system).replace("ARM", repr(arm))
    code = code.replace("CHANGES", repr(changes))
    found = []
    for workdir in left_alone_and_killed(code, killed_at, tmp_path):
        metrics = json.loads((workdir / "summary.json").read_text())["metrics"]
        rows = [metrics, *read_rows(workdir / "metrics.jsonl")]
        found.append(
            [
                {k: v for k, v in row.items() if not k.startswith(TIME_PREFIX)}
                for row in rows
            ]
        )
    assert found[0] == found[1] and len(found[0][0]) > 8
