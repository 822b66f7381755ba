"""What is asked for in an iteration, and which groups are trained on."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tmdjax import rl
from tmdjax.core.checks import brief
from tmdjax.generation import Engine
from tmdjax.rl import TokenRecord
from tmdjax.runtime.scoring import Scoring
from tmdjax.runtime.settings import Draw, LanguageSettings, Prompt, Score


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


def collect(
    engine: Engine,
    draw: Draw,
    score: Score,
    settings: LanguageSettings,
    iteration: int,
    *,
    pending: Sequence[TokenRecord] = (),
    should_stop: Callable[[], bool] = lambda: False,
) -> Rollout:
    """Responses of an iteration, with rewards.

    Interrupted and gone on with, in this process or another, it gives what it would
    have given at once: every token is drawn with the same key, once, and finished
    responses are scored once. Texts are equal unless the rounding of a prefix that is
    read anew flips a draw; only ``segments`` tells them apart.

    Args:
        engine: idle, with the weights of the iteration.
        draw: the prompts.
        score: of a response; called on the host, in threads.
        settings: sizes and rules.
        iteration: from 0; with the engine's key it decides every response.
        pending: of a rollout of this iteration that was interrupted; changed in place.
        should_stop: asked between two chunks of the engine; True interrupts.

    Raises:
        ValueError: the draw gives another number of prompts than asked, or others than
            before; or a pending response belongs to another iteration.
        RewardError: a response could not be scored.
        RuntimeError: dynamic sampling found too few groups in ``max_attempts`` batches.
    """
    kept: list[Group] = []
    written: list[Group] = []
    attempts = settings.max_attempts if settings.dynamic_sampling else 1
    size = settings.prompts * settings.samples
    start = iteration * attempts * size
    known = {record.number: record for record in pending}
    for number in known:
        if not start <= number < start + attempts * size:
            raise ValueError(
                f"pending response {number} is none of iteration {iteration}, whose "
                f"responses are {start} to {start + attempts * size - 1}; go on with "
                f"the settings and the state it was interrupted under."
            )
    for attempt in range(attempts):
        prompts = draw(iteration, attempt)
        if len(prompts) != settings.prompts:
            raise ValueError(
                f"the draw gave {len(prompts)} prompts; settings.prompts="
                f"{settings.prompts}."
            )
        first = start + attempt * size
        found = _answered(engine, prompts, first, score, settings, known, should_stop)
        if found is None:
            return Rollout([], [], {}, [known[number] for number in sorted(known)])
        written += found
        kept += [g for g in found if not settings.dynamic_sampling or g.is_informative]
        if len(kept) >= settings.prompts:
            break
    else:
        means = [group.mean_score for group in written]
        histogram, _ = np.histogram(means, bins=5, range=(0, 1))
        raise RuntimeError(
            f"after max_attempts={attempts} batches of {settings.prompts} prompts only "
            f"{len(kept)} groups have scores that differ. Mean scores of all "
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
    known: dict[int, TokenRecord],
    should_stop: Callable[[], bool],
) -> list[Group] | None:
    """All responses to some prompts, scored as their groups end; None if interrupted.

    Args:
        engine: idle.
        prompts: of the groups.
        first: number of the first response; the others follow.
        score: of a response.
        settings: sizes and rules.
        known: responses by number; those here are not asked for again, but gone on
            with where they are not finished. What ends is added, and what is aborted.
        should_stop: asked between two chunks.
    """
    scoring = Scoring(score, settings)

    def written(g: int) -> list[TokenRecord]:
        start = first + g * settings.samples
        numbers = range(start, start + settings.samples)
        found = [known[number] for number in numbers if number in known]
        return [record for record in found if record.finished]

    def score_group(g: int) -> None:
        group = written(g)
        if len(group) == settings.samples and any(r.reward is None for r in group):
            scoring.submit(prompts[g].problem, group)

    for g, prompt in enumerate(prompts):
        start = first + g * settings.samples
        numbers = range(start, start + settings.samples)
        for record in (known[number] for number in numbers if number in known):
            if record.prompt != tuple(prompt.tokens):
                raise ValueError(
                    f"pending response {record.number} answers "
                    f"{brief(record.prompt)}, but the draw now gives "
                    f"{brief(tuple(prompt.tokens))}; a draw gives the same "
                    f"prompts whenever it is asked again."
                )
            if not record.finished:
                engine.resume(record, max_new_tokens=settings.max_new_tokens)
        engine.submit(
            [number for number in numbers if number not in known],
            prompt.tokens,
            group=g,
            max_new_tokens=settings.max_new_tokens,
        )
        score_group(g)
    while (engine.active or engine.queued) and not should_stop():
        ended = {record.number: record for record in engine.advance()}
        known |= ended
        for g in sorted({(number - first) // settings.samples for number in ended}):
            score_group(g)
    aborted = engine.abort()
    known |= {record.number: record for record in aborted}
    scoring.finish()
    if aborted:
        return None
    return [Group(prompt.problem, written(g)) for g, prompt in enumerate(prompts)]


def _metrics(groups: Sequence[Group], version: int) -> dict[str, float]:
    records = [record for group in groups for record in group.records]
    staleness = version - np.concatenate([record.versions for record in records])
    lengths = np.array([len(record) for record in records])
    middle, high = np.quantile(lengths, [0.5, 0.95])
    return {
        "score": float(np.mean([group.mean_score for group in groups])),
        "reward": float(np.mean([x for group in groups for x in group.rewards])),
        "tied_group_fraction": float(np.mean([not g.is_informative for g in groups])),
        "truncated_fraction": float(np.mean([r.status == "length" for r in records])),
        "length_median": float(middle),
        "length_95": float(high),
        "length_max": float(lengths.max()),
        "staleness_mean": float(staleness.mean()),
        "staleness_max": float(staleness.max()),
    }
