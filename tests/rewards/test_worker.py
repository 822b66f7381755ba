import gc
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tmdjax.rewards.worker import Worker, WorkerError, WorkerPool, WorkerTimeout


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
        (f"__import__('os').kill({PID}, 9)", "with status 137"),
    ):
        refused(message, evaluate, text, error=WorkerError)
        assert evaluate("2 + 2") == 4


def test_threads_wait_for_each_other(evaluate):
    with ThreadPoolExecutor(8) as pool:
        squares = pool.map(evaluate, [f"{i} * {i}" for i in range(8)])
    assert [*squares] == [i * i for i in range(8)]


def test_threads_have_a_process_each_in_a_pool(tmp_path, refused):
    pool = WorkerPool("builtins:eval", processes=2, timeout=2.0)
    first = pool(PID)
    assert pool(PID) == pool(PID) == first  # one thread needs no other

    def meet(own, other):
        """Ends once the other call has begun."""
        wait = f"any(exists({str(tmp_path / other)!r}) for _ in iter(int, 1))"
        exists = "__import__('os').path.exists"
        begin = f"open({str(tmp_path / own)!r}, 'w').close()"
        return pool(f"[{begin}, {wait.replace('exists', exists)}, {PID}][-1]")

    with ThreadPoolExecutor(8) as threads:
        pids = {*threads.map(meet, "ab", "ba")}
        assert len(pids) == 2 and first in pids
        # a third waits for one of them, and one that dies takes no other along
        deaths = threads.submit(pool, "__import__('os')._exit(3)")
        assert {*threads.map(pool, [f"{i} * {i}" for i in range(8)])} == {
            i * i for i in range(8)
        }
        refused("with status 3", deaths.result, error=WorkerError)
    pids = {pool(PID) for _ in range(2)} | pids
    pool.close()
    assert all(map(gone, pids))
    for processes, error in ((0, ValueError), (1.5, TypeError)):
        refused(
            "processes", WorkerPool, "builtins:eval", processes=processes, error=error
        )


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


SLEEP = "__import__('subprocess').Popen(['sleep', '1000'], start_new_session={}).pid"
FORKS = "[__import__('os').fork() or __import__('time').sleep(1000)][0]"


def test_nothing_that_the_function_started_is_left(evaluate, refused):
    def started():
        return [evaluate(SLEEP.format(left)) for left in (False, True)]

    def check(*pids):
        assert all(map(gone, pids)), pids

    # a child, one that left its session, one whose parent is gone
    orphan = "__import__('os').popen('sleep 1000 & echo $!').readline()"
    pids = [evaluate(PID), *started(), int(evaluate(orphan))]
    assert not any(map(gone, pids))
    evaluate.close()
    check(*pids)
    pids = started()
    refused(
        "gave no answer", evaluate, "__import__('time').sleep(100)", error=WorkerError
    )
    check(*pids)
    pids = [*started(), evaluate(FORKS)]
    refused("with status 3", evaluate, "__import__('os')._exit(3)", error=WorkerError)
    check(*pids)
    # the process that looks on is killed
    pids = [evaluate(PID)]
    os_, sleep = "__import__('os')", "__import__('time').sleep(9)"
    parent = f"{os_}.kill({os_}.getppid(), 9) or {sleep}"
    refused("ended by itself", evaluate, parent, error=WorkerError)
    end = time.monotonic() + 10
    while not gone(pids[0]) and time.monotonic() < end:
        time.sleep(0.01)
    check(*pids)


def test_what_a_killed_process_leaves_ends():
    code = f"""
import time
from tmdjax.rewards.worker import Worker
evaluate = Worker("builtins:eval", timeout=1000)
print(evaluate("{PID}"), evaluate("{SLEEP.format(True)}"), flush=True)
evaluate("__import__('time').sleep(1000)")
"""
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    pids = [int(pid) for pid in caller.stdout.readline().split()]
    assert len(pids) == 2 and not any(map(gone, pids))
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    caller.stdout.close()
    end = time.monotonic() + 10
    while not all(map(gone, pids)) and time.monotonic() < end:
        time.sleep(0.01)
    assert all(map(gone, pids))


def test_answers_and_calls_are_bounded(evaluate, refused, monkeypatch):
    monkeypatch.setattr("tmdjax.rewards.worker._LONGEST_ANSWER", 10**6)
    for text, message in (
        ("'x' * 2 * 10**6", "answers with more than 1000000 bytes"),
        (r"__import__('os').write(4, b'7\n')", r"wrote b'7\\n.* where its answer"),
    ):
        refused(message, evaluate, text, error=WorkerError)
    assert evaluate("__import__('sys').stdin.read()") == ""  # not the next call
    # a call larger than a pipe meets a process that does not read
    evaluate("__import__('threading').Timer(0.1, lambda: 9**9**9).start()")
    time.sleep(0.2)
    refused("gave no answer", evaluate, repr("x" * 10**6), error=WorkerTimeout)


def test_many_files_may_be_open(evaluate):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip(f"the system allows no more than {hard} open files")
    held = [os.open(os.devnull, os.O_RDONLY)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
        while held[-1] < 1024:  # from there on select.select refuses
            held.append(os.dup(held[0]))
        assert evaluate("[7] * 100_000") == [7] * 100_000
    finally:
        for file in held:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


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
