"""The packages form one total order and import only what stands before them."""

import ast
import pathlib
import subprocess
import sys

import tmdjax

ORDER = (
    "core quant rl flows models metrics domains rewards data envs train generation runtime "
    "systems"
).split()
HARNESS_MAY_USE = {"core", "metrics", "train", "harness"}
ROOT = pathlib.Path(tmdjax.__file__).parent
EXPERIMENTS = ROOT.parent / "experiments"


def imports(path):
    """Absolute names of what a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_of(name):
    parts = name.split(".")
    return parts[1] if parts[0] == "tmdjax" and len(parts) > 1 else None


def test_imports_point_one_way():
    for path in sorted(ROOT.rglob("*.py")):
        here = path.relative_to(ROOT).parts[0]
        if here == "__init__.py":
            continue
        assert here == "harness" or here in ORDER, f"{here} has no place in the order"
        for name in imports(path):
            top = name.split(".")[0]
            assert top not in ("experiments", "configs"), f"{path} imports {name}"
            other = package_of(name)
            both = here == other == "systems"
            assert not both, f"{path} imports {name}: systems never import systems"
            if other is None or other == here or other.startswith("__"):
                continue
            if here == "harness":
                assert other in HARNESS_MAY_USE, f"{path} imports {name}"
            else:
                assert other in ORDER, f"{path} imports {name}"
                before = ORDER.index(other) < ORDER.index(here)
                assert before, f"{path} imports {name}"


def test_a_file_is_read_in_one_sitting():
    """A system has at most 380 lines, an experiment 320, any module 500."""
    for folder, most in ((ROOT, 500), (ROOT / "systems", 380), (EXPERIMENTS, 320)):
        for path in folder.rglob("*.py"):
            lines = len(path.read_text().splitlines())
            assert lines <= most, f"{path} has {lines} lines; split it, at most {most}"


def test_every_package_is_an_attribute():
    assert {*tmdjax.__all__} == {*ORDER, "harness", "load", "__version__"}


def test_the_rule_sees_a_wrong_import(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from tmdjax.train import state\n")
    assert [package_of(n) for n in imports(bad)] == ["train", "train"]


def test_import_is_cheap_and_needs_no_optional_package():
    code = (
        "import sys, time, jax\n"
        "start = time.perf_counter()\n"
        "import tmdjax\n"
        "assert time.perf_counter() - start < 1\n"
        "heavy = {'flax', 'optax', 'orbax', 'grain', 'matplotlib', 'scipy.stats'}\n"
        "assert not heavy & set(sys.modules)\n"
        "for name in tmdjax.__all__:\n"
        "    getattr(tmdjax, name)\n"
        "print({'sklearn', 'matplotlib', 'tensorflow', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_no_two_test_files_have_one_name():
    # pytest imports them by their name alone, and would stop at the second
    names = [p.name for p in (ROOT.parent / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
