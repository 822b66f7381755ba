"""Summaries: what a run found, unit by unit, and how shards of one run are joined.

A unit is one arm under one seed. The summary of a run holds its units, their means and
the judged claims.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tmdjax.harness.claims import PAIRINGS, Claim, judge, metric_name, stated
from tmdjax.metrics.intervals import Interval, finite_interval

SUMMARY_KEYS = (
    "system",
    "tier",
    "metrics",
    "timings",
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
Summary = dict[str, Any]

# by key, the kind of a part: a type, {str: kind of each} or [kind of each], or a tuple
# of such, one of which it is
_NUMBER = int | float
_NUMBERS, _TEXTS = {str: _NUMBER}, {str: str}
_EITHER = {"metrics": _NUMBERS, "wall_s": _NUMBER, "peak_memory_gb": _NUMBER | None}
_EITHER |= {"device": str, "commit": str, "versions": _TEXTS, "labels": _TEXTS}
_UNIT = {"arm": str, "seed": int, **_EITHER}
_CLAIM = {
    **{"ours": [_NUMBER], "baseline": ([_NUMBER], type(None)), "pairing": str},
    **{"value": _NUMBER | None, "ci95": [_NUMBER | None], "verdict": str},
    **{"ours_metric": str, "baseline_metric": str | None},
}
_SUMMARY = {
    **{"system": str, "tier": str, "command": str, "config_hash": str, **_EITHER},
    **{"seeds": [int], "units": [dict], "claims": [dict]},
}
_LATER = {"timings": _NUMBERS, "stage_s": _NUMBERS}


def check_unit(found: Any) -> None:
    """Refuses what is not as :func:`unit` makes it, such as a file of another program.

    Raises:
        ValueError: names the first part that is missing or of another kind.
    """
    _check_parts("a unit", found, _UNIT)


def check_summary_parts(found: Any) -> None:
    """Refuses what is not as :func:`summary` makes it, its units and claims too.

    Raises:
        ValueError: names the first part that is missing or of another kind.
    """
    _check_parts("a summary", found, _SUMMARY)
    if not found["units"]:
        raise ValueError("a summary needs at least one unit")
    for each in found["units"]:
        check_unit(each)
    for each in found["claims"]:
        _check_parts("a claim", each, _CLAIM)
        if len(each["ci95"]) != 2:
            raise ValueError("'ci95' of a claim has two ends")
    stated(found["claims"])


def _check_parts(what: str, found: Any, kinds: Mapping[str, Any]) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{what} is {found!r}, no dict")
    for key, kind in {**kinds, **_LATER}.items():
        if key not in found and key not in _LATER:
            raise ValueError(f"{what} lacks {key!r}")
        if key in found and not _is(found[key], kind):
            raise ValueError(f"{key!r} of {what} cannot be {str(found[key])[:80]!r}")


def _is(value: Any, kind: Any) -> bool:
    if isinstance(kind, tuple):
        return any(_is(value, each) for each in kind)
    if isinstance(kind, dict):
        of = kind[str]
        return isinstance(value, dict) and all(_is(v, of) for v in value.values())
    if isinstance(kind, list):
        return isinstance(value, list) and all(_is(v, kind[0]) for v in value)
    return isinstance(value, kind) and not isinstance(value, bool)


def numbers(found: Mapping[str, Any]) -> dict[str, float]:
    """Metrics and timings of a unit or a summary, by name; old records lack timings."""
    return {**found["metrics"], **found.get("timings", {})}


def unit(
    arm: str,
    seed: int,
    metrics: Mapping[str, float],
    timings: Mapping[str, float],
    labels: Mapping[str, str],
    records: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """What a run notes of one arm under one seed.

    Args:
        arm: of the experiment.
        seed: of the unit.
        metrics: of all its stages; two runs have the same ones, to the last digit.
        timings: of all its stages; two runs differ in them.
        labels: of all its stages, such as that of the net behind a Frechet distance.
        records: by the hash of the stage, how its result was made, as
            :meth:`tmdjax.harness.stages.StageCache.run` returns it.

    Returns:
        A dict, plain as JSON. ``wall_s`` is what the unit costs alone: stages that it
        shares with others count in each of them.
    """
    made = list(records.values())
    return {
        "arm": arm,
        "seed": seed,
        "metrics": {name: float(metrics[name]) for name in sorted(metrics)},
        "timings": {name: float(timings[name]) for name in sorted(timings)},
        "wall_s": sum(record["wall_s"] for record in made),
        "stage_s": {name: record["wall_s"] for name, record in records.items()},
        "peak_memory_gb": max(record["peak_memory_gb"] for record in made),
        "device": side_by_side((record["device"] for record in made), " and "),
        "commit": side_by_side(record["commit"] for record in made),
        "versions": versions_side_by_side(record["versions"] for record in made),
        "labels": dict(labels),
    }


def summary(
    *,
    system: str,
    tier: str,
    command: str,
    config_hash: str,
    units: Iterable[Mapping[str, Any]],
    claims: Sequence[Claim] = (),
    pairing: str = "separate",
) -> Summary:
    """Builds the summary of a run, or of a shard of one.

    Args:
        system: name of the system.
        tier: name of the tier.
        command: what to type, without seeds and shards: the seeds of the units are
            added.
        config_hash: from :func:`tmdjax.harness.config.config_hash`.
        units: from :func:`unit`, one an arm and seed. Those of old records lack
            ``stage_s``.
        claims: what to judge. A claim takes the seeds that have both its metrics, and
            stays open where none has: no numbers, 'reported'.
        pairing: how seeds were run, 'separate' or 'vmapped'.

    Returns:
        A dict with ``SUMMARY_KEYS``. ``metrics`` and ``timings`` are means over seeds
        ('name' of the arm 'main', 'arm/name' of others), ``wall_s`` the sum over units,
        in which a stage that several share counts once where ``stage_s`` tells, and
        ``peak_memory_gb`` the maximum; commits and versions that differ stand side by
        side.

    Raises:
        ValueError: no unit, an (arm, seed) twice with different content, units of
            several kinds of device or labels, or two claims of one id.
    """
    units = _join_units(units)
    ids = [claim.id for claim in claims]
    if len(set(ids)) != len(ids):
        raise ValueError(f"two claims share an id: {ids}; ids are unique in a system.")
    per_seed = by_seed(units)
    clocked = {metric_name(u["arm"], n) for u in units for n in u.get("timings", {})}
    means = {
        name: _mean(name, per_seed) for name in sorted(set().union(*per_seed.values()))
    }
    peaks = [u["peak_memory_gb"] for u in units if u["peak_memory_gb"] is not None]
    names = sorted({name for unit in units for name in unit["labels"]})
    seeds = sorted(per_seed)
    return {
        "system": system,
        "tier": tier,
        "metrics": {n: mean for n, mean in means.items() if n not in clocked},
        "timings": {n: mean for n, mean in means.items() if n in clocked},
        "device": _device([unit["device"] for unit in units]),
        "wall_s": _seconds(units),
        "peak_memory_gb": max(peaks, default=None),
        "seeds": seeds,
        "command": with_seeds(command, seeds),
        "commit": side_by_side(unit["commit"] for unit in units),
        "claims": [judge(claim, per_seed, pairing=pairing) for claim in claims],
        "config_hash": config_hash,
        "versions": versions_side_by_side(unit["versions"] for unit in units),
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
    claims, pairing = _stated(first)
    _device([found["device"] for found in summaries])
    for other in summaries[1:]:
        for key in ("system", "tier", "config_hash"):
            if other[key] != first[key]:
                raise ValueError(
                    f"shards differ in {key}: {first[key]!r} and {other[key]!r}; merge "
                    f"shards of one run only."
                )
        if _stated(other) != (claims, pairing):
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
    )


def _stated(summary: Summary) -> tuple[list[Claim], str]:
    """The claims of a summary before they were judged, and how seeds were paired."""
    pairings = [judged["pairing"] for judged in summary["claims"]]
    return stated(summary["claims"]), next(iter(pairings), PAIRINGS[0])


def _seconds(units: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of all units, shared stages once; of those of old records each time."""
    # a stage read from the cache says what it took when it ran; shards with caches of
    # their own ran it twice
    stages = {item for unit in units for item in unit.get("stage_s", {}).items()}
    old = [unit["wall_s"] for unit in units if "stage_s" not in unit]
    return math.fsum([*(seconds for _, seconds in stages), *old])


