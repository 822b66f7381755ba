"""Memory, FLOPs and a roofline of an experiment's steps, before a device is there.

    python -m experiments.plan --config=configs/flow_matching.py:paper --device=h100
    python -m experiments.plan --config=... --mesh=data=1,fsdp=8,tensor=1

The steps are those of the experiment's ``updates(config)``; its ``RULES`` say how
parameters are cut over a mesh. The exit status is 1 if a step does not fit the device.
"""

import argparse
import re
from collections.abc import Sequence
from typing import Any

from experiments.run import Parser, find_experiment, parse
from tmdjax import train
from tmdjax.core.failures import exit_with
from tmdjax.harness import ConfigError, load_config
from tmdjax.harness.report import text_table


def _mesh(text: str) -> Any:
    """'data=1,fsdp=8,tensor=1'; what is left out is 1."""
    parts = [re.fullmatch(r"(data|fsdp|tensor)=([1-9]\d*)", p) for p in text.split(",")]
    sizes = {part[1]: int(part[2]) for part in parts if part}
    if len(sizes) != len(parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not like data=1,fsdp=8,tensor=1")
    return train.abstract_mesh(**sizes)


def parser() -> argparse.ArgumentParser:
    """The command line, but for --config.a.b=value."""
    flags = Parser(prog="experiments.plan", description=__doc__, allow_abbrev=False)
    flags.add_argument("--config", help="configs/<system>.py:<tier>")
    flags.add_argument("--mesh", type=_mesh, help="data=1,fsdp=8,tensor=1")
    flags.add_argument("--device", default="h100", help=", ".join(train.DEVICES))
    return flags


def main(arguments: Sequence[str]) -> int:
    """Prints a table a step; returns the exit status."""
    flags, overrides = parse(parser(), arguments)
    if not flags.config:
        raise ConfigError("give --config=configs/<system>.py:<tier>.")
    device = train.get_device(flags.device)
    config: Any = load_config(flags.config, overrides)
    experiment = find_experiment(config, flags.config)
    described = experiment.describe(config)  # refuses impossible settings
    rows = [{"what": name, "value": value} for name, value in described.items()]
    print(text_table(rows))
    updates = experiment.updates(config)
    if not updates:
        raise ConfigError(
            f"the experiment of {flags.config} names no step to plan (it has no "
            f"updates(config)); what it describes stands above."
        )
    status = 0
    for name, (step, shapes, donated) in updates.items():
        found = train.plan(
            step,
            *shapes,
            donate_argnums=donated,
            mesh=flags.mesh,
            rules=experiment.RULES,
            device=device,
        )
        print(f"\n{name}\n{text_table(found.rows(device))}")
        try:
            train.check_fits(found, device)
        except ValueError as refused:
            print(refused)
            status = 1
    print(f"\n{train.NOT_TOLD}")
    return status


if __name__ == "__main__":
    exit_with(main)
