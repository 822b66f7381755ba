"""Reinforcement learning of a language model, and how much longer its answers grew."""

from experiments import grpo
from experiments.grpo import CURVES, arms, describe
from tmdjax.harness import Stage, StageResult

__all__ = ["CURVES", "arms", "describe"]


def growth(context):
    """Median length of the last rollouts over that of the first."""
    length = context.inputs["rl"].outputs["length_median"]
    return StageResult({}, {"growth": length[-1] / length[0]})


def stages(config, arm):
    """Those of language models, and what this paper looks at."""
    last = Stage(name="growth", run=growth, config={}, parents=("rl",))
    return [*grpo.stages(config, arm), last]


def measures(config, arm):
    """The metrics of an arm that claims may be about."""
    return grpo.measures(config, arm) | {"growth"}
