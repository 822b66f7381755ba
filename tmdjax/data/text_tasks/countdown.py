"""Countdown: reach a target from a few numbers, in one of many right ways.

The prompt '>3,7,25:54=' asks for an expression of the numbers, each used at most once,
whose value is 54. A gold response writes the steps and then the expression:
'25-7=18;18*3=54#(25-7)*3$'; any right expression is paid, and the steps are free.

Solutions are enumerated under the rules of the television game: every value on the way
is a positive whole number. They are counted as trees: a+b and b+a are one. The verifier
is wider, and takes fractions and negative values.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tmdjax.core.checks import check_count, check_range
from tmdjax.core.types import Int
from tmdjax.data.text_tasks.problems import Problem
from tmdjax.data.text_tasks.vocabulary import GIVEN, START
from tmdjax.domains.arithmetic.expressions import ExpressionError, canonical
from tmdjax.domains.arithmetic.written_work import (
    ANSWER,
    END,
    PASS,
    countdown_reward,
    split_response,
)

FEW = {3: 1, 4: 3, 5: 27}
"""By how many numbers: at most so many solutions are few: half of all problems
of the default task, and two thirds of those of three numbers."""

Tree = int | tuple[str, Any, Any]
"""A number, or an operator with its two operands, themselves trees."""

_OPERATORS = (
    ("+", False), ("*", False), ("-", False), ("-", True), ("/", False), ("/", True),
)  # fmt: skip
"""What two values are joined by, and whether the second one then stands first."""

_MOST_NUMBERS = 5
_LARGEST = 99
_DRAWS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Countdown:
    """Different numbers and a target that they reach; the target is none of them.

    The numbers ascend, so that no problem stands in two splits in another order.

    Attributes:
        counts: how many numbers a problem may have, 3 to 5, equally likely.
        largest: of the numbers, 5 to 99; they are drawn from 1 to this.
        largest_target: targets are drawn from what can be reached in 1 to this.

    Raises:
        TypeError: an attribute that is no integer.
        ValueError: one outside its range.
    """

    counts: tuple[int, ...] = (3, 4, 5)
    largest: int = 25
    largest_target: int = 99

    name = "countdown"

    def __post_init__(self):
        if not self.counts:
            raise ValueError("counts is empty; give some of (3, 4, 5).")
        for count in self.counts:
            check_range("counts", check_count("counts", count), 3, _MOST_NUMBERS)
        check_range(
            "largest", check_count("largest", self.largest), _MOST_NUMBERS, _LARGEST
        )
        check_count("largest_target", self.largest_target)

    def problem(self, rng: np.random.Generator) -> Problem:
        """Draws numbers, a target among those in reach, and one of its solutions.

        Raises:
            ValueError: no target in reach, in 1,000 draws of numbers.
        """
        for _ in range(_DRAWS):
            count = self.counts[rng.integers(len(self.counts))]
            numbers = sorted((1 + rng.permutation(self.largest)[:count]).tolist())
            search = Search(numbers)
            solutions = search.solutions(self.largest_target)
            solutions[[n for n in numbers if n <= self.largest_target]] = 0
            targets = np.flatnonzero(solutions)
            if len(targets):
                break
        else:
            raise ValueError(
                f"no target up to largest_target={self.largest_target} was in reach "
                f"in {_DRAWS} draws; raise it."
            )
        target = int(rng.choice(targets))
        tree = search.draw(target, rng)
        expression, steps = write(tree)
        found = int(solutions[target])
        return Problem(
            prompt=f"{START}{','.join(map(str, numbers))}:{target}{GIVEN}",
            response=f"{PASS.join(steps)}{ANSWER}{expression}{END}",
            answer=expression,
            tier=tier_of(count, found),
            facts={"numbers": numbers, "target": target, "solutions": found},
        )

    def verify(self, problem: Problem, response: str) -> float:
        """1.0 if the answer's exact value is the target by the rules, else 0.0."""
        facts = problem.facts
        return countdown_reward(response, facts["numbers"], facts["target"])

    def canonical(self, response: str) -> str:
        """The answer up to the order of sums and products; as written if it is none.

        See :func:`tmdjax.domains.arithmetic.expressions.canonical`.
        """
        parts = split_response(response)
        answer = response if parts is None else parts[1]
        try:
            return canonical(answer)
        except ExpressionError:
            return answer


def tier_of(count: int, solutions: int) -> str:
    """The tier: 'T1' for three numbers; one more for each further, and for few ways."""
    return f"T{count - 2 + (solutions <= FEW[count])}"


