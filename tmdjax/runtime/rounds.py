"""Responses to some prompts: in one round, or in several that a planner decides on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from tmdjax import rl
from tmdjax.core.checks import brief, check_count
from tmdjax.generation import Engine
from tmdjax.rl import TokenRecord
from tmdjax.runtime.scoring import Scoring
from tmdjax.runtime.settings import LanguageSettings, Prompt, Score


class Group(NamedTuple):
    """Responses to one prompt.

    Attributes:
        problem: behind the prompt.
        records: with scores and rewards.
    """

    problem: Any
    records: Sequence[TokenRecord]

    @property
    def is_informative(self) -> bool:
        """Whether its scores differ.

        Penalties do not count: a group of wrong responses of unequal length has nothing
        to teach but length.
        """
        return rl.is_informative(self.scores)

    @property
    def rewards(self) -> list[float]:
        """Rewards of the responses, penalties included."""
        return [r.reward for r in self.records if r.reward is not None]

    @property
    def scores(self) -> list[float]:
        """Scores of the responses, without penalties."""
        return [r.score for r in self.records if r.score is not None]

    @property
    def mean_score(self) -> float:
        """Mean of the responses' scores."""
        return float(np.mean(self.scores))


def histogram_of_scores(means: Sequence[float]) -> str:
    """Mean scores of groups, counted in fifths, in words for an error."""
    low, high = min(0, *means), max(1, *means)
    counts, _ = np.histogram(means, bins=5, range=(low, high))
    return (
        f"Mean scores of all groups in fifths of [{low:g}, {high:g}]: {counts.tolist()}"
    )


class Rollout(NamedTuple):
    """Responses of an iteration, written and scored.

    Attributes:
        records: of the groups to train on, group after group, numbered from 0.
        problems: of the groups.
        metrics: numbers about all that was written, also what was left out.
        pending: responses to go on with, finished ones of groups that are not among
            ``records`` included. After an interruption these are all there is.
    """

    records: list[TokenRecord]
    problems: list[Any]
    metrics: dict[str, float]
    pending: Sequence[TokenRecord] = ()


class Ask(NamedTuple):
    """What is asked for of one prompt in a round.

    Attributes:
        count: responses, a whole number >= 0.
        prompt: token ids that they follow: the prompt's own, or these with worked
            examples before them.
    """

    count: int
    prompt: Sequence[int]


class Turn(NamedTuple):
    """What is known before a round.

    Attributes:
        number: of the round, from 0.
        iteration: from 0.
        prompts: of the batch.
        groups: what was written so far, one a prompt; without records at first.
        samples: responses to a prompt in all rounds together, on average.
        longest: tokens that a prompt may have, examples included, so that it has room
            for its response where it is written and where it is trained on.
        memory: what the planner keeps from iteration to iteration, uint8 [bytes];
            empty at first.
    """

    number: int
    iteration: int
    prompts: Sequence[Prompt]
    groups: Sequence[Group]
    samples: int
    longest: int
    memory: Any


@runtime_checkable
class Planner(Protocol):
    """How the responses of a batch of prompts are spread over prompts, in rounds.

    What is planned follows from the turn alone, so that a batch that is interrupted
    goes on as it was.
    """

    @property
    def rounds(self) -> int:
        """In how many it asks, at most."""
        ...

    @property
    def shows_examples(self) -> bool:
        """Whether responses may follow worked examples, which its memory holds."""
        ...

    def plan(self, turn: Turn) -> tuple[Sequence[Ask], Mapping[str, float]] | None:
        """One :class:`Ask` a prompt and metrics of the round; None after the last.

        All rounds together ask for exactly ``samples`` a prompt, on average. Metrics of
        one name are added up over rounds.
        """
        ...

    def remember(self, memory: Any, rollout: Rollout, iteration: int) -> Any:
        """The memory after an iteration, uint8 [bytes]."""
        ...


class OneRound:
    """The same number of responses to every prompt, at once; no memory."""

    rounds, shows_examples = 1, False

    def plan(self, turn: Turn) -> tuple[list[Ask], dict[str, float]] | None:
        """``turn.samples`` responses to each prompt in the first round."""
        if turn.number:
            return None
        return [Ask(turn.samples, prompt.tokens) for prompt in turn.prompts], {}

    def remember(self, memory: Any, rollout: Rollout, iteration: int) -> Any:
        """The memory as it is."""
        del rollout, iteration
        return memory


