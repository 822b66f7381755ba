"""Bytes, FLOPs and a bound on the time of a step, before a device of it is there.

FLOPs are counted in the step's trace (:mod:`tmdjax.train.planning.flops`). Bytes are
those of the step compiled for simulated devices of a CPU, from shapes alone and in a
process of its own (:mod:`tmdjax.train.planning.compiled_memory`). What these cannot
tell of an accelerator stands in :data:`NOT_TOLD`.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.export
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from tmdjax.core.mesh import under_mesh
from tmdjax.models.attention import fused_attention_planned
from tmdjax.train.planning.compiled_memory import compile_memory
from tmdjax.train.planning.devices import Device, get_device
from tmdjax.train.planning.flops import count_work
from tmdjax.train.sharding import (
    Rules,
    batch_sharding,
    fsdp_shardings,
    replicated,
)

NOT_TOLD = (
    "Bytes are those of XLA's CPU compiler, 16-bit arrays at their width. It cannot "
    "tell what an accelerator's compiler fuses or orders otherwise, the scratch of its "
    "kernels (fused attention is planned as attention in blocks, whose tile of scores "
    "counts), buffers of collectives and what the runtime keeps; FLOPs are those of "
    "products, divided evenly over devices, and the roofline knows no communication."
)
"""What a plan leaves open, printed with it."""

AnyMesh = Mesh | AbstractMesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What one call of a step costs on each device.

    Attributes:
        arguments: bytes.
        outputs: bytes.
        aliased: bytes of outputs that take the place of donated arguments.
        temporary: most bytes alive at once besides.
        constants: bytes of arrays that the step closes over.
        flops: of products, by the dtype of their operands.
        moved: bytes that products, or arguments and outputs, read and write at least.
        open_loops: loops of unknown length; their bodies count once.
        mesh: sizes of the mesh axes; empty is one device.
        traced: the step, to be planned on another mesh.
    """

    arguments: int
    outputs: int
    aliased: int
    temporary: int
    constants: int
    flops: Mapping[str, float]
    moved: float
    open_loops: int = 0
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    traced: "Traced" = dataclasses.field(repr=False, compare=False)

    @property
    def total(self) -> int:
        """Most bytes in use at once."""
        held = self.arguments + self.outputs - self.aliased + self.constants
        return held + self.temporary

    @property
    def devices(self) -> int:
        """Number of devices."""
        return math.prod(self.mesh.values())

    def seconds(self, device: Device | str) -> float:
        """The roofline: no call is faster, and collectives take time besides.

        References:
            Williams, Waterman, Patterson, 'Roofline' (2009).
        """
        device = get_device(device)
        compute = sum(
            count / device.peak.get(dtype, device.peak["float32"])
            for dtype, count in self.flops.items()
        )
        return max(compute, self.moved / device.bandwidth)

    def rows(self, device: Device | str | None = None) -> list[dict[str, Any]]:
        """A table for :func:`tmdjax.harness.report.text_table`; GB is 1e9 bytes."""
        values: dict[str, Any] = {
            "mesh": mesh_name(self.mesh),
            "arguments, GB": self.arguments / 1e9,
            "outputs, GB": self.outputs / 1e9,
            "of these donated, GB": self.aliased / 1e9,
            "temporary, GB": self.temporary / 1e9,
            "constants, GB": self.constants / 1e9,
            "total, GB": self.total / 1e9,
        }
        for dtype, count in sorted(self.flops.items()):
            values[f"{dtype} TFLOP"] = count / 1e12
        values["moved, GB"] = self.moved / 1e9
        if self.open_loops:
            values["loops of unknown length, counted once"] = self.open_loops
        if device is not None:
            device = get_device(device)
            values[f"memory of {device.name}, GB"] = device.memory / 1e9
            values["roofline, s"] = self.seconds(device)
        return [{"a device and call": k, "value": v} for k, v in values.items()]


def plan(
    fn: Callable[..., Any],
    *args: Any,
    donate_argnums: int | Sequence[int] = (),
    mesh: AnyMesh | None = None,
    rules: Rules = (),
    device: Device | str | None = None,
) -> StepPlan:
    """Plans a step from the shapes of its arguments.

    Args:
        fn: what would be jitted, before ``jax.jit``.
        args: trees of arrays or ``jax.ShapeDtypeStruct``, the second one the batch;
            shardings of theirs do not count.
        donate_argnums: as for ``jax.jit``.
        mesh: from :func:`tmdjax.train.make_mesh` or
            :func:`tmdjax.train.abstract_mesh`, whose devices need not be there.
            Arguments are then cut as by :func:`tmdjax.train.jit_train_step`: batches
            over data and fsdp, all else by :func:`tmdjax.train.fsdp_shardings`.
        rules: cuts by path, see :func:`tmdjax.train.fsdp_shardings`.
        device: planned for; None is the CPU that runs this.

    Returns:
        The plan.

    Raises:
        ValueError: unknown device, a batch that the mesh does not divide, or what fn
            refuses.
        RuntimeError: the compiler refuses the step.
    """
    traced = Traced(fn, args, donate_argnums, rules, device)
    return traced.plan(
        [None] * len(traced.leaves) if mesh is None else traced.cuts(mesh)
    )


