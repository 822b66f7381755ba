"""APRIL: over-provisioned rounds, of which the unfinished part goes on in the next.

Generation and training take turns, in rounds:

    1. what earlier rounds left unfinished is handed out, then fresh prompts, until
       ``over_provisioned`` groups are there;
    2. as soon as ``target`` groups are written and scored, everything else is stopped
       and keeps its tokens;
    3. these groups train, and the next round begins under the new weights.

No round waits for its longest response, and no token is lost. What was resumed, though,
has tokens of earlier weights. What these mean in the update is the ``off_policy`` rule:

    ignore     log-probs that the trainer computes under its weights of now count as
               those of the policy that wrote (the paper's code)
    mask       tokens of earlier weights do not train
    truncate   a token's loss is weighed by the ratio of the policy before the update to
               the one that wrote it, at most 2
    decoupled  the same, but above 5 a token does not train (AReaL's loss)

A run is a schedule (:func:`schedule`), an objective (:func:`preset`, or another
method's under :func:`objective`) and the sizes of its updates (:func:`settings`); the
run itself is :mod:`tmdjax.runtime`'s. Left out are stopping single responses in place
of groups, and a baseline of responses that did not train.

References:
    APRIL, arXiv 2509.18521, of which the abstract was at hand, and its code,
    github.com/RLsys-Foundation/APRIL. 'mask' and 'truncate' are those of its successor,
    github.com/THUDM/slime. Other than both this keeps groups that are complete beyond
    the target, token ids in place of text, and log-probs and versions of all tokens.
"""

import dataclasses
import math
import warnings
from typing import Any

from tmdjax.core.checks import check_choice, check_count, check_fields
from tmdjax.runtime import Batch, GroupRelativeObjective, LanguageSettings, Schedule
from tmdjax.runtime.staleness import spans_of, tokens_by_lag

PRESETS: dict[str, dict[str, Any]] = {
    "ignore": {"correction": "none"},
    "mask": {"correction": "none"},
    "truncate": {"correction": "truncate", "max_weight": 2.0},
    "decoupled": {"correction": "reject", "max_weight": 5.0},
}
"""What an off-policy rule sets of an objective; 'april' is 'ignore'."""


def preset(name: str, **changes: Any) -> GroupRelativeObjective:
    """GRPO's objective under an off-policy rule.

    Args:
        name: one of :data:`PRESETS`, or 'april'.
        **changes: fields of :class:`tmdjax.runtime.GroupRelativeObjective`.

    Raises:
        ValueError: an unknown name, or options out of range.
        TypeError: an unknown field.
    """
    name = "ignore" if name == "april" else name
    check_choice("preset", name, PRESETS)
    check_fields(GroupRelativeObjective, changes)
    return GroupRelativeObjective(**PRESETS[name] | changes)


def objective(
    base: GroupRelativeObjective, off_policy: str = "ignore"
) -> GroupRelativeObjective:
    """Another method's objective under an off-policy rule, as DAPO's, GSPO's or XRPO's.

    Args:
        base: without a correction of its own.
        off_policy: one of :data:`PRESETS`.

    Returns:
        Of base's class.

    Raises:
        ValueError: an unknown rule, or a base that corrects already.
    """
    check_choice("off_policy", off_policy, PRESETS)
    if base.correction != "none":
        raise ValueError(
            f"the base has correction={base.correction!r}, which off_policy="
            f"{off_policy!r} would replace; give one with correction='none'."
        )
    return dataclasses.replace(base, **PRESETS[off_policy])


def schedule(
    target: int,
    over_provisioned: int,
    *,
    off_policy: str = "ignore",
    recycle: bool = True,
    **options: Any,
) -> Schedule:
    """The schedule of rounds.

    Args:
        target: groups that an update trains on, >= 1.
        over_provisioned: groups that a round begins with, >= target. What is unfinished
            after a round is at most the difference; ``max_waiting`` bounds it further.
        off_policy: one of :data:`PRESETS`.
        recycle: False discards at the end of a round what is not trained on: the
            control, whose responses are too short on average.
        **options: other fields of :class:`tmdjax.runtime.Schedule`; ``samples``,
            ``max_new_tokens`` and ``updates`` must be there. Unless said otherwise no
            prompt may stand twice in a batch (``allow_repeats=False``), and ten times
            ``over_provisioned`` groups in a row that may not train end a run
            (``max_rejected``).

    Raises:
        ValueError: an unknown rule, or a number out of range.
        TypeError: an unknown field, or one that follows from the arguments.

    Warns:
        UserWarning: fewer groups are asked for than an update takes; then as many are
            as that. Or a generator has fewer slots than a group has responses, so that
            no group is ever written side by side.
    """
    check_count("target", target)
    check_count("over_provisioned", over_provisioned)
    check_choice("off_policy", off_policy, PRESETS)
    own = {"batch": "target", "ahead": "over_provisioned", "when_full": "recycle"}
    for name, given in (own | {"on_stale": "off_policy"}).items():
        if name in options:
            raise TypeError(f"{name} follows from {given}; give {given} alone.")
    check_fields(Schedule, options)
    if over_provisioned < target:
        warnings.warn(
            f"over_provisioned={over_provisioned} is below target={target}, which is "
            f"taken; rounds wait for their longest response unless it is above.",
            stacklevel=2,
        )
        over_provisioned = target
    masks = off_policy == "mask"
    defaults: dict[str, Any] = {
        "eta": 0 if masks or not recycle else math.inf,
        "max_rejected": 10 * over_provisioned,
        "allow_repeats": False,
    }
    found = Schedule(
        batch=target,
        ahead=over_provisioned,
        when_full="resume" if recycle else "discard",
        on_stale="mask" if masks else "drop",
        **defaults | options,
    )
    if found.slots < found.samples:
        warnings.warn(
            f"slots={found.slots} of a generator are fewer than samples="
            f"{found.samples}: a group is never written side by side. Raise slots.",
            stacklevel=2,
        )
    return found


def settings(
    schedule: Schedule, off_policy: str = "ignore", **changes: Any
) -> LanguageSettings:
    """The sizes of the updates, in agreement with schedule and off-policy rule.

    Args:
        schedule: of :func:`schedule`, under the same rule.
        off_policy: one of :data:`PRESETS`.
        **changes: fields of :class:`tmdjax.runtime.LanguageSettings` that the schedule
            does not have.

    Raises:
        ValueError: an unknown rule, the schedule or the ``proximal`` of another one, or
            a number out of range.
        TypeError: an unknown field.
    """
    check_choice("off_policy", off_policy, PRESETS)
    if (schedule.on_stale == "mask") != (off_policy == "mask"):
        raise ValueError(
            f"off_policy={off_policy!r}, but the schedule has on_stale="
            f"{schedule.on_stale!r}; make both under one rule."
        )
    # 'auto' recomputes wherever the objective corrects
    proximal = "recompute" if off_policy == "ignore" else "auto"
    if off_policy == "ignore" and changes.get("proximal", proximal) != proximal:
        raise ValueError(
            f"proximal={changes['proximal']!r} with off_policy='ignore', under which "
            f"the trainer's log-probs count as those of the policy that wrote; leave "
            f"it 'recompute', or take another rule."
        )
    return schedule.settings(**{"proximal": proximal} | changes)


def off_policy_share(batch: Batch) -> float:
    """The share of a batch's tokens that any earlier weights drew, in [0, 1]."""
    spans = [spans_of(r.versions) for group in batch.groups for r in group.records]
    by_lag = tokens_by_lag(spans, batch.version)
    return 1 - by_lag.get(0, 0) / max(1, sum(by_lag.values()))
