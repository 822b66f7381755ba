r"""Answers of mathematical word problems: found in a response, compared with the gold.

The answer of a response is its last complete ``\boxed{...}`` (or ``\boxed 9``); else
the number behind its last '####'; else its last number. What stands in a thought,
``<think>...</think>``, is no answer, whether the thought ends or not. Two answers are
equal

- as exact numbers: '1,234.50', '3/4', '\frac{3}{4}', '1\frac12', '1.5e3', '10^6',
  '2\times10^{3}', '0.1\overline{6}', '50\%', '5\text{ million}'. A percentage is a
  hundredth, or the bare number if the other side has no percent sign: '50%' equals both
  '0.5' and '50';
- as TeX, token by token, up to sizes of brackets, thin spaces, bold face, colours and
  math shifts; '√', 'π', '½', '²' and their like are the TeX that they stand for;
- part by part, where both are lists, tuples, sets, intervals or matrices of the same
  form: '(1, \frac12)' and '(1,0.5)'. The order of a set in braces counts nothing;
- or symbolically, where one of them is no number: '2\sqrt2' and '\sqrt8'.

A unit ('5\text{ cm}', '45^\circ', '10\text{ a.m.}'), the base of a numeral ('4343_7')
and the variable of 'x = 5' count nothing where one side alone has them; where both do,
they must agree. '100, 200' is a list of two, '100,200' a number.

The symbolic comparison sees the answers as they were written. It runs in a process that
is killed after a time-out, see :mod:`tmdjax.rewards.symbolic`. No text raises: what
goes wrong is an outcome, and outcomes are counted.
"""

import dataclasses
import importlib.util
import math
import re
from collections import Counter
from fractions import Fraction

from tmdjax.core.checks import check_range
from tmdjax.rewards.tex import joined, parts_of, plain_letters, plain_text, tokens_of
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
    rf"([+-]?)([0-9]*)\\frac\{{([+-]?{_DECIMAL})\}}\{{([+-]?{_DECIMAL})\}}"
)
_TEN = re.compile(r"([+-]?)10\^\{([+-]?[0-9]+)\}")
_REPEATING = re.compile(r"([+-]?)([0-9]*)\.([0-9]*)\\(?:overline|bar)\{([0-9]+)\}")
_LAST_NUMBER = re.compile(
    r"(?:(?<![\w.)\]}])[-+])?\\?\$?"
    r"(?:(?:[0-9]+ ?)?\\[dt]?frac(?:\{[0-9]+\}\{[0-9]+\}|[0-9]{2})"
    rf"|{_DIGITS}(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+|/[0-9]+| [0-9]+/[0-9]+"
    r"|\s?(?:\\times|\\cdot|×|x|\*)\s?10\^\{?[+-]?[0-9]+\}?)?"
    r"|\.[0-9]+)(?:\s?\\?%|\s+percent)?"
)
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_UNBRACED = re.compile(r"\\(?:boxed|fbox)\s+(?=[^\s{])([^\n$]*)")
_SPECIAL_TOKEN = re.compile(r"<\|[^<>|\s]{1,60}\|>|</s>|<eos>|<end_of_turn>")
# A number, and behind it words, a remark in brackets, or nothing that counts.
_WORDS = r"(?:[^\W\d_]{2,}|[^\W\d_] +[^\W\d_]{2,}|[mghsLl]$)"
_COUNTED = re.compile(
    rf"([-+]?\\?\$?[-+]?{_DECIMAL}(?: [0-9]+/[0-9]+|/[0-9]+)?(?: ?\\?%)?)"
    rf"(?:[.,;:!?]?\s+{_WORDS}|\s*(?:[-=&]|—)\s+{_WORDS}|/{_WORDS}|\s*[(\[]|\s*</?[a-z]"
    r"|[^\w+*/^=\\<>-]*$)"
)
_LETTER = r"(?:[A-Za-z]|\\[a-z]+ ?)(?:_\{[^{}]*\})?"
_NAMED = re.compile(rf"({_LETTER})(?:=(?!=)|\\in(?![a-z]) ?)")
_NAMED_BEHIND = re.compile(rf"([^=]+)=({_LETTER})")
_BASED = re.compile(r"([0-9A-Za-z.]+)_\{(?:\\text\{)?([0-9]+|[a-z]+)\}?\}")
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_COUNTED_IN_WORDS = re.compile(rf"({_DECIMAL}) ([A-Za-z][A-Za-z ]*)")
_TEXT_UNIT = re.compile(rf"{_TEXT.pattern}(?:\^\{{([0-9])\}})?$")
_BARE_UNIT = re.compile(
    r"(?<=[0-9.}%]) ?([A-Za-z][A-Za-z. ]*(?:/[A-Za-z]+)?)(?:\^\{([0-9])\})?$"
)
_TEMPERATURE = re.compile(r"° ?(?:\\text\{)?([CF])\}?$")
_CHOICE = re.compile(r"(?:\\(?:text|textbf|mathrm|mathbf)\{)?\(?([A-Z])\)?\}?")
_CURRENCIES = {"US\\$": "$", "\\$": "$", "€": "€", "£": "£", "¥": "¥", "¢": "¢"}

