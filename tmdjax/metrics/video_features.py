"""Features of videos from a frozen random convolutional network.

No weights to fetch: the network is a function of its seed. Random convolutions see
colours, edges and motion at several scales; distances in them order generators of
simple videos, but do not compare with those of trained networks.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import check_count, check_finite
from tmdjax.core.types import Array, ArrayLike, Float, Params

WIDTHS = (16, 32, 64)
"""Channels of the layers."""

STRIDES = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
"""Strides of the layers along frame, height and width."""

_KERNEL = 3
_SLOPE = 0.2


def random_conv3d(seed: int = 0, channels: int = 3) -> Params:
    """Parameters of the network: convolutions of 3 x 3 x 3, normal weights.

    Variances are 2 / fan-in, biases uniform in [-0.5, 0.5]: features of one channel
    then bend at different places.

    Args:
        seed: of the weights, which are the same on every machine.
        channels: of the videos.

    Returns:
        'kernel' [3, 3, 3, in, out] and 'bias' [out], float32, by layer.
    """
    rng = np.random.default_rng(seed)
    params, width_in = {}, check_count("channels", channels)
    for i, width in enumerate(WIDTHS):
        shape = (_KERNEL, _KERNEL, _KERNEL, width_in, width)
        std = np.sqrt(2 / np.prod(shape[:-1]))
        params[f"layer_{i}"] = {
            "kernel": (std * rng.standard_normal(shape)).astype(np.float32),
            "bias": rng.uniform(-0.5, 0.5, width).astype(np.float32),
        }
        width_in = width
    return params


def conv3d_layers(
    params: Params, videos: Float[Array, "batch frame height width channel"]
) -> tuple[Float[Array, "batch _frame _height _width _channel"], ...]:
    """Outputs of every layer, after a leaky rectifier of slope 0.2. Differentiable.

    Args:
        params: from :func:`random_conv3d`.
        videos: [batch, frame, height, width, channel], padded with zeros at the edges.

    Returns:
        One array a layer, smaller by its stride (rounded up) along each axis.

    Raises:
        ValueError: videos of other axes, or of other channels than the network's.
    """
    channels = params["layer_0"]["kernel"].shape[3]
    if jnp.ndim(videos) != 5 or videos.shape[-1] != channels:
        raise ValueError(
            f"videos have shape {jnp.shape(videos)}; give [batch, frame, height, "
            f"width, {channels}]."
        )
    outputs, x = [], videos
    for i, stride in enumerate(STRIDES):
        layer = params[f"layer_{i}"]
        x = jax.lax.conv_general_dilated(
            x,
            jnp.asarray(layer["kernel"], x.dtype),
            stride,
            "SAME",
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        x = jax.nn.leaky_relu(x + layer["bias"], _SLOPE)
        outputs.append(x)
    return tuple(outputs)


def video_features(
    videos: Float[ArrayLike, "n frame height width channel"],
    params: Params | None = None,
    *,
    batch_size: int = 256,
) -> Float[np.ndarray, "n feature"]:
    """Mean over places and frames of every channel of every layer.

    Args:
        videos: [n, frame, height, width, channel] in [-1, 1].
        params: of the network; by default ``random_conv3d(0)`` for the videos'
            channels.
        batch_size: videos at a time; one program is compiled for it, and a last,
            smaller batch is filled up with zeros.

    Returns:
        float32 [n, 112] on the host, for ``frechet_distance`` and
        ``sliced_wasserstein``.

    Raises:
        ValueError: videos of other axes or channels, none, or a value that is not
            finite.
    """
    videos = np.asarray(videos, np.float32)
    if videos.ndim != 5 or not videos.size:
        raise ValueError(
            f"videos have shape {videos.shape}; give [n, frame, height, width, "
            f"channel] with n >= 1."
        )
    check_finite(videos, "videos")
    check_count("batch_size", batch_size)
    params = random_conv3d(channels=videos.shape[-1]) if params is None else params
    size = min(batch_size, len(videos))
    parts = []
    for start in range(0, len(videos), size):
        part = videos[start : start + size]
        filled = np.zeros((size, *videos.shape[1:]), np.float32)
        filled[: len(part)] = part
        parts.append(np.asarray(_pooled(params, filled))[: len(part)])
    return np.concatenate(parts)


@jax.jit
def _pooled(params: Any, videos: Any) -> Any:
    means = [x.mean((1, 2, 3)) for x in conv3d_layers(params, videos)]
    return jnp.concatenate(means, axis=1)
