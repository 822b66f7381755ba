"""Bytes, FLOPs and a bound on the time of a step, without compiling or allocating it.

The step is traced, and the trace is walked: see :mod:`tmdjax.train.liveness` for which
arrays are taken to exist and when, and :mod:`tmdjax.train.axis_cuts` for how they are
divided over a mesh. Not counted: what the device's runtime keeps for itself, buffers of
collectives, lost room between buffers (the ``margin`` of
:mod:`tmdjax.train.mesh_search` stands for these), FLOPs other than
of products, and the time of communication.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from tmdjax.core.types import PyTree
from tmdjax.models.planned_attention import fused_attention_planned
from tmdjax.train import axis_cuts, jaxpr_reader, liveness
from tmdjax.train.devices import Device, get_device
from tmdjax.train.sharding import (
    Rules,
    batch_sharding,
    fsdp_shardings,
    replicated,
)

SLACK = 1 / 6
"""Temporary bytes on top of those counted, as a part of them: a compiler's order of
operations and layouts are its own. Chosen on scanned networks with remat, whose totals
the CPU's compiler then meets within 4 % (library kernels off) or 15 % (on)."""

AnyMesh = Mesh | AbstractMesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What one call of a step costs on each device.

    Attributes:
        arguments: bytes.
        outputs: bytes.
        aliased: bytes of outputs that take the place of donated arguments.
        temporary: most bytes alive at once besides.
        constants: bytes of arrays that the step closes over.
        flops: of products, by the dtype of their operands.
        moved: bytes that products read and write, and arguments and outputs once: what
            a compiler that fused all else into them could not avoid.
        open_loops: loops of unknown length; their bodies count once.
        mesh: sizes of the mesh axes; empty is one device.
        on: makes the plan of the same step on another mesh; None if its shardings
            were given.
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
    on: Callable[[AnyMesh], "Plan"] | None = dataclasses.field(
        default=None, repr=False, compare=False
    )

    @property
    def slack(self) -> int:
        """Temporary bytes beyond those counted that a compiler takes, by SLACK."""
        return round(SLACK * self.temporary)

    @property
    def total(self) -> int:
        """Most bytes in use at once, the slack included."""
        held = self.arguments + self.outputs - self.aliased + self.constants
        return held + self.temporary + self.slack

    @property
    def devices(self) -> int:
        """Number of devices."""
        return math.prod(self.mesh.values())

    def seconds(self, device: Device | str) -> float:
        """No call is faster (roofline; collectives take time besides)."""
        return get_device(device).seconds(self.flops, self.moved)

    def rows(self, device: Device | str | None = None) -> list[dict[str, Any]]:
        """A table for :func:`tmdjax.harness.report.text_table`; GB is 1e9 bytes."""
        rows: list[tuple[str, Any]] = [
            ("mesh", mesh_name(self.mesh)),
            ("arguments, GB", self.arguments / 1e9),
            ("outputs, GB", self.outputs / 1e9),
            ("of these donated, GB", self.aliased / 1e9),
            ("temporary, GB", self.temporary / 1e9),
            ("slack, GB", self.slack / 1e9),
            ("constants, GB", self.constants / 1e9),
            ("total, GB", self.total / 1e9),
        ]
        rows += [
            (f"{dtype} TFLOP", count / 1e12)
            for dtype, count in sorted(self.flops.items())
        ]
        rows.append(("moved, GB", self.moved / 1e9))
        if self.open_loops:
            rows.append(("loops of unknown length, counted once", self.open_loops))
        if device is not None:
            device = get_device(device)
            rows += [
                (f"memory of {device.name}, GB", device.memory / 1e9),
                ("roofline, s", self.seconds(device)),
            ]
        return [{"a device and call": name, "value": value} for name, value in rows]


def plan(
    fn: Callable[..., Any],
    *args: Any,
    donate_argnums: int | Sequence[int] = (),
    mesh: AnyMesh | None = None,
    rules: Rules = (),
    batch_argnums: Sequence[int] = (1,),
    shardings: Sequence[PyTree] | None = None,
    device: Device | str | None = None,
) -> Plan:
    """Plans a step from the shapes of its arguments.

    Args:
        fn: what would be jitted, before ``jax.jit``.
        args: trees of arrays or ``jax.ShapeDtypeStruct``; the latter's shardings count
            where no mesh and no shardings are given.
        donate_argnums: as for ``jax.jit``.
        mesh: from :func:`tmdjax.train.make_mesh` or
            :func:`tmdjax.train.abstract_mesh`, whose devices need not be there.
            Arguments are then cut as by :func:`tmdjax.train.jit_train_step`: batches
            over data and fsdp, all else by :func:`tmdjax.train.fsdp_shardings`.
        rules: cuts by path, see :func:`tmdjax.train.fsdp_shardings`.
        batch_argnums: which arguments are batches.
        shardings: of every argument, a tree of NamedSharding or None (one copy a
            device), instead of mesh, rules and batch_argnums.
        device: planned for; None is the CPU that runs this.

    Returns:
        The plan.

    Raises:
        ValueError: unknown device, mesh and shardings both, a batch that the mesh
            does not divide, or what fn refuses.
        TypeError: a sharding that is no NamedSharding.
    """
    if mesh is not None and shardings is not None:
        raise ValueError(
            "mesh and shardings are both given; shardings name their mesh already."
        )
    return Traced(fn, args, donate_argnums, rules, batch_argnums, device).plan(
        mesh, shardings
    )


