"""Reinforcement learning rules: advantages, surrogates, weights, KL estimators.

Pure functions on arrays, whatever the action is: a token [batch, position], a
denoising step [transition], a motor command [time, env].
"""

from tmdjax.rl.advantages import (
    best_and_worst,
    group_advantages,
    group_statistics,
    reward_advantages,
)
from tmdjax.rl.aggregation import MODES as AGGREGATIONS
from tmdjax.rl.aggregation import aggregate, aggregation_weights, denominators
from tmdjax.rl.curation import is_informative, overlong_penalty
from tmdjax.rl.diagnostics import (
    RatioError,
    beyond_clip,
    check_first_ratio,
    ratio_error,
)
from tmdjax.rl.gaussian import (
    at_bounds,
    check_std,
    gaussian_entropy,
    gaussian_kl,
    shifted_log_ratio,
)
from tmdjax.rl.importance_weights import (
    rejecting_weights,
    sequence_weights,
    truncated_weights,
)
from tmdjax.rl.kl import kl_estimate
from tmdjax.rl.records import Transitions, concatenate
from tmdjax.rl.returns import generalised_advantages, standardise
from tmdjax.rl.running_statistics import RunningStatistics, update_statistics
from tmdjax.rl.surrogates import (
    ClipRange,
    check_clip_range,
    clipped_policy_gradient,
    clipped_surrogate,
    sequence_log_ratio,
    sigmoid_surrogate,
)
from tmdjax.rl.token_records import (
    DoesNotFitError,
    TokenBatch,
    TokenRecord,
    batch_records,
    pack_records,
    unpack_records,
)
from tmdjax.rl.trees import (
    FUSIONS,
    STD_SCOPES,
    TREE_BASELINES,
    Tree,
    depth_advantages,
    fuse_rewards,
    make_tree,
)

__all__ = [
    "AGGREGATIONS",
    "FUSIONS",
    "STD_SCOPES",
    "TREE_BASELINES",
    "ClipRange",
    "DoesNotFitError",
    "RatioError",
    "RunningStatistics",
    "TokenBatch",
    "TokenRecord",
    "Transitions",
    "Tree",
    "aggregate",
    "aggregation_weights",
    "at_bounds",
    "batch_records",
    "best_and_worst",
    "beyond_clip",
    "check_clip_range",
    "check_first_ratio",
    "check_std",
    "clipped_policy_gradient",
    "clipped_surrogate",
    "concatenate",
    "denominators",
    "depth_advantages",
    "fuse_rewards",
    "gaussian_entropy",
    "gaussian_kl",
    "generalised_advantages",
    "group_advantages",
    "group_statistics",
    "is_informative",
    "kl_estimate",
    "make_tree",
    "overlong_penalty",
    "pack_records",
    "ratio_error",
    "rejecting_weights",
    "reward_advantages",
    "sequence_log_ratio",
    "sequence_weights",
    "shifted_log_ratio",
    "sigmoid_surrogate",
    "standardise",
    "truncated_weights",
    "unpack_records",
    "update_statistics",
]
