"""What a run ran on: versions, device, commit, memory, locks."""

import contextlib
import fcntl
import importlib.metadata
import os
import pathlib
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

PACKAGES = (
    "tmdjax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "chex",
    "ml-collections",
    "grain",
    "numpy",
    "scipy",
)


def versions() -> dict[str, str]:
    """Installed versions of the packages that a result depends on, and Python's."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def device_name() -> str:
    """Kind and count of what jax runs on: 'NVIDIA H100 80GB HBM3', 'cpu, 2 cores'."""
    devices = jax.devices()
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
        cores = len(affinity(0)) if affinity else os.cpu_count()
        return f"{kind}, {cores} cores"
    return kind if len(devices) == 1 else f"{len(devices)} x {kind}"


def commit() -> str:
    """Commit of the working directory, '+changes' if it has any; 'unknown' outside."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def provenance() -> dict[str, Any]:
    """Where a number comes from: device, commit, versions."""
    return {"device": device_name(), "commit": commit(), "versions": versions()}


def environment() -> dict[str, Any]:
    """Everything above as one dict."""
    return {
        "device": device_name(),
        "devices": len(jax.devices()),
        "platform": jax.default_backend(),
        "system": platform.system(),
        "commit": commit(),
        **versions(),
    }


def peak_memory_gb() -> float:
    """Highest memory use of this process so far, in 1e9 bytes.

    Device memory where the backend counts it, else the resident set.
    """
    statistics = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in statistics if "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class InUse(RuntimeError):
    """Another process holds a folder."""


@contextlib.contextmanager
def locked(
    folder: pathlib.Path, keep_waiting: Callable[[], bool] | None = None
) -> Iterator[None]:
    """Holds a folder for one process; the lock goes with the process, however it ends.

    Args:
        folder: made if absent.
        keep_waiting: asked again and again while another process holds the folder;
            None does not wait.

    Raises:
        OSError: the folder cannot be written.
        InUse: another process holds it, and there is no more waiting.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    except OSError as error:
        raise OSError(
            f"cannot write to {folder}: {error.strerror}; give another --workdir "
            f"or --cache."
        ) from error
    with file:
        said = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if keep_waiting is None or not keep_waiting():
                    raise InUse(
                        f"{folder} is in use by another run; wait for it or choose "
                        f"another --workdir."
                    ) from None
            if not said:
                print(f"waiting for another run to leave {folder.name}", flush=True)
                said = True
            time.sleep(0.2)
        yield
