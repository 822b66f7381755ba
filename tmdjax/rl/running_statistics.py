"""Mean and variance of a stream, batch by batch."""

from typing import Any

import jax.numpy as jnp
from flax import struct

from tmdjax.core.types import Array


@struct.dataclass
class RunningStatistics:
    """Statistics of all values so far.

    Attributes:
        count: how many, float32.
        mean: [*feature] float32.
        variance: [*feature] float32, about the mean, over count.
    """

    count: Any
    mean: Any
    variance: Any

    @classmethod
    def start(cls, shape: tuple[int, ...]) -> "RunningStatistics":
        """Before any value: mean 0, variance 1."""
        return cls(jnp.zeros(()), jnp.zeros(shape), jnp.ones(shape))

    def normalise(self, x: Any, *, eps: float = 1e-6) -> Array:
        """(x - mean) / (std + eps), [..., *feature] float32."""
        return (x - self.mean) / (jnp.sqrt(self.variance) + eps)


def update_statistics(
    statistics: RunningStatistics,
    batch: Any,
    valid: Any = None,
    *,
    forget: bool = False,
) -> RunningStatistics:
    """Adds the rows of a batch; the split into batches does not matter.

    Args:
        statistics: so far.
        batch: [..., *feature], rows in any number of leading axes.
        valid: bool [...], rows to count; None counts all.
        forget: leave the earlier variance out, as the released FPO does: the standard
            deviation then falls like one over the root of the number of batches. Only
            for comparison.

    Returns:
        The statistics of everything seen. A batch without valid rows changes nothing.

    References:
        Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for
        computing sample variances".
    """
    feature = statistics.mean.shape
    rows = jnp.asarray(batch, jnp.float32).reshape(-1, *feature)
    valid = jnp.ones(rows.shape[0], bool) if valid is None else valid.reshape(-1)
    keep = valid.reshape(-1, *(1,) * len(feature))
    count = jnp.sum(valid, dtype=jnp.float32)
    mean = jnp.sum(rows, 0, where=keep) / jnp.maximum(count, 1)
    variance = jnp.sum((rows - mean) ** 2, 0, where=keep) / jnp.maximum(count, 1)
    total = statistics.count + count
    share = count / jnp.maximum(total, 1)
    away = mean - statistics.mean
    before = 0.0 if forget else (1 - share) * statistics.variance
    merged = before + share * variance + share * (1 - share) * away**2
    # the variance of 1 that stands before any value drops out: its share is 0
    return RunningStatistics(
        count=total,
        mean=statistics.mean + share * away,
        variance=jnp.where(count > 0, merged, statistics.variance),
    )
