"""Cuts of results, FLOPs and gathered bytes of single operations."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from tmdjax.train import axis_cuts
from tmdjax.train.axis_cuts import Cut, Shape


@dataclasses.dataclass
class Propagated:
    """What :func:`propagate` finds.

    Attributes:
        cuts: of the results.
        scratch: bytes of gathered weights and of gradients before they are scattered.
        flops: multiplications and additions of products, on one device.
        dtype: of the operands of a product, '' elsewhere.
    """

    cuts: list[Cut]
    scratch: int = 0
    flops: float = 0.0
    dtype: str = ""


def propagate(
    name: str,
    params: Mapping[str, Any],
    inputs: Sequence[Any],
    shapes: Sequence[Shape],
    mesh: Mapping[str, int],
    dtype: Any = None,
) -> Propagated:
    """Cuts of the results of one operation.

    Args:
        name: of the primitive.
        params: of the equation.
        inputs: values with shape, itemsize and cut.
        shapes: of the results.
        mesh: sizes of its axes.
        dtype: of the first input.
    """
    if name == "dot_general":
        return _product(params, inputs, shapes[0], mesh, dtype)
    if name == "conv_general_dilated":
        return _convolution(params, inputs, shapes[0], mesh, dtype)
    if name in ATTENTION_FLOPS:
        return _attention(name, params, inputs, shapes, mesh, dtype)
    if name == "gather":
        return _gather(params, inputs, shapes[0], mesh)
    if name in ("scatter-add", "scatter_add"):
        cut = axis_cuts.merge([inputs[0].cut])
        if axis_cuts.is_batch(inputs[2].cut) and not axis_cuts.is_batch(cut):
            return _scattered(shapes[0], cut, inputs[0].itemsize, mesh)
        return Propagated([cut])
    return Propagated(
        [_shape_rule(name, params, inputs, shape, mesh) for shape in shapes]
    )


def _shape_rule(
    name: str,
    params: Mapping[str, Any],
    inputs: Sequence[Any],
    shape: Shape,
    mesh: Mapping[str, int],
) -> Cut:
    if not inputs:
        return axis_cuts.uncut(len(shape))
    first = inputs[0]
    if name == "broadcast_in_dim":
        found: list[tuple[str, ...]] = [()] * len(shape)
        for k, axis in enumerate(params["broadcast_dimensions"]):
            if first.shape[k] == shape[axis]:
                found[axis] = first.cut[k]
        return tuple(found)
    if name == "transpose":
        return tuple(first.cut[k] for k in params["permutation"])
    if name in ("reshape", "squeeze", "expand_dims"):
        return axis_cuts.reshape(first.shape, shape, first.cut, mesh)
    if name.startswith(("reduce_", "arg")) and "axes" in params:
        axes = {axis % len(first.shape) for axis in params["axes"]}
        return tuple(c for k, c in enumerate(first.cut) if k not in axes)
    if name == "dynamic_update_slice":
        return first.cut
    alike = [v.cut for v in inputs if v.shape == shape]
    if alike:
        return axis_cuts.merge(alike)
    ranked = [v for v in inputs if len(v.shape) == len(shape)] or [
        v for v in inputs if v.shape[:1] == shape[:1]
    ]
    if not ranked:
        return axis_cuts.uncut(len(shape))
    # Slices, concatenations, padding; random bits of a batch of keys.
    cut = axis_cuts.merge(
        [v.cut for v in ranked if len(v.shape) == len(ranked[0].shape)]
    )
    cut = (cut + axis_cuts.uncut(len(shape)))[: len(shape)]
    return tuple(axis_cuts.fits(n, axes, mesh) for n, axes in zip(shape, cut))


def _local(value: Any, cut: Cut, mesh: Mapping[str, int]) -> int:
    return math.prod(axis_cuts.local_shape(value.shape, cut, mesh))


def _scattered(
    shape: Shape, cut: Cut, itemsize: int, mesh: Mapping[str, int]
) -> Propagated:
    """A gradient summed over devices; it is whole before it is scattered."""
    kept = axis_cuts.scatter_gradient(shape, cut, mesh)
    whole = math.prod(axis_cuts.local_shape(shape, cut, mesh)) * itemsize
    return Propagated([kept], whole if kept != cut else 0)


def _without_conflicts(
    lhs: Any, rhs: Any, paired: Sequence[tuple[int, int]]
) -> tuple[Cut, Cut]:
    """The operands as they are multiplied: the weight is gathered.

    A mesh axis divides one axis of a product. Paired axes (batched or summed) may
    share theirs; an axis that the activation has elsewhere is gathered in the weight.
    """
    swap = axis_cuts.is_batch(rhs.cut) and not axis_cuts.is_batch(lhs.cut)
    major, minor = (rhs, lhs) if swap else (lhs, rhs)
    pairs = {(a if swap else b): (b if swap else a) for a, b in paired}
    used = {axis for axes in major.cut for axis in axes}
    cut = []
    for k, axes in enumerate(minor.cut):
        same = major.cut[pairs[k]] if k in pairs else ()
        cut.append(axes if axes and axes == same else axis_cuts.take(axes, used))
    return (tuple(cut), major.cut) if swap else (major.cut, tuple(cut))


def _product(
    params: Mapping[str, Any],
    inputs: Sequence[Any],
    shape: Shape,
    mesh: Mapping[str, int],
    dtype: Any,
) -> Propagated:
    lhs, rhs = inputs
    (summed_l, summed_r), (batch_l, batch_r) = params["dimension_numbers"]
    paired = [*zip(summed_l, summed_r), *zip(batch_l, batch_r)]
    cut_l, cut_r = _without_conflicts(lhs, rhs, paired)
    free_l = [k for k in range(len(lhs.shape)) if k not in (*summed_l, *batch_l)]
    free_r = [k for k in range(len(rhs.shape)) if k not in (*summed_r, *batch_r)]
    used: set[str] = set()
    out = [axis_cuts.take(cut_l[a] or cut_r[b], used) for a, b in zip(batch_l, batch_r)]
    out += [axis_cuts.take(cut_l[k], used) for k in free_l]
    out += [axis_cuts.take(cut_r[k], used) for k in free_r]
    terms = 1
    for a, b in zip(summed_l, summed_r):
        axes = axis_cuts.take(cut_l[a] or cut_r[b], used)
        terms *= -(-lhs.shape[a] // axis_cuts.ways(axes, mesh))
    local = axis_cuts.local_shape(shape, tuple(out), mesh)
    scratch = 0
    for value, cut in ((lhs, cut_l), (rhs, cut_r)):
        if cut != value.cut and _local(value, cut, mesh) != _local(
            value, value.cut, mesh
        ):
            scratch += _local(value, cut, mesh) * value.itemsize
    done = Propagated([tuple(out)])
    if any("data" in lhs.cut[k] for k in summed_l) or any(
        "data" in rhs.cut[k] for k in summed_r
    ):
        width = jnp.dtype(params.get("preferred_element_type") or dtype).itemsize
        done = _scattered(shape, tuple(out), width, mesh)
    done.scratch += scratch
    done.flops = 2.0 * math.prod(local) * terms
    done.dtype = _name(dtype)
    return done


def _convolution(
    params: Mapping[str, Any],
    inputs: Sequence[Any],
    shape: Shape,
    mesh: Mapping[str, int],
    dtype: Any,
) -> Propagated:
    lhs, rhs = inputs
    numbers = params["dimension_numbers"]
    batch, feature = numbers.lhs_spec[0], numbers.lhs_spec[1]
    out_feature, in_feature = numbers.rhs_spec[0], numbers.rhs_spec[1]
    cut_l, cut_r = _without_conflicts(lhs, rhs, [(feature, in_feature)])
    out: list[tuple[str, ...]] = [()] * len(shape)
    out[numbers.out_spec[0]] = cut_l[batch]
    out[numbers.out_spec[1]] = cut_r[out_feature]
    window = math.prod(rhs.shape[k] for k in numbers.rhs_spec[2:])
    shared = cut_l[feature] or cut_r[in_feature]
    terms = window * rhs.shape[in_feature] / axis_cuts.ways(shared, mesh)
    # Zeros put between the pixels cost nothing.
    terms /= math.prod(params["lhs_dilation"])
    local = axis_cuts.local_shape(shape, tuple(out), mesh)
    scratch = sum(
        _local(v, cut, mesh) * v.itemsize
        for v, cut in ((lhs, cut_l), (rhs, cut_r))
        if cut != v.cut and _local(v, cut, mesh) != _local(v, v.cut, mesh)
    )
    done = Propagated([tuple(out)])
    if "data" in lhs.cut[feature]:
        done = _scattered(shape, tuple(out), rhs.itemsize, mesh)
    done.scratch += scratch
    done.flops = 2.0 * math.prod(local) * terms
    done.dtype = _name(dtype)
    return done


ATTENTION_FLOPS = {"fused_attention": 4, "fused_attention_gradient": 10}
"""Products of a head: two of query x key x width forward, five backward."""


def _attention(
    name: str,
    params: Mapping[str, Any],
    inputs: Sequence[Any],
    shapes: Sequence[Shape],
    mesh: Mapping[str, int],
    dtype: Any,
) -> Propagated:
    """[..., position, heads, width]; results have the cut of queries, keys, values."""
    query, key = inputs[0], inputs[1]
    cut = query.cut
    local = axis_cuts.local_shape(query.shape, cut, mesh)
    keys = key.shape[-3]
    flops = float(ATTENTION_FLOPS[name]) * math.prod(local) * keys
    flops /= 2 if params["causal"] else 1
    if name == "fused_attention":  # the output and the log of its denominators
        return Propagated([cut, cut[:-1]], flops=flops, dtype=_name(dtype))
    cuts = [value.cut for value in inputs[: len(shapes)]]
    return Propagated(cuts, flops=flops, dtype=_name(dtype))


def _gather(
    params: Mapping[str, Any],
    inputs: Sequence[Any],
    shape: Shape,
    mesh: Mapping[str, int],
) -> Propagated:
    """Rows of a table: cut as the indices are, then as the rows are."""
    table, indices = inputs
    numbers = params["dimension_numbers"]
    used: set[str] = set()
    rows = iter(indices.cut[:-1])
    out: list[tuple[str, ...]] = [()] * len(shape)
    for k in range(len(shape)):
        if k not in numbers.offset_dims:
            out[k] = axis_cuts.take(next(rows, ()), used)
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [k for k in range(len(table.shape)) if k not in gone]
    for k, axis in zip(numbers.offset_dims, kept):
        if shape[k] == table.shape[axis]:
            out[k] = axis_cuts.take(table.cut[axis], used)
    batch = {axis for axes in indices.cut for axis in axes}
    cut = tuple(tuple(a for a in axes if a not in batch) for axes in table.cut)
    whole = _local(table, cut, mesh) * table.itemsize
    gathered = cut != table.cut and _local(table, cut, mesh) != _local(
        table, table.cut, mesh
    )
    if axis_cuts.is_batch(table.cut):  # of activations, picked row by row
        return Propagated([tuple(out)])
    return Propagated([tuple(out)], whole if gathered else 0)


def _name(dtype: Any) -> str:
    return "" if dtype is None else jnp.dtype(dtype).name
