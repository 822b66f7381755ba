"""A forward of the video transformer beside that of diffusers, and a student's sample.

    python -m benchmarks.video [--json=PATH]
    python -m benchmarks.video --depth=2 --heads=2 --grid 2 8 8 --recipe=fp32 --head=1

The network is Wan 2.1's of 1.3 B parameters (random weights, the same in both), the
video 21 x 60 x 104 latents of 16 channels: 32,760 positions, 512 of text. The rival
(pip install 'tmdjax[parity]') is WanTransformer3DModel in the same precision under
torch.compile, with PyTorch's scaled dot-product attention; eager where it does not
compile. The outputs are compared first. Both run in turn, in random order, in one
process; a ratio is the median over repeats of ours over the rival's in the same repeat.

A TMD student of the same network (2 outer steps, 2 inner ones, the last --head blocks)
is timed against its effective evaluations, 2 (1 + H / L) forwards in the same repeat.
What it takes beyond them are fusion and embeddings, whose FLOPs are counted.

Memory, weights included, inputs held: the peak of each library's own allocator over one
forward where the device tells (its first calls, with compilation and autotuning, do not
count for the rival and do for ours), and what our compiled program asks for.

Run it alone.
"""

import argparse
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
)
from tmdjax import models, train
from tmdjax.core import prng, trees
from tmdjax.models.checkpoints import video_dit as hf_video_dit
from tmdjax.systems import tmd

# Of the difference of outputs, over the norm of one of them.
_TOLERANCES = {"fp32": 1e-4, "bf16": 0.05}
_TIME = 0.7


def make_network(given: Any) -> models.VideoDiT:
    """The network of the flags."""
    return models.VideoDiT(
        heads=given.heads,
        head_dim=given.head_dim,
        depth=given.depth,
        mlp_width=given.mlp_width,
        text_width=given.text_width,
        recipe=given.recipe,
        attention_implementation=given.attention,
    )


def make_tensors(module: models.VideoDiT, channels: int) -> dict[str, np.ndarray]:
    """Random weights under the rival's names, float32; nothing starts at 0 or 1."""
    rng = np.random.default_rng(0)
    tensors = {}
    for leaf in hf_video_dit.checkpoint_leaves(module, channels):
        for name in leaf.names:
            draw = rng.standard_normal(leaf.shape, np.float32)
            if leaf.path.endswith("kernel"):
                draw /= np.sqrt(np.prod(leaf.shape[1:]), dtype=np.float32)
            else:
                draw *= np.float32(0.1)
            tensors[name] = draw + np.float32(leaf.path.endswith("scale"))
    return tensors


