"""Arithmetic expressions: a reader of its own, exact values, and the countdown game.

Text of a policy is never handed to an interpreter. An operator-precedence parser
turns it into postfix order, and the value is a ``Fraction``:

    expression = integer | expression (+|-|*|/) expression | ( expression )

Products and quotients bind closer than sums and differences, equal ones from the left.
Signs, powers and decimals are no part of the grammar; spaces are skipped.
"""

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

LONGEST_EXPRESSION = 1000
"""Characters that are read; a longer text is refused."""

LONGEST_NUMBER = 9
"""Digits of one number."""

_BINDING = {"+": 1, "-": 1, "*": 2, "/": 2}
_OPERATORS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
_DIGITS = frozenset("0123456789")


class ExpressionError(ValueError):
    """A text is no expression, has no value, or breaks a rule of the game."""


def parse(text: str) -> tuple[int | str, ...]:
    """Reads an expression.

    Args:
        text: by the grammar above, at most ``LONGEST_EXPRESSION`` characters.

    Returns:
        Its numbers and operators in postfix order: '2*(3+4)' gives (2, 3, 4, '+', '*').

    Raises:
        ExpressionError: no expression; names the character, counted from 1, and what
            was expected there.
    """
    if len(text) > LONGEST_EXPRESSION:
        raise ExpressionError(
            f"the expression has {len(text)} characters; at most {LONGEST_EXPRESSION} "
            f"are read."
        )
    output: list[int | str] = []
    waiting: list[str] = []  # operators and open brackets
    operand_next = True
    at = 0
    while at < len(text):
        character = text[at]
        if character == " ":
            at += 1
            continue
        opens = character in _DIGITS or character == "("
        known = opens or character in _BINDING or character == ")"
        if opens != operand_next or not known:
            raise _unexpected(text, at, operand_next)
        if character in _DIGITS:
            end = at
            while end < len(text) and text[end] in _DIGITS:
                end += 1
            if end - at > LONGEST_NUMBER:
                raise ExpressionError(
                    f"the number at character {at + 1} has {end - at} digits; at most "
                    f"{LONGEST_NUMBER} are read."
                )
            output.append(int(text[at:end]))
            at, operand_next = end, False
            continue
        if character == "(":
            waiting.append(character)
        elif character == ")":
            while waiting and waiting[-1] != "(":
                output.append(waiting.pop())
            if not waiting:
                raise _unexpected(text, at, operand_next)
            waiting.pop()
        else:
            while waiting and _BINDING.get(waiting[-1], 0) >= _BINDING[character]:
                output.append(waiting.pop())
            waiting.append(character)
            operand_next = True
        at += 1
    if operand_next:
        raise _unexpected(text, at, operand_next)
    if "(" in waiting:
        raise ExpressionError(f"a bracket of {text!r} is never closed.")
    return (*output, *reversed(waiting))


def evaluate(postfix: Sequence[int | str]) -> Fraction:
    """The exact value of what :func:`parse` returns.

    Raises:
        ExpressionError: a division by zero.
    """
    stack: list[Fraction] = []
    for item in postfix:
        if not isinstance(item, str):
            stack.append(Fraction(item))
            continue
        right, left = stack.pop(), stack.pop()
        if item == "/" and not right:
            raise ExpressionError(f"{left} is divided by zero.")
        stack.append(_OPERATORS[item](left, right))
    (value,) = stack
    return value


def canonical(text: str) -> str:
    """An expression up to the order and the brackets of its sums and products.

    Two expressions have one form where they differ by commuting and associating alone:
    '3*(25-7)' and '(25-7)*3', '9-(5-2)' and '2+(9-5)', '8/(4/2)' and '8*2/4'.

    Raises:
        ExpressionError: the text is no expression.
    """
    # a node: its kind ('' of a number), and (sign, operand) pairs in order
    stack: list[tuple[str, tuple[tuple[str, str], ...]]] = []

    def shown(kind: str, parts: Sequence[tuple[str, str]]) -> str:
        if not kind:
            return parts[0][1]
        return f"({''.join(sign + operand for sign, operand in parts)})"

    for item in parse(text):
        if not isinstance(item, str):
            stack.append(("", (("", str(item)),)))
            continue
        kind, inverse = ("+", "-") if item in "+-" else ("*", "/")
        parts: list[tuple[str, str]] = []
        right, left = stack.pop(), stack.pop()
        for turned, (own, operands) in ((False, left), (item == inverse, right)):
            if own != kind:
                operands = ((kind, shown(own, operands)),)
            other = {kind: inverse, inverse: kind}
            parts += [(other[s] if turned else s, text) for s, text in operands]
        stack.append((kind, tuple(sorted(parts))))
    return shown(*stack.pop())


def check_countdown(text: str, numbers: Sequence[int], target: int) -> None:
    """Passes if an expression of the given numbers, each at most once, is the target.

    Args:
        text: the expression.
        numbers: that may be used; one that stands twice may be used twice.
        target: the value to reach, exactly.

    Raises:
        ExpressionError: otherwise, with the reason.
    """
    postfix = parse(text)
    # Before the value is computed: that keeps its cost within the game's.
    over = Counter(n for n in postfix if not isinstance(n, str)) - Counter(numbers)
    if over:
        number = next(iter(over))
        given = ", ".join(map(str, numbers))
        raise ExpressionError(
            f"{number} is used {over[number]} time(s) more often than it is among the "
            f"numbers {given}."
        )
    value = evaluate(postfix)
    if value != target:
        raise ExpressionError(f"the value is {value}, not {target}.")


def _unexpected(text: str, at: int, operand_next: bool) -> ExpressionError:
    found = repr(text[at]) if at < len(text) else "the end"
    wanted = "a number or '('" if operand_next else "an operator, ')' or the end"
    return ExpressionError(
        f"expression {text!r}: character {at + 1} is {found}; expected {wanted}."
    )
