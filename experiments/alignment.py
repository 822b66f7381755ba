"""Shared by experiments that align a flow model with a reward by RL.

Stages: the base is pretrained (once for all seeds and arms); RL aligns it, an arm a
method; base and aligned model are sampled by the ODE on prompts of the training set
and on held-out ones, from the same noise.
"""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import alignment_iteration as iterations
from experiments import alignment_tasks as tasks
from experiments.arms import arms, of_arm
from experiments.curves import ends, seconds_per_step
from experiments.figures import side_by_side
from tmdjax import data, flows
from tmdjax.core import prng, trees
from tmdjax.harness import Report, Stage, StageContext, StageResult
from tmdjax.harness.claims import metric_name
from tmdjax.harness.config import to_plain
from tmdjax.harness.pictures import image_grid
from tmdjax.train import flow_rl

Config = Any
SETS = ("train", "held_out")
BASE = ("task", "model", "optimizer", "train")
"""What a base depends on; an arm may have a task of its own."""
LATER = ("prompts", "held_out", "timeout")
"""What of a task its base does not see."""

COURSE = {
    "reward_first": "mean reward of the first fifth of the iterations",
    "reward_last": "mean reward of the last fifth of the iterations",
    "reward_gain": "the last fifth less the first",
    "reward_at_time": "mean reward after 'evaluate.judge_seconds' of training; nan if "
    "training was shorter",
    "seconds_per_iteration": "seconds of an iteration, without compilation",
    "first_ratio_error": "how far the ratio of the first minibatch is from 1",
    "behaviour_ratio_error": "how far ratios of training to rollout are from 1 under "
    "equal parameters, at most: what their precisions do",
    "network_calls_per_sample": "network evaluations a sample of a rollout",
}
"""What RL itself reports, beside the evaluation, and what it means."""
CURVES = {"reward_mean": "mean reward of rollouts", "loss": "loss"}
LABELS = {
    "score": "score",
    "strict": "share with all that was asked for",
    "exact": "share with the whole word",
}
"""Axes of what samples are measured by."""
MEANINGS = COURSE | {
    "score": "mean reward of samples by the ODE on held-out prompts, in [0, 1]",
    "strict": "share of samples with all that was asked for, in [0, 1]",
    "exact": "share of samples with the whole word, in [0, 1]",
}


def stages(config: Config, arm: str) -> list[Stage]:
    """The stages of one arm."""
    config = of_arm(config, arm)
    plain = to_plain(config)
    return [
        Stage(
            name="pretrain",
            run=functools.partial(tasks.pretrain, config),
            config={k: plain[k] for k in BASE}
            | {"task": {k: v for k, v in plain["task"].items() if k not in LATER}},
            seeded=False,
        ),
        Stage(
            name="align",
            run=functools.partial(align, config),
            config={
                k: plain[k]
                for k in ("method", "task", "rollout", "objective", "rl", "precision")
            },
            parents=("pretrain",),
        ),
        Stage(
            name="evaluate",
            run=functools.partial(evaluate, config),
            config={"evaluate": plain["evaluate"]},
            parents=("pretrain", "align"),
        ),
    ]


