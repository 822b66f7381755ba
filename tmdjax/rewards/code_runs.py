"""Runs a policy's program once, locked in; itself runs inside a worker process.

It starts :mod:`tmdjax.rewards.code_program`, reads what that writes, up to a bound, and
leaves no process of it. Expected answers never come here.
"""

import contextlib
import marshal
import os
import select
import signal
import subprocess
import sys
import tempfile
import time

from tmdjax.rewards import code_program
from tmdjax.rewards.worker_process import end_descendants, gather_orphans

_FLAGS = ("-s", "-P", "-S", "-B", "-X", "utf8")
"""Isolated as by -I, but for the hash seed, which the environment fixes."""

_REASONS = {
    0: "",
    code_program.OUT_OF_MEMORY: "memory",
    128 + signal.SIGPROF: "timeout",
    128 + signal.SIGKILL: "timeout",  # what the kernel does a second later
}


def run(
    program: str | None,
    calls: list[str] | None,
    text: str,
    seconds: float,
    wall_seconds: float,
    memory_gb: float,
    longest: int,
) -> tuple[str, str]:
    """Runs a program in processes of its own, all of which have ended afterwards.

    Args:
        program: Python; None runs nothing, and prints what the kernel holds.
        calls: expressions to evaluate after it, in its scope; None runs it as the main
            program.
        text: its standard input.
        seconds: of CPU.
        wall_seconds: on the clock, the start included.
        memory_gb: address space.
        longest: bytes that it may write.

    Returns:
        Why it ended early ('timeout', 'memory' or 'error': it raised, died, or wrote
        too much), or '' where it did not; and what it wrote, or a line for each call,
        see :mod:`tmdjax.rewards.code_program`.

    Raises:
        RuntimeError: the sandbox did not start.
    """
    gather_orphans()
    task = marshal.dumps(
        {
            "program": program,
            "calls": calls,
            "seconds": seconds,
            "memory": int(memory_gb * 2**30),
            "folder": tempfile.gettempdir(),
        }
    )
    with tempfile.TemporaryFile() as given:
        given.write(len(task).to_bytes(8, "big") + task)
        given.write(text.encode("utf-8", "replace"))
        given.seek(0)
        # removed as soon as it is entered: nothing can be made in it
        folder = tempfile.mkdtemp()
        try:
            process = subprocess.Popen(
                [sys.executable, *_FLAGS, code_program.__file__],
                bufsize=0,
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"PYTHONHASHSEED": "0"},
                start_new_session=True,
            )
        finally:
            os.rmdir(folder)
    with process:
        reason, output = _read(process, wall_seconds, longest)
        if reason:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    end_descendants()
    written = output.decode("utf-8", "replace")
    if status == code_program.NOT_STARTED:
        raise RuntimeError(f"the sandbox of a program did not start: {written[:500]}")
    return reason or _REASONS.get(status, "error"), written


def _read(
    process: subprocess.Popen[bytes], timeout: float, longest: int
) -> tuple[str, bytes]:
    """What is written until nobody can write any more, or why that was not awaited."""
    assert process.stdout is not None
    deadline, output = time.monotonic() + timeout, bytearray()
    while len(output) <= longest:
        remaining = max(deadline - time.monotonic(), 0)
        if not select.select([process.stdout], [], [], remaining)[0]:
            return "timeout", bytes(output)
        piece = os.read(process.stdout.fileno(), 1 << 16)
        if not piece:
            return "", bytes(output)
        output += piece
    return "error", bytes(output[:longest])
