"""Plants faults in a copy of the package, and tells which no test catches.

    python tests/mutations.py [--seed=0] [--each=5] [--only rl flows] [--json=PATH]
    python tests/mutations.py --tree=OTHER_CHECKOUT     (faults and tests of that one)

A fault is one change to the syntax tree of one module: a sign, a comparison, an index,
a constant, an axis, a mask or a stop_gradient. Which are planted is drawn by the seed,
``--each`` a package. Every fault names the test files that should fail, which run with
``-x`` and a limit; it is caught if they fail or run out of time. A site is named by
file, kind, the text of its line and its number among equal ones, so that it is found
again after other lines moved: ``--sites=RECORD.json`` plants those of an earlier record.
"""

import argparse
import ast
import contextlib
import copy
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
COPIED = ("tmdjax", "tests", "experiments", "configs", "benchmarks", "results")
LIMIT = 300.0
"""Seconds of one run: a fault may loop for ever."""

MODULES: dict[str, dict[str, str]] = {
    "rl": {
        "advantages": "rl/test_advantages.py",
        "aggregation": "rl/test_aggregation.py",
        "importance_weights": "rl/test_importance_weights.py",
        "kl": "rl/test_kl_estimates.py",
        "returns": "rl/test_returns.py",
        "surrogates": "rl/test_surrogates.py",
        "trees": "systems/test_branchgrpo.py",
    },
    "flows": {
        "chords": "flows/test_step_search.py",
        "coupling": "flows/test_coupling.py",
        "distribution_matching": "flows/test_distribution_matching.py",
        "flow_maps": "flows/test_flow_maps.py",
        "grids": "flows/test_grids.py",
        "guidance": "flows/test_guidance_and_matching.py",
        "matching": "flows/test_guidance_and_matching.py",
        "step_search": "flows/test_step_search.py",
        "table": "flows/test_stochastic.py flows/test_rollout.py",
        "rollout": "flows/test_rollout.py flows/test_stochastic.py",
        "rescore": "flows/test_stochastic.py flows/test_rollout.py",
    },
    "models": {
        "attention": "models/test_attention.py",
        "decoder_layers": "models/test_decoder.py models/test_hf_decoder.py",
        "decoder_cache": "models/test_decoder_cache.py",
        "layers": "models/test_model_layers.py models/test_dit.py",
        "lora": "models/test_lora.py",
        "token_log_probs": "models/test_token_log_probs.py",
        "video_dit_layers": "models/test_video_dit.py models/test_hf_video_dit.py",
    },
    "metrics": {
        "frechet": "metrics/test_frechet.py",
        "intervals": "metrics/test_intervals.py",
        "precision_recall": "metrics/test_precision_recall.py",
        "sliced_wasserstein": "metrics/test_sliced_wasserstein.py",
        "video_features": "metrics/test_video_metrics.py",
    },
    "rewards": {
        "expressions": "rewards/test_expressions.py",
        "math": "rewards/test_math.py",
        "moving_sprites": "rewards/test_moving_sprite_checks.py",
        "shapes": "rewards/test_shapes.py",
        "written_work": "rewards/test_written_work.py",
    },
    "data": {
        "captions": "data/test_captions.py",
        "moving_sprites": "data/test_moving_sprites.py",
        "pipeline": "data/test_pipeline.py",
        "procedural": "data/test_procedural.py",
        "rendered_text": "data/test_rendered_text.py",
    },
    "envs": {
        "base": "envs/test_vector.py",
        "multi_goal": "envs/test_multi_goal.py",
        "point_maze": "envs/test_point_maze.py",
        "push": "envs/test_push.py",
    },
    "train": {
        "checkpoint": "train/test_checkpoint.py",
        "distillation": "train/test_distillation.py",
        "flow_rl": "train/test_flow_rl.py",
        "on_policy": "train/test_on_policy.py",
        "optimizer": "train/test_state.py",
        "state": "train/test_state.py",
        "supervised": "train/test_supervised.py",
    },
    "generation": {
        "byte_pairs": "generation/test_tokenizers.py",
        "engine": "generation/test_engine.py",
        "sampling": "generation/test_sampling.py",
        "slots": "generation/test_engine.py",
    },
    "runtime": {"lm_rl": "runtime/test_lm_rl.py"},
    "systems": {
        "boss": "systems/test_boss.py",
        "branchgrpo": "systems/test_branchgrpo.py",
        "flow_grpo": "systems/test_flow_grpo.py",
        "fpo": "systems/test_fpo.py",
        "grpo": "systems/test_grpo.py",
        "policyflow": "systems/test_policyflow.py",
        "ppo": "systems/test_ppo.py",
        "tmd": "systems/test_tmd.py",
    },
    "harness": {
        "compare": "experiments/test_compare.py",
        "config": "harness/test_config.py",
        "ledger": "harness/test_ledger.py",
        "logs": "harness/test_logs.py",
        "report": "harness/test_report.py",
        "runner": "harness/test_runner.py",
    },
}
"""The test files that should fail, below ``tests/``, by package and module. A module's
contract file (``models/test_contract.py``) runs too, where there is one."""
CONTRACTS = {"models": "models/test_contract.py"}

