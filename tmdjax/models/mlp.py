"""Velocity network for vectors."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from tmdjax.core.conventions import expand_time
from tmdjax.core.types import Array, Float
from tmdjax.models.layers import (
    ClassEmbedding,
    Dense,
    TimeEmbedding,
    check_attributes,
    check_unconditional,
)


class VelocityMLP(nn.Module):
    """Residual MLP ``(x, t, cond) -> velocity`` for vectors [batch, dim].

    Time and class are added to the first hidden layer.

    Attributes:
        hidden: width.
        depth: residual hidden layers.
        num_classes: classes, the null class (index ``num_classes``) not counted;
            None for an unconditional network.
        recipe: GEMM recipe of every dense layer; of an 8-bit one, the hidden layers are
            quantised, and the time's, the first and the last are not
            (:attr:`tmdjax.quant.Recipe.unquantised`).
        time_scale: what t in [0, 1] is multiplied by before its sinusoids.
    """

    hidden: int = 128
    depth: int = 3
    num_classes: int | None = None
    recipe: Any = "fp32"
    time_scale: float = 1000.0

    def __post_init__(self):
        check_attributes(self, "hidden", "depth", "num_classes")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch dim"], t: Any, cond: Any = None
    ) -> Float[Array, "batch dim"]:
        """Velocity of x at time t.

        Args:
            x: vectors [batch, dim].
            t: [batch] (or a scalar) in [0, 1]; 1 is noise, 0 is data.
            cond: int [batch] classes; None is the null class, and the only choice
                of an unconditional network.

        Returns:
            float32 [batch, dim].

        Raises:
            ValueError: x is not [batch, dim]; a (concrete) time outside [0, 1]; a
                condition of the wrong shape or range, or given to an unconditional
                network.
            TypeError: classes that are not integers.
        """
        if x.ndim != 2:
            raise ValueError(f"x has shape {x.shape}; give vectors [batch, dim].")
        batch, dim = x.shape
        embedding = TimeEmbedding(
            self.hidden, time_scale=self.time_scale, recipe=self.recipe, name="time"
        )(expand_time(t, batch))
        if self.num_classes is None:
            check_unconditional(cond)
        else:
            classes = ClassEmbedding(self.num_classes, self.hidden, name="class")
            embedding = embedding + classes(cond, batch).astype(embedding.dtype)
        wide = self.recipe.unquantised
        h = Dense(self.hidden, wide, name="in")(x) + embedding
        for layer in range(self.depth):
            h = h + Dense(self.hidden, self.recipe, name=f"hidden_{layer}")(nn.silu(h))
        return Dense(dim, wide, name="out")(nn.silu(h)).astype(jnp.float32)
