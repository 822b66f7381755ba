"""Which arrays of a program are alive when: its peak, and what its products cost.

What a compiler fuses never becomes an array. The rules, simpler than any compiler's:

* elementwise operations, broadcasts, slices and the like are computed where their
  result is read. They become arrays if an operation that cannot fuse reads them
  (products, convolutions, loops, sorts, ...), or if they are expensive
  (``EXPENSIVE``) and more than one array is made from them;
* a reduction computes its inputs as it reads them;
* reshapes and transposes are the buffer that they read;
* an array made from arguments alone (a weight cast to bfloat16, say) is made right
  before it is first read; all others in the order of the trace;
* a fused result takes the place of an input of its size that nobody reads again; a
  loop's carry takes the place of its initial value, and its next value that of the
  last where nobody reads that any more;
* results of the whole program have room of their own.
"""

import dataclasses
from collections.abc import Collection, Iterable

from tmdjax.train.program import Operation, Program

EXPENSIVE = {
    "exp", "exp2", "expm1", "log", "log1p", "tanh", "logistic", "pow", "erf",
    "erf_inv", "erfc", "sin", "cos", "tan", "sqrt", "rsqrt", "cbrt", "div", "rem",
    "atan2",
}  # fmt: skip
"""Elementwise operations that a compiler does not repeat in two fusions."""

