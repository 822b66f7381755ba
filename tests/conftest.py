"""Shared fixtures: a CPU with no surprises, and simulated devices on demand."""

import json
import os
import random
import signal
import subprocess
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.export
import jaxtyping
import pytest

# Shape annotations are checked in tests alone; users pay nothing for them.
sys.path.insert(0, os.path.dirname(__file__))
jaxtyping.install_import_hook("tmdjax", "typecheck.check")

jax.config.update("jax_threefry_partitionable", True)


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
def quick_compiles():
    """Half the compile time for tests of wiring, whose networks are tiny."""


@pytest.fixture
def optimised():
    """The compiler as users have it, in modules that use ``quick_compiles``.

    For tests of rounding or memory.
    """


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Sets the compiler before any fixture runs, module-wide ones too.

    What was compiled the other way is forgotten: a program kept from another
    test would round differently from the same one in a fresh process.
    """
    names = item.fixturenames
    quick = "quick_compiles" in names and "optimised" not in names
    if quick != jax.config.read("jax_disable_most_optimizations"):
        jax.config.update("jax_disable_most_optimizations", quick)
        jax.clear_caches()


@pytest.fixture
def run_python():
    """Runs a script in a fresh interpreter; returns its standard output."""

    def run(code: str, *, devices: int = 1, timeout: float = 240, check: bool = True):
        env = dict(os.environ)
        env["JAX_PLATFORMS"] = "cpu"
        env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        if devices > 1:  # layouts are compared, in one process
            env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            raise AssertionError(done.stdout + done.stderr)
        return done if not check else done.stdout

    return run


@pytest.fixture
def killed_and_resumed(tmp_path):
    """Runs a script whose argument is a workdir: left alone, and killed in the middle.

    ``run(code, checkpoint)`` kills the second process by SIGKILL once a file matches
    ``checkpoint`` under its folder, starts it again, and returns both metrics.
    """

    def run(code: str, checkpoint: str) -> tuple[dict, dict]:
        def start(workdir):
            return subprocess.Popen(
                [sys.executable, "-c", code, str(workdir)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "JAX_PLATFORMS": "cpu"},
            )

        whole, killed = tmp_path / "a" / "run", tmp_path / "b" / "run"
        left_alone, process = start(whole), start(killed)
        deadline = time.monotonic() + 120
        while not list((tmp_path / "b").glob(checkpoint)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        again = start(killed)
        for finishing in (left_alone, again):
            out, _ = finishing.communicate(timeout=240)
            assert finishing.returncode == 0, out
        return tuple(
            json.loads((workdir / "summary.json").read_text())["metrics"]
            for workdir in (whole, killed)
        )

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
