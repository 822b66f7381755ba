r"""Answers in TeX, cut into tokens, without what changes their looks alone.

A formula is read token by token, so that ``\\`` (a row of a matrix ends), ``\,`` (a
thin space) and ``\leftarrow`` beside ``\left`` are each what they are.
"""

import re
import unicodedata

_LENGTH = r"\[-?[0-9.]+ ?(?:pt|em|ex|mm|cm|in)\]"
_TOKEN = re.compile(rf"\\\\(?:{_LENGTH})?|\\(?:[A-Za-z]+|.)|\s+|.", re.DOTALL)
# Letters that only look different, and what they stand for.
_PLAIN = {
    **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full width
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),  # of no width
    **dict.fromkeys("−–‐‑‒", "-"),
    **dict.fromkeys("⁄∕", "/"),
    **dict.fromkeys("º˚", "°"),
    **{"\u3000": " ", "、": ", ", "。": "."},
    **{
        letter: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", letter)[::2])
        for letter in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
    },
}
_TRANSLATION = str.maketrans(_PLAIN)
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_SPACES = {r"\ ", "~", r"\quad", r"\qquad"}
_TEXT = {
    *(r"\text", r"\textbf", r"\textit", r"\textrm", r"\textnormal", r"\mathrm"),
    *(r"\mathbf", r"\mathit", r"\mathsf", r"\mbox", r"\operatorname"),
}
_DROPPED = {
    *("$", r"\(", r"\)", r"\[", r"\]", r"\,", r"\!", r"\;", r"\:", r"\>"),
    *(r"\displaystyle", r"\textstyle", r"\limits", r"\nolimits", r"\hline"),
    *(r"\bf", r"\rm", r"\it", r"\small", r"\large", r"\Large", r"\LARGE", r"\huge"),
    *(r"\thinspace", r"\enspace", r"\nonumber"),
    *(rf"\{size}{side}" for size in ("big", "Big", "bigg", "Bigg") for side in "lr"),
}
_REPLACED = {
    **dict.fromkeys((r"\dfrac", r"\tfrac", r"\cfrac"), r"\frac"),
    **dict.fromkeys(("·", "⋅"), r"\cdot"),
    **dict.fromkeys(("∅", r"\varnothing"), r"\emptyset"),
    **{"∞": r"\infty", "π": r"\pi", "θ": r"\theta", "√": r"\sqrt", "±": r"\pm"},
    **{"≤": r"\le", "≥": r"\ge", "≠": r"\ne", "×": r"\times"},
    **{"∪": r"\cup", "∩": r"\cap", "∈": r"\in"},
    r"\%": "%",
    r"\lbrace": r"\{",
    r"\rbrace": r"\}",
    **dict.fromkeys((r"\leq", r"\leqslant"), r"\le"),
    **dict.fromkeys((r"\geq", r"\geqslant"), r"\ge"),
    **dict.fromkeys((r"\lvert", r"\rvert", r"\vert"), "|"),
    **{r"\lt": "<", r"\gt": ">"},
    r"\neq": r"\ne",
    r"\degree": "°",
}
_ARGUMENTS = {
    **dict.fromkeys(("^", "_", r"\sqrt", r"\overline", r"\bar"), 1),
    **dict.fromkeys((r"\frac", r"\binom"), 2),
}
# Commands that change the looks of an argument, and how many before it are not shown.
_LOOKS = {
    **dict.fromkeys((r"\boldsymbol", r"\bm", r"\underline"), 0),
    **dict.fromkeys((r"\color", r"\textcolor", r"\phantom", r"\hspace", r"\tag"), 1),
}
_OPENING, _CLOSING = ("(", "[", r"\{"), (")", "]", r"\}")
SEPARATORS = (*_OPENING, *_CLOSING, ",", ", ", "&", r"\\", r"\cup")
"""Tokens between the parts of a list, a tuple, a set, an interval or a matrix."""


