"""A program as a list of operations with sizes per device: what the planner walks."""

import dataclasses
from collections.abc import Sequence

from tmdjax.train.axis_cuts import Cut, Shape

VIEWS = {
    "reshape", "squeeze", "expand_dims", "bitcast_convert_type", "transpose",
    "random_wrap", "random_unwrap", "optimization_barrier", "copy",
    "sharding_constraint", "device_put", "layout_constraint",
}  # fmt: skip
"""Operations whose result is (or can be laid out as) the buffer they read."""

SHAPED = {
    "broadcast_in_dim", "iota", "slice", "dynamic_slice", "rev", "split", "select_n",
    "clamp", "pad", "reduce_precision", "random_fold_in", "concatenate",
}  # fmt: skip
"""Operations besides elementwise ones that a fusion computes as it reads."""

REDUCTIONS = {
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and",
    "reduce_or", "reduce_xor", "argmax", "argmin", "reduce",
}  # fmt: skip
"""Operations that a fusion may end in."""


_WHOLE = {
    "dot_general", "conv_general_dilated", "sort", "cumsum", "cumprod", "cummax",
    "cummin", "cumlogsumexp", "fft", "gather", "scatter", "scatter-add", "scatter_add",
    "dynamic_update_slice", "random_bits", "threefry2x32", "top_k", "cholesky",
    "triangular_solve", "pure_callback", "io_callback",
}  # fmt: skip
"""Operations on arrays of one shape that do not fuse."""


@dataclasses.dataclass
class Value:
    """An array: its shape, bytes an element and cut, and its bytes on one device."""

    shape: Shape
    itemsize: int
    cut: Cut
    nbytes: int


@dataclasses.dataclass
class Operation:
    """One step of a program.

    Attributes:
        name: the primitive.
        kind: 'fused' (computed where it is read, unless something needs it whole),
            'reduction' (its inputs may be fused into it), 'view', 'loop', 'branch' or
            'whole' (reads and writes whole arrays).
        inputs: indices of values.
        outputs: indices of values.
        scratch: bytes that live during the operation only, such as gathered weights.
        flops: of products, on one device.
        dtype: of the operands of a product.
        bodies: of a loop or a branch.
        length: how often a loop runs.
        carried: (input, output) pairs of a loop that share a buffer.
        orders: of a product: for each operand, the orders of its axes in which it is
            read as it lies.
        permutation: of a transpose.
    """

    name: str
    kind: str
    inputs: list[int]
    outputs: list[int]
    scratch: int = 0
    flops: float = 0.0
    dtype: str = ""
    bodies: list["Program"] = dataclasses.field(default_factory=list)
    length: int = 1
    carried: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    orders: list[set[tuple[int, ...]]] = dataclasses.field(default_factory=list)
    permutation: tuple[int, ...] = ()


@dataclasses.dataclass
class Program:
    """A list of operations.

    Attributes:
        values: every array, by index.
        operations: in the order of the trace.
        inputs: indices of the values that are there before.
        outputs: indices of the results.
        carry: of a loop's body: (input, output) pairs that share a buffer.
    """

    values: list[Value]
    operations: list[Operation]
    inputs: list[int]
    outputs: list[int]
    carry: list[tuple[int, int]] = dataclasses.field(default_factory=list)


def kind_of(name: str, values: Sequence[Value], results: int) -> str:
    """The kind of an operation on these values, its results last."""
    if name in VIEWS:
        return "view"
    if name in REDUCTIONS:
        return "reduction"
    if name in SHAPED:
        return "fused"
    shape = values[-1].shape
    alike = all(_spreads(value.shape, shape) for value in values)
    return "fused" if results == 1 and alike and name not in _WHOLE else "whole"


def _spreads(small: Shape, shape: Shape) -> bool:
    """Whether an elementwise operation spreads an array of one shape over another."""
    return small == () or (
        len(small) == len(shape) and all(a in (1, b) for a, b in zip(small, shape))
    )


def without_unused(program: Program) -> Program:
    """Drops operations whose results nobody uses."""
    needed = set(program.outputs)
    kept = []
    for operation in reversed(program.operations):
        if needed & set(operation.outputs):
            _drop_results(operation, needed)
            needed.update(operation.inputs)
            kept.append(operation)
    program.operations = kept[::-1]
    return program


def _drop_results(operation: Operation, needed: set[int]) -> None:
    """Stacked results that nobody reads are not made."""
    if operation.name != "scan":
        return
    body = operation.bodies[0]
    carried = len(operation.carried)
    keep = [
        k for k, index in enumerate(operation.outputs) if k < carried or index in needed
    ]
    if len(keep) < len(operation.outputs):
        operation.outputs = [operation.outputs[k] for k in keep]
        body.outputs = [body.outputs[k] for k in keep]
        without_unused(body)
