"""A step applied many times: one scan for training and for long evaluations.

A rollout that leaves the finite numbers is found where it does, for each row of the
batch: what follows is NaN, so that no average takes it in without a word.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from tmdjax.core.checks import check_count, check_range
from tmdjax.core.types import Array, Bool, Float, PyTree

Step = Callable[[Any, Any], tuple[Any, Any]]
"""``step(state, inputs) -> (state, output)``, output leaves [batch, ...]."""


@struct.dataclass
class Unrolled:
    """What a step made of a state when it was applied ``length`` times.

    Attributes:
        outputs: tree of [length, batch, ...]; floats are NaN from a row's first bad
            step on.
        state: after the last step, of failed rows too.
        first_bad: int32 [batch], the first step (from 0) whose output was not finite or
            beyond the bound; ``length`` where none was.
        amplitude: float32 [batch], the largest absolute output of that step (of the
            last step where none was bad).

    Under ``vmap`` each has the mapped axis before its own.
    """

    outputs: PyTree
    state: PyTree
    first_bad: Any
    amplitude: Any
    length: int = struct.field(pytree_node=False)

    @property
    def valid(self) -> Bool[Array, "*vmapped length batch"]:
        """Steps before a row's first bad one."""
        steps = jnp.arange(self.length) < self.first_bad[..., None]
        return jnp.swapaxes(steps, -1, -2)

    @property
    def failed(self) -> Bool[Array, "*vmapped batch"]:
        """Rows with a bad step."""
        return self.first_bad < self.length


def unroll(
    step: Step,
    state: PyTree,
    length: int,
    inputs: PyTree = None,
    *,
    bound: float | None = None,
    remat_steps: int | None = None,
    loop: bool = True,
) -> Unrolled:
    """Applies a step again and again, and says for each row where it broke.

    Memory is that of one step and of the outputs; the backward pass adds what it needs
    of every step, or with ``remat_steps`` of so many steps and one state a chunk.

    Args:
        step: ``(state, inputs) -> (state, output)``, pure; the output is one array or
            a tree of [batch, ...].
        state: any tree, before the first step.
        length: steps, at least 1.
        inputs: tree of [length, ...], of which every step is given its own; None gives
            None. ``jnp.arange(length)`` counts the steps, to fold keys by.
        bound: an output of a larger absolute value is bad as well, > 0; None allows
            every finite one.
        remat_steps: steps in a chunk that the backward pass computes again, at least
            1; the square root of length takes the least memory. None keeps all.
        loop: False writes the steps out one after the other. XLA's CPU backend runs
            gradients of convolutions in a loop 50 to 130 times slower.

    Returns:
        Outputs, final state, and the first bad step of each row.

    Raises:
        TypeError: a length or chunk that is no integer, or no output of floats.
        ValueError: a number out of range, inputs of another length, or outputs of
            different batch.
    """
    length = check_count("length", length)
    if remat_steps is not None:
        remat_steps = min(check_count("remat_steps", remat_steps), length)
    if bound is not None:
        check_range("bound", bound, 0, open_low=True)
    for leaf in jax.tree.leaves(inputs):
        if jnp.shape(leaf)[:1] != (length,):
            raise ValueError(
                f"inputs have a leaf of shape {jnp.shape(leaf)}; the leading axis is "
                f"that of the steps, length={length}."
            )

    def judged(state, inputs):
        state, output = step(state, inputs)
        _check_batch(output)
        return state, (output, largest(output))

    def run(state, inputs, steps):
        unrolled = 1 if loop else steps
        return lax.scan(judged, state, inputs, steps, unroll=unrolled)

    if remat_steps is None:
        state, (outputs, amplitude) = run(state, inputs, length)
    else:
        state, (outputs, amplitude) = _in_chunks(
            run, state, inputs, length, remat_steps, loop
        )
    good = jnp.isfinite(amplitude)
    if bound is not None:
        good &= amplitude <= bound
    first_bad = jnp.argmin(good, 0).astype(jnp.int32)
    first_bad = jnp.where(good.all(0), length, first_bad)
    told = jnp.minimum(first_bad, length - 1)
    valid = jnp.arange(length)[:, None] < first_bad

    def masked(leaf: Array) -> Array:
        if not _is_float(leaf):
            return leaf
        rows = valid.reshape(valid.shape + (1,) * (leaf.ndim - 2))
        return jnp.where(rows, leaf, jnp.nan)

    return Unrolled(
        outputs=jax.tree.map(masked, outputs),
        state=state,
        first_bad=first_bad,
        amplitude=jnp.take_along_axis(amplitude, told[None], 0)[0],
        length=length,
    )


def largest(tree: PyTree) -> Float[Array, "batch"]:
    """Largest absolute value of each row over all leaves of floats, without gradient.

    Args:
        tree: leaves of floats [batch, ...], at least one; others may have any shape.

    Returns:
        float32 [batch]; NaN for a row that has one.

    Raises:
        TypeError: no leaf of floats.
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if _is_float(leaf)]
    if not leaves:
        raise TypeError(
            "a step's output or state has no array of floats, so nothing tells a "
            "rollout that broke; let it have one that can be judged, [batch, ...]."
        )
    rows = [jnp.abs(leaf).reshape(len(leaf), -1).max(-1) for leaf in leaves]
    worst = jnp.max(jnp.stack(rows).astype(jnp.float32), 0)
    return lax.stop_gradient(worst)


def _in_chunks(run, state, inputs, length, size, loop):
    """Chunks of ``size`` steps, each kept as its first state alone; a rest after."""
    chunks, rest = divmod(length, size)
    split = chunks * size
    first = jax.tree.map(
        lambda leaf: leaf[:split].reshape(chunks, size, *jnp.shape(leaf)[1:]), inputs
    )

    def whole(state, inputs):
        return run(state, inputs, size)

    # inside a loop nothing could be shared with the forward pass anyway
    chunk = jax.checkpoint(whole, prevent_cse=not loop)
    state, ys = lax.scan(chunk, state, first, chunks, unroll=1 if loop else chunks)
    ys = jax.tree.map(lambda leaf: leaf.reshape(split, *leaf.shape[2:]), ys)
    if rest:
        last = jax.tree.map(lambda leaf: leaf[split:], inputs)
        remainder = jax.checkpoint(lambda state, inputs: run(state, inputs, rest))
        state, more = remainder(state, last)
        ys = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ys, more)
    return state, ys


def _check_batch(output: PyTree) -> None:
    """Raises ValueError unless the leading axis of every leaf is the same batch."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(output)]
    if any(not shape or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(
            f"the step's output has leaves of shapes {shapes}; each has the batch as "
            f"its leading axis."
        )


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