_MANY = 8  # readers of a value that are told apart


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a program costs on one device.

    Attributes:
        temporary: most bytes alive at once, arguments and results apart.
        moved: bytes that products read and write.
        flops: of products, by the dtype of their operands.
        open_loops: loops whose length is not known; they count once.
    """

    temporary: int
    moved: float
    flops: dict[str, float]
    open_loops: int


@dataclasses.dataclass
class _Step:
    """What becomes arrays at one moment."""

    operation: Operation
    reads: set[int]
    writes: list[int]


def measure(
    program: Program, free: Collection[int] = (), *, copies: bool = True
) -> Traffic:
    """Walks the program.

    Args:
        program: from :func:`tmdjax.train.jaxpr_reader.read`.
        free: values that are counted elsewhere, besides inputs and the program's
            carry: its results.
        copies: whether a product copies an operand whose axes lie in another order
            than it reads (the CPU's; matrix units of GPUs and TPUs read any).
    """
    return _Walk(program, set(free), copies).run()


class _Walk:
    """One program's arrays: who they are, when they are made and last read."""

    def __init__(self, program: Program, free: set[int], copies: bool):
        self.copies = copies
        self.program = program
        self.values = program.values
        self.inputs = set(program.inputs)
        self.made = {i: op for op in program.operations for i in op.outputs}
        self.carry = {self.base(out): into for into, out in program.carry}
        self.free = {self.base(index) for index in free}
        self.results = {self.base(index) for index in program.outputs}
        self.copied = {
            id(op): [
                i for i, order in zip(op.inputs, op.orders) if self.misplaced(i, order)
            ]
            for op in program.operations
            if copies and op.orders
        }
        self.real = self._real()
        self.roots: dict[int, frozenset[int]] = {}

    def base(self, index: int) -> int:
        """The value whose buffer a view shows."""
        while (op := self.made.get(index)) is not None and op.kind == "view":
            index = op.inputs[min(op.outputs.index(index), len(op.inputs) - 1)]
        return index

    def misplaced(self, index: int, orders: set[tuple[int, ...]]) -> bool:
        """Whether the axes of a value lie in another order than any of these."""
        shape = self.values[index].shape
        axes = {tuple(k for k in order if shape[k] > 1) for order in orders}
        place = list(range(len(shape)))
        while (op := self.made.get(index)) is not None and op.kind == "view":
            if op.name == "transpose":
                place = [op.permutation[k] for k in place]
            elif op.name in ("reshape", "squeeze", "expand_dims"):
                break
            index = op.inputs[min(op.outputs.index(index), len(op.inputs) - 1)]
        return all(
            [place[k] for k in order] != sorted(place[k] for k in order)
            for order in axes
        )

    def _real(self) -> set[int]:
        """Values that become arrays: wanted whole, or expensive and read often."""
        real = set(self.results)
        for op in self.program.operations:
            if op.kind not in ("fused", "view"):
                real.update(op.outputs)
            if op.kind in ("whole", "loop", "branch"):
                starts = {start for start, _ in op.carried}
                private = self.copied.get(id(op), ())
                real.update(
                    self.base(i)
                    for i in op.inputs
                    if i not in starts and i not in private
                )
            elif op.name == "optimization_barrier":
                real.update(self.base(i) for i in op.inputs)
        readers: dict[int, set[int]] = {}
        for op in reversed(self.program.operations):
            if op.kind == "view":
                continue
            for index in op.outputs:
                if (
                    op.kind == "fused"
                    and op.name in EXPENSIVE
                    and len(readers.get(index, ())) > 1
                ):
                    real.add(index)
            seen: set[int] = set()
            for index in op.outputs:
                seen |= {index} if index in real else readers.get(index, set())
            for index in map(self.base, op.inputs):
                known = readers.setdefault(index, set())
                if len(known) < _MANY:
                    known |= seen
        return real

    def sources(self, index: int) -> frozenset[int]:
        """The arrays that must be there to compute a value."""
        index = self.base(index)
        if index not in self.made:  # a literal takes no room
            return frozenset((index,) if index in self.inputs else ())
        if index in self.real:
            return frozenset((index,))
        if index not in self.roots:
            found: set[int] = set()
            for i in self.made[index].inputs:
                found |= self.sources(i)
            self.roots[index] = frozenset(found)
        return self.roots[index]

    def steps(self) -> list[_Step]:
        """The arrays in the order in which they are made."""
        steps: list[_Step] = []
        late: dict[int, _Step] = {}
        for op in self.program.operations:
            if op.kind == "view":
                continue
            for index in op.outputs:  # in the order of the trace: no deep recursion
                if op.kind == "fused" and index not in self.real:
                    self.sources(index)
            writes = [index for index in op.outputs if index in self.real]
            if not writes:
                continue
            reads: set[int] = set()
            for index in op.inputs:
                reads |= self.sources(index)
            step = _Step(op, reads, writes)
            if (
                op.kind == "fused"
                and all(i in self.inputs or i in late for i in reads)
                and not (set(writes) & self.results)
            ):
                late.update({index: step for index in writes})
                continue
            self._append(steps, step, late)
        return steps

    def _append(self, steps: list[_Step], step: _Step, late: dict[int, _Step]) -> None:
        for index in sorted(step.reads):
            if index in late:
                before = late[index]
                for write in before.writes:
                    late.pop(write)
                self._append(steps, before, late)
        steps.append(step)

    def run(self) -> Traffic:
        steps = self.steps()
        last: dict[int, int] = {}
        for time, step in enumerate(steps):
            for index in step.reads:
                last[index] = time
        for index in self.results:
            if index in self.carry or index not in self.free:
                last[index] = len(steps)
        live = peak = open_loops = 0
        moved = 0.0
        flops: dict[str, float] = {}
        alive: dict[int, int] = {}
        for time, step in enumerate(steps):
            op = step.operation
            inner = [measure_body(body, self.copies) for body in op.bodies]
            dying = {i for i in step.reads if last[i] == time and i in alive}
            sizes = {i: self.size(i, last, time, op) for i in step.writes}
            room = sum(self._reused(step, sizes, dying, alive))
            scratch = op.scratch + max((t.temporary for t in inner), default=0)
            scratch += sum(self.values[i].nbytes for i in self.copied.get(id(op), ()))
            live += sum(sizes.values())
            peak = max(peak, live - room + scratch)
            alive.update(sizes)
            for index in {*dying, *(i for i in sizes if i not in last)}:
                live -= alive.pop(index)
            if inner:
                moved += op.length * max(t.moved for t in inner)
                open_loops += op.name == "while"
                open_loops += sum(t.open_loops for t in inner)
                for name in {n for t in inner for n in t.flops}:
                    most = max(t.flops.get(name, 0.0) for t in inner)
                    flops[name] = flops.get(name, 0.0) + op.length * most
            if op.flops:
                touched = {self.base(i) for i in op.inputs + op.outputs}
                moved += sum(self.values[i].nbytes for i in touched)
                flops[op.dtype] = flops.get(op.dtype, 0.0) + op.flops
        return Traffic(peak, moved, flops, open_loops)

    def size(self, index: int, last: dict[int, int], time: int, op: Operation) -> int:
        """Bytes that a new array takes; none where it has room already."""
        if index in self.carry:
            until = last.get(self.base(self.carry[index]), -1)
            kept = until > time or (until == time and op.kind != "fused")
            return self.values[index].nbytes if kept else 0
        return 0 if index in self.free else self.values[index].nbytes

    def _reused(
        self,
        step: _Step,
        sizes: dict[int, int],
        dying: set[int],
        alive: dict[int, int],
    ) -> Iterable[int]:
        """Sizes of inputs whose room the results take."""
        op = step.operation
        if op.kind == "loop":
            left = set(dying)
            for start, out in op.carried:
                source = self.base(start)
                if source in left and alive[source] == sizes.get(out):
                    left.discard(source)
                    yield alive[source]
        elif op.kind == "fused" or op.name in IN_PLACE:
            left = set(dying)
            for size in sizes.values():
                match = next((i for i in left if alive[i] == size), None)
                if match is not None:
                    left.discard(match)
                    yield size


IN_PLACE = {"dynamic_update_slice", "scatter", "scatter-add", "scatter_add", "sort"}
"""Operations that may write over their first input."""


def measure_body(body: Program, copies: bool) -> Traffic:
    """Of a loop or a branch: what is stacked is written to its place outside."""
    carried = {out for _, out in body.carry}
    stacked = [index for index in body.outputs if index not in carried]
    return measure(body, _written_out(body, stacked), copies=copies)


def _written_out(body: Program, stacked: list[int]) -> list[int]:
    """Those results that a fusion writes straight into the stack."""
    made = {i: op for op in body.operations for i in op.outputs}
    return [i for i in stacked if i in made and made[i].kind == "fused"]
