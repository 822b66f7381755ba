"""What drawing tokens costs, beside memory bandwidth and transformers.

    python -m benchmarks.decode [--shapes tiny] [--slots 16] [--json=PATH]
    python -m benchmarks.decode --shapes 0.5B 1.5B 7B --slots 64 256 --dtype bfloat16

For each shape of a decoder (random weights) and number of slots, all at work:

step      seconds a step of all slots, sampling with log-probs, in chunks; its share of
          the roofline is (bytes of weights + of keys and values up to each position) /
          (measured bandwidth of a large copy) over that time.
refill    the same tokens as many short texts, which leave and enter slots all the time,
          over one long chunk.
transformers  seconds a step of its decoding of the same shape with a static cache under
          torch.compile (pip install 'tmdjax[parity]'), greedy.

The rival and ours run in turn, in one process. Run it alone.
"""

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contest import Row, Seconds, compare, conclude, in_turn, options, timed
from tmdjax import generation, models
from tmdjax.core import trees
from tmdjax.generation import slots as slots_module

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 32,
    },
    "0.5B": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_layers": 24,
        "num_heads": 14,
        "num_kv_heads": 2,
        "head_dim": 64,
        "tied_embedding": True,
    },
    "1.5B": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_layers": 28,
        "num_heads": 12,
        "num_kv_heads": 2,
        "head_dim": 128,
        "tied_embedding": True,
    },
    "7B": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_layers": 28,
        "num_heads": 28,
        "num_kv_heads": 4,
        "head_dim": 128,
    },
}
START, STEPS = 128, 64
"""Where the slots stand, and how many steps are timed."""
LENGTH = 512
GOALS = {"0.5B": 0.45, "7B": 0.6}
"""Shares of the roofline on an H100."""


def bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 256 MB."""
    x = jnp.zeros(2**26, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    copy(x).block_until_ready()
    return 2 * x.nbytes / min(timed(functools.partial(copy, x))[0] for _ in range(10))


class Ours:
    """A chunk of steps of all slots."""

    def __init__(self, config: models.DecoderConfig, count: int):
        self.config, self.count = config, count
        self.model = generation.cached_decoder(config)
        self.params = jax.jit(
            lambda key: models.prepare_weights(
                models.fuse_projections(_parameters(config, key)), config
            )
        )(jax.random.key(0))
        slots = slots_module.init_slots(self.model, count, LENGTH)
        self.state = dataclasses.replace(
            slots,
            position=jnp.full(count, START),
            active=jnp.ones(count, bool),
            remaining=jnp.full(count, 2**30),
        )
        sampling = generation.Sampling()
        self.program = jax.jit(
            lambda params, state: slots_module.generate(
                self.model, params, state, STEPS, sampling
            ),
            donate_argnums=1,
        )

    def bytes_a_step(self) -> int:
        """Weights, and keys and values up to the middle of the chunk."""
        cache = models.cache_bytes(self.config, self.count, START + STEPS // 2)
        embedding = 0 if self.config.tied_embedding else self.params["embedding"].nbytes
        return trees.nbytes(self.params) - embedding + cache

    def __call__(self) -> Seconds:
        """Seconds a step."""
        start = jnp.full(self.count, START)
        self.state = dataclasses.replace(self.state, position=start)
        call = functools.partial(self.program, self.params, self.state)
        seconds, (self.state, _) = timed(call)
        return {"step": seconds / STEPS}

    def refilled(self, short: int = 16) -> float:
        """Seconds a step where every text is 16 tokens long."""
        config = generation.EngineConfig(
            slots=self.count, length=LENGTH, steps=short, prefill_rows=8
        )
        engine = generation.Engine(self.model, self.params, config, jax.random.key(0))
        prompt = np.arange(START) % self.config.vocab_size

        def run(first: int) -> None:
            for i in range(self.count * STEPS // short):
                group = (i // 8) % self.config.vocab_size  # eight texts a prompt
                engine.submit([first + i], [*prompt[:-1], group], max_new_tokens=short)
            engine.run()

        run(0)
        return timed(lambda: run(10**6))[0] / STEPS


def _parameters(config: models.DecoderConfig, key: Any) -> Any:
    return models.init_params(
        models.Decoder(config), key, jax.ShapeDtypeStruct((1, 8), jnp.int32)
    )


def rival(config: models.DecoderConfig, count: int) -> Callable[[], Seconds]:
    """Seconds a step of transformers with a static cache, compiled."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if config.recipe.name == "bf16" else torch.float32
    theirs = transformers.Qwen2Config(
        **{k: v for k, v in config.to_hf().items() if k != "architectures"}
    )
    with torch.device(device):
        model = transformers.Qwen2ForCausalLM(theirs).to(dtype).eval()
    cache = transformers.StaticCache(config=theirs, max_cache_len=LENGTH)
    model.forward = torch.compile(
        model.forward, mode="reduce-overhead" if device == "cuda" else "default"
    )
    prompt = torch.zeros(count, START, dtype=torch.long, device=device)

    @torch.no_grad()
    def run() -> Seconds:
        cache.reset()
        where = torch.arange(START, device=device)
        out = model(prompt, past_key_values=cache, cache_position=where)
        token = out.logits[:, -1:].argmax(-1)

        def steps() -> None:
            nonlocal token
            for i in range(STEPS):
                at = torch.tensor([START + i], device=device)
                out = model(token, past_key_values=cache, cache_position=at)
                token = out.logits[:, -1:].argmax(-1)
            if device == "cuda":
                torch.cuda.synchronize()

        return {"step": timed(steps)[0] / STEPS}

    return run


