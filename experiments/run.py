"""Runs an experiment: python -m experiments.run --config=configs/x.py:tier.

Any setting of the config is changed by --config.a.b=value. A run that was stopped,
however hard, goes on when the same command is given again.
"""

import argparse
import dataclasses
import pathlib
import re
import shlex
from collections.abc import Sequence
from typing import Any, NoReturn

from experiments.arms import check_devices
from tmdjax.core import compilation_cache
from tmdjax.core.checks import check_count
from tmdjax.core.failures import exit_with
from tmdjax.core.files import named_path
from tmdjax.core.registry import suggestion
from tmdjax.harness import (
    ConfigError,
    Experiment,
    Options,
    Outcome,
    check_experiment,
    dry_run,
    load_config,
    run,
)
from tmdjax.harness.config import load_module
from tmdjax.harness.find import find_module
from tmdjax.harness.records import read_record
from tmdjax.harness.report import text_table
from tmdjax.harness.results_page import verdict_counts
from tmdjax.harness.writers import WRITERS

_MOST_SEEDS = 10_000


class Parser(argparse.ArgumentParser):
    """Errors are one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Raises ConfigError."""
        raise ConfigError(message)


def _seeds(text: str) -> tuple[int, ...]:
    """'0..4' or '0,2,5' or '3'."""
    try:
        if ".." in text:
            first, last = (int(part) for part in text.split(".."))
            seeds = tuple(range(first, min(last, first + _MOST_SEEDS) + 1))
        else:
            seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        seeds = ()
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 0..4 or 0,2,5 or 3")
    if len(seeds) > _MOST_SEEDS:
        raise argparse.ArgumentTypeError(f"{text!r} has more than {_MOST_SEEDS} seeds")
    return seeds


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 0/4")
    return int(found[1]), int(found[2])


def parser() -> argparse.ArgumentParser:
    """The command line, but for --config.a.b=value."""
    flags = Parser(prog="experiments.run", description=__doc__, allow_abbrev=False)
    flags.add_argument("--config", help="configs/<system>.py:<tier>")
    flags.add_argument("--workdir", type=named_path, help="default runs/SYSTEM-TIER")
    flags.add_argument("--cache", type=named_path, help="default WORKDIR/../stages")
    flags.add_argument("--seeds", type=_seeds, default=(0,), help="0..4 or 0,2,5")
    flags.add_argument("--shard", type=_shard, default=(0, 1), help="i/n of the units")
    flags.add_argument("--stage", help="stop after this stage")
    flags.add_argument("--max_seconds", type=float, help="then checkpoint and exit 0")
    flags.add_argument("--fresh", action="store_true", help="discard what there is")
    flags.add_argument(
        "--allow_emulation",
        action="store_true",
        help="8-bit products in float32 where the device has none",
    )
    flags.add_argument("--record", action="store_true", help="write results/")
    flags.add_argument("--tensorboard", action="store_true", help="event files too")
    flags.add_argument("--wandb", action="store_true", help="Weights & Biases too")
    flags.add_argument(
        "--profile", type=int, default=0, nargs="?", const=5, metavar="STEPS",
        help="trace so many steps (5) of every training loop that runs",
    )  # fmt: skip
    flags.add_argument("--dry_run", action="store_true", help="sizes and stages only")
    flags.add_argument("--list", action="store_true", help="what there is to run")
    return flags


def main(arguments: Sequence[str]) -> int:
    """Parses and runs; returns the exit status."""
    flags, overrides = parse(parser(), arguments)
    if flags.list:
        print(text_table(listing()))
        return 0
    if not flags.config:
        raise ConfigError("give --config=configs/<system>.py:<tier>, or --list.")
    if flags.dry_run:
        config: Any = load_config(flags.config, overrides)
        experiment = find_experiment(config, flags.config)
        dry_run(experiment, config, options_of(flags, overrides))
        return 0
    return execute(flags, overrides).code


