"""Bytes, FLOPs and a bound on the time of a step, before a device of it is there.

Bytes are the compiler's: the step is compiled for simulated devices of a CPU, from
shapes alone and in a process of its own (:mod:`tmdjax.train.compiled_memory`). FLOPs
are counted in the trace (:mod:`tmdjax.train.flops`), and taken to be divided evenly.

A CPU's compiler stands for that of an accelerator. What it cannot tell stands in
:data:`NOT_TOLD`; the ``margin`` of :mod:`tmdjax.train.mesh_search` is there for it.
"""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.export
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from tmdjax.core.mesh import under_mesh
from tmdjax.core.types import PyTree
from tmdjax.models.attention import fused_attention_planned
from tmdjax.train.compiled_memory import compile_memory
from tmdjax.train.devices import Device, get_device
from tmdjax.train.flops import count_work
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
class Plan:
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
        traced: the step, to be planned on another mesh; None if its shardings were
            given.
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
    traced: "Traced | None" = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def held(self) -> int:
        """Bytes of arguments, results and constants."""
        return self.arguments + self.outputs - self.aliased + self.constants

    @property
    def total(self) -> int:
        """Most bytes in use at once."""
        return self.held + self.temporary

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
        RuntimeError: the compiler refuses the step.
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
        self.fn, self.args, self.rules = fn, args, rules
        self.batch_argnums = set(batch_argnums)
        if isinstance(donate_argnums, int):
            donate_argnums = (donate_argnums,)
        for argnum in donate_argnums:
            if not 0 <= argnum < len(args):
                raise ValueError(
                    f"donate_argnums has {argnum}, but there are {len(args)} arguments."
                )
        fused = device is not None and get_device(device).fused_attention
        self.context = fused_attention_planned if fused else contextlib.nullcontext
        leaves = [jax.tree.leaves(arg) for arg in args]
        self.leaves = [_plain(leaf) for part in leaves for leaf in part]
        self.donated = [
            argnum in donate_argnums for argnum, part in enumerate(leaves) for _ in part
        ]
        with self.context():
            jaxpr = jax.make_jaxpr(self.call)(*self.leaves)
        self.results = jaxpr.out_avals
        self.work = count_work(jaxpr)
        self.constants = sum(
            math.prod(np.shape(c)) * c.dtype.itemsize
            for c in jaxpr.consts
            if hasattr(c, "dtype")
        )

    def call(self, *leaves: Any) -> tuple[Any, ...]:
        """The step from leaf to leaf; keys as the numbers that they hold."""
        own, tree = jax.tree.flatten(self.args)
        given = [
            jax.random.wrap_key_data(leaf, impl=_key_impl(like))
            if _is_key(like)
            else leaf
            for leaf, like in zip(leaves, own)
        ]
        results = jax.tree.leaves(self.fn(*tree.unflatten(given)))
        return tuple(jax.random.key_data(r) if _is_key(r) else r for r in results)

    def shardings(self, mesh: AnyMesh | None, argnum: int) -> PyTree:
        """Of one argument."""
        arg = self.args[argnum]
        if mesh is None:
            return jax.tree.map(_own_sharding, arg)
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

    def cuts(
        self, mesh: AnyMesh | None, shardings: Sequence[PyTree] | None = None
    ) -> list[NamedSharding | None]:
        """Of every leaf of the arguments."""
        if shardings is not None and len(shardings) != len(self.args):
            raise ValueError(
                f"{len(shardings)} shardings are given for {len(self.args)} "
                f"arguments; give one each, None for a copy a device."
            )
        found: list[NamedSharding | None] = []
        for argnum, arg in enumerate(self.args):
            given = (
                self.shardings(mesh, argnum)
                if shardings is None
                else _spread(shardings[argnum], arg)
            )
            found += map(_abstract, jax.tree.structure(arg).flatten_up_to(given))
        return found

    def held(self, mesh: AnyMesh) -> int:
        """Bytes of arguments on a device of a mesh: no plan on it takes less."""
        return sum(map(_nbytes, self.leaves, self.cuts(mesh))) + self.constants

    def plan(
        self, mesh: AnyMesh | None, shardings: Sequence[PyTree] | None = None
    ) -> Plan:
        """The plan on one mesh."""
        cuts = self.cuts(mesh, shardings)
        sizes = dict(mesh.shape) if mesh is not None else {}
        for cut in cuts:
            sizes.update({} if cut is None else cut.mesh.shape)
        devices = math.prod(sizes.values())
        pairs = _aliases(self.leaves, self.results, self.donated)
        placed, call = cuts, self.call
        if devices > 1:  # None is one copy a device
            whole = replicated(next(cut.mesh for cut in cuts if cut is not None))
            placed = [whole if cut is None else cut for cut in cuts]
            call = under_mesh(self.call, whole.mesh)
        jitted = jax.jit(
            lambda *leaves: call(*leaves),
            in_shardings=tuple(placed) if devices > 1 else None,
            out_shardings=tuple(
                placed[pairs[k]] if devices > 1 and k in pairs else None
                for k in range(len(self.results))
            ),
            donate_argnums=[k for k, given in enumerate(self.donated) if given],
            keep_unused=True,
        )
        with self.context(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")
            exported = jax.export.export(jitted, platforms=("cpu",))(*self.leaves)
        donated = sorted(pairs.values())
        found = compile_memory(exported, donated, sizes if devices > 1 else {})
        arguments = sum(map(_nbytes, self.leaves, cuts))
        aliased = sum(_nbytes(self.leaves[k], cuts[k]) for k in donated)
        outputs = max(aliased, found.outputs - _POINTER * len(self.results))
        if devices == 1:
            outputs = sum(_nbytes(result, None) for result in self.results)
        return Plan(
            arguments=arguments,
            outputs=outputs,
            aliased=aliased,
            temporary=found.temporary,
            constants=self.constants,
            flops={name: n / devices for name, n in self.work.flops.items()},
            moved=max(self.work.moved / devices, arguments + outputs),
            open_loops=self.work.open_loops,
            mesh=sizes,
            traced=self if shardings is None else None,
        )


_POINTER = 8  # of each output's address, which the compiler counts


def _is_key(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jax.numpy.issubdtype(dtype, jax.dtypes.prng_key)


def _key_impl(like: Any) -> Any:
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), like)
    return found[0]