def make_inputs(given: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A video, its time and its text: three quarters of it words, the rest zero."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((given.batch, *given.grid, given.channels), np.float32)
    shape = (given.batch, given.text_length, given.text_width)
    text = rng.standard_normal(shape, np.float32)
    text[:, 3 * given.text_length // 4 :] = 0
    return x, np.full(given.batch, _TIME, np.float32), text


def operations(module: models.VideoDiT, given: Any) -> float:
    """Multiplications and additions of a forward, norms and such left out."""
    volume = int(np.prod(module.patch_size))
    positions = int(np.prod(given.grid)) // volume
    width, text = module.width, given.text_length
    dense = positions * (6 * width**2 + 2 * width * module.mlp_width)
    dense += text * 2 * width**2
    attention = 2 * positions * (positions + text) * width
    ends = 2 * positions * width * volume * given.channels
    return 2.0 * given.batch * (module.depth * (dense + attention) + ends)


class Ours:
    """A forward of ours, compiled."""

    def __init__(self, module: models.VideoDiT, tensors: Any, given: Any):
        dtype = jnp.bfloat16 if module.recipe.name == "bf16" else np.float32
        params = hf_video_dit.params_from_hf_video(
            module, given.channels, tensors, dtype
        )
        self.arguments = jax.device_put((params, *make_inputs(given)))
        lowered = jax.jit(models.functional(module)).lower(*self.arguments)
        start = time.perf_counter()
        self.compiled: Any = lowered.compile()
        self.compile_seconds = time.perf_counter() - start

    def run(self) -> Any:
        """The velocity."""
        return self.compiled(*self.arguments)

    def __call__(self) -> Seconds:
        """Seconds of a forward."""
        return {"forward": timed(self.run)[0]}

    def memory(self) -> int:
        """Bytes that the program asks for, weights and inputs included."""
        found = self.compiled.memory_analysis()
        return (
            found.argument_size_in_bytes
            + found.output_size_in_bytes
            + found.temp_size_in_bytes
            - found.alias_size_in_bytes
        )


class Diffusers:
    """A forward of WanTransformer3DModel; eager where it does not compile."""

    def __init__(
        self, module: models.VideoDiT, tensors: Any, given: Any, compiled: bool
    ):
        import diffusers
        import torch

        self.torch = torch
        self.name = f"diffusers {diffusers.__version__}, torch {torch.__version__}"
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if module.recipe.name == "bf16" else torch.float32
        config = hf_video_dit.video_dit_to_hf(module, given.channels)
        kind = diffusers.WanTransformer3DModel
        with torch.device("meta"):
            model = kind(**{k: v for k, v in config.items() if k[0] != "_"})
        # What it keeps in float32 as it loads a checkpoint.
        kept = kind._keep_in_fp32_modules or ()
        state = {
            name: torch.from_numpy(tensor).to(
                self.device,
                torch.float32 if any(part in name for part in kept) else dtype,
            )
            for name, tensor in tensors.items()
        }
        model.load_state_dict(state, assign=True)
        # Buffers have no values on the meta device; they are not in a checkpoint.
        model.rope = type(model.rope)(
            module.head_dim, module.patch_size, module.rope_length
        )
        model = model.to(self.device).eval()
        x, t, text = (torch.from_numpy(each) for each in make_inputs(given))
        self.arguments = (
            x.permute(0, 4, 1, 2, 3).to(self.device, dtype),
            (module.time_scale * t).to(self.device),
            text.to(self.device, dtype),
        )
        self.model: Callable[..., Any] = model
        start = time.perf_counter()
        if compiled:
            try:
                self.model = torch.compile(model, mode=given.torch_mode)
                self()
                self.name += f", compiled ({given.torch_mode})"
            except Exception as error:  # whatever its compiler stumbles over
                reason = (str(error).strip().splitlines() or [""])[0]
                self.name += f", eager ({type(error).__name__}: {reason})"
                self.model = model
        else:
            self.name += ", eager"
        self()
        self.compile_seconds = time.perf_counter() - start

    def run(self) -> Any:
        """The velocity, as it gives it."""
        with self.torch.no_grad():
            return self.model(*self.arguments, return_dict=False)[0]

    def __call__(self) -> Seconds:
        """Seconds of a forward."""
        return {"forward": timed_torch(self.run)[0]}

    def memory(self) -> int | None:
        """Peak bytes of a forward, weights and inputs included; None on a CPU."""
        if self.device != "cuda":
            return None
        self.torch.cuda.reset_peak_memory_stats()
        self()
        return self.torch.cuda.max_memory_allocated()


class Student:
    """Samples of a TMD student, compiled, and as many forwards as its NFE says."""

    def __init__(self, module: models.VideoDiT, ours: Ours, given: Any):
        network = models.SplitDiT(module, head_blocks=given.head)
        apply_fn = models.functional(network)
        params, x, t, text = ours.arguments
        shapes = jax.eval_shape(
            lambda key: models.init_params(network, key, x, t, text),
            jax.eval_shape(lambda: jax.random.key(0)),
        )
        dtype = jax.tree.leaves(params["blocks"])[0].dtype
        # What is new in a student changes no time by its values.
        new = {
            name: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, dtype), part)
            for name, part in shapes.items()
            if name != "shared"
        }
        plan = tmd.make_plan(2, 2, given.head, module.depth)
        keys = prng.sample_keys(jax.random.key(0), given.batch)
        self.arguments = ({**new, "shared": params}, x, text, keys)
        self.forward, self.evaluations = ours, plan.nfe
        sample = jax.jit(lambda p, x, c, k: tmd.sample(apply_fn, p, x, c, k, plan))
        self.compiled: Any = sample.lower(*self.arguments).compile()
        student = train.count_flops(sample, *self.arguments)
        whole = train.count_flops(models.functional(module), *ours.arguments)
        count = [sum(found.values()) for found in (student, whole)]
        self.operations = count[0] / (plan.nfe * count[1])

    def __call__(self) -> Seconds:
        """Seconds of a sample."""
        return {"student": timed(lambda: self.compiled(*self.arguments))[0]}

    def expected(self) -> Seconds:
        """Seconds of a forward times the effective evaluations."""
        return {"student": self.evaluations * self.forward()["forward"]}

    def rows(self, repeats: int) -> list[Row]:
        """Its time, and its operations, over those that its NFE says."""
        found = in_turn({"ours": self, "rival": self.expected}, repeats)
        goal = {"student": 1.02}
        what = f"NFE {self.evaluations:.3g}"
        counted: Row = {
            "what": f"{what}: student, operations",
            "unit": "",
            "ours": self.operations,
            "rival": 1.0,
            "ratio": self.operations,
        }
        return [*compare(what, found["ours"], found["rival"], goal), counted]