def align(config: Config, context: StageContext) -> StageResult:
    """RL of one arm."""
    task = tasks.build(config)
    params = jax.tree.map(jnp.asarray, context.inputs["pretrain"].outputs["params"])
    state, iteration, whole, method = iterations.build(
        config, task, params, jax.random.fold_in(context.key, 1)
    )
    settings = config.rl
    state = context.fit(
        state,
        iteration,
        data.in_memory(task.prompts, settings.prompts, seed=context.seed),
        num_steps=settings.iterations,
        log_every=settings.log_every,
    )
    rows = context.rows()
    reward, seconds = (
        np.array([row[name] for row in rows])
        for name in ("reward_mean", "time/seconds")
    )
    first, last = ends(reward, parts=5)
    metrics = {
        "reward_first": first,
        "reward_last": last,
        "reward_gain": last - first,
        "first_ratio_error": float(rows[0]["ratio_error"]),
        "behaviour_ratio_error": float(
            max(row.get("behaviour_ratio_error", row["ratio_error"]) for row in rows)
        ),
        "network_calls_per_sample": iterations.calls_per_sample(config, method),
        "skipped_updates": float(state.skipped),
    }
    # the first row is compilation; a resumed run compiles once more
    curve = {"reward": reward, "seconds": seconds - seconds[0]}
    return StageResult(
        {"params": whole(state.eval_params), "curve": curve},
        metrics,
        model=tasks.model_spec(config),
        timings={"seconds_per_iteration": seconds_per_step(rows)},
    )


