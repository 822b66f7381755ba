"""Sampling in one compiled program, beside the same network in PyTorch.

    python -m benchmarks.sampler [--json=PATH]
    python -m benchmarks.sampler --recipe=fp32 --hidden=192 --depth=4 --heads=3
        --steps=10 --batches 8 1

The network is a DiT of 12 blocks of width 768 on 32 x 32 x 4 latents in patches of 2
(256 positions, 128 M parameters, random weights), in bfloat16; a sample is 50 Euler
steps. Ours is one jitted scan (``flows.endpoints``). The rivals, on the same weights
and noise:

steps      ours, one jitted step at a time, called from a Python loop
eager      PyTorch with its scaled dot-product attention, one call a step
compiled   the same under torch.compile (pip install 'tmdjax[parity]')

The samples are compared first. Contenders run in turn, in random order, in one process;
a ratio is the median over repeats of ours over the rival's seconds in the same repeat,
so below 1 is faster. Run it alone.
"""

import argparse
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
from tmdjax import flows, models, train
from tmdjax.core import trees

# Of the difference of samples, over the norm of one of them.
_TOLERANCES = {"fp32": 1e-4, "bf16": 0.05}
# On a GPU.
_GOALS = {"compiled": 1 / 1.1, "eager": 1 / 1.3}
_GOAL_OF_ONE = 1 / 3
"""Over PyTorch's compiled steps at batch 1."""


