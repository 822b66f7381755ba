"""The paper of docs/first_paper.md runs as its page says, in a folder of its own."""

import importlib
import json
import pathlib
import re
import sys

import pytest

from experiments import run

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "first_paper.md"
TEXT = PAGE.read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    files = re.findall(r'```python title="(.*?)"\n(.*?)```', TEXT, re.S)
    assert len(files) == 4
    for name, body in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(body)
    return folder


def test_its_run_is_recorded(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    commands = re.findall(r"^python -m experiments.run (.*)$", TEXT, re.M)
    assert len(commands) == 2
    for command in commands:
        assert run.main(command.split()) == 0
    assert "parameters" in capsys.readouterr().out
    assert run.main([*commands[1].split(), "--record"]) == 0  # its stages are cached
    record = json.loads((folder / "results/rank_grpo/smoke.json").read_text())
    rows = re.findall(r"^\| (R\d) \| (.*?) \| (\w+) \|$", TEXT, re.M)
    said = [
        tuple(c[k] for k in ("id", "statement", "verdict")) for c in record["claims"]
    ]
    assert rows == said
    assert (
        record["metrics"]["ranks/reward_last"] > record["metrics"]["ranks/reward_first"]
    )
    assert "rank_grpo, smoke tier" in (folder / "RESULTS.md").read_text()


def test_its_own_tests_pass(folder, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder / "paper")])
    tests = vars(importlib.import_module("test_rank_grpo"))
    own = [function for name, function in tests.items() if name.startswith("test_")]
    assert len(own) == 2
    for function in own:
        function()