def memory_rows(ours: Ours, peak: int | None, rival: Diffusers | None) -> list[Row]:
    """Bytes of a forward; the goal is no more than the rival's."""
    rows: list[Row] = []
    theirs = rival.memory() if rival else None
    for what, bytes_ in (("program", ours.memory()), ("device peak", peak)):
        if bytes_ is None:
            continue
        row: Row = {"what": f"memory: {what}", "unit": "B", "ours": bytes_}
        if theirs:
            row |= {"rival": theirs, "ratio": bytes_ / theirs, "goal": 1.0}
        rows.append(row)
    return rows


def measure(given: Any) -> tuple[list[Row], dict[str, Any]]:
    """The rows, and what else is worth knowing."""
    module = make_network(given)
    tensors = make_tensors(module, given.channels)
    ours = Ours(module, tensors, given)
    ours()
    # Before the rival's: it has an allocator of its own.
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    count = operations(module, given)
    notes: dict[str, Any] = {
        "parameters": trees.count(ours.arguments[0]),
        "positions": int(np.prod(given.grid) // np.prod(module.patch_size)),
        "compile_seconds": {"ours": ours.compile_seconds},
    }
    rival, rows = None, []
    if given.torch:
        rival = Diffusers(module, tensors, given, given.compiled)
        del tensors
        notes["compile_seconds"]["rival"] = rival.compile_seconds
        notes["rival"] = rival.name
        theirs = rival.run().float().cpu().numpy().transpose(0, 2, 3, 4, 1)
        most = _TOLERANCES[module.recipe.name]
        notes["difference"] = check_equal(theirs, ours.run(), most)
        found = in_turn({"ours": ours, "rival": rival}, given.repeats)
        rows = compare("video", found["ours"], found["rival"], {"forward": 1.0})
    else:
        seconds = [ours()["forward"] for _ in range(given.repeats)]
        row = {"what": "video: forward", "unit": "s", "ours": float(np.median(seconds))}
        rows.append(row)
    forward = rows[0]
    speed: Row = {
        "what": "operations a second",
        "unit": "T",
        "ours": count / forward["ours"] / 1e12,
    }
    if "rival" in forward:
        speed["rival"] = count / forward["rival"] / 1e12
    rows += [speed, *memory_rows(ours, peak, rival)]
    del rival
    if given.head:
        rows += Student(module, ours, given).rows(given.repeats)
    return rows, notes


def parse(arguments: Sequence[str] | None = None) -> Any:
    """The options; the defaults are Wan 2.1's of 1.3 B parameters at 480p."""
    flags = options(__doc__, repeats=9)
    flags.add_argument("--heads", type=int, default=12)
    flags.add_argument("--head-dim", type=int, default=128)
    flags.add_argument("--depth", type=int, default=30)
    flags.add_argument("--mlp-width", type=int, default=8960)
    flags.add_argument("--channels", type=int, default=16)
    flags.add_argument(
        "--grid", type=int, nargs=3, default=(21, 60, 104), help="of the latents"
    )
    flags.add_argument("--text-length", type=int, default=512)
    flags.add_argument("--text-width", type=int, default=4096)
    flags.add_argument("--head", type=int, default=5, help="H of a student; 0: none")
    flags.add_argument("--batch", type=int, default=1)
    flags.add_argument("--recipe", choices=sorted(_TOLERANCES), default="bf16")
    flags.add_argument("--attention", default="auto", help="implementation of ours")
    flags.add_argument("--torch", action=argparse.BooleanOptionalAction, default=True)
    flags.add_argument(
        "--compiled", action=argparse.BooleanOptionalAction, default=True
    )
    flags.add_argument("--torch-mode", default="default", help="of torch.compile")
    return flags.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    given = parse(arguments)
    load = os.getloadavg()[0]
    rows, notes = measure(given)
    sizes = {k: v for k, v in vars(given).items() if k != "json"}
    conclude("video", rows, load, given.json, **sizes, **notes)


if __name__ == "__main__":
    main()
