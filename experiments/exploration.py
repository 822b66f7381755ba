"""What a planner of rollouts does: worked examples before RL, and the course of RL.

Stage 'examples': problems of the training split that the supervised policy does not
solve in its first tries are tried again, with worked examples and without.

Group 'curve' of a config: problems that are not trained on are tried during RL, and the
curve of an arm is measured against that of a baseline arm under the same seed.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments import language_tasks as tasks
from experiments.language_iteration import judge_of, merged, training_draw
from tmdjax import generation, models, runtime
from tmdjax.harness import StageContext, StageResult
from tmdjax.systems import xrpo

EXAMPLES = {
    "unsolved": "share of problems without a right answer in the first round, before "
    "reinforcement learning",
    "flipped_with_examples": "share of these that further tries with worked examples "
    "solve, 0 where there are none",
    "flipped_without": "share of these that as many plain tries solve, 0 where there "
    "are none",
    "accuracy_with_examples": "share of right responses with worked examples, before "
    "reinforcement learning",
    "accuracy_without": "share of right responses without any, before reinforcement "
    "learning",
}
SEEN = ("first_samples", "examples", "memory_size", "success_threshold")
"""What the stage 'examples' depends on, of all settings of a method."""
COURSE = {
    "tied_fraction": "share of groups whose scores are all equal, over all iterations",
    "responses": "responses written in reinforcement learning, discarded ones included",
    "tokens": "tokens of these",
}
CLOCKED = {
    "allocation_share": "share of an iteration's seconds that planning takes, in the "
    "median"
}
EQUAL = {"first_ratio_error": max, "mismatch_kl": np.mean, "mismatch_max": max}
"""Columns of updates whose responses are of their own weights, and what is told of all
of these."""
REACHED = {
    "steps_to_level": "iterations until held-out accuracy reaches what the baseline "
    "ends at under the same seed, and one look more than there are if it does not",
    "tokens_to_level": "tokens written until then",
    "accuracy_at_tokens": "held-out accuracy, in [0, 1], on the curve where as many "
    "tokens are written as the baseline writes in all, or at its end if they never are",
}
WINDOW = 3
"""Looks over which a curve is averaged."""


def course(
    rows: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, Any], dict[str, float], dict[str, float]]:
    """Curves, metrics and timings of reinforcement learning.

    Args:
        rows: one an iteration.

    Returns:
        Curves: 'tokens', of all iterations so far, [iteration]; where the log of
        :func:`watched` has looks, their accuracy, 'held_out' [look], and the number of
        iterations before each, 'looked_at' [look]. Metrics: those of COURSE, and of
        EQUAL unless all responses are of older weights than their updates. Timings:
        those of CLOCKED, which differ between two equal runs.
    """
    tokens = np.array([row["tokens"] for row in rows])
    planning = np.array(
        [row.get("time/allocation", 0) + row.get("time/retrieval", 0) for row in rows]
    )
    rate = np.array([row["time/steps_per_second"] for row in rows])
    metrics = {
        "tied_fraction": float(np.mean([row["tied_group_fraction"] for row in rows])),
        "responses": float(sum(row["responses"] for row in rows)),
        "tokens": float(tokens.sum()),
    }
    for name, over in EQUAL.items():
        if told := [row[name] for row in rows if name in row]:
            metrics[name] = float(over(told))
    curves = {"tokens": np.cumsum(tokens)}
    looks = [i for i, row in enumerate(rows) if "held_out" in row]
    if looks:
        curves["looked_at"] = np.array(looks) + 1
        curves["held_out"] = np.array([rows[i]["held_out"] for i in looks])
    return curves, metrics, {"allocation_share": float(np.median(planning * rate))}


def tried(given: Mapping[str, Any], arm: str) -> int:
    """How many problems a look of the group 'curve' takes.

    Raises:
        ValueError: no look would be taken; names the arm.
    """
    every, iterations = given["curve"]["every"], given["rl"]["iterations"]
    if every > iterations:
        raise ValueError(
            f"arms.{arm}: curve.every={every} is above rl.iterations={iterations}, so "
            f"that no look would be taken; lower it."
        )
    return given["curve"]["problems"]


def watched(given: dict[str, Any], iterate: Any, key: Any) -> Any:
    """An iteration whose log has 'held_out', accuracy in [0, 1], now and then.

    Each look draws with the same randomness, one response to each of the 'problems' of
    the group 'curve', after each 'every' iterations.

    Args:
        given: the config of the arm.
        iterate: ``(state, batch, key) -> (state, metrics)`` of the arm.
        key: of the stage.
    """
    sizes = {"problems": given["curve"]["problems"], "samples": 1}
    # another key than that of the rollouts
    look = judge_of(given, "evaluation", sizes, jax.random.fold_in(key, 1))

    def step(state: Any, batch: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        state, metrics = iterate(state, batch, key)
        if int(state.iteration) % given["curve"]["every"] == 0:
            seen = look(merged(given, state.learner.params))
            metrics = metrics | {"held_out": seen["accuracy"]}
        return state, metrics

    return step


def baseline_of(given: Mapping[str, Any]) -> str | None:
    """The arm that curves are measured against; None if the config has it not."""
    name = given.get("curve", {}).get("baseline")
    return name if name in given.get("arms", {}) else None


def measured_against(given: Mapping[str, Any]) -> str:
    """The arm of :func:`baseline_of`, or why there is none, for who looks at sizes."""
    name = given["curve"].get("baseline")
    missing = "nothing" if name is None else f"nothing: {name!r} is none of the arms"
    return baseline_of(given) or missing


def reached(
    own: Mapping[str, np.ndarray], baseline: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Metrics of REACHED; curves are means over WINDOW looks, or over all so far.

    Args:
        own: curves of :func:`course`, with looks.
        baseline: the same of the arm to measure against, which may be this one.
    """
    score, tokens, at = _smoothed(own["held_out"]), own["tokens"], own["looked_at"]
    level, budget = _smoothed(baseline["held_out"])[-1], baseline["tokens"][-1]
    steps = steps_to(own, level)
    return {
        "steps_to_level": float(steps),
        "tokens_to_level": spent_by(steps, tokens[: at[-1]]),
        "accuracy_at_tokens": float(np.interp(budget, tokens[at - 1], score)),
    }


