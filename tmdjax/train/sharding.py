"""Meshes and shardings: data parallel, sharded parameters, sharded products."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import (
    AbstractMesh,
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
)

from tmdjax.core.checks import check_count
from tmdjax.core.mesh import BATCH_AXES, under_mesh
from tmdjax.core.trees import map_with_path
from tmdjax.core.types import PyTree

AXES = ("data", "fsdp", "tensor")

Rules = Sequence[tuple[str, tuple[str | None, ...]]]
"""Regular expressions of paths, and mesh axes for the last axes of a leaf."""

# Products cut by their outputs, then products cut by their inputs: one sum over
# 'tensor' ends an attention, and one an MLP.
_ATTENTION_RULES: Rules = (
    (r"attention/(query|key|value|qkv)/kernel$", ("fsdp", "tensor")),
    (r"attention/(query|key|value|qkv)/bias$", ("tensor",)),
    (r"attention/out/kernel$", ("tensor", "fsdp")),
)

DECODER_RULES: Rules = (
    *_ATTENTION_RULES,
    (r"mlp/(gate|up|gate_up)/kernel$", ("fsdp", "tensor")),
    (r"mlp/down/kernel$", ("tensor", "fsdp")),
    (r"(^|/)head/kernel$", ("fsdp", "tensor")),
    (r"(^|/)embedding$", ("tensor", "fsdp")),
)
"""Cuts of the parameters of :class:`tmdjax.models.Decoder`, and of arrays shaped like
them: their averages and optimiser moments."""

VIDEO_DIT_RULES: Rules = (
    *_ATTENTION_RULES,
    # Queries and keys are normed over all heads: a sum of squares over 'tensor'.
    (r"attention/(query|key)_norm/scale$", ("tensor",)),
    (r"blocks/mlp_in/kernel$", ("fsdp", "tensor")),
    (r"blocks/mlp_in/bias$", ("tensor",)),
    (r"blocks/mlp_out/kernel$", ("tensor", "fsdp")),
)
"""Cuts of the parameters of :class:`tmdjax.models.VideoDiT`, and of arrays shaped like
them: their averages and optimiser moments."""


def make_mesh(
    data: int | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh with axes data, fsdp and tensor, in the automatic sharding mode.

    Args:
        data: replicas; None takes what the other two leave.
        fsdp: over how many devices parameters are cut.
        tensor: over how many devices single products are cut.
        devices: all devices if None.

    Raises:
        ValueError: the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    if data is None:
        data = max(1, len(devices) // (fsdp * tensor))
    if data * fsdp * tensor != len(devices):
        raise ValueError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor} needs "
            f"{data * fsdp * tensor} devices, there are {len(devices)}."
        )
    grid = np.asarray(devices).reshape(data, fsdp, tensor)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def abstract_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    """A mesh of devices that need not be there, to plan with.

    Args:
        data: replicas.
        fsdp: over how many devices parameters are cut.
        tensor: over how many devices single products are cut.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    for name, size in sizes.items():
        check_count(name, size)
    return AbstractMesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Batches are cut along their first axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """One whole copy a device."""
    return NamedSharding(mesh, PartitionSpec())


def fsdp_shardings(
    tree: PyTree, mesh: Mesh | AbstractMesh, min_size: int = 2**14, rules: Rules = ()
) -> PyTree:
    """Cuts each large leaf along its longest divisible axis over 'fsdp'.

    The rule reads shapes alone, so parameters, their averages and optimiser
    moments get the same cut.

    Args:
        tree: arrays or shape structs.
        mesh: from :func:`make_mesh` or :func:`abstract_mesh`.
        min_size: leaves with fewer scalars are replicated.
        rules: cuts by path that take precedence, such as ``DECODER_RULES``; the first
            that matches counts. A mesh axis that does not divide is left out.

    Returns:
        A tree of NamedSharding.
    """
    ways = mesh.shape["fsdp"]

    def rule(path: str, leaf: Any) -> NamedSharding:
        shape = np.shape(leaf)
        for pattern, axes in rules:
            if re.search(pattern, path) and len(shape) >= len(axes):
                lead = len(shape) - len(axes)
                cut = [
                    name if name and size % mesh.shape[name] == 0 else None
                    for name, size in zip(axes, shape[lead:])
                ]
                return NamedSharding(mesh, PartitionSpec(*[None] * lead, *cut))
        divisible = [axis for axis, size in enumerate(shape) if size % ways == 0]
        if ways == 1 or not divisible or int(np.prod(shape)) < min_size:
            return replicated(mesh)
        axis = max(divisible, key=lambda a: shape[a])
        spec = [None] * len(shape)
        spec[axis] = "fsdp"  # pyright: ignore
        return NamedSharding(mesh, PartitionSpec(*spec))

    return map_with_path(rule, tree)


def jit_train_step(
    step: Any,
    state: PyTree,
    mesh: Mesh,
    constants: PyTree = None,
    rules: Rules = (),
) -> tuple[Any, PyTree, Any]:
    """Compiles a train step for a mesh.

    Args:
        step: ``(state, batch, key) -> (state, metrics)``, with the constants as a
            fourth argument if there are any.
        state: the initial state, on any device.
        mesh: from :func:`make_mesh`.
        constants: arrays that no update changes, such as a frozen base: arguments of
            the program, not part of it. None means none.
        rules: cuts by path, see :func:`fsdp_shardings`.

    Returns:
        The jitted step (state donated), the state placed on the mesh, and the
        function that places a batch.
    """
    others = () if constants is None else (constants,)
    jitted, put, place = jit_on_mesh(step, state, mesh, *others, rules=rules)
    state, *others = put(state, *others)

    def with_constants(state: PyTree, batch: PyTree, key: Any) -> Any:
        return jitted(state, batch, key, *others)

    return with_constants if others else jitted, state, place


def jit_on_mesh(
    step: Any, state: PyTree, mesh: Mesh, *others: PyTree, rules: Rules = ()
) -> tuple[Any, Any, Any]:
    """Compiles ``step(state, batch, key, *others) -> (state, metrics)`` for a mesh.

    Args:
        step: the step.
        state: arrays or shape structs like its first argument, donated.
        mesh: from :func:`make_mesh`.
        *others: arrays or shape structs like the arguments after the key.
        rules: cuts by path, see :func:`fsdp_shardings`.

    Returns:
        The jitted step; ``put(state, *others)``, which places (the first of) them; and
        the function that places a batch.
    """
    shardings = fsdp_shardings(state, mesh, rules=rules)
    placed = tuple(fsdp_shardings(other, mesh, rules=rules) for other in others)
    by_batch = batch_sharding(mesh)
    jitted = jax.jit(
        under_mesh(step, mesh),
        in_shardings=(shardings, by_batch, replicated(mesh), *placed),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )

    def put(*trees: PyTree) -> tuple[PyTree, ...]:
        return tuple(map(jax.device_put, trees, (shardings, *placed)))

    def place(batch: PyTree) -> PyTree:
        size = jax.tree.leaves(batch)[0].shape[0]
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        if size % ways:
            raise ValueError(
                f"a batch of {size} does not divide over {ways} devices; choose a "
                f"multiple."
            )
        return jax.device_put(batch, by_batch)

    return jitted, put, place
