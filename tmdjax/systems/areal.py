"""AReaL: a language model writes and trains at once, with bounded staleness.

Generators never wait for an update: new weights are taken in the middle of texts, so
that a response has tokens of several versions. Three rules keep that stable, and none
of them is particular to a network:

    staleness   a group is asked for only while it can train at most eta versions later,
                and is left out where it would train later all the same
                (:class:`tmdjax.runtime.Schedule`, :mod:`tmdjax.runtime.staleness`)
    decoupled   ratios are clipped around the policy before the update, the proximal
                one, and not around the older ones that wrote:
                w min(u A, clip(u) A), u = policy / proximal, w = proximal / behaviour
    once        every response trains once

A run is an objective (:func:`preset`), a schedule (:func:`schedule`) and the sizes of
its updates (:func:`settings`); the run itself is :mod:`tmdjax.runtime`'s, under any
executor.

References:
    AReaL, arXiv 2505.24298, of which the abstract and the authors' notes on release 0.3
    were at hand, and the code, github.com/inclusionAI/AReaL, with its example of GSM8K.
    The decoupled loss: arXiv 2110.00641. M2PO: arXiv 2510.01161.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from tmdjax.core.checks import check_choice, check_count, check_fields, check_range
from tmdjax.runtime import GroupRelativeObjective, LanguageSettings, Schedule

_DECOUPLED = {"aggregation": "token-mean", "correction": "reject", "max_weight": 5.0}
PRESETS: dict[str, dict[str, Any]] = {
    "areal": _DECOUPLED,
    "gsm8k": _DECOUPLED | {"clip_range": 0.4},
    "m2po": _DECOUPLED | {"clip_range": math.inf, "max_second_moment": 0.04},
    "naive": {"aggregation": "token-mean"},
}
"""What each objective changes of GRPO's. Tokens that 'areal' rejects, of w above 5,
leave the sum of the loss and stay in its denominator. 'm2po' leaves out tokens of the
largest log w before that, and does not clip. 'naive' clips around the policies that
wrote: what decoupling is compared with. (The example of GSM8K moreover normalises
advantages by the batch after the group; none of these does.)"""

SCHEDULES: dict[str, dict[str, Any]] = {
    "areal": {"batch": 128, "samples": 16, "max_new_tokens": 27 * 1024, "eta": 16},
    "ablation": {"batch": 512, "samples": 16, "max_new_tokens": 8192, "eta": 4},
    "gsm8k": {"batch": 256, "samples": 4, "max_new_tokens": 1024, "eta": 2},
}
"""Sizes of a run; batch counts prompts. 'areal' is the recipe of the coding models: a
batch of 2048 responses of at most 27K tokens, groups by :func:`accept`, one minibatch,
a learning rate of 2e-5 with an epsilon of Adam of 1e-5. 'ablation' is the setting in
which eta was varied from 0 to infinity (4 lost nothing): four minibatches. 'gsm8k':
one minibatch, 1.7e-5, a weight decay of 0.017."""


def preset(name: str, **changes: Any) -> GroupRelativeObjective:
    """An objective.

    Args:
        name: one of :data:`PRESETS`.
        **changes: fields of :class:`tmdjax.runtime.GroupRelativeObjective`.

    Raises:
        ValueError: an unknown name, options out of range, or a decoupled loss that is
            not defined.
        TypeError: an unknown field.
    """
    check_choice("preset", name, PRESETS)
    check_fields(GroupRelativeObjective, changes)
    found = GroupRelativeObjective(**PRESETS[name] | changes)
    if found.surrogate == "sapo" and "proximal" in found.needs:
        raise ValueError(
            f"surrogate='sapo' has a soft gate around the policy that wrote and is not "
            f"defined around another one, as correction={found.correction!r} needs; "
            f"use surrogate='token' or 'sequence', or preset 'naive'."
        )
    return found


def schedule(name: str = "areal", *, updates: int, **changes: Any) -> Schedule:
    """A schedule in which generators never wait for updates.

    Args:
        name: one of :data:`SCHEDULES`.
        updates: at which version the run ends, >= 1.
        **changes: fields of :class:`tmdjax.runtime.Schedule`. With ``eta=0`` it is
            the synchronous loop, with ``eta=1`` writing and training overlap by one
            step.

    Raises:
        ValueError: an unknown name, a number out of range (eta below 0, a batch of
            none), or a schedule that is not AReaL's.
        TypeError: an unknown field.
    """
    check_choice("schedule", name, SCHEDULES)
    check_fields(Schedule, changes)
    found = Schedule(**SCHEDULES[name] | changes, updates=updates)
    for field, own in (("when_full", "continue"), ("ahead", None)):
        if getattr(found, field) != own:
            raise ValueError(
                f"{field}={getattr(found, field)!r}: in AReaL generators never stop "
                f"for an update, and eta alone bounds what is ahead; leave it "
                f"{own!r}, or use tmdjax.runtime.Schedule."
            )
    return found


def settings(
    schedule: Schedule,
    objective: GroupRelativeObjective,
    **changes: Any,
) -> LanguageSettings:
    """The sizes of the updates of a run, in agreement with its schedule.

    Args:
        schedule: of the run.
        objective: of it.
        **changes: fields of :class:`tmdjax.runtime.LanguageSettings`, such as
            ``proximal='loglinear'``. Those that the schedule has are taken from it:
            prompts, samples, max_new_tokens, max_lag.

    Raises:
        ValueError: a number out of range, a field that the schedule says otherwise, or
            an objective that compares two policies where ``proximal='behaviour'`` makes
            them one.
        TypeError: an unknown field.

    Warns:
        UserWarning: stale responses are clipped around the policy before the update,
            and nothing corrects for the policies that wrote.
    """
    found = schedule.settings(**changes)
    compares = "proximal" in objective.needs
    if compares and found.proximal == "behaviour":
        raise ValueError(
            "proximal='behaviour' makes the proximal policy the one that wrote, but "
            "the objective compares the two; use proximal='recompute' or 'loglinear', "
            "or preset 'naive'."
        )
    decoupled = found.proximal in ("recompute", "loglinear")
    if decoupled and not compares and schedule.eta > 0:
        warnings.warn(
            f"proximal={found.proximal!r} with correction='none' and eta="
            f"{schedule.eta}: ratios are clipped around the policy before the update, "
            f"and responses of older ones count as if it had written them. Use "
            f"correction='reject' (preset 'areal'), or proximal='behaviour' (preset "
            f"'naive').",
            stacklevel=2,
        )
    return found


def accept(scores: Sequence[float], *, low: float = 0.05, high: float = 0.95) -> bool:
    """Whether a group trains: its success rate lies in [low, high].

    Args:
        scores: of its responses, in [0, 1], at least one.
        low: lowest mean score of a group that trains, in [0, high].
        high: highest one, in [low, 1].

    Raises:
        ValueError: bounds out of range, or no score.
    """
    check_range("high", high, 0, 1)
    check_range("low", low, 0, high)
    check_count("number of scores", len(scores))
    return low <= float(np.mean(scores)) <= high
