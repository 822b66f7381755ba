"""benchmarks.device_check: parts, limits, verdicts, and going on."""

import importlib.machinery
import json
import sys
import types

import pytest

from benchmarks import contest, device_check


@pytest.mark.parametrize(
    "row, verdict",
    [
        ({"ours": 1.0}, "told"),
        ({"ours": 2.0, "goal": 1.0}, "missed"),
        ({"ours": 2.0, "rival": 4.0, "ratio": 0.5, "goal": 0.5}, "met"),
        ({"ours": 0.4, "goal": 0.45, "better": "greater"}, "missed"),
        ({"ours": 0.5, "goal": 0.45, "better": "greater"}, "met"),
    ],
)
def test_verdict_stands_beside_each_goal(row, verdict):
    assert contest.verdict(row) == verdict


def test_rivals_that_there_are_not_are_told(monkeypatch):
    def rivals(broken):
        def make(compiled):
            def run():
                if compiled in broken:
                    raise RuntimeError("no kernel\nof this kind")
                return {"run": 1.0}

            return run

        facts = {}
        return contest.torch_rivals(
            make, lambda rival: rival()["run"] / 8, facts
        ), facts

    torch = types.ModuleType("torch")
    torch.__version__ = "9.9"
    torch.__spec__ = importlib.machinery.ModuleSpec("torch", None)
    monkeypatch.setitem(sys.modules, "torch", torch)
    found, facts = rivals(())
    errors = {"error.eager": 1 / 8, "error.compiled": 1 / 8}
    assert [*found] == ["eager", "compiled"] and facts == {"torch": "9.9", **errors}
    found, facts = rivals((True,))
    assert [*found] == ["eager"]
    assert facts["left out: compiled"] == "torch.compile: no kernel"
    with pytest.raises(RuntimeError, match="no kernel"):
        rivals((False,))  # a fault, and no compiler's
    monkeypatch.setattr(contest.importlib.util, "find_spec", lambda name: None)
    found, facts = rivals(())
    assert not found and "pip install 'tmdjax[parity]'" in facts["left out"]


def _parts(monkeypatch, tmp_path, **scripts):
    """Parts that are small scripts in place of benchmarks."""
    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "__init__.py").touch()
    head = "import json, sys, time\npath = sys.argv[-1].removeprefix('--json=')\n"
    for name, script in scripts.items():
        (package / f"{name}.py").write_text(head + script)
    parts = {name: device_check.Part(300, "", "") for name in scripts}
    monkeypatch.setattr(device_check, "PARTS", parts)
    monkeypatch.chdir(tmp_path)


ROWS = "rows = [dict(what='x / y', unit='s', ours=1.0, ratio=0.5, goal=1.0, verdict='met')]\n"
WRITE = ROWS + "open(path, 'w').write(json.dumps(dict(rows=rows)))\n"


def test_a_fault_or_a_slow_part_hides_no_other(monkeypatch, tmp_path, capsys):
    _parts(
        monkeypatch,
        tmp_path,
        broken="sys.exit('no such kernel')",
        slow=WRITE + "time.sleep(600)",
        works=WRITE,
    )
    monkeypatch.setitem(device_check.PARTS, "slow", device_check.Part(2, "", ""))
    path = tmp_path / "out.json"
    assert device_check.main([f"--json={path}"]) == 1
    found = json.loads(path.read_text())["parts"]
    assert {name: part["status"] for name, part in found.items()} == {
        "broken": "failed", "slow": "out of time", "works": "done"
    }  # fmt: skip
    assert "no such kernel" in found["broken"]["output"]
    assert found["slow"]["rows"] == found["works"]["rows"]  # what was written is kept
    assert "met    x / y: 0.5, at most 1" in capsys.readouterr().out
    # again: what is done is left, the rest runs; --parts runs what it names
    (tmp_path / "benchmarks" / "broken.py").write_text("import sys\n")
    (tmp_path / "benchmarks" / "works.py").write_text("raise SystemExit(1)\n")
    monkeypatch.delitem(device_check.PARTS, "slow")
    assert device_check.main([f"--json={path}"]) == 0
    assert device_check.main([f"--json={path}", "--parts", "works"]) == 1
    with pytest.raises(ValueError, match="holds parts of size 'full', not 'tiny'"):
        device_check.main([f"--json={path}", "--size=tiny"])


def test_what_no_time_is_left_for_is_told(monkeypatch, tmp_path):
    _parts(monkeypatch, tmp_path, works=WRITE)
    path = tmp_path / "out.json"
    assert device_check.main([f"--json={path}", "--minutes=0.01"]) == 0
    assert json.loads(path.read_text())["parts"]["works"]["status"] == "no time left"
    with pytest.raises(ValueError, match=r"holds no \*.whl"):
        device_check.main([f"--json={path}", f"--wheels={tmp_path}"])


@pytest.mark.nightly
def test_every_part_runs_on_a_cpu(tmp_path):
    path = tmp_path / "out.json"
    device_check.main([f"--json={path}", "--size=tiny", "--minutes=30"])
    parts = json.loads(path.read_text())["parts"]
    assert parts.keys() == device_check.PARTS.keys()
    assert {part["status"] for part in parts.values()} == {"done"}, parts
    assert all(part["rows"] for part in parts.values())
