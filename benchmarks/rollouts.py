"""Long rollouts in one compiled program, beside the same network in PyTorch.

    python -m benchmarks.rollouts [--json=PATH]
    python -m benchmarks.rollouts --problems ks --width=64 --layers=14 --batch=128

ks      the one-call solver of configs/pde_refiner.py:cpu: a dilated ResNet of 16
        channels and 10 layers on 64 points, 64 trajectories
torus   the cell of a world model (models.TorusMap): a map of 12 x 12 with 8 channels
        and 9 velocities behind a window of 8 x 8, 8 videos, its own frames fed back

Ours is core.unroll in one program: a scan that keeps every output and says where a
rollout broke. The rivals, on the same weights, states and actions, keep them too:

steps      ours, one jitted step at a time, called from a Python loop
eager      PyTorch, a Python loop
compiled   the same loop, the step under torch.compile (pip install 'tmdjax[parity]')

All outputs are compared first. Contenders run in turn, in random order, in one process;
a ratio is the median over repeats of ours over the rival's seconds in the same repeat,
so below 1 is faster. The rows of memory say what XLA sets aside for 100 and for 1,000
steps of a rollout of which one number a step is kept. Run it alone.
"""

import argparse
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contest import (
    Row,
    Seconds,
    check_equal,
    compare,
    conclude,
    in_turn,
    options,
    timed,
    timed_torch,
    torch_rivals,
)
from tmdjax import core, models
from tmdjax.core import trees

_TOLERANCE = 1e-3
"""Of the difference of all outputs, over the norm of ours."""

_SHORT, _LONG = 100, 1000
_GROWTH = 0.1
"""Most bytes that a further step may take, over those of the state it makes."""

_WEIGHT = 0.01
"""Of a network's answer in a step: random networks then stay near where they begin."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A rollout.

    Attributes:
        module: the network.
        params: of it.
        step: ``(params, state, input) -> (state, output [batch, ...])``.
        state: before the first step.
        inputs: of every step, [length, ...], or None.
    """

    module: Any
    params: Any
    step: Callable[[Any, Any, Any], tuple[Any, Any]]
    state: Any
    inputs: Any


