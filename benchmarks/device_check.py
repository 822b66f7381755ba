"""What a device owes: correctness and the goals' ratios, in the order of their value.

    python -m benchmarks.device_check --minutes=8 --json out.json
    python -m benchmarks.device_check --size=tiny --json out.json        (on a CPU)
    python -m benchmarks.device_check --parts sampler decode --json out.json

attention       cuDNN's attention against XLA's, forward and backward, every mask
training_steps  steps of every system's gpu tier: first ratios, no recompilation
sampler         50 steps of a DiT, against PyTorch eager and compiled
decode          drawing tokens, against memory bandwidth and transformers
fp8             8-bit products, a training step and decoding, against bf16
video           a forward of Wan 2.1's 1.3 B, against diffusers under torch.compile
control         on-policy RL, against brax's PPO

Every part is a benchmark of its own and runs in a process of its own, which is killed
at its limit; what no time is left for is skipped and said. The JSON file is written
after every part. A later call with the same file goes on with the parts that are not
done; ``--parts`` runs just those, again.

On a bare machine (jax, flax, optax, orbax, chex; torch and transformers for rivals) the
wheels that are missing are carried: ``--wheels=FOLDER`` installs them, without a
network, into a folder of this run alone. ``results/PENDING.md`` lists them.
"""

import argparse
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, NamedTuple


class Part(NamedTuple):
    """A benchmark, its arguments by size, and the most seconds it may take."""

    seconds: float
    full: str
    tiny: str


PARTS = {
    "attention": Part(
        60, "", "--batch=2 --positions=32 --heads=4 --head-dim=8 --repeats=2"
    ),
    "training_steps": Part(150, "--tier=gpu", "--tier=smoke --systems flow_grpo grpo"),
    "sampler": Part(
        90,
        "--repeats=5",
        "--recipe=fp32 --hidden=16 --depth=2 --heads=2 --side=8 --steps=2 --batches 2 "
        "--repeats=2",
    ),
    "decode": Part(
        90,
        "--shapes 0.5B 7B --slots 64 --dtype=bfloat16 --repeats=3",
        "--shapes tiny --slots 4 --repeats=2",
    ),
    "fp8": Part(
        120,
        "--products 4096x4096x4096 16384x3584x18944 --shape=7B --layers=4 --batch=8 "
        "--positions=2048 --slots=64 --repeats=3",
        "--repeats=1",
    ),
    "video": Part(
        80,
        "--repeats=3 --head=0",
        "--depth=1 --heads=2 --head-dim=8 --mlp-width=16 --grid 1 4 4 --channels=2 "
        "--text-length=4 --text-width=8 --recipe=fp32 --repeats=2 --head=0",
    ),
    "control": Part(
        60,
        "--parts methods brax --envs=4096 --repeats=3",
        "--parts methods --envs=32 --repeats=1",
    ),
}
RIVALS = {"video": ("torch", "diffusers")}
"""What a part takes only where it is installed."""


def run_part(name: str, size: str, limit: float, environment: Any) -> dict[str, Any]:
    """Runs one part; what it found, how it ended and how long it took."""
    arguments = shlex.split(getattr(PARTS[name], size))
    if any(not _has(package, environment) for package in RIVALS.get(name, ())):
        arguments.append("--no-torch")
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "part.json")
        log = pathlib.Path(folder, "log")
        with log.open("w") as stream:
            process = subprocess.Popen(
                [*command, f"--json={path}"],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # killed with all that it started
            )
            try:
                code = process.wait(limit)
                status = "done" if code == 0 else "failed"
            except subprocess.TimeoutExpired:
                status = "out of time"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        found = json.loads(path.read_text()) if path.exists() else {}
        tail = log.read_text(errors="replace")[-2000:]
    told = {"status": status, "seconds": round(time.monotonic() - start, 1)}
    told |= {"command": shlex.join(["python", *command[1:]]), **found}
    if status != "done":
        told["output"] = tail
    return told


def summary(parts: dict[str, Any]) -> list[str]:
    """A line a part, and one a goal."""
    lines = []
    for name, part in parts.items():
        lines.append(f"{name}: {part['status']}, {part.get('seconds', 0)} s")
        for row in part.get("rows", ()):
            if row.get("goal") is not None:
                value = row.get("ratio", row["ours"])
                side = "at least" if row.get("better") == "greater" else "at most"
                lines.append(
                    f"  {row['verdict']:6} {row['what']}: {value:.4g}, "
                    f"{side} {row['goal']:.4g}"
                )
    return lines


def install(wheels: pathlib.Path, target: str) -> None:
    """Unpacks the wheels of a folder, without their dependencies.

    Raises:
        ValueError: the folder holds none.
    """
    found = sorted(map(str, wheels.glob("*.whl")))
    if not found:
        raise ValueError(f"--wheels={wheels} holds no *.whl; see results/PENDING.md.")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", target, *found], check=True)


def _has(package: str, environment: Any) -> bool:
    find = f"import importlib.util as u, sys; sys.exit(not u.find_spec('{package}'))"
    done = subprocess.run([sys.executable, "-c", find], env=environment, check=False)
    return done.returncode == 0


def _read(path: pathlib.Path, size: str) -> dict[str, Any]:
    """What an earlier call left.

    Raises:
        ValueError: it was of another size.
    """
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    if found["size"] != size:
        raise ValueError(
            f"{path} holds parts of size {found['size']!r}, not {size!r}; name another "
            f"file."
        )
    return found["parts"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is not done; returns 1 if a part failed."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--minutes", type=float, default=8.0, help="for all of it")
    flags.add_argument("--size", choices=("full", "tiny"), default="full")
    flags.add_argument("--parts", nargs="+", choices=PARTS, help="these alone, again")
    flags.add_argument("--wheels", type=pathlib.Path, help="a folder of *.whl")
    flags.add_argument("--json", type=pathlib.Path, default=pathlib.Path("device.json"))
    given = flags.parse_args(arguments)
    end = time.monotonic() + 60 * given.minutes
    parts = _read(given.json, given.size)
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    with tempfile.TemporaryDirectory() as site:
        if given.wheels:
            install(given.wheels, site)
            earlier = environment.get("PYTHONPATH")
            paths = [site, *([earlier] if earlier else [])]
            environment["PYTHONPATH"] = os.pathsep.join(paths)
        for name in PARTS:
            done = parts.get(name, {}).get("status") == "done"
            if name not in given.parts if given.parts else done:
                continue
            left = end - time.monotonic()
            if left < min(20, PARTS[name].seconds):
                parts.setdefault(name, {"status": "no time left"})
            else:
                limit = PARTS[name].seconds if given.size == "full" else 300
                parts[name] = run_part(name, given.size, min(left, limit), environment)
                print("\n".join(summary({name: parts[name]})), flush=True)
            text = json.dumps({"size": given.size, "parts": parts}, indent=1)
            beside = given.json.with_name(f".{given.json.name}")
            beside.write_text(f"{text}\n")
            beside.replace(given.json)
    ended = ", ".join(f"{name} {part['status']}" for name, part in parts.items())
    print(f"\n{given.json}: {ended}")
    return int(any(part["status"] == "failed" for part in parts.values()))


if __name__ == "__main__":
    sys.exit(main())
