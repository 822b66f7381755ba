"""Symbolic equality of LaTeX answers; runs inside a worker process.

Hugging Face's math-verify reads the LaTeX (by an ANTLR grammar, latex2sympy2_extended)
and compares through sympy. Of the readers on the package index it is the one that is
kept up and knows sets, intervals, matrices and equations; and as used here it does not
hand text to sympy's ``parse_expr``, which evaluates Python. Its own time-outs are
signals of the main thread; the worker's kill stands in for them.
"""

import functools
import logging
from typing import Any


@functools.cache
def _silence() -> None:
    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def equal(gold: str, answer: str, tolerance: float = 0.0) -> bool:
    """Says whether two LaTeX formulas mean the same.

    math-verify rounds before it compares numbers, to 6 decimals; here two numbers are
    compared exactly, or by the tolerance: 1.414214 is no root of 2.

    Args:
        gold: as it was written, without math shifts around the whole.
        answer: the same.
        tolerance: relative difference of two numbers that still counts as equal, >= 0.

    Raises:
        ImportError: math-verify is not installed.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    _silence()
    first, second = (
        parse(
            text if "$" in text else f"${text}$",
            extraction_config=[LatexExtractionConfig()],
            fallback_mode="no_fallback",
            parsing_timeout=None,  # pyright: ignore
        )
        for text in (gold, answer)
    )
    if not (first and second):
        return False
    numbers = _number(first[0]), _number(second[0])
    if numbers[0] is not None and numbers[1] is not None:
        return _close(*numbers, tolerance)
    return bool(verify(first, second, timeout_seconds=None))


def _number(formula: Any) -> Any:
    """A formula without symbols, its decimals as exact fractions; None for others."""
    import sympy

    if not isinstance(formula, sympy.Expr) or formula.free_symbols:
        return None
    if formula.is_number is not True:
        return None
    floats = formula.atoms(sympy.Float)
    return formula.xreplace({x: sympy.Rational(str(x)) for x in floats})


def _close(gold: Any, answer: Any, tolerance: float) -> bool:
    import sympy

    difference = gold - answer
    if tolerance:
        bound = tolerance * abs(sympy.N(gold, 30))
        return bool(abs(sympy.N(difference, 30)) <= bound)
    return bool(difference.equals(0))
