"""Notebooks and their scripts say the same (make nightly runs them)."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "colabs").glob("*.py"))


def test_every_notebook_has_its_script():
    assert len(SCRIPTS) >= 2
    notebooks = sorted((ROOT / "colabs").glob("*.ipynb"))
    assert [n.stem for n in notebooks] == [s.stem for s in SCRIPTS]


@pytest.mark.nightly
@pytest.mark.filterwarnings("default")  # of jupytext
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_cells_are_those_of_the_script(script):
    jupytext = pytest.importorskip("jupytext", reason="needs tmdjax[notebooks]")
    pair = [jupytext.read(path) for path in (script, script.with_suffix(".ipynb"))]
    written, shown = ([(c.cell_type, c.source) for c in n.cells] for n in pair)
    assert written == shown
    install = next(source for kind, source in written if kind == "code")
    assert install.startswith("try:\n    import matplotlib, sklearn, tmdjax\nexcept")
