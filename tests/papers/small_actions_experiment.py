"""Control with one more measure: how large the actions became."""

import numpy as np

from experiments import control
from experiments.control import CURVES, PAIRING, arms, describe, report
from tmdjax.harness import Stage, StageResult

__all__ = ["CURVES", "PAIRING", "arms", "describe", "report"]


def reach(context):
    """The farthest that an agent came from the origin."""
    paths = context.inputs["judge"].outputs["paths"]
    return StageResult({}, {"reach": np.nanmax(np.linalg.norm(paths, axis=-1))})


def stages(config, arm):
    """Those of control, and what this paper looks at."""
    last = Stage(name="reach", run=reach, config={}, parents=("judge",))
    return [*control.stages(config, arm), last]


def measures(config, arm):
    """The metrics of an arm that claims may be about."""
    return control.measures(config, arm) | {"reach"}
