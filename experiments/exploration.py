"""What a planner of rollouts does: worked examples before RL, and the course of RL.

Stage 'examples': problems of the training split that the supervised policy does not
solve in its first tries are tried again, with worked examples and without.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments import language_tasks as tasks
from tmdjax import generation, models, runtime
from tmdjax.harness import StageContext, StageResult
from tmdjax.systems import xrpo

EXAMPLES = {
    "unsolved": "share of problems without a right answer in the first round, before "
    "reinforcement learning",
    "flipped_with_examples": "share of these that further tries with worked examples "
    "solve",
    "flipped_without": "share of these that as many plain tries solve",
    "accuracy_with_examples": "share of right responses with worked examples, before "
    "reinforcement learning",
    "accuracy_without": "share of right responses without any, before reinforcement "
    "learning",
}
COURSE = {
    "tied_fraction": "share of groups whose scores are all equal, over all iterations",
    "responses": "responses written in reinforcement learning, discarded ones included",
    "tokens": "tokens of these",
}
CLOCKED = {
    "allocation_share": "share of an iteration's seconds that planning takes, in the "
    "median"
}
REACHED = {
    "steps_to_level": "iterations until the mean score of plain prompts reaches a "
    "fixed level, and one more than there are if it does not",
    "tokens_to_level": "tokens written until then",
}


def course(
    rows: Sequence[Mapping[str, Any]], size: int
) -> tuple[dict[str, Any], dict[str, float], dict[str, float]]:
    """Curves, metrics and timings of reinforcement learning.

    Args:
        rows: one an iteration.
        size: responses of a batch of prompts; dynamic sampling writes several, over
            which the log adds a planner's metrics up.

    Returns:
        Curves: 'plain_score', the mean score of responses without examples of every
        prompt as often (those of the first round), and 'tokens', of all iterations so
        far. Metrics: those of COURSE. Timings: those of CLOCKED, which differ between
        two equal runs.
    """
    tokens = np.array([row["tokens"] for row in rows])
    planning = np.array(
        [row.get("time/allocation", 0) + row.get("time/retrieval", 0) for row in rows]
    )
    rate = np.array([row["time/steps_per_second"] for row in rows])
    plain = np.array(
        [
            row["first_score"] * size / row["responses"]
            if "first_score" in row
            else row["score"]
            for row in rows
        ]
    )
    metrics = {
        "tied_fraction": float(np.mean([row["tied_group_fraction"] for row in rows])),
        "responses": float(sum(row["responses"] for row in rows)),
        "tokens": float(tokens.sum()),
    }
    curves = {"plain_score": plain, "tokens": np.cumsum(tokens)}
    return curves, metrics, {"allocation_share": float(np.median(planning * rate))}


def reached(
    curves: Mapping[str, np.ndarray], level: float, window: int = 5
) -> dict[str, float]:
    """Metrics of REACHED.

    Args:
        curves: of :func:`course`.
        level: of the mean over the last ``window`` iterations, or over all so far.
        window: iterations.
    """
    score, tokens = curves["plain_score"], curves["tokens"]
    sums = np.cumsum(np.concatenate([[0.0], score]))
    end = np.arange(1, len(score) + 1)
    begin = np.maximum(end - window, 0)
    above = (sums[end] - sums[begin]) / (end - begin) >= level
    at = int(np.argmax(above)) if above.any() else len(score)
    spent = tokens[at] if above.any() else tokens[-1] * (len(score) + 1) / len(score)
    return {"steps_to_level": float(at + 1), "tokens_to_level": float(spent)}


class Shown(runtime.OneRound):
    """A planner that shows worked examples before every prompt, in its one round."""

    def __init__(self, method: xrpo.XRPO):
        """Of the method's examples."""
        self._method = method

    def plan(self, turn: runtime.Turn) -> Any:
        """As many responses to each prompt, with examples."""
        if turn.number:
            return None
        prompts, told = self._method.seeded(turn, range(len(turn.prompts)))
        return [runtime.Ask(turn.samples, prompt) for prompt in prompts], told


def try_examples(
    given: dict[str, Any],
    method: xrpo.XRPO,
    settings: runtime.LanguageSettings,
    params: Any,
    context: StageContext,
) -> StageResult:
    """Worked examples and plain tries, on problems that were not solved at first.

    The first batches of problems fill the memory. Of the others each is tried
    ``first_samples`` times; what is not solved then is tried as often as 'uniform'
    counts give, once with examples from the memory and once without: the first tries
    are the same responses.

    Args:
        given: the config of the arm, with the group 'examples': 'memory_batches' and
            'batches' of ``rl.prompts`` problems.
        method: XRPO with examples.
        settings: of the iteration.
        params: of the supervised policy.
        context: of the stage.
    """
    task, sizes = tasks.build(given["task"]), given["examples"]
    language = tasks.language(given, "rollout")
    model, slots = (
        generation.cached_decoder(language.config),
        language.engine(given["rl"]),
    )
    ready = models.prepare_weights(params, config=language.config)
    engine = generation.Engine(model, ready, slots, context.key, decode=language.decode)
    score = tasks.scorer(task, language)
    settings = dataclasses.replace(settings, dynamic_sampling=False)

    def draw(number: int, attempt: int) -> Any:
        rng = np.random.default_rng([5, number, attempt])
        return tasks.prompts_of(task, language, "train", settings.prompts, rng)

    def written(number: int, planner: Any, memory: Any) -> list[np.ndarray]:
        """Whether responses are right, by group, in the order they were asked for."""
        found = runtime.collect(
            engine, draw, score, settings, number, planner=planner, memory=memory
        )
        rights: list[list[bool]] = [[] for _ in found.problems]
        for record in sorted(found.records, key=lambda record: record.number):
            rights[record.group].append(method.is_right(record))
        return [np.array(each) for each in rights]

    memory = np.zeros(0, np.uint8)
    for number in range(sizes["memory_batches"]):
        found = runtime.collect(engine, draw, score, settings, number)
        memory = method.remember(memory, found, number)
    even = {"rule": "uniform", "stop_if_right": False}
    twice = dataclasses.replace(method, rounds=2, **even)
    numbers = range(sizes["memory_batches"], sizes["memory_batches"] + sizes["batches"])
    empty, first = np.zeros(0, np.uint8), method.first_samples
    flips: list[tuple[bool, bool]] = []
    accuracy: dict[str, list[float]] = {"with_examples": [], "without": []}
    total = 0
    for number in numbers:
        seeded, plain = (written(number, twice, m) for m in (memory, empty))
        for a, b in zip(seeded, plain, strict=True):
            total += 1
            if not a[:first].any():
                flips.append((bool(a[first:].any()), bool(b[first:].any())))
        shown = written(number, Shown(method), memory)
        accuracy["with_examples"].append(float(np.mean(np.concatenate(shown))))
        accuracy["without"].append(float(np.mean(np.concatenate(plain))))
    share = np.mean(flips, axis=0) if flips else (0.0, 0.0)
    return StageResult(
        {},
        {
            "unsolved": len(flips) / total,
            "flipped_with_examples": float(share[0]),
            "flipped_without": float(share[1]),
            **{f"accuracy_{k}": float(np.mean(v)) for k, v in accuracy.items()},
        },
    )
