"""What the runner costs over the bare jitted step.

    python -m benchmarks.runner [--config=configs/flow_matching.py:cpu] [--steps=100]

Both run the same compiled step on the same data iterator's batches, in turn, in one
process; the bare loop takes its batches from memory. The runner's share holds data,
logs, progress and checkpoints.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

import jax

from experiments import flow_matching, image_quality
from tmdjax import data, train
from tmdjax.harness import StageContext, load_config
from tmdjax.harness.environment import device_name


def main() -> None:
    """Prints one JSON line."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--config", default="configs/flow_matching.py:cpu")
    flags.add_argument("--steps", type=int, default=100)
    flags.add_argument("--repeats", type=int, default=3)
    given = flags.parse_args()
    config: Any = load_config(given.config)
    dataset = image_quality.load_data(config)
    key = jax.random.key(0)
    state, step, _ = flow_matching.training(config, key)
    initial = jax.device_get(state)
    step, state, place = train.jit_train_step(step, state, train.make_mesh())

    def iterator() -> Any:
        return data.in_memory(dataset.train, config.train.batch_size)

    batches = [place(next(iterator())) for _ in range(8)]
    state, metrics = step(state, batches[0], key)  # compiles
    jax.block_until_ready(metrics)

    def bare() -> float:
        state = jax.device_put(initial)
        start = time.perf_counter()
        metrics = None
        for i in range(given.steps):
            state, metrics = step(state, batches[i % len(batches)], key)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - start

    def runner() -> float:
        with tempfile.TemporaryDirectory() as folder:
            context = StageContext("train", 0, {}, pathlib.Path(folder), lambda: False)
            state = jax.device_put(initial)
            start = time.perf_counter()
            state = context.fit(
                state,
                step,
                iterator(),
                num_steps=given.steps,
                place=place,
                log_every=config.train.log_every,
            )
            jax.block_until_ready(state)
            return time.perf_counter() - start

    times = [(bare(), runner()) for _ in range(given.repeats)]
    ratios = [with_runner / alone for alone, with_runner in times]
    print(
        json.dumps(
            {
                "benchmark": "runner",
                "config": given.config,
                "steps": given.steps,
                "device": device_name(),
                "bare_ms_per_step": 1e3 * min(t for t, _ in times) / given.steps,
                "runner_ms_per_step": 1e3 * min(t for _, t in times) / given.steps,
                "ratio_median": statistics.median(ratios),
                "ratios": ratios,
            }
        )
    )


if __name__ == "__main__":
    main()
