"""Memory, FLOPs and a roofline of an experiment's steps, before a device is there.

    python -m experiments.plan --config=configs/flow_matching.py:paper --device=h100
    python -m experiments.plan --config=... --mesh=data=1,fsdp=8,tensor=1

An experiment has them planned by a function ``planned(config)``, which returns
``{name: (step, shapes of its arguments, donated arguments)}``: the second argument of a
step is its batch. It may name ``RULES`` by which parameters are cut. The exit status is
1 if a step does not fit the device.
"""

import argparse
import re
from collections.abc import Sequence
from typing import Any

from experiments.run import Parser, exit_with, find_experiment, parse
from tmdjax import train
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
    if not hasattr(experiment, "planned"):
        raise ConfigError(
            f"experiments/{config.system}.py names no step to plan (it has no "
            f"planned(config)); what it describes stands above."
        )
    status = 0
    for name, (step, shapes, donated) in experiment.planned(config).items():
        found = train.plan(
            step,
            *shapes,
            donate_argnums=donated,
            mesh=flags.mesh,
            rules=getattr(experiment, "RULES", ()),
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
