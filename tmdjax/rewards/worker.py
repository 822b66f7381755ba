"""Calls a function in a process of its own, which is killed if it takes too long.

A verifier that hands a policy's text to a computer algebra system can be made to
compute 9^(9^9); a thread that does so never ends, and holds the interpreter meanwhile.
A process can be killed, with all that it started, and its memory is bounded:

    equal = Worker("tmdjax.rewards.symbolic:equal", timeout=5.0)
    equal("x^2-1", "(x-1)(x+1)")

Arguments and results are JSON values, so neither side can make the other run code, and
the main module is not imported again. Hashes of strings are fixed in the process: the
same calls give the same results in each. An interrupt at the keyboard does not reach
it: the run that pauses then has its scores.
"""

import contextlib
import json
import math
import os
import queue
import select
import subprocess
import sys
import threading
import time
import weakref
from typing import Any

from tmdjax.core.checks import check_count, check_range

_START_TIMEOUT = 120.0
_END_TIMEOUT = 10.0
_LONGEST_POLL = 3600.0
_LONGEST_ANSWER = 1 << 26
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from tmdjax.rewards.worker_process import serve; "
    "serve(sys.argv[2], float(sys.argv[3]))"
)


class WorkerError(RuntimeError):
    """The function raised, or its process ended; the message says why."""


class WorkerTimeout(WorkerError):
    """The function took too long; its process was killed."""


class Worker:
    """One process that runs one function; started by the first call.

    It may be called from several threads, which wait for each other. After a time-out
    or a death the next call starts a new process. Whatever the function started ends
    with the process: after a time-out, when the worker is closed or dropped, and when
    this process dies, by SIGKILL too.

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
            WorkerError: the function raised, the process died or did not start, or the
                answer is longer than 64 MiB as JSON.
        """
        line = json.dumps(arguments).encode() + b"\n"
        with self._lock:
            process = self._process or self._start()
            return self._exchange(process, line, self._timeout)

    def close(self) -> None:
        """Ends the process; a later call would start another."""
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[bytes]:
        settings = [json.dumps(sys.path), self._function, repr(self._memory_gb)]
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *settings],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        self._process = process
        self._end = weakref.finalize(self, _end, process)
        try:
            self._exchange(process, b"", _START_TIMEOUT)
        except WorkerError:
            self._stop()
            raise
        return process

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
        self._process = self._end = None

    def _killed(self, fault: str, kind: type[WorkerError] = WorkerError) -> WorkerError:
        """Ends the process; the error that says why."""
        self._stop()
        return kind(f"{self._function} {fault}; its process was killed.")

    def _exchange(
        self, process: subprocess.Popen[bytes], line: bytes, timeout: float
    ) -> Any:
        """Sends a line while the answer, one line, is waited for."""
        assert process.stdin is not None and process.stdout is not None
        calls, answers = process.stdin.fileno(), process.stdout.fileno()
        deadline = time.monotonic() + timeout
        unsent, received = memoryview(line), bytearray()
        while not received.endswith(b"\n"):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise self._killed(
                    f"gave no answer within {timeout:g} s", WorkerTimeout
                )
            poll = select.poll()  # select.select takes no descriptor above 1023
            poll.register(answers, select.POLLIN)
            if unsent:
                poll.register(calls, select.POLLOUT)
            ready = dict(poll.poll(1000 * min(remaining, _LONGEST_POLL)))
            if calls in ready:
                try:
                    unsent = unsent[os.write(calls, unsent) :]
                except BrokenPipeError:  # it died; the missing answer then tells
                    unsent = memoryview(b"")
            if answers not in ready:
                continue
            piece = os.read(answers, 1 << 16)
            if not piece:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)  # else the status would be that of our end
                self._stop()
                raise WorkerError(
                    f"the process of {self._function} ended by itself, with status "
                    f"{process.returncode}."
                )
            received += piece
            if len(received) > _LONGEST_ANSWER:
                raise self._killed(f"answers with more than {_LONGEST_ANSWER} bytes")
        try:
            fields = json.loads(received)
            value, error = fields.get("value"), fields.get("error")
        except (AttributeError, RecursionError, ValueError):
            wrote = bytes(received[:80])
            raise self._killed(f"wrote {wrote!r} where its answer belongs") from None
        if error is not None:
            raise WorkerError(f"{self._function} raised {error}")
        return value


class WorkerPool:
    """Workers of one function: calls from several threads run at the same time.

    A process is started by the first call that finds all others at work, so calls from
    one thread have one process. More threads than processes wait for each other.

    Args:
        function: 'module:name'.
        processes: that there may be, at least 1.
        timeout: see :class:`Worker`; time spent on waiting for one is not counted.
        memory_gb: address space of each process, > 0.

    Raises:
        TypeError: processes is no integer.
        ValueError: a number outside its range.
    """

    def __init__(
        self,
        function: str,
        *,
        processes: int,
        timeout: float = 5.0,
        memory_gb: float = 4.0,
    ):
        self._workers = [
            Worker(function, timeout=timeout, memory_gb=memory_gb)
            for _ in range(check_count("processes", processes))
        ]
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def __call__(self, *arguments: Any) -> Any:
        """Calls the function; raises what :meth:`Worker.__call__` does."""
        worker = self._idle.get()
        try:
            return worker(*arguments)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Ends the processes; later calls would start others."""
        for worker in self._workers:
            worker.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the process, which ends all that it started."""
    process.terminate()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    try:
        process.wait(_END_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
