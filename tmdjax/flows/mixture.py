"""A Gaussian mixture as data: density, score and velocity in closed form.

The one data set whose flow is known exactly; solvers, samplers and losses are
checked against it, and smoke runs use it as a pretrained model that needs no
training.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tmdjax.core.types import Array, Cond, Data, Key, PerExample, Time


@struct.dataclass
class GaussianMixture:
    """sum_j weights_j N(means_j, diag(stds_j^2)) over vectors.

    Attributes:
        weights: [component], positive, summing to 1.
        means: [component, dim].
        stds: [component, dim], or [component, 1] for round components, positive.
    """

    weights: Any
    means: Any
    stds: Any

    def sample(self, key: Key[Array, ""], count: int) -> Data:
        """Draws [count, dim] points."""
        pick, noise = jax.random.split(key)
        component = jax.random.choice(
            pick, len(self.stds), (count,), p=jnp.asarray(self.weights)
        )
        means, stds = jnp.asarray(self.means), jnp.asarray(self.stds)
        z = jax.random.normal(noise, (count, means.shape[1]), means.dtype)
        return means[component] + stds[component] * z

    def _posterior(self, x: Data, t: Time) -> tuple[Array, Array, Array, Array]:
        """Log joint [batch, component]; the others broadcast to [.., .., dim]."""
        dtype = x.dtype
        means, stds = jnp.asarray(self.means, dtype), jnp.asarray(self.stds, dtype)
        t = t.astype(dtype)[:, None, None]
        variance = (1 - t) ** 2 * stds**2 + t**2
        centred = x[:, None, :] - (1 - t) * means
        log_normaliser = jnp.broadcast_to(
            jnp.log(2 * np.pi * variance), centred.shape
        ).sum(-1)
        log_joint = (
            jnp.log(jnp.asarray(self.weights, dtype))
            - 0.5 * jnp.sum(centred**2 / variance, -1)
            - 0.5 * log_normaliser
        )
        return log_joint, centred, variance, t

    def log_density(self, x: Data, t: Time) -> PerExample:
        """Log p_t(x), [batch] in nats."""
        return jax.nn.logsumexp(self._posterior(x, t)[0], axis=-1)

    def velocity(self, x: Data, t: Time, cond: Cond = None) -> Data:
        """E[x_noise - x_data | x_t = x]; cond is ignored.

        Args:
            x: [batch, dim], float32 or float64 (the result follows it).
            t: [batch] in [0, 1].
            cond: unused.

        Returns:
            [batch, dim].
        """
        del cond
        log_joint, centred, variance, t = self._posterior(x, t)
        means = jnp.asarray(self.means, x.dtype)
        stds = jnp.asarray(self.stds, x.dtype)
        gain = (t - (1 - t) * stds**2) / variance
        by_component = gain * centred - means
        weights = jax.nn.softmax(log_joint, axis=-1)
        return jnp.sum(weights[..., None] * by_component, axis=1)


def gaussian_mixture(weights: Any, means: Any, stds: Any) -> GaussianMixture:
    """Checks and builds a :class:`GaussianMixture`.

    Args:
        weights: [component].
        means: [component, dim].
        stds: [component] for round components, or [component, dim].

    Raises:
        ValueError: lengths that differ, weights that do not sum to 1, stds <= 0.
    """
    weights, means, stds = (np.asarray(a, np.float64) for a in (weights, means, stds))
    if (
        means.ndim != 2
        or weights.shape != means.shape[:1]
        or stds.shape not in (means.shape[:1], means.shape)
    ):
        raise ValueError(
            f"means must be [component, dim], weights [component] and stds [component] "
            f"or [component, dim]; got {means.shape}, {weights.shape} and {stds.shape}."
        )
    stds = stds.reshape(len(means), -1)
    if (stds <= 0).any() or (weights <= 0).any():
        raise ValueError(f"weights {weights} and stds {stds} must be positive.")
    if not np.isclose(weights.sum(), 1):
        raise ValueError(f"weights sum to {weights.sum()}; divide them by it.")
    return GaussianMixture(weights=weights, means=means, stds=stds)
