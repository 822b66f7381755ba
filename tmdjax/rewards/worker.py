"""Calls a function in a process of its own, which is killed if it takes too long.

A verifier that hands a policy's text to a computer algebra system can be made to
compute 9^(9^9); a thread that does so never ends, and holds the interpreter meanwhile.
A process can be killed, and its memory is bounded:

    equal = Worker("tmdjax.rewards.symbolic:equal", timeout=5.0)
    equal("x^2-1", "(x-1)(x+1)")

Arguments and results are JSON values, so neither side can make the other run code, and
the main module is not imported again. Hashes of strings are fixed in the process: the
same calls give the same results in each.
"""

import contextlib
import json
import math
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

from tmdjax.core.checks import check_range

_START_TIMEOUT = 120.0
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from tmdjax.rewards.worker_process import serve; "
    "serve(sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))"
)


class WorkerError(RuntimeError):
    """The function raised, or its process ended; the message says why."""


class WorkerTimeout(WorkerError):
    """The function took too long; its process was killed."""


class Worker:
    """One process that runs one function; started by the first call.

    It may be called from several threads, which wait for each other. After a time-out
    or a death the next call starts a new process.

    Args:
        function: 'module:name'.
        timeout: seconds of one call, > 0; the imports before the first are not
            counted.
        memory_gb: address space of the process, > 0.

    Raises:
        ValueError: a number outside its range.
    """

    def __init__(self, function: str, *, timeout: float = 5.0, memory_gb: float = 4.0):
        check_range("timeout", timeout, 0, math.inf, open_low=True, open_high=True)
        check_range("memory_gb", memory_gb, 0, math.inf, open_low=True, open_high=True)
        self._function = function
        self._timeout = timeout
        self._memory_gb = memory_gb
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize | None = None
        self._received = b""

    def __call__(self, *arguments: Any) -> Any:
        """Calls the function.

        Raises:
            TypeError: an argument that JSON cannot hold.
            WorkerTimeout: no answer in time.
            WorkerError: the function raised, or the process died or did not start.
        """
        line = json.dumps(arguments).encode() + b"\n"
        with self._lock:
            process = self._process or self._start()
            assert process.stdin is not None
            # A process that died takes no line; the missing answer then tells.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(line)
                process.stdin.flush()
            return self._answer(process, self._timeout)

    def close(self) -> None:
        """Ends the process; a later call would start another."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        settings = [json.dumps(sys.path), self._function]
        settings += [repr(self._timeout), repr(self._memory_gb)]
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *settings],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONHASHSEED": "0"},
        )
        self._process, self._received = process, b""
        self._end = weakref.finalize(self, _kill, process)
        self._answer(process, _START_TIMEOUT)
        return process

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def _answer(self, process: subprocess.Popen[bytes], timeout: float) -> Any:
        assert process.stdout is not None
        deadline = time.monotonic() + timeout
        while b"\n" not in self._received:
            remaining = max(deadline - time.monotonic(), 0)
            if not select.select([process.stdout], [], [], remaining)[0]:
                self._stop()
                raise WorkerTimeout(
                    f"{self._function} gave no answer within {timeout:g} s; its "
                    f"process was killed."
                )
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)  # else the status would be that of our kill
                self._stop()
                raise WorkerError(
                    f"the process of {self._function} ended by itself, with status "
                    f"{process.returncode}."
                )
            self._received += piece
        line, _, self._received = self._received.partition(b"\n")
        fields = json.loads(line)
        if "error" in fields:
            raise WorkerError(f"{self._function} raised {fields['error']}")
        return fields["value"]


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
