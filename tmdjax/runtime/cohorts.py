"""How many responses are asked for of each prompt, and in which rounds.

Without a planner every prompt has as many, at once. With one, prompts in a row are
planned together: their cohort. It may ask for the next round once all responses of the
rounds before are scored.
"""

from collections.abc import Callable, Sequence

import numpy as np

from tmdjax.core.checks import brief
from tmdjax.runtime.rounds import Group, Planner, Turn, asks_of
from tmdjax.runtime.schedule import Schedule
from tmdjax.runtime.settings import Prompt


class Cohorts:
    """What a planner asks for of groups that others write.

    Attributes:
        size: groups in a row that are planned together; 1 without a planner.
    """

    def __init__(
        self,
        schedule: Schedule,
        prompt_of: Callable[[int], Prompt | None],
        planner: Planner | None,
    ):
        """Of a planner that shows no worked examples, or of none.

        Args:
            schedule: a cohort is ``batch`` prompts; they have ``samples`` responses
                each, on average, in at most ``rounds``.
            prompt_of: the prompt of a group by its number.
            planner: decides, from the account alone.

        Raises:
            ValueError: several rounds without a planner, fewer than it may ask in, or
                worked examples.
        """
        if planner is None and schedule.rounds > 1:
            raise ValueError(
                f"rounds={schedule.rounds}, but nobody plans them; give planner=, or "
                f"use rounds=1."
            )
        if planner is not None and planner.rounds > schedule.rounds:
            raise ValueError(
                f"the planner may ask in {planner.rounds} rounds, more than rounds="
                f"{schedule.rounds}; give the schedule as many as the planner has."
            )
        if planner is not None and planner.shows_examples:
            raise ValueError(
                f"{type(planner).__name__} shows worked examples, for which its memory "
                f"would have to follow what trains; turn them off (XRPO: examples=0), "
                f"or use runtime.make_iteration."
            )
        self._schedule, self._prompt_of, self._planner = schedule, prompt_of, planner
        self.size = 1 if planner is None else schedule.batch
        self._latest: tuple[int, Sequence[int]] = (-1, ())

    @property
    def are_planned(self) -> bool:
        """Whether there is a planner, so that there may be later rounds."""
        return self._planner is not None

    def first_count(self, number: int) -> int:
        """Responses to the prompt of a group in its first round.

        Raises:
            ValueError: none, or what :meth:`counts` refuses.
        """
        if self._planner is None:
            return self._schedule.samples
        cohort, place = divmod(number, self.size)
        if self._latest[0] != cohort:
            prompts: list[Prompt] = []
            for n in range(cohort * self.size, (cohort + 1) * self.size):
                if (prompt := self._prompt_of(n)) is None:
                    break
                prompts.append(prompt)
            groups = [Group(prompt.problem, []) for prompt in prompts]
            counts = self.counts(cohort, 0, prompts, groups)
            if counts is None or not all(counts):
                raise ValueError(
                    f"the planner asks for {counts} responses in its first round; ask "
                    f"for at least one to each prompt."
                )
            self._latest = cohort, counts
        return self._latest[1][place]

    def counts(
        self,
        cohort: int,
        number: int,
        prompts: Sequence[Prompt],
        groups: Sequence[Group],
    ) -> Sequence[int] | None:
        """Responses to each prompt of a cohort in a round; None after the last.

        Args:
            cohort: its number, which the planner knows as its iteration.
            number: of the round, from 0.
            prompts: of the cohort's groups that are still there.
            groups: all responses to them so far, scored.

        Raises:
            TypeError: the planner asks for a number that is not whole.
            ValueError: it asks for more rounds or responses than the schedule allows,
                or for responses behind another prompt.
        """
        assert self._planner is not None  # who else has later rounds?
        turn = Turn(
            number=number,
            iteration=cohort,
            prompts=prompts,
            groups=groups,
            samples=self._schedule.samples,
            longest=max(len(prompt.tokens) for prompt in prompts),
            memory=np.zeros(0, np.uint8),
        )
        planned = asks_of(self._planner, turn)
        if planned is None:
            return None
        if number >= self._schedule.rounds:
            raise ValueError(
                f"the planner asks for more than rounds={self._schedule.rounds}; give "
                f"the schedule as many as the planner has."
            )
        for prompt, ask in zip(prompts, planned[0]):
            if ask.count > self._schedule.most_requests:
                raise ValueError(
                    f"the planner asks for {ask.count} responses to a prompt in round "
                    f"{number}, but most_samples={self._schedule.most_requests}; raise "
                    f"that of the schedule, or lower the planner's."
                )
            if tuple(ask.prompt) != tuple(prompt.tokens):
                raise ValueError(
                    f"the planner has a response follow {brief(ask.prompt)} in place "
                    f"of its prompt {brief(prompt.tokens)}; where writing and training "
                    f"are apart, responses follow their own prompts."
                )
        return [ask.count for ask in planned[0]]