def asks_of(
    planner: Planner, turn: Turn
) -> tuple[Sequence[Ask], Mapping[str, float]] | None:
    """What a planner asks for in a round, and its metrics; None after the last.

    Raises:
        TypeError: it asks for a number that is not whole.
        ValueError: it asks for fewer than none, or not for each prompt.
    """
    planned = planner.plan(turn)
    if planned is None:
        return None
    asks, told = planned
    if len(asks) != len(turn.prompts):
        raise ValueError(
            f"the planner gave {len(asks)} entries in round {turn.number}; give "
            f"one Ask for each of the {len(turn.prompts)} prompts, of count 0 for none."
        )
    for group, ask in enumerate(asks):
        check_count(f"count of prompt {group} in round {turn.number}", ask.count, 0)
    return asks, told


class _Part(NamedTuple):
    """What is asked for of one prompt in a round, with the numbers of the responses."""

    group: int
    numbers: range
    ask: Ask


def answer(
    engine: Engine,
    planner: Planner,
    turn: Turn,
    first: int,
    score: Score,
    settings: LanguageSettings,
    known: dict[int, TokenRecord],
    should_stop: Callable[[], bool],
) -> tuple[Sequence[Group], dict[str, float]] | None:
    """All responses to some prompts, with the planner's metrics; None if interrupted.

    Args:
        engine: idle.
        planner: decides the rounds.
        turn: before the first round.
        first: number of the first response; the others follow, round after round and
            prompt after prompt.
        score: of a response.
        settings: sizes and rules.
        known: responses by number; those here are not asked for again, but gone on
            with where they are not finished. What ends is added, and what is aborted.
        should_stop: asked between two chunks.

    Raises:
        TypeError: the planner asks for a number that is not whole.
        ValueError: it asks for fewer than none, or in all for another number of
            responses than the settings have; or the draw gives other prompts than
            before an interruption.
        RewardError: a response could not be scored.
    """
    prompts, start, metrics = turn.prompts, first, {}
    budget = len(prompts) * turn.samples
    while (planned := asks_of(planner, turn)) is not None:
        asks, told = planned
        for name, value in told.items():
            metrics[name] = metrics.get(name, 0.0) + value
        parts = []
        for group, ask in enumerate(asks):
            parts.append(_Part(group, range(start, start + ask.count), ask))
            start += ask.count
        if start - first > budget:
            break
        if not _write(engine, parts, prompts, score, settings, known, should_stop):
            return None
        groups = [
            Group(group.problem, [*group.records, *(known[i] for i in part.numbers)])
            for group, part in zip(turn.groups, parts)
        ]
        turn = turn._replace(number=turn.number + 1, groups=groups)
    if start - first != budget or any(not group.records for group in turn.groups):
        raise ValueError(
            f"the planner asked for {start - first} responses to {len(prompts)} "
            f"prompts; it must spend prompts x samples = {budget} exactly, with a "
            f"response to every prompt."
        )
    return turn.groups, metrics


def _write(
    engine: Engine,
    parts: Sequence[_Part],
    prompts: Sequence[Prompt],
    score: Score,
    settings: LanguageSettings,
    known: dict[int, TokenRecord],
    should_stop: Callable[[], bool],
) -> bool:
    """Whether all responses of a round are written, and scored as their parts end."""
    scoring = Scoring(score, settings)
    group_of = {number: part.group for part in parts for number in part.numbers}

    def score_part(part: _Part) -> None:
        found = [known[number] for number in part.numbers if number in known]
        found = [record for record in found if record.finished]
        if len(found) == part.ask.count and any(r.reward is None for r in found):
            scoring.submit(prompts[part.group].problem, found)

    def note(records: Sequence[TokenRecord]) -> None:
        for record in records:
            own = tuple(map(int, prompts[group_of[record.number]].tokens))
            record.question = None if record.prompt == own else own
            known[record.number] = record

    for part in parts:
        own = tuple(part.ask.prompt)
        for record in (known[number] for number in part.numbers if number in known):
            if record.prompt != own:
                raise ValueError(
                    f"pending response {record.number} answers "
                    f"{brief(record.prompt)}, but the draw now gives "
                    f"{brief(own)}; a draw gives the same "
                    f"prompts whenever it is asked again."
                )
            if not record.finished:
                engine.resume(record, max_new_tokens=settings.max_new_tokens)
        engine.submit(
            [number for number in part.numbers if number not in known],
            part.ask.prompt,
            group=part.group,
            max_new_tokens=settings.max_new_tokens,
        )
        score_part(part)
    while (engine.active or engine.queued) and not should_stop():
        ended = engine.advance()
        note(ended)
        for group in sorted({group_of[record.number] for record in ended}):
            score_part(parts[group])
    aborted = engine.abort()
    note(aborted)
    scoring.finish()
    return not aborted
