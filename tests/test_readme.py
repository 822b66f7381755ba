"""The README's Python runs as it stands."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent


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
    [p for p in sorted((ROOT / "docs").rglob("*.md")) if p.parent.name != "api"],
    ids=lambda p: p.name,
)
def test_python_of_the_docs_runs(page):
    assert executed(page)[0]


def test_tables_are_those_of_the_records():
    from experiments import report

    pages = report.pages(ROOT)
    assert len(pages) >= 2
    for page in pages:
        text = page.read_text()
        assert report.fill_tables(text, ROOT / "results") == text, page
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
            assert (page.parent / picture).exists(), picture


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
