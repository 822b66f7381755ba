r"""Mathematical problems from local JSONL files, in three common layouts.

- 'gsm8k': ``question``, ``answer`` (the solution, whose last line is '#### 42').
- 'math': ``problem``, ``solution``, ``answer`` (without it, what stands in the last
  ``\boxed{}`` of the solution), ``level`` ('Level 1' to 'Level 5', or 1 to 5),
  ``subject`` (or ``type``, as the first release has it).
- 'dapo': ``prompt`` (a list of messages with ``role`` and ``content``),
  ``reward_model`` with ``ground_truth``.

Answers and truths may be JSON numbers. Nothing is downloaded. A file is read line by
line; a malformed line, or one with a blank answer, raises, and names the file, the
line, the key, and what is expected; or it is passed over and counted.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tmdjax.core.registry import Registry
from tmdjax.data.text_tasks.problems import Problem
from tmdjax.rewards.math import MathVerifier, last_boxed

_LONGEST_LINE = 10**7

LAYOUTS: Registry[Callable[["_Line"], Problem]] = Registry("layout")


def read(
    path: str | os.PathLike[str], layout: str, *, bad_lines: list[str] | None = None
) -> Iterator[Problem]:
    """Streams the problems of a file; blank lines are skipped.

    Args:
        path: of a UTF-8 file, one JSON object a line.
        layout: 'gsm8k', 'math' or 'dapo'.
        bad_lines: where malformed lines are passed over: gets the message about each;
            None raises at the first.

    Yields:
        Problems; 'math' has tiers 'T1' to 'T5' by level ('T?' for 'Level ?'), the
        others 'T1'; 'dapo' has no gold responses, its prompt is the content of all
        messages, and ``facts['messages']`` are the messages, whose roles a chat keeps.

    Raises:
        FileNotFoundError: no file at ``path``.
        ValueError: unknown layout, a line above 10 MB, or a malformed one without
            ``bad_lines``.
    """
    make = LAYOUTS[layout]
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not a file; give the path of a JSONL file of layout {layout!r}."
        )
    return _stream(path, make, bad_lines)


def _stream(
    path: Path, make: Callable[["_Line"], Problem], bad_lines: list[str] | None
) -> Iterator[Problem]:
    with path.open("rb") as file:
        lines = iter(lambda: file.readline(_LONGEST_LINE + 1), b"")
        for number, raw in enumerate(lines, 1):
            if len(raw) > _LONGEST_LINE:
                raise ValueError(
                    f"{path}, line {number} is longer than {_LONGEST_LINE} bytes; put "
                    f"one JSON object in each line."
                )
            if not raw.strip():
                continue
            try:
                problem = make(_Line(f"{path}, line {number}", raw))
            except ValueError as error:
                if bad_lines is None:
                    raise
                bad_lines.append(str(error))
                continue
            yield problem


@dataclasses.dataclass(frozen=True)
class MathProblems:
    """Problems in memory as a task, with the reward of :mod:`tmdjax.rewards.math`.

    Attributes:
        problems: at least one, such as ``tuple(read(path, 'gsm8k'))``.
        verifier: compares a response with a problem's answer, and counts outcomes.
        name: for messages.
        evaluation: problems to judge on that are not among ``problems``, at least one;
            None where a part of those is, by :func:`split_of`.

    Raises:
        ValueError: no problems.
    """

    problems: tuple[Problem, ...]
    verifier: MathVerifier
    name: str = "math_problems"
    evaluation: tuple[Problem, ...] | None = None

    def __post_init__(self):
        if not self.problems:
            raise ValueError("problems is empty; give at least one.")
        if self.evaluation is not None and not self.evaluation:
            raise ValueError("evaluation is empty; give at least one problem, or None.")

    def problem(self, rng: np.random.Generator) -> Problem:
        """Draws a problem, all equally likely."""
        return self.problems[rng.integers(len(self.problems))]

    def verify(self, problem: Problem, response: str) -> float:
        """1.0 if the answer of the response equals the problem's, else 0.0."""
        return self.verifier(response, problem.answer)


