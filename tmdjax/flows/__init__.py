"""Flows: paths, grids, solvers with log-probs, guidance, matching losses."""

from tmdjax.flows.grids import custom_grid, shift_time, shifted_grid, uniform_grid
from tmdjax.flows.guidance import classifier_free_guidance, drop_condition
from tmdjax.flows.matching import (
    flow_matching_loss,
    logit_normal_time,
    shifted_time,
    uniform_time,
)
from tmdjax.flows.mixture import GaussianMixture, gaussian_mixture
from tmdjax.flows.paths import (
    PARAMETRISATIONS,
    as_velocity,
    conditional_velocity,
    convert,
    interpolate,
)
from tmdjax.flows.rollout import METHODS, Trajectory, nfe, rollout, solver_velocity
from tmdjax.flows.table import FINAL_RULES, PRESETS, CoefficientTable, make_table
from tmdjax.flows.transition import gaussian_log_prob, gaussian_transition

__all__ = [
    "FINAL_RULES",
    "METHODS",
    "PARAMETRISATIONS",
    "PRESETS",
    "CoefficientTable",
    "GaussianMixture",
    "Trajectory",
    "as_velocity",
    "classifier_free_guidance",
    "conditional_velocity",
    "convert",
    "custom_grid",
    "drop_condition",
    "flow_matching_loss",
    "gaussian_log_prob",
    "gaussian_mixture",
    "gaussian_transition",
    "interpolate",
    "logit_normal_time",
    "make_table",
    "nfe",
    "rollout",
    "shift_time",
    "shifted_grid",
    "shifted_time",
    "solver_velocity",
    "uniform_grid",
    "uniform_time",
]
