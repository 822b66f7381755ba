"""RL of a language model whose responses are written while others are trained on.

Tasks, stages and judging are those of :mod:`experiments.grpo`. Two groups of the config
say how the stage 'rl' has writing and training take turns:

    schedule  how far writing may be ahead of training: 'name', the system whose rule it
              is, 'areal' or 'april', and arguments of that system's ``schedule``; its
              sizes are those of the group 'rl'
    runtime   who writes, scores and trains: the 'executor'; how many 'generators' and
              'scorers'; the 'costs' of the virtual clock, in seconds by step and
              amount; and options of :func:`tmdjax.runtime.fit_asynchronously`

The executor 'sim' computes in this process and counts time on the virtual clock: two
runs have the same numbers. 'threads' takes the time that it takes, and two runs differ
where eta is above 0; so does 'ray', with a process for each worker and the arguments of
:class:`tmdjax.runtime.executors.RayActors` in 'ray'. 'none' is the synchronous
iteration, without any workers. The folder of the stage keeps the account of all
responses and the logs of events.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments import exploration, grpo
from experiments.arms import arms as arms
from experiments.arms import baseline_stages, tuples
from experiments.grpo import resolved
from experiments.grpo import summary_figures as summary_figures
from experiments.language_iteration import parts_of, settings_of
from tmdjax import runtime
from tmdjax.core.checks import check_choice
from tmdjax.core.optional import import_optional
from tmdjax.data.text_tasks import chain_sum
from tmdjax.harness import Stage, StageContext, StageResult
from tmdjax.harness.claims import metric_name
from tmdjax.runtime import executors
from tmdjax.runtime.events import logs_of, read_events
from tmdjax.runtime.packing import check_log_linear
from tmdjax.systems import april, areal

Config = Any
ACCOUNT = "trajectories"
"""The folder of account and events in that of the stage 'rl'."""
OPTIONS = ("generators", "scorers", "interruptible", "recompute", "checkpoint_every")
"""Settings of 'runtime' that are arguments of ``fit_asynchronously``."""
GROUPS = ("schedule", "runtime")
APART = {
    "staleness_mean": "versions that the weights are ahead of a token that trains "
    "them, the mean over tokens and updates",
    "staleness_max": "versions that the weights are ahead of such a token, at most",
    "off_policy_share": "share of the tokens trained on that earlier weights drew, in "
    "[0, 1]",
    "length_trained": "tokens of a response that was trained on",
    "length_ratio": "that length over the mean of all responses that were begun",
    "left_out": "responses that were begun and not trained on",
}
CLOCKED = {
    "clock_seconds": "seconds of the executor's clock until the last update",
    "clock_to_level": "seconds of the executor's clock until held-out accuracy reaches "
    "curve.level, at the average pace one look more than there are if it does not",
}
DIFFERENCE = {
    "parameters_difference": "largest difference of a parameter after reinforcement "
    "learning from that of the arm runtime.equal_to",
}
CURVES = grpo.CURVES | {"staleness_mean": "versions that the weights are ahead"}
SHOWN = ("accuracy_after", "staleness_mean", "off_policy_share", "length_ratio")
SHOWN += tuple(CLOCKED)
OF_TIERS = grpo.before_and_after(
    **{
        f"accuracy_{tier}": f"share of right responses to held-out problems of tier "
        f"{tier}, in [0, 1],"
        for tier in (*chain_sum.TIERS, "T4")
    }
)
MEANINGS = grpo.MEANINGS | OF_TIERS | APART | CLOCKED | DIFFERENCE


def rules_of(given: dict[str, Any]) -> tuple[Any, Any, Any, runtime.Schedule]:
    """Settings of the updates of an arm, their objective, optimiser, and the schedule.

    Raises:
        ValueError: numbers out of range, or what does not go together.
    """
    settings, objective, optimizer = settings_of(given)
    sizes: dict[str, Any] = {
        "samples": settings.samples,
        "max_new_tokens": settings.max_new_tokens,
        "slots": given["rl"]["slots"],
        "updates": given["rl"]["iterations"],
    }
    own = {k: v for k, v in tuples(given["schedule"]).items() if v is not None}
    name = own.pop("name")
    check_choice("schedule.name", name, ("areal", "april"))
    # the schedule has these; 'auto' is decided by the system
    fields = {f.name for f in dataclasses.fields(settings)} - {"prompts", "max_lag"}
    changes = {f: getattr(settings, f) for f in fields - sizes.keys()}
    if settings.proximal == "auto":
        del changes["proximal"]
    if name == "april":
        rule = own["off_policy"]
        schedule = april.schedule(settings.prompts, **own, **sizes)
        objective = april.objective(objective, rule)
        settings = april.settings(schedule, rule, **changes)
    else:
        own["eta"] = _whole(own["eta"])
        schedule = areal.schedule(batch=settings.prompts, **own, **sizes)
        settings = areal.settings(schedule, objective, **changes)
    check_log_linear(objective, settings)
    if given["runtime"]["executor"] == "none" and schedule.most_ahead > schedule.batch:
        raise ValueError(
            f"runtime.executor='none' writes and trains in turn, but the schedule lets "
            f"{schedule.most_ahead} groups be ahead of an update, which takes "
            f"{schedule.batch}; use another executor, or schedule.eta=0."
        )
    return settings, objective, optimizer, schedule


def _whole(number: float) -> float:
    """2 for 2.0; a config that may hold infinity has no whole numbers."""
    return int(number) if float(number).is_integer() else number


def executor_of(given: Mapping[str, Any]) -> executors.Executor | None:
    """The executor of a group 'runtime'; None for the synchronous iteration.

    Raises:
        ImportError: 'ray', which is not installed.
        ValueError: an unknown one, or costs or options out of range.
    """
    costs = executors.Costs(given["costs"], source="the config")
    known: dict[str, executors.Executor | None] = {
        "sim": executors.Simulated(costs),
        "threads": executors.Threads(),
        "ray": executors.RayActors(**given["ray"]),
        "none": None,
    }
    check_choice("runtime.executor", given["executor"], known)
    if given["executor"] == "ray":
        import_optional("ray", "runtime.executor='ray'", "ray")
    return known[given["executor"]]


def stages(config: Config, arm: str) -> list[Stage]:
    """The stages of one arm: those of GRPO, and a comparison of parameters."""
    given = resolved(config, arm)
    found = [_of_groups(stage, given) for stage in grpo.stages(config, arm)]
    twin = _twin(given)
    if twin is None:
        return found
    other, source = baseline_stages(arm, twin, stages, config, "rl")
    compare = Stage(
        name="compare",
        run=functools.partial(compare_parameters, source),
        config={},
        parents=tuple(dict.fromkeys(("rl", source))),
    )
    return [*found, *other, compare]


def _of_groups(stage: Stage, given: dict[str, Any]) -> Stage:
    """A stage of GRPO, by the groups 'schedule' and 'runtime' where it is 'rl'."""
    if stage.name != "rl":
        return stage
    groups = {name: given[name] for name in GROUPS}
    return dataclasses.replace(
        stage,
        run=functools.partial(reinforce, given),
        config={**stage.config, **groups, "level": given["curve"]["level"]},
    )


def _twin(given: Mapping[str, Any]) -> str | None:
    """The arm of runtime.equal_to; None where there is none of that name."""
    name = given["runtime"]["equal_to"]
    return name if name in given.get("arms", {}) else None


def reinforce(given: dict[str, Any], context: StageContext) -> StageResult:
    """Reinforcement learning from the supervised policy, and what became of all."""
    if given["runtime"]["executor"] == "none":
        return grpo.reinforce(given, context)
    found = grpo.reinforce(given, context, by=apart)
    rows, folder = context.rows(), context.directory / ACCOUNT
    stale = [[row[f"staleness_{what}"] for row in rows] for what in ("mean", "max")]
    metrics = {
        **found.metrics,
        **account_of(folder),
        "staleness_mean": float(np.mean(stale[0])),
        "staleness_max": max(stale[1]),
    }
    ends = update_ends(folder, len(rows))
    steps = exploration.steps_to(found.outputs, given["curve"]["level"])
    clocked = ends[-1], exploration.spent_by(steps, ends)
    timings = {**found.timings, **dict(zip(CLOCKED, map(float, clocked)))}
    return dataclasses.replace(found, metrics=metrics, timings=timings)


def apart(given: dict[str, Any], params: Any, context: StageContext) -> Any:
    """The state after updates by responses that other workers write meanwhile."""
    *rules, schedule = rules_of(given)
    parts = parts_of(given, params, context.key, rules)
    learner = runtime.make_learner(*parts.learning, **parts.options, exact=parts.exact)
    learn = exploration.watched(given, learner.learn, context.key)
    activity = runtime.Activity()
    loop = functools.partial(
        runtime.fit_asynchronously,
        learner.init(parts.start),
        dataclasses.replace(learner, learn=learn),
        parts.make_engine,
        parts.draw,
        parts.score,
        schedule,
        executor=executor_of(given["runtime"]),
        folder=context.directory / ACCOUNT,
        logs=(activity,),
        **{name: given["runtime"][name] for name in OPTIONS},
    )
    return context.run_loop(loop, num_steps=schedule.updates, table=activity.rows)


def account_of(folder: pathlib.Path) -> dict[str, float]:
    """What became of all responses of a run: metrics of APART, and of COURSE.

    Args:
        folder: of its account.
    """
    with runtime.TrajectoryStore(folder) as store:
        begun = [known for known in store.select() if known.length]
    trained = [known for known in begun if known.state == "consumed"]
    older = sum(
        count
        for known in trained
        for version, count in known.spans
        if version < (known.version or 0)
    )
    lengths = runtime.length_bias(begun)
    return {
        "off_policy_share": older / sum(known.length for known in trained),
        "length_trained": lengths["length_trained"],
        "length_ratio": lengths["length_ratio"],
        "left_out": float(len(begun) - len(trained)),
        "responses": float(len(begun)),
        "tokens": float(sum(known.length for known in begun)),
    }


def update_ends(folder: pathlib.Path, updates: int) -> np.ndarray:
    """Seconds of the executor's clock at the end of each update, float64 [update].

    Every start has a log, whose clock begins at 0. After a kill the run goes on from
    the end of the update that was restored, and what was undone is left out; after it
    was told to stop, which keeps all that is written, from when it stopped.

    Args:
        folder: with the logs of the run.
        updates: that were made. One whose weights were saved and whose event was not
            ends with the update before it.
    """
    ends, stopped = [0.0], (0, 0.0)  # after so many updates, at that time
    for path in logs_of(folder):
        events = read_events(path)
        restored = (event.version for event in events if event.what == "publish")
        if (done := next(restored, None)) is None:  # killed before it did anything
            continue
        ends = (ends + ends[-1:] * done)[: done + 1]
        begin = stopped[1] if stopped[0] == done else ends[-1]
        ends += [begin + event.end for event in events if event.what == "learn"]
        if any(event.what == "stop" for event in events):
            stopped = len(ends) - 1, begin + events[-1].end
    return np.array((ends + ends[-1:] * updates)[1 : updates + 1])


def compare_parameters(source: str, context: StageContext) -> StageResult:
    """How far two arms are apart after reinforcement learning: 0 if to the bit."""
    trees = [context.inputs[name].outputs["params"] for name in ("rl", source)]
    differences = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), *trees)
    return StageResult(
        {}, dict.fromkeys(DIFFERENCE, float(max(jax.tree.leaves(differences))))
    )


def measures(config: Config, arm: str) -> set[str]:
    """The metrics of an arm that claims may be about."""
    given, found = resolved(config, arm), grpo.measures(config, arm)
    if given["task"]["name"] == "chain_sum":
        tier = chain_sum.tier_of(given["task"]["high"])
        found |= {f"accuracy_{tier}_{when}" for when in grpo.WHEN}
    if _twin(given) is not None:
        found |= DIFFERENCE.keys()
    if given["runtime"]["executor"] == "none":
        return found
    # stale responses have none of these
    return (found - exploration.EQUAL.keys()) | APART.keys() | CLOCKED.keys()


def summary_rows(config: Config, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of arms."""
    return [
        {"arm": arm}
        | {n.replace("_", " "): found.get(metric_name(arm, n)) for n in SHOWN}
        for arm in arms(config)
    ]


def describe(config: Config) -> dict[str, Any]:
    """Sizes; builds every arm, so that what cannot work is refused."""
    rows = grpo.describe(config)
    for arm in arms(config):
        given = resolved(config, arm)
        executor_of(given["runtime"])
        *_, schedule = rules_of(given)
        rows[f"{arm}: groups ahead, at most"] = str(schedule.most_ahead)
    return rows
