"""What is asked for in an iteration, and which groups are trained on."""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tmdjax import rl
from tmdjax.generation import Engine
from tmdjax.rl import TokenRecord
from tmdjax.runtime.scoring import Scoring
from tmdjax.runtime.settings import Draw, LanguageSettings, Prompt, Score


class Group(NamedTuple):
    """Responses to one prompt.

    Attributes:
        problem: behind the prompt.
        records: with rewards.
        scores: float64 [response], rewards without penalties.
    """

    problem: Any
    records: Sequence[TokenRecord]
    scores: np.ndarray

    @property
    def is_informative(self) -> bool:
        """Whether its rewards differ."""
        return rl.is_informative(self.rewards)

    @property
    def rewards(self) -> list[float]:
        """Of the responses, penalties included."""
        return [r.reward for r in self.records if r.reward is not None]


class Rollout(NamedTuple):
    """What was written and scored.

    Attributes:
        records: of the groups to train on, group after group, numbered from 0.
        problems: of the groups.
        metrics: numbers about all that was written, also what was left out.
    """

    records: list[TokenRecord]
    problems: list[Any]
    metrics: dict[str, float]


def collect(
    engine: Engine, draw: Draw, score: Score, settings: LanguageSettings, iteration: int
) -> Rollout:
    """Responses of an iteration, with rewards.

    Args:
        engine: idle.
        draw: the prompts.
        score: of a response; called on the host, in threads.
        settings: sizes and rules.
        iteration: from 0; with the engine's key it decides every response.

    Raises:
        ValueError: the draw gives another number of prompts than asked.
        RewardError: a response could not be scored.
        RuntimeError: dynamic sampling found too few groups in ``max_attempts`` batches.
    """
    kept: list[Group] = []
    written: list[Group] = []
    attempts = settings.max_attempts if settings.dynamic_sampling else 1
    for attempt in range(attempts):
        prompts = draw(iteration, attempt)
        if len(prompts) != settings.prompts:
            raise ValueError(
                f"the draw gave {len(prompts)} prompts; settings.prompts="
                f"{settings.prompts}."
            )
        first = (iteration * attempts + attempt) * settings.prompts
        found = _answered(engine, prompts, first, score, settings)
        written += found
        kept += [g for g in found if not settings.dynamic_sampling or g.is_informative]
        if len(kept) >= settings.prompts:
            break
    else:
        means = [group.scores.mean() for group in written]
        histogram, _ = np.histogram(means, bins=5, range=(0, 1))
        raise RuntimeError(
            f"after max_attempts={attempts} batches of {settings.prompts} prompts only "
            f"{len(kept)} groups have rewards that differ. Mean rewards of all "
            f"groups in fifths of [0, 1]: {histogram.tolist()}. Choose easier or "
            f"harder problems, more samples a prompt, or dynamic_sampling=False."
        )
    kept = kept[: settings.prompts]
    for number, group in enumerate(kept):
        for record in group.records:
            record.group = number
    metrics = _metrics(written, engine.version)
    metrics["groups_left_out"] = float(len(written) - len(kept))
    return Rollout(
        [record for group in kept for record in group.records],
        [group.problem for group in kept],
        metrics,
    )


def _answered(
    engine: Engine,
    prompts: Sequence[Prompt],
    first: int,
    score: Score,
    settings: LanguageSettings,
) -> list[Group]:
    """All responses to some prompts, scored as their groups end."""
    for g, prompt in enumerate(prompts):
        start = (first + g) * settings.samples
        engine.submit(
            range(start, start + settings.samples),
            prompt.tokens,
            group=g,
            max_new_tokens=settings.max_new_tokens,
        )
    members: dict[int, list[TokenRecord]] = collections.defaultdict(list)
    scoring = Scoring(score, settings)
    while engine.active or engine.queued:
        for record in engine.advance():
            group = members[record.group]
            group.append(record)
            if len(group) == settings.samples:
                group.sort(key=lambda record: record.number)
                scoring.submit(record.group, prompts[record.group].problem, group)
    scores = scoring.results()
    return [
        Group(prompt.problem, members[g], scores[g]) for g, prompt in enumerate(prompts)
    ]


def _metrics(groups: Sequence[Group], version: int) -> dict[str, float]:
    records = [record for group in groups for record in group.records]
    staleness = version - np.concatenate([record.versions for record in records])
    lengths = np.array([len(record) for record in records])
    middle, high = np.quantile(lengths, [0.5, 0.95])
    return {
        "score": float(np.mean([group.scores.mean() for group in groups])),
        "reward": float(np.mean([x for group in groups for x in group.rewards])),
        "tied_group_fraction": float(np.mean([not g.is_informative for g in groups])),
        "truncated_fraction": float(np.mean([r.status == "length" for r in records])),
        "length_median": float(middle),
        "length_95": float(high),
        "length_max": float(lengths.max()),
        "staleness_mean": float(staleness.mean()),
        "staleness_max": float(staleness.max()),
    }
