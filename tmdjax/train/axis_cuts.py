"""How arrays are cut over a mesh: a few rules that follow a cut through a program.

A *cut* holds, for each axis of an array, the names of the mesh axes that it is divided
over. The rules are those of the compiler's propagation where it has no choice, and one
stated choice where it has: an axis of a mesh divides one axis of an array, activations
(cut over 'data') keep their cut, and weights are gathered.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import NamedSharding

Cut = tuple[tuple[str, ...], ...]
"""Mesh axes of every array axis; ``()`` is not divided."""

Shape = tuple[int, ...]


def uncut(rank: int) -> Cut:
    """One whole copy a device."""
    return ((),) * rank


def from_sharding(sharding: Any, shape: Shape) -> Cut:
    """The cut of a NamedSharding (None: one whole copy a device).

    Raises:
        TypeError: another kind of sharding.
        ValueError: the mesh does not divide the array.
    """
    if sharding is None:
        return uncut(len(shape))
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            f"a sharding of type {type(sharding).__name__} does not name mesh axes; "
            f"give jax.sharding.NamedSharding."
        )
    sharding.shard_shape(shape)
    axes = [
        () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)
        for axis in sharding.spec
    ]
    return tuple(axes) + uncut(len(shape) - len(axes))


def ways(axes: Sequence[str], mesh: Mapping[str, int]) -> int:
    """Over how many devices the named axes of a mesh divide."""
    return math.prod(mesh.get(axis, 1) for axis in axes)


def local_shape(shape: Shape, cut: Cut, mesh: Mapping[str, int]) -> Shape:
    """What one device holds; what does not divide is padded."""
    return tuple(-(-size // ways(axes, mesh)) for size, axes in zip(shape, cut))


def is_batch(cut: Cut) -> bool:
    """Whether it is an activation: parameters are never cut over 'data'."""
    return any("data" in axes for axes in cut)


def take(axes: Sequence[str], used: set[str]) -> tuple[str, ...]:
    """Those axes that are free, which are used then."""
    kept = tuple(axis for axis in axes if axis not in used)
    used.update(kept)
    return kept


def fits(size: int, axes: tuple[str, ...], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes if they divide the size, else none."""
    return axes if size % ways(axes, mesh) == 0 else ()


def merge(cuts: Sequence[Cut]) -> Cut:
    """Of an elementwise operation on arrays of one shape."""
    used: set[str] = set()
    merged = []
    for axes in zip(*cuts):
        merged.append(take(next((a for a in axes if a), ()), used))
    return tuple(merged)


def reshape(old: Shape, new: Shape, cut: Cut, mesh: Mapping[str, int]) -> Cut:
    """The cut of the major axis of what is merged or split goes to the major axis."""
    found: list[tuple[str, ...]] = [()] * len(new)
    i = j = 0
    while i < len(old) and j < len(new):
        first, left, right = (i, j), old[i], new[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right and i < len(old):
                left, i = left * old[i], i + 1
            elif right < left and j < len(new):
                right, j = right * new[j], j + 1
            else:
                return uncut(len(new))  # an axis of size 0
        axes = next((cut[k] for k in range(first[0], i) if old[k] > 1), ())
        target = next((k for k in range(first[1], j) if new[k] > 1), first[1])
        if target < len(new):
            found[target] = fits(new[target], axes, mesh)
    return tuple(found)


def scatter_gradient(shape: Shape, cut: Cut, mesh: Mapping[str, int]) -> Cut:
    """Of a weight's gradient, summed over devices: each keeps its 'fsdp' share.

    The longest axis that divides is cut, as of the weight (``fsdp_shardings``).
    """
    taken = {axis for axes in cut for axis in axes}
    if "fsdp" in taken or mesh.get("fsdp", 1) == 1 or math.prod(shape) < 2**14:
        return cut
    free = [
        k for k, size in enumerate(shape) if not cut[k] and size % mesh["fsdp"] == 0
    ]
    if not free:
        return cut
    longest = max(free, key=lambda k: shape[k])
    return tuple(("fsdp",) if k == longest else axes for k, axes in enumerate(cut))
