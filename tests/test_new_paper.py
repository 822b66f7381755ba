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


def test_all_that_lies_beside_a_config_is_its_own(tmp_path, monkeypatch):
    """Helpers in packages too, and where the folder was on the path before."""
    for tag in "ab":
        folder = tmp_path / tag
        (folder / "paper_parts").mkdir(parents=True)
        for name in ("paper_helper.py", "paper_parts/__init__.py"):
            (folder / name).write_text(f"TAG = {tag!r}\n")
        (folder / "paper_parts" / "inner.py").write_text(f"TAG = {tag!r}\n")
        (folder / "tagged.py").write_text(
            "from ml_collections import ConfigDict\n"
            "from paper_helper import TAG\n"
            "from paper_parts import TAG as PACKAGE, inner\n"
            "TIERS = ('smoke',)\n"
            "def get_config(tier):\n"
            "    return ConfigDict({'tags': TAG + PACKAGE + inner.TAG})\n"
        )
    for tag in "aba":
        assert load_config(f"{tmp_path / tag / 'tagged.py'}:smoke").tags == 3 * tag
    monkeypatch.syspath_prepend(str(tmp_path / "b"))
    assert load_config(f"{tmp_path / 'b' / 'tagged.py'}:smoke").tags == "bbb"


def test_a_file_that_another_module_hides_is_refused(tmp_path, refused):
    spec = copied("ranks", tmp_path)
    config = tmp_path / "ranks_config.py"
    text = config.read_text()
    for name in ("grpo", "queue"):  # of experiments, of Python
        shutil.copy(tmp_path / "ranks_experiment.py", tmp_path / f"{name}.py")
        config.write_text(text.replace("ranks_experiment", name))
        words = f"{name}.py would be passed over: '{name}' is .*give the file another"
        refused(words, run.main, [f"--config={spec}", "--dry_run"])
    config.write_text(text.replace('"ranks_experiment"', "3"))
    words = "names the experiment 3; set EXPERIMENT, or config.system"
    refused(words, run.main, [f"--config={spec}"], error=ConfigError)


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
