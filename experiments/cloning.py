"""Policies cloned from demonstrations, as stages: experts, episodes of theirs, clones.

PPO trains an expert and, less long, a medium one; episodes of both are recorded, or
read from a folder; networks of all seeds are cloned from these side by side.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import control
from experiments import control_tasks as tasks
from experiments.supervised import Supervised
from tmdjax import data, rl, train
from tmdjax.core import prng, trees
from tmdjax.harness import Stage, StageContext, StageResult
from tmdjax.harness.config import to_plain

Config = Any
EXPERTS = ("medium", "expert")
FINE_TUNING = (
    "noise_hidden noise_input std_lower std_upper decay_iterations clip_noise "
    "clip_mean clip_last clip_range clip_base entropy_coefficient w2_coefficient "
    "w2_noise log_prob_reduction log_prob_range count_start fine_tuned_steps std_floor "
    "advantage_quantiles denoising_discount learned_noise_steps stochastic_steps "
    "legacy_grid"
).split()
"""Settings of a method that cloning does not depend on."""
MEANINGS = {
    "cloning_loss": "loss of cloning in its last tenth, the mean over seeds",
    "demonstrated_steps": "steps of the demonstrations",
    "medium_return": "return of the medium expert's demonstrations, the mean",
    "expert_return": "return of the expert's demonstrations, the mean",
}
SMALL = ("cloning_loss", "demonstrated_steps")


def stages(config: Config) -> list[Stage]:
    """Of an arm; the last one, 'clone', has networks and statistics of all seeds."""
    plain = to_plain(config)
    return [*_demonstrations(config, plain), _cloning(config, plain)]


def measures(config: Config) -> set[str]:
    """Names of what these stages find."""
    returns = () if config.demonstrations.folder else MEANINGS.keys() - SMALL
    return {*SMALL, *returns}


def _demonstrations(config: Config, plain: Mapping[str, Any]) -> list[Stage]:
    """Experts and their episodes; only these where they come from a folder."""
    settings = plain["demonstrations"]
    if settings["folder"]:
        return [
            Stage(
                name="demonstrations",
                run=functools.partial(_loaded, config),
                config={**settings, "env": tasks.without_chunks(plain["env"])},
                seeded=False,
                files=(pathlib.Path(settings["folder"]),),
            )
        ]
    experts = [
        Stage(
            name=name,
            run=functools.partial(_train_expert, config),
            config={
                k: to_plain(expert_config(config, name))[k]
                for k in ("method", "env", "train", "precision")
            },
            seeded=False,
        )
        for name in EXPERTS
    ]
    recorded = Stage(
        name="demonstrations",
        run=functools.partial(_recorded, config),
        config={**settings, "env": tasks.without_chunks(plain["env"])},
        parents=EXPERTS,
        seeded=False,
    )
    return [*experts, recorded]


def expert_config(config: Config, name: str) -> Config:
    """The config by which an expert is trained: of states, one action a step."""
    env = tasks.without_chunks(to_plain(config.env))
    if env.get("observation") == "pixels":
        env = {k: v for k, v in env.items() if k not in ("observation", "side")}
    length = "medium_iterations" if name == "medium" else "iterations"
    sizes = dict(config.expert.train)
    sizes |= {"seeds": (config.expert.seed,), "iterations": config.expert[length]}
    return ConfigDict(
        {
            "env": env,
            "method": config.expert.method,
            "train": sizes,
            "precision": config.precision,
        }
    )


def _train_expert(config: Config, context: StageContext) -> StageResult:
    found = control.train_seeds(expert_config(config, context.name), context)
    return StageResult(found.outputs)


def _recorded(config: Config, context: StageContext) -> StageResult:
    """Episodes of both experts, as many of each, acting as they were trained."""
    shown = tasks.without_chunks(to_plain(config.env))
    parts: list[dict[str, Any]] = []
    found: dict[str, float] = {}
    for i, name in enumerate(EXPERTS):
        own = expert_config(config, name)
        env, outputs = to_plain(own.env), context.inputs[name].outputs
        statistics = outputs["statistics"]
        if own.train.get("normalise") in (None, "none"):
            statistics = None
        policy = trees.take((outputs["policy"], statistics), 0)
        if statistics is not None:
            policy = policy[0], rl.RunningStatistics(**policy[1])
        arrays = tasks.record(
            env,
            config.demonstrations.episodes,
            control.Actor(control.build(own)[1]),
            policy,
            jax.random.fold_in(context.key, i),
            None if env == shown else shown,
        )
        parts.append(arrays)
        found[f"{name}_return"] = float(data.Demonstrations(**arrays).returns.mean())
    whole = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
    mixture = {k: len(part["reward"]) for k, part in zip(EXPERTS, parts)}
    meta = {"env": shown, "seed": config.expert.seed, "steps": mixture, **found}
    demonstrations = data.Demonstrations(meta=meta, **whole)
    data.write_demonstrations(context.directory / "demonstrations", demonstrations)
    found["demonstrated_steps"] = float(len(demonstrations.action))
    return StageResult(demonstrations.arrays(), found)


def _loaded(config: Config, context: StageContext) -> StageResult:
    """Somebody's demonstrations, of this environment and in the policy's bound."""
    folder, env = config.demonstrations.folder, to_plain(config.env)
    found = data.load_demonstrations(folder)
    vector = tasks.vector(tasks.without_chunks(env), 1)
    told = found.observation.shape[1:], found.action.shape[1:]
    needed = vector.observation.shape, (vector.action_size,)
    if told != needed:
        raise ValueError(
            f"{folder} has observations {told[0]} and actions {told[1]}; those of "
            f"{env['name']} are {needed[0]} and {needed[1]}. Set env to the one that "
            f"was demonstrated."
        )
    bound, most = config.method.get("bound", 1.0), float(np.abs(found.action).max())
    if most > bound + 1e-6:
        raise ValueError(
            f"actions of {folder} reach {most:g}, beyond +-{bound:g}, where the "
            f"policy's end; scale them, or set method.bound."
        )
    return StageResult(found.arrays(), {"demonstrated_steps": len(found.action)})


def _cloning(config: Config, plain: Mapping[str, Any]) -> Stage:
    method = {k: v for k, v in plain["method"].items() if k not in FINE_TUNING}
    if method["name"].partition(":")[0] == "reinflow":
        method.pop("steps", None)  # a velocity is cloned, whatever walks it
    return Stage(
        name="clone",
        run=functools.partial(clone, config),
        config={
            "method": method,
            "cloning": plain["cloning"],
            "chunk": config.env.get("chunk", 1),
            "seeds": list(config.train.seeds),
            "precision": plain["precision"],
        },
        parents=("demonstrations",),
        seeded=False,
    )


def supervised(config: Config, observation: Any) -> Supervised:
    """How policies of all seeds are cloned side by side.

    Args:
        config: of an arm.
        observation: shape and dtype of one.
    """
    method, count = control.build(config)[1], len(config.train.seeds)
    vector = tasks.vector(to_plain(config.env), 1)
    one = jax.ShapeDtypeStruct((1, *observation.shape), observation.dtype)

    def init(key: Any) -> Any:
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))
        return jax.vmap(lambda k: method.init(k, one, vector.action_size))(keys)

    def loss(params: Any, batch: Any, keys: Any) -> Any:
        def of_seed(params: Any, i: Any) -> Any:
            own = prng.fold_in(keys, i)
            given = batch["observation"], batch["action"], own
            return method.cloning_loss(params, *given)

        # a sum: the gradient of each seed's network is that of its own loss
        each = jax.vmap(of_seed)(params, jnp.arange(count))
        return each.sum(0), {"cloning_loss": each.mean(0)}

    settings = config.cloning
    optimizer = train.make_optimizer(
        train.OptimizerConfig(
            learning_rate=settings.learning_rate,
            schedule="cosine",
            total_steps=settings.steps,
            weight_decay=settings.weight_decay,
            clip_norm=None,  # it would be one norm for all seeds
        )
    )
    return Supervised(
        init=init, loss=loss, optimizer=optimizer, ema_decay=settings.ema_decay
    )


def clone(config: Config, context: StageContext) -> StageResult:
    """Networks of all seeds, cloned from the same demonstrations in the same order."""
    found = data.Demonstrations(**context.inputs["demonstrations"].outputs)
    data.action_bounds(found)  # refuses what has no scale
    arrays = data.action_chunks(found, config.env.get("chunk", 1))
    statistics = None
    if found.observation.dtype != np.uint8:
        bounds = data.observation_bounds(found)
        statistics = rl.RunningStatistics(
            np.float32(len(found.action)), bounds.middle, bounds.half_width**2
        )
        arrays["observation"] = np.asarray(statistics.normalise(arrays["observation"]))
    shape = jax.ShapeDtypeStruct(found.observation.shape[1:], found.observation.dtype)
    state = supervised(config, shape).fit(context, arrays, config.cloning)
    rows = context.rows()
    last = [row["cloning_loss"] for row in rows[-max(1, len(rows) // 10) :]]
    return StageResult(
        {"network": state.eval_params["network"], "statistics": statistics},
        {"cloning_loss": float(np.mean(last))},
    )
