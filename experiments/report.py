"""Joins shards and renders results.

    python -m experiments.report --merge runs/a runs/b [--record]
    python -m experiments.report --render

``--merge`` takes workdirs (or their summary.json) of one config and device kind,
judges the claims on all seeds together and prints them; ``--record`` writes
results/<system>/<tier>.json. ``--render`` writes RESULTS.md from results/ alone.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

from tmdjax.harness import ledger
from tmdjax.harness.config import from_plain
from tmdjax.harness.report import claim_row, text_table
from tmdjax.harness.runner import render_results


def main(arguments: Sequence[str]) -> int:
    """Parses and runs; returns the exit status."""
    flags = argparse.ArgumentParser(
        prog="experiments.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("--merge", nargs="+", type=pathlib.Path, metavar="WORKDIR")
    flags.add_argument("--record", action="store_true")
    flags.add_argument("--render", action="store_true")
    flags.add_argument("--results", type=pathlib.Path, default=pathlib.Path("results"))
    given = flags.parse_args(arguments)
    if not given.merge and not given.render:
        flags.error("give --merge WORKDIR... or --render")
    if given.merge:
        paths = [p / "summary.json" if p.is_dir() else p for p in given.merge]
        merged = ledger.merge([from_plain(json.loads(p.read_text())) for p in paths])
        print(text_table([claim_row(claim) for claim in merged["claims"]]))
        if given.record:
            print(f"recorded {ledger.write_record(given.results, merged)}")
    if given.render or given.record:
        render_results(given.results)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as fault:
        sys.exit(f"{type(fault).__name__}: {fault}")
