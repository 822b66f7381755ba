"""Shared fixtures: a CPU with no surprises, and simulated devices on demand.

Most of a test is compiling, so the suite runs on a compiler without optimisations:
a third of the time. What looks at rounding, memory or the compiled program itself
stands in ``tests/optimised`` and runs in processes of its own, as users compile.
"""

import gc
import os
import subprocess
import sys

OPTIMISED = any("optimised" in argument for argument in sys.argv[1:])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# in the environment, so that workers and scripts that a test starts inherit it
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "0" if OPTIMISED else "1")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0":
    # a program is one module of LLVM: parts for several threads cost a quarter more
    FLAGS = (
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )
    if FLAGS not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
    collect_ignore = ["optimised"]

import jax
import jax.export
import jaxtyping
import pytest

# Shape annotations are checked in tests alone; users pay nothing for them.
sys.path.insert(0, os.path.dirname(__file__))
import typecheck

typecheck.install("tmdjax")

from tmdjax.core import compilation_cache

os.environ["JAX_COMPILATION_CACHE_DIR"] = str(compilation_cache.enable())
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_threefry_partitionable", True)


# Tracing makes millions of small objects that live: looking for cycles among them as
# often as Python does by default is a twelfth of the suite (2,500 times in 30 seconds).
gc.set_threshold(50_000, 20, 20)


def pytest_configure(config):
    from price import Price

    config.pluginmanager.register(Price())


@pytest.fixture
def x64():
    """Float64 inside the test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def as_shipped():
    """Switches the type hook off: bad input then meets the errors users see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def refused(as_shipped):
    """Checks that a call is refused with our own message, a regular expression.

    ``refused("size=3 is outside", call, keys, size=3)``; an error of another kind than
    ValueError is named by ``error=``.
    """

    def check(message: str, call, *arguments, error=ValueError, **options):
        with pytest.raises(error, match=message):
            call(*arguments, **options)

    return check


@pytest.fixture
def run_python():
    """Runs a script in a fresh interpreter; returns its standard output."""

    def run(code: str, *, devices: int = 1, timeout: float = 240, check: bool = True):
        flags = f"--xla_force_host_platform_device_count={devices}"
        flags = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            raise AssertionError(done.stdout + done.stderr)
        return done if not check else done.stdout

    return run


@pytest.fixture
def count_compiles():
    """Counts the backend compilations inside a ``with`` block."""
    import contextlib

    from jax import monitoring

    @contextlib.contextmanager
    def counting():
        counted = []

        def listener(event: str, duration: float, **kwargs) -> None:
            if event == "/jax/core/compile/backend_compile_duration":
                counted.append(duration)

        monitoring.register_event_duration_secs_listener(listener)
        try:
            yield counted
        finally:
            monitoring.unregister_event_duration_listener(listener)

    return counting


@pytest.fixture
def traceable_cudnn(monkeypatch):
    """Fused attention can be traced without a CUDA device; checks to switch off."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    for name, answer in (
        ("check_cudnn_version", 91100),
        ("check_compute_capability", True),
        ("is_cuda_compute_capability_equal", False),
    ):
        if not hasattr(fused, name):
            pytest.skip(f"jax no longer has {name}")
        monkeypatch.setattr(fused, name, lambda *_, answer=answer: answer)
    return [
        jax.export.DisabledSafetyCheck.custom_call(f"__cudnn$fmha{kind}{way}")
        for kind in ("Softmax", "ScaleBiasSoftmax")
        for way in ("", "Backward")
    ]
