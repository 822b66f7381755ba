"""Claims, verdicts and records: what a result file says and how it is joined.

A run ends in a *summary*: its units (one arm under one seed each), their means and
the judged claims. Shards of one run merge into the summary of the whole. A recorded
summary is ``results/<system>/<tier>.json``; :mod:`tmdjax.harness.results_page` renders
these files.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tmdjax.core.checks import check_choice
from tmdjax.core.files import write_atomically
from tmdjax.core.registry import suggestion
from tmdjax.harness.config import from_plain, to_plain
from tmdjax.metrics.intervals import paired_interval, t_interval

STATISTICS = ("ratio", "difference", "exact", "report")
DIRECTIONS = ("greater", "less", "equal")
PAIRINGS = ("separate", "vmapped")
TIERS = ("smoke", "cpu", "gpu", "paper")
MAIN_ARM = "main"
"""The arm of an experiment that has only one; its metrics carry no prefix."""

SUMMARY_KEYS = (
    "system",
    "tier",
    "metrics",
    "device",
    "wall_s",
    "peak_memory_gb",
    "seeds",
    "command",
    "commit",
    "claims",
    "config_hash",
    "versions",
    "labels",
    "units",
)
UNIT_KEYS = (
    "arm",
    "seed",
    "metrics",
    "wall_s",
    "peak_memory_gb",
    "device",
    "commit",
    "versions",
    "labels",
)

Summary = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement to check, fixed before the run.

    Attributes:
        id: label of the sheet, without brackets ('O1', '1a').
        statement: what is claimed, in words.
        published: the number in the source, as text or number; None if it has none.
        statistic: how seeds are compared: 'ratio' or 'difference' of ours and
            baseline (of ours alone, where there is no baseline); 'exact' for
            identities and counts; 'report' for a number without a threshold.
        direction: which side of the threshold supports the claim: 'greater' or
            'less'; 'equal' goes with 'exact'. Not used by 'report'.
        threshold: the bound. Not used by 'report'.
        ours: metric name, 'arm/name', or 'name' of the arm 'main'.
        baseline: metric name of the arm to compare with, or None.
        simulated: the numbers come from a simulated clock.

    Raises:
        ValueError: fields that do not fit together; names the claim.
    """

    id: str
    statement: str
    published: str | float | None
    statistic: str
    direction: str | None = None
    threshold: float | None = None
    ours: str
    baseline: str | None = None
    simulated: bool = False

    def __post_init__(self) -> None:
        where = f"claim {self.id!r}:"
        check_choice(f"{where} statistic", self.statistic, STATISTICS)
        for name in ("id", "statement", "ours"):
            if not getattr(self, name).strip():
                raise ValueError(f"{where} {name} is empty; fill it in.")
        if self.baseline == self.ours:
            raise ValueError(
                f"{where} baseline and ours are both {self.ours!r}; compare two "
                f"metrics, or leave the baseline out."
            )
        if self.statistic == "report":
            return
        allowed = DIRECTIONS[2:] if self.statistic == "exact" else DIRECTIONS[:2]
        check_choice(f"{where} direction", str(self.direction), allowed)
        if self.threshold is None or not math.isfinite(self.threshold):
            raise ValueError(
                f"{where} threshold is {self.threshold}; a {self.statistic} needs a "
                f"finite one, fixed before the run."
            )


