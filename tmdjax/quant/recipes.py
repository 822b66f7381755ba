"""How matrix products are computed: a recipe, and the pair of them that RL has."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tmdjax.core.checks import check_choice
from tmdjax.core.registry import Registry
from tmdjax.core.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Recipe:
    """How the matrix products of a network are computed.

    Attributes:
        name: what configs and saved models call it; of an entry of :data:`RECIPES`, the
            name it is registered by.
        dtype: of activations between two products; convolutions, attention, embeddings
            and caches of keys and values are computed in it too.
        matmul: ``(x [*batch, in], w [in, out]) -> [*batch, out]`` in ``dtype``, with a
            gradient to x and w. In place of w it also takes ``prepare(w)``, then with
            the same result to the last bit; that form needs no gradient.
        prepare: ``w [*stack, in, out]`` to what products read of it, made once where
            many follow (rollouts between two updates): an array, or a pytree with the
            attribute ``shape`` whose leaves keep the leading axes. What is prepared
            already comes out as it is. Whether a weight is left in more bits may
            hang on its shape and on the device, on nothing else.
        batch_independent: a row of the product depends on that row of x alone, so that
            a token sees the same numbers whatever is computed beside it. One scale for
            a whole tensor of activations breaks this.
        exact: forward passes in another program or batch shape agree to about float32
            rounding (1e-5), so that ratios of training to rollout start at 1. Results
            rounded to 16 bits do not (1e-2 in a log-prob).
        float8: products have operands in 8 bits, see
            :func:`tmdjax.quant.check_precision`.
        in_hardware: of such a recipe, whether a ``jax.Device`` multiplies the 8-bit
            values themselves, and not the numbers they stand for in float32.
        differentiable: products have a gradient. Those that have none are of rollouts
            alone, and say so when they are differentiated.
        head: where products have 8 bits, the recipe of those that keep more, such as
            the head of a language model, whose rounding tells most in log-probs; None
            is this recipe itself. See :attr:`unquantised`.
    """

    name: str
    dtype: Any
    matmul: Callable[[Array, Any], Array]
    prepare: Callable[[Any], Any]
    batch_independent: bool = True
    exact: bool = False
    float8: bool = False
    in_hardware: Callable[[Any], bool] = lambda device: True
    differentiable: bool = True
    head: "Recipe | None" = None

    def __repr__(self) -> str:
        return f"Recipe({self.name!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By its name to another process, which registers it as this one does.

        Gradient rules of products cannot be pickled. A recipe that is not registered
        travels as its fields do.
        """
        if self.name in RECIPES and RECIPES[self.name] is self:
            return as_recipe, (self.name,)
        return super().__reduce_ex__(protocol)

    @property
    def unquantised(self) -> "Recipe":
        """The recipe of layers that stay in more than 8 bits; itself where none does.

        Of a velocity network these are the first and the last layer, those that embed
        conditions (time, classes, text), and modulations: their rounding reaches every
        position, and they are a small part of the work. Keys and values that positions
        attend to, those of text too, are quantised.
        """
        return self.head or self

    @property
    def lax_precision(self) -> jax.lax.Precision | None:
        """Of products and convolutions in ``dtype``: float32 never becomes TF32."""
        return _lax_precision(self.dtype)


RECIPES: Registry[Recipe] = Registry("GEMM recipe")
"""Recipes by the names that configs use; others register here."""


def as_recipe(recipe: str | Recipe) -> Recipe:
    """The recipe of a name; a recipe is returned as it is.

    Raises:
        ValueError: an unknown name; those that are known are listed.
        TypeError: neither a name nor a recipe.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise TypeError(
            f"recipe={recipe!r} is of type {type(recipe).__name__}; give a name, one "
            f"of {', '.join(RECIPES)}, or a quant.Recipe."
        )
    return RECIPES[recipe]


def rounding_recipe(name: str, dtype: Any, result_dtype: Any = None) -> Recipe:
    """Operands rounded to a dtype, products summed in float32, results rounded.

    Args:
        name: of the recipe; it is not registered.
        dtype: float32 (then nothing is TF32), bfloat16 or float16.
        result_dtype: of results, and so of activations; None is ``dtype``. In float32
            nothing is rounded but what products read.

    Raises:
        ValueError: another dtype. Fewer bits need scales, which a plain cast has not:
            see :func:`tmdjax.quant.fp8_recipe`.
    """
    dtype = jnp.dtype(dtype)
    check_choice("dtype", dtype.name, ("float32", "bfloat16", "float16"))
    precision = _lax_precision(dtype)
    result = dtype if result_dtype is None else jnp.dtype(result_dtype)

    def matmul(x: Array, w: Array) -> Array:
        axes = (((x.ndim - 1,), (0,)), ((), ()))
        return jax.lax.dot_general(
            x.astype(dtype),
            w.astype(dtype),
            axes,
            precision=precision,
            preferred_element_type=None if result == dtype else result,
        )

    return Recipe(
        name=name,
        dtype=result,
        matmul=matmul,
        prepare=lambda w: w.astype(dtype),
        exact=dtype.itemsize >= 4,
    )


def _lax_precision(dtype: Any) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


RECIPES.register("fp32")(rounding_recipe("fp32", jnp.float32))
RECIPES.register("bf16")(rounding_recipe("bf16", jnp.bfloat16))
RECIPES.register("bf16_out_fp32")(
    rounding_recipe("bf16_out_fp32", jnp.bfloat16, jnp.float32)
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """The recipes of a model that is both sampled and trained: a precision arm.

    Attributes:
        rollout: of the forward passes that act; the behaviour's log-probs are theirs.
        train: of the forward passes that are differentiated.
        allow_emulation: whether products of 8 bits may be computed in float32 where the
            device has none of its own, see :func:`tmdjax.quant.check_precision`.

    Raises:
        ValueError: an unknown name, with the attribute it was given to; in ``train`` a
            recipe that is not differentiable.
    """

    rollout: Any = "fp32"
    train: Any = "fp32"
    allow_emulation: bool = False

    def __post_init__(self) -> None:
        for side in ("rollout", "train"):
            try:
                found = as_recipe(getattr(self, side))
            except ValueError as error:
                raise ValueError(f"precision.{side}: {error}") from None
            object.__setattr__(self, side, found)
        if not self.train.differentiable:
            raise ValueError(
                f"precision.train={self.train.name!r} has no gradient: it is of "
                f"rollouts alone. Train under another recipe, such as 'bf16'."
            )

    def disagreement(self) -> str:
        """Why log-probs of rollout and training differ, '' where they should not."""
        rollout, train = self.rollout, self.train
        if rollout != train:
            return (
                f"rollouts are computed under precision.rollout={rollout.name!r} and "
                f"updates under precision.train={train.name!r}"
            )
        if train.exact and train.batch_independent:
            return ""
        return (
            f"precision.rollout and precision.train are both {train.name!r}, which "
            f"rounds differently in another batch"
        )
