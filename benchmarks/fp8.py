"""What 8-bit products cost beside bf16: alone, in a training step, in decoding.

    python -m benchmarks.fp8 [--json=PATH]                                 (on a CPU)
    python -m benchmarks.fp8 --products 4096x4096x4096 16384x3584x18944 --shape=7B \
        --layers=4 --batch=8 --positions=2048 --slots=64 --repeats=5

self-test   the device rounds to 8 bits, and the block-scaled kernel for Hopper GPUs
            multiplies known numbers without an error in a bit. Elsewhere the kernel is
            interpreted.
product     seconds of m x k by k x n, operands quantised before, result in bfloat16;
            and the largest error of its sums over the largest sum, both beside the
            product of the dequantised numbers in float32.
step        seconds of a step of gradient descent of a decoder, by recipes whose rows
            do not meet.
decode      seconds of a step of all slots of that decoder, sampling with log-probs.

Ratios are of bf16's seconds, in one process, in turn. The recipes that XLA computes
come first, and what they gave is written before the kernel, which no GPU has run yet,
is tried. A device without 8-bit products computes the same numbers in float32: the file
then says 'emulated', and no goal stands beside its ratios. Triton's products are
switched off in XLA: of 8-bit operands they compile for minutes and are no faster.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_triton_gemm=false"
)

import jax
import jax.numpy as jnp

from benchmarks.contest import (
    Contender,
    Row,
    Seconds,
    compare,
    conclude,
    in_turn,
    options,
    timed,
    write,
)
from benchmarks.decode import SHAPES, Ours
from tmdjax import models, quant
from tmdjax.core import compilation_cache

KERNEL = "fp8_block by the kernel"
RECIPES: dict[str, Any] = {
    **{
        name: quant.RECIPES[name] for name in ("fp8_tensor", "fp8_rowwise", "fp8_block")
    },
    KERNEL: quant.fp8_recipe("fp8_block_by_kernel", "block", kernel="hopper"),
}
GOALS = {
    "product": {"fp8_tensor": 1 / 1.9, "fp8_rowwise": 1 / 1.5, KERNEL: 1 / 1.3},
    "step": {"fp8_rowwise": 1 / 1.41, KERNEL: 1 / 1.41},
    "decode": {"fp8_rowwise": 1 / 1.5, KERNEL: 1 / 1.5},
}
"""Most of bf16's seconds on an H100, at the sizes of a model of 7 B parameters."""

LARGEST_ERROR = 1e-3
"""Of the kernel: a tensor core keeps about 14 bits of a sum of 128 products."""

CALLS = 10  # of a product, timed together
VOCABULARY = 1024  # small: what is compared are the blocks


def self_test() -> tuple[Row, str]:
    """Whether the kernel multiplies known numbers, and what there is to say of it."""
    quant.check_rounding()
    by_kernel = quant.is_hopper(jax.devices()[0])
    told = "passed" if by_kernel else "passed, interpreted: this is no Hopper GPU"
    try:
        if by_kernel:
            quant.check_kernel()
        else:
            interpreted = functools.partial(quant.block_product, interpret=True)
            quant.check_kernel(jax.jit(interpreted), (120, 160, 100))
    except Exception as fault:  # its own message, or one of the compiler of kernels
        told = f"failed: {type(fault).__name__}: {fault}"[:400]
    wrong = float(told.startswith("failed"))
    return {"what": "failures of the kernel's self-test", "unit": "", "ours": wrong,
            "goal": 0.0}, told  # fmt: skip


def product(m: int, k: int, n: int) -> Callable[[str], tuple[Contender, float]]:
    """By recipe: a contender, and the largest error beside the largest number."""
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
    w = jax.random.normal(keys[1], (k, n), jnp.bfloat16)

    def made(name: str) -> tuple[Contender, float]:
        given: tuple[Any, Any] = (x, w)
        error = 0.0
        if name == "bf16":
            call: Any = jax.jit(functools.partial(quant.linear, recipe="bf16"))
        else:
            kernel = "hopper" if name == KERNEL else "xla"
            scaling = quant.SCALINGS[name.split()[0].removeprefix("fp8_")]
            given = quant.quantise(x, scaling.x), quant.quantise(w, scaling.w)
            multiply = functools.partial(quant.multiply, kernel=kernel)
            call = jax.jit(functools.partial(multiply, dtype=jnp.bfloat16))
            error = float(_error(multiply, *given))

        def run() -> Seconds:
            def calls() -> Any:
                return [call(*given) for _ in range(CALLS)][-1]

            return {"product": timed(calls)[0] / CALLS}

        return run, error

    return made


