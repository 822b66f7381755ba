"""Symbolic equality of LaTeX answers; runs inside a worker process.

Hugging Face's math-verify reads the LaTeX (by an ANTLR grammar, latex2sympy2_extended)
and compares through sympy. Of the readers on the package index it is the one that is
kept up and knows sets, intervals, matrices and equations; and as used here it does not
hand text to sympy's ``parse_expr``, which evaluates Python. Its own time-outs are
signals of the main thread; the worker's kill stands in for them.
"""

import functools
import logging


@functools.cache
def _silence() -> None:
    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def equal(gold: str, answer: str) -> bool:
    """Says whether two LaTeX formulas without dollar signs mean the same.

    Raises:
        ImportError: math-verify is not installed.
    """
    from math_verify import LatexExtractionConfig, parse, verify

    _silence()
    first, second = (
        parse(
            f"${text}$",
            extraction_config=[LatexExtractionConfig()],
            fallback_mode="no_fallback",
            parsing_timeout=None,  # pyright: ignore
        )
        for text in (gold, answer)
    )
    return bool(first and second and verify(first, second, timeout_seconds=None))
