"""Alignment with one more measure: how far rewards were apart at the end."""

from experiments import alignment
from experiments.alignment import CURVES, arms, describe, report
from tmdjax.harness import Stage, StageResult

__all__ = ["CURVES", "arms", "describe", "report"]


def swing(context):
    """The largest mean reward of an iteration less the smallest."""
    reward = context.inputs["align"].outputs["curve"]["reward"]
    return StageResult({}, {"swing": reward.max() - reward.min()})


def stages(config, arm):
    """Those of alignment, and what this paper looks at."""
    last = Stage(name="swing", run=swing, config={}, parents=("align",))
    return [*alignment.stages(config, arm), last]


def measures(config, arm):
    """The metrics of an arm that claims may be about."""
    return alignment.measures(config, arm) | {"swing"}
