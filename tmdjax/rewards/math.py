r"""Answers of mathematical word problems: found in a response, compared with the gold.

The answer of a response is its last complete ``\boxed{...}``; else what follows its
last '####', to the end of the line; else its last number. Two answers are equal

- as texts, up to spaces, dollar signs, ``\text`` and similar ornaments of LaTeX;
- as exact numbers: '1,234.50', '3/4', '\frac{3}{4}', '1\frac12', '1.5e3',
  '2\times10^{3}', '50\%'. A percentage is a hundredth, or the bare number if the other
  side has no percent sign: '50%' equals both '0.5' and '50'. A unit in ``\text`` counts
  nothing;
- or symbolically, where one of them is no number: '2\sqrt2' and '\sqrt8'.

The symbolic comparison runs in a process that is killed after a time-out, see
:mod:`tmdjax.rewards.symbolic`. No text raises: what goes wrong is an outcome, and
outcomes are counted.
"""

import importlib.util
import math
import re
from collections import Counter
from fractions import Fraction

from tmdjax.core.checks import check_range
from tmdjax.rewards.worker import Worker, WorkerError, WorkerTimeout

OUTCOMES = ("equal", "different", "no answer", "timed out", "failed")

_LONGEST_NUMBER = 100  # characters
_TAIL = 10_000  # characters in which the last number is sought
_LARGEST_EXPONENT = 400
_LONGEST_FORMULA = 2000

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)"
_POWER = r"(?:[eE]([+-]?[0-9]+)|(?:\\times|\\cdot|×|x|\*)10\^\{?([+-]?[0-9]+)\}?)"
_SCIENTIFIC = re.compile(rf"([+-]?)({_DECIMAL}){_POWER}?")
_RATIO = re.compile(rf"([+-]?)({_DECIMAL})/([+-]?)({_DECIMAL})")
_MIXED = re.compile(r"([+-]?)([0-9]+)\s+([0-9]+)/([0-9]+)")
_FRAC = re.compile(
    r"([+-]?)([0-9]*)\\frac(?:\{([+-]?[0-9]+)\}|([0-9]))(?:\{([+-]?[0-9]+)\}|([0-9]))"
)
_LAST_NUMBER = re.compile(
    r"(?:(?<![\w.)\]}])[-−+])?\\?\$?"
    r"(?:\\[dt]?frac\{[0-9]+\}\{[0-9]+\}"
    rf"|{_DIGITS}(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+|/[0-9]+)?|\.[0-9]+)(?:\s?\\?%)?"
)
_BRACE = re.compile(r"\\f?boxed\s*\{|\\.|[{}]", re.DOTALL)
_TEXT = r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}"
_TRAILING_TEXT = re.compile(rf"(?:\\ |\s|~)*{_TEXT}(?:\^\{{?[0-9]\}}?)?\s*$")
_ASSIGNED = re.compile(r"^[A-Za-z]\s*=\s*(?=[^=])")
_REPLACED = (
    (re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;:]|\\\$|\$"), ""),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|°"), ""),
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\{,\}"), ","),
    (re.compile("[−–]"), "-"),
    (re.compile(r"\\ |~|\s+"), " "),
)


