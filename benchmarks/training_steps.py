"""A few training steps of every system, by its own experiment.

    python -m benchmarks.training_steps [--tier=gpu] [--systems boss tmd] [--json=PATH]

Do they run, and how fast? The stages of one arm run as in an experiment, on the
networks and batches of the tier, but every training loop ends after three steps. Told
of each loop: seconds of a step (the faster of the later two), programs compiled after
the first step (none should be, but those that read responses which are resumed), and
for RL the first ratio error, which says whether a rollout's log-probs are those of the
update.
"""

import contextlib
import dataclasses
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np

from benchmarks.contest import Row, conclude, options, write
from experiments.run import find_experiment
from tmdjax.core import compilation_cache
from tmdjax.harness import StageContext, load_config

STEPS = 3
RATIO_ERRORS = {"first_ratio_error": 1e-4, "ratio_error": 1e-4}
"""Names under which RL tells it, and the most it may be in float32 on any device."""


class Case(NamedTuple):
    """One arm of a system, up to the training that is its own.

    Attributes:
        arm: of the gpu tier; the smoke tier has its first arm looked at.
        stage: the last one that runs.
        smoke_stage: the same in the smoke tier, if another.
        changes: of the gpu tier's config, where preparing would take long.
    """

    arm: str
    stage: str
    changes: tuple[str, ...] = ()
    smoke_stage: str | None = None


CASES = {
    "flow_matching": Case("main", "train", ("data.options.train_count=1024",)),
    "boss": Case(
        "sprites",
        "train",
        ("arms.sprites.data.options.train_count=1024",),
        "straighten2",
    ),
    # the arm that needs no images of an installed package
    "flow_equivariant": Case("blocks", "train"),
    "flow_grpo": Case("flow_grpo", "align", ("train.images=1024",)),
    "branchgrpo": Case("branch", "align", ("train.images=1024",)),
    "fp8_training": Case(
        "dit_fp8_rowwise", "train", ("data.options.train_count=1024",)
    ),
    "pde_refiner": Case(
        "refiner",
        "train",
        (
            "data.train_count=64",
            "data.test_count=2",
            "data.test_frames=2",
            "data.warm_up=0",
        ),
    ),
    "policyflow": Case(
        "policyflow", "train", ("train.iterations=3", "train.iterations_per_call=1")
    ),
    "reinflow": Case(
        "maze_reinflow4",
        "train",
        (
            "demonstrations.episodes=16",
            "cloning.steps=3",
            "train.iterations_per_call=1",
        ),
    ),
    "areal": Case("decoupled_4", "rl", ("sft.pairs=512", "sft.look_every=1000")),
    "april": Case("april_4n_ignore", "rl", ("sft.pairs=512", "sft.look_every=1000")),
    "grpo": Case("chain_sum", "rl", ("sft.pairs=512", "sft.look_every=1000")),
    "jet_rl": Case("unified", "rl", ("sft.pairs=512", "sft.look_every=1000")),
    "xrpo": Case("xrpo", "rl", ("sft.pairs=512", "sft.look_every=1000")),
    "scheduling": Case("sync", "calibrate"),
    "tmd": Case(
        "tmd",
        "distill",
        ("data.train_count=512", "data.test_count=64", "teacher.gate=0.0"),
    ),
}


class _Seen(Exception):
    """The last training loop was looked at."""


class FewSteps(StageContext):
    """A stage's context whose training loops end after a few steps, and are timed."""

    def __init__(self, *arguments: Any, last: bool, loops: dict[str, dict], **options):
        super().__init__(*arguments, **options)
        self._last, self._loops = last, loops
        self._rows: list[dict[str, float]] = []

    def rows(self) -> list[dict[str, float]]:
        """The metrics of the steps that were made."""
        return self._rows

    def fit(
        self, state: Any, step_fn: Any, data: Any, *, place: Any = None, **options: Any
    ) -> Any:
        """The state after ``STEPS`` steps."""
        seconds, rows = [], []
        with _compilations() as compiled:
            for step in range(STEPS):
                key = jax.random.fold_in(self.key, step)
                batch = next(data)
                batch = place(batch) if place else batch
                jax.block_until_ready((batch, key))
                compiled.append(0)
                start = time.perf_counter()
                state, metrics = step_fn(state, batch, key)
                jax.block_until_ready((state, metrics))
                seconds.append(time.perf_counter() - start)
                rows.append({k: float(v) for k, v in metrics.items() if not np.ndim(v)})
        self._tell(rows, seconds, compiled)
        return state

    def run_loop(self, loop: Any, **options: Any) -> Any:
        """The state of a loop of its own after ``STEPS`` updates.

        A step is then the time from one update to the next, writing included.
        """
        del options
        rows: list[dict[str, float]] = []
        ends = [time.perf_counter()]
        with _compilations() as compiled:
            compiled.append(0)

            def on_metrics(step: int, metrics: dict[str, float]) -> None:
                rows.append(metrics)
                ends.append(time.perf_counter())
                compiled.append(0)

            result = loop(
                key=self.key,
                checkpoints=None,
                on_metrics=on_metrics,
                on_resume=None,
                should_stop=lambda: len(rows) >= STEPS,
            )
        self._tell(rows, np.diff(ends).tolist(), compiled[: len(rows)])
        return result.state

    def _tell(
        self,
        rows: Sequence[dict[str, float]],
        seconds: Sequence[float],
        compiled: Sequence[int],
    ) -> None:
        """Notes what was seen of each step; the last loop ends the run."""
        self._rows = [
            {**row, "step": i + 1.0, "time/steps_per_second": 1 / took}
            for i, (row, took) in enumerate(zip(rows, seconds))
        ]
        self._loops[self.name] = {
            "first": seconds[0],
            "later": min(seconds[1:]),
            "compiled": sum(compiled[1:]),
            "metrics": rows[0],
        }
        if self._last:
            raise _Seen