def judge(
    claim: Claim,
    per_seed: Sequence[Mapping[str, float]],
    seeds: Sequence[int],
    tier: str,
    *,
    pairing: str = "separate",
) -> dict[str, Any]:
    """Judges one claim by the seeds that were run.

    The 95 % interval over seeds decides: with five seeds or more, 'reproduced' if
    it lies wholly on the right side of the threshold, 'not reproduced' if wholly on
    the other, else 'inconclusive' (also where a seed is not finite, or a ratio has
    a number that is not positive). Three or four seeds are a 'pilot', fewer are
    'reported'. An 'exact' claim is 'exact' if every seed equals the threshold, else
    'not reproduced', and its value is the seed farthest from it; 'report' is
    'reported', and a simulated claim 'simulated'.

    Args:
        claim: what to judge.
        per_seed: metrics by name, one dict a seed.
        seeds: the seed of each dict.
        tier: named in errors.
        pairing: how the seeds of the arms were run, 'separate' or 'vmapped'.

    Returns:
        A dict with keys id, statement, published, statistic, direction, threshold,
        ours and baseline (numbers by seed; None without a baseline), ours_metric,
        baseline_metric, pairing, value, ci95 ([low, high], None where unknown) and
        verdict.

    Raises:
        ValueError: no seed, a seed twice, or a seed without the metric.
    """
    check_choice("pairing", pairing, PAIRINGS)
    if len(per_seed) != len(seeds) or not seeds:
        raise ValueError(
            f"claim {claim.id!r} has metrics of {len(per_seed)} seed(s) for seeds "
            f"{list(seeds)}; give one dict a seed, at least one."
        )
    if len(set(seeds)) != len(seeds):
        raise ValueError(
            f"claim {claim.id!r} has a seed twice: {list(seeds)}; each counts once."
        )
    ours = _column(claim, claim.ours, per_seed, seeds, tier)
    baseline = None
    if claim.baseline is not None:
        baseline = _column(claim, claim.baseline, per_seed, seeds, tier)
    return _judged(claim, ours, baseline, pairing)


def summary(
    *,
    system: str,
    tier: str,
    command: str,
    config_hash: str,
    units: Iterable[Mapping[str, Any]],
    claims: Sequence[Claim] = (),
    pairing: str = "separate",
    complete: bool = True,
) -> Summary:
    """Builds the summary of a run, or of a shard of one.

    Args:
        system: name of the system.
        tier: name of the tier.
        command: what to type, without seeds and shards: the seeds of the units are
            added.
        config_hash: from :func:`tmdjax.harness.config.config_hash`.
        units: one dict an arm and seed: ``arm``, ``seed``, ``metrics`` {name: number},
            ``wall_s``, ``peak_memory_gb`` (or None), and where the numbers come from:
            ``device`` (kind), ``commit``, ``versions`` {package: version}, ``labels``
            {name: text}, such as that of the net behind a Frechet distance; and, if
            known, ``stage_s`` {hash of a stage: seconds}.
        claims: what to judge. A claim takes the seeds that have both its metrics.
        pairing: how seeds were run, 'separate' or 'vmapped'.
        complete: whether all arms are here; a shard (False) leaves claims whose
            metrics nobody has measured open: no numbers, 'reported'.

    Returns:
        A dict with ``SUMMARY_KEYS``. ``metrics`` are means over seeds ('name' of the
        arm 'main', 'arm/name' of others), ``wall_s`` the sum over units, in which a
        stage that several share counts once where ``stage_s`` tells, and
        ``peak_memory_gb`` the maximum; commits and versions that differ stand side by
        side.

    Raises:
        ValueError: no unit, one without its keys, an (arm, seed) twice with
            different content, units of several devices or labels, two claims of one
            id, or, if complete, a claim about a metric that no unit has.
    """
    check_choice("pairing", pairing, PAIRINGS)
    units = _join_units(units)
    ids = [claim.id for claim in claims]
    if len(set(ids)) != len(ids):
        raise ValueError(f"two claims share an id: {ids}; ids are unique in a system.")
    per_seed = _metrics_by_seed(units)
    measured = sorted({name for metrics in per_seed.values() for name in metrics})
    if complete:
        for claim in claims:
            for name in (claim.ours, claim.baseline):
                if name is not None and name not in measured:
                    raise ValueError(
                        f"claim {claim.id!r} is about metric {name!r}, which no unit "
                        f"measured; measured: {', '.join(measured)}."
                        f"{suggestion(name, measured)}"
                    )
    peaks = [u["peak_memory_gb"] for u in units if u["peak_memory_gb"] is not None]
    packages = sorted({name for unit in units for name in unit["versions"]})
    names = sorted({name for unit in units for name in unit["labels"]})
    seeds = sorted(per_seed)
    return {
        "system": system,
        "tier": tier,
        "metrics": {name: _mean(name, per_seed) for name in measured},
        "device": _common("device", [unit["device"] for unit in units]),
        "wall_s": _seconds(units),
        "peak_memory_gb": max(peaks, default=None),
        "seeds": seeds,
        "command": with_seeds(command, seeds),
        "commit": side_by_side(unit["commit"] for unit in units),
        "claims": [_judge_measured(c, per_seed, tier, pairing) for c in claims],
        "config_hash": config_hash,
        "versions": {
            name: side_by_side(
                u["versions"][name] for u in units if name in u["versions"]
            )
            for name in packages
        },
        "labels": {
            name: _common(
                f"label {name!r}",
                [u["labels"][name] for u in units if name in u["labels"]],
            )
            for name in names
        },
        "units": units,
    }


