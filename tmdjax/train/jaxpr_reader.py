"""Reads a jaxpr into a program: calls opened, bodies of loops apart, arrays cut."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.extend.core as jex
import numpy as np

from tmdjax.train import axis_cuts
from tmdjax.train.axis_cuts import Cut
from tmdjax.train.program import Operation, Program, Value, kind_of, without_unused
from tmdjax.train.propagation import propagate

CALLS = {
    "jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2",
    "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_lin",
}  # fmt: skip
"""Operations that only name a program: it is read in their place."""


def read(jaxpr: Any, cuts: Sequence[Cut], mesh: Mapping[str, int]) -> Program:
    """Reads a closed jaxpr.

    Args:
        jaxpr: from ``jax.make_jaxpr``.
        cuts: of its inputs.
        mesh: sizes of the mesh axes.

    Returns:
        The program; operations whose results nobody uses are left out. Its constants
        are inputs, after the arguments.
    """
    samples = {
        v.aval.shape[0]: cut[0]
        for v, cut in zip(jaxpr.jaxpr.invars, cuts)
        if cut and "data" in cut[0]
    }
    # A gradient, gathered up layer by layer from zeros, has its parameter's shape: the
    # compiler cuts it as the update needs it.
    stacks = {
        tuple(v.aval.shape): cut
        for v, cut in zip(jaxpr.jaxpr.invars, cuts)
        if len(cut) >= _STACKED and any(cut) and not axis_cuts.is_batch(cut)
    }
    reader = _Reader(mesh, samples, stacks)
    consts = [axis_cuts.uncut(len(v.aval.shape)) for v in jaxpr.jaxpr.constvars]
    return reader.program(jaxpr.jaxpr, [*cuts, *consts])


_STACKED = 3  # axes of a stack of matrices


class _Reader:
    """Follows one jaxpr; bodies of loops get readers of their own."""

    def __init__(
        self,
        mesh: Mapping[str, int],
        samples: Mapping[int, tuple[str, ...]],
        stacks: Mapping[tuple[int, ...], Cut],
    ):
        self.mesh = mesh
        self.samples = samples
        self.stacks = stacks
        self.values: list[Value] = []
        self.operations: list[Operation] = []

    def program(self, jaxpr: Any, cuts: Sequence[Cut]) -> Program:
        variables = [*jaxpr.invars, *jaxpr.constvars]
        inputs = [self.value(v.aval, cut) for v, cut in zip(variables, cuts)]
        outputs = self.inline(jaxpr, dict(zip(variables, inputs)))
        return without_unused(Program(self.values, self.operations, inputs, outputs))

    def value(self, aval: Any, cut: Cut) -> int:
        shape = tuple(getattr(aval, "shape", ()))
        itemsize = getattr(getattr(aval, "dtype", None), "itemsize", 0)
        local = axis_cuts.local_shape(shape, cut, self.mesh)
        self.values.append(Value(shape, itemsize, cut, math.prod(local) * itemsize))
        return len(self.values) - 1

    def inline(self, jaxpr: Any, known: dict[Any, int]) -> list[int]:
        """Reads the equations; returns the indices of the results."""

        def find(atom: Any) -> int:
            if isinstance(atom, jex.Literal):
                return self.value(atom.aval, axis_cuts.uncut(np.ndim(atom.val)))
            return known[atom]

        for equation in jaxpr.eqns:
            inputs = [find(atom) for atom in equation.invars]
            outputs = self.equation(equation, inputs)
            known.update(zip(equation.outvars, outputs))
        return [find(atom) for atom in jaxpr.outvars]

    def equation(self, equation: Any, inputs: list[int]) -> list[int]:
        name, params = equation.primitive.name, equation.params
        if name in CALLS:
            inner = params.get("jaxpr") or params.get("call_jaxpr")
            inner = inner if inner is not None else params["fun_jaxpr"]
            consts = []
            if hasattr(inner, "consts"):
                consts, inner = inner.consts, inner.jaxpr
            known = dict(zip(inner.invars, inputs))
            for variable, _ in zip(inner.constvars, consts):
                cut = axis_cuts.uncut(len(variable.aval.shape))
                known[variable] = self.value(variable.aval, cut)
            return self.inline(inner, known)
        if name == "scan":
            return self.scan(params, inputs, equation.outvars)
        if name == "while":
            return self.loop(params, inputs)
        if name == "cond":
            return self.branch(params, inputs)
        done = propagate(
            name,
            params,
            [self.values[i] for i in inputs],
            [tuple(getattr(v.aval, "shape", ())) for v in equation.outvars],
            self.mesh,
            getattr(equation.invars[0].aval, "dtype", None) if inputs else None,
        )
        if name == "iota" and params["shape"] and params["dimension"] == 0:
            # Numbers of samples: what is drawn for each is where the sample is.
            done.cuts[0] = (
                self.samples.get(params["shape"][0], ()),
                *done.cuts[0][1:],
            )
        outputs = [
            self.value(v.aval, cut if any(cut) else self.stacks.get(v.aval.shape, cut))
            for v, cut in zip(equation.outvars, done.cuts)
        ]
        self.operations.append(
            Operation(
                name,
                kind_of(name, [self.values[i] for i in inputs + outputs], len(outputs)),
                inputs,
                outputs,
                scratch=done.scratch,
                flops=done.flops,
                dtype=done.dtype,
                orders=_orders(params, equation) if name == "dot_general" else [],
                permutation=params["permutation"] if name == "transpose" else (),
            )
        )
        return outputs

    def body(self, jaxpr: Any, cuts: Sequence[Cut]) -> Program:
        """A body of its own; its constants are inputs last."""
        inner = jaxpr.jaxpr if hasattr(jaxpr, "jaxpr") else jaxpr
        consts = [axis_cuts.uncut(len(v.aval.shape)) for v in inner.constvars]
        return _Reader(self.mesh, self.samples, self.stacks).program(
            inner, [*cuts, *consts]
        )

    def scan(
        self, params: Mapping[str, Any], inputs: list[int], results: Sequence[Any]
    ) -> list[int]:
        # The parameters that count constants and carries differ between versions of
        # jax; what is stacked has an axis more outside than inside.
        inside = [len(aval.shape) for aval in params["jaxpr"].in_avals]
        outside = [len(self.values[i].shape) for i in inputs]
        stacked = sum(a == b for a, b in zip(inside, outside))
        carried = sum(
            len(outer.aval.shape) == len(inner.shape)
            for outer, inner in zip(results, params["jaxpr"].out_avals)
        )
        fixed = stacked - carried
        cuts = [self.values[i].cut for i in inputs]
        cuts[stacked:] = [cut[1:] for cut in cuts[stacked:]]
        body = self.body(params["jaxpr"], cuts)
        merged = [
            axis_cuts.merge([cuts[fixed + k], body.values[body.outputs[k]].cut])
            for k in range(carried)
        ]
        if merged != cuts[fixed:stacked]:  # as the compiler does, to a fixed point
            cuts[fixed:stacked] = merged
            body = self.body(params["jaxpr"], cuts)
        body.carry = [(body.inputs[fixed + k], body.outputs[k]) for k in range(carried)]
        _slice_inputs(body, body.inputs[stacked : len(inputs)])
        outputs = []
        for k, aval in enumerate(params["jaxpr"].out_avals):
            cut = merged[k] if k < carried else body.values[body.outputs[k]].cut
            index = self.value(aval, cut)
            if k >= carried:
                value = self.values[index]
                value.shape = (params["length"], *value.shape)
                value.cut = ((), *value.cut)
                value.nbytes *= params["length"]
            outputs.append(index)
        self.operations.append(
            Operation(
                "scan",
                "loop",
                inputs,
                outputs,
                bodies=[body],
                length=params["length"],
                carried=list(zip(inputs[fixed:stacked], outputs[:carried])),
            )
        )
        return outputs

    def loop(self, params: Mapping[str, Any], inputs: list[int]) -> list[int]:
        skip, fixed = params["cond_nconsts"], params["body_nconsts"]
        cuts = [self.values[i].cut for i in inputs]
        body = self.body(params["body_jaxpr"], cuts[skip:])
        test = self.body(params["cond_jaxpr"], [*cuts[:skip], *cuts[skip + fixed :]])
        start = skip + fixed
        body.carry = list(zip(body.inputs[fixed:], body.outputs))
        outputs = [
            self.value(aval, cut)
            for aval, cut in zip(params["body_jaxpr"].out_avals, cuts[start:])
        ]
        self.operations.append(
            Operation(
                "while",
                "loop",
                inputs,
                outputs,
                bodies=[body, test],
                carried=list(zip(inputs[start:], outputs)),
            )
        )
        return outputs

    def branch(self, params: Mapping[str, Any], inputs: list[int]) -> list[int]:
        cuts = [self.values[i].cut for i in inputs[1:]]
        bodies = [self.body(jaxpr, cuts) for jaxpr in params["branches"]]
        first = bodies[0]
        outputs = [
            self.value(aval, first.values[index].cut)
            for aval, index in zip(params["branches"][0].out_avals, first.outputs)
        ]
        self.operations.append(
            Operation("cond", "branch", inputs, outputs, bodies=bodies)
        )
        return outputs


def _orders(params: Mapping[str, Any], equation: Any) -> list[set[tuple[int, ...]]]:
    """Batched axes first; rows of the first operand and either of the second."""
    (summed_l, summed_r), (batch_l, batch_r) = params["dimension_numbers"]
    found = []
    for variable, summed, batch in zip(
        equation.invars, (summed_l, summed_r), (batch_l, batch_r)
    ):
        free = [
            k for k in range(len(variable.aval.shape)) if k not in (*summed, *batch)
        ]
        orders = {(*batch, *free, *summed)}
        if found:
            orders.add((*batch, *summed, *free))
        found.append(orders)
    return found


def _slice_inputs(body: Program, stacked: Sequence[int]) -> None:
    """One step's slices of a loop's inputs, made as they are read."""
    renamed = {}
    slices = []
    for index in stacked:
        body.values.append(dataclasses.replace(body.values[index]))
        renamed[index] = len(body.values) - 1
        slices.append(Operation("slice", "fused", [index], [renamed[index]]))
    for operation in body.operations:
        operation.inputs = [renamed.get(i, i) for i in operation.inputs]
    body.outputs = [renamed.get(i, i) for i in body.outputs]
    body.operations[:0] = slices
