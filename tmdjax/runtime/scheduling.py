"""What is asked for in an iteration, and which groups are trained on."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tmdjax.generation import Engine
from tmdjax.rl import TokenRecord
from tmdjax.runtime.rounds import (
    Group,
    OneRound,
    Planner,
    Rollout,
    Turn,
    answer,
    histogram_of_scores,
)
from tmdjax.runtime.settings import Draw, LanguageSettings, Score


def collect(
    engine: Engine,
    draw: Draw,
    score: Score,
    settings: LanguageSettings,
    iteration: int,
    *,
    pending: Sequence[TokenRecord] = (),
    should_stop: Callable[[], bool] = lambda: False,
    planner: Planner | None = None,
    memory: Any = (),
    length: int | None = None,
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
        planner: how responses are spread over prompts, in rounds; None asks for
            ``settings.samples`` to each, at once.
        memory: of the planner, before the iteration, uint8 [bytes].
        length: tokens that a text may have with the worked examples of a planner; None
            takes what the engine's slots hold.

    Raises:
        ValueError: the draw gives another number of prompts than asked, or others than
            before; a pending response belongs to another iteration; or the planner
            asks for more or fewer responses than there are to write.
        RewardError: a response could not be scored.
        RuntimeError: dynamic sampling found too few groups in ``max_attempts`` batches.
    """
    planner = planner or OneRound()
    kept: list[Group] = []
    written: list[Group] = []
    told: dict[str, float] = {}
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
        turn = Turn(
            number=0,
            iteration=iteration,
            prompts=prompts,
            groups=[Group(prompt.problem, []) for prompt in prompts],
            samples=settings.samples,
            longest=(length or engine.config.length) - settings.max_new_tokens,
            memory=memory,
        )
        answered = answer(
            engine, planner, turn, first, score, settings, known, should_stop
        )
        if answered is None:
            return Rollout([], [], {}, [known[number] for number in sorted(known)])
        found, more = answered
        written += found
        told |= {name: told.get(name, 0.0) + value for name, value in more.items()}
        kept += [g for g in found if not settings.dynamic_sampling or g.is_informative]
        if len(kept) >= settings.prompts:
            break
    else:
        histogram = histogram_of_scores([group.mean_score for group in written])
        raise RuntimeError(
            f"after max_attempts={attempts} batches of {settings.prompts} prompts only "
            f"{len(kept)} groups have scores that differ. {histogram}. Choose easier "
            f"or harder problems, more samples a prompt, or dynamic_sampling=False."
        )
    kept = kept[: settings.prompts]
    for number, group in enumerate(kept):
        for record in group.records:
            record.group = number
    metrics = rollout_metrics(written, engine.version)
    metrics |= told | {"groups_left_out": float(len(written) - len(kept))}
    return Rollout(
        [record for group in kept for record in group.records],
        [group.problem for group in kept],
        metrics,
    )


def rollout_metrics(groups: Sequence[Group], version: int) -> dict[str, float]:
    """What is told of groups that were written and scored.

    Args:
        groups: with rewards, at least one.
        version: of the weights that they train.

    Returns:
        'score' and 'reward', means over groups and over responses; how many
        'responses' and 'tokens'; 'tied_group_fraction' and 'truncated_fraction', in
        [0, 1]; 'length_median', 'length_95' and 'length_max', in tokens of a response;
        'staleness_mean' and 'staleness_max', versions that the weights are ahead of a
        token.
    """
    records = [record for group in groups for record in group.records]
    staleness = version - np.concatenate([record.versions for record in records])
    lengths = np.array([len(record) for record in records])
    middle, high = np.quantile(lengths, [0.5, 0.95])
    return {
        "score": float(np.mean([group.mean_score for group in groups])),
        "reward": float(np.mean([x for group in groups for x in group.rewards])),
        "tied_group_fraction": float(np.mean([not g.is_informative for g in groups])),
        "responses": float(len(records)),
        "tokens": float(lengths.sum()),
        "truncated_fraction": float(np.mean([r.status == "length" for r in records])),
        "length_median": float(middle),
        "length_95": float(high),
        "length_max": float(lengths.max()),
        "staleness_mean": float(staleness.mean()),
        "staleness_max": float(staleness.max()),
    }
