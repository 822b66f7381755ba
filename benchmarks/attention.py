"""Fused attention beside XLA's, forward and backward, under every mask used here.

    python -m benchmarks.attention [--json=PATH]
    python -m benchmarks.attention --batch=2 --positions=64 --heads=4 --head-dim=16

For each case the outputs and the gradients of the fused kernel are first compared with
XLA's in float32 (a difference over a norm; what 16 bits explain is allowed), then timed
against XLA's in the same precision, in turn, in one process. Without a GPU there is no
fused kernel: then the implementation that scans over blocks of keys stands in its
place, in float32.
"""

import functools
import os
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contest import Row, Seconds, compare, conclude, in_turn, options, timed
from tmdjax.models import attention

TOLERANCES = {"float32": 1e-5, "bfloat16": 0.02}


def cases(given: Any) -> dict[str, tuple[int, int, dict[str, Any]]]:
    """(queries, key heads, options of attention) by name."""
    batch, positions = given.batch, given.positions
    lengths = np.linspace(positions // 2, positions, batch).astype(np.int32)
    padding = jnp.asarray(np.arange(positions) < lengths[:, None])
    segments = np.arange(positions) // (positions // 4)
    packed = segments[:, None] == segments
    packed = jnp.asarray(packed & np.tri(positions, dtype=bool))[None, None]
    grouped = max(1, given.heads // 4)
    return {
        "full": (positions, given.heads, {}),
        "causal, grouped queries": (positions, grouped, {"causal": True}),
        "padding": (positions, given.heads, {"mask": padding}),
        "packed rows": (positions, grouped, {"mask": packed}),
        "lengths of keys": (
            positions,
            given.heads,
            {"key_lengths": jnp.asarray(lengths)},
        ),
        "one query, lengths of keys": (
            1,
            grouped,
            {"key_lengths": jnp.asarray(lengths)},
        ),
    }


class Case:
    """One mask under one implementation: outputs, gradients, seconds."""

    def __init__(self, arrays: Any, options: dict[str, Any], implementation: str):
        self.arrays = arrays
        call = functools.partial(attention, implementation=implementation, **options)
        weights = jnp.cos(jnp.arange(arrays[0].shape[-1], dtype=jnp.float32))

        def loss(arrays: Any) -> Any:
            return jnp.sum(call(*arrays).astype(jnp.float32) * weights)

        self.forward = jax.jit(lambda arrays: call(*arrays))
        self.backward = jax.jit(jax.grad(loss))
        self.differentiable = arrays[0].shape[1] > 1  # one query is decoding

    def outputs(self) -> dict[str, Any]:
        """Of the forward pass, and the gradients of queries, keys and values."""
        found = {"forward": [self.forward(self.arrays)]}
        if self.differentiable:
            found["backward"] = list(self.backward(self.arrays))
        return found

    def __call__(self) -> Seconds:
        """Seconds of each pass."""
        found = {"forward": timed(lambda: self.forward(self.arrays))[0]}
        if self.differentiable:
            found["backward"] = timed(lambda: self.backward(self.arrays))[0]
        return found


def difference(got: Sequence[Any], want: Sequence[Any]) -> float:
    """The largest, over the norm of what is right."""
    return max(
        float(jnp.linalg.norm((a - b).astype(jnp.float32)) / jnp.linalg.norm(b))
        for a, b in zip(got, want)
    )


def rows_of(name: str, given: Any, ours: str) -> list[Row]:
    """Errors and times of one case."""
    queries, key_heads, options = cases(given)[name]
    dtype = jnp.dtype(given.dtype)
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [
        (given.batch, queries, given.heads, given.head_dim),
        *[(given.batch, given.positions, key_heads, given.head_dim)] * 2,
    ]
    arrays = tuple(jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes))
    exact = tuple(x.astype(jnp.float32) for x in arrays)
    fast, rival = Case(arrays, options, ours), Case(arrays, options, "xla")
    want = Case(exact, options, "xla").outputs()
    rows: list[Row] = [
        {
            "what": f"{name}: error, {phase}",
            "unit": "",
            "ours": difference(got, want[phase]),
            "rival": difference(rival.outputs()[phase], want[phase]),
            "goal": TOLERANCES[given.dtype],
        }
        for phase, got in fast.outputs().items()
    ]
    times = in_turn({"ours": fast, "rival": rival}, given.repeats)
    goals = {"forward": 1.0, "backward": 1.0} if ours == "cudnn" else {}
    what = f"{name}: {ours} / xla"
    return rows + compare(what, times["ours"], times["rival"], goals)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table; writes it as JSON."""
    on_gpu = jax.default_backend() == "gpu"
    flags = options(__doc__, repeats=7)
    flags.add_argument("--batch", type=int, default=8)
    flags.add_argument("--positions", type=int, default=2048)
    flags.add_argument("--heads", type=int, default=16)
    flags.add_argument("--head-dim", type=int, default=64)
    flags.add_argument(
        "--dtype", choices=TOLERANCES, default="bfloat16" if on_gpu else "float32"
    )
    given = flags.parse_args(arguments)
    load, facts = os.getloadavg()[0], {}
    rows: list[Row] = []
    ours = "cudnn" if on_gpu else "blocks"
    for name in cases(given):
        try:
            rows += rows_of(name, given, ours)
        except Exception as error:  # a mask without a kernel hides no other's figures
            facts[f"failed: {name}"] = f"{type(error).__name__}: {error}"[:400]
    sizes = {k: v for k, v in vars(given).items() if k != "json"}
    conclude("attention", rows, load, given.json, ours=ours, **sizes, **facts)
    if facts:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