def _join_units(units: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Units sorted by arm and seed, equal ones once; the first keeps its timings."""
    joined: dict[tuple[str, int], dict[str, Any]] = {}
    for unit in units:
        first = joined.setdefault((unit["arm"], unit["seed"]), dict(unit))
        # compared as text: NaN does not equal itself
        if any(repr(first[k]) != repr(unit[k]) for k in ("metrics", "labels")):
            raise ValueError(
                f"arm {unit['arm']!r} seed {unit['seed']} stands twice with different "
                f"content; remove one of the two shards."
            )
    if not joined:
        raise ValueError("a summary needs at least one unit (arm, seed).")
    return [joined[key] for key in sorted(joined)]


def _device(values: Sequence[str]) -> str:
    """What all units ran on, of one kind, whatever the number of a processor's cores.

    How many there are changes how long things take, and is no other kind of device.
    """
    kinds = [re.sub(r", \d+ cores\b", "", device) for device in values]
    _common("device", [side_by_side([kind], " and ") for kind in kinds])
    return side_by_side(values, " and ")


def _common(what: str, values: Sequence[str]) -> str:
    """The value that all units share."""
    if len(set(values)) != 1:
        raise ValueError(
            f"units differ in {what}: {', '.join(sorted(set(values)))}; their numbers "
            f"cannot be judged together. Run them again under one."
        )
    return values[0]


def intervals(units: Iterable[Mapping[str, Any]]) -> dict[str, Interval]:
    """Means over seeds with their 95 % t intervals, named as in a summary: 'arm/name'.

    A number that one seed alone has, or that is not finite in some seed, has no bounds.
    """
    found: dict[str, list[float]] = {}
    for values in by_seed(units).values():
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: finite_interval(values) for name, values in found.items()}


def by_seed(units: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, float]]:
    """Metrics and timings of units by seed, named as in a summary: 'arm/name'."""
    per_seed: dict[int, dict[str, float]] = {}
    for unit in units:
        metrics = per_seed.setdefault(unit["seed"], {})
        for name, value in numbers(unit).items():
            metrics[metric_name(unit["arm"], name)] = value
    return per_seed


def _mean(name: str, per_seed: Mapping[int, Mapping[str, float]]) -> float:
    values = [per_seed[s][name] for s in sorted(per_seed) if name in per_seed[s]]
    return sum(values) / len(values)


def side_by_side(texts: Iterable[str], separator: str = ", ") -> str:
    """Distinct texts, sorted; texts joined before are taken apart first."""
    parts = {part for text in texts for part in text.split(separator)}
    return separator.join(sorted(parts))


def versions_side_by_side(found: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """The distinct versions of each package, as one text a package."""
    found = list(found)
    names = sorted({name for versions in found for name in versions})
    return {name: side_by_side(v[name] for v in found if name in v) for name in names}