def with_seeds(command: str, seeds: Sequence[int]) -> str:
    """The command for these seeds (0 is the default and is left out)."""
    lines = [re.sub(r" --(seeds|shard)=\S+", "", line) for line in command.split("\n")]
    seeds = sorted(seeds)
    if seeds == [0]:
        suffix = ""
    elif len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1)):
        suffix = f" --seeds={seeds[0]}..{seeds[-1]}"
    else:
        suffix = f" --seeds={','.join(map(str, seeds))}"
    return "\n".join(f"{line}{suffix}" for line in dict.fromkeys(lines))


def merge(summaries: Sequence[Summary]) -> Summary:
    """Joins the shards of one run; the claims are judged again on all seeds.

    Shards may come in any order, and the merge of a merge is the merge of all.

    Args:
        summaries: of one system, tier, config and device kind. Units may repeat if
            their metrics and labels are equal.

    Raises:
        ValueError: no summary; another system, tier, config hash or device kind;
            labels or claims that differ; a unit twice with different content.
    """
    if not summaries:
        raise ValueError("nothing to merge; give at least one summary.")
    first = summaries[0]
    claims, pairing = _claims_of(first)
    for other in summaries[1:]:
        for key in ("system", "tier", "config_hash", "device"):
            if other[key] != first[key]:
                raise ValueError(
                    f"shards differ in {key}: {first[key]!r} and {other[key]!r}; merge "
                    f"shards of one run only."
                )
        if _claims_of(other) != (claims, pairing):
            raise ValueError(
                f"shards of {first['system']} {first['tier']} differ in the definition "
                f"of their claims; run the older shards again."
            )
    return summary(
        system=first["system"],
        tier=first["tier"],
        command="\n".join(sorted({s["command"] for s in summaries})),
        config_hash=first["config_hash"],
        units=[unit for s in summaries for unit in s["units"]],
        claims=claims,
        pairing=pairing,
        complete=False,
    )


def write_record(results_dir: str | os.PathLike[str], record: Summary) -> Path:
    """Writes ``<results_dir>/<system>/<tier>.json`` atomically; returns its path.

    Raises:
        ValueError: a key is missing, or a claim has no seed (shards still to merge).
    """
    _check_summary(record, "the summary")
    for claim in record["claims"]:
        if not claim["ours"]:
            raise ValueError(
                f"claim {claim['id']!r} has no seed with {claim['ours_metric']!r}"
                f"{_and_baseline(claim)}; run or merge the missing shards before "
                f"recording."
            )
    path = Path(results_dir, record["system"], f"{record['tier']}.json")
    text = json.dumps(to_plain(record), indent=1, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())
    return path


def read_records(results_dir: str | os.PathLike[str]) -> list[Summary]:
    """All records of a folder, by system, then from smoke to paper.

    Raises:
        ValueError: a file that is not a record, or lies under another name than its
            own; names it.
    """
    records = []
    for path in sorted(Path(results_dir).glob("*/*.json")):
        try:
            record = from_plain(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}.") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path} holds no record; write it with --record.")
        _check_summary(record, str(path))
        if (record["system"], record["tier"]) != (path.parent.name, path.stem):
            raise ValueError(
                f"{path} is the record of {record['system']}/{record['tier']}; "
                f"records are written by --record, never moved by hand."
            )
        records.append(record)
    return sorted(records, key=order)


