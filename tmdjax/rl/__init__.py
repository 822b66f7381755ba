"""Reinforcement learning rules: advantages, surrogates, weights, KL estimators."""

from tmdjax.rl.advantages import (
    best_and_worst,
    group_advantages,
    group_statistics,
    reward_advantages,
)
from tmdjax.rl.diagnostics import RatioError, check_first_ratio
from tmdjax.rl.surrogates import check_clip_range, clipped_surrogate

__all__ = [
    "RatioError",
    "best_and_worst",
    "check_clip_range",
    "check_first_ratio",
    "clipped_surrogate",
    "group_advantages",
    "group_statistics",
    "reward_advantages",
]