def execute(flags: argparse.Namespace, overrides: Sequence[str]) -> Outcome:
    """Runs the experiment of parsed flags."""
    compilation_cache.enable()
    config: Any = load_config(flags.config, overrides)
    experiment = find_experiment(config, flags.config)
    options = options_of(flags, overrides)
    labels = check_devices(config, options.tier, allow_emulation=flags.allow_emulation)
    return run(experiment, config, dataclasses.replace(options, labels=labels))


def options_of(flags: argparse.Namespace, overrides: Sequence[str]) -> Options:
    """How to run, from parsed flags."""
    return Options(
        command=command(flags, overrides),
        tier=flags.config.partition(":")[2],
        workdir=flags.workdir,
        cache=flags.cache,
        seeds=flags.seeds,
        shard=flags.shard,
        stage=flags.stage,
        fresh=flags.fresh,
        max_seconds=flags.max_seconds,
        record=flags.record,
        writers=tuple(name for name in WRITERS if getattr(flags, name)),
        profiled_steps=check_count("--profile", flags.profile, 0),
    )


def parse(
    flags: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and what --config.a.b=value changes.

    Raises:
        ConfigError: an unknown argument, or an override without a value.
    """
    overrides = [a.removeprefix("--config.") for a in arguments if _is_override(a)]
    for override in overrides:
        if "=" not in override:
            raise ConfigError(
                f"--config.{override} has no value; write --config.{override}=<value>."
            )
    rest = [a for a in arguments if not _is_override(a)]
    found, unknown = flags.parse_known_args(rest)
    if unknown:
        known = [o for a in flags._actions for o in a.option_strings]
        name = unknown[0].partition("=")[0]
        raise ConfigError(f"unknown argument {name!r}.{suggestion(name, known)}")
    return found, overrides


def find_experiment(config: Any, path: str) -> Experiment:
    """The module that a config file names as EXPERIMENT, else that of its system.

    Args:
        config: of the file, which was loaded.
        path: of the file, with or without ``:tier``.

    Raises:
        ConfigError: there is none, in ``experiments/`` or beside the config.
        TypeError: the module lacks a member of an experiment.
    """
    file = pathlib.Path(path.rpartition(":")[0] or path)
    name = getattr(load_module(file), "EXPERIMENT", config.get("system"))
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(
            f"{path} names the experiment {name!r}; set EXPERIMENT, or config.system, "
            f"to the name of a module."
        )
    found = find_module(name, "experiments")
    if found is None or found.__file__ == str(file.resolve()):
        raise ConfigError(
            f"{path} names the experiment {name!r}, but there is neither "
            f"experiments/{name}.py nor {file.with_name(f'{name}.py')}; write one, or "
            f"set EXPERIMENT in the config."
        )
    return check_experiment(found)


def _is_override(argument: str) -> bool:
    return argument.startswith("--config.")


def command(flags: argparse.Namespace, overrides: Sequence[str]) -> str:
    """What to type for the same result; the summary adds the seeds."""
    parts = ["python", "-m", "experiments.run", f"--config={flags.config}"]
    parts += ["--allow_emulation"] * flags.allow_emulation
    return shlex.join(parts + [f"--config.{override}" for override in overrides])


def listing() -> list[dict[str, Any]]:
    """A row a tier: config, cost and the verdicts of its last record.

    What is wrong with a config or a record stands in the row.
    """
    rows = []
    for path in sorted(pathlib.Path("configs").glob("*.py")):
        try:
            module = load_module(path)
        except ConfigError as error:
            rows.append(_listed(path.as_posix(), None, str(error)))
            continue
        for tier in module.TIERS:
            record, verdicts = pathlib.Path("results", path.stem, f"{tier}.json"), "-"
            if record.exists():
                try:
                    claims = read_record(record)["claims"]
                    verdicts = verdict_counts(claims) or "no claims"
                except ValueError as error:
                    verdicts = str(error)
            cost = getattr(module, "COST", {}).get(tier)
            rows.append(_listed(f"{path.as_posix()}:{tier}", cost, verdicts))
    return rows


def _listed(config: str, cost: str | None, verdicts: str) -> dict[str, Any]:
    return {"config": config, "cost": cost, "last verdicts": verdicts}


if __name__ == "__main__":
    exit_with(main)