def rows_of(
    name: str, count: int, recipe: str, repeats: int, notes: dict[str, str]
) -> list[Row]:
    """Of one shape and number of slots."""
    config = models.DecoderConfig(**SHAPES[name], recipe=recipe, qkv_bias=True)
    config = dataclasses.replace(config, remat=False)
    ours = Ours(config, count)
    contenders: dict[str, Callable[[], Seconds]] = {"ours": ours}
    if importlib.util.find_spec("transformers") is None:
        notes["transformers"] = "not installed: pip install 'tmdjax[parity]'"
    else:
        contenders["transformers"] = rival(config, count)
    found = in_turn(contenders, repeats)
    step = min(one["step"] for one in found["ours"])
    what = f"{name}, {count} slots"
    rows: list[Row] = [
        {"what": f"{what}: tokens", "unit": "1/s", "ours": count / step},
        {
            "what": f"{what}: share of the roofline",
            "unit": "",
            "ours": ours.bytes_a_step() / bandwidth() / step,
            "goal": GOALS.get(name),
            "better": "greater",
        },
    ]
    refilled = ours.refilled()
    rows.append(
        {
            "what": f"{what}: refilled every 16 tokens / never",
            "unit": "s",
            "ours": refilled,
            "rival": step,
            "ratio": refilled / step,
            "goal": 1.05,
        }
    )
    if "transformers" in found:
        rows += compare(
            f"{what}, ours / transformers",
            found["ours"],
            found["transformers"],
            {"step": 0.5},
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    flags = options(__doc__, repeats=5)
    flags.add_argument("--shapes", nargs="+", choices=SHAPES, default=["tiny"])
    flags.add_argument("--slots", nargs="+", type=int, default=[16])
    flags.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    given = flags.parse_args(arguments)
    load, notes = os.getloadavg()[0], dict[str, str]()
    recipe = {"float32": "fp32", "bfloat16": "bf16"}[given.dtype]
    rows: list[Row] = []
    for name in given.shapes:
        for count in given.slots:
            rows += rows_of(name, count, recipe, given.repeats, notes)
    conclude(
        "decode",
        rows,
        load,
        given.json,
        dtype=given.dtype,
        repeats=given.repeats,
        **notes,
    )


if __name__ == "__main__":
    main()