def _drawn(module: Any, *inputs: Any) -> Any:
    """Parameters of which none is zero, of a size that activations keep theirs."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(lambda key: models.init_params(module, key, *inputs), key)
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> Any:
        scale = 1 / np.sqrt(np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.1
        return jnp.asarray(scale * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree.map(draw, shapes)


def ks(given: Any) -> Problem:
    """A solver of one call: state and output are the field [batch, x, 1]."""
    width, layers, batch = given.width or 16, given.layers, given.batch or 64
    module = models.DilatedResNet(width=width, layers=layers, out_channels=1)
    u = jnp.asarray(
        np.random.default_rng(1).standard_normal((batch, 64, 1), np.float32)
    )
    apply_fn = models.functional(module)

    def step(params: Any, u: Any, _: Any) -> tuple[Any, Any]:
        u = u + _WEIGHT * apply_fn(params, u, jnp.ones(len(u)), None)
        return u, u

    params = _drawn(module, u[:1], jnp.ones(1))
    return Problem(module, params, step, u, None)


def torus(given: Any) -> Problem:
    """A world model whose own frames are fed back; inputs are actions [batch, 2]."""
    hidden, batch, rng = given.width or 8, given.batch or 8, np.random.default_rng(1)
    module = models.TorusMap(world=12, window=8, hidden=hidden, velocities=1)
    apply_fn = models.functional(module)
    frame = jnp.asarray(rng.random((batch, 8, 8, 1), np.float32))
    actions = jnp.asarray(rng.integers(-1, 2, (given.length, batch, 2), np.int32))

    def step(params: Any, state: Any, action: Any) -> tuple[Any, Any]:
        call = functools.partial(apply_fn, params)
        state, frame = call(state, action, method="predict")
        return call(state, frame, method="feed"), frame

    @jax.jit
    def begin(params: Any) -> Any:
        state = apply_fn(params, frame, method="start")
        return apply_fn(params, state, frame, actions[0], method="observe")

    params = _drawn(module, frame, actions[0])
    state = begin(params)
    # a map without biases grows or shrinks in every step: by how much is divided out,
    # the twentieth root of what ten steps make of the mean square
    walk = jnp.asarray(rng.integers(-1, 2, (20, batch, 2), np.int32))

    @jax.jit
    def sizes(params: Any) -> Any:
        found = core.unroll(functools.partial(step, params), state, len(walk), walk)
        return jnp.square(found.outputs).mean((1, 2, 3, 4))

    size = np.asarray(sizes(params))
    gain = (size[-1] / size[9]) ** (1 / 20)
    names = ("encoder", "memory")
    params = params | {name: params[name] / np.float32(gain) for name in names}
    return Problem(module, params, step, state, actions)


PROBLEMS = {"ks": ks, "torus": torus}


class Ours:
    """The whole rollout in one program, and a step of it in another.

    Attributes:
        compile_seconds: of the whole rollout.
    """

    def __init__(self, problem: Problem, length: int):
        self.problem, self.length = problem, length

        def whole(params: Any, state: Any, inputs: Any) -> Any:
            step = functools.partial(problem.step, params)
            return core.unroll(step, state, length, inputs).outputs

        given = problem.params, problem.state, problem.inputs
        start = time.perf_counter()
        self.whole = jax.jit(whole).lower(*given).compile()
        self.compile_seconds = time.perf_counter() - start
        self.step = jax.jit(problem.step)

    def rollout(self) -> Any:
        """Outputs [length, batch, ...]."""
        problem = self.problem
        return self.whole(problem.params, problem.state, problem.inputs)

    def rollout_in_steps(self) -> Any:
        """The same, a call a step."""
        state, outputs, inputs = self.problem.state, [], self.problem.inputs
        for i in range(self.length):
            given = None if inputs is None else inputs[i]
            state, output = self.step(self.problem.params, state, given)
            outputs.append(output)
        return outputs


class Torch:
    """The same rollout in PyTorch; what is compiled is so when it is called first."""

    def __init__(self, problem: Problem, length: int, compiled: bool, mode: str):
        import torch

        from benchmarks import torch_rollouts

        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if isinstance(problem.module, models.TorusMap):
            network = torch_rollouts.TorusMap(problem.module)
            state = problem.state.map, problem.state.frame
        else:
            channels = problem.state.shape[-1]
            network = torch_rollouts.DilatedResNet(problem.module, channels)
            state = (problem.state,)
        network.load_state_dict(torch_rollouts.convert(problem.params))
        network = network.to(self.device).eval()

        def held(array: Any, channels: bool = True) -> Any:
            tensor = torch.tensor(np.array(array), device=self.device)
            if not channels:
                return tensor
            # [batch, ..., *space, channel]: channels stand before space
            space = tensor.ndim - 2 if tensor.ndim < 5 else 2
            return tensor.movedim(-1, -1 - space).contiguous()

        self.state = tuple(map(held, state))
        self.inputs: Any = [()] * length
        if problem.inputs is not None:
            actions = held(problem.inputs, channels=False).long()
            self.inputs = [(action,) for action in actions]
        ones = torch.ones(len(self.state[0]), device=self.device)

        def solve(u: Any) -> Any:
            u = u + _WEIGHT * network(u, ones)
            return (u,), u

        def predict(*given: Any) -> Any:
            state = network(*given)
            return state, state[1]

        self.step = solve if problem.inputs is None else predict
        if compiled:
            self.step = torch.compile(self.step, mode=mode)

    def rollout(self) -> Any:
        """Outputs [length, batch, channel, *space]."""
        outputs = []
        with self.torch.no_grad():
            state = self.state
            for given in self.inputs:
                state, output = self.step(*state, *given)
                outputs.append(output)
            return self.torch.stack(outputs)

    def __call__(self) -> Seconds:
        """Seconds of a rollout."""
        return {"rollout": timed_torch(self.rollout)[0]}

    def states(self) -> np.ndarray:
        """Outputs as ours are, [length, batch, *space, channel]."""
        return np.moveaxis(self.rollout().cpu().numpy(), 2, -1)


def temporary_bytes(problem: Problem, length: int) -> int:
    """What a rollout needs beside its arguments, if of its outputs a mean is kept."""

    def run(params: Any, state: Any, inputs: Any) -> Any:
        def step(state: Any, given: Any) -> tuple[Any, Any]:
            state, output = problem.step(params, state, given)
            return state, jnp.square(output).reshape(len(output), -1).mean(-1)

        found = core.unroll(step, state, length, inputs)
        return found.state, found.first_bad, found.outputs

    inputs = problem.inputs
    if inputs is not None:
        inputs = jax.ShapeDtypeStruct((length, *inputs.shape[1:]), inputs.dtype)
    compiled = jax.jit(run).lower(problem.params, problem.state, inputs).compile()
    found: Any = compiled.memory_analysis()
    return found.temp_size_in_bytes


def memory_rows(name: str, problem: Problem) -> list[Row]:
    """Bytes of a long rollout over those of a short one, of a step over a state's."""
    short, long = (temporary_bytes(problem, length) for length in (_SHORT, _LONG))
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(problem.state))
    told = {"unit": "B", "ours": long, "rival": short, "ratio": long / short}
    growth = (long - short) / (_LONG - _SHORT)
    step = {"unit": "B", "ours": growth, "rival": state, "ratio": growth / state}
    return [
        {"what": f"{name}, memory: {_LONG} steps over {_SHORT}", **told},
        {"what": f"{name}, memory: a further step over its state", **step}
        | {"goal": _GROWTH},
    ]


