"""Shared by experiments that train policies in environments: an arm a method.

Stages: all seeds of an arm are trained side by side in one compiled program; then each
seed's policy is judged on episodes of its own.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import control_tasks as tasks
from experiments.arms import arms, build_method, of_arm, tuples
from experiments.curves import ends, seconds_per_step
from experiments.figures import side_by_side
from tmdjax import models, quant, rl, train
from tmdjax.core import prng, trees
from tmdjax.core.files import write_atomically
from tmdjax.harness import Report, Stage, StageContext, StageResult
from tmdjax.harness.claims import metric_name
from tmdjax.harness.config import to_plain
from tmdjax.harness.plots import path_plot
from tmdjax.train import on_policy

Config = Any
PAIRING = "vmapped"
RATIO = {
    "ratio_correlation": "correlation of the approximate log-ratio and the exact one",
    "ratio_bias": "mean of the approximate log-ratio less the exact one",
    "ratio_rms_error": "root mean square of that difference",
    "ratio_spread": "standard deviation of the exact log-ratio",
}
"""Of a method that diagnoses its approximate ratio, where 'diagnosed_samples' says so:
means over the second half of training."""
COURSE = {
    "reward_first": "mean reward a step in the first iterations, over all seeds",
    "reward_last": "mean reward a step in the last tenth of training, over all seeds",
    "seconds_per_iteration": "seconds of an iteration of one seed, of those trained "
    "side by side, without compilation",
    "first_ratio_error": "how far the ratio of the first minibatch is from 1",
}
"""What training itself reports, beside the judgement, and what it means."""
CURVES = {"reward_mean": "mean reward a step", "loss": "loss"}
MEANINGS = {
    "training_reward": "mean reward a step in the last tenth of training",
    "goal_entropy": "entropy of the goals reached over its largest value, in [0, 1]; 1 "
    "is all goals alike",
    "covered_goals": "goals that at least 2 % of the agents reach",
    "reached": "share of agents that end at a goal, in [0, 1]",
    "reward": "mean reward a step of episodes that were not trained on",
    "cells_visited": "share of the free cells that an agent visits, in [0, 1]",
    "success": "share of agents that succeed, in [0, 1]",
    "judged_return": "sum of rewards of an episode, the mean over agents",
    **COURSE,
    **RATIO,
}


def build(config: Config) -> tuple[on_policy.Trainer, Any]:
    """Trainer of an arm's config, and its method as it acts."""
    sizes = tuples(to_plain(config.train))
    seeds, count, calls = (sizes.pop(k) for k in ("seeds", "envs", "iterations"))
    per_call = sizes.pop("iterations_per_call")
    if calls % per_call:
        raise ValueError(
            f"train.iterations={calls} is no multiple of train.iterations_per_call="
            f"{per_call}; choose a divisor."
        )
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"train.seeds={seeds}: give the seeds to train side by side, each once."
        )
    if "recipe" in config.method:
        raise ValueError(
            f"method.recipe={config.method.recipe!r} would be without effect; set "
            f"precision.rollout and precision.train."
        )
    precision = quant.Precision(**to_plain(config.precision))
    changed = {k: v for k, v in sizes.items() if v is not None}
    changed["precision"] = precision
    method, settings = build_method(
        to_plain(config.method), on_policy.ControlSetup, settings=changed
    )
    vector = tasks.vector(to_plain(config.env), count)
    trainer = on_policy.make_trainer(vector, method, settings)
    return trainer, models.with_recipe(method, precision.rollout)


def seeds(config: Config, arm: str) -> Sequence[int]:
    """The seeds of an arm that are trained; its stages judge no other."""
    return of_arm(config, arm).train.seeds


def stages(config: Config, arm: str) -> list[Stage]:
    """The stages of one arm."""
    config = of_arm(config, arm)
    plain = to_plain(config)
    return [
        Stage(
            name="train",
            run=functools.partial(train_seeds, config),
            config={k: plain[k] for k in ("method", "env", "train", "precision")},
            seeded=False,
        ),
        Stage(
            name="judge",
            run=functools.partial(judge, config, arm),
            config={"agents": config.evaluate.agents},
            parents=("train",),
        ),
    ]


