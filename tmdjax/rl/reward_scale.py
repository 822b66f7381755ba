"""Rewards divided by the spread of the discounted sums that they make."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tmdjax.core.checks import check_same_shape
from tmdjax.core.types import Array
from tmdjax.rl.running_statistics import RunningStatistics, update_statistics


@struct.dataclass
class RewardScale:
    """What is known of the sums of rewards so far.

    Attributes:
        statistics: of all sums, fields of shape [].
        running: float32 [env], the sums of the episodes under way.
    """

    statistics: RunningStatistics
    running: Any

    @classmethod
    def start(cls, count: int) -> "RewardScale":
        """Before any step of ``count`` environments."""
        return cls(RunningStatistics.start(()), jnp.zeros(count))


def scale_rewards(
    scale: RewardScale,
    reward: Any,
    ended: Any,
    valid: Any = None,
    *,
    discount: Any,
    limit: float = 10.0,
) -> tuple[Array, RewardScale]:
    """Rewards over the standard deviation of forward discounted sums, clipped.

        R_t = r_t + discount R_{t-1}, from 0 where an episode begins
        scaled_t = clip(r_t / std of all R so far, these included, +-limit)

    No mean is subtracted. The sums go on from the last call, and the variance is the
    unbiased one, over n - 1.

    Args:
        scale: from the steps before.
        reward: float32 [time, env].
        ended: bool [time, env], whether the episode ended with the step, or was cut.
        valid: bool [time, env], the steps to count; None counts all. A step that is not
            valid must have ended too.
        discount: in [0, 1], may be traced.
        limit: of what is returned.

    Returns:
        Rewards [time, env], and the scale with these steps.

    Raises:
        ValueError: shapes that differ.

    References:
        The scaler of DPPO's code (arXiv 2409.00588), which counts an additional 1e-4
        of a sum of variance 1 before any.
    """
    check_same_shape("ended", ended, "reward", reward)

    def forwards(running: Array, step: Any) -> tuple[Array, Array]:
        reward, ended = step
        total = reward + discount * running
        return jnp.where(ended, 0, total), total

    running, total = jax.lax.scan(forwards, scale.running, (reward, ended))
    statistics = update_statistics(scale.statistics, total, valid)
    count = statistics.count
    variance = statistics.variance * count / jnp.maximum(count - 1, 1)
    variance = jnp.where(count > 1, variance, 1.0)
    scaled = reward / jnp.sqrt(variance + 1e-8)
    return jnp.clip(scaled, -limit, limit), RewardScale(statistics, running)
