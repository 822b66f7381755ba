"""Fine-tuning of cloned policies: ReinFlow beside DPPO, and PPO from scratch.

Policies are cloned from demonstrations (:mod:`experiments.cloning`) and fine-tuned in
the environment (:mod:`experiments.control`), all seeds of an arm side by side; then
each seed's policy is judged without noise. What arms have in common is made once.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments import cloning, control
from experiments import control_tasks as tasks
from experiments.arms import arms, of_arm
from experiments.curves import ends
from tmdjax import rl
from tmdjax.core import prng, trees
from tmdjax.harness import Stage, StageContext, StageResult
from tmdjax.harness.config import to_plain

Config = Any
PAIRING = control.PAIRING
CURVES = {**control.CURVES, "cloning_loss": "loss of cloning"}
STARTS = {"": 1.0, "zero_start.": 0.0}
"""Scales of the noise that a judged policy starts from, by prefixes of the measures."""
MEANINGS = {
    **control.MEANINGS,
    **cloning.MEANINGS,
    "reward": "mean reward a chunk of actions, in episodes that were not trained on; "
    "zero_start: the policy starts from 0 in place of noise",
}
seeds = control.seeds
summary_rows = control.summary_rows
report = control.report


def stages(config: Config, arm: str) -> list[Stage]:
    """The stages of one arm."""
    config = of_arm(config, arm)
    plain, found = to_plain(config), []
    if config.start.cloned:
        found += cloning.stages(config)
    if config.start.tuned:
        found.append(
            Stage(
                name="train",
                run=functools.partial(control.train_seeds, config),
                config={k: plain[k] for k in ("method", "env", "train", "precision")},
                parents=("clone",) if config.start.cloned else (),
                seeded=False,
            )
        )
    judged = {"agents": config.evaluate.agents, "method": plain["method"]}
    return [
        *found,
        Stage(
            name="judge",
            run=functools.partial(judge, config, arm),
            config={**judged, "env": plain["env"]},
            parents=(found[-1].name,),
        ),
    ]


@dataclasses.dataclass(frozen=True)
class Deployed:
    """A policy without the noise that it explored with; see :data:`control_tasks.Act`.

    Attributes:
        method: of the arm.
        action_size: of its actions.
    """

    method: Any
    action_size: int

    def __call__(self, policy: Any, observation: Any, key: Any) -> Any:
        """Actions [agent, action_size] of (parameters, statistics, scale of noise)."""
        params, statistics, scale = policy
        if statistics is not None:
            observation = statistics.normalise(observation)
        if not _is_chain(self.method):
            return self.method.mean_and_log_std(params, observation)[0]
        keys = prng.sample_keys(key, observation.shape[0])
        x_0 = scale * prng.normal(keys, (self.action_size,))
        return self.method.evaluate(params, observation, keys, x_0)


def _is_chain(method: Any) -> bool:
    """Whether an action is the end of a chain from noise, which can be cloned."""
    return hasattr(method, "cloning_loss")


def judge(config: Config, arm: str, context: StageContext) -> StageResult:
    """The policy of one seed, on episodes of its own."""
    (trainer, method), row = (
        control.build(config),
        list(config.train.seeds).index(context.seed),
    )
    ((last, made),) = context.inputs.items()
    outputs, env = made.outputs, to_plain(config.env)
    statistics, found, shown = outputs["statistics"], {}, {}
    if last == "clone":
        policy = method.pretrained(trees.take(outputs["network"], row))
    else:
        policy = trees.take(outputs["policy"], row)
        found["training_reward"] = ends(outputs["reward"][:, row], parts=10)[1]
        if trainer.settings.normaliser is None:
            statistics = None
        if statistics is not None:
            statistics = trees.take(statistics, row)
    if statistics is not None:
        statistics = rl.RunningStatistics(**jax.tree.map(jnp.asarray, statistics))
    act = Deployed(method, tasks.build(env).action_size)
    for prefix, scale in _starts(method).items():
        given = policy, statistics, jnp.float32(scale)
        measured, kept = tasks.judge(
            env, config.evaluate.agents, act, given, context.key
        )
        found |= {prefix + name: value for name, value in measured.items()}
        shown = shown or kept
    facts = {"arm": arm, "chunk": env.get("chunk", 1)}
    return tasks.judged(method, policy, statistics, found, shown, facts)


def _starts(method: Any) -> Mapping[str, float]:
    return STARTS if _is_chain(method) else {"": 1.0}


def measures(config: Config, arm: str) -> set[str]:
    """The metrics of an arm that claims may be about."""
    own = of_arm(config, arm)
    judged = tasks.measures(own.env)
    found = {*judged}
    if own.start.tuned:
        found |= control.measures(config, arm)
    if own.start.cloned:
        found |= cloning.measures(own) | {f"zero_start.{name}" for name in judged}
    return found


def describe(config: Config) -> dict[str, Any]:
    """Sizes; builds and traces arms and experts, to refuse what cannot work."""
    for arm in arms(config):
        own = of_arm(config, arm)
        if not own.start.cloned and not own.start.tuned:
            raise ValueError(
                f"arm {arm!r} is neither cloned nor tuned; set start.cloned=True or "
                f"start.tuned=True."
            )
        folder = own.demonstrations.folder
        if own.start.cloned and folder and not pathlib.Path(folder).exists():
            raise ValueError(
                f"demonstrations.folder={folder} is not there; give a folder or file "
                f"that tmdjax.data.load_demonstrations reads."
            )
        if not own.start.cloned or tasks.absent(own.env) is not None:
            continue
        trainer, method = control.build(own)
        if not _is_chain(method):
            raise ValueError(
                f"arm {arm!r} begins from a clone, and {own.method.name!r} cannot be "
                f"cloned; set start.cloned=False, or take reinflow or dppo."
            )
        plain = own.start.tuned and trainer.settings.normaliser is None
        if plain and tasks.vector(to_plain(own.env), 1).observation.dtype != jnp.uint8:
            raise ValueError(
                f"arm {arm!r} has train.normalise='none', and its clone sees "
                f"observations scaled by the bounds of its demonstrations; take "
                f"'fixed', or 'running'."
            )
        if not own.demonstrations.folder:
            control.build(cloning.expert_config(own, "expert"))
    return control.describe(config)
