"""Shared by experiments that train policies in environments: an arm a method.

Stages: all seeds of an arm are trained side by side in one compiled program; then each
seed's policy is judged on episodes of its own.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import control_tasks as tasks
from tmdjax import envs, rl, train
from tmdjax.core import prng, trees
from tmdjax.core.checks import check_choice, check_count
from tmdjax.harness import Report, Stage, StageContext, StageResult
from tmdjax.harness.config import to_plain
from tmdjax.harness.report import line_plot, path_plot
from tmdjax.systems import fpo, policyflow, ppo
from tmdjax.train import on_policy

Config = Any
PAIRING = "vmapped"
METHODS = {
    "ppo": ppo.GaussianPolicy,
    "policyflow": policyflow.PolicyFlow,
    "fpo": fpo.FPO,
}
COURSE = ("reward_first", "reward_last", "seconds_per_iteration", "first_ratio_error")
"""What training itself reports, beside the judgement."""


def arms(config: Config) -> tuple[str, ...]:
    """One arm a method."""
    return tuple(config.arms)


def build(config: Config, arm: str) -> tuple[on_policy.Trainer, Any]:
    """Trainer and method of an arm."""
    given: dict[str, Any] = to_plain(config.arms[arm])
    kind = given.pop("method")
    check_choice(f"arms.{arm}.method", kind, METHODS)
    settings = {**to_plain(config.train), **given.pop("train", {})}
    seeds, count, calls = (settings.pop(k) for k in ("seeds", "envs", "iterations"))
    per_call = settings.pop("iterations_per_call")
    check_count("train.iterations", calls)
    if calls % check_count("train.iterations_per_call", per_call):
        raise ValueError(
            f"train.iterations={calls} is no multiple of train.iterations_per_call="
            f"{per_call}; choose a divisor."
        )
    if not seeds:
        raise ValueError("train.seeds is empty; give the seeds to train side by side.")
    method = METHODS[kind](**_tuples(given))
    vector = envs.Vector(tasks.build(config), count)
    trainer = on_policy.make_trainer(
        vector, method, on_policy.Settings(**_tuples(settings))
    )
    return trainer, method


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def stages(config: Config, arm: str) -> list[Stage]:
    """The stages of one arm."""
    plain = to_plain(config)
    return [
        Stage(
            name="train",
            run=functools.partial(train_seeds, config, arm),
            config={
                "arm": plain["arms"][arm],
                **{k: plain[k] for k in ("env", "train")},
            },
            seeded=False,
        ),
        Stage(
            name="judge",
            run=functools.partial(judge, config, arm),
            config={"evaluate": plain["evaluate"]},
            parents=("train",),
        ),
    ]


def train_seeds(config: Config, arm: str, context: StageContext) -> StageResult:
    """All seeds of an arm, side by side."""
    trainer, _ = build(config, arm)
    seeds, per_call = config.train.seeds, config.train.iterations_per_call
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    run = on_policy.jit_iterations(trainer, per_call, seeds=True)

    def step(state: Any, batch: None, key: Any) -> tuple[Any, dict[str, Any]]:
        state, metrics = run(state, keys)
        metrics = jax.device_get(metrics)
        on_policy.check(metrics, trainer.settings)
        # skipped updates are none of fit's: it would leave their windows out
        row = {k: v.mean() for k, v in metrics.items() if not k.startswith("skipped")}
        row["first_ratio_error"] = metrics["first_ratio_error"].max()
        for i, seed in enumerate(seeds):
            row[f"reward_mean.seed{seed}"] = metrics["reward_mean"][i].mean()
        return state, row

    state = context.fit(
        jax.jit(jax.vmap(trainer.init))(keys),
        step,
        train.NoData(),
        num_steps=config.train.iterations // per_call,
        log_every=1,
    )
    rows = context.rows()
    reward = np.array([[row[f"reward_mean.seed{s}"] for s in seeds] for row in rows])
    rate = np.array([row["time/steps_per_second"] for row in rows])
    end = max(1, len(rows) // 10)
    return StageResult(
        {
            "policy": state.learner.params["policy"],
            "statistics": state.statistics,
            "reward": reward,
        },
        {
            "seconds_per_iteration": float(1 / np.median(rate[len(rows) // 4 :]))
            / (per_call * len(seeds)),
            "first_ratio_error": max(row["first_ratio_error"] for row in rows),
            "reward_first": float(reward[0].mean()),
            "reward_last": float(reward[-end:].mean()),
            "skipped_updates": float(state.skipped),
            "parameters": float(trees.count(state.learner.params) / len(seeds)),
        },
    )


def judge(config: Config, arm: str, context: StageContext) -> StageResult:
    """The policy of one seed, on episodes of its own."""
    trainer, method = build(config, arm)
    trained = context.inputs["train"].outputs
    seeds = list(config.train.seeds)
    if context.seed not in seeds:
        raise ValueError(
            f"seed {context.seed} was not trained: train.seeds={tuple(seeds)}; name it "
            f"there, or run --seeds={seeds[0]}..{seeds[-1]}."
        )
    take = functools.partial(trees.take, rows=seeds.index(context.seed))
    policy = take(trained["policy"])
    statistics = None
    if trainer.settings.normalise != "none" and trained["statistics"] is not None:
        statistics = rl.RunningStatistics(**take(trained["statistics"]))

    def act(observation: Any, key: Any) -> Any:
        if statistics is not None:
            observation = statistics.normalise(observation)
        keys = prng.sample_keys(key, observation.shape[0])
        return method.act(policy, observation, keys)[0]

    found, paths = tasks.judge(config, act, context.key)
    reward = trained["reward"][:, seeds.index(context.seed)]
    end = max(1, len(reward) // 10)
    found |= {"training_reward": float(reward[-end:].mean())}
    shown = {"reward": reward} | ({} if paths is None else {"paths": paths})
    model, meta = method.exported(policy)
    if statistics is not None:
        meta |= {
            k: np.asarray(getattr(statistics, k)).tolist() for k in ("mean", "variance")
        }
    return StageResult(
        {"params": policy["network"], **shown}, found, model=model, meta=meta
    )


def measures(config: Config) -> set[str]:
    """The metrics that claims may be about."""
    judged = (
        "training_reward",
        "parameters",
        "skipped_updates",
        *tasks.measures(config),
    )
    return {f"{arm}/{name}" for arm in arms(config) for name in (*COURSE, *judged)}


def summary_rows(config: Config, found: Mapping[str, float]) -> list[dict[str, Any]]:
    """The table of arms, from the metrics of a record."""
    names = ("training_reward", *tasks.measures(config), "seconds_per_iteration")
    return [
        {"method": arm}
        | {name.replace("_", " "): found.get(f"{arm}/{name}") for name in names}
        for arm in arms(config)
    ]


def report(
    config: Config, results: dict[str, StageResult], folder: pathlib.Path
) -> Report:
    """Learning curve, and where the agents went."""
    shown = Report([], [])
    if "judge" not in results:
        return shown
    outputs, metrics = results["judge"].outputs, results["judge"].metrics
    shown.tables.append(
        (
            "Judged on episodes of its own",
            [{"measure": k, "value": v} for k, v in metrics.items()],
        )
    )
    calls = np.arange(1, len(outputs["reward"]) + 1)
    path = line_plot(
        {
            "mean reward a step": (
                calls * config.train.iterations_per_call,
                outputs["reward"],
            )
        },
        folder / "reward.png",
        title="Training",
        x_label="iteration",
        y_label="mean reward a step",
    )
    shown.figures.append(("Reward against iterations", path))
    if "paths" in outputs:
        path = path_plot(
            outputs["paths"],
            folder / "paths.png",
            "Where agents went",
            **tasks.map_of(config),
        )
        shown.figures.append(("Paths of agents", path))
    return shown


def describe(config: Config) -> dict[str, Any]:
    """Sizes; builds and traces every arm, so that what cannot work is refused."""
    check_count("evaluate.agents", config.evaluate.agents)
    rows: dict[str, Any] = {"iterations": config.train.iterations}
    rows["seeds side by side"] = len(config.train.seeds)
    for arm in arms(config):
        trainer, _ = build(config, arm)
        key = jax.eval_shape(lambda: jax.random.key(0))
        state = jax.eval_shape(trainer.init, key)
        jax.eval_shape(trainer.iterate, state, key)
        rows[f"{arm}: parameters"] = trees.count(state.learner.params)
        rows[f"{arm}: environment steps"] = trainer.steps * config.train.iterations
    return rows
