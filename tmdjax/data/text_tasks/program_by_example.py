"""Program by example: an expression of one number from its values.

The prompt '>k5,8,11,14,17,20=' has the values of a function at k = 0, 1, ..., 5, and
asks for Python that computes it: '#k*3+5$'. A function is made of at most n operations,
each an addition, subtraction or product with a digit or k, so it is a polynomial of
degree n + 1 at most, which its n + 2 values determine: one function has one prompt and
belongs to one split, however it is written. There are 28, 378, 3,850 and 38,796
functions for n = 1 to 4, and the prompts have up to 11, 18, 27 and 38 characters.

Any expression is paid that has the values shown and those at four further places, by
:mod:`tmdjax.rewards.code`, in a process of its own: what a policy writes is a program.
"""

import dataclasses
from collections import Counter

import numpy as np

from tmdjax.core.checks import check_count, check_range
from tmdjax.data.text_tasks.problems import Problem
from tmdjax.data.text_tasks.vocabulary import GIVEN, START
from tmdjax.domains.arithmetic.written_work import ANSWER, END, split_response
from tmdjax.rewards.code import CodeVerifier

_MOST_OPERATIONS = 6
_HIDDEN = (-2, -1, 11, 17)
"""Where an answer must be right too: no table of the values shown is paid."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramByExample:
    """Functions of 1 to ``operations`` operations; their numbers are equally likely.

    Attributes:
        operations: most of a function, 1 to 6; a problem's tier is 'T' and its own.
        timeout: CPU seconds of one answer, in (0, 86400].
        all_or_nothing: 1.0 if all values are right, else 0.0; or else their share.
        processes: answers that are run at the same time where as many threads verify,
            as with ``LanguageSettings(scored_at_once=)``.

    Raises:
        TypeError: operations or processes is no integer.
        ValueError: a number outside its range.
    """

    operations: int = 4
    timeout: float = 1.0
    all_or_nothing: bool = True
    processes: int = 1
    _verifier: CodeVerifier = dataclasses.field(init=False, compare=False, repr=False)

    name = "program_by_example"

    def __post_init__(self):
        count = check_count("operations", self.operations)
        check_range("operations", count, 1, _MOST_OPERATIONS)
        verifier = CodeVerifier(
            timeout=self.timeout,
            all_or_nothing=self.all_or_nothing,
            processes=self.processes,
        )
        object.__setattr__(self, "_verifier", verifier)

    @property
    def counts(self) -> Counter[str]:
        """How verifications of answers ended, by the verifier's reasons."""
        return self._verifier.counts

    def problem(self, rng: np.random.Generator) -> Problem:
        """Draws the operations, one after the other."""
        count = int(rng.integers(1, self.operations + 1))
        shown = self.operations + 2
        inputs = np.array([*range(shown), *_HIDDEN])
        answer, values, is_sum = "k", inputs, False
        for _ in range(count):
            operator = "+-*"[rng.integers(3)]
            digit = int(rng.integers(1, 10))
            # k - k would forget all that is before it
            by_itself = operator != "-" and rng.integers(4) == 0
            operand, written = (inputs, "k") if by_itself else (digit, str(digit))
            if operator == "*":
                answer = f"({answer})" if is_sum else answer
                values = values * operand
            else:
                values = values + operand if operator == "+" else values - operand
            answer += operator + written
            is_sum = operator != "*"
        outputs = values.tolist()
        return Problem(
            prompt=f"{START}k{','.join(map(str, outputs[:shown]))}{GIVEN}",
            response=f"{ANSWER}{answer}{END}",
            answer=answer,
            tier=f"T{count}",
            facts={"inputs": inputs.tolist(), "outputs": outputs},
        )

    def verify(self, problem: Problem, response: str) -> float:
        """The score of the expression between '#' and '$'; 0.0 if there is none."""
        parts = split_response(response)
        if parts is None or not parts[1].strip():
            return 0.0
        pairs = zip(problem.facts["inputs"], problem.facts["outputs"])
        tests = [f"assert f({x}) == {y}" for x, y in pairs]
        return self._verifier(f"f = lambda k: (\n{parts[1]}\n)", tests).score

    def close(self) -> None:
        """Ends the processes that answers run in."""
        self._verifier.close()
