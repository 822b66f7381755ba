"""Training of recurrent state-space models: reconstruction, and two divergences.

The rival of :mod:`tmdjax.systems.flow_equivariant` that remembers in a vector; its
model, :class:`tmdjax.models.RSSM`, is rolled out by :mod:`tmdjax.train.world_models`
too.

References:
    Hafner et al., "Learning Latent Dynamics for Planning from Pixels", arXiv
    1811.04551; "Mastering Diverse Domains through World Models", arXiv 2301.04104.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tmdjax.core.checks import check_range
from tmdjax.core.types import ApplyFn, Array, Params, PerExample, SampleKeys
from tmdjax.train.world_models import check_videos


def loss(
    params: Params,
    apply_fn: ApplyFn,
    batch: Mapping[str, Array],
    keys: SampleKeys,
    *,
    free_nats: float = 1.0,
    dynamics_weight: float = 0.5,
    representation_weight: float = 0.1,
) -> tuple[PerExample, dict[str, Array]]:
    """Squared error of decoded frames, and how far prior and posterior are apart.

    L = |frame - decoded|^2 + dynamics_weight max(free_nats, KL(sg(q) | p))
    + representation_weight max(free_nats, KL(q | sg(p))), the mean over frames; p is
    the prior of a latent, q its posterior, and sg stops the gradient: the prior is
    drawn to the posterior faster than the posterior to what can be predicted.

    Args:
        params: of the network.
        apply_fn: ``(params, *inputs, method=name)``, of a :class:`tmdjax.models.RSSM`.
        batch: 'frames' [batch, frame, height, width, channel] in [0, 1], and 'actions'
            [batch, frame, ...] that led to them, the first of them not used.
        keys: [batch], of the latents that are drawn.
        free_nats: divergences below it have no gradient, >= 0.
        dynamics_weight: >= 0.
        representation_weight: >= 0.

    Returns:
        Loss [batch]; the error is summed over the pixels and channels of a frame, a
        divergence over groups. Metrics [batch]: 'error', the mean squared error of a
        pixel, and 'kl', KL(q | p) in nats a frame.

    Raises:
        ValueError: a number out of range, or not an action for every frame.
    """
    check_range("free_nats", free_nats, 0)
    check_range("dynamics_weight", dynamics_weight, 0)
    check_range("representation_weight", representation_weight, 0)
    check_videos(batch["frames"], batch["actions"])
    actions = apply_fn(params, batch["actions"], method="prepare")
    state = apply_fn(params, batch["frames"][:, 0], keys, method="start")
    seen = apply_fn(params, batch["frames"], method="encode")

    def step(state: Any, given: Any) -> tuple[Any, dict[str, Array]]:
        return apply_fn(params, state, *given, method="infer")

    given = jax.tree.map(lambda array: jnp.swapaxes(array, 0, 1), (seen, actions))
    _, found = jax.lax.scan(step, state, given)
    decoded = apply_fn(params, found["features"], method="decode")
    error = jnp.square(decoded - jnp.swapaxes(batch["frames"], 0, 1))

    prior, posterior = found["prior"], found["posterior"]
    fixed = jax.lax.stop_gradient((prior, posterior))
    dynamics = _divergence(fixed[1], prior)
    representation = _divergence(posterior, fixed[0])
    total = (
        error.sum((2, 3, 4))
        + dynamics_weight * jnp.maximum(dynamics, free_nats)
        + representation_weight * jnp.maximum(representation, free_nats)
    )
    return total.mean(0), {"error": error.mean((0, 2, 3, 4)), "kl": dynamics.mean(0)}


def _divergence(log_p: Array, log_q: Array) -> Array:
    """KL(p | q) of independent groups, [..., group, class] to [...], in nats."""
    return (jnp.exp(log_p) * (log_p - log_q)).sum((-2, -1))
