import os
import pathlib

import pytest

from experiments import run
from tmdjax.harness.summaries import numbers


@pytest.fixture(scope="session")
def smoke_of(tmp_path_factory):
    """``smoke_of(system)``: the folder of a finished run of its smoke tier.

    One of the runs in the folder ``TMDJAX_SMOKES``; without it, made once a session.
    """
    given = os.environ.get("TMDJAX_SMOKES")
    folder = pathlib.Path(given) if given else tmp_path_factory.mktemp("smokes")

    def find(system: str) -> pathlib.Path:
        workdir = folder / system
        if not given and not (workdir / "summary.json").exists():
            spec = f"--config=configs/{system}.py:smoke"
            assert run.main([spec, f"--workdir={workdir}"]) == 0
        return workdir

    return find


@pytest.fixture
def ran(tmp_path):
    """``ran(experiment, config)``: metrics and timings of a run in ``tmp_path / "run"``."""

    def metrics(experiment, config, **options):
        given = {"command": "test", "tier": "smoke", "workdir": tmp_path / "run"}
        options = run.Options(**given, **options)
        outcome = run.run(run.check_experiment(experiment), config, options)
        assert outcome.code == 0
        return outcome.summary and numbers(outcome.summary)

    return metrics
