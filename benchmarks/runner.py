"""What the runner costs over the bare jitted step.

    python -m benchmarks.runner [--config=configs/flow_matching.py:cpu] [--steps=100]

Both run the same compiled step on the same data iterator's batches, in turn, in random
order, in one process; the bare loop takes its batches from memory. The runner's share
holds data, logs, progress and checkpoints; the ratio is the runner over the bare loop.
"""

import os
import pathlib
import tempfile
from typing import Any

import jax

from benchmarks.contest import compare, conclude, in_turn, options, timed
from experiments import flow_matching, image_quality
from tmdjax import data, train
from tmdjax.harness import StageContext, load_config


def main() -> None:
    """Prints the table; writes it as JSON."""
    flags = options(__doc__, repeats=3)
    flags.add_argument("--config", default="configs/flow_matching.py:cpu")
    flags.add_argument("--steps", type=int, default=100)
    given = flags.parse_args()
    load = os.getloadavg()[0]
    config: Any = load_config(given.config)
    dataset = image_quality.load_data(config)
    key = jax.random.key(0)
    training = flow_matching.training(config)
    state, step = training.begin(key), training.step()
    initial = jax.device_get(state)
    step, state, place = train.jit_train_step(step, state, train.make_mesh())

    def iterator() -> Any:
        return data.in_memory(dataset.train, config.train.batch_size)

    batches = [place(next(iterator())) for _ in range(8)]
    state, metrics = step(state, batches[0], key)  # compiles
    jax.block_until_ready(metrics)

    def bare() -> Any:
        state, metrics = jax.device_put(initial), None
        for i in range(given.steps):
            state, metrics = step(state, batches[i % len(batches)], key)
        return state, metrics

    def runner() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            context = StageContext("train", 0, {}, pathlib.Path(folder), lambda: False)
            return context.fit(
                jax.device_put(initial),
                step,
                iterator(),
                num_steps=given.steps,
                place=place,
                log_every=config.train.log_every,
            )

    contenders = {"ours": runner, "bare": bare}
    found = in_turn(
        {n: lambda fn=fn: {"seconds": timed(fn)[0]} for n, fn in contenders.items()},
        given.repeats,
    )
    conclude(
        "runner",
        compare(f"{given.steps} steps", found["ours"], found["bare"]),
        load,
        given.json,
        config=given.config,
        steps=given.steps,
    )


if __name__ == "__main__":
    main()
