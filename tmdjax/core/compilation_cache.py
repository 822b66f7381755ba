"""Compiled programs kept between processes, in the user's cache folder.

One folder for every clone on a machine, so that a second one starts warm. It is never
limited in size: a limit makes JAX lock the folder at every look-up. It can be deleted
at any time.
"""

import hashlib
import importlib.metadata
import os
import pathlib
import platform

import jax


def folder() -> pathlib.Path:
    """``~/.cache/tmdjax/<jaxlib version>-<processor>`` (or below ``XDG_CACHE_HOME``).

    The processor is part of the name: compiled programs hold its instructions.
    """
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    version = importlib.metadata.version("jaxlib")
    return pathlib.Path(home, "tmdjax", f"{version}-{_processor()}")


def enable(path: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """Keeps every compiled program of this process, however quickly it was compiled.

    Args:
        path: where; None is ``JAX_COMPILATION_CACHE_DIR`` if set, else :func:`folder`.

    Returns:
        The folder.
    """
    path = pathlib.Path(path or os.environ.get("JAX_COMPILATION_CACHE_DIR") or folder())
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    jax.config.update("jax_compilation_cache_max_size", -1)
    return path


def _processor() -> str:
    """The machine's architecture and a hash of what its processor can do."""
    facts = platform.processor()
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
        kept = ("model name", "flags", "Features", "CPU implementer", "CPU part")
        lines = [line for line in text.splitlines() if line.startswith(kept)]
        facts = "\n".join(sorted(set(lines))) or facts
    except OSError:
        pass
    return f"{platform.machine()}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"
