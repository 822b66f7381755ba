import gc
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tmdjax.rewards.worker import Worker, WorkerError, WorkerTimeout


@pytest.fixture
def evaluate():
    """Evaluates any Python text: a worst case of what a policy may bring about."""
    worker = Worker("builtins:eval", timeout=0.5, memory_gb=1.0)
    yield worker
    worker.close()


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


PID = "__import__('os').getpid()"


def test_calls_answer_and_the_process_stays(evaluate):
    pid = evaluate(PID)
    assert pid != os.getpid()
    assert evaluate("[1, 'é', None, 2.5]") == [1, "é", None, 2.5]
    assert evaluate("print('not the answer') or 7") == 7
    assert evaluate("'x' * 200_000") == "x" * 200_000  # more than a pipe holds
    assert evaluate(PID) == pid


def test_a_call_that_hangs_is_killed_and_the_next_one_works(evaluate, refused):
    hung = r"builtins:eval gave no answer within 0\.5 s; its process was killed"
    # the second is one operation that holds the interpreter and sees no signal
    for text in ("__import__('time').sleep(100)", "9**9**9"):
        pid = evaluate(PID)
        start = time.monotonic()
        refused(hung, evaluate, text, error=WorkerTimeout)
        assert time.monotonic() - start < 5
        assert gone(pid)
        assert evaluate("1 + 1") == 2


def test_what_the_function_raises_is_reported(evaluate, refused):
    pid = evaluate(PID)
    for text, message in (
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
        ("__import__('sys').exit()", "raised SystemExit"),
        ("(", "raised SyntaxError"),
        ("bytearray(10**12)", "raised MemoryError"),
        ("object()", "raised TypeError: .* not JSON serializable"),
    ):
        refused(message, evaluate, text, error=WorkerError)
    assert evaluate(PID) == pid


def test_a_death_is_reported_and_the_next_call_works(evaluate, refused):
    for text, message in (
        ("__import__('os')._exit(3)", "ended by itself, with status 3"),
        (f"__import__('os').kill({PID}, 9)", "with status -9"),
    ):
        refused(message, evaluate, text, error=WorkerError)
        assert evaluate("2 + 2") == 4


def test_threads_wait_for_each_other(evaluate):
    with ThreadPoolExecutor(8) as pool:
        squares = pool.map(evaluate, [f"{i} * {i}" for i in range(8)])
    assert [*squares] == [i * i for i in range(8)]


def test_the_process_ends_with_its_worker():
    worker = Worker("builtins:eval")
    pid = worker(PID)
    del worker
    gc.collect()
    assert gone(pid)
    worker = Worker("builtins:eval")
    pid = worker(PID)
    worker.close()
    worker.close()
    assert gone(pid)
    assert worker("1") == 1
    worker.close()


def test_bad_settings(refused):
    for name in ("no_such_module:f", "builtins:no_such_function"):
        refused("no_such", Worker(name), error=WorkerError)
    for settings, message in (
        ({"timeout": 0}, r"timeout=0 is outside \(0, inf\)"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"memory_gb": -1.0}, r"memory_gb=-1\.0 is outside"),
    ):
        refused(message, Worker, "builtins:eval", **settings)
    refused("not JSON serializable", Worker("builtins:eval"), object(), error=TypeError)
