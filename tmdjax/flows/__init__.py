"""Flows: paths, grids, solvers with log-probs, guidance, matching losses."""

from tmdjax.flows.adaptive import AdaptiveSolution, rk45
from tmdjax.flows.grids import (
    custom_grid,
    edm_grid,
    shift_time,
    shifted_grid,
    uniform_grid,
)
from tmdjax.flows.guidance import (
    as_pytree,
    classifier_free_guidance,
    drop_condition,
    guidance_scale,
)
from tmdjax.flows.matching import (
    discrete_time,
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
from tmdjax.flows.reference import endpoints, states_at, terminal_errors
from tmdjax.flows.rollout import METHODS, Trajectory, nfe, rollout, solver_velocity
from tmdjax.flows.step_search import (
    Metric,
    Paths,
    cheapest_paths,
    check_budget,
    check_costs,
    check_velocity,
    cost_memory,
    fine_knots,
    local_error_costs,
    micro_batches,
    path_cost,
    squared_l2,
)
from tmdjax.flows.table import FINAL_RULES, PRESETS, CoefficientTable, make_table
from tmdjax.flows.transition import gaussian_log_prob, gaussian_transition

__all__ = [
    "FINAL_RULES",
    "METHODS",
    "PARAMETRISATIONS",
    "PRESETS",
    "AdaptiveSolution",
    "CoefficientTable",
    "GaussianMixture",
    "Metric",
    "Paths",
    "Trajectory",
    "as_pytree",
    "as_velocity",
    "cheapest_paths",
    "check_budget",
    "check_costs",
    "check_velocity",
    "classifier_free_guidance",
    "conditional_velocity",
    "convert",
    "cost_memory",
    "custom_grid",
    "discrete_time",
    "drop_condition",
    "edm_grid",
    "endpoints",
    "fine_knots",
    "flow_matching_loss",
    "gaussian_log_prob",
    "gaussian_mixture",
    "gaussian_transition",
    "guidance_scale",
    "interpolate",
    "local_error_costs",
    "logit_normal_time",
    "make_table",
    "micro_batches",
    "nfe",
    "path_cost",
    "rk45",
    "rollout",
    "shift_time",
    "shifted_grid",
    "shifted_time",
    "solver_velocity",
    "squared_l2",
    "states_at",
    "terminal_errors",
    "uniform_grid",
    "uniform_time",
]