@contextlib.contextmanager
def _compilations() -> Iterator[list[int]]:
    """Counts programs that are compiled meanwhile, in the last item of a list."""
    counts: list[int] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            counts[-1] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def loops_of(system: str, tier: str, folder: pathlib.Path) -> dict[str, dict]:
    """What was seen of each training loop up to the case's stage, by stage."""
    case = CASES[system]
    changes = case.changes if tier == "gpu" else ()
    config: Any = load_config(f"configs/{system}.py:{tier}", changes)
    experiment = find_experiment(config, f"configs/{system}.py")
    arms = experiment.arms(config)
    arm = case.arm if case.arm in arms else arms[0]
    loops: dict[str, dict] = {}
    results: dict[str, Any] = {}
    stages = {stage.id: stage for stage in experiment.stages(config, arm)}
    last = (tier == "smoke" and case.smoke_stage) or case.stage
    names = [last]  # and what it stands on
    for name in reversed(list(stages)):
        if any(name in stages[other].parents for other in names):
            names.insert(0, name)
    for name in names:
        stage = stages[name]
        context = FewSteps(
            name,
            0,
            {parent: results[parent] for parent in stage.parents},
            folder / name,
            lambda: False,
            last=name == last,
            loops=loops,
        )
        (folder / name).mkdir(parents=True)
        try:
            found = stage.run(context)
            results[name] = dataclasses.replace(found, outputs=_stored(found.outputs))
        except _Seen:
            pass
    return loops


def _stored(outputs: Any) -> Any:
    """Outputs as a stage finds those of another that were stored: dicts, no classes."""

    def of(leaf: Any) -> Any:
        if not dataclasses.is_dataclass(leaf):
            return leaf
        return {
            f.name: _stored(getattr(leaf, f.name)) for f in dataclasses.fields(leaf)
        }

    return jax.tree.map(of, outputs, is_leaf=dataclasses.is_dataclass)


def rows_of(system: str, loops: dict[str, dict]) -> list[Row]:
    """Rows of the table."""
    rows: list[Row] = []
    for stage, seen in loops.items():
        what = f"{system}, {stage}"
        rows.append({"what": f"{what}: step", "unit": "s", "ours": seen["later"]})
        rows.append(
            {
                "what": f"{what}: programs compiled after the first step",
                "unit": "",
                "ours": float(seen["compiled"]),
                "goal": 0.0,
            }
        )
        for name, most in RATIO_ERRORS.items():
            if name in seen["metrics"]:
                error = seen["metrics"][name]
                told = {"what": f"{what}: first ratio error", "unit": "", "ours": error}
                rows.append({**told, "goal": most})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table; writes it as JSON after every system."""
    flags = options(__doc__)
    flags.add_argument("--tier", default="gpu", choices=("gpu", "smoke"))
    flags.add_argument("--systems", nargs="+", choices=CASES, default=list(CASES))
    given = flags.parse_args(arguments)
    compilation_cache.enable()
    load, facts = os.getloadavg()[0], {}
    rows: list[Row] = []
    told = {"name": "training_steps", "load": load, "tier": given.tier}
    for system in given.systems:
        with tempfile.TemporaryDirectory() as folder:
            try:
                loops = loops_of(system, given.tier, pathlib.Path(folder))
            except Exception as error:  # one system's fault hides no other's figures
                facts[f"failed: {system}"] = f"{type(error).__name__}: {error}"[:400]
                continue
        facts[f"first step, s: {system}"] = {k: v["first"] for k, v in loops.items()}
        rows += rows_of(system, loops)
        write(rows=rows, path=given.json, **told, **facts)
        jax.clear_caches()
    conclude(rows=rows, path=given.json, **told, **facts)
    if any(name.startswith("failed") for name in facts):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
