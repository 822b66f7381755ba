"""XRPO: rollouts where they tell most, worked examples, unlikely right answers raised.

Three additions to a group-relative objective, each with a switch of its own:

    allocation   an iteration writes in rounds; after the first, responses go to the
                 prompts whose mean reward they make most certain (``rounds``, ``rule``)
    seeding      prompts that were answered wrong every time get solved ones before
                 their next responses (``examples``)
    sharpening   right answers that were unlikely get a larger advantage (``novelty``)

With ``rounds=1`` and ``novelty=0`` it is the objective alone, to the bit.

References:
    XRPO, arXiv 2510.06672. Neither the paper's text nor its code was at hand: equations
    are those that reviews and two independent descriptions agree on; what they leave
    open is an option (``first_samples``, ``exploration``, ``trials``, ``bonus``,
    ``rule``, ``average``, and the prompt that a seeded response is trained behind,
    ``LanguageSettings.train_prompt``).
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from tmdjax import rl
from tmdjax.core.checks import check_choice, check_count, check_fields, check_range
from tmdjax.core.types import Array
from tmdjax.rl import TokenRecord
from tmdjax.runtime import Ask, GroupRelativeObjective, Rollout, Turn, worked_examples


@dataclasses.dataclass(frozen=True, kw_only=True)
class XRPO(GroupRelativeObjective):
    """An objective that plans its own rollouts: a :class:`tmdjax.runtime.Planner` too.

    Attributes:
        rounds: in which the responses of an iteration are written, >= 1.
        first_samples: responses to every prompt in the first of several rounds, >= 2.
        rule: of later rounds, see :func:`tmdjax.rl.allocate`: 'greedy', 'proportional',
            or 'uniform' for as many responses to each prompt.
        alpha: 1 - coverage of the interval of a mean reward, inside (0, 1).
        exploration: weight of the bonus of prompts with few responses, >= 0.
        bonus: its form, 'sqrt' or 'linear'.
        trials: what its logarithm counts: 'total', the responses of the iteration so
            far, or 'iterations'.
        most_samples: responses that one prompt may have, or None for four times the
            average.
        stop_if_right: prompts whose responses are all right get no more while others
            may have some.
        std_prior: take the std of rewards from a posterior, so that a prompt is not
            certain because its first responses agree: :func:`tmdjax.rl.posterior_std`.
        examples: most worked examples before a prompt none of whose responses is
            right; 0 for no seeding.
        memory_size: solved problems that are kept, each at most once; which ones is
            drawn evenly from all that were solved (a reservoir).
        novelty: strength of the sharpening, >= 0; 0 for none.
        most_novelty: largest bonus, in parts of the advantage, >= 0.
        average: likelihoods are compared with the mean of the 'group', or of its
            'right' answers.
        success_threshold: score from which a response is right. None takes 1 and
            refuses scores that are neither 0 nor 1.
        equal_prompts: prompts count alike in the loss: advantages are divided by the
            number of responses to their prompt, times the average number.
    """

    rounds: int = 3
    first_samples: int = 4
    rule: str = "greedy"
    alpha: float = 0.05
    exploration: float = 0.05
    bonus: str = "sqrt"
    trials: str = "total"
    most_samples: int | None = None
    stop_if_right: bool = False
    std_prior: bool = False
    examples: int = 2
    memory_size: int = 256
    novelty: float = 2.5
    most_novelty: float = 0.5
    average: str = "group"
    success_threshold: float | None = None
    equal_prompts: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("rounds", self.rounds)
        check_count("first_samples", self.first_samples, 2)
        check_choice("rule", self.rule, rl.RULES)
        check_range("alpha", self.alpha, 0, 1, open_low=True, open_high=True)
        check_range("exploration", self.exploration, 0, math.inf, open_high=True)
        check_choice("bonus", self.bonus, rl.BONUSES)
        check_choice("trials", self.trials, ("total", "iterations"))
        if self.most_samples is not None:
            check_count("most_samples", self.most_samples, 2)
        check_count("examples", self.examples, 0)
        check_count("memory_size", self.memory_size)
        check_range("novelty", self.novelty, 0, math.inf, open_high=True)
        check_range("most_novelty", self.most_novelty, 0, math.inf, open_high=True)
        check_choice("average", self.average, ("group", "right"))
        if self.success_threshold is not None:
            check_range("success_threshold", self.success_threshold, 0, open_low=True)

    @property
    def shows_examples(self) -> bool:
        """Whether prompts may get worked examples, from the second round on."""
        return self.examples > 0 and self.rounds > 1

    def check_samples(self, samples: int) -> None:
        """Refuses an iteration of so many responses a prompt, on average.

        Raises:
            ValueError: the first of several rounds leaves nothing for the others, or
                ``most_samples`` is less.
        """
        if self.rounds > 1 and self.first_samples >= samples:
            raise ValueError(
                f"first_samples={self.first_samples} responses to each prompt leave "
                f"nothing of the samples={samples} that an iteration has for it to "
                f"later rounds; lower first_samples, raise samples, or use rounds=1."
            )
        if self.most_samples is not None and self.most_samples < samples:
            raise ValueError(
                f"most_samples={self.most_samples} is below the samples={samples} that "
                f"an iteration has for each prompt; raise most_samples."
            )

    def is_right(self, record: TokenRecord) -> bool:
        """Whether a response is right.

        Raises:
            ValueError: its score is neither 0 nor 1, and no threshold is set.
        """
        score = record.reward if record.score is None else record.score
        if score is None or not math.isfinite(score):
            raise ValueError(
                f"response {record.number} to prompt {record.group} has score {score}; "
                f"give a finite number."
            )
        if self.success_threshold is None and score not in (0, 1):
            raise ValueError(
                f"response {record.number} has score {score}; XRPO needs to know which "
                f"responses are right: set success_threshold, from which they are."
            )
        return score >= (self.success_threshold or 1)

    def advantages(self, records: Sequence[TokenRecord]) -> Array:
        """Advantages within groups of any size, float32 [sequence].

        They are sharpened, and then divided by the sizes of groups (``equal_prompts``).

        The likelihood of a response is that under the policy that wrote it, behind the
        prompt it was written behind, examples included.
        """
        found = super().advantages(records)
        group = np.array([record.group for record in records])
        if self.novelty and self.most_novelty:
            found = rl.sharpen(
                found,
                np.array([mean_log_prob(record) for record in records], np.float32),
                group,
                np.array([self.is_right(record) for record in records]),
                num_groups=int(group.max()) + 1,
                strength=self.novelty,
                most=self.most_novelty,
                average=self.average,
            )
        if self.equal_prompts:
            size = np.bincount(group)
            found = found * jnp.asarray(
                size[size > 0].mean() / size[group], jnp.float32
            )
        return found

    def plan(self, turn: Turn) -> tuple[list[Ask], dict[str, float]] | None:
        """Responses to ask for in a round, and behind which examples.

        Metrics: 'time/allocation' and 'time/retrieval' in seconds; 'first_score', the
        mean score of the first round, in which nobody has examples (of several batches,
        which dynamic sampling draws, the log has the sum). How many prompts got
        examples in the round, 'seeded_prompts', or none though nothing solved them,
        'without_example'; and examples that would have made a prompt too long,
        'examples_dropped'.

        Raises:
            ValueError: what :meth:`check_samples` and :meth:`is_right` refuse.
        """
        if turn.number >= self.rounds:
            return None
        budget = turn.samples * len(turn.prompts)
        if turn.number == 0:
            self.check_samples(turn.samples)
            first = turn.samples if self.rounds == 1 else self.first_samples
            return [Ask(first, prompt.tokens) for prompt in turn.prompts], {}
        right = [[self.is_right(r) for r in group.records] for group in turn.groups]
        count = np.array([len(each) for each in right])
        begin = time.perf_counter()
        # a remainder goes to the last rounds
        spend = (budget - int(count.sum())) // (self.rounds - turn.number)
        further = rl.allocate(
            count,
            self._std(turn, right),
            spend,
            most=self.most_samples or 4 * turn.samples,
            trials=None if self.trials == "total" else turn.iteration + 1,
            rule=self.rule,
            last=[all(each) for each in right] if self.stop_if_right else None,
            alpha=self.alpha,
            exploration=self.exploration,
            bonus=self.bonus,
        )
        told = {"time/allocation": time.perf_counter() - begin}
        if turn.number == 1:
            scores = [group.mean_score for group in turn.groups]
            told["first_score"] = float(np.mean(scores))
        prompts: list[Sequence[int]] = [prompt.tokens for prompt in turn.prompts]
        if self.examples:
            unsolved = [
                i for i, each in enumerate(right) if further[i] and not any(each)
            ]
            prompts, more = self.seeded(turn, unsolved)
            told |= more
        return [Ask(int(n), p) for n, p in zip(further, prompts)], told

    def seeded(
        self, turn: Turn, unsolved: Sequence[int]
    ) -> tuple[list[Sequence[int]], dict[str, float]]:
        """Prompts of the turn, some with worked examples before them, and metrics.

        Args:
            turn: has prompts, memory, and how long a prompt may be.
            unsolved: numbers of the prompts that get examples.
        """
        begin = time.perf_counter()
        prompts: list[Sequence[int]] = [prompt.tokens for prompt in turn.prompts]
        known = worked_examples.unpack_memory(turn.memory).solved
        lost = without = 0
        for i in unsolved:
            own = turn.prompts[i]
            examples = worked_examples.retrieve(
                own.tokens,
                worked_examples.words_of(own.problem),
                known,
                self.examples,
                np.random.default_rng([turn.iteration, i]),
            )
            prompts[i], dropped = worked_examples.show(
                own.tokens, examples, turn.longest
            )
            lost += dropped
            without += dropped == len(examples)
        return prompts, {
            "seeded_prompts": float(len(unsolved) - without),
            "without_example": float(without),
            "examples_dropped": float(lost),
            "time/retrieval": time.perf_counter() - begin,
        }

    def _std(self, turn: Turn, right: Sequence[Sequence[bool]]) -> np.ndarray:
        """Standard deviation of the scores of each prompt, [prompt]."""
        if self.std_prior:
            return rl.posterior_std(
                [sum(each) for each in right], [len(each) for each in right]
            )
        return np.array([np.std(group.scores, ddof=1) for group in turn.groups])

    def remember(self, memory: Any, rollout: Rollout, iteration: int) -> Any:
        """Solved problems after an iteration, uint8 [bytes]; empty without seeding.

        Of each problem the first response that is right and ended by itself. Only what
        was trained on comes in, so no problem that is judged on does.
        """
        if not self.shows_examples:
            return memory
        first: dict[int, TokenRecord] = {}
        for record in sorted(rollout.records, key=lambda record: record.number):
            if record.status == "stop" and self.is_right(record):
                first.setdefault(record.group, record)
        solved = [
            worked_examples.Solved(
                record.own_prompt,
                tuple(record.tokens),
                worked_examples.words_of(rollout.problems[group]),
                iteration,
            )
            for group, record in sorted(first.items())
        ]
        order = np.random.default_rng([iteration, 1])
        known = worked_examples.unpack_memory(memory)
        return worked_examples.remember(known, solved, self.memory_size, order).pack()


def mean_log_prob(record: TokenRecord) -> float:
    """Of the tokens of a response, in nats; NaN where it has none."""
    return float(np.mean(record.log_probs)) if record.log_probs else float("nan")


PRESETS: dict[str, dict[str, Any]] = {
    "xrpo": {},
    "gspo": {"surrogate": "sequence", "clip_range": (3e-4, 4e-4)},
}
"""Settings by name: on GRPO's objective, and on GSPO's, the paper's other base."""


def preset(name: str, **changes: Any) -> XRPO:
    """The method on one of its objectives.

    Args:
        name: one of :data:`PRESETS`.
        **changes: fields of :class:`XRPO`.

    Raises:
        ValueError: an unknown name, or options out of range.
        TypeError: an unknown field.
    """
    check_choice("preset", name, PRESETS)
    check_fields(XRPO, changes)
    return XRPO(**PRESETS[name] | changes)