class Search:
    """All values that subsets of the numbers reach, and in how many ways.

    Subsets are bit masks; a subset's ways are those of all its splits into two, so
    each is counted once, and the work is shared between subsets.

    Args:
        numbers: 1 to 5 positive integers, at most 99.
    """

    def __init__(self, numbers: Sequence[int]):
        self._numbers = list(numbers)
        self._full = (1 << len(self._numbers)) - 1
        self._known: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._joint: dict[tuple[int, int], np.ndarray] = {}

    def solutions(self, highest: int) -> Int[np.ndarray, "target"]:
        """Number of solutions of each target 0 to ``highest``, from any subset."""
        total = np.zeros(highest + 1, np.int64)
        for mask in range(1, self._full + 1):
            values, ways = self._values(mask)
            low = values <= highest
            total[values[low]] += ways[low]
        return total

    def draw(self, target: int, rng: np.random.Generator) -> Tree:
        """A solution of a target in reach, all equally likely."""
        masks = range(1, self._full + 1)
        ways = []
        for mask in masks:
            values, counts = self._values(mask)
            ways.append(int(counts[values == target].sum()))
        return self._draw(masks[_choose(ways, rng)], target, rng)

    def _draw(self, mask: int, value: int, rng: np.random.Generator) -> Tree:
        if not mask & (mask - 1):
            return value
        found: list[tuple[str, int, int, int, int]] = []
        weights: list[int] = []
        for left, right in _splits(mask):
            a, ways_a = self._values(left)
            b, ways_b = self._values(right)
            hits = np.argwhere(self._results(left, right) == value)
            for kind, i, j in hits.tolist():
                operator, swapped = _OPERATORS[kind]
                first, second = (left, int(a[i])), (right, int(b[j]))
                if swapped:
                    first, second = second, first
                found.append((operator, *first, *second))
                weights.append(int(ways_a[i] * ways_b[j]))
        operator, left, x, right, y = found[_choose(weights, rng)]
        return operator, self._draw(left, x, rng), self._draw(right, y, rng)

    def _values(self, mask: int) -> tuple[np.ndarray, np.ndarray]:
        """Distinct values of a subset, all of it used, and the ways to each."""
        if mask in self._known:
            return self._known[mask]
        if not mask & (mask - 1):
            number = self._numbers[mask.bit_length() - 1]
            found = np.array([number]), np.array([1])
        else:
            found = self._joined(mask)
        self._known[mask] = found
        return found

    def _joined(self, mask: int) -> tuple[np.ndarray, np.ndarray]:
        """The same for a subset of two numbers or more, from its parts."""
        values, ways = [], []
        for left, right in _splits(mask):
            results = self._results(left, right)
            possible = results > 0
            both = self._values(left)[1][:, None] * self._values(right)[1]
            values.append(results[possible])
            ways.append(np.broadcast_to(both, results.shape)[possible])
        distinct, index = np.unique(np.concatenate(values), return_inverse=True)
        total = np.zeros(len(distinct), np.int64)
        np.add.at(total, index, np.concatenate(ways))
        return distinct, total

    def _results(self, left: int, right: int) -> Int[np.ndarray, "operator a b"]:
        """Those of every operator on the values of two subsets; <= 0 is none."""
        if (left, right) not in self._joint:
            values = self._values(left)[0], self._values(right)[0]
            self._joint[left, right] = _combine(*values)
        return self._joint[left, right]


def _splits(mask: int) -> Iterator[tuple[int, int]]:
    """Each way to cut a subset in two, once."""
    part = (mask - 1) & mask
    while part:
        if part > mask ^ part:
            yield part, mask ^ part
        part = (part - 1) & mask


def _combine(a: np.ndarray, b: np.ndarray) -> Int[np.ndarray, "operator a b"]:
    """Results of all ``_OPERATORS`` in their order; <= 0 where there is none."""
    x, y = a[:, None], b[None, :]
    found = np.empty((len(_OPERATORS), len(a), len(b)), np.int64)
    found[0], found[1] = x + y, x * y
    found[2], found[3] = x - y, y - x
    for at, (high, low) in ((4, (x, y)), (5, (y, x))):
        found[at], rest = np.divmod(high, low)
        found[at][rest != 0] = 0
    return found


def _choose(weights: Sequence[int], rng: np.random.Generator) -> int:
    ends = np.cumsum(weights)
    return int(np.searchsorted(ends, rng.integers(ends[-1]), side="right"))


def write(tree: Tree) -> tuple[str, list[str]]:
    """Expression with the fewest brackets, and its steps, such as '25-7=18'."""
    steps: list[str] = []

    def walk(node: Tree) -> tuple[str, int, str]:
        """Text, value and last operator ('' of a number)."""
        if not isinstance(node, tuple):
            return str(node), node, ""
        operator, left, right = node
        x_text, x, x_last = walk(left)
        y_text, y, y_last = walk(right)
        if operator in "*/" and x_last and x_last in "+-":
            x_text = f"({x_text})"
        loose = {"+": "", "-": "+-", "*": "+-", "/": "+-*/"}[operator]
        if y_last and y_last in loose:
            y_text = f"({y_text})"
        value = {"+": x + y, "-": x - y, "*": x * y, "/": x // y}[operator]
        steps.append(f"{x}{operator}{y}={value}")
        return f"{x_text}{operator}{y_text}", value, operator

    expression, _, _ = walk(tree)
    return expression, steps