def extract_answer(text: str) -> str | None:
    r"""The answer of a response: boxed, after '####', or its last number.

    Returns:
        The text between the braces of the last complete ``\boxed``, or the line's rest
        behind '####', or the number as written; None if there is none of them.
    """
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    _, mark, rest = text.rpartition("####")
    if mark and rest.strip():
        return rest.strip().splitlines()[0].strip()
    numbers = _LAST_NUMBER.findall(text[-_TAIL:])
    return numbers[-1] if numbers else None


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete ``\boxed{...}`` or ``\fbox{...}``, or None."""
    # In one pass: a response of nothing but openings costs no more than another.
    opened: list[tuple[bool, int]] = []
    last, content = -1, None
    for match in _BRACE.finditer(text):
        brace = match.group()
        if brace == "}":
            boxed, start = opened.pop() if opened else (False, 0)
            if boxed and start > last:
                last, content = start, text[start : match.start()]
        elif brace[-1] == "{" and brace != "\\{":
            opened.append((brace != "{", match.end()))
    return content


def normalise(text: str) -> str:
    """An answer without the ornaments of LaTeX that mean nothing."""
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(".").strip()
    bare = _TRAILING_TEXT.sub("", text)
    text = bare if bare.strip() else re.sub(_TEXT, r"\1", text)
    return _ASSIGNED.sub("", text.strip()).strip()


def parse_number(text: str) -> tuple[Fraction, bool] | None:
    """Exact value of a number as :func:`normalise` leaves it, and whether it has a '%'.

    A percentage gives its hundredth. Exponents beyond 400, and texts of more than 100
    characters, are no numbers here: they give None, as what is no number does.
    """
    if len(text) > _LONGEST_NUMBER:
        return None
    percent = text.endswith("%")
    text = text.removesuffix("%").strip()
    try:
        value = _value(text)
    except ZeroDivisionError:
        return None
    if value is None:
        return None
    return (value / 100 if percent else value), percent


def _value(text: str) -> Fraction | None:
    if match := _MIXED.fullmatch(text):
        sign, whole, top, bottom = match.groups()
        return _signed(sign, int(whole) + Fraction(int(top), int(bottom)))
    text = text.replace(" ", "")
    if match := _SCIENTIFIC.fullmatch(text):
        sign, decimal, e, power = match.groups()
        exponent = int(e or power or 0)
        if abs(exponent) > _LARGEST_EXPONENT:
            return None
        return _signed(sign, _plain(decimal) * Fraction(10) ** exponent)
    if match := _RATIO.fullmatch(text):
        sign, top, sign_below, bottom = match.groups()
        return _signed(sign, _signed(sign_below, _plain(top) / _plain(bottom)))
    if match := _FRAC.fullmatch(text):
        sign, whole, top, t, bottom, b = match.groups()
        fraction = Fraction(int(top or t), int(bottom or b))
        return _signed(sign, int(whole or 0) + fraction)
    return None


def _plain(decimal: str) -> Fraction:
    return Fraction(decimal.replace(",", "").rstrip("."))


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


class MathVerifier:
    """Compares answers, and counts how the comparisons end.

    Attributes:
        counts: of each outcome so far.

    Args:
        symbolic: compare what are no numbers through sympy.
        timeout: seconds of one symbolic comparison, > 0.
        tolerance: relative difference of numbers that still counts as equal, >= 0; 0
            compares exactly, so 0.333 is not 1/3.

    Raises:
        ImportError: ``symbolic`` without the extra 'math'.
        ValueError: a number outside its range.
    """

    def __init__(
        self, *, symbolic: bool = True, timeout: float = 5.0, tolerance: float = 0.0
    ):
        check_range("tolerance", tolerance, 0, math.inf, open_high=True)
        if symbolic and importlib.util.find_spec("math_verify") is None:
            raise ImportError(
                "symbolic comparison needs the package math-verify. Run: pip install "
                "'tmdjax[math]', or set symbolic=False to compare numbers and texts."
            )
        self.counts: Counter[str] = Counter()
        self._tolerance = Fraction(tolerance)
        self._equal = (
            Worker("tmdjax.rewards.symbolic:equal", timeout=timeout)
            if symbolic
            else None
        )

    def __call__(self, response: str, answer: str) -> float:
        """Reward of a response: 1.0 if its answer equals the gold answer, else 0.0."""
        return float(self.outcome(response, answer) == "equal")

    def outcome(self, response: str, answer: str) -> str:
        """How the comparison of a response with the gold answer ends.

        Args:
            response: any text.
            answer: the gold answer alone, in any of the forms above.

        Returns:
            One of ``OUTCOMES``: 'timed out' and 'failed' speak of the symbolic
            comparison, and earn nothing.

        Raises:
            ValueError: the gold answer is blank.
        """
        if not answer.strip():
            raise ValueError("the gold answer is blank; drop the problem.")
        found = extract_answer(response)
        outcome = "no answer" if found is None else self._compare(found, answer)
        self.counts[outcome] += 1
        return outcome

    def close(self) -> None:
        """Ends the process of the symbolic comparison."""
        if self._equal is not None:
            self._equal.close()

    def _compare(self, found: str, gold: str) -> str:
        found, gold = normalise(found), normalise(gold)
        if found.replace(" ", "") == gold.replace(" ", ""):
            return "equal" if found else "different"
        if not found:
            return "no answer"
        numbers = parse_number(found), parse_number(gold)
        if numbers[0] and numbers[1]:
            return "equal" if self._close(numbers[0], numbers[1]) else "different"
        if self._equal is None or len(found) > _LONGEST_FORMULA:
            return "different"
        try:
            return "equal" if self._equal(gold, found) else "different"
        except WorkerTimeout:
            return "timed out"
        except WorkerError:
            return "failed"

    def _close(self, found: tuple[Fraction, bool], gold: tuple[Fraction, bool]) -> bool:
        (x, x_percent), (y, y_percent) = found, gold
        readings = [x]
        if x_percent != y_percent:
            readings.append(x * 100 if x_percent else x / 100)
        return any(abs(v - y) <= self._tolerance * abs(y) for v in readings)