SWAPS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}


class Site(NamedTuple):
    """Where a fault is planted.

    Attributes:
        path: of the module, from the root of the tree.
        kind: of the fault.
        line: its text, without indentation.
        number: among the sites of this kind on equal lines of the file.
    """

    path: str
    kind: str
    line: str
    number: int


def faults_at(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """The kinds of fault that fit a node, and what stands there then."""
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        changed = copy.copy(node)
        changed.op = SWAPS[type(node.op)]()
        yield "sign" if isinstance(node.op, ast.Add | ast.Sub) else "factor", changed
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        if not isinstance(node.operand, ast.Constant):
            yield "sign", node.operand
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        changed = copy.copy(node)
        changed.ops = [SWAPS[type(node.ops[0])](), *node.ops[1:]]
        yield "comparison", changed
    elif isinstance(node, ast.Constant) and type(node.value) is float and node.value:
        yield "constant", ast.Constant(node.value * 1.5)
    elif isinstance(node, ast.Subscript):
        part = node.slice
        if isinstance(part, ast.Slice) and (part.lower or part.upper):
            changed = copy.deepcopy(node)
            name = "lower" if part.lower else "upper"
            more = ast.BinOp(getattr(part, name), ast.Add(), ast.Constant(1))
            setattr(changed.slice, name, more)
            yield "off by one", changed
    elif isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if name == "stop_gradient":
            yield "stop_gradient", node.args[0]
        if name == "where" and len(node.args) == 3:
            yield "mask", node.args[1]
        for i, keyword in enumerate(node.keywords):
            axis = keyword.value
            if keyword.arg == "axis" and isinstance(axis, ast.Constant):
                if type(axis.value) is int:
                    changed = copy.deepcopy(node)
                    changed.keywords[i].value = ast.Constant(1 - axis.value)
                    yield "axis", changed


def _visit(tree: ast.AST) -> Iterator[tuple[ast.AST, str, object]]:
    """(parent, field, child) of code, in order; errors' texts and types are none."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for i, child in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(child, ast.Raise | ast.JoinedStr) or not isinstance(
                child, ast.AST
            ):
                continue
            yield tree, field, (child, i if isinstance(value, list) else None)
            yield from _visit(child)


def sites_of(root: pathlib.Path, path: str) -> dict[Site, str]:
    """All sites of a module, and its source with that fault."""
    source = (root / path).read_text()
    lines, found, seen = source.splitlines(), {}, Counter()
    tree = ast.parse(source)
    for parent, field, (node, index) in list(_visit(tree)):
        if not hasattr(node, "lineno"):
            continue
        for kind, changed in faults_at(node):
            line = lines[node.lineno - 1].strip()
            site = Site(path, kind, line, seen[kind, line])
            seen[kind, line] += 1
            values = getattr(parent, field)
            if index is None:
                setattr(parent, field, changed)
            else:
                values[index] = changed
            found[site] = ast.unparse(ast.fix_missing_locations(copy.deepcopy(tree)))
            if index is None:
                setattr(parent, field, node)
            else:
                values[index] = node
    return found


def drawn(root: pathlib.Path, package: str, each: int, seed: int) -> dict[Site, str]:
    """``each`` faults of a package, at most one a line, every kind as likely."""
    rng = random.Random(f"{seed} {package}")
    kinds: dict[str, list[tuple[Site, str]]] = {}
    for module in MODULES[package]:
        path = f"tmdjax/{package}/{module}.py"
        for site, source in sites_of(root, path).items():
            kinds.setdefault(site.kind, []).append((site, source))
    chosen: dict[Site, str] = {}
    while kinds and len(chosen) < each:
        kind = rng.choice(sorted(kinds))
        site, source = kinds[kind].pop(rng.randrange(len(kinds[kind])))
        if not kinds[kind]:
            del kinds[kind]
        if all((s.path, s.line) != (site.path, site.line) for s in chosen):
            chosen[site] = source
    return chosen


def tests_of(root: pathlib.Path, path: str) -> list[str]:
    """The test files of a module that the tree has."""
    package, module = pathlib.Path(path).with_suffix("").parts[1:]
    names = [*MODULES[package][module].split(), CONTRACTS.get(package, "")]
    files = [f"tests/{name}" for name in names if name]
    return [name for name in files if (root / name).exists()]


@contextlib.contextmanager
def copied(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """A copy of what the tests need, in which faults are planted."""
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            if (root / name).exists():
                shutil.copytree(root / name, pathlib.Path(folder, name))
        for name in ("pyproject.toml", "README.md", "RESULTS.md"):
            shutil.copy(root / name, folder)
        yield pathlib.Path(folder)


def outcome(tree: pathlib.Path, files: list[str]) -> tuple[str, str]:
    """'caught', 'survived' or 'out of time', and the last line that the tests print."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:randomly", *files]
    try:
        done = subprocess.run(
            command,
            cwd=tree,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )
    except subprocess.TimeoutExpired:
        return "out of time", ""
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    told = failed[0].partition(" - ")[0] if failed else (lines or [""])[-1]
    if done.returncode in (0, 5):
        return "survived", told
    return "caught", told


