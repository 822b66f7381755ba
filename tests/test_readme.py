"""README and documentation: Python runs, names exist, code fits, tables are rendered."""

import ast
import json
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md")), *DOCS]
COLUMN = 76  # characters of code that the site's text column holds

sys.path.insert(0, str(ROOT / "docs"))
import names  # noqa: E402

from tmdjax.harness.summaries import merge  # noqa: E402


def executed(page):
    """How many blocks of Python a page has, and the names they leave."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    namespace = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), namespace)
    return len(blocks), namespace


def test_python_blocks_run(capsys):
    count, names = executed(ROOT / "README.md")
    assert count == 3
    out = capsys.readouterr().out
    assert "(1024, 2) 32" in out
    losses = [float(line.split()[1]) for line in out.splitlines()[1:]]
    assert losses[-1] < 0.9 * losses[0]
    assert int(names["result"].state.step) == 200 and names["x"].shape == (1024, 2)


@pytest.mark.parametrize(
    "page",
    [p for p in DOCS if "```python\n" in p.read_text() and p.name != "devices.md"],
    ids=lambda p: p.name,
)
def test_python_of_the_docs_runs(page):
    assert executed(page)[0]


@pytest.mark.slow  # a process of its own; tests/train/test_sharding.py does the same
def test_python_of_several_devices_runs(run_python):
    text = (ROOT / "docs/concepts/devices.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    said = run_python(code, devices=8).splitlines()
    assert said == ["(32, 2)", "{0.5, 1.0}"]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_names_and_paths_exist(page):
    text = page.read_text()
    for name in names.names(text):
        names.find(name)
    assert not names.missing_paths(text)


def test_names_that_are_gone_are_seen():
    text = "`flows.rollout(keys)`, `flows.roll_out`, `np.asarray`, `rl.rate=8`, `a.md`"
    found = list(names.names(text))
    assert found == ["flows.rollout", "flows.roll_out", "np.asarray"]
    assert names.find("np.asarray") is None
    assert names.identifier("flows.rollout") == "tmdjax.flows.rollout.rollout"
    with pytest.raises(AttributeError, match="roll_out"):
        names.find("flows.roll_out")
    text = "`train/state.py`, `train/stale.py`, `results/SYSTEM/TIER.json`\n"
    text += "```\npython -m experiments.walk --config=configs/bos.py:cpu\n```\n"
    gone = ["train/stale.py", "experiments/walk.py", "configs/bos.py"]
    assert names.missing_paths(text) == gone


@pytest.mark.parametrize("page", [*DOCS, ROOT / "RESULTS.md"], ids=lambda p: p.name)
def test_code_fits_its_column(page):
    fences = re.findall(r"^ *```[^`\n]*\n(.*?)^ *```$", page.read_text(), re.S | re.M)
    lines = [line for block in fences for line in block.splitlines()]
    assert [line for line in lines if len(line) > COLUMN] == []


def test_messages_of_the_docs_are_those_of_the_code():
    said = []
    for path in [*(ROOT / "tmdjax").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                said.append(
                    "".join(
                        getattr(part, "value", "")
                        for part in node.values
                        if isinstance(part, ast.Constant)
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    text = (ROOT / "docs/troubleshooting.md").read_text()
    messages = [
        message
        for block in re.findall(r"```text\n(.*?)```", text, re.S)
        for message in block.strip().split("\n\n")
    ]
    assert len(messages) >= 8
    for message in messages:
        message = re.sub(
            r"^\w+Error: |^InUse: |^\[...\] ", "", " ".join(message.split())
        )
        parts = [
            re.escape(part.strip()) for part in message.split("...") if part.strip()
        ]
        assert any(re.search(".*".join(parts), text) for text in said), message


def test_tables_are_those_of_the_records():
    from experiments import report

    pages = report.pages(ROOT)
    assert len(pages) >= 2
    for page in pages:
        text = page.read_text()
        assert report.fill_tables(text, ROOT / "results") == text, page
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
            assert (page.parent / picture).exists(), picture


def test_a_table_without_an_end_takes_no_text_with_it(refused):
    from experiments import report

    text = "<!-- table: boss:cpu -->\nmy words\n<!-- claims: boss:cpu -->\n<!-- end -->"
    words = "<!-- table: boss:cpu --> has no <!-- end --> before"
    refused(words, report.fill_tables, text, ROOT / "results")


def test_results_page_is_rendered(tmp_path):
    from tmdjax.harness import results_page
    from tmdjax.harness.records import read_records

    records = read_records(ROOT / "results")
    findings = results_page.read_findings(ROOT / "results")
    benchmarks = results_page.read_benchmarks(ROOT / "benchmarks" / "results")
    rendered = results_page.render(records, findings, benchmarks)
    assert (ROOT / "RESULTS.md").read_text() == rendered
    for record in records:  # each says what was found, in words
        found = findings[record["system"]][record["tier"]]
        assert found["finding"].endswith(".") and found["picture"]


def test_no_claim_was_changed_after_its_result(tmp_path, refused):
    from experiments import report

    report.check_claims(ROOT / "results")
    record = json.loads((ROOT / "results/tmd/cpu.json").read_text())
    for claim in record["claims"]:  # consistently, so that its verdict is right
        if claim["id"] == "C2w":
            claim["threshold"] = 1.2
    record["claims"] = merge([record])["claims"]
    (tmp_path / "tmd").mkdir()
    (tmp_path / "tmd" / "cpu.json").write_text(json.dumps(record))
    assert "reproduced" in [c["verdict"] for c in record["claims"] if c["id"] == "C2w"]
    words = "claim 'C2w' of .*threshold=1.2.* it is Claim.*threshold=1.05"
    refused(words, report.check_claims, tmp_path)
    record["claims"] = [c for c in record["claims"] if c["id"] != "C2w"]
    (tmp_path / "tmd" / "cpu.json").write_text(json.dumps(record))
    words = "claim 'C2w' of .* is None, in .*or left out, or record"
    refused(words, report.check_claims, tmp_path)
