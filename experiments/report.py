"""Joins shards, compares runs and renders results.

    python -m experiments.report --merge runs/a runs/b [--workdir runs/all] [--record]
    python -m experiments.report --compare runs/a runs/b:arm [--metrics loss ...]
    python -m experiments.report --render

``--merge`` takes workdirs (or their summary.json, or a record) of one config and device
kind, judges the claims on all seeds together and prints them; ``--workdir`` names a
folder for the page and figures of all; ``--record`` makes these too (by default in
runs/SYSTEM-TIER-merged) and writes results/<system>/<tier>.json. ``--compare`` takes
any runs or records, or single arms of them, and sets each against the first on the
seeds both have: difference, its interval and the paired t test, adjusted for all rows.
``--render`` writes RESULTS.md, and in README.md and docs/*.md what stands between
``<!-- table: system:tier -->`` (or ``claims:``) and ``<!-- end -->``, from results/
alone.
"""

import argparse
import pathlib
import re
import shlex
from collections.abc import Sequence
from typing import Any

from experiments.run import Parser, find_experiment, parse, parser
from tmdjax.core.checks import check_name
from tmdjax.core.failures import exit_with
from tmdjax.core.files import named_path, text_of, write_atomically
from tmdjax.harness import ConfigError, load_config, run_report
from tmdjax.harness.claims import claims_of, stated
from tmdjax.harness.compare import comparison_rows, read_run
from tmdjax.harness.config import to_plain
from tmdjax.harness.records import read_records, read_summary, write_record
from tmdjax.harness.report import claim_row, text_table
from tmdjax.harness.results_page import markdown_table, write_results
from tmdjax.harness.summaries import merge, numbers

_MARK = re.compile(r"<!-- (?:table|claims): ")
_MARKED = re.compile(r"<!-- (table|claims): (\w+):(\w+) -->\n.*?<!-- end -->", re.S)


def fill_tables(text: str, results: pathlib.Path) -> str:
    """Renders the marked tables of a Markdown text from the records."""
    records = {(r["system"], r["tier"]): r for r in read_records(results)}

    def table(found: re.Match[str]) -> str:
        kind, system, tier = found.groups()
        if len(_MARK.findall(found[0])) > 1:
            raise ValueError(
                f"{found[0].splitlines()[0]} has no <!-- end --> before the next table."
            )
        if (system, tier) not in records:
            raise ValueError(f"{found[0].splitlines()[0]} has no record in {results}.")
        record = records[system, tier]
        if kind == "claims":
            rows = [claim_row(claim) for claim in record["claims"]]
        else:
            path = f"configs/{system}.py:{tier}"
            config = load_config(path)
            experiment = find_experiment(config, path)
            rows = experiment.summary_rows(config, numbers(record))
        lines = [
            f"<!-- {kind}: {system}:{tier} -->",
            *markdown_table(rows),
            "",
            f"Means over seeds {', '.join(map(str, record['seeds']))} on "
            f"{record['device']}: `{record['command']} --record`",
            "<!-- end -->",
        ]
        return "\n".join(lines)

    return _MARKED.sub(table, text)


def check_claims(results: pathlib.Path) -> None:
    """Refuses records whose claims are not those of their configs.

    Raises:
        ValueError: a statement, metric, direction or threshold that differs; a claim
            that one has and the other lacks.
    """
    for record in read_records(results):
        path = f"configs/{record['system']}.py:{record['tier']}"
        if not pathlib.Path(path.partition(":")[0]).exists():
            continue  # a paper from another folder
        now = {claim.id: claim for claim in claims_of(to_plain(load_config(path)))}
        then = {claim.id: claim for claim in stated(record["claims"])}
        for name in {**now, **then}:
            if now.get(name) != then.get(name):
                raise ValueError(
                    f"claim {name!r} of {results}/{record['system']}/"
                    f"{record['tier']}.json is {then.get(name)}, in {path} it is "
                    f"{now.get(name)}. No claim changes after its result is seen: "
                    f"restore the one that was changed or left out, or record the run "
                    f"again."
                )


def pages(root: pathlib.Path) -> list[pathlib.Path]:
    """The Markdown pages that hold tables."""
    return [root / "README.md", *sorted(root.glob("docs/*.md"))]


def comparison(runs: Sequence[str], metrics: Sequence[str]) -> str:
    """The table of runs against the first, and a line of what to mind."""
    found = [read_run(run) for run in runs]
    text = text_table(comparison_rows(found, metrics))
    devices = sorted({run.device for run in found})
    if len(devices) > 1:
        text += f"\n\nRan on different devices: {'; '.join(devices)}."
    return text


def show_merged(
    merged: dict[str, Any], paths: Sequence[pathlib.Path], workdir: pathlib.Path | None
) -> run_report.Figures:
    """Writes the page and figures of joined runs, by the config of their command.

    Args:
        merged: their summary.
        paths: of the runs; of those that are workdirs, logs and pictures are shown.
        workdir: for all of it; None is runs/SYSTEM-TIER-merged.

    Raises:
        ConfigError: the command names none, or one that cannot be loaded.
    """
    try:
        words = shlex.split(merged["command"].partition("\n")[0])
    except ValueError:  # a quotation without an end
        words = []
    flags, overrides = parse(parser(), words[3:])  # python -m experiments.run
    if not flags.config:
        raise ConfigError(
            f"the runs were made by {merged['command']!r}, which names no --config; "
            f"without it there is neither page nor record."
        )
    config = load_config(flags.config, overrides)
    experiment = find_experiment(config, flags.config)
    folders = [path for path in paths if path.is_dir()]
    name = f"{merged['system']}-{merged['tier']}-merged"
    workdir = workdir or pathlib.Path("runs", check_name("the run", name))
    return run_report.show_joined(workdir, experiment, config, merged, folders)


def main(arguments: Sequence[str]) -> int:
    """Parses and runs; returns the exit status."""
    flags = Parser(
        prog="experiments.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("--merge", nargs="+", type=named_path, metavar="WORKDIR")
    flags.add_argument("--compare", nargs="+", metavar="RUN[:ARM]")
    flags.add_argument("--metrics", nargs="+", default=(), help="to compare; all")
    flags.add_argument("--workdir", type=named_path, help="of what is merged")
    flags.add_argument("--record", action="store_true")
    flags.add_argument("--render", action="store_true")
    flags.add_argument("--results", type=named_path, default=pathlib.Path("results"))
    given = flags.parse_args(arguments)
    if not (given.merge or given.compare or given.render):
        flags.error("give --merge WORKDIR..., --compare RUN... or --render")
    for flag, of in (("metrics", "compare"), ("workdir", "merge"), ("record", "merge")):
        if getattr(given, flag) and not getattr(given, of):
            flags.error(f"--{flag} goes with --{of}; leave it out, or give that too")
    if given.compare:
        print(comparison(given.compare, given.metrics))
    if given.merge:
        paths = [p / "summary.json" if p.is_dir() else p for p in given.merge]
        merged = merge([read_summary(path) for path in paths])
        if given.workdir or given.record:
            figures = show_merged(merged, given.merge, given.workdir)
            if given.record:
                record = write_record(given.results, merged, figures)
                print(f"recorded {record}")
        else:
            print(text_table([claim_row(claim) for claim in merged["claims"]]))
    if given.render or given.record:
        check_claims(given.results)
        root = write_results(given.results).parent
        for page in filter(pathlib.Path.exists, pages(root)):
            text = text_of(page)
            filled = fill_tables(text, given.results)
            if filled != text:
                write_atomically(page, filled.encode())
    return 0


if __name__ == "__main__":
    exit_with(main)
