"""The other end of :class:`tmdjax.rewards.worker.Worker`: reads calls, writes answers.

It imports nothing heavy, so that a process is there in a tenth of a second.
"""

import faulthandler
import importlib
import json
import os
import sys
from typing import Any


def serve(function: str, timeout: float, memory_gb: float) -> None:
    """Answers calls, one JSON line each, until the standard input is closed.

    Args:
        function: 'module:name'.
        timeout: seconds of a call after which the caller kills this process; should
            the caller be gone, the process ends itself a little later.
        memory_gb: address space; more is a MemoryError.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the function prints is no answer

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
    with open(os.devnull, "w") as nowhere:
        for line in sys.stdin:
            faulthandler.dump_traceback_later(timeout + 1, exit=True, file=nowhere)
            try:
                answer(value=call(*json.loads(line)))
            except BaseException as error:
                answer(error=f"{type(error).__name__}: {error}"[:1000])
            faulthandler.cancel_dump_traceback_later()
