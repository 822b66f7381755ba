"""Runs an experiment once for every combination of values, and compares the runs.

    python -m experiments.sweep --config=configs/flow_matching.py:cpu --seeds=0..2
        --sweep.optimizer.learning_rate=3e-4,1e-3 --metrics euler8.frechet

``--sweep.a.b=v,w`` gives the values of a setting (semicolons where a value holds a
comma); ``--config.a.b=v`` and all other flags are those of experiments.run and serve
every run. A run's folder is named after its values, below ``--workdir``; stages that do
not depend on them are made once. Seeds are trained side by side where a system does so.
A sweep that was stopped goes on when the same command is given again. Values are chosen
on the metrics of the same seeds here: judge claims on seeds that were not used for it.
"""

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from experiments import run
from tmdjax.core.files import write_atomically
from tmdjax.harness import ConfigError, load_config
from tmdjax.harness.compare import comparison_rows, read_run
from tmdjax.harness.report import text_table

_PREFIX = "--sweep."


def grid(arguments: Sequence[str]) -> list[tuple[str, ...]]:
    """All combinations of 'a.b=value', from '--sweep.a.b=v,w' arguments.

    Raises:
        ConfigError: no values, a value twice, or a setting twice.
    """
    axes: dict[str, list[str]] = {}
    for argument in arguments:
        name, _, text = argument.removeprefix(_PREFIX).partition("=")
        values = [v.strip() for v in text.split(";" if ";" in text else ",")]
        if not name or not all(values) or len(set(values)) != len(values):
            raise ConfigError(
                f"{argument!r} is not like {_PREFIX}a.b=v,w with values that differ."
            )
        if name in axes:
            raise ConfigError(f"{_PREFIX}{name} stands twice; give all values in one.")
        axes[name] = values
    if not axes:
        raise ConfigError(f"give {_PREFIX}a.b=v,w, the values of a setting.")
    return list(itertools.product(*([f"{n}={v}" for v in axes[n]] for n in axes)))


def main(arguments: Sequence[str]) -> int:
    """Runs the grid; returns the exit status of the run that was stopped, or 0."""
    points = grid([a for a in arguments if a.startswith(_PREFIX)])
    rest = [a for a in arguments if not a.startswith(_PREFIX)]
    flags = run.parser()
    flags.add_argument("--metrics", nargs="+", default=(), help="to compare; all")
    given, overrides = run.parse(flags, rest)
    if not given.config:
        raise ConfigError("give --config=configs/<system>.py:<tier>.")
    if given.record:
        raise ConfigError(
            "--record takes one config, as it stands; record the chosen one by "
            "experiments.run."
        )
    for point in points:  # bad settings fail before anything runs
        config: Any = load_config(given.config, [*overrides, *point])
        run.find_experiment(config, given.config).describe(config)
    tier = given.config.partition(":")[2]
    root = given.workdir or pathlib.Path("runs") / f"{config.system}-{tier}-sweep"
    given.cache = given.cache or root / "stages"
    for number, point in enumerate(points, start=1):
        print(f"\n[{number}/{len(points)}] {' '.join(point)}", flush=True)
        given.workdir = root / folder(point)
        code = run.execute(given, [*overrides, *point])
        if code or not (given.workdir / "summary.json").exists():
            return code
    if given.stage is None and given.shard[1] == 1:
        found = [
            dataclasses.replace(read_run(str(root / folder(point))), name=folder(point))
            for point in points
        ]
        text = text_table(comparison_rows(found, given.metrics))
        print(f"\n{text}")
        write_atomically(root / "sweep.txt", f"{text}\n".encode())
    return 0


def folder(point: Sequence[str]) -> str:
    """The name of a run: the last part of each setting, and its value."""
    split = (setting.partition("=") for setting in point)
    parts = [f"{name.rpartition('.')[2]}={value}" for name, _, value in split]
    return re.sub(r"[^\w.=+-]+", "_", "_".join(parts))


if __name__ == "__main__":
    run.exit_with(main)
