"""Plants faults in a copy of the package and looks whether the tests see them.

    python tests/mutations.py                 # the recorded faults again (nightly)
    python tests/mutations.py --seed=3        # others
    python tests/mutations.py --only flows --tree=../other --record=other

A fault is one changed place of a module's syntax tree: a sign, a comparison, an index
off by one, a dropped ``stop_gradient``, swapped axes, a dropped mask, a changed
constant. It is planted in a copy of the tree, and the module's own test files
(``TESTS``) run until the first failure. Without a fault they must pass, or the verdict
would mean nothing. ``tests/mutations.json`` holds the faults drawn by seed 0, what
became of them (a column of ``verdicts`` a tree, written by ``--record``), and for each
that no test sees the reason why none should (``reason``); any other is an error.

A place is known by file, function, kind and the text of its line, so that it is found
again after edits elsewhere; one whose line has changed is reported as ``gone``.
"""

import argparse
import ast
import collections
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests" / "mutations.json"
KINDS = (
    *("sign", "comparison", "off by one", "stop_gradient", "axes", "mask", "constant"),
)
PACKAGES = (
    *(
        "rl",
        "flows",
        "models",
        "metrics",
        "domains",
        "rewards",
        "data",
        "envs",
        "train",
    ),
    *("generation", "runtime", "systems", "harness"),
)
COPIED = (
    *("tmdjax", "tests", "configs", "experiments", "benchmarks", "results"),
    *("colabs", "docs", "pyproject.toml", "README.md", "RESULTS.md", "mkdocs.yml"),
)

# Their tests are too dear.
NOT_DRAWN = [
    f"{package}/{name}"
    for package, names in {
        "data": "procedural images/captioned_shapes",
        "domains": "shapes/captions shapes/drawing shapes/grammar",
        "flows": "chords windows step_search tree_rollout",
        "harness": "claims summaries records results_page",
        "runtime": "executors/ray_actors",
        "models": "images/dit images/unet images/text_dit videos/flow_maps videos/dit "
        "block_attention",
        "systems": "boss branchgrpo tmd",
        "train": "on_policy flow_rl iteration "
        "distillation distillation_cycle export planning",
    }.items()
    for name in names.split()
]

