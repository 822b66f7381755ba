"""Discriminator heads on the features of a frozen video network."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from tmdjax.core.checks import check_count, check_range
from tmdjax.core.types import Array, Float
from tmdjax.models.convolution import Convolution
from tmdjax.models.layers import Dense, check_attributes
from tmdjax.quant import Recipe

_KERNELS = ((3, 4, 4), (3, 4, 4), (3, 3, 3), (3, 3, 3))
_STRIDES = ((1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2))
_SLOPE = 0.2


def default_taps(depth: int) -> tuple[int, ...]:
    """The last layer, and those a quarter and half of the depth before it.

    The published sets, (15, 22, 29) of 30 and (19, 29, 39) of 40. A network of fewer
    than four layers has fewer taps: the first is left out unless it is the last.

    Raises:
        ValueError: depth below 1.
    """
    check_count("depth", depth)
    return tuple(range(depth - 1, 0, -max(1, depth // 4))[:3][::-1]) or (0,)


def smallest_size() -> tuple[int, int, int]:
    """Frames, height and width below which the convolutions leave nothing."""
    size = [1, 1, 1]
    for kernel, stride in zip(reversed(_KERNELS), reversed(_STRIDES)):
        size = [max(1, (n - 1) * s + k - 2) for n, k, s in zip(size, kernel, stride)]
    return size[0], size[1], size[2]


def _groups(features: int) -> int:
    """Groups of a norm: the largest divisor up to 32, or to a quarter of few."""
    most = 32 if features > 32 else max(1, features // 4)
    return next(n for n in range(most, 0, -1) if features % n == 0)


class _Head(nn.Module):
    """Four strided convolutions, the mean over positions, two dense layers."""

    widths: tuple[int, ...]
    recipe: Recipe
    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for index, width in enumerate(self.widths):
            x = Convolution(
                width,
                _KERNELS[index],
                self.recipe,
                _STRIDES[index],
                name=f"convolution_{index}",
            )(x)
            norm = nn.GroupNorm(
                _groups(width), epsilon=self.epsilon, name=f"norm_{index}"
            )
            x = norm(x)
            x = nn.leaky_relu(x, _SLOPE)
        x = jnp.mean(x, (1, 2, 3))
        x = Dense(self.widths[-1], self.recipe, name="hidden")(x)
        x = Dense(1, self.recipe, name="out")(nn.leaky_relu(x, _SLOPE))
        return x[:, 0].astype(jnp.float32)


class VideoDiscriminator(nn.Module):
    """One convolutional head a feature, ``features -> logits``.

    Norms, the mean over positions and the logits are in float32 under every recipe.

    Attributes:
        width: channels of the first convolution; the others have 2, 4 and 4 times as
            many.
        recipe: GEMM recipe of dense layers and convolutions, or its name.
        epsilon: added to the variance by the group norms, > 0; torch's default.

    References:
        Kernels and strides as arXiv 2601.09881, appendix A.3 ('Conv3D'); its widths
        are not stated.
    """

    width: int = 64
    recipe: Any = "fp32"
    epsilon: float = 1e-5

    def __post_init__(self):
        check_attributes(self, "width")
        check_range("epsilon", self.epsilon, 0, open_low=True)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, features: Sequence[Float[Array, "batch frame height width channel"]]
    ) -> Float[Array, "batch head"]:
        """Maps feature videos to one logit each.

        Raises:
            ValueError: no feature, or a video too small for four strided convolutions.
        """
        if not features:
            raise ValueError("the discriminator needs features; tap some layers.")
        widths = tuple(self.width * factor for factor in (1, 2, 4, 4))
        least, logits = smallest_size(), []
        for index, feature in enumerate(features):
            if any(size < low for size, low in zip(feature.shape[1:4], least)):
                raise ValueError(
                    f"features of {feature.shape[1:4]} (frames, height, width) are too "
                    f"small for four strided convolutions; at least {least}."
                )
            head = _Head(widths, self.recipe, self.epsilon, name=f"head_{index}")
            logits.append(head(feature))
        return jnp.stack(logits, -1)