def main() -> int:
    """Plants, runs and reports; 1 if a fault survived that no reason is given for."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--each", type=int, default=5, help="faults a package")
    flags.add_argument("--only", nargs="+", choices=MODULES, default=list(MODULES))
    flags.add_argument("--tree", type=pathlib.Path, default=ROOT)
    flags.add_argument("--sites", type=pathlib.Path, help="a record: its faults")
    flags.add_argument("--json", type=pathlib.Path, help="the record to write")
    given = flags.parse_args()
    root = given.tree.resolve()
    planted: dict[Site, str] = {}
    reasons: dict[Site, str] = {}
    if given.sites:
        for row in json.loads(given.sites.read_text()):
            site = Site(row["path"], row["kind"], row["line"], row["number"])
            reasons[site] = row.get("reason", "")
            if site.path.split("/")[1] in given.only:
                planted[site] = sites_of(root, site.path).get(site, "")
    else:
        for package in given.only:
            planted |= drawn(root, package, given.each, given.seed)
    rows, unexplained = [], 0
    with copied(root) as tree:
        for site, source in planted.items():
            began, files = time.monotonic(), tests_of(root, site.path)
            if not source:
                found, told = "gone", "the line stands in this tree no more"
            else:
                path, kept = tree / site.path, (tree / site.path).read_text()
                path.write_text(source)
                found, told = outcome(tree, files)
                path.write_text(kept)
            row = {**site._asdict(), "outcome": found, "told": told, "tests": files}
            if reasons.get(site):
                row["reason"] = reasons[site]
            unexplained += found == "survived" and "reason" not in row
            rows.append(row)
            seconds = time.monotonic() - began
            print(f"{found:11} {seconds:5.0f} s  {site.path}: {site.kind}: {site.line}")
            sys.stdout.flush()
            if given.json:
                given.json.write_text(json.dumps(rows, indent=1) + "\n")
    counts = Counter(row["outcome"] for row in rows)
    print(", ".join(f"{count} {name}" for name, count in counts.most_common()))
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())