class _Line:
    """One line, whose errors say where it stands."""

    def __init__(self, place: str, raw: bytes):
        self._place = place
        try:
            self._fields = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise self.error(f"no JSON ({error})", "one JSON object a line") from None
        if not isinstance(self._fields, dict):
            kind = type(self._fields).__name__
            raise self.error(f"a JSON {kind}", "a JSON object")

    def error(self, found: str, expected: str) -> ValueError:
        return ValueError(f"{self._place}: {found}; expected {expected}.")

    def get(self, key: str, expected: str, kind: type = str) -> Any:
        """The value at 'a' or 'a.b', of that type and neither empty nor blank."""
        value: Any = self._fields
        walked = []
        for part in key.split("."):
            walked.append(part)
            if not isinstance(value, dict) or part not in value:
                raise self.error(f"no key {'.'.join(walked)!r}", expected)
            value = value[part]
        blank = isinstance(value, str) and not value.strip()
        if not isinstance(value, kind) or not value or blank:
            raise self.error(f"key {key!r} is {str(value)[:80]!r}", expected)
        return value

    def get_written(self, key: str, expected: str) -> str:
        """The same of a text or a number, which becomes a text."""
        parent, _, last = key.rpartition(".")
        fields = self.get(parent, expected, dict) if parent else self._fields
        value = fields.get(last)
        if isinstance(value, int | float) and not isinstance(value, bool):
            if isinstance(value, float) and not math.isfinite(value):
                raise self.error(f"key {key!r} is {value}", expected)
            # 2.0 is what tables make of 2 in a column with gaps
            return str(value).removesuffix(".0")
        return self.get(key, expected).strip()

    def has(self, key: str) -> bool:
        return key in self._fields


@LAYOUTS.register("gsm8k")
def _gsm8k(line: _Line) -> Problem:
    prompt = line.get("question", "'question', a text")
    solution = line.get("answer", "'answer', a text that ends with '#### 42'")
    _, mark, answer = solution.rpartition("####")
    if not mark or not answer.strip():
        raise line.error("'answer' has no '####'", "a text that ends with '#### 42'")
    return Problem(
        prompt=prompt, response=solution, answer=answer.strip(), tier="T1", facts={}
    )


@LAYOUTS.register("math")
def _math(line: _Line) -> Problem:
    prompt = line.get("problem", "'problem', a text")
    expected = r"'solution', a text with the answer in \boxed{}"
    solution = line.get("solution", expected)
    if line.has("answer"):
        answer = line.get_written("answer", "'answer', a text or a number")
    else:
        answer = (last_boxed(solution) or "").strip()
    if not answer:
        raise line.error(r"'solution' has no complete \boxed{}", expected)
    levels = "'level', 'Level 1' to 'Level 5', or 1 to 5"
    written = line.get_written("level", levels)
    found = re.fullmatch(r"(?:level ?)?([1-5?])(?:\.0)?", written, re.IGNORECASE)
    if found is None:
        raise line.error(f"key 'level' is {written[:80]!r}", levels)
    level = found[1]
    subject = line.get(
        "type" if line.has("type") else "subject", "'subject' (or 'type'), a text"
    )
    return Problem(
        prompt=prompt,
        response=solution,
        answer=answer,
        tier=f"T{level}",
        facts={"level": f"Level {level}", "subject": subject},
    )


@LAYOUTS.register("dapo")
def _dapo(line: _Line) -> Problem:
    expected = "'prompt', a list of messages with 'role' and 'content'"
    messages = line.get("prompt", expected, list)
    for message in messages:
        if not isinstance(message, dict) or not (
            isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            raise line.error(f"a message is {str(message)[:80]!r}", expected)
    answer = line.get_written(
        "reward_model.ground_truth",
        "'reward_model.ground_truth', a text or a number",
    )
    return Problem(
        prompt="\n\n".join(message["content"] for message in messages),
        response="",
        answer=answer,
        tier="T1",
        facts={"messages": messages},
    )