def train_seeds(config: Config, context: StageContext) -> StageResult:
    """All seeds of an arm, side by side."""
    (trainer, method), sizes = build(config), config.train
    seeds, per_call = sizes.seeds, sizes.iterations_per_call
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    run = on_policy.jit_iterations(trainer, per_call, seeds=True)

    def step(state: Any, batch: None, key: Any) -> tuple[Any, dict[str, Any]]:
        state, metrics = run(state, keys)
        metrics = jax.device_get(metrics)
        on_policy.check(metrics, trainer.settings)
        row = {k: v.mean() for k, v in metrics.items()}
        row["first_ratio_error"] = metrics["first_ratio_error"].max()
        for i, seed in enumerate(seeds):
            row[f"reward_mean.seed{seed}"] = metrics["reward_mean"][i].mean()
        return state, row

    state = context.fit(
        _begin(trainer, method, keys, context.inputs.get("clone")),
        step,
        train.NoData(),
        num_steps=sizes.iterations // per_call,
        log_every=1,
    )
    rows = context.rows()
    reward = np.array([[row[f"reward_mean.seed{s}"] for s in seeds] for row in rows])
    return StageResult(
        {
            "policy": state.learner.params["policy"],
            "statistics": state.statistics,
            "reward": reward,
        },
        {
            "first_ratio_error": max(row["first_ratio_error"] for row in rows),
            "reward_first": float(reward[0].mean()),
            "reward_last": ends(reward, parts=10)[1],
            "skipped_updates": float(state.skipped),
            "parameters": float(trees.count(state.learner.params) / len(seeds)),
            **{
                name: float(np.mean([row[name] for row in rows[len(rows) // 2 :]]))
                for name in RATIO
                if name in rows[0]
            },
        },
        timings={
            "seconds_per_iteration": seconds_per_step(rows) / (per_call * len(seeds))
        },
    )


def _begin(
    trainer: on_policy.Trainer, method: Any, keys: Any, cloned: StageResult | None
) -> on_policy.OnPolicyState:
    """States of all seeds; from networks that were cloned, if there are such."""
    if cloned is None:
        return jax.jit(jax.vmap(trainer.init))(keys)
    statistics = cloned.outputs["statistics"]
    if statistics is not None:
        statistics = rl.RunningStatistics(**jax.tree.map(jnp.asarray, statistics))

    def start(key: Any, network: Any) -> on_policy.OnPolicyState:
        policy = method.pretrained(network)
        return trainer.init(key, policy=policy, statistics=statistics)

    return jax.jit(jax.vmap(start))(keys, cloned.outputs["network"])


@dataclasses.dataclass(frozen=True)
class Actor:
    """A policy as it acted in training; see :data:`control_tasks.Act`."""

    method: Any

    def __call__(self, policy: Any, observation: Any, key: Any) -> Any:
        """Actions [agent, action_size]."""
        params, statistics = policy
        if statistics is not None:
            observation = statistics.normalise(observation)
        keys = prng.sample_keys(key, observation.shape[0])
        return self.method.act(params, observation, keys)[0]


def judge(config: Config, arm: str, context: StageContext) -> StageResult:
    """The policy of one seed, on episodes of its own."""
    (trainer, method), seeds = build(config), list(config.train.seeds)
    trained = context.inputs["train"].outputs
    take = functools.partial(trees.take, rows=seeds.index(context.seed))
    policy = take(trained["policy"])
    statistics = None
    if trainer.settings.normaliser and trained["statistics"] is not None:
        statistics = rl.RunningStatistics(**take(trained["statistics"]))

    found, shown = tasks.judge(
        to_plain(config.env),
        config.evaluate.agents,
        Actor(method),
        (policy, statistics),
        context.key,
    )
    reward = trained["reward"][:, seeds.index(context.seed)]
    found |= {"training_reward": ends(reward, parts=10)[1]}
    return tasks.judged(method, policy, statistics, found, shown, {"arm": arm})


def measures(config: Config, arm: str) -> set[str]:
    """The metrics of an arm that claims may be about."""
    given = of_arm(config, arm)
    own = ("training_reward", "parameters", "skipped_updates")
    ratio = RATIO if given.train.get("diagnosed_samples") else ()
    return {*COURSE, *own, *ratio, *tasks.measures(given.env)}


def summary_rows(config: Config, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table of arms."""
    judged = [
        name for arm in arms(config) for name in tasks.measures(of_arm(config, arm).env)
    ]
    names = dict.fromkeys(("training_reward", *judged, "seconds_per_iteration"))
    return [
        {"method": arm}
        | {n.replace("_", " "): found.get(metric_name(arm, n)) for n in names}
        for arm in arms(config)
    ]


def summary_figures(
    config: Config, found: Mapping[str, Any], folder: pathlib.Path
) -> list[tuple[str, pathlib.Path | None]]:
    """What each measure finds of the policies, an arm a row."""
    judged = {arm: tasks.measures(of_arm(config, arm).env) for arm in arms(config)}
    figures = []
    for what in dict.fromkeys(what for names in judged.values() for what in names):
        rows = {
            arm: {what: metric_name(arm, what)}
            for arm, names in judged.items()
            if what in names
        }
        label, path = what.replace("_", " "), folder / f"{what}.png"
        figures += side_by_side(found, rows, path, "Episodes not trained on", label)
    return figures


def report(
    config: Config,
    arm: str,
    results: Mapping[str, StageResult],
    folder: pathlib.Path,
) -> Report:
    """Where the agents went, or a film of one."""
    shown = Report()
    if "judge" not in results:
        return shown
    outputs, env = results["judge"].outputs, to_plain(of_arm(config, arm).env)
    if "paths" in outputs:
        path = path_plot(
            outputs["paths"],
            folder / "paths.png",
            f"Where agents went, {arm}",
            **tasks.map_of(env),
        )
        shown.figures.append(("Paths of agents", path))
    page = tasks.film(env, outputs["states"]) if "states" in outputs else None
    if page is not None:
        path = folder / "film.html"
        write_atomically(path, page.encode())
        shown.figures.append(("One agent", path))
    return shown


def describe(config: Config) -> dict[str, Any]:
    """Sizes; builds and traces every arm, so that what cannot work is refused.

    Physics is built, not traced; where its package is not installed, that is said.
    """
    rows: dict[str, Any] = {}
    for arm in arms(config):
        own = of_arm(config, arm)
        env = to_plain(own.env)
        rows[f"{arm}: seeds side by side"] = len(own.train.seeds)
        if (package := tasks.absent(env)) is not None:
            rows[f"{arm}: parameters"] = f"unknown, {package} is not installed"
            continue
        trainer, _ = build(own)
        key = jax.eval_shape(lambda: jax.random.key(0))
        state = jax.eval_shape(trainer.init, key)
        if env["name"] not in tasks.SIMULATORS:
            jax.eval_shape(trainer.iterate, state, None, key)
        rows[f"{arm}: parameters"] = trees.count(state.learner.params)
        rows[f"{arm}: environment steps"] = trainer.steps * own.train.iterations
    return rows
