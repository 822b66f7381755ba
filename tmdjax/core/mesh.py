"""How hidden states lie on a mesh of devices, where the compiler would guess wrong."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.core
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from tmdjax.core.types import PyTree

BATCH_AXES = ("data", "fsdp")
"""Mesh axes over which batches are cut, along their first axis."""


def under_mesh(fn: Callable[..., Any], mesh: Mesh | AbstractMesh) -> Callable[..., Any]:
    """``fn`` traced with the mesh around it, so that :func:`cut_by_batch` sees it."""
    abstract = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh

    @functools.wraps(fn)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(abstract):
            return fn(*args, **kwargs)

    return traced


def cut_by_batch(tree: PyTree) -> PyTree:
    """Arrays [batch, ...], cut along the batch on the mesh around the trace.

    Parameters cut over 'fsdp' and states cut over 'fsdp' meet in every product. Left to
    itself the compiler may keep the parameters where they are and hold the states of
    the whole batch on each device; told this once a block, it gathers parameters.

    Outside of a compiled function, without a mesh (:func:`under_mesh`), under one whose
    axes the compiler does not choose for, or where the batch does not divide, the
    arrays are returned as they are. The other axes stay the compiler's to cut.
    """
    mesh = jax.sharding.get_abstract_mesh()
    automatic = {
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types)
        if kind == AxisType.Auto
    }
    axes = tuple(name for name in BATCH_AXES if name in automatic)
    ways = math.prod(mesh.shape[name] for name in axes)

    def cut(leaf: Any) -> Any:
        if not isinstance(leaf, jax.core.Tracer):  # it lies where it lies
            return leaf
        if leaf.ndim == 0 or leaf.shape[0] % ways:
            return leaf
        rest = [PartitionSpec.UNCONSTRAINED] * (leaf.ndim - 1)
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(axes, *rest))

    return tree if ways == 1 else jax.tree.map(cut, tree)
