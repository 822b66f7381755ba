"""A paper outside the repository: a method, a config and an experiment in one folder."""

import json

import pytest

from experiments import plan, run, sweep
from tmdjax.harness import ConfigError

CONFIG = """
from ml_collections import ConfigDict

from eleventh_method import ANSWER

EXPERIMENT = "eleventh_experiment"
TIERS = ("smoke",)


def get_config(tier):
    return ConfigDict({"system": "eleventh", "answer": ANSWER, "factor": 2})
"""
EXPERIMENT = """
import eleventh_method

from tmdjax.harness import Report, Stage, StageResult


def stages(config, arm):
    def compute(context):
        return StageResult({}, {"product": eleventh_method.times(config.factor)})

    factor = {"factor": config.factor}
    return [Stage(name="compute", run=compute, config=factor)]


def report(config, results, folder):
    return Report([("stages", [{"stage": name} for name in results])])


def describe(config):
    return {"factor": config.factor}


def measures(config):
    return {"product"}
"""
METHOD = """
ANSWER = 42


def times(factor):
    return ANSWER * factor
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper")
    (folder / "eleventh.py").write_text(CONFIG)
    (folder / "eleventh_experiment.py").write_text(EXPERIMENT)
    (folder / "eleventh_method.py").write_text(METHOD)
    return folder


def test_files_beside_a_config_are_found(folder, tmp_path, capsys):
    spec = f"--config={folder / 'eleventh.py'}:smoke"
    workdir = f"--workdir={tmp_path / 'run'}"
    assert run.main([spec, workdir, "--dry_run"]) == 0
    assert "to run" in capsys.readouterr().out
    assert run.main([spec, workdir]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metrics"] == {"product": 84}
    several = f"--workdir={tmp_path / 'sweep'}"
    assert sweep.main([spec, several, "--sweep.factor=2,3"]) == 0
    assert "product" in capsys.readouterr().out


def test_an_experiment_that_is_nowhere_is_refused(folder, refused):
    bad = folder / "bad_paper.py"
    both = r"neither experiments/{0}.py nor .*{1}/{0}.py.*set EXPERIMENT"
    for name in ("absent", "bad_paper"):  # the config itself is no experiment
        bad.write_text(CONFIG.replace("eleventh_experiment", name))
        words = both.format(name, folder.name)
        for main in (run.main, plan.main):
            refused(words, main, [f"--config={bad}:smoke"], error=ConfigError)