@functools.partial(jax.jit, static_argnums=0)
def _error(multiply: Any, a: quant.Quantised, b: quant.Quantised) -> Any:
    highest = jax.lax.Precision.HIGHEST
    exact = jax.lax.dot(a.dequantise(), b.dequantise(), precision=highest)
    return jnp.abs(multiply(a, b) - exact).max() / jnp.abs(exact).max()


def step(sizes: Any, batch: int, positions: int) -> Callable[[str], Contender]:
    """By recipe: a step of gradient descent of a decoder."""

    def made(name: str) -> Contender:
        config = models.DecoderConfig(**sizes, recipe=RECIPES.get(name, name))
        network = models.Decoder(config)
        tokens = jax.random.randint(
            jax.random.key(1), (batch, positions), 0, VOCABULARY
        )
        params = models.init_params(network, jax.random.key(0), tokens[:1, :8])
        apply = models.functional(network)

        def loss(params: Any, tokens: Any) -> Any:
            log_probs = models.token_log_probs(apply(params, tokens), tokens)
            return -log_probs[:, 1:].mean()

        @functools.partial(jax.jit, donate_argnums=0)
        def descend(params: Any, tokens: Any) -> Any:
            gradient = jax.grad(loss)(params, tokens)
            return jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradient)

        def run() -> Seconds:
            nonlocal params
            seconds, params = timed(lambda: descend(params, tokens))
            return {"step": seconds}

        return run

    return made


def decode(sizes: Any, slots: int) -> Callable[[str], Contender]:
    """By recipe: a step of all slots."""

    def made(name: str) -> Contender:
        recipe = RECIPES.get(name, name)
        config = models.DecoderConfig(**sizes, recipe=recipe, remat=False)
        ours = Ours(config, slots)
        return lambda: {"decode": ours()["step"]}

    return made


def rows_of(given: Any, names: Sequence[str], emulated: bool) -> list[Row]:
    """Rows of some recipes beside bf16."""
    rows: list[Row] = []

    def race(what: str, contenders: dict[str, Contender]) -> None:
        found = in_turn(contenders, given.repeats)
        for name in [name for name in contenders if name != "bf16"]:
            (phase,) = found[name][0]
            goal = None if emulated else GOALS[phase].get(name)
            goals = {} if goal is None else {phase: goal}
            title = f"{what}, {name} / bf16"
            rows.extend(compare(title, found[name], found["bf16"], goals))

    for size in given.products:
        made = {n: product(*map(int, size.split("x")))(n) for n in ("bf16", *names)}
        for name in names:
            goal = {"goal": LARGEST_ERROR} if name == KERNEL else {}
            what = f"{size}, {name}: largest error"
            rows.append({"what": what, "unit": "", "ours": made[name][1], **goal})
        race(size, {name: run for name, (run, _) in made.items()})
    # Layers of 'fp8_block' as XLA computes it, in float32, would take most of the time.
    block = ("fp8_block",) if emulated else ()
    layered = [n for n in ("bf16", *names) if n in ("bf16", *GOALS["step"], *block)]
    sizes = SHAPES[given.shape] | {"vocab_size": VOCABULARY, "num_layers": given.layers}
    what = f"{given.shape}, {given.layers} layers"
    train = step(sizes, given.batch, given.positions)
    race(what, {name: train(name) for name in layered})
    draw = decode(sizes, given.slots)
    race(what, {name: draw(name) for name in layered})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table; writes it as JSON before the kernel is tried, and after."""
    flags = options(__doc__, repeats=3)
    flags.add_argument("--products", nargs="+", default=["128x128x128"])
    flags.add_argument("--shape", choices=SHAPES, default="tiny")
    flags.add_argument("--layers", type=int, default=1)
    flags.add_argument("--batch", type=int, default=2)
    flags.add_argument("--positions", type=int, default=16)
    flags.add_argument("--slots", type=int, default=2)
    given = flags.parse_args(arguments)
    compilation_cache.enable()
    device, load = jax.devices()[0], os.getloadavg()[0]
    emulated = not quant.has_fp8(device)
    sizes = {k: v for k, v in vars(given).items() if k != "json"}
    told = {"name": "fp8", "load": load, "path": given.json, **sizes}
    told["emulated"] = emulated
    rows = rows_of(given, [name for name in RECIPES if name != KERNEL], emulated)
    write(rows=rows, **told)
    row, told["kernel"] = self_test()
    rows.append(row)
    if quant.is_hopper(device) and told["kernel"] == "passed":
        rows += rows_of(given, [KERNEL], emulated)
    conclude(rows=rows, **told)


if __name__ == "__main__":
    main()
