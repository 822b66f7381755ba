"""Small convolutional classifier, and the features that distances are taken in."""

import math
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from tmdjax.core.types import Array, Float
from tmdjax.models.convolution import Convolution
from tmdjax.models.layers import Dense, check_attributes


class Classifier(nn.Module):
    """Convolutions with group norm, global mean, two dense layers.

    Three convolutions; the second and third halve the sides. Convolutions and
    norms run in full float32 (no TF32): features are what distances are named by,
    so they must not depend on the device.

    Attributes:
        num_classes: number of logits.
        width: channels of the first convolution; then twice and four times as many.
        feature_dim: width of the penultimate layer.
        recipe: GEMM recipe of the dense layers.
    """

    num_classes: int
    width: int = 32
    feature_dim: int = 128
    recipe: Any = "fp32"

    def __post_init__(self):
        check_attributes(self, "num_classes", "width", "feature_dim")
        super().__post_init__()

    def setup(self):
        """Declares the layers."""
        widths = [self.width, 2 * self.width, 4 * self.width]
        self.convolutions = [
            Convolution(width, (3, 3), strides=1 if i == 0 else 2, padding="SAME")
            for i, width in enumerate(widths)
        ]
        self.norms = [nn.GroupNorm(math.gcd(8, width)) for width in widths]
        self.projection = Dense(self.feature_dim, self.recipe)
        self.head = Dense(self.num_classes, self.recipe)

    def __call__(
        self, x: Float[Array, "batch height width channel"]
    ) -> Float[Array, "batch classes"]:
        """Logits float32 [batch, num_classes] of images; see :meth:`features`."""
        return self.head(nn.silu(self.features(x))).astype(jnp.float32)

    def features(
        self, x: Float[Array, "batch height width channel"]
    ) -> Float[Array, "batch features"]:
        """Penultimate features, before their nonlinearity.

        Args:
            x: images [batch, height, width, channel], sides of at least 8.

        Returns:
            float32 [batch, feature_dim].

        Raises:
            ValueError: x is no batch of images or a side is under 8.
        """
        if x.ndim != 4 or min(x.shape[1:3]) < 8:
            raise ValueError(
                f"x has shape {x.shape}; give images [batch, height, width, channel] "
                f"of at least 8 x 8."
            )
        h = x.astype(jnp.float32)
        for convolution, norm in zip(self.convolutions, self.norms):
            h = nn.silu(norm(convolution(h)))
        return self.projection(h.mean((1, 2))).astype(jnp.float32)