def plain_letters(text: str) -> str:
    r"""The text in letters of ASCII where others only look different.

    Full-width forms, hyphens and minus signs, '½' (``\frac{1}{2}``); what has no width
    is gone.
    """
    return text.translate(_TRANSLATION)


def plain_text(text: str) -> str:
    """As :func:`plain_letters`, and '²' is ``^2``: a formula, no more a sentence."""

    def power(match: re.Match[str]) -> str:
        digits = plain_letters(unicodedata.normalize("NFKC", match[0]))
        return f"^{digits}" if len(digits) == 1 else f"^{{{digits}}}"

    return _RAISED.sub(power, plain_letters(text))


def tokens_of(text: str) -> list[str]:
    r"""The tokens of an answer, as :func:`plain_text` has it, that say what it means.

    Math shifts, sizes of brackets, colours, bold face, thin spaces and a row break
    behind the last row are gone; white space is kept between letters and digits alone.
    ``\text{...}`` and its kind are one token, '°' stands for ``^\circ``, arguments have
    their braces (``\frac12`` is ``\frac{1}{2}``), commas and spaces that group the
    digits of a number are gone, and the comma of a list is ', ' where a space follows
    it. 'and' and 'or' are such a comma, but not between words.
    """
    return _ungrouped(_braced(_spaced(_words(_TOKEN.findall(text)))))


def joined(tokens: list[str]) -> str:
    """Tokens as TeX; a control word stays apart from a letter behind it."""
    found: list[str] = []
    for token in tokens:
        if found and token[0].isalpha() and re.fullmatch(r"\\[A-Za-z]+", found[-1]):
            found.append(" ")
        found.append(token)
    return "".join(found)


def parts_of(tokens: list[str]) -> tuple[list[list[str]], list[str]]:
    r"""Tokens cut at ``SEPARATORS`` and at the ends of an environment.

    Returns:
        The parts, and the separators between them: one fewer. ', ' is ','.
    """
    parts: list[list[str]] = [[]]
    separators = []
    position = 0
    while position < len(tokens):
        token = tokens[position]
        if token in (r"\begin", r"\end") and "}" in tokens[position:]:
            end = tokens.index("}", position)
            token, position = joined(tokens[position : end + 1]), end
            token = token.replace("{bmatrix}", "{pmatrix}")
        elif token not in SEPARATORS:
            parts[-1].append(token)
            position += 1
            continue
        separators.append(token.strip() or token)
        parts.append([])
        position += 1
    return parts, separators


def _words(raw: list[str]) -> list[str]:
    r"""Replaces, drops, and makes one token of each ``\text{...}``."""
    found: list[str] = []
    position = 0
    while position < len(raw):
        token = raw[position]
        position += 1
        if token.startswith("\\\\"):
            last = "".join(raw[position : position + 2]).strip()
            if last and not last.startswith(r"\end"):
                found.append("\\\\")
        elif token in _LOOKS:
            for _ in range(_LOOKS[token]):
                position = (_group(raw, position) or (0, position))[1]
            if group := _group(raw, position):
                found += _words(raw[group[0] : group[1] - 1])
                position = group[1]
        elif token in (r"\left", r"\right"):
            position += raw[position : position + 1] == ["."]
        elif token in _TEXT and (group := _group(raw, position)):
            start, position = group
            inside = (" " if t in _SPACES else t for t in raw[start : position - 1])
            content = " ".join("".join(inside).split())
            if content in ("and", "or"):
                found.append(", ")
            elif content.strip("$ "):
                found.append(rf"\text{{{content}}}")
        elif token == "^" and (end := _circle(raw, position)):
            found.append("°")
            position = end
        elif raw[position - 1 : position + 2] == ["{", ",", "}"]:
            position += 2
        elif token.isspace() and (end := _conjunction(raw, position)):
            found.append(", ")
            position = end
        elif token.isspace() or token in _SPACES:
            found.append(" ")
        elif token not in _DROPPED:
            found.append(_REPLACED.get(token, token))
    return found