def _column(
    claim: Claim,
    name: str,
    per_seed: Sequence[Mapping[str, float]],
    seeds: Sequence[int],
    tier: str,
) -> list[float]:
    for seed, metrics in zip(seeds, per_seed):
        if name not in metrics:
            raise ValueError(
                f"claim {claim.id!r} needs metric {name!r}, which seed {seed} of tier "
                f"{tier!r} lacks; it has {', '.join(sorted(metrics))}."
                f"{suggestion(name, metrics)}"
            )
    return [float(metrics[name]) for metrics in per_seed]


def _judged(
    claim: Claim, ours: list[float], baseline: list[float] | None, pairing: str
) -> dict[str, Any]:
    value, low, high = _interval(claim, ours, baseline)
    return {
        "id": claim.id,
        "statement": claim.statement,
        "published": claim.published,
        "statistic": claim.statistic,
        "direction": claim.direction,
        "threshold": claim.threshold,
        "ours": ours,
        "baseline": baseline,
        "ours_metric": claim.ours,
        "baseline_metric": claim.baseline,
        "pairing": pairing,
        "value": value,
        "ci95": [low, high],
        "verdict": _verdict(claim, len(ours), value, low, high),
    }


def _interval(
    claim: Claim, ours: list[float], baseline: list[float] | None
) -> tuple[float | None, float | None, float | None]:
    """Value, low, high; None where the numbers allow none."""
    numbers = ours + (baseline or [])
    if not ours or not all(map(math.isfinite, numbers)):
        return None, None, None
    if claim.statistic == "exact":
        values = [a - b for a, b in zip(ours, baseline)] if baseline else ours
        threshold = float(claim.threshold or 0)
        return max(values, key=lambda x: abs(x - threshold)), None, None
    if baseline is None or claim.statistic == "report":
        interval = t_interval(ours)
    elif claim.statistic == "ratio" and min(numbers) <= 0:
        return None, None, None
    else:
        interval = paired_interval(ours, baseline, claim.statistic)
    return interval.value, interval.low, interval.high


def _verdict(
    claim: Claim,
    count: int,
    value: float | None,
    low: float | None,
    high: float | None,
) -> str:
    if claim.simulated:
        return "simulated"
    if claim.statistic == "report" or count == 0:
        return "reported"
    if claim.statistic == "exact":
        return "exact" if value == claim.threshold else "not reproduced"
    if count < 3:
        return "reported"
    if count < 5:
        return "pilot"
    if low is None or high is None or claim.threshold is None:
        return "inconclusive"
    above, below = low > claim.threshold, high < claim.threshold
    right, wrong = (above, below) if claim.direction == "greater" else (below, above)
    if right:
        return "reproduced"
    return "not reproduced" if wrong else "inconclusive"


def _judge_measured(
    claim: Claim,
    per_seed: Mapping[int, Mapping[str, float]],
    tier: str,
    pairing: str,
) -> dict[str, Any]:
    """Judges by the seeds that have both metrics; an open claim if there is none."""
    needed = {claim.ours, claim.baseline} - {None}
    seeds = [s for s in sorted(per_seed) if needed <= per_seed[s].keys()]
    if not seeds:
        return _judged(claim, [], None if claim.baseline is None else [], pairing)
    return judge(claim, [per_seed[s] for s in seeds], seeds, tier, pairing=pairing)


def _claims_of(summary: Summary) -> tuple[list[Claim], str]:
    """The claims behind judged ones, and the pairing of their seeds."""
    names = ("id", "statement", "published", "statistic", "direction", "threshold")
    claims = [
        Claim(
            **{name: judged[name] for name in names},
            ours=judged["ours_metric"],
            baseline=judged["baseline_metric"],
            simulated=judged["verdict"] == "simulated",
        )
        for judged in summary["claims"]
    ]
    return claims, next((j["pairing"] for j in summary["claims"]), PAIRINGS[0])


