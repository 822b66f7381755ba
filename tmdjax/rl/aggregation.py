"""From elementwise losses to one number, under denominators of the global batch.

A batch cut into microbatches, or spread over devices, must not average averages:
compute the denominator once on the whole mask and hand it to every part; the
parts' losses and gradients then add up to the whole.
"""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import check_choice, check_range, check_same_shape
from tmdjax.core.types import Array, Float
from tmdjax.rl.ratios import as_mask, masked

AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)


def aggregate(
    loss: Any,
    mask: Any,
    mode: str,
    *,
    denominator: Any = None,
    length: int | None = None,
    keep: Any = None,
) -> Float[Array, ""]:
    """Reduces a loss [batch, position] to a scalar.

    * 'token-mean': sum over live positions / number of live positions;
    * 'seq-mean-token-sum': sum over live positions / number of live sequences;
    * 'seq-mean-token-mean': mean over each sequence's live positions, then over
      live sequences;
    * 'seq-mean-token-sum-norm': as 'seq-mean-token-sum', divided by the constant
      ``length``, so that long sequences are not favoured by a mean of their own.
      verl, which named the modes, does not divide by the number of sequences here, in
      spite of the name: its loss is as many times larger as there are sequences, and
      its length is by default the padded width of the batch.

    A sequence without a live position is not live.

    Args:
        loss: [batch, position, ...], or [element] for 'token-mean'.
        mask: loss's shape, True or 1 where an element counts.
        mode: one of the above.
        denominator: number of live positions or sequences in the global batch, from
            :func:`denominators`; None if this is the whole batch.
        length: > 0, the largest response length, for 'seq-mean-token-sum-norm'.
        keep: loss's shape or None; False removes an element from the sums but not
            from any count, as rejection must.

    Returns:
        float32 scalar; 0 if nothing is live.

    Raises:
        ValueError: unknown mode, shapes that disagree, a length that is missing or
            has no use, or a concrete denominator that is not positive.

    References:
        Token mean: DAPO, arXiv 2503.14476. Constant length: Dr. GRPO, arXiv
        2503.20783. Mean of means: GRPO, arXiv 2402.03300.
    """
    _check_mode(mode, loss, "loss")
    check_same_shape("mask", mask, "loss", loss)
    if (length is not None) != (mode == "seq-mean-token-sum-norm"):
        raise ValueError(
            f"length={length} with mode={mode!r}: 'seq-mean-token-sum-norm' needs the "
            f"largest response length, the other modes take none."
        )
    if length is not None:
        check_range("length", length, 0, open_low=True)
    if denominator is None:
        denominator = jnp.maximum(denominators(mask, mode), 1)
    elif not isinstance(denominator, jax.core.Tracer):
        check_range("denominator", float(np.asarray(denominator)), 0, open_low=True)
    loss = masked(loss, mask)
    if keep is not None:
        check_same_shape("keep", keep, "loss", loss)
        loss = masked(loss, keep)
    if mode == "seq-mean-token-mean":
        axes = tuple(range(1, loss.ndim))
        count = jnp.sum(as_mask(mask, loss), axis=axes)
        loss = jnp.sum(loss, axis=axes) / jnp.maximum(count, 1)
    total = jnp.sum(loss) / denominator
    return total if length is None else total / length


def denominators(mask: Any, mode: str) -> Float[Array, ""]:
    """What :func:`aggregate` divides by, counted on the mask of the global batch.

    Args:
        mask: [batch, position, ...], or [element] for 'token-mean'. Where devices
            hold parts of it, sum their results.
        mode: one of AGGREGATIONS.

    Returns:
        float32 scalar: live positions for 'token-mean', else live sequences.

    Raises:
        ValueError: unknown mode, or a mask without a position axis.
    """
    _check_mode(mode, mask, "mask")
    live = jnp.asarray(mask) != 0
    if mode != "token-mean":
        live = jnp.any(live, axis=tuple(range(1, live.ndim)))
    return jnp.sum(live, dtype=jnp.float32)


def aggregation_weights(
    mask: Any, mode: str, *, length: int | None = None, keep: Any = None
) -> Array:
    """What each element weighs in :func:`aggregate`: sum(weights * loss) equals it.

    Taken once on the mask of the global batch, they travel with its parts, however
    those are cut, packed or spread: sums over parts add up to the whole.

    Args:
        mask: [batch, position], or [element] for 'token-mean'.
        mode: one of AGGREGATIONS.
        length: > 0, the largest response length, for 'seq-mean-token-sum-norm' alone.
        keep: mask's shape or None; False gives an element the weight 0 but leaves it in
            every count.

    Returns:
        float32 of mask's shape, 0 where masked out or not kept.

    Raises:
        ValueError: unknown mode, shapes that disagree, or a length that is missing or
            has no use.
    """
    ones = jnp.ones(jnp.shape(mask), jnp.float32)
    return jax.grad(lambda loss: aggregate(loss, mask, mode, length=length, keep=keep))(
        ones
    )


def _check_mode(mode: str, array: Any, name: str) -> None:
    check_choice("mode", mode, AGGREGATIONS)
    least = 1 if mode == "token-mean" else 2
    if jnp.ndim(array) < least:
        raise ValueError(
            f"{name} has shape {jnp.shape(array)}; mode={mode!r} needs "
            f"{('[element]', '[batch, position]')[least - 1]}."
        )
