"""A paper outside the repository: a method, a config and an experiment in one folder.

``tests/papers`` has a made-up one for each family; not a line elsewhere knows of them.
"""

import json
import pathlib
import shutil

import pytest

from experiments import plan, run, sweep
from tmdjax.harness import ConfigError, load_config
from tmdjax.harness.experiment import measured
from tmdjax.harness.logs import read_rows
from tmdjax.harness.summaries import numbers

PAPERS = pathlib.Path(__file__).with_name("papers")


def copied(name, folder):
    """Puts the three files of a paper into a folder; the spec of its smoke."""
    for path in PAPERS.glob(f"{name}*.py"):
        shutil.copy(path, folder)
    return f"{folder / name}_config.py:smoke"


@pytest.mark.parametrize(
    "name, measure, logged",
    [
        ("signs", "swing", "ratio_error"),
        ("small_actions", "reach", "action_size"),
        ("ranks", "growth", "rank_spread"),
    ],
)
def test_a_paper_of_each_family_is_three_files(name, measure, logged, tmp_path):
    spec, workdir = copied(name, tmp_path), tmp_path / "run"
    assert run.main([f"--config={spec}", f"--workdir={workdir}"]) == 0
    summary = json.loads((workdir / "summary.json").read_text())
    config = load_config(spec)
    known = measured(run.find_experiment(config, spec), config)
    assert summary["system"] == name and measure in known
    assert known <= numbers(summary).keys()
    assert summary["metrics"][measure] > 0
    # of the loss, by the method itself where it adds some
    assert any(row.get(logged, -1) >= 0 for row in read_rows(workdir / "metrics.jsonl"))


def test_other_commands_find_what_lies_beside_a_config(tmp_path, capsys, refused):
    spec = copied("small_actions", tmp_path)
    assert run.main([f"--config={spec}", "--dry_run"]) == 0
    values = "--sweep.method.pull=0.1,0.2"
    assert (
        sweep.main([f"--config={spec}", f"--workdir={tmp_path}", values, "--dry_run"])
        == 0
    )
    assert capsys.readouterr().out.count("to run") == 3 * 3
    words = "small_actions_config.py:smoke names no step to plan"
    refused(words, plan.main, [f"--config={spec}"], error=ConfigError)


def test_files_of_one_name_in_two_folders_are_two_modules(tmp_path, refused):
    for number in (1, 2, 1):
        folder = tmp_path / str(number)
        folder.mkdir(exist_ok=True)
        spec = copied("small_actions", folder)
        method = folder / "small_actions.py"
        raises = f"    raise ValueError('of folder {number}')\n"
        lines = method.read_text().splitlines(keepends=True)
        method.write_text("".join([*lines[:-1], raises]))
        refused(f"of folder {number}", run.main, [f"--config={spec}", "--dry_run"])


def test_an_experiment_that_is_nowhere_is_refused(tmp_path, refused):
    copied("ranks", tmp_path)
    text = (tmp_path / "ranks_config.py").read_text()
    bad = tmp_path / "bad_paper.py"
    both = r"neither experiments/{0}.py nor .*{1}/{0}.py.*set EXPERIMENT"
    for name in ("absent", "bad_paper"):  # the config itself is no experiment
        bad.write_text(text.replace("ranks_experiment", name))
        words = both.format(name, tmp_path.name)
        refused(words, run.main, [f"--config={bad}:smoke"], error=ConfigError)


def test_a_method_or_a_setting_that_is_nowhere_is_refused(tmp_path, refused):
    copied("ranks", tmp_path)
    text = (tmp_path / "ranks_config.py").read_text()
    bad = tmp_path / "poor_paper.py"
    for change, words in (
        (
            ('"name": "ranks"', '"name": "absent"'),
            "neither .*systems/absent.py nor absent.py",
        ),
        (('"gate"', '"gat"'), "reads the setting 'gate', which the config lacks"),
        (('"slots": 4, ', ""), "reads the setting 'slots', which the config lacks"),
    ):
        bad.write_text(text.replace(*change))
        assert bad.read_text() != text
        refused(words, run.main, [f"--config={bad}:smoke"], error=ConfigError)
