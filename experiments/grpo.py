"""GRPO of a language model on tasks with exact rewards: an arm a task and method.

Stages: supervised training on gold responses until a part of them is right ('sft', once
for all arms of a task); reinforcement learning; accuracy on problems never seen, before
and after. An arm whose method shows worked examples (XRPO) first tries these, in a
stage 'examples'. One of no iterations is compared ('mismatch') and not trained. Where
the config has a group 'curve', held-out problems are tried during reinforcement
learning too, and arms are measured against the 'baseline' of them.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from experiments import exploration, mismatch, supervised_language
from experiments import language_tasks as tasks
from experiments.arms import arms, baseline_stages, of_arm
from experiments.curves import ends
from experiments.figures import side_by_side
from experiments.language_iteration import (
    iteration,
    judge_of,
    merged,
    settings_of,
    start_of,
)
from tmdjax import models, train
from tmdjax.core import trees
from tmdjax.harness import Stage, StageContext, StageResult
from tmdjax.harness.claims import metric_name
from tmdjax.harness.config import to_plain
from tmdjax.systems import xrpo

Config = Any
LOOK = ("slots", "length", "chunk", "max_new_tokens", "temperature")
"""Sizes of rl that judging uses too."""
WHEN = ("before", "after")


def before_and_after(**meanings: str) -> dict[str, str]:
    """Meanings of measures before reinforcement learning and after."""
    return {
        f"{what}_{when}": f"{meaning} {when} reinforcement learning"
        for what, meaning in meanings.items()
        for when in WHEN
    }


JUDGED = before_and_after(
    accuracy="share of right responses to held-out problems, in [0, 1],",
    solved="share of held-out problems with any right response, in [0, 1],",
)
AGREED = before_and_after(
    distinct="different right answers to a held-out problem",
    consensus="share of held-out problems whose most frequent answer is right, in "
    "[0, 1],",
)
"""Of tasks that know which answers are one."""
KEPT = ("score", "entropy", "length_median")
"""Columns of the log that the result of 'rl' keeps."""
CURVES = {
    "score": "mean score of rollouts",
    "held_out": "accuracy on held-out problems",
    "accuracy": "accuracy in supervised training",
    "loss": "loss",
}
LEARNT = {
    "length_before": "tokens of a response before reinforcement learning",
    "length_after": "tokens of a response after reinforcement learning",
    "score_first": "mean score of the first tenth of the iterations, in [0, 1]",
    "score_last": "mean score of the last tenth of the iterations, in [0, 1]",
    "truncated_fraction": "share of rollouts cut at their longest, at the end",
    "first_ratio_error": "how far the ratio of a first minibatch is from 1, at most",
    "mismatch_kl": "KL of rollouts and training under equal weights, in nats a token, "
    "the mean over iterations",
    "mismatch_max": "largest difference of their log-probs of a token, at most over "
    "iterations",
}
MEANINGS = JUDGED | AGREED | LEARNT | exploration.EXAMPLES | exploration.COURSE
MEANINGS |= exploration.CLOCKED | exploration.REACHED
MEANINGS |= mismatch.MISMATCH | mismatch.PUBLISHED | mismatch.CALIBRATED


def resolved(config: Config, arm: str) -> dict[str, Any]:
    """The config of an arm, with what its 'rl' may leave out."""
    given = to_plain(of_arm(config, arm))
    return given | {"rl": {"temperature": 1.0, "lora_rank": 0} | given["rl"]}


def stages(config: Config, arm: str) -> list[Stage]:
    """The stages of one arm."""
    given = resolved(config, arm)
    alike = supervised_language.of_all_arms(given)
    first = Stage(
        name="sft",
        run=functools.partial(supervised_language.train_to_gate, alike),
        config={k: given[k] for k in ("task", "model", "sft")}
        | {k: given["rl"][k] for k in LOOK}
        | {"recipe": alike["precision"]["train"]},
        seeded=False,
        files=tasks.files_of(given),
    )
    before = [first] if given["model"]["name"] == "decoder" else []
    parents = tuple(stage.name for stage in before)
    parts = ("task", "model", "rl", "precision", "stress")
    depends = {k: given[k] for k in parts if k in given}
    trials = []
    if tries_examples(given):
        method = settings_of(given)[1]
        seen = {name: getattr(method, name) for name in exploration.SEEN}
        trial = Stage(
            name="examples",
            run=functools.partial(try_examples, given),
            config=depends | {"method": seen, "examples": given["examples"]},
            parents=parents,
            version=2,
            files=tasks.files_of(given),
        )
        trials = [trial]
    if "mismatch" in given:
        trials.append(mismatch.stage(given, depends, parents, LOOK))
    if not given["rl"]["iterations"]:
        return [*before, *trials]
    depends = depends | {"method": given["method"]}
    if "curve" in given:
        depends["curve"] = {k: given["curve"][k] for k in ("every", "problems")}
    judged, other, source = {"judge": given["judge"]}, [], "rl"
    if (baseline := exploration.baseline_of(given)) is not None:
        judged["baseline"] = baseline
        other, source = baseline_stages(arm, baseline, stages, config, "rl")
    return [
        *before,
        *other,
        *trials,
        Stage(
            name="rl",
            run=functools.partial(reinforce, given),
            config=depends,
            parents=parents,
            files=tasks.files_of(given),
        ),
        Stage(
            name="judge",
            run=functools.partial(judge, given, source),
            config=judged,
            parents=tuple(dict.fromkeys((*parents, "rl", source))),
        ),
    ]


def tries_examples(given: dict[str, Any]) -> bool:
    """Whether an arm has the stage 'examples'."""
    method = settings_of(given)[1] if "examples" in given else None
    return isinstance(method, xrpo.XRPO) and method.shows_examples


def try_examples(given: dict[str, Any], context: StageContext) -> StageResult:
    """The stage 'examples' of an arm, see :mod:`experiments.exploration`."""
    settings, method, _ = settings_of(given)
    start = start_of(given, context)
    return exploration.try_examples(given, method, settings, start, context)


def in_turn(given: dict[str, Any], params: Any, context: StageContext) -> Any:
    """The state after iterations that write, score and update one after the other."""
    iterate, state = iteration(given, params, context.key, context.should_stop)
    if "curve" in given:
        iterate = exploration.watched(given, iterate, context.key)
    count, data = given["rl"]["iterations"], train.NoData()
    return context.fit(state, iterate, data, num_steps=count, log_every=1)


def reinforce(
    given: dict[str, Any], context: StageContext, by: Callable[..., Any] = in_turn
) -> StageResult:
    """Reinforcement learning, by :func:`in_turn` or its like, from the start."""
    state, rows = by(given, start_of(given, context), context), context.rows()
    curves = {name: np.array([row[name] for row in rows]) for name in KEPT}
    first, last = ends(curves["score"], parts=10)
    more, course, timings = exploration.course(rows)
    course |= mismatch.calibrated(state.clip_range)
    return StageResult(
        {"params": merged(given, state.learner.params), **curves, **more},
        course
        | {
            "score_first": first,
            "score_last": last,
            "skipped_updates": float(state.skipped),
            "truncated_fraction": rows[-1]["truncated_fraction"],
        },
        model=models.spec_of(models.Decoder(tasks.language(given).config)),
        timings=timings,
    )


def judge(given: dict[str, Any], source: str, context: StageContext) -> StageResult:
    """Accuracy on held-out problems, before and after, with equal randomness.

    Args:
        given: the config of the arm.
        source: the parent whose curve the arm's own is measured against, if the config
            has a baseline.
        context: of the stage.
    """
    look, found = judge_of(given, "holdout", given["judge"], context.key), {}
    after = context.inputs["rl"].outputs["params"]
    for when, params in (("before", start_of(given, context)), ("after", after)):
        found |= {f"{name}_{when}": value for name, value in look(params).items()}
    if exploration.baseline_of(given) is not None:
        own, other = (context.inputs[name].outputs for name in ("rl", source))
        found |= exploration.reached(own, other)
    return StageResult({}, found)


def measures(config: Config, arm: str) -> set[str]:
    """The metrics of an arm that claims may be about."""
    given = resolved(config, arm)
    found = mismatch.measured(given) if "mismatch" in given else set()
    if tries_examples(given):
        found |= exploration.EXAMPLES.keys()
    if not given["rl"]["iterations"]:
        return found
    found |= {*JUDGED, *LEARNT, *exploration.COURSE, *exploration.CLOCKED}
    if hasattr(tasks.TASKS[given["task"]["name"]], "canonical"):
        found |= AGREED.keys()
    if exploration.baseline_of(given) is not None:
        found |= exploration.REACHED.keys()
    if "shadow" in settings_of(given)[1].needs:
        found |= mismatch.CALIBRATED.keys()
    return found


def summary_rows(config: Config, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of arms."""
    return [
        {"arm": arm}
        | {n.replace("_", " "): found.get(metric_name(arm, n)) for n in JUDGED}
        for arm in arms(config)
    ]