class Traced:
    """A step's trace, to be planned on one mesh or many."""

    def __init__(
        self,
        fn: Callable[..., Any],
        args: Sequence[Any],
        donate_argnums: int | Sequence[int],
        rules: Rules,
        batch_argnums: Sequence[int],
        device: Device | str | None,
    ):
        self.args, self.rules = args, rules
        self.batch_argnums = set(batch_argnums)
        if isinstance(donate_argnums, int):
            donate_argnums = (donate_argnums,)
        self.donated = set(donate_argnums)
        for argnum in self.donated:
            if not 0 <= argnum < len(args):
                raise ValueError(
                    f"donate_argnums has {argnum}, but there are {len(args)} arguments."
                )
        self.device = None if device is None else get_device(device)
        fused = self.device is not None and self.device.fused_attention
        with fused_attention_planned() if fused else contextlib.nullcontext():
            self.jaxpr = jax.make_jaxpr(fn)(*args)
        self.constants = sum(
            math.prod(np.shape(c)) * c.dtype.itemsize
            for c in self.jaxpr.consts
            if hasattr(c, "dtype")
        )

    def shardings(self, mesh: AnyMesh | None, argnum: int) -> PyTree:
        """Of one argument."""
        arg = self.args[argnum]
        if mesh is None:
            return jax.tree.map(lambda leaf: _own_sharding(leaf), arg)
        if argnum not in self.batch_argnums:
            return fsdp_shardings(arg, mesh, rules=self.rules)
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        for leaf in jax.tree.leaves(arg):
            if np.shape(leaf) and np.shape(leaf)[0] % ways:
                raise ValueError(
                    f"a batch of {np.shape(leaf)[0]} does not divide over {ways} "
                    f"devices (data x fsdp of {mesh_name(mesh.shape)}); choose a "
                    f"multiple."
                )
        return jax.tree.map(
            lambda leaf: batch_sharding(mesh) if np.shape(leaf) else replicated(mesh),
            arg,
        )

    def plan(
        self, mesh: AnyMesh | None, shardings: Sequence[PyTree] | None = None
    ) -> Plan:
        """The plan on one mesh."""
        if shardings is not None and len(shardings) != len(self.args):
            raise ValueError(
                f"{len(shardings)} shardings are given for {len(self.args)} "
                f"arguments; give one each, None for a copy a device."
            )
        cuts: list[axis_cuts.Cut] = []
        donated: list[bool] = []
        sizes = dict(mesh.shape) if mesh is not None else {}
        for argnum, arg in enumerate(self.args):
            given = (
                self.shardings(mesh, argnum)
                if shardings is None
                else _spread(shardings[argnum], arg)
            )
            leaves, tree = jax.tree.flatten(arg)
            for leaf, sharding in zip(leaves, tree.flatten_up_to(given)):
                cuts.append(axis_cuts.from_sharding(sharding, np.shape(leaf)))
                donated.append(argnum in self.donated)
                if sharding is not None:
                    sizes.update(sharding.mesh.shape)
        steps = jaxpr_reader.read(self.jaxpr, cuts, sizes)
        values = steps.values
        alias = _aliases(self.jaxpr, donated)
        outputs = aliased = 0
        for place, index in enumerate(steps.outputs):
            if place in alias:
                nbytes = values[steps.inputs[alias[place]]].nbytes
                aliased += nbytes
            else:
                nbytes = values[index].nbytes
            outputs += nbytes
        copies = self.device is None or self.device.copies_operands
        cost = liveness.measure(steps, steps.outputs, copies=copies)
        arguments = sum(values[i].nbytes for i in steps.inputs[: len(cuts)])
        return Plan(
            arguments=arguments,
            outputs=outputs,
            aliased=aliased,
            temporary=cost.temporary,
            constants=self.constants,
            flops=cost.flops,
            moved=cost.moved + arguments + outputs,
            open_loops=cost.open_loops,
            mesh=sizes,
            on=self.plan if shardings is None else None,
        )


def _own_sharding(leaf: Any) -> Any:
    sharding = getattr(leaf, "sharding", None)
    return None if isinstance(leaf, jax.Array) else sharding


def _spread(prefix: PyTree, tree: PyTree) -> PyTree:
    """One sharding a leaf, from a tree that may end above the leaves, as for jit."""
    return jax.tree.map(
        lambda sharding, part: jax.tree.map(lambda _: sharding, part),
        prefix,
        tree,
        is_leaf=lambda s: s is None,
    )


def _aliases(jaxpr: Any, donated: Sequence[bool]) -> dict[int, int]:
    """Which output takes the room of which donated argument, as jax pairs them."""
    waiting: dict[Any, list[int]] = {}
    for index, (aval, given) in enumerate(zip(jaxpr.in_avals, donated)):
        if given:
            waiting.setdefault((aval.shape, aval.dtype), []).append(index)
    found = {}
    for place, aval in enumerate(jaxpr.out_avals):
        free = waiting.get((aval.shape, aval.dtype))
        if free:
            found[place] = free.pop(0)
    return found


def mesh_name(mesh: Mapping[str, int]) -> str:
    """As in 'data=2 x fsdp=4 x tensor=1'."""
    return " x ".join(f"{k}={v}" for k, v in mesh.items()) or "of one device"
