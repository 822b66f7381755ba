"""List operations with their passes written out, so that length grows as n^2.

The prompt '>s312=' asks to sort the digits 3, 1, 2; 'r' reverses, 'd' drops repeats,
and 'k2:' names the second largest. What a response holds says
:func:`tmdjax.domains.arithmetic.written_work.list_response`.
"""

import dataclasses

import numpy as np

from tmdjax.core.checks import check_count
from tmdjax.data.text_tasks.problems import Problem
from tmdjax.data.text_tasks.vocabulary import GIVEN, START
from tmdjax.domains.arithmetic.written_work import (
    OPERATIONS,
    exact_reward,
    list_response,
    split_response,
)

LETTERS = {"sort": "s", "reverse": "r", "dedup": "d", "largest": "k"}

TIERS = {"T1": 4, "T2": 6, "T3": 9}
"""The most items of each tier; T4 has more."""

_HIGHEST_RANK = 9  # one character


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListOperations:
    """Sort, reverse, dedup or k-th largest of n digits, 0 to 9, with repeats.

    The four operations are equally likely.

    Attributes:
        low: fewest items; the lengths are equally likely.
        high: most items.

    Raises:
        TypeError: low or high is no integer.
        ValueError: low < 1, high < low.
    """

    low: int = 2
    high: int = 12

    name = "list_operations"

    def __post_init__(self):
        check_count("high", self.high, check_count("low", self.low))

    def problem(self, rng: np.random.Generator) -> Problem:
        """Draws operation, length, digits and, for 'largest', the rank."""
        operation = OPERATIONS[rng.integers(len(OPERATIONS))]
        count = int(rng.integers(self.low, self.high + 1))
        items = rng.integers(0, 10, count).tolist()
        rank, order = 1, ""
        if operation == "largest":
            rank = int(rng.integers(1, min(count, _HIGHEST_RANK) + 1))
            order = f"{rank}:"
        response = list_response(operation, items, rank)
        _, answer = split_response(response) or ("", "")
        digits = "".join(map(str, items))
        return Problem(
            prompt=f"{START}{LETTERS[operation]}{order}{digits}{GIVEN}",
            response=response,
            answer=answer,
            tier=next((tier for tier, most in TIERS.items() if count <= most), "T4"),
            facts={"operation": operation, "items": items, "rank": rank},
        )

    def verify(self, problem: Problem, response: str) -> float:
        """1.0 if every pass and the answer are right, else 0.0."""
        facts = problem.facts
        gold = list_response(facts["operation"], facts["items"], facts["rank"])
        return exact_reward(response, gold)