class Traced:
    """A step's trace, to be planned on one mesh or many."""

    def __init__(
        self,
        fn: Callable[..., Any],
        args: Sequence[Any],
        donate_argnums: int | Sequence[int],
        rules: Rules,
        device: Device | str | None,
    ):
        if isinstance(donate_argnums, int):
            donate_argnums = (donate_argnums,)
        for argnum in donate_argnums:
            if not 0 <= argnum < len(args):
                raise ValueError(
                    f"donate_argnums has {argnum}, but there are {len(args)} arguments."
                )
        fused = device is not None and get_device(device).fused_attention
        self.context = fused_attention_planned if fused else contextlib.nullcontext
        self.fn, self.rules = fn, rules
        self.args = jax.eval_shape(lambda *args: args, *args)
        self.leaves = jax.tree.leaves(self.args)
        self.donated = [
            argnum in donate_argnums
            for argnum, arg in enumerate(self.args)
            for _ in jax.tree.leaves(arg)
        ]
        jaxpr = jax.make_jaxpr(self.call)(*self.leaves)
        self.results = jaxpr.out_avals
        self.work = count_work(jaxpr)
        self.constants = sum(const.nbytes for const in jaxpr.consts)

    def call(self, *leaves: Any) -> tuple[Any, ...]:
        """The step from leaf to leaf."""
        with self.context():
            args = jax.tree.structure(self.args).unflatten(leaves)
            return tuple(jax.tree.leaves(self.fn(*args)))

    def cuts(self, mesh: AnyMesh) -> list[NamedSharding]:
        """How every leaf of the arguments is cut over a mesh."""
        mesh = mesh.abstract_mesh
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        found = []
        for argnum, arg in enumerate(self.args):
            if argnum != 1:
                found += jax.tree.leaves(fsdp_shardings(arg, mesh, rules=self.rules))
                continue
            for leaf in jax.tree.leaves(arg):
                if leaf.shape and leaf.shape[0] % ways:
                    raise ValueError(
                        f"a batch of {leaf.shape[0]} does not divide over {ways} "
                        f"devices (data x fsdp of {mesh_name(mesh.shape)}); choose a "
                        f"multiple."
                    )
                found.append(batch_sharding(mesh) if leaf.shape else replicated(mesh))
        return found

    def held(self, cuts: Sequence[NamedSharding]) -> int:
        """Bytes of arguments and constants on a device: no plan takes less."""
        return self.constants + sum(
            math.prod(cut.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf, cut in zip(self.leaves, cuts)
        )

    def plan(self, cuts: Sequence[NamedSharding | None]) -> StepPlan:
        """The plan with every leaf of the arguments cut so; None is a copy a device."""
        mesh = next((cut.mesh for cut in cuts if cut is not None), None)
        sizes = {} if mesh is None else dict(mesh.shape)
        if mesh is not None:
            cuts = [replicated(mesh) if cut is None else cut for cut in cuts]
        # results are cut as the donated arguments whose place they take
        waiting: dict[Any, list[NamedSharding | None]] = {}
        for leaf, cut, donated in zip(self.leaves, cuts, self.donated):
            if donated:
                waiting.setdefault((leaf.shape, leaf.dtype), []).append(cut)
        places = [waiting.get((out.shape, out.dtype)) for out in self.results]
        call = self.call if mesh is None else under_mesh(self.call, mesh)
        jitted = jax.jit(
            lambda *leaves: call(*leaves),
            in_shardings=tuple(cuts),
            out_shardings=tuple(p.pop(0) if p else None for p in places),
            keep_unused=True,
        )
        exported = jax.export.export(jitted, platforms=("cpu",))(*self.leaves)
        donated = [k for k, given in enumerate(self.donated) if given]
        found = compile_memory(exported, donated, sizes)
        devices = math.prod(sizes.values())
        through = found["arguments"] + found["outputs"]
        return StepPlan(
            **found,
            constants=self.constants,
            flops={name: n / devices for name, n in self.work.flops.items()},
            moved=max(self.work.moved / devices, through),
            open_loops=self.work.open_loops,
            mesh=sizes,
            traced=self,
        )


def mesh_name(mesh: Mapping[str, int]) -> str:
    """The sizes of a mesh's axes in words: 'data=2 x fsdp=4 x tensor=1'."""
    return " x ".join(f"{k}={v}" for k, v in mesh.items()) or "of one device"
