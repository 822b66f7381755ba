"""RESULTS.md: one page on what was claimed, what came out, and what it was run on.

It is rendered from the records (``results/<system>/<tier>.json``), a sentence and a
picture for each of them (``results/findings.toml``, written by hand, without figures)
and the benchmarks (``benchmarks/results/*.json``). Metrics stay in the records and in
the report of a run.
"""

import os
import shlex
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tmdjax.core.checks import check_name
from tmdjax.core.files import json_of, text_of, write_atomically
from tmdjax.harness.logs import format_duration
from tmdjax.harness.records import PICTURES, order, read_records
from tmdjax.harness.report import claim_row, format_value
from tmdjax.harness.summaries import Summary

Findings = Mapping[str, Mapping[str, Mapping[str, str]]]
"""By system and tier: "finding", a sentence, "picture", a file beside it, and
"caption", what it shows of which arm and seed, where the record does not say so."""

_FINDING = ("finding", "picture", "caption")

NO_GPU = (
    "**No GPU result is recorded yet.** Every claim below was judged on two CPU cores, "
    "at a size that fits them; the gpu tiers are ready to run and have not been run."
)


def write_results(results: str | os.PathLike[str]) -> Path:
    """Writes RESULTS.md beside the folder of records.

    Args:
        results: of records; ``benchmarks/results`` is looked for beside it.

    Raises:
        ValueError: no record in the folder, a file that is not a record or a benchmark,
            or findings that are damaged or of what is not recorded.
    """
    results = Path(results)
    records = read_records(results)
    if not records:
        raise ValueError(
            f"there is no record (SYSTEM/TIER.json) in {results}, so RESULTS.md stays "
            f"as it is; give the folder that --record writes to by --results."
        )
    findings, known = (
        read_findings(results),
        {(r["system"], r["tier"]) for r in records},
    )
    for system, tier in ((s, t) for s, tiers in findings.items() for t in tiers):
        if (system, tier) not in known:
            raise ValueError(
                f"{results}/findings.toml has {system}.{tier}, of which there is no "
                f"record; mend its name, or take it out until there is one."
            )
    root = Path(os.path.abspath(results)).parent
    benchmarks = read_benchmarks(root / "benchmarks" / "results")
    text = render(records, findings, benchmarks)
    path = root / "RESULTS.md"
    write_atomically(path, text.encode())
    return path


def read_findings(results: str | os.PathLike[str]) -> Findings:
    """The sentences and pictures of ``<results>/findings.toml``; none where absent.

    Raises:
        ValueError: it is not TOML, holds anything else than these, or names a picture
            that is not there.
    """
    path = Path(results, "findings.toml")
    if not path.exists():
        return {}
    try:
        findings = tomllib.loads(text_of(path))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}.") from error
    for system, tiers in findings.items():
        for tier, found in tiers.items() if isinstance(tiers, dict) else [("", tiers)]:
            texts = found.items() if isinstance(found, dict) else [("", found)]
            if not all(k in _FINDING and isinstance(t, str) for k, t in texts):
                raise ValueError(
                    f"{path}: {system}.{tier} is {found!r}; a finding is a table "
                    f"[SYSTEM.TIER] of texts called {', '.join(_FINDING)}."
                )
            picture = found.get("picture")
            if picture:
                check_name(f"{path}: picture", picture)
            if picture and not Path(results, system, picture).exists():
                raise ValueError(
                    f"{path} shows {picture!r} for {system}.{tier}, which is not in "
                    f"{Path(results, system)}; name a figure that is there."
                )
    return findings


def read_benchmarks(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """What ``benchmarks.contest.conclude`` wrote, by file name.

    Raises:
        ValueError: a file of another kind; names it.
    """
    found = []
    for path in sorted(Path(folder).glob("[!.]*.json")):
        found.append(json_of(path))
        try:
            markdown_table(_benchmark_rows(found[-1]))
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{path} is no result of a benchmark ({error!r}); move it away, or run "
                f"the benchmark again."
            ) from error
    return found