def steps_to(own: Mapping[str, np.ndarray], level: float) -> int:
    """Iterations until held-out accuracy, a mean over WINDOW looks, reaches a level.

    One look more than there are if it never does.

    Args:
        own: curves of :func:`course`, with looks.
        level: of accuracy, in [0, 1].
    """
    at, there = own["looked_at"], np.flatnonzero(_smoothed(own["held_out"]) >= level)
    return int(at[there[0]] if there.size else at[-1] + at[0])


def spent_by(steps: int, spent: np.ndarray) -> float:
    """What was spent, such as tokens, by the end of an iteration.

    Args:
        steps: of the iteration, from 1. Beyond the last it is what as many would have
            spent at the average pace.
        spent: in all, at the end of each iteration, [iteration].
    """
    if steps <= len(spent):
        return float(spent[steps - 1])
    return float(spent[-1] * steps / len(spent))


def _smoothed(curve: np.ndarray) -> np.ndarray:
    sums = np.cumsum(np.concatenate([[0.0], curve]))
    end = np.arange(1, len(curve) + 1)
    begin = np.maximum(end - WINDOW, 0)
    return (sums[end] - sums[begin]) / (end - begin)


class Shown(runtime.OneRound):
    """A planner that shows worked examples before every prompt, in its one round."""

    shows_examples = True

    def __init__(self, method: xrpo.XRPO):
        """A planner that finds and shows examples as ``method.seeded`` does."""
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

    Problems are of the training split, others under another seed. The first batches
    fill the memory. Of the others each is tried ``first_samples`` times; what is not
    solved then is tried as often as 'uniform' counts give, once with examples from the
    memory and once without: the first tries are the same responses.

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
    draw = training_draw(task, language, settings.prompts, context.key)

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
    found = {
        "unsolved": len(flips) / total,
        "flipped_with_examples": float(share[0]),
        "flipped_without": float(share[1]),
        **{f"accuracy_{k}": float(np.mean(v)) for k, v in accuracy.items()},
    }
    numbers_told = (f"{k.replace('_', ' ')} {v:.3f}" for k, v in found.items())
    print(f"[examples] of {total} problems: {', '.join(numbers_told)}", flush=True)
    return StageResult({}, found)