_BASES = (
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen"
).split()
_SCALES = {
    "hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12,
}  # fmt: skip
_UNITS = {
    name: names.split()[0]
    for names in (
        "° degree deg|$ dollar usd buck|¢ cent|€ euro eur|£ gbp|¥ yen|mm millimeter "
        "millimetre|cm centimeter centimetre|m meter metre|km kilometer kilometre|in "
        "inch inche|ft foot feet|yd yard|mi mile|mg milligram|g gram|kg kilogram|lb "
        "pound|oz ounce|ml milliliter millilitre|l liter litre|h hr hour|min minute|s "
        "sec second|day|week|month|year|am|pm|mi/h mph|% percent|people person|way|"
        "point|integer|digit|student|ticket|meal|edge|cup"
    ).split("|")
    for name in names.split()
}


@dataclasses.dataclass(frozen=True)
class Term:
    """One answer, or one part of a list: what it says, and of what.

    Attributes:
        text: TeX without name, unit and base.
        number: its exact value, of a percentage the hundredth, or None.
        percent: whether it has a percent sign.
        name: the variable it is the value of, or ''.
        unit: in one spelling, or ''.
        base: of the numeral, or ''.
    """

    text: str
    number: Fraction | None = None
    percent: bool = False
    name: str = ""
    unit: str = ""
    base: str = ""


def extract_answer(text: str) -> str | None:
    r"""The answer of a response: boxed, behind '####', or its last number.

    Behind '####' stands the answer as the strict pattern of the usual harnesses for
    GSM8K reads it: the number that the line begins with, whatever words follow. A line
    of words is a heading where anything follows it, and then the last number counts.
    Names of special tokens and emphasis by asterisks are no part of an answer.

    Returns:
        The content of the last complete ``\boxed``, or what stands behind '####', or
        the number as written; None if there is none of them.

    References:
        '#### (\-?[0-9\.\,]+)' of openai/grade-school-math, the harness of EleutherAI
        and verl.
    """
    text = _without_thoughts(text)
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    text = plain_letters(_SPECIAL_TOKEN.sub(" ", text))
    rest, heading = text, None
    for index, part in enumerate(reversed(re.split("#{4,}", text)[1:])):
        line, _, after = part.strip().partition("\n")
        line = line.replace("**", "").strip(" \t*!`'\"")
        if line and not line[0].isalpha():
            counted = None if _is_number(line) else _COUNTED.match(line)
            return counted[1] if counted else line
        if line and not index:
            if not after.strip():
                return line
            rest, heading = after, line
    numbers = _LAST_NUMBER.findall(rest[-_TAIL:])
    return numbers[-1] if numbers else heading


def _is_number(line: str) -> bool:
    """Whether all of a line is a number, or a list of them, units aside."""
    return all(t.number is not None or not t.text for t in read_answer(line)[0])