def _seconds(units: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of all units, shared stages once; of those of old records each time."""
    # a stage read from the cache says what it took when it ran; shards with caches of
    # their own ran it twice
    stages = {item for unit in units for item in unit.get("stage_s", {}).items()}
    old = [unit["wall_s"] for unit in units if "stage_s" not in unit]
    return math.fsum([*(seconds for _, seconds in stages), *old])


def _join_units(units: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Units sorted by arm and seed, equal ones once."""
    joined: dict[tuple[str, int], dict[str, Any]] = {}
    for unit in units:
        missing = [key for key in UNIT_KEYS if key not in unit]
        if missing:
            raise ValueError(
                f"a unit lacks {', '.join(missing)}; it needs {', '.join(UNIT_KEYS)}."
            )
        key = (unit["arm"], unit["seed"])
        peak = unit["peak_memory_gb"]
        clean = {
            "arm": unit["arm"],
            "seed": int(unit["seed"]),
            "metrics": {k: float(v) for k, v in sorted(unit["metrics"].items())},
            "wall_s": float(unit["wall_s"]),
            "peak_memory_gb": None if peak is None else float(peak),
            "device": unit["device"],
            "commit": unit["commit"],
            "versions": dict(unit["versions"]),
            "labels": dict(unit["labels"]),
            **({"stage_s": dict(unit["stage_s"])} if "stage_s" in unit else {}),
        }
        # Compared as text: NaN does not equal itself. Timings and machines may differ.
        if key not in joined:
            joined[key] = clean
        elif any(repr(joined[key][k]) != repr(clean[k]) for k in ("metrics", "labels")):
            raise ValueError(
                f"arm {key[0]!r} seed {key[1]} stands twice with different content; "
                f"remove one of the two shards."
            )
    if not joined:
        raise ValueError("a summary needs at least one unit (arm, seed).")
    return [joined[key] for key in sorted(joined)]


def _common(what: str, values: Sequence[str]) -> str:
    """The value that all units share."""
    if len(set(values)) != 1:
        raise ValueError(
            f"units differ in {what}: {', '.join(sorted(set(values)))}; their numbers "
            f"cannot be judged together. Run them again under one."
        )
    return values[0]


def _metrics_by_seed(
    units: Iterable[Mapping[str, Any]],
) -> dict[int, dict[str, float]]:
    per_seed: dict[int, dict[str, float]] = {}
    for unit in units:
        prefix = "" if unit["arm"] == MAIN_ARM else f"{unit['arm']}/"
        metrics = per_seed.setdefault(unit["seed"], {})
        for name, value in unit["metrics"].items():
            metrics[f"{prefix}{name}"] = value
    return per_seed


def _mean(name: str, per_seed: Mapping[int, Mapping[str, float]]) -> float:
    values = [per_seed[s][name] for s in sorted(per_seed) if name in per_seed[s]]
    return sum(values) / len(values)


def side_by_side(texts: Iterable[str], separator: str = ", ") -> str:
    """Distinct texts, sorted; texts joined before are taken apart first."""
    parts = {part for text in texts for part in text.split(separator)}
    return separator.join(sorted(parts))


def _check_summary(summary: Mapping[str, Any], where: str) -> None:
    missing = [key for key in SUMMARY_KEYS if key not in summary]
    if missing:
        raise ValueError(
            f"{where} lacks {', '.join(missing)}; a record needs "
            f"{', '.join(SUMMARY_KEYS)}. Build it with ledger.summary."
        )


def _and_baseline(claim: Mapping[str, Any]) -> str:
    return f" and {claim['baseline_metric']!r}" if claim["baseline_metric"] else ""


def order(record: Summary) -> tuple[str, int, str]:
    """Sorts records by system, then from smoke to paper."""
    tier = record["tier"]
    return record["system"], (*TIERS, tier).index(tier), tier
