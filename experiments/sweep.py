r"""Runs an experiment once for every combination of values, and compares the runs.

    python -m experiments.sweep --config=configs/flow_matching.py:cpu --seeds=0..2 \
        --sweep.optimizer.learning_rate=3e-4,1e-3 --metrics euler8.frechet

``--sweep.a.b=v,w`` gives the values of a setting (semicolons where a value holds a
comma). Without any, the values are those that the config file states as ``SWEEP``, a
tuple of 'a.b=v,w' texts, each tried alone beside the config as it is:

    python -m experiments.sweep --config=configs/xrpo.py:cpu --config.arms=grpo,xrpo

``--config.a.b=v``, ``--seeds``, ``--stage``, ``--max_seconds`` (of the whole sweep),
``--dry_run`` and the loggers are those of experiments.run. A run's folder is
named after its values, below ``--workdir``; stages that do not depend on them are made
once. Seeds are trained side by side where a system does so. A sweep that was stopped
goes on when the same command is given again. Values are chosen on the metrics of the
same seeds here: judge claims on seeds that were not used for it.
"""

import argparse
import dataclasses
import itertools
import pathlib
import re
import time
from collections.abc import Sequence
from typing import Any

from experiments import run
from tmdjax.core.failures import exit_with
from tmdjax.core.files import write_atomically
from tmdjax.core.registry import suggestion
from tmdjax.harness import ConfigError, check_run, dry_run, load_config
from tmdjax.harness.compare import comparison_rows, read_run
from tmdjax.harness.config import load_module, to_plain
from tmdjax.harness.experiment import measured
from tmdjax.harness.report import text_table

_PREFIX = "--sweep."
_PLAIN = "plain"


def grid(arguments: Sequence[str]) -> list[tuple[str, ...]]:
    """All combinations of 'a.b=value', from '--sweep.a.b=v,w' arguments.

    Raises:
        ConfigError: no values, a value twice, or a setting twice. Values that are
        written in two ways, such as 1e-3 and 0.001, are found when the configs are
        read.
    """
    return list(itertools.product(*_axes(arguments)))


def one_at_a_time(spec: str) -> list[tuple[str, ...]]:
    """No change, and every 'a.b=value' alone that a config file states as SWEEP.

    Args:
        spec: 'configs/x.py:tier', of a file that was loaded.

    Raises:
        ConfigError: the file states none, or not as :func:`grid` reads them.
    """
    path = pathlib.Path(spec.rpartition(":")[0])
    stated = getattr(load_module(path), "SWEEP", ())
    if not stated:
        raise ConfigError(
            f"give {_PREFIX}a.b=v,w, the values of a setting; {path} states no SWEEP "
            f"that could be tried without."
        )
    return [(), *((value,) for axis in _axes(stated) for value in axis)]


def _axes(arguments: Sequence[str]) -> list[list[str]]:
    """The 'a.b=value' of each setting."""
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
    return [[f"{name}={value}" for value in axes[name]] for name in axes]


def main(arguments: Sequence[str]) -> int:
    """Runs the grid; returns the exit status of the run that was stopped, or 0."""
    flags = run.parser()
    flags.prog, flags.description = "experiments.sweep", __doc__
    flags.formatter_class = argparse.RawDescriptionHelpFormatter
    flags.add_argument("--metrics", nargs="+", default=(), help="to compare; all")
    rest = [a for a in arguments if not a.startswith(_PREFIX)]
    given, overrides = run.parse(flags, rest)
    swept = [a for a in arguments if a.startswith(_PREFIX)]
    if not given.config:
        raise ConfigError("give --config=configs/<system>.py:<tier>.")
    _refuse(given)
    load_config(given.config, overrides)  # a file that is not there is refused here
    points = grid(swept) if swept else one_at_a_time(given.config)
    names = [folder(point) for point in points]
    if len(set(names)) < len(names) or len(names) < 2:
        raise ConfigError(
            f"the runs would be called {', '.join(names)}; give two or more values, "
            f"whose letters, digits and .=+- differ."
        )
    root, configs = _check(given, overrides, points)
    given.cache = given.cache or root / "stages"
    deadline = None
    if given.max_seconds is not None:
        deadline = time.monotonic() + given.max_seconds
    for number, (point, name) in enumerate(zip(points, names), start=1):
        print(f"\n[{number}/{len(points)}] {' '.join(point) or _PLAIN}", flush=True)
        given.workdir = root / name
        if given.dry_run:
            experiment = run.find_experiment(configs[0], given.config)
            options = run.options_of(given, [*overrides, *point])
            dry_run(experiment, configs[number - 1], options)
            continue
        if deadline is not None:
            given.max_seconds = max(0.0, deadline - time.monotonic())
        outcome = run.execute(given, [*overrides, *point])
        if not outcome.finished:
            print("the sweep is not finished; the same command goes on from here.")
            return outcome.code
    if given.stage is None and not given.dry_run:
        found = [
            dataclasses.replace(read_run(str(root / name)), name=name) for name in names
        ]
        text = text_table(comparison_rows(found, given.metrics))
        print(f"\n{text}")
        write_atomically(root / "sweep.txt", f"{text}\n".encode())
    return 0


def _refuse(given: Any) -> None:
    """Raises ConfigError for flags that would not mean what they say."""
    for flag, remedy in (
        ("record", "record the chosen config by experiments.run"),
        ("list", "use experiments.run"),
        ("fresh", "delete the folder of the sweep, or choose another --workdir"),
    ):
        if getattr(given, flag):
            raise ConfigError(f"--{flag} does not go with a sweep; {remedy}.")
    if given.shard[1] > 1:
        raise ConfigError(
            "--shard does not go with a sweep; give each machine some of the values, "
            "and join them by experiments.report --compare."
        )


def _check(
    given: Any, overrides: Sequence[str], points: Sequence[Sequence[str]]
) -> tuple[pathlib.Path, list[Any]]:
    """Bad settings, claims and metrics fail here, before anything runs."""
    configs: list[Any] = [load_config(given.config, [*overrides, *p]) for p in points]
    experiment = run.find_experiment(configs[0], given.config)
    tier = given.config.partition(":")[2]
    root = given.workdir or pathlib.Path("runs") / f"{configs[0].system}-{tier}-sweep"
    for one, other in itertools.combinations(range(len(points)), 2):
        if to_plain(configs[one]) == to_plain(configs[other]):
            a, b = (" ".join(points[i]) or "no change" for i in (one, other))
            raise ConfigError(f"{a} and {b} are one config; give values that differ.")
    for config in configs:
        check_run(experiment, config, run.options_of(given, overrides))
        known = measured(experiment, config)
        for metric in given.metrics:
            if metric not in known:
                raise ConfigError(
                    f"--metrics: {metric!r} is not measured by every run."
                    f"{suggestion(metric, known)}"
                )
    return root, configs


def folder(point: Sequence[str]) -> str:
    """The name of a run: the last part of each setting, and its value; or 'plain'."""
    split = (setting.partition("=") for setting in point)
    parts = [f"{name.rpartition('.')[2]}={value}" for name, _, value in split]
    return re.sub(r"[^\w.=+-]+", "_", "_".join(parts)) or _PLAIN


if __name__ == "__main__":
    exit_with(main)