def _without_thoughts(text: str) -> str:
    """What stands outside of <think>...</think>; either mark may be missing."""
    *closed, last = text.split("</think>")
    before = [part.partition("<think>") for part in closed]
    spoken = [part for part, mark, _ in before if mark]
    return "\n".join([*spoken, last.partition("<think>")[0]])


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete ``\boxed{...}`` or ``\fbox{...}``, or None.

    ``\boxed 9`` without braces holds what follows to the end of its formula (a dollar
    sign), or, outside of one, the next word.
    """
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
    for match in _UNBRACED.finditer(text, max(last, 0)):
        inside = match[1]
        if text[match.end() : match.end() + 1] != "$":
            inside = re.split(r"\s|\\[)\]]", inside)[0].rstrip(".,;")
        content = inside.strip()
    return content


def read_answer(text: str) -> tuple[list[Term], list[str]]:
    """The terms of an answer, and the separators between them, one fewer.

    An answer that is no list is one term. Texts of more than 2000 characters are one
    term, of their text alone.
    """
    if len(text) > _LONGEST_FORMULA:
        return [Term(text.strip())], []
    text = plain_text(text).strip()
    text = re.sub(r"(?<!\\)[.,;]+$", "", text).strip(" *\n\t")
    if choice := _CHOICE.fullmatch(text):
        return [Term(choice[1])], []
    text = re.sub(r"^\(([0-9A-Za-z]+)\)(?=_)", r"\1", text)
    parts, separators = parts_of(tokens_of(text))
    return [_term(joined(part)) for part in parts], separators


def _term(text: str) -> Term:
    unit, name, base, scale = "", "", "", 1
    if whole := _TEXT.fullmatch(text):
        text = whole[1]
        if counted := _COUNTED_IN_WORDS.fullmatch(text):
            text = rf"{counted[1]}\text{{{counted[2]}}}"
    while found := _unit_at_end(text):
        text, word = found
        if word in _SCALES:
            scale *= 10 ** _SCALES[word]
        else:
            unit = unit or word
    for sign, currency in _CURRENCIES.items():
        if sign in text:
            text, unit = text.replace(sign, ""), unit or currency
    text = _TEXT.sub(r"\1", text).strip().rstrip(".").strip()
    while _in_braces(text):
        text = text[1:-1]
    if unit in ("am", "pm"):
        text = text.removesuffix(":00")
    if match := _NAMED.match(text):
        name, text = match[1].strip(), text[match.end() :].strip()
    elif (match := _NAMED_BEHIND.fullmatch(text)) and parse_number(match[1]):
        text, name = match[1].strip(), match[2].strip()
    if (match := _BASED.fullmatch(text)) and match[1][0].isdecimal():
        text, base = match[1], match[2]
        base = str(_BASES.index(base) + 2) if base in _BASES else base
    text = text.removeprefix("+")
    number = parse_number(text)
    if number is None:
        return Term(text, None, False, name, unit, base)
    value, percent = number
    if unit == "%" and not percent:
        value, percent = value / 100, True
    return Term(text, value * scale, percent, name, unit.strip("%"), base)


def _in_braces(text: str) -> bool:
    """Whether one pair of braces holds all of a text."""
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth <= 0:
            return letter == "}" and position == len(text) - 1
    return False


def _unit_at_end(text: str) -> tuple[str, str] | None:
    """What stands before a unit at the end, and the unit in one spelling."""
    if match := _TEMPERATURE.search(text):
        return text[: match.start()].rstrip(), f"°{match[1]}"
    if len(text) > 1 and text.endswith("°"):
        return text[:-1], "°"
    match = _TEXT_UNIT.search(text)
    if not (match and text[: match.start()].strip()):
        match = _BARE_UNIT.search(text)
        if not match or any(len(word) < 2 for word in match[1].split()):
            return None
    before, word = text[: match.start()].rstrip(), _spelling(match[1], match[2] or "")
    first, _, more = word.partition(" ")
    if first in _SCALES and more:  # 'million dollars'
        return f"{before} {first}", more
    each = word.rstrip("0123456789").split("/")
    known = word in _SCALES or all(one in {*_UNITS.values(), ""} for one in each)
    return (before, word) if known or match.re is _TEXT_UNIT else None


def _spelling(unit: str, power: str) -> str:
    """A unit in one spelling: 'square inches' is 'in2', 'a.m.' is 'am'."""
    unit = unit.lower().replace(".", "").replace("per cent", "percent")
    unit, raised, digit = unit.partition("^")
    power = digit.strip("{}") if raised else power
    first, slash, second = unit.replace(" per ", "/").partition("/")
    if slash:
        return f"{_spelling(first, '')}/{_spelling(second, power)}"
    words = unit.split()
    for word, exponent in (("square", "2"), ("sq", "2"), ("cubic", "3")):
        if words[:1] == [word]:
            words, power = words[1:], exponent
    words = [w if w in _UNITS else w.removesuffix("s") for w in words]
    words = [_UNITS.get(w, w) for w in words if w != "unit"]
    return " ".join(words) + power if words else ""


def parse_number(text: str) -> tuple[Fraction, bool] | None:
    """Exact value of a number in the TeX of :class:`Term`, and whether it has a '%'.

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
    text = re.sub(r" ?([x*×]|\\times|\\cdot) ?(?=10\^)", r"\1", text)
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
        sign, whole, top, bottom = match.groups()
        return _signed(sign, int(whole or 0) + _plain(top) / _plain(bottom))
    if (match := _TEN.fullmatch(text)) and abs(int(match[2])) <= _LARGEST_EXPONENT:
        return _signed(match[1], Fraction(10) ** int(match[2]))
    if match := _REPEATING.fullmatch(text):
        sign, whole, digits, again = match.groups()
        part = Fraction(int(again), 10 ** len(again) - 1) + int(digits or 0)
        return _signed(sign, int(whole or 0) + part / 10 ** len(digits))
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
            answer: the gold answer alone, in any of the forms above; of one that has
                a box, what the last box holds.

        Returns:
            One of ``OUTCOMES``: 'timed out' and 'failed' speak of the symbolic
            comparison, and earn nothing.

        Raises:
            ValueError: the gold answer is blank.
        """
        if not answer.strip():
            raise ValueError("the gold answer is blank; drop the problem.")
        found, boxed = extract_answer(response), last_boxed(answer)
        gold = boxed if boxed and boxed.strip() else answer
        outcome = "no answer" if found is None else self._compare(found, gold)
        self.counts[outcome] += 1
        return outcome

    def close(self) -> None:
        """Ends the process of the symbolic comparison."""
        if self._equal is not None:
            self._equal.close()

    def _compare(self, found: str, gold: str) -> str:
        terms, separators = read_answer(found)
        wanted, between = read_answer(gold)
        if not separators and not terms[0].text:
            return "no answer"
        verdicts = [self._same(x, y) for x, y in zip(terms, wanted)]
        if separators == between and all(verdicts):
            return "equal"
        if separators == between and self._same_set(terms, wanted, separators):
            return "equal"
        if len(terms) == len(wanted) == 1 and verdicts == [False]:
            return "different"
        one_number = [len(t) == 1 and t[0].number is not None for t in (terms, wanted)]
        if any(one_number) and all(t.number is not None for t in (*terms, *wanted)):
            return "different"  # a list is no number
        if self._equal is None or len(found) > _LONGEST_FORMULA:
            return "different"
        try:
            same = self._equal(_bare(gold), _bare(found), float(self._tolerance))
            return "equal" if same else "different"
        except WorkerTimeout:
            return "timed out"
        except WorkerError:
            return "failed"

    def _same(self, found: Term, gold: Term) -> bool | None:
        """Whether two terms are equal; None where that is for symbols to say."""
        for a, b in ((found.name, gold.name), (found.unit, gold.unit)):
            if a and b and a != b:
                return False
        if found.base or gold.base:
            if found.base and gold.base and found.base != gold.base:
                return False
            return found.text.lower() == gold.text.lower()
        if found.number is not None and gold.number is not None:
            return self._close(found, gold)
        return True if found.text == gold.text else None

    def _same_set(
        self, found: list[Term], gold: list[Term], separators: list[str]
    ) -> bool:
        """Whether both are one set in braces, in whatever order."""
        commas = len(separators) - 2
        if separators != [r"\{", *[","] * commas, r"\}"] or commas > 50:
            return False
        for those, others in ((found, gold), (gold, found)):
            for term in those[1:-1]:
                if not any(self._same(term, other) for other in others[1:-1]):
                    return False
        return not (found[0].text or found[-1].text or gold[0].text or gold[-1].text)

    def _close(self, found: Term, gold: Term) -> bool:
        assert found.number is not None and gold.number is not None
        x, y = found.number, gold.number
        readings = [x]
        if found.percent != gold.percent:
            readings.append(x * 100 if found.percent else x / 100)
        return any(abs(v - y) <= self._tolerance * abs(y) for v in readings)


def _bare(text: str) -> str:
    """TeX without the math shifts around the whole of it."""
    text = plain_text(text).strip()
    for start, end in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = text.removeprefix(start).removesuffix(end)
        if len(text) == len(inner) + len(start) + len(end) and start not in inner:
            return inner.strip()
    return text
