"""Reinforcement learning rules: advantages, surrogates, weights, KL estimators.

Pure functions on arrays, whatever the action is: a token [batch, position], a
denoising step [transition], a motor command [time, env].
"""

from tmdjax.rl.advantages import best_and_worst as best_and_worst
from tmdjax.rl.advantages import group_advantages as group_advantages
from tmdjax.rl.advantages import group_statistics as group_statistics
from tmdjax.rl.advantages import reward_advantages as reward_advantages
from tmdjax.rl.advantages import sharpen as sharpen
from tmdjax.rl.aggregation import AGGREGATIONS as AGGREGATIONS
from tmdjax.rl.aggregation import aggregate as aggregate
from tmdjax.rl.aggregation import aggregation_weights as aggregation_weights
from tmdjax.rl.aggregation import denominators as denominators
from tmdjax.rl.allocation import BONUSES as BONUSES
from tmdjax.rl.allocation import RULES as RULES
from tmdjax.rl.allocation import allocate as allocate
from tmdjax.rl.allocation import half_width as half_width
from tmdjax.rl.allocation import posterior_std as posterior_std
from tmdjax.rl.allocation import priority as priority
from tmdjax.rl.curation import is_informative as is_informative
from tmdjax.rl.curation import overlong_penalty as overlong_penalty
from tmdjax.rl.diagnostics import PROXIMAL as PROXIMAL
from tmdjax.rl.diagnostics import RatioError as RatioError
from tmdjax.rl.diagnostics import beyond_clip as beyond_clip
from tmdjax.rl.diagnostics import check_first_ratio as check_first_ratio
from tmdjax.rl.diagnostics import ratio_error as ratio_error
from tmdjax.rl.gaussian import at_bounds as at_bounds
from tmdjax.rl.gaussian import check_std as check_std
from tmdjax.rl.gaussian import gaussian_entropy as gaussian_entropy
from tmdjax.rl.gaussian import gaussian_kl as gaussian_kl
from tmdjax.rl.gaussian import shifted_log_ratio as shifted_log_ratio
from tmdjax.rl.importance_weights import rejecting_weights as rejecting_weights
from tmdjax.rl.importance_weights import sequence_weights as sequence_weights
from tmdjax.rl.importance_weights import truncated_weights as truncated_weights
from tmdjax.rl.kl import kl_estimate as kl_estimate
from tmdjax.rl.records import Transitions as Transitions
from tmdjax.rl.records import chain_transitions as chain_transitions
from tmdjax.rl.records import concatenate as concatenate
from tmdjax.rl.returns import generalised_advantages as generalised_advantages
from tmdjax.rl.returns import standardise as standardise
from tmdjax.rl.reward_scale import RewardScale as RewardScale
from tmdjax.rl.reward_scale import scale_rewards as scale_rewards
from tmdjax.rl.running_statistics import RunningStatistics as RunningStatistics
from tmdjax.rl.running_statistics import update_statistics as update_statistics
from tmdjax.rl.surrogates import ClipRange as ClipRange
from tmdjax.rl.surrogates import check_clip_range as check_clip_range
from tmdjax.rl.surrogates import clipped_policy_gradient as clipped_policy_gradient
from tmdjax.rl.surrogates import clipped_surrogate as clipped_surrogate
from tmdjax.rl.surrogates import sequence_log_ratio as sequence_log_ratio
from tmdjax.rl.surrogates import sigmoid_surrogate as sigmoid_surrogate
from tmdjax.rl.token_records import DoesNotFitError as DoesNotFitError
from tmdjax.rl.token_records import TokenBatch as TokenBatch
from tmdjax.rl.token_records import TokenRecord as TokenRecord
from tmdjax.rl.token_records import batch_records as batch_records
from tmdjax.rl.token_records import pack_records as pack_records
from tmdjax.rl.token_records import unpack_records as unpack_records
from tmdjax.rl.trees import FUSIONS as FUSIONS
from tmdjax.rl.trees import Tree as Tree
from tmdjax.rl.trees import check_depth_options as check_depth_options
from tmdjax.rl.trees import depth_advantages as depth_advantages
from tmdjax.rl.trees import fuse_rewards as fuse_rewards
from tmdjax.rl.trees import make_tree as make_tree
from tmdjax.rl.trees import shuffle_depths as shuffle_depths
from tmdjax.rl.trees import tree_transitions as tree_transitions