# Module: what should fail, in the words of pytest's command line below tests/.
# Several files: those that exist run.
# A module that is not named has those of its folder, or the file of its own name.
TESTS = {
    "data/check": "data/test_sources.py",
    "data/dataset": "data/test_sources.py",
    "data/image_folders": "data/test_convert.py data/test_untrusted_files.py",
    "data/images/fashion_mnist": "data/test_mnist.py",
    "data/images/digits": "data/test_mnist.py data/test_sources.py",
    "data/videos/files": "data/test_video_files.py",
    "data/weights": "data/test_sources.py data/test_rendered_text.py",
    "data/text_tasks": "data/test_text_tasks.py data/test_countdown_task.py",
    **dict.fromkeys(
        ["data/demonstration_files", "data/hdf5"], "data/test_demonstrations.py"
    ),
    "data/record_sets": "data/test_demonstrations.py data/test_pde_sets.py",
    **dict.fromkeys(
        ["data/pde/equations", "data/pde/etdrk4"], "data/test_pde_solvers.py"
    ),
    **dict.fromkeys(
        ["data/pde/" + name for name in "files generate trajectories".split()],
        "data/test_pde_sets.py",
    ),
    "envs/base": "envs/test_vector.py envs/test_push.py",
    "envs/diagnostic": "envs/test_vector.py",
    "envs/host": "envs/test_gymnasium.py",
    "core/failures": "harness/test_failures.py",
    "core/functions": "flows/test_guidance_and_matching.py",
    "flows/velocities": "flows/test_guidance_and_matching.py",
    "flows/matching": "flows/test_guidance_and_matching.py",
    "flows/mixture": "flows/test_paths.py flows/test_empirical.py",
    "flows/transition": "flows/test_stochastic.py",
    "flows/rescore": "flows/test_stochastic.py",
    "flows/reference": "flows/test_step_search.py -k 'terminal or endpoints'",
    "flows/table": "flows/test_rollout.py",
    "flows/flow_map_training": "flows/test_flow_maps.py",
    "generation/slots": "generation/test_engine.py",
    "generation/chat": "generation/test_tokenizers.py",
    "generation/byte_pairs": "generation/test_tokenizers.py",
    "harness/stages": "harness/test_runner.py",
    "harness/load": "harness/test_runner.py",
    "harness/find": "test_new_paper.py",
    "harness/experiment": "harness/test_runner.py",
    "harness/run_folder": "harness/test_runner.py",
    "harness/writers": "harness/test_logs.py",
    "harness/compare": "experiments/test_compare.py",
    "harness/environment": "harness/test_report.py harness/test_runner.py",
    "metrics/diversity": "metrics/test_video_metrics.py metrics/test_frechet.py",
    "metrics/video_features": "metrics/test_video_metrics.py",
    **dict.fromkeys(
        ["metrics/" + name for name in "rollouts spectra image_quality".split()],
        "metrics/test_rollout_metrics.py",
    ),
    "models/layers": "models/test_model_layers.py models/test_text_dit.py",
    "models/stack": "models/test_model_layers.py",
    **dict.fromkeys(
        ["models/convolution", "models/fields"], "models/test_field_networks.py"
    ),
    "models/control": "models/test_control_networks.py",
    "models/chain_policy": "systems/test_reinflow.py systems/test_dppo.py",
    "models/wrappers": "models/test_nnx_modules.py models/test_model_layers.py "
    "models/test_build.py",
    "models/videos/forcing_dit": "systems/test_diffusion_forcing.py",
    "models/videos/rssm": "systems/test_rssm.py",
    "models/flow_equivariant": "models/test_torus_map.py models/test_egocentric_map.py",
    "models/decoder/config": "models/test_hf_decoder.py",
    "models/decoder/rope": "models/test_hf_decoder.py",
    "models/decoder/layers": "models/test_decoder.py",
    **dict.fromkeys(
        ["models/checkpoints/" + name for name in "adapters decoder layout".split()],
        "models/test_checkpoint_folders.py models/test_hf_decoder.py",
    ),
    "models/checkpoints/gguf": "models/test_gguf_decoder.py",
    "models/checkpoints/float8": "models/test_float8_checkpoints.py",
    **dict.fromkeys(
        [
            "models/checkpoints/" + name
            for name in "video_dit video_adapters wan_names".split()
        ],
        "models/test_hf_video_dit.py",
    ),
    "models/decoder/network": "models/test_decoder.py",
    "models/decoder/non_finite": "models/test_decoder.py",
    "models/decoder/cache": "models/test_decoder_cache.py",
    "models/videos/patches": "models/test_video_dit.py -k 'rotary or distances or patches'",
    "models/videos/layers": "models/test_hf_video_dit.py",
    "models/videos/discriminator": "models/test_flow_map_dit.py -k 'discriminator or taps'",
    "domains/shapes": "domains/test_shape_checks.py",
    "domains/sprites/drawing": "data/test_moving_sprites.py",
    "domains/sprites": "domains/test_sprite_checks.py",
    "domains/torus": "domains/test_torus.py",
    "domains/blocks": "domains/test_blocks.py",
    **dict.fromkeys(["quant/linear", "quant/recipes"], "test_quant.py"),
    **dict.fromkeys(
        ["quant/" + name for name in "fp8 fp8_recipes self_test".split()],
        "test_fp8.py optimised/test_quantisers.py test_hopper_gemm.py",
    ),
    "quant/hopper_gemm": "test_hopper_gemm.py",
    "generation/chat_templates": "generation/test_tokenizers.py",
    "rewards/symbolic": "rewards/test_math.py",
    "rewards/tex": "rewards/test_math.py",
    **dict.fromkeys(
        ["rewards/code_program", "rewards/code_runs"], "rewards/test_code.py"
    ),
    "data/text_tasks/program_by_example": "data/test_program_by_example.py",
    "rewards/reasoning_gym_calls": "data/test_reasoning_gym.py",
    "rewards/worker_process": "rewards/test_worker.py",
    "rl/diagnostics": "rl/test_rl_diagnostics.py",
    "rl/reward_scale": "rl/test_returns.py",
    "rl/running_statistics": "rl/test_returns.py",
    "rl/kl": "rl/test_kl_estimates.py",
    "rl/gaussian": "systems/test_policyflow.py -k 'ratio or kl'",
    "rl/trees": "rl/test_advantages.py",
    **dict.fromkeys(["rl/curation", "rl/bin_packing"], "rl/test_token_records.py"),
    "rl/ratios": "rl/test_surrogates.py",
    "rl/off_policy": "systems/test_areal.py",
    **dict.fromkeys(
        ["runtime/" + name for name in "learner lm_rl packing scoring update".split()],
        "runtime/test_lm_rl.py -k 'definition or packing or learns or tied or "
        "penalised or clipped or bad or truncated or recomputed or unequal or fails'",
    ),
    **dict.fromkeys(
        ["runtime/scheduling", "runtime/rounds"],
        "runtime/test_interruption.py runtime/test_rounds.py runtime/test_lm_rl.py "
        "-k 'interrupted or gone or stopped or tied or fails or planner'",
    ),
    "runtime/lengths": "systems/test_april.py",
    "runtime/activity": "runtime/test_events.py",
    "runtime/group_objective": "systems/test_grpo.py systems/test_areal.py",
    "runtime/publishing": "runtime/test_alarms.py runtime/test_asynchronous.py",
    "runtime/calibration": "runtime/test_calibration.py",
    "runtime/worked_examples": "systems/test_xrpo.py",
    "runtime/database": "runtime/test_trajectories.py",
    "runtime/executors": "runtime/test_executors.py",
    **dict.fromkeys(
        [
            "runtime/" + name
            for name in "cohorts control groups roles schedule simulated_engine "
            "watchdog".split()
        ],
        "runtime/test_controller.py systems/test_april.py",
    ),
    "runtime/settings": "runtime/test_lm_rl.py -k bad",
    "systems/flow_grpo": "systems/test_flow_grpo.py train/test_flow_rl.py",
    "systems/dmd2": "systems/test_tmd.py -k 'dmd2 or renoised'",
    "systems/meanflow": "systems/test_tmd.py -k meanflow",
    "systems/reflow": "systems/test_boss.py -k reflow",
    "train/fine_tuning": "train/test_supervised.py",
    "train/neural_solvers": "systems/test_pde_refiner.py",
    "train/world_models": "systems/test_flow_equivariant.py",
    "data/pde/conditions": "systems/test_pde_refiner.py",
    "train/optimizer": "train/test_state.py train/test_supervised.py",
    **dict.fromkeys(NOT_DRAWN),
}


