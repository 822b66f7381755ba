import gc
import os
import threading
import time

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


def test_calls_answer_and_the_process_stays(evaluate):
    pid = evaluate("__import__('os').getpid()")
    assert pid != os.getpid()
    assert evaluate("[1, 'é', None, 2.5]") == [1, "é", None, 2.5]
    assert evaluate("print('not the answer') or 7") == 7
    assert evaluate("'x' * 200_000") == "x" * 200_000  # more than a pipe holds
    assert evaluate("__import__('os').getpid()") == pid


@pytest.mark.parametrize(
    "text",
    [
        "__import__('time').sleep(100)",
        "9**9**9",  # one operation that holds the interpreter and sees no signal
    ],
)
def test_a_call_that_hangs_is_killed_and_the_next_one_works(evaluate, text):
    pid = evaluate("__import__('os').getpid()")
    start = time.monotonic()
    with pytest.raises(
        WorkerTimeout,
        match=r"builtins:eval gave no answer within 0\.5 s; its process was killed",
    ):
        evaluate(text)
    assert time.monotonic() - start < 5
    assert gone(pid)
    assert evaluate("1 + 1") == 2


def test_what_the_function_raises_is_reported(evaluate, refused):
    pid = evaluate("__import__('os').getpid()")
    for text, message in (
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
        ("__import__('sys').exit()", "raised SystemExit"),
        ("(", "raised SyntaxError"),
        ("bytearray(10**12)", "raised MemoryError"),
        ("object()", "raised TypeError: .* not JSON serializable"),
    ):
        refused(message, evaluate, text, error=WorkerError)
    assert evaluate("__import__('os').getpid()") == pid


def test_a_death_is_reported_and_the_next_call_works(evaluate):
    with pytest.raises(WorkerError, match="ended by itself, with status 3"):
        evaluate("__import__('os')._exit(3)")
    assert evaluate("2 + 2") == 4
    with pytest.raises(WorkerError, match="with status -9"):
        evaluate("__import__('os').kill(__import__('os').getpid(), 9)")
    assert evaluate("2 + 3") == 5


def test_a_function_that_is_not_there(refused):
    for name in ("no_such_module:f", "builtins:no_such_function"):
        refused("no_such", Worker(name), error=WorkerError)


def test_threads_wait_for_each_other(evaluate):
    results = {}

    def call(i):
        results[i] = evaluate(f"{i} * {i}")

    threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: i * i for i in range(8)}


def test_the_process_ends_with_its_worker():
    worker = Worker("builtins:eval")
    pid = worker("__import__('os').getpid()")
    del worker
    gc.collect()
    assert gone(pid)
    worker = Worker("builtins:eval")
    pid = worker("__import__('os').getpid()")
    worker.close()
    worker.close()
    assert gone(pid)
    assert worker("1") == 1
    worker.close()


def test_bad_settings(refused):
    for settings, message in (
        ({"timeout": 0}, r"timeout=0 is outside \(0, inf\)"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"memory_gb": -1.0}, r"memory_gb=-1\.0 is outside"),
    ):
        refused(message, Worker, "builtins:eval", **settings)
    refused("not JSON serializable", Worker("builtins:eval"), object(), error=TypeError)