def _plain(leaf: Any) -> jax.ShapeDtypeStruct:
    """Its shape and dtype, without a sharding; of keys those of their numbers."""
    if _is_key(leaf):
        return jax.eval_shape(jax.random.key_data, leaf)
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jax.dtypes.result_type(leaf)
    return jax.ShapeDtypeStruct(np.shape(leaf), dtype)


def _abstract(sharding: Any) -> NamedSharding | None:
    if sharding is None:
        return None
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            f"a sharding of type {type(sharding).__name__} does not name mesh axes; "
            f"give jax.sharding.NamedSharding."
        )
    mesh = sharding.mesh
    mesh = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
    return NamedSharding(mesh, sharding.spec)


def _nbytes(leaf: Any, sharding: NamedSharding | None) -> int:
    """On one device."""
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize


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


def _aliases(
    leaves: Sequence[Any], results: Sequence[Any], donated: Sequence[bool]
) -> dict[int, int]:
    """Which output takes the room of which donated argument, as jax pairs them."""
    waiting: dict[Any, list[int]] = {}
    for index, (leaf, given) in enumerate(zip(leaves, donated)):
        if given:
            waiting.setdefault((leaf.shape, leaf.dtype), []).append(index)
    found = {}
    for place, result in enumerate(results):
        free = waiting.get((result.shape, result.dtype))
        if free:
            found[place] = free.pop(0)
    return found


def mesh_name(mesh: Mapping[str, int]) -> str:
    """As in 'data=2 x fsdp=4 x tensor=1'."""
    return " x ".join(f"{k}={v}" for k, v in mesh.items()) or "of one device"