def render(
    records: Iterable[Summary],
    findings: Findings | None = None,
    benchmarks: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The page; the same text in any order of records.

    Args:
        records: as read by :func:`tmdjax.harness.records.read_records`.
        findings: by system and tier, "finding", a sentence, "picture", the name of a
            file in the system's folder of records, and "caption", what it shows.
        benchmarks: as read by :func:`read_benchmarks`.
    """
    records = sorted(records, key=order)
    lines = ["# Results", ""]
    lines += ["Rendered by `python -m experiments.report --render`; do not edit."]
    if all(record["device"].startswith("cpu") for record in records):
        lines += ["", NO_GPU]
    if records:
        lines += [
            "",
            "A unit is one arm under one seed. Times are sums over processes; where a "
            "record does not hold times of stages, stages that units share count in "
            "each, and the run took less.",
        ]
        lines += ["", *markdown_table([_overview(record) for record in records])]
    for record in records:
        found = (findings or {}).get(record["system"], {}).get(record["tier"], {})
        lines += ["", f"## {record['system']}, {record['tier']} tier", ""]
        lines += _section(record, found)
    if benchmarks:
        lines += ["", "## Benchmarks", ""]
        lines += [
            "Medians over repeats in one process; a ratio is ours over the rival's in "
            "the same repeat: of seconds, bytes and counts below 1 is better, of a "
            "rate (1/s) above 1.",
            "",
            *markdown_table([r for each in benchmarks for r in _benchmark_rows(each)]),
        ]
    return "\n".join(lines) + "\n"


def verdict_counts(claims: Iterable[Mapping[str, Any]]) -> str:
    """'5 reproduced, 1 inconclusive', most frequent first; '' where there is none."""
    counts = Counter(claim["verdict"] for claim in claims)
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a Markdown table; the first row's keys head it."""
    header = list(rows[0])
    rule = f"|{'---|' * len(header)}"
    return [_markdown_row(header), rule, *(_markdown_row(r.values()) for r in rows)]


def _overview(record: Summary) -> dict[str, Any]:
    title = f"{record['system']}, {record['tier']} tier"
    anchor = title.replace(",", "").replace(" ", "-").lower()
    return {
        "system": f"[{record['system']}](#{anchor})",
        "tier": record["tier"],
        "verdicts": verdict_counts(record["claims"]) or "no claims",
        "seeds": len(record["seeds"]),
        "device": record["device"],
        "time, summed over stages": format_duration(record["wall_s"]),
    }


def _section(record: Summary, found: Mapping[str, str]) -> list[str]:
    system, tier = record["system"], record["tier"]
    lines = [found["finding"], ""] if found.get("finding") else []
    if picture := found.get("picture"):
        lines += [f"![{system}, {tier} tier](results/{system}/{picture})", ""]
        caption = record.get(PICTURES, {}).get(picture) or found.get("caption")
        if caption:
            lines += [f"The picture: {caption}. The claims are of all seeds.", ""]
    peak = record["peak_memory_gb"]
    memory = "" if peak is None else f", peak memory {format_value(peak)} GB"
    lines += [
        f"On {record['device']}, seeds {', '.join(map(str, record['seeds']))}, "
        f"{format_duration(record['wall_s'])}{memory}, commit {record['commit']}; "
        f"every metric is in `results/{system}/{tier}.json`:",
        "",
        "```",
        _wrapped(record["command"]),
        "```",
    ]
    if record["claims"]:
        lines += ["", *markdown_table([claim_row(c) for c in record["claims"]])]
    return lines


def _wrapped(commands: str, column: int = 76) -> str:
    """Commands, one a line, cut between words where they are longer than a page.

    A shell reads the same words as before. What ``shlex.join`` has not written stays as
    it is: what a cut would do to it is not known.
    """
    try:
        given = [shlex.split(line) for line in commands.split("\n")]
    except ValueError:  # a quotation that goes over lines
        return commands
    if "\n".join(map(shlex.join, given)) != commands:
        return commands
    wrapped = []
    for words in given:
        lines = [""]
        for word in map(shlex.quote, words):
            longer = f"{lines[-1]} {word}" if lines[-1] else word
            if lines[-1] and len(longer) > column - 2:  # " \\" follows
                lines.append(f"    {word}")
            else:
                lines[-1] = longer
        wrapped.append(" \\\n".join(lines))
    return "\n".join(wrapped)


def _benchmark_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for row in found["rows"]:
        quartiles = " .. ".join(format_value(x) for x in row.get("quartiles", ()))
        ours, rival = (
            None
            if row.get(name) is None
            else f"{format_value(row[name])} {row['unit']}"
            for name in ("ours", "rival")
        )
        rows.append(
            {
                "benchmark": found["benchmark"],
                "what": row["what"],
                "ours": ours,
                "rival": rival,
                "ratio": row.get("ratio"),
                "quartiles": quartiles or None,
                "goal": _goal(row),
                "device": found["device"],
            }
        )
    return rows


def _goal(row: Mapping[str, Any]) -> str | None:
    """The bound of a ratio, or of the figure itself; None where none was set."""
    if row.get("goal") is None:
        return None
    side = "least" if row.get("better") == "greater" else "most"
    return f"at {side} {format_value(row['goal'])}"


def _markdown_row(cells: Iterable[Any]) -> str:
    texts = (" ".join(format_value(cell).split()) for cell in cells)
    escaped = (text.replace("|", "\\|") for text in texts)
    return f"| {' | '.join(escaped)} |"
