"""What every text task shares: the problem, the split by hash, distinct samples.

A task has a ``name``, ``problem(rng)`` that draws a problem from a NumPy generator,
and ``verify(problem, response)``, an exact reward in [0, 1]. Nothing else is asked of
it, so a task of one's own needs no base class:

    rng = np.random.default_rng(0)
    problems = sample(ChainSum(), "train", 1024, rng)
    rewards = [task.verify(p, response) for p, response in zip(problems, responses)]

Problems belong to a split by the hash of their prompt alone: whoever samples, in
whatever order, by whatever seed, no prompt of 'evaluation' or 'holdout' is trained on.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tmdjax.core.checks import check_choice, check_count

SPLITS = ("train", "evaluation", "holdout")
"""Eight, one and one of ten prompts: to train on, to look at while training, and to
touch once, at the end."""

_BUCKETS = 10
_PATIENCE = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem of a text task.

    Attributes:
        prompt: what the policy is given.
        response: a gold response, all that the policy should write; '' where none is
            known.
        answer: the final answer alone, as the task writes it.
        tier: its difficulty, a label of the task's; 'T1' is the easiest.
        facts: what the verifier needs, and what else is known about the problem; plain
            values that JSON can hold.
    """

    prompt: str
    response: str
    answer: str
    tier: str
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)


@runtime_checkable
class TextTask(Protocol):
    """What :func:`sample` and a scorer of responses need of a task."""

    @property
    def name(self) -> str:
        """What error messages call it."""
        ...

    def problem(self, rng: np.random.Generator) -> Problem:
        """Draws a problem."""
        ...

    def verify(self, problem: Problem, response: str) -> float:
        """Reward of a response, in [0, 1]; any text gets one."""
        ...


def split_of(prompt: str) -> str:
    """The split that a prompt belongs to, one of ``SPLITS``; the same everywhere."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    bucket = int.from_bytes(digest, "big") % _BUCKETS
    return {0: "holdout", 1: "evaluation"}.get(bucket, "train")


def sample(
    task: TextTask,
    split: str,
    count: int,
    rng: np.random.Generator,
    *,
    tier: str | None = None,
) -> list[Problem]:
    """Draws distinct problems of one split.

    Args:
        task: draws the problems.
        split: one of ``SPLITS``.
        count: problems, of different prompts.
        rng: advanced by the draws; the same seed gives the same problems.
        tier: only problems of this tier; None for all.

    Returns:
        ``count`` problems in the order they were drawn.

    Raises:
        TypeError: count is no integer.
        ValueError: unknown split, count < 1, or a task that has too few such problems:
            20 times as many draws as there are problems so far, and at least 10,000,
            brought no further one.
    """
    return sample_splits(task, {split: count}, rng, tier=tier)[split]


def sample_splits(
    task: TextTask,
    counts: Mapping[str, int],
    rng: np.random.Generator,
    *,
    tier: str | None = None,
) -> dict[str, list[Problem]]:
    """Draws distinct problems of several splits at once.

    Args:
        task: draws the problems.
        counts: how many of each split, see :func:`sample`.
        rng: advanced by the draws; each split has the problems that :func:`sample`
            would have drawn of it alone.
        tier: only problems of this tier; None for all.

    Returns:
        The problems of each split, in the order they were drawn.

    Raises:
        TypeError: a count is no integer.
        ValueError: as :func:`sample`.
    """
    for split in counts:
        check_choice("split", split, SPLITS)
    counts = {split: check_count("count", count) for split, count in counts.items()}
    found: dict[str, dict[str, Problem]] = {split: {} for split in counts}
    idle = dict.fromkeys(counts, 0)
    while missing := [s for s, count in counts.items() if len(found[s]) < count]:
        problem = task.problem(rng)
        fits = tier is None or problem.tier == tier
        own = split_of(problem.prompt)
        for split in missing:
            if fits and own == split and problem.prompt not in found[split]:
                found[split][problem.prompt] = problem
                idle[split] = 0
                continue
            idle[split] += 1
            if idle[split] >= max(_PATIENCE, 20 * len(found[split])):
                of_tier = "" if tier is None else f" and tier {tier!r}"
                raise ValueError(
                    f"task {task.name!r} gave {len(found[split])} distinct problems of "
                    f"split {split!r}{of_tier}, and none in {idle[split]} further "
                    f"draws; {counts[split]} were asked for. Ask for fewer, or widen "
                    f"the task."
                )
    return {split: list(problems.values()) for split, problems in found.items()}
