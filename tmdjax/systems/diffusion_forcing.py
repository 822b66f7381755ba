"""Diffusion forcing: videos whose frames are noised each to a level of its own.

The rival of :mod:`tmdjax.systems.flow_equivariant`; its model,
:class:`tmdjax.models.ForcingDiT`, is rolled out by :mod:`tmdjax.train.world_models`
too.

References:
    Chen et al., "Diffusion Forcing", arXiv 2407.01392; Song et al., "History-Guided
    Video Diffusion", arXiv 2502.06764.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tmdjax import flows
from tmdjax.core import prng
from tmdjax.core.checks import check_count
from tmdjax.core.types import ApplyFn, Array, Params, PerExample
from tmdjax.train.world_models import check_videos


def loss(
    params: Params,
    apply_fn: ApplyFn,
    batch: Mapping[str, Array],
    keys: Any,
    *,
    frames: int,
) -> tuple[PerExample, dict[str, Array]]:
    """Flow matching of a random part of each video, with a uniform time for each frame.

    Args:
        params: of the network.
        apply_fn: ``(params, x, t, actions) -> velocity``, of a
            :class:`tmdjax.models.ForcingDiT`.
        batch: 'frames' [batch, frame, height, width, channel] in [0, 1], and 'actions'
            [batch, frame, ...] that led to them.
        keys: [batch].
        frames: of a part, at least 2; those of the network's window.

    Returns:
        Loss [batch], the mean over everything but the batch; no metrics.

    Raises:
        ValueError: videos that are shorter than a part, or not an action for every
            frame.
    """
    videos, actions = batch["frames"], batch["actions"]
    check_count("frames", frames, 2)
    if videos.shape[1] < frames:
        raise ValueError(
            f"videos of {videos.shape[1]} frames have no part of frames={frames}; give "
            f"longer ones."
        )
    check_videos(videos, actions)
    keys = prng.split(keys, 3)

    def part(key: Any, video: Array, done: Array) -> tuple[Array, Array]:
        first = jax.random.randint(key, (), 0, videos.shape[1] - frames + 1)
        cut = jax.lax.dynamic_slice_in_dim
        return cut(video, first, frames), cut(done, first, frames)

    x_data, actions = jax.vmap(part)(keys[:, 0], videos, actions)
    x_data = 2 * x_data - 1
    t = jax.vmap(lambda key: jax.random.uniform(key, (frames,)))(keys[:, 1])
    noise = prng.normal(keys[:, 2], x_data.shape[1:], x_data.dtype)
    interpolate = jax.vmap(flows.interpolate, in_axes=(1, 1, 1), out_axes=1)
    v = apply_fn(params, interpolate(x_data, noise, t), t, actions)
    error = jnp.square(v - flows.conditional_velocity(x_data, noise))
    return error.mean((1, 2, 3, 4)), {}