@dataclasses.dataclass(frozen=True)
class Site:
    """One place where one fault can be planted, and the fault."""

    file: str
    function: str
    kind: str
    line: str
    ordinal: int  # among equal ones of the same function
    code: str
    fault: str
    number: int = dataclasses.field(compare=False, default=0)
    span: tuple[int, int] = dataclasses.field(compare=False, default=(0, 0))

    @property
    def id(self) -> str:
        where = self.file.removeprefix("tmdjax/").removesuffix(".py")
        return f"{where}:{self.function}:{self.kind}:{self.ordinal}:{self.code}"

    @property
    def tests(self) -> str | None:
        return tests_of(self.file)


def tests_of(file: str) -> str | None:
    """The test files of a module below ``tests/``, with a selection."""
    module = file.removeprefix("tmdjax/").removesuffix(".py")
    package, name = module.split("/", 1)
    if module in TESTS:
        return TESTS[module]
    folder, own = name.split("/")[0], name.split("/")[-1]
    return TESTS.get(f"{package}/{folder}", f"{package}/test_{own}.py")


class Sites(ast.NodeVisitor):
    """All places of one module, outside of words, types and errors."""

    def __init__(self, source: str, file: str):
        self.source, self.file = source, file
        self.lines = source.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))
        self.function: list[str] = []
        self.found: list[Site] = []
        self.counts: collections.Counter = collections.Counter()
        self.inside_index = 0
        self.visit(ast.parse(source))

    def span(self, node: ast.AST) -> tuple[int, int]:
        def at(row: int, column: int) -> int:
            encoded = self.lines[row - 1].encode()[:column]
            return self.starts[row - 1] + len(encoded.decode())

        return (
            at(node.lineno, node.col_offset),
            at(node.end_lineno, node.end_col_offset),
        )

    def text(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.source[start:end]

    def add(self, kind: str, node: ast.AST, fault: str, span=None) -> None:
        span = span or self.span(node)
        code = self.source[slice(*span)]
        line = self.lines[node.lineno - 1].strip()
        key = (".".join(self.function), kind, line, code)
        place = (self.file, key[0], kind, line, self.counts[key])
        self.found.append(Site(*place, code, fault, node.lineno, span))
        self.counts[key] += 1

    # -- what is left alone
    def visit_Raise(self, node):
        pass

    visit_JoinedStr = visit_Assert = visit_Raise

    def visit_AnnAssign(self, node):
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node):
        self.function.append(node.name)
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)
        self.function.pop()

    def visit_ClassDef(self, node):
        self.function.append(node.name)
        for statement in node.body:
            self.visit(statement)
        self.function.pop()

    # -- the kinds
    def operator(self, kind, node, left, right, old, new):
        start, end = self.span(left)[1], self.span(right)[0]
        gap = self.source[start:end]
        if gap.count(old) == 1 and "#" not in gap:
            self.add(kind, node, gap.replace(old, new), (start, end))

    def visit_BinOp(self, node):
        words = isinstance(node.left, ast.Constant | ast.JoinedStr) and not isinstance(
            getattr(node.left, "value", 0), int | float
        )
        if isinstance(node.op, ast.Add) and not words:
            self.operator("sign", node, node.left, node.right, "+", "-")
        elif isinstance(node.op, ast.Sub):
            self.operator("sign", node, node.left, node.right, "-", "+")
        elif isinstance(node.op, ast.Mult):
            for one, other in ((node.left, node.right), (node.right, node.left)):
                if masking(self.text(one)):
                    self.add("mask", node, f"({self.text(other)})")
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        if isinstance(node.op, ast.USub):
            if isinstance(node.operand, ast.Constant):
                self.number(node, -node.operand.value)
                return
            self.add("sign", node, f"({self.text(node.operand)})")
        self.generic_visit(node)

    def visit_Compare(self, node):
        swaps = {
            ast.Lt: ("<", ">"),
            ast.Gt: (">", "<"),
            ast.LtE: ("<=", ">="),
            ast.GtE: (">=", "<="),
            ast.Eq: ("==", "!="),
            ast.NotEq: ("!=", "=="),
        }
        if len(node.ops) == 1 and type(node.ops[0]) in swaps:
            swap = swaps[type(node.ops[0])]
            self.operator("comparison", node, node.left, node.comparators[0], *swap)
        self.generic_visit(node)

    def visit_Subscript(self, node):
        self.visit(node.value)
        self.inside_index += 1
        self.visit(node.slice)
        self.inside_index -= 1

    def visit_Call(self, node):
        name = self.text(node.func).rsplit(".", 1)[-1]
        if name == "stop_gradient" and len(node.args) == 1:
            self.add("stop_gradient", node, f"({self.text(node.args[0])})")
        if name in ("swapaxes", "moveaxis", "transpose") and node.args:
            inner = node.args[0]
            if isinstance(node.func, ast.Attribute) and self.text(
                node.func.value
            ) not in ("jnp", "np", "jax.numpy"):
                inner = node.func.value
            self.add("axes", node, f"({self.text(inner)})")
        if name == "where" and len(node.args) == 3:
            self.add("mask", node, f"({self.text(node.args[1])})")
        if masking(name) and len(node.args) > 1:
            self.add("mask", node, f"({self.text(node.args[0])})")
        for keyword in node.keywords:
            value = self.text(keyword.value)
            if keyword.arg in ("where", "mask") and value not in ("None", "True"):
                self.add(
                    "mask", keyword.value, "None" if keyword.arg == "mask" else "True"
                )
            swapped = {"-1": "0", "0": "-1", "1": "0", "-2": "-1", "2": "1"}
            if keyword.arg in ("axis", "axes") and value in swapped:
                self.add("axes", keyword.value, swapped[value])
        self.visit(node.func)
        index = name in ("range", "arange")
        self.inside_index += index
        for argument in node.args:
            self.visit(argument)
        self.inside_index -= index
        for keyword in node.keywords:
            if keyword.arg not in ("axis", "axes", "static_argnums", "where", "mask"):
                self.visit(keyword.value)

    def visit_Constant(self, node):
        self.number(node, node.value)

    def number(self, node, value):
        if isinstance(value, bool):
            self.add("constant", node, str(not value))
        elif isinstance(value, int):
            kind = "off by one" if self.inside_index else "constant"
            self.add(kind, node, str(value + 1))
        elif isinstance(value, float) and (value == 0 or abs(value) > 1e-3):
            self.add("constant", node, str(1.5 * value or 0.5))


