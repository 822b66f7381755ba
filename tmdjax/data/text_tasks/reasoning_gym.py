"""Any generator of the package reasoning-gym, by name, as a text task.

    task = ReasoningGym(generator="chain_sum", options={"max_terms": 4})

The prompt is the question with an instruction where to put the answer; a response's
answer is what stands between its last ``<answer>`` and ``</answer>``, and the reward
is the generator's own score of it. Generators and scorers run in a process of their
own: one that raises, hangs or would fill the memory is counted and earns 0.
"""

import dataclasses
import importlib.util
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from tmdjax.core.registry import suggestion
from tmdjax.data.text_tasks.problems import Problem
from tmdjax.rewards.worker import Worker, WorkerError, WorkerTimeout

INSTRUCTION = (
    "Think step by step, then give your final answer between <answer> and </answer>."
)

_OPEN, _CLOSE = "<answer>", "</answer>"


def extract_answer(response: str) -> str | None:
    """What stands between the last ``<answer>`` and the ``</answer>`` after it."""
    before, mark, _ = response.rpartition(_CLOSE)
    _, opened, answer = before.rpartition(_OPEN)
    return answer.strip() if mark and opened else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReasoningGym:
    """One generator of reasoning-gym.

    Attributes:
        generator: its name there, such as 'chain_sum' or 'word_sorting'.
        options: of the generator's configuration; its own defaults for the rest.
        timeout: seconds for one problem or one score.
        counts: how verifications ended: 'scored', 'no answer', 'timed out', 'failed'
            (the scorer raised, or gave no number in [0, 1]).

    Raises:
        ImportError: the package is not installed.
        ValueError: unknown generator, or options it refuses.
    """

    generator: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    timeout: float = 10.0
    counts: Counter[str] = dataclasses.field(
        default_factory=Counter, init=False, compare=False, repr=False
    )
    _call: Worker = dataclasses.field(init=False, compare=False, repr=False)

    def __post_init__(self):
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ImportError(
                f"generator {self.generator!r} needs the package reasoning-gym. Run: "
                f"pip install 'tmdjax[reasoning_gym]'"
            )
        call = Worker("tmdjax.rewards.reasoning_gym_calls:call", timeout=self.timeout)
        object.__setattr__(self, "_call", call)
        known = call("names")
        if self.generator not in known:
            raise ValueError(
                f"reasoning-gym has no generator {self.generator!r}."
                f"{suggestion(self.generator, known)} It has: {', '.join(known)}."
            )
        fault = call("check", self.generator, dict(self.options))
        if fault:
            raise ValueError(
                f"generator {self.generator!r} of reasoning-gym refuses "
                f"options={dict(self.options)}: {fault}"
            )

    @property
    def name(self) -> str:
        """'reasoning_gym/' and the generator."""
        return f"reasoning_gym/{self.generator}"

    def problem(self, rng: np.random.Generator) -> Problem:
        """Draws the seed of a problem; 'T1' is its tier, as the package has none.

        Raises:
            WorkerError: the generator raised, or took longer than the time-out.
        """
        seed = int(rng.integers(2**31))
        question, answer = self._call("problem", *self._where(seed))
        return Problem(
            prompt=f"{question}\n{INSTRUCTION}",
            response=f"{_OPEN}{answer}{_CLOSE}" if answer else "",
            answer=answer,
            tier="T1",
            facts={"seed": seed, "question": question},
        )

    def verify(self, problem: Problem, response: str) -> float:
        """The generator's score of the answer, in [0, 1]; 0.0 if there is none."""
        answer = extract_answer(response)
        score, outcome = 0.0, "no answer"
        if answer is not None:
            where = self._where(problem.facts["seed"])
            try:
                score, outcome = self._call("score", *where, answer), "scored"
            except WorkerTimeout:
                outcome = "timed out"
            except WorkerError:
                outcome = "failed"
            if not (math.isfinite(score) and 0 <= score <= 1):
                score, outcome = 0.0, "failed"
        self.counts[outcome] += 1
        return score

    def close(self) -> None:
        """Ends the process."""
        self._call.close()

    def _where(self, seed: int) -> tuple[str, dict[str, Any], int]:
        return self.generator, dict(self.options), seed