def make_network(given: Any) -> tuple[models.DiT, Any]:
    """The network of the flags, and parameters of which none is zero."""
    module = models.DiT(
        patch_size=given.patch,
        hidden=given.hidden,
        depth=given.depth,
        heads=given.heads,
        recipe=given.recipe,
        remat=False,
    )
    shapes = jax.eval_shape(
        lambda key: models.init_params(module, key, _noise(given, 1), jnp.ones(1)),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> np.ndarray:
        scale = 0.5 / np.sqrt(leaf.shape[-2]) if leaf.ndim > 1 else 0.1
        return (scale * rng.standard_normal(leaf.shape)).astype(np.float32)

    return module, jax.tree.map(draw, shapes)


def _noise(given: Any, batch: int) -> np.ndarray:
    shape = (batch, given.side, given.side, given.channels)
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


class Ours:
    """The whole walk in one program, and a step of it in another.

    Attributes:
        compile_seconds: of the whole walk.
        flops: of a sample of the batch, by its trace.
    """

    def __init__(self, module: models.DiT, params: Any, given: Any, batch: int):
        self.grid = flows.uniform_grid(given.steps)
        apply_fn = models.functional(module)
        # as a sampler keeps them: in the precision that the products take
        dtype = jnp.bfloat16 if given.recipe == "bf16" else jnp.float32
        self.params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
        self.noise = jnp.asarray(_noise(given, batch))

        def walk(params: Any, x: Any) -> Any:
            velocity = functools.partial(apply_fn, params)
            return flows.endpoints(velocity, x, self.grid, None)

        def step(params: Any, x: Any, t: Any, t_next: Any) -> Any:
            times = jnp.broadcast_to(t, x.shape[:1])
            return x - (t - t_next) * apply_fn(params, x, times, None)

        start = time.perf_counter()
        self.walk = jax.jit(walk).lower(self.params, self.noise).compile()
        self.compile_seconds = time.perf_counter() - start
        self.step = jax.jit(step, donate_argnums=1)
        counted = train.count_flops(walk, self.params, self.noise)
        self.flops = sum(counted.values())

    def sample(self) -> Any:
        """Samples [batch, height, width, channel]."""
        return self.walk(self.params, self.noise)

    def sample_in_steps(self) -> Any:
        """The same, a call a step."""
        x = self.noise + 0  # the step writes over its argument
        for t, t_next in zip(self.grid[:-1], self.grid[1:]):
            x = self.step(self.params, x, np.float32(t), np.float32(t_next))
        return x


class Torch:
    """The same walk in PyTorch; what is compiled is so when it is called first."""

    def __init__(
        self, module: models.DiT, params: Any, given: Any, batch: int, compiled: bool
    ):
        import torch

        from benchmarks import torch_dit

        self.torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        event = _noise(given, 1).shape[1:]
        network = torch_dit.DiT(module, event)
        network.load_state_dict(torch_dit.convert(params))
        dtype = torch.bfloat16 if given.recipe == "bf16" else torch.float32
        for parameter in network.parameters():  # not its tables of positions and times
            parameter.data = parameter.data.to(dtype)
        self.network: Callable[..., Any] = network.to(self.device).eval()
        self.noise = torch.tensor(_noise(given, batch), device=self.device)
        self.grid = flows.uniform_grid(given.steps).tolist()
        if compiled:
            self.network = torch.compile(network, mode=given.torch_mode)

    def sample(self) -> Any:
        """Samples [batch, height, width, channel]."""
        with self.torch.no_grad():
            x = self.noise
            for t, t_next in zip(self.grid[:-1], self.grid[1:]):
                times = self.torch.full((len(x),), t, device=self.device)
                x = x - (t - t_next) * self.network(x, times)
            return x

    def __call__(self) -> Seconds:
        """Seconds of a batch of samples."""
        return {"sample": timed_torch(self.sample)[0]}


def measure(given: Any, batch: int) -> tuple[list[Row], dict[str, Any]]:
    """Rows and facts of one batch size."""
    module, params = make_network(given)
    ours = Ours(module, params, given, batch)
    samples, most = ours.sample(), _TOLERANCES[given.recipe]
    facts: dict[str, Any] = {
        "parameters": trees.count(params),
        "compile_seconds": ours.compile_seconds,
        "error.steps": check_equal(samples, ours.sample_in_steps(), most),
    }
    contenders: dict[str, Callable[[], Seconds]] = {
        "ours": lambda: {"sample": timed(ours.sample)[0]},
        "steps": lambda: {"sample": timed(ours.sample_in_steps)[0]},
    }
    contenders |= torch_rivals(
        lambda compiled: Torch(module, params, given, batch, compiled),
        lambda rival: check_equal(samples, rival.sample().float().cpu(), most),
        facts,
    )
    times = in_turn(contenders, given.repeats)
    seconds = float(np.median([each["sample"] for each in times["ours"]]))
    facts["images_per_second"] = batch / seconds
    facts["TFLOP_per_second"] = ours.flops / seconds / 1e12
    rows = []
    for name in contenders:
        if name == "ours":
            continue
        goal = _GOAL_OF_ONE if batch == 1 and name == "compiled" else _GOALS.get(name)
        goal = goal if jax.default_backend() == "gpu" else None
        what = f"batch {batch}, over {name}"
        rows += compare(
            what, times["ours"], times[name], {"sample": goal} if goal else {}
        )
    return rows, facts


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = options(__doc__, repeats=7)
    flags.add_argument("--hidden", type=int, default=768)
    flags.add_argument("--depth", type=int, default=12)
    flags.add_argument("--heads", type=int, default=12)
    flags.add_argument("--side", type=int, default=32)
    flags.add_argument("--channels", type=int, default=4)
    flags.add_argument("--patch", type=int, default=2)
    flags.add_argument("--steps", type=int, default=50)
    flags.add_argument("--batches", type=int, nargs="+", default=[64, 1])
    flags.add_argument("--recipe", default="bf16", choices=sorted(_TOLERANCES))
    flags.add_argument("--torch_mode", default="default", help="of torch.compile")
    return flags


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table; writes it as JSON."""
    given = parser().parse_args(arguments)
    load = os.getloadavg()[0]
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    for batch in given.batches:
        more, found = measure(given, batch)
        rows += more
        facts[f"batch {batch}"] = found
    conclude("sampler", rows, load, given.json, **facts)


if __name__ == "__main__":
    main()