def masking(text: str) -> bool:
    """Whether a factor or function says by its name that it leaves something out."""
    return any(word in text for word in ("mask", "valid", "alive", "keep"))


def candidates(tree: pathlib.Path, packages) -> dict[str, list[Site]]:
    """All places, by package."""
    found = {}
    for package in packages:
        found[package] = [
            site
            for path in sorted((tree / "tmdjax" / package).rglob("*.py"))
            if path.name != "__init__.py" and tests_of(str(path.relative_to(tree)))
            for site in Sites(path.read_text(), str(path.relative_to(tree))).found
        ]
    return found


def draw(sites: list[Site], seed: int, count: int, package: str) -> list[Site]:
    """Some places of one package: every kind in turn, no function twice."""
    rng = random.Random(f"{seed} {package}")
    drawn: list[Site] = []
    kinds = [*KINDS]
    rng.shuffle(kinds)
    for turn in range(10 * count):
        used = {(site.file, site.function) for site in drawn}
        some = [
            site
            for site in sites
            if site.kind == kinds[turn % len(kinds)]
            and (site.file, site.function) not in used
        ]
        if some and len(drawn) < count:
            # modules alike, however long: first a module, then a place
            file = rng.choice(sorted({site.file for site in some}))
            drawn.append(rng.choice([site for site in some if site.file == file]))
    return drawn


