"""What a whole step-size search costs over its own network calls, and its memory.

    python -m benchmarks.boss_search
    python -m benchmarks.boss_search --model=unet --side=256 --channels=3 \
        --samples=12 --repeats=1

The rival is a scan of the same network over the same batches and times that keeps
nothing. The search keeps states and velocities, makes the cost matrix and solves the
dynamic programme for every budget. Both run in turn, in random order, in one process,
compiled before; the ratio is the search over its network calls.
"""

import functools
import os
import resource
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contest import compare, conclude, in_turn, options, timed
from tmdjax import flows, models
from tmdjax.core import prng
from tmdjax.systems import boss

NETWORKS: dict[str, dict[str, Any]] = {
    "dit": {"name": "dit", "patch_size": 2, "hidden": 128, "depth": 4, "heads": 4},
    "unet": {
        "name": "unet",
        "width": 8,
        "multipliers": (1, 1, 1, 2, 2),
        "blocks": 1,
        "attention_levels": (),
    },
}


def main() -> None:
    """Prints the table; writes it as JSON."""
    flags = options(__doc__, repeats=5)
    flags.add_argument("--model", default="dit", choices=NETWORKS)
    flags.add_argument("--side", type=int, default=8)
    flags.add_argument("--channels", type=int, default=1)
    flags.add_argument("--samples", type=int, default=100)
    flags.add_argument("--knots", type=int, default=100)
    flags.add_argument("--memory_limit_gb", type=float, default=2.0)
    given = flags.parse_args()
    load = os.getloadavg()[0]
    shape = (given.side, given.side, given.channels)
    limit = given.memory_limit_gb * 1e9
    each = flows.cost_memory(shape, given.knots)
    batch = max(1, min(given.samples, int(limit // each)))
    module = models.build({**NETWORKS[given.model], "num_classes": 10})
    labels = jnp.arange(given.samples, dtype=jnp.int32) % 10
    keys = prng.sample_keys(jax.random.key(0), given.samples)
    x, t = jnp.zeros((1, *shape)), jnp.zeros(1)
    params = models.init_params(module, jax.random.key(1), x, t, labels[:1])
    # away from a zero-initialised output, so that trajectories are curved
    params = jax.tree.map(
        lambda p: p + 0.02 * jax.random.normal(jax.random.key(2), p.shape), params
    )
    velocity = functools.partial(models.functional(module), params)
    times = jnp.linspace(1.0, 0.0, given.knots + 1)

    @jax.jit
    def calls(velocity: Any, x: Any, cond: Any) -> Any:
        def call(x: Any, t: Any) -> tuple[Any, None]:
            v = velocity(x, jnp.broadcast_to(t, x.shape[:1]), cond)
            return x - v / given.knots, None

        return jax.lax.scan(call, x, times[:-1])[0]

    def network_alone() -> None:
        for first in range(0, given.samples, batch):
            rows = np.arange(first, first + batch) % given.samples
            noise = prng.normal(keys[rows], shape)
            calls(flows.as_pytree(velocity), noise, labels[rows]).block_until_ready()

    def search() -> None:
        boss.search(
            velocity,
            keys,
            shape,
            8,
            labels,
            knots=given.knots,
            memory_limit=limit,
        )

    contenders = {"ours": search, "calls": network_alone}
    found = in_turn(
        {n: lambda fn=fn: {"seconds": timed(fn)[0]} for n, fn in contenders.items()},
        given.repeats,
    )
    conclude(
        "boss_search",
        compare("search over its network calls", found["ours"], found["calls"]),
        load,
        given.json,
        model=given.model,
        shape=shape,
        samples=given.samples,
        knots=given.knots,
        trajectories_at_a_time=batch,
        estimated_gb=batch * each / 1e9,
        peak_host_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    )


if __name__ == "__main__":
    main()