def measure(name: str, given: Any) -> tuple[list[Row], dict[str, Any]]:
    """Rows and facts of one problem."""
    problem = PROBLEMS[name](given)
    ours = Ours(problem, given.length)
    states = np.asarray(ours.rollout())
    facts: dict[str, Any] = {
        "parameters": trees.count(problem.params),
        "batch": states.shape[1],
        "compile_seconds": ours.compile_seconds,
        "error.steps": check_equal(states, ours.rollout_in_steps(), _TOLERANCE),
    }
    contenders: dict[str, Callable[[], Seconds]] = {
        "ours": lambda: {"rollout": timed(ours.rollout)[0]},
        "steps": lambda: {"rollout": timed(ours.rollout_in_steps)[0]},
    }
    if given.no_torch:
        facts["left out"] = "--no-torch"
    else:
        contenders |= torch_rivals(
            lambda compiled: Torch(problem, given.length, compiled, given.torch_mode),
            lambda rival: check_equal(states, rival.states(), _TOLERANCE),
            facts,
        )
    times = in_turn(contenders, given.repeats)
    rows = []
    for rival, found in times.items():
        seconds = float(np.median([each["rollout"] for each in found]))
        facts[f"steps_per_second.{rival}"] = given.length / seconds
        if rival != "ours":
            rows += compare(f"{name}, over {rival}", times["ours"], found)
    return rows + memory_rows(name, problem), facts


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = options(__doc__, repeats=7)
    flags.add_argument("--problems", nargs="+", choices=PROBLEMS, default=[*PROBLEMS])
    flags.add_argument("--length", type=int, default=160, help="steps")
    flags.add_argument("--batch", type=int, help="64 of ks, 8 of torus")
    flags.add_argument("--width", type=int, help="channels; 16 of ks, 8 of torus")
    flags.add_argument("--layers", type=int, default=10, help="of ks")
    flags.add_argument("--no-torch", action="store_true")
    flags.add_argument("--torch_mode", default="default", help="of torch.compile")
    return flags


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table; writes it as JSON."""
    given = parser().parse_args(arguments)
    load, rows, facts = os.getloadavg()[0], [], {}
    for name in given.problems:
        more, found = measure(name, given)
        rows += more
        facts[name] = found
    conclude("rollouts", rows, load, given.json, length=given.length, **facts)


if __name__ == "__main__":
    main()