class Copy:
    """A copy of the tree in which faults are planted and tests run."""

    def __init__(self, tree: pathlib.Path, limit: float):
        self.folder = tempfile.TemporaryDirectory(prefix="tmdjax-mutations-")
        self.tree, self.limit = pathlib.Path(self.folder.name), limit
        for name in COPIED:
            source = tree / name
            if source.is_dir():
                leave = shutil.ignore_patterns("__pycache__")
                shutil.copytree(source, self.tree / name, ignore=leave)
            elif source.exists():
                shutil.copy(source, self.tree / name)
        self.clean: dict[str, str] = {}

    def test(self, tests: str, limit: float | None = None) -> tuple[str, float]:
        """Runs tests until the first failure: verdict and seconds."""
        files, _, selection = tests.partition(" -k ")
        files = [f"tests/{file}" for file in files.split()]
        files = [file for file in files if (self.tree / file).exists()]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", *files]
        if selection:
            command += ["-k", selection.strip("'")]
        began = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=self.tree,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "TMDJAX_PRICE": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            self.output, _ = process.communicate(timeout=limit or self.limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return "timeout", time.monotonic() - began
        # 0 passed; 1 a failure; 2 an error while tests are collected or imported
        verdict = {0: "survived", 1: "caught", 2: "caught", 4: "caught"}
        return verdict.get(process.returncode, "no tests"), time.monotonic() - began

    def passes(self, tests: str) -> bool:
        """Whether tests pass without a fault; looked at once."""
        if tests not in self.clean:
            verdict, seconds = self.test(tests, 600)
            self.clean[tests] = verdict
            print(f"  without a fault: {tests}: {verdict}, {seconds:.0f} s", flush=True)
            if verdict != "survived":
                print(self.output[-1500:])
        return self.clean[tests] == "survived"

    def judge(self, site: Site) -> tuple[str, float, str]:
        """Plants one fault: verdict, seconds and the test that saw it."""
        path = self.tree / site.file
        if not path.exists():
            return "gone", 0.0, ""
        source = path.read_text()
        again = [one for one in Sites(source, site.file).found if one == site]
        if not again:
            return "gone", 0.0, ""
        if not self.passes(site.tests):
            return "fails without it", 0.0, ""
        start, end = again[0].span
        try:
            path.write_text(source[:start] + site.fault + source[end:])
            verdict, seconds = self.test(site.tests)
        finally:
            path.write_text(source)
        failed = [
            line.split(" - ")[0].split("::", 1)[-1].split("tests/")[-1]
            for line in getattr(self, "output", "").splitlines()
            if line.startswith(("FAILED ", "ERROR "))
        ]
        return verdict, seconds, failed[0] if verdict == "caught" and failed else ""


FIELDS = ("file", "function", "kind", "line", "ordinal", "code", "fault")


def recorded(packages) -> list[Site]:
    """The faults of the record."""
    return [
        Site(*(row[name] for name in FIELDS))
        for row in json.loads(RECORD.read_text())["faults"]
        if row["file"].split("/")[1] in packages
    ]


def merged(results: list[tuple[Site, str, str]], column: str) -> dict:
    """The record with one column renewed; what else it says is kept."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    known = record.get("faults", [])
    rows = {tuple(row[name] for name in FIELDS): row for row in known}
    for site, verdict, test in results:
        fields = tuple(getattr(site, name) for name in FIELDS)
        row = rows.setdefault(fields, {**dict(zip(FIELDS, fields)), "verdicts": {}})
        row["tests"] = site.tests
        row["verdicts"][column] = f"{verdict}: {test}" if test else verdict
    return {**record, "faults": list(rows.values())}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, help="draws anew; default: the record's")
    parser.add_argument("--each", type=int, default=5, help="faults in each package")
    parser.add_argument("--only", nargs="+", choices=PACKAGES, default=PACKAGES)
    parser.add_argument("--tree", type=pathlib.Path, default=ROOT)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds a run")
    parser.add_argument("--record", metavar="COLUMN", help="keeps the verdicts")
    parser.add_argument("--list", action="store_true", help="draws and runs nothing")
    arguments = parser.parse_args()
    if arguments.seed is None:
        faults = recorded(arguments.only)
    else:
        places = candidates(arguments.tree, arguments.only)
        faults = [
            site
            for package in arguments.only
            for site in draw(places[package], arguments.seed, arguments.each, package)
        ]
    if arguments.list:
        for site in faults:
            print(f"{site.file}:{site.number} [{site.kind}] {site.line}")
            print(f"    {site.code!r} -> {site.fault!r}   ({site.tests})")
        return 0
    excused = {
        tuple(row[name] for name in FIELDS)
        for row in (json.loads(RECORD.read_text())["faults"] if RECORD.exists() else [])
        if "reason" in row
    }
    copy, results = Copy(arguments.tree.resolve(), arguments.limit), []
    for site in faults:
        verdict, seconds, test = copy.judge(site)
        results.append((site, verdict, test))
        print(f"{verdict:9} {seconds:5.0f} s  {site.id}  {test}", flush=True)
        if arguments.record:
            text = json.dumps(merged(results, arguments.record), indent=1)
            RECORD.write_text(text + "\n")
    counts = collections.Counter(verdict for _, verdict, _ in results)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    bad = [
        (site, verdict)
        for site, verdict, _ in results
        if verdict not in ("caught", "timeout")
        and tuple(getattr(site, name) for name in FIELDS) not in excused
    ]
    for site, verdict in bad:
        print(f"{verdict}: {site.file}: {site.line}")
        print(f"    {site.code!r} -> {site.fault!r}   (tests/{site.tests})")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