def reward_at(curve: Mapping[str, Any], seconds: float) -> float:
    """Mean reward around a time: of a tenth of the iterations; NaN if never reached."""
    reward, time = np.asarray(curve["reward"]), np.asarray(curve["seconds"])
    if time[-1] < seconds:
        return float("nan")
    width = max(1, len(reward) // 10)
    smooth = np.convolve(reward, np.ones(width) / width, mode="valid")
    middle = np.convolve(time, np.ones(width) / width, mode="valid")
    return float(np.interp(seconds, middle, smooth))


def evaluate(config: Config, context: StageContext) -> StageResult:
    """Scores of base and aligned model, by the ODE from the same noise."""
    task, settings = tasks.build(config), config.evaluate
    table = flows.make_table(
        "ode", flows.shifted_grid(settings.steps, config.rollout.shift)
    )
    models_ = {
        "base": context.inputs["pretrain"].outputs["params"],
        "aligned": context.inputs["align"].outputs["params"],
    }

    @jax.jit
    def draw(params: Any, batch: Any, keys: Any) -> Any:
        trained, policy, _ = tasks.policy(config, params, jax.random.key(0))
        if config.rl.lora_rank:  # merged: the whole is the base of nothing
            trained = {}
        velocity = policy.acting(trained, policy.frozen)
        cond = policy.condition(policy.frozen, batch)
        noise = prng.normal(keys, task.event_shape)
        return flows.rollout(None, velocity, noise, table, cond, store=False)

    curve = context.inputs["align"].outputs["curve"]
    timings = {"reward_at_time": reward_at(curve, settings.judge_seconds)}
    metrics: dict[str, float] = {}
    shown = {}
    for name, prompts in (("train", task.prompts), ("held_out", task.held_out)):
        rows = np.arange(settings.count) % len(next(iter(prompts.values())))
        batch = trees.take(prompts, rows)
        keys = prng.sample_keys(jax.random.fold_in(context.key, len(name)), len(rows))
        for model, params in models_.items():
            samples = draw(params, batch, keys)
            for what, values in task.measure(samples, batch).items():
                metrics[f"{model}.{name}.{what}"] = float(np.mean(values))
            if name == "held_out":
                shown[model] = samples[: settings.shown]
    for name in SETS:
        for what in task.measures:
            metrics[f"gain.{name}.{what}"] = (
                metrics[f"aligned.{name}.{what}"] - metrics[f"base.{name}.{what}"]
            )
    return StageResult({"shown": shown}, metrics, timings=timings)


def measures(config: Config, arm: str) -> set[str]:
    """The metrics of an arm that claims may be about."""
    evaluated = {
        f"{model}.{name}.{what}"
        for model in ("base", "aligned", "gain")
        for name in SETS
        for what in tasks.measures(of_arm(config, arm))
    }
    return evaluated.union(COURSE)


def summary_rows(config: Config, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of arms."""
    rows = []
    for arm in arms(config):
        columns = {
            "network calls a sample": "network_calls_per_sample",
            "seconds an iteration": "seconds_per_iteration",
            "reward, first": "reward_first",
            "reward, last": "reward_last",
        }
        # the second one is strict: the whole picture, or the whole word
        for i, what in enumerate(tasks.measures(of_arm(config, arm))):
            for model in ("base", "aligned"):
                title = f"{('score', 'all right')[i]}, {model}"
                columns[title] = f"{model}.held_out.{what}"
        rows.append(
            {"method": arm}
            | {title: found.get(metric_name(arm, n)) for title, n in columns.items()}
        )
    return rows


def summary_figures(
    config: Config, found: Mapping[str, Any], folder: pathlib.Path
) -> list[tuple[str, pathlib.Path | None]]:
    """What held-out prompts score before RL and after, an arm a row."""
    measured = {arm: tasks.measures(of_arm(config, arm)) for arm in arms(config)}
    figures = []
    for what in dict.fromkeys(what for names in measured.values() for what in names):
        rows = {
            arm: {
                model: metric_name(arm, f"{model}.held_out.{what}")
                for model in ("base", "aligned")
            }
            for arm, names in measured.items()
            if what in names
        }
        path = folder / f"held_out-{what}.png"
        figures += side_by_side(found, rows, path, "Held-out prompts", LABELS[what])
    return figures


def report(
    config: Config,
    arm: str,
    results: Mapping[str, StageResult],
    folder: pathlib.Path,
) -> Report:
    """Held-out samples before and after."""
    if "evaluate" not in results:
        return Report()
    images = results["evaluate"].outputs["shown"]
    if images["base"].ndim != 4:
        return Report()
    rows = {model: images[model] for model in ("base", "aligned")}
    path = image_grid(rows, folder / "samples.png")
    return Report([], [("Held-out prompts, the same noise", path)])


def describe(config: Config) -> dict[str, Any]:
    """Sizes; builds every method, so that settings that cannot work are refused."""
    rows: dict[str, Any] = {}
    key = jax.random.key(0)
    built: dict[str, tuple[tasks.Task, Any]] = {}
    traced: set[str] = set()  # a network that arms share is traced under the first
    for arm in arms(config):
        own = of_arm(config, arm)
        _check_sizes(own)
        base = json.dumps({k: to_plain(own[k]) for k in BASE})
        own_network = (base, own.precision, own.rl.lora_rank, own.rl.guidance)
        network = json.dumps(to_plain(own_network))
        policy = iterations.linear_policy if network in traced else tasks.policy
        traced.add(network)
        if base not in built:
            task = tasks.build(own)
            params = jax.eval_shape(functools.partial(tasks.initial, own), key)
            built[base] = task, params
        (task, params), name = built[base], own.task.name
        method, _, _ = iterations.setup(own, task.event_shape)
        stored = flow_rl.stored_bytes(method, own.rl.prompts) / 1e9
        if stored > own.rl.memory_limit_gb:
            raise ValueError(
                f"arms.{arm} would store {stored:.3g} GB of states an iteration, above "
                f"rl.memory_limit_gb={own.rl.memory_limit_gb}; draw fewer prompts, "
                f"train fewer steps (a window, or fewer splits), or raise the limit."
            )
        iterations.trace(own, task, params, policy)
        rows[f"{name}: parameters"] = trees.count(params)
        if name != "mixture":
            tasks.pretraining(own)  # refuses an optimiser that is not there
            rows[f"{name}: pretraining updates"] = own.train.steps
        rows[f"{arm}: iterations"] = own.rl.iterations
        rows[f"{arm}: samples an iteration"] = method.group_size * own.rl.prompts
        rows[f"{arm}: stored states, GB"] = stored
    return rows


def _check_sizes(config: Config) -> None:
    """Refuses numbers of an arm's config that cannot work."""
    if config.rl.prompts % config.rl.chunks:
        raise ValueError(
            f"rl.prompts={config.rl.prompts} do not divide into rl.chunks="
            f"{config.rl.chunks}; choose a divisor."
        )
