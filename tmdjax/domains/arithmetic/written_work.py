"""Exact rewards of written work: the whole trace counts, not only the answer.

A response is what a policy writes after the prompt: work, ``ANSWER``, the answer,
``END``. Where the work is determined by the problem (running sums, passes over a
list), only that work earns a reward, so an answer that was guessed earns nothing.
What follows the first ``END`` is not read; a response without it was cut off and earns
0, whatever stands in it.
"""

from collections.abc import Callable, Sequence

from tmdjax.core.checks import check_choice, check_range
from tmdjax.domains.arithmetic.expressions import ExpressionError, check_countdown

ANSWER = "#"
"""Stands before the final answer."""

END = "$"
"""Ends a response."""

PASS = ";"
"""Separates passes, or steps, of the work."""

MODULI = (10, 97)
OPERATIONS = ("sort", "reverse", "dedup", "largest")


def split_response(response: str) -> tuple[str, str] | None:
    """Work and answer of a response, or None if it has no answer or no end."""
    written, end, _ = response.partition(END)
    work, mark, answer = written.rpartition(ANSWER)
    return (work, answer) if end and mark else None


def chain_sum_response(terms: Sequence[int], modulus: int) -> str:
    """The running sums of digits: each term, then the sum so far; then the last sum.

    Args:
        terms: n digits.
        modulus: 10, sums of one character, 2 n + 3 characters in all; or 97, sums of
            two characters, 3 n + 4 in all.

    Returns:
        The gold response, such as '505813#13$' for 5, 8 and the modulus 97.

    Raises:
        ValueError: another modulus, no terms, or a term that is no digit.

    Example:
        >>> chain_sum_response((5, 8, 9), 97)
        '505813922#22$'
    """
    if modulus not in MODULI:
        raise ValueError(f"modulus={modulus} is not one of {MODULI}.")
    _check_digits("terms", terms)
    width = len(str(modulus - 1))
    total, work = 0, []
    for term in terms:
        total = (total + term) % modulus
        work.append(f"{term}{total:0{width}d}")
    return f"{''.join(work)}{ANSWER}{total:0{width}d}{END}"


def list_response(operation: str, items: Sequence[int], rank: int = 1) -> str:
    """An operation on a list of digits with its passes written out.

    - 'sort', ascending: the list after each pass of bubble sort that changed it.
    - 'reverse': the items taken from the end so far, after each.
    - 'dedup': the distinct items met so far, in order of first appearance, after each
      item.
    - 'largest': the list without its largest item (the first of equals), again and
      again, rank - 1 times; then the largest of what is left.

    Args:
        operation: one of ``OPERATIONS``.
        items: n digits, at least one.
        rank: of 'largest', in [1, n]; equal items count each.

    Returns:
        Passes between ``PASS``, ``ANSWER``, the answer, ``END``.

    Raises:
        ValueError: unknown operation, no items, an item that is no digit, or a rank
            outside [1, n].

    Example:
        >>> list_response("sort", (3, 1, 2))
        '132;123#123$'
        >>> list_response("largest", (3, 1, 2), rank=2)
        '12#2$'
    """
    check_choice("operation", operation, OPERATIONS)
    _check_digits("items", items)
    check_range("rank", rank, 1, len(items))
    passes = _PASSES[operation](list(items), rank)
    answer = passes.pop()
    written = PASS.join("".join(map(str, row)) for row in passes)
    return f"{written}{ANSWER}{''.join(map(str, answer))}{END}"


def _sort_passes(items: list[int], _: int) -> list[list[int]]:
    passes = []
    for last in range(len(items) - 1, 0, -1):
        before = list(items)
        for i in range(last):
            if items[i] > items[i + 1]:
                items[i], items[i + 1] = items[i + 1], items[i]
        if items == before:
            break
        passes.append(list(items))
    return [*passes, items]


def _reverse_passes(items: list[int], _: int) -> list[list[int]]:
    backwards = items[::-1]
    return [*(backwards[: i + 1] for i in range(len(items))), backwards]


def _dedup_passes(items: list[int], _: int) -> list[list[int]]:
    passes = [list(dict.fromkeys(items[: i + 1])) for i in range(len(items))]
    return [*passes, passes[-1]]


def _largest_passes(items: list[int], rank: int) -> list[list[int]]:
    passes = []
    for _ in range(rank - 1):
        items.remove(max(items))
        passes.append(list(items))
    return [*passes, [max(items)]]


_PASSES: dict[str, Callable[[list[int], int], list[list[int]]]] = {
    "sort": _sort_passes,
    "reverse": _reverse_passes,
    "dedup": _dedup_passes,
    "largest": _largest_passes,
}


def exact_reward(response: str, gold: str) -> float:
    """1.0 if the response is the gold response up to its first ``END``, else 0.0."""
    written, end, _ = response.partition(END)
    return float(written + end == gold)


def countdown_reward(response: str, numbers: Sequence[int], target: int) -> float:
    """1.0 if the answer is an expression that solves the countdown, else 0.0.

    The work before the answer is free. See :func:`expressions.check_countdown`.
    """
    parts = split_response(response)
    if parts is None:
        return 0.0
    try:
        check_countdown(parts[1], numbers, target)
    except ExpressionError:
        return 0.0
    return 1.0


def _check_digits(name: str, values: Sequence[int]) -> None:
    if not len(values):
        raise ValueError(f"{name} is empty; give at least one digit.")
    for value in values:
        if value not in range(10):
            raise ValueError(f"{name} holds {value}; each must be a digit, 0 to 9.")
