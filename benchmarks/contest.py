"""Contenders timed in turn in one process, and the table of their ratios."""

import argparse
import importlib.util
import json
import os
import pathlib
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table

from tmdjax.core.files import write_atomically
from tmdjax.harness.environment import device_name, versions

Seconds = Mapping[str, float]
"""Of every phase of a run, by name."""

Contender = Callable[[], Seconds]
Row = dict[str, Any]


def options(about: str | None, *, repeats: int | None = None) -> Any:
    """A parser with the options of every benchmark: where to write, how often to time.

    Args:
        about: docstring of the benchmark.
        repeats: default of --repeats; None leaves that option out.
    """
    flags = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--json", type=pathlib.Path, help="also written there")
    if repeats is not None:
        flags.add_argument("--repeats", type=int, default=repeats)
    return flags


def timed(fn: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until all that a call returns is ready, and what it returns."""
    start = time.perf_counter()
    found = jax.block_until_ready(fn())
    return time.perf_counter() - start, found


def timed_torch(fn: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until all that a call of PyTorch began is done, and what it returns."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    found = fn()
    wait()
    return time.perf_counter() - start, found


def torch_rivals(
    make: Callable[[bool], Contender],
    error: Callable[[Any], float],
    facts: dict[str, Any],
) -> dict[str, Contender]:
    """PyTorch's contenders 'eager' and 'compiled', those there are.

    Args:
        make: ``compiled -> contender``; what is under torch.compile is compiled when it
            is called first.
        error: of what a contender makes; raises where it is another computation.
        facts: written into: PyTorch's version, each error, and what is left out and
            why (PyTorch is not installed, or does not compile the network).
    """
    if importlib.util.find_spec("torch") is None:
        facts["left out"] = "PyTorch is not installed (pip install 'tmdjax[parity]')"
        return {}
    import torch

    facts["torch"] = torch.__version__
    found = {}
    for name in ("eager", "compiled"):
        rival = make(name == "compiled")
        try:
            rival()
        except Exception as fault:  # whatever its compiler stumbles over
            if name == "eager":
                raise
            reason = (str(fault).strip().splitlines() or [""])[0]
            facts[f"left out: {name}"] = f"torch.compile: {reason}"
            continue
        facts[f"error.{name}"] = error(rival)
        found[name] = rival
    return found


def check_equal(one: Any, other: Any, most: float) -> float:
    """The norm of the difference of two outputs over that of the first.

    Raises:
        ValueError: it is more than ``most``, or not a number.
    """
    a, b = (np.asarray(each, np.float64) for each in (one, other))
    error = float(np.linalg.norm(a - b) / np.linalg.norm(a))
    if not error < most:
        raise ValueError(
            f"the outputs differ by {error:.2e} of their norm, more than {most:g}: "
            f"these are not the same network."
        )
    return error


def in_turn(
    contenders: Mapping[str, Contender], repeats: int, seed: int = 0
) -> dict[str, list[Seconds]]:
    """What each contender measured in each repeat, after one that does not count."""
    order = np.random.default_rng(seed)
    found: dict[str, list[Seconds]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(repeats):
        for name in order.permutation(list(contenders)):
            found[str(name)].append(contenders[str(name)]())
    return found


def compare(
    what: str,
    ours: Sequence[Seconds],
    rival: Sequence[Seconds],
    goals: Mapping[str, float] | None = None,
) -> list[Row]:
    """A row for each phase both measured: medians, and the ratio with its quartiles."""
    rows = []
    for phase in ours[0]:
        a, b = ([one[phase] for one in each] for each in (ours, rival))
        ratios = [x / y for x, y in zip(a, b)]
        low, high = np.quantile(ratios, [0.25, 0.75])
        rows.append(
            {
                "what": f"{what}: {phase}",
                "unit": "s",
                "ours": statistics.median(a),
                "rival": statistics.median(b),
                "ratio": statistics.median(ratios),
                "quartiles": [float(low), float(high)],
                "goal": (goals or {}).get(phase),
            }
        )
    return rows


def show(rows: Sequence[Row], title: str) -> None:
    """Prints the table."""
    table = rich.table.Table(title=title)
    for column in ("what", "ours", "rival", "ratio", "quartiles", "goal"):
        table.add_column(column, justify="left" if column == "what" else "right")

    def number(value: Any, unit: str = "") -> str:
        return "" if value is None else f"{value:.4g} {unit}".strip()

    for row in rows:
        table.add_row(
            row["what"],
            number(row["ours"], row["unit"]),
            number(row.get("rival"), row["unit"]),
            number(row.get("ratio")),
            " .. ".join(number(x) for x in row.get("quartiles", ())),
            number(row.get("goal")),
        )
    rich.console.Console(width=120).print(table)


def verdict(row: Row) -> str:
    """'met', 'missed' or, without a goal, 'told'.

    A ratio (the figure itself, where there is no rival) is to be at most the goal, or,
    in a row whose 'better' is 'greater', at least.
    """
    value, goal = row.get("ratio", row.get("ours")), row.get("goal")
    if goal is None or value is None:
        return "told"
    met = value >= goal if row.get("better") == "greater" else value <= goal
    return "met" if met else "missed"


def conclude(
    name: str,
    rows: Sequence[Row],
    load: float,
    path: pathlib.Path | None,
    **facts: Any,
) -> None:
    """Prints the table and what it was measured on; writes both as JSON.

    Args:
        name: of the benchmark.
        rows: of the table.
        load: of the machine before.
        path: of the JSON file, or None.
        **facts: what else belongs to it, such as sizes and parts left out.
    """
    found = write(name, rows, load, path, **facts)
    show(rows, f"{name}, {found['device']}")
    for key, value in found.items():
        if key not in ("rows", "versions"):
            print(f"{key}: {value}")


def _without_json(arguments: Sequence[str]) -> list[str]:
    """Arguments but for where the file went, --json=PATH or --json PATH."""
    pairs = zip(["", *arguments], arguments)
    return [a for before, a in pairs if before != "--json" and "--json" not in a]


def write(
    name: str,
    rows: Sequence[Row],
    load: float,
    path: pathlib.Path | None,
    **facts: Any,
) -> dict[str, Any]:
    """Writes the table and what it was measured on as JSON; returns them.

    Args:
        name: of the benchmark.
        rows: of the table.
        load: of the machine before.
        path: of the JSON file, or None.
        **facts: what else belongs to it, such as sizes and parts left out.
    """
    found = {
        "benchmark": name,
        "command": shlex.join(
            ["python", "-m", f"benchmarks.{name}", *_without_json(sys.argv[1:])]
        ),
        "device": device_name(),
        "versions": versions(),
        "load_before_after": [load, os.getloadavg()[0]],
        **facts,
        "rows": [row | {"verdict": verdict(row)} for row in rows],
    }
    if path:
        write_atomically(path, (json.dumps(found, indent=2) + "\n").encode())
    return found