def summary_figures(
    config: Config, found: Mapping[str, Any], folder: pathlib.Path
) -> list[tuple[str, pathlib.Path | None]]:
    """Held-out problems before reinforcement learning and after, an arm a row."""
    labels = {
        "accuracy": "share of right responses",
        "solved": "share of problems with any right response",
    }
    figures = []
    for what, label in labels.items():
        rows = {
            arm: {when: metric_name(arm, f"{what}_{when}") for when in WHEN}
            for arm in arms(config)
        }
        path = folder / f"{what}.png"
        figures += side_by_side(found, rows, path, "Held-out problems", label)
    if "mismatch" in config:
        rows = {arm: mismatch.of_arm(arm) for arm in arms(config)}
        path, label = folder / "mismatch.png", mismatch.MEASURED["mismatch_mean"]
        figures += side_by_side(found, rows, path, "Rollout and training", label)
    return figures


def describe(config: Config) -> dict[str, Any]:
    """Sizes; builds every arm, so that what cannot work is refused."""
    rows: dict[str, Any] = {}
    lengths: dict[str, int] = {}
    for arm in arms(config):
        given = resolved(config, arm)
        sizes = given["rl"]
        settings, _, _ = settings_of(given)
        supervised_language.of_all_arms(given)
        rows[f"{arm}: supervised until accuracy"] = given["sft"]["gate"]
        if (missing := tasks.missing(given)) is not None:
            rows[f"{arm}: parameters"] = f"unknown, {missing} is not there"
            continue
        task, language = tasks.build(given["task"]), tasks.language(given)
        looked = {
            "train": max(tasks.at_most(task, 64), settings.prompts),
            "holdout": given["judge"]["problems"],
        }
        if given["model"]["name"] == "decoder":
            looked["evaluation"] = given["sft"]["problems"]
        if "curve" in given:
            rows[f"{arm}: curve against"] = exploration.measured_against(given)
            tried = exploration.tried(given, arm)
            looked["evaluation"] = max(tried, looked.get("evaluation", 0))
        drawn = repr((given["task"], given["model"], looked))
        if drawn not in lengths:  # many arms share a task
            lengths[drawn] = max(
                len(tasks.encode(language, problem))
                for problem in tasks.first_problems(task, looked)
            )
        longest = lengths[drawn]
        if longest + settings.max_new_tokens > sizes["length"]:
            raise ValueError(
                f"arms.{arm}: prompts of {longest} tokens and rl.max_new_tokens="
                f"{settings.max_new_tokens} need rl.length of at least "
                f"{longest + settings.max_new_tokens}, not {sizes['length']}."
            )
        shapes = jax.eval_shape(language.parameters, jax.random.key(0))
        rows[f"{arm}: parameters"] = trees.count(shapes)
        language.engine(sizes)
        acting = tasks.language(given, "rollout").config
        cache = models.cache_bytes(acting, sizes["slots"], sizes["length"])
        rows[f"{arm}: cache, bytes"] = cache
        responses = settings.prompts * settings.samples
        rows[f"{arm}: responses"] = sizes["iterations"] * responses
    return rows
