"""FLOPs of a step's products, from its trace; a compiler counts a loop's body once."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core as jex

from tmdjax.models.block_attention import TILE

_ALGORITHMS = {"BF16_BF16_F32": "bfloat16", "F16_F16_F32": "float16"}
"""Products that round their operands first, whatever these are."""


@dataclasses.dataclass
class Work:
    """What the products of a program take, on all devices together.

    Attributes:
        flops: multiplications and additions, by the dtype of the operands.
        moved: bytes that products read and write, tiles of attention apart.
        open_loops: loops of unknown length; their bodies count once.
    """

    flops: dict[str, float] = dataclasses.field(default_factory=dict)
    moved: float = 0.0
    open_loops: int = 0

    def add(self, other: "Work", times: int = 1) -> None:
        """Adds what runs so many times."""
        for dtype, count in other.flops.items():
            self.flops[dtype] = self.flops.get(dtype, 0.0) + times * count
        self.moved += times * other.moved
        self.open_loops += other.open_loops


def count_flops(fn: Callable[..., Any], *args: Any) -> dict[str, float]:
    """FLOPs of a function's products, by the dtype of their operands.

    Args:
        fn: any function that can be traced.
        args: trees of arrays or shape structs.
    """
    return count_work(jax.make_jaxpr(fn)(*args)).flops


def count_work(jaxpr: Any) -> Work:
    """Walks a jaxpr, closed or open.

    Operations whose results nobody reads do not count. Of a ``cond`` the branch that
    costs most does; a ``scan`` counts once a step.
    """
    work = Work()
    for equation in _used(getattr(jaxpr, "jaxpr", jaxpr)):
        name, params = equation.primitive.name, equation.params
        bodies = [count_work(body) for body in _bodies(params)]
        tile = TILE in str(equation.source_info.name_stack)
        if name == "cond":
            bodies = [max(bodies, key=lambda body: sum(body.flops.values()))]
        for body in bodies:
            body.moved *= not tile
            work.add(body, params["length"] if name == "scan" else 1)
        work.open_loops += name == "while"
        if name in ("dot_general", "conv_general_dilated"):
            a, b, out = (v.aval for v in (*equation.invars, *equation.outvars))
            terms = _convolution_terms if name.startswith("conv") else _dot_terms
            dtype = _ALGORITHMS.get(str(params["precision"])) or a.dtype.name
            moved = sum(v.size * v.dtype.itemsize for v in (a, b, out))
            flops = 2.0 * out.size * terms(a, b, params)
            work.add(Work({dtype: flops}, 0.0 if tile else moved))
    return work


def _used(jaxpr: Any) -> list[Any]:
    """Operations whose results are read, or that do something besides."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or needed & set(equation.outvars):
            needed |= {v for v in equation.invars if not isinstance(v, jex.Literal)}
            kept.append(equation)
    return kept


def _bodies(params: Any) -> Iterator[Any]:
    """The programs that an operation runs: of rules, the function itself alone."""
    for value in params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, (jex.ClosedJaxpr, jex.Jaxpr)):
                yield part


def _dot_terms(a: Any, b: Any, params: Any) -> float:
    (summed, _), _ = params["dimension_numbers"]
    return math.prod(a.shape[k] for k in summed)


def _convolution_terms(a: Any, b: Any, params: Any) -> float:
    output, *_ = params["dimension_numbers"].rhs_spec
    # zeros put between the pixels cost nothing
    return math.prod(b.shape) / b.shape[output] / math.prod(params["lhs_dilation"])