def _group(raw: list[str], position: int) -> tuple[int, int] | None:
    """Where the content of a group in braces begins, and what follows; or None."""
    while raw[position : position + 1] and raw[position].isspace():
        position += 1
    if raw[position : position + 1] != ["{"] or "}" not in raw[position:]:
        return None
    depth, start = 0, position + 1
    for end in range(position, len(raw)):
        depth += (raw[end] == "{") - (raw[end] == "}")
        if not depth:
            return start, end + 1
    return None


def _circle(raw: list[str], position: int) -> int:
    r"""What follows ``\circ`` or ``{\circ}``; 0 if that does not stand there."""
    ahead = [token for token in raw[position : position + 6] if not token.isspace()]
    for mark in ([r"\circ"], ["{", r"\circ", "}"]):
        if ahead[: len(mark)] == mark:
            last = raw.index(mark[-1], position)
            return last + 1
    return 0


def _conjunction(raw: list[str], position: int) -> int:
    """What follows 'and ' or 'or ', unless a word stands before it; else 0."""
    before = raw[max(position - 3, 0) : position - 1]
    if len(before) == 2 and all(token.isalpha() for token in before):
        return 0
    for word in ("or", "and"):
        end = position + len(word)
        if "".join(raw[position:end]) == word and raw[end : end + 1]:
            return end + 1 if raw[end].isspace() else 0
    return 0


def _spaced(tokens: list[str]) -> list[str]:
    """White space between letters and digits alone; ', ' where it follows a comma."""
    found: list[str] = []
    for position, token in enumerate(tokens):
        if token != " ":
            found.append(token)
            continue
        after = next((t for t in tokens[position + 1 : position + 2]), "")
        if found and found[-1] == ",":
            found[-1] = ", "
        elif found and re.search(r"^[^\\]*\w$", found[-1]) and after[:1].isalnum():
            found.append(" ")  # after a control word it says nothing
    return found


def _braced(tokens: list[str]) -> list[str]:
    """Braces around the arguments of one token."""
    found: list[str] = []
    opened: list[int] = []
    wanted = 0  # arguments still to come
    degree = False  # whether that of a root is being read
    for token in tokens:
        if token == " " and (wanted or found[-1:] == ["}"]):
            continue
        if token == "{":
            opened.append(max(wanted - 1, 0))
            wanted = 0
        elif token == "}":
            wanted = opened.pop() if opened else 0
        elif token == "[" and found and found[-1] == r"\sqrt":
            wanted, degree = 0, True
        elif token == "]" and degree:
            found.append(token)
            wanted, degree = 1, False
            continue
        elif wanted and token not in _ARGUMENTS:
            found += ["{", token, "}"]
            wanted -= 1
            continue
        found.append(token)
        wanted = _ARGUMENTS.get(token, wanted)
    return found


def _ungrouped(tokens: list[str]) -> list[str]:
    """Without the commas and spaces that group the digits of one number.

    In brackets a comma separates, as in (100,200), unless others there have a space
    behind them, as in (1,000, 2,000); outside, commas group if all of them can.
    """
    loose, depth = ", " in tokens, 0
    groups = set()
    run = 0  # digits of the number so far; more than 3 where no group may follow
    for position, token in enumerate(tokens):
        depth += (token in _OPENING) - (token in _CLOSING)
        if token in (",", " ") and 0 < run <= 3:
            following = [t.isdecimal() for t in tokens[position + 1 : position + 5]]
            three = following[:3] == [True] * 3 and not any(following[3:])
            if three and (token == " " or loose or depth <= 0):
                groups.add(position)
                run = 0
                continue
        fraction = token.isdecimal() and tokens[position - 1 : position] == ["."]
        run = 4 if fraction else run + 1 if token.isdecimal() else 0
    commas = {position for position, token in enumerate(tokens) if token == ","}
    if not (loose or commas <= groups):
        groups -= commas
    return [token for position, token in enumerate(tokens) if position not in groups]
