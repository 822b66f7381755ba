"""The other end of :class:`tmdjax.rewards.worker.Worker`: reads calls, writes answers.

It imports nothing heavy, so that a process is there in a tenth of a second. It is two
processes: one runs the function, and one looks on and lets nothing survive it.
"""

import contextlib
import ctypes
import importlib
import json
import os
import select
import signal
import sys
import threading
from typing import Any

_DEATH_SIGNAL, _SUBREAPER = 1, 36  # PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER


def serve(function: str, memory_gb: float) -> None:
    """Answers calls, one JSON line each, until the standard input is closed.

    The function runs in a child in a session of its own. When the child ends, or the
    caller closes the standard input, dies or sends SIGTERM, all that the function
    started is killed, and this process ends with the child's status (128 + n after
    signal n). On Linux that includes processes which left their session; elsewhere it
    is the session.

    Args:
        function: 'module:name'.
        memory_gb: address space of each process of the function; more is a
            MemoryError there.
    """
    gather_orphans()
    child = os.fork()
    if child == 0:
        os.setsid()
        _prctl(_DEATH_SIGNAL, signal.SIGKILL)
        _answer_calls(function, memory_gb)
        return

    def end(*_: Any) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)

    def end_when_closed() -> None:
        caller = select.poll()
        caller.register(0, 0)
        caller.poll()  # returns once nobody could write any more
        end()

    signal.signal(signal.SIGTERM, end)
    threading.Thread(target=end_when_closed, daemon=True).start()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    end_descendants()
    os._exit(status if status >= 0 else 128 - status)


def _answer_calls(function: str, memory_gb: float) -> None:
    calls = os.fdopen(os.dup(0))
    out = os.fdopen(os.dup(1), "w")
    # what the function prints is no answer, and what it reads no call
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    os.close(nowhere)

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=out, flush=True)

    try:
        import resource

        limit = int(memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        module, _, name = function.partition(":")
        call = getattr(importlib.import_module(module), name)
    except BaseException as error:
        answer(error=f"{type(error).__name__}: {error}")
        return
    answer(value=None)
    for line in calls:
        try:
            answer(value=call(*json.loads(line)))
        except BaseException as error:
            answer(error=f"{type(error).__name__}: {error}"[:1000])


def gather_orphans() -> None:
    """What loses its parent below this process becomes its child (on Linux)."""
    _prctl(_SUBREAPER, 1)


def end_descendants() -> None:
    """Kills the children of this process until none is left; orphans join them."""
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)


def _prctl(option: int, value: int) -> None:
    """Linux's call of that name; nothing elsewhere."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), *[ctypes.c_ulong()] * 3)


def _children() -> list[int]:
    """Children of this process; none where there is no /proc."""
    own, found = str(os.getpid()), []
    for name in os.listdir("/proc") if sys.platform == "linux" else ():
        with contextlib.suppress(OSError):
            if name.isdecimal():
                with open(f"/proc/{name}/stat", errors="replace") as file:
                    # pid (name) state parent ...; a name may hold brackets
                    if file.read().rpartition(")")[2].split()[1] == own:
                        found.append(int(name))
    return found
