"""Runs a stack of equal blocks, whose parameters lie along a leading layer axis."""

import abc
import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from tmdjax.core.mesh import cut_by_batch
from tmdjax.core.types import Array, Float

Block = Callable[[Any, Any], Any]
"""``block(params, h) -> h``, one layer's parameters and the hidden state."""


def run_stack(
    block: Block,
    stack: Any,
    h: Array,
    *,
    depth: int,
    start: int = 0,
    stop: int | None = None,
    taps: Sequence[int] = (),
    skip: Sequence[int] = (),
    remat: bool = True,
) -> tuple[Array, dict[int, Array]]:
    """Runs the blocks ``start .. stop - 1``.

    One ``lax.scan`` a run of layers; the scan is cut at taps and skips. With remat
    no run copies the stacked weights. On a mesh each device keeps its rows of the
    batch, see :func:`tmdjax.core.mesh.cut_by_batch`.

    Args:
        block: ``block(params, h) -> h``.
        stack: parameters, every leaf [depth, ...].
        h: hidden state.
        depth: number of layers in the stack.
        start: first layer, static.
        stop: one past the last layer, static; None means ``depth``.
        taps: layers whose output is returned, static.
        skip: layers left out (the identity stands for them), static.
        remat: recompute each block in the backward pass.

    Returns:
        h after the last layer, and ``{layer: output of that layer}`` for taps.

    Raises:
        ValueError: an index out of range, or a layer both tapped and skipped.
        TypeError: an index that is not a static integer.
    """
    stop = depth if stop is None else stop
    taps = [operator.index(layer) for layer in taps]
    skip = [operator.index(layer) for layer in skip]
    if not 0 <= operator.index(start) <= operator.index(stop) <= depth:
        raise ValueError(
            f"start={start}, stop={stop} must satisfy 0 <= start <= stop <= "
            f"depth={depth}; negative indices are not read."
        )
    for name, layers in (("taps", taps), ("skip", skip)):
        outside = [i for i in layers if not start <= i < stop]
        if outside:
            raise ValueError(
                f"{name} holds {outside}, outside the layers {start}..{stop - 1} "
                f"that run."
            )
    if set(taps) & set(skip):
        raise ValueError(
            f"layers {sorted(set(taps) & set(skip))} are both tapped and skipped; "
            f"tap the layer before them."
        )
    tapped = {}
    position = start
    for end in sorted({*(i + 1 for i in taps), *skip, stop}):
        h = _scan(block, stack, h, depth, position, end, remat)
        if end - 1 in taps:
            tapped[end - 1] = h
        position = end + (end in skip)
    return h, tapped


@dataclasses.dataclass(frozen=True)
class Stacked:
    """Equal blocks of linen, ``block(h, c) -> h``, as one stack.

    Attributes:
        block: one of them, without a parent.
        depth: how many.
        remat: recompute each in the backward pass.
    """

    block: nn.Module
    depth: int
    remat: bool = True

    def init(self, key: Array, h: Any, c: Any) -> Any:
        """One block's parameters, drawn ``depth`` times: leaves [depth, ...]."""
        keys = jax.random.split(key, self.depth)
        return jax.vmap(lambda k: self.block.init(k, h, c)["params"])(keys)

    def run(
        self, params: Any, h: Array, c: Any, **which: Any
    ) -> tuple[Array, dict[int, Array]]:
        """:func:`run_stack` under the condition c.

        Args:
            params: from :meth:`init`.
            h: hidden state.
            c: what every block is given beside it.
            **which: start, stop, taps and skip.
        """
        return run_stack(
            lambda layer, h: self.block.apply({"params": layer}, h, c),
            params,
            h,
            depth=self.depth,
            remat=self.remat,
            **which,
        )


class StackedNetwork(nn.Module):
    """A network whose ``stack`` holds the parameters of its ``_blocks()``."""

    def blocks(
        self,
        h: Float[Array, "batch position hidden"],
        c: Mapping[str, Any],
        start: int = 0,
        stop: int | None = None,
        taps: Sequence[int] = (),
        skip: Sequence[int] = (),
    ) -> tuple[Array, dict[int, Array]]:
        """Runs the blocks ``start .. stop - 1``.

        One ``lax.scan`` a run of layers; the scan is cut at taps and skips. With remat
        no run copies the stacked weights.

        Args:
            h: hidden state [batch, position, width] from the network's ``embed``.
            c: condition from the network's ``embed``.
            start: first layer, static.
            stop: one past the last layer, static; None means ``depth``.
            taps: layers whose output is returned, static.
            skip: layers left out (the identity stands for them), static.

        Returns:
            h after the last layer, and ``{layer: output of that layer}`` for taps.

        Raises:
            ValueError: an index out of range, or a layer both tapped and skipped.
            TypeError: an index that is not a static integer.
        """
        return self._blocks().run(
            self.stack, h, c, start=start, stop=stop, taps=taps, skip=skip
        )

    @abc.abstractmethod
    def _blocks(self) -> Stacked:
        """The blocks, whose parameters ``stack`` holds."""

    def output_channels(self, patch_volume: int) -> int:
        """Channels of the velocity: ``out_channels``, or as many as the input has."""
        if self.out_channels is not None:
            return self.out_channels
        kernel = self.variables["params"]["patch_embedding"]["kernel"]
        return kernel.shape[0] // patch_volume


def layer_of(stack: Any, layer: Any) -> Any:
    """The parameters of one layer, whose index may be traced."""
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), stack
    )


def _scan(
    block: Block, stack: Any, h: Array, depth: int, start: int, stop: int, remat: bool
) -> Array:
    if start >= stop:
        return h
    whole = (start, stop) == (0, depth)

    # A slice of the stack would copy its weights, so a part of it is scanned by
    # index. The whole is scanned directly: without remat, a layer taken by index
    # is kept for the backward pass, one more copy of the weights.
    def body(carry: Any, layer: Any) -> tuple[Any, None]:
        params = layer if whole else layer_of(stack, layer)
        return block(params, cut_by_batch(carry)), None

    if remat:
        # Inside a scan the compiler cannot merge the recomputation away.
        body = jax.checkpoint(body, prevent_cse=False)
    return jax.lax.scan(body, h, stack if whole else jnp.arange(start, stop))[0]
