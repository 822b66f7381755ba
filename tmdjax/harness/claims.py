"""Claims: stated before a run, judged by its seeds.

Metrics are named as in the summary of a run: 'name' in the arm 'main', the only one of
an experiment without others; 'arm/name' in all others.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from tmdjax.core.checks import check_choice
from tmdjax.metrics.intervals import paired_interval, t_interval

STATISTICS = ("ratio", "difference", "exact", "report")
DIRECTIONS = ("greater", "less", "equal")
PAIRINGS = ("separate", "vmapped")
MAIN_ARM = "main"
"""The arm of an experiment that has only one; its metrics carry no prefix."""


def metric_name(arm: str, name: str) -> str:
    """The name of an arm's metric in a summary: 'arm/name', or 'name' of 'main'."""
    return name if arm == MAIN_ARM else f"{arm}/{name}"


def keep_arms(config: Any, names: Iterable[str]) -> None:
    """Drops all other arms of a config, and what it says of them, claims too.

    Args:
        config: a ConfigDict with 'arms', changed in place.
        names: of the arms that stay; with none of them the config is that of 'main'.

    Raises:
        ValueError: no such arm.
    """
    names = tuple(names)
    for name in names:
        check_choice("arm", name, config.arms)
    gone = [arm for arm in config.arms if arm not in names]
    with config.unlocked():
        for name, claim in list(config.get("claims", {}).items()):
            about = (claim.get("ours"), claim.get("baseline"))
            if any((metric or "").partition("/")[0] in gone for metric in about):
                del config.claims[name]
        for setting in ("one_seed_arms", "planned"):
            if setting in config:
                config[setting] = tuple(a for a in config[setting] if a not in gone)
        for arm in gone:
            del config.arms[arm]


def keep_claims(config: Any, names: Iterable[str]) -> None:
    """Drops all other claims of a config.

    Args:
        config: a ConfigDict with 'claims', changed in place.
        names: ids of the claims that stay; none drops all.

    Raises:
        ValueError: no such claim.
    """
    names = tuple(names)
    for name in names:
        check_choice("claim", name, config.claims)
    with config.unlocked():
        config.claims = {k: v for k, v in config.claims.items() if k in names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement to check, fixed before the run.

    Attributes:
        id: label of the sheet, without brackets ('O1', '1a').
        statement: what is claimed, in words.
        published: the number in the source, as text or number; '' if it has none.
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
    published: str | float | None = ""
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
            text = getattr(self, name)
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{where} {name} is {text!r}; give a text.")
        if self.baseline == self.ours:
            raise ValueError(
                f"{where} baseline and ours are both {self.ours!r}; compare two "
                f"metrics, or leave the baseline out."
            )
        if self.statistic == "report":
            return
        allowed = DIRECTIONS[2:] if self.statistic == "exact" else DIRECTIONS[:2]
        check_choice(f"{where} direction", str(self.direction), allowed)
        bound = self.threshold
        if not isinstance(bound, int | float) or not math.isfinite(bound):
            raise ValueError(
                f"{where} threshold is {self.threshold}; a {self.statistic} needs a "
                f"finite one, fixed before the run."
            )


def claims_of(config: Mapping[str, Any]) -> list[Claim]:
    """The claims that a config states.

    Args:
        config: plain; its 'claims' are dicts of the fields of a claim by its id. It may
            have none.

    Raises:
        ValueError: one that is no such dict, lacks a field or has one too many, or
            whose fields do not fit together.
    """
    fields = [field.name for field in dataclasses.fields(Claim)][1:]
    needed = {"statement", "statistic", "ours"}
    found = []
    for name, given in (config.get("claims") or {}).items():
        if not isinstance(given, Mapping) or needed - given.keys():
            raise ValueError(
                f"claim {name!r} is {given!r}; a claim has {', '.join(sorted(needed))}."
            )
        for field in given:
            check_choice(f"claim {name!r}: field", field, fields)
        found.append(Claim(id=name, **given))
    return found


def judge(
    claim: Claim,
    by_seed: Mapping[int, Mapping[str, float]],
    *,
    pairing: str = "separate",
) -> dict[str, Any]:
    """Judges one claim by the seeds that have both its metrics.

    The 95 % interval over seeds decides: with five seeds or more, 'reproduced' if
    it lies wholly on the right side of the threshold, 'not reproduced' if wholly on
    the other, else 'inconclusive' (also where a seed is not finite, or a ratio has
    a number that is not positive). Three or four seeds are a 'pilot', fewer are
    'reported'. An 'exact' claim is 'exact' if every seed equals the threshold, else
    'not reproduced', and its value is the seed farthest from it; 'report' is
    'reported', and a simulated claim 'simulated'. A claim whose metrics no seed has
    stays open: no numbers, 'reported'.

    Args:
        claim: what to judge.
        by_seed: {seed: {metric: number}}.
        pairing: how the seeds of the arms were run, 'separate' or 'vmapped'.

    Returns:
        A dict with keys id, statement, published, statistic, direction, threshold,
        ours and baseline (numbers by seed; None without a baseline), ours_metric,
        baseline_metric, pairing, value, ci95 ([low, high], None where unknown) and
        verdict; 'simulated': True where the claim is.
    """
    check_choice("pairing", pairing, PAIRINGS)
    needed = {claim.ours, claim.baseline} - {None}
    found = [by_seed[s] for s in sorted(by_seed) if needed <= by_seed[s].keys()]
    ours = [float(metrics[claim.ours]) for metrics in found]
    baseline = None
    if claim.baseline is not None:
        baseline = [float(metrics[claim.baseline]) for metrics in found]
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
        **({"simulated": True} if claim.simulated else {}),
    }


def stated(judged: Iterable[Mapping[str, Any]]) -> list[Claim]:
    """The claims that :func:`judge` judged, as they were stated."""
    names = ("id", "statement", "published", "statistic", "direction", "threshold")
    return [
        Claim(
            **{name: found[name] for name in names},
            ours=found["ours_metric"],
            baseline=found["baseline_metric"],
            simulated=found.get("simulated", False),
        )
        for found in judged
    ]


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
