"""Programs that a policy might write, the hostile ones too, against tests it cannot see."""

import functools
import os
import pathlib
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from tmdjax.rewards import code_program
from tmdjax.rewards.code import CodeVerifier, Verdict, extract_program, sandbox_status
from tmdjax.rewards.worker import Worker, WorkerError, WorkerTimeout


@pytest.fixture(scope="module")
def verify():
    verifier = CodeVerifier(timeout=0.3)
    yield verifier
    verifier.close()


def descendants(worker):
    """Processes below a worker's, by the table of the kernel."""
    (worker,) = getattr(worker, "_workers", [worker])
    parents = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text(errors="replace")
        except OSError:
            continue
        parents[int(folder.name)] = int(status.rpartition(")")[2].split()[1])
    found = [worker._process.pid]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def only_the_worker_is_left(worker):
    return not os.path.isdir("/proc") or len(descendants(worker)) == 1


DOUBLE = "def f(x):\n    return 2 * x"
ASSERTS = ("assert f(4) == 8", "assert -6 == f(-3)", "assert not f(0)")
PRINT = "print(2 * int(input()))"
PAIRS = (("4\n", "8\n"), ("-3\n", "-6\n"))


def test_right_programs_pass(verify):
    assert verify(DOUBLE, ASSERTS) == Verdict(1.0, "", 3, 3)
    assert verify(PRINT, PAIRS) == Verdict(1.0, "", 2, 2)
    several = ("import math, collections, random, re, heapq, dataclasses, statistics\n"
               "@dataclasses.dataclass\nclass Point:\n    x: 'int'\n"
               "def g(*a, key=0): return {'a': [Point(*a).x, (key, None)], 2: {'é'}}\n"
               "def yes(): return 1\n"
               "if __name__ == '__main__': print('a module is not run')\n"
               "print('and what it prints is no answer')\n")  # fmt: skip
    tests = ["assert g(1, key='k') == {'a': [1, ('k', None)], 2: {'é'}}, 'why'"]
    tests += ["assert yes()", "assert sorted([3, yes()])[0] == True"]
    assert verify(several, tests) == Verdict(1.0, "", 3, 3)
    main = "import sys\nif __name__ == '__main__':\n    print(sys.stdin.read(), end='')"
    pair = ("é 1  \n\n2\n", "é 1\n\n2")
    assert verify(main + "\n    sys.exit()", [pair]).score == 1.0
    assert verify("print(open(0).read())", [pair]).score == 1.0
    # the hash of a text is that of every other run
    seen = [verify._run("print(hash('a'), {'a', 'b'})", None, "") for _ in range(2)]
    assert seen[0] == seen[1] and seen[0][0] == ""


def test_the_share_that_passes_and_why_the_first_failed(verify):
    wrong = "def f(x):\n    return 8 if x else 1 / x"
    assert verify(wrong, ASSERTS) == Verdict(1 / 3, "wrong answer", 1, 3)
    for program, verdict in (
        ("def f(x):\n    return x if x == 4 else exit()", (0.0, "wrong answer", 0, 3)),
        ("def f(x):\n    return 8 if x == 4 else 1 / 0", (1 / 3, "error", 1, 3)),
        ("def f(x):\n    return 8 if x == 4 else [0] * 10**9", (1 / 3, "memory", 1, 3)),
        ("def f(x):\n    while x != 4: pass\n    return 8", (1 / 3, "timeout", 1, 3)),
        ("g = 1", (0.0, "error", 0, 3)),
    ):
        assert verify(program, ASSERTS) == verdict, program
    assert verify("print(8)", PAIRS) == Verdict(0.5, "wrong answer", 1, 2)
    assert verify("print(8)\nraise KeyError", PAIRS).score == 0.0
    strict = CodeVerifier(timeout=0.3, all_or_nothing=True)
    object.__setattr__(strict, "_call", verify._call)
    assert strict("print(8)", PAIRS) == Verdict(0.0, "wrong answer", 1, 2)
    assert strict("while True: pass", PAIRS).reason == "timeout"
    assert strict(PRINT, PAIRS).score == 1.0
    assert strict.counts == {"wrong answer": 1, "timeout": 1, "passed": 1}


def test_threads_have_as_many_programs_run_as_there_are_processes():
    verify = CodeVerifier(timeout=0.1, processes=2)
    with ThreadPoolExecutor(3) as threads:
        reasons = threads.map(
            lambda _: verify("while True: pass", PAIRS[:1]).reason, "abc"
        )
        assert [*reasons] == ["timeout"] * 3
    assert verify.counts == {"timeout": 3}
    pids = {worker._process.pid for worker in verify._call._workers}
    assert len(pids) == 2
    verify.close()


EQUAL_TO_ALL = """
class Any(int):
    __eq__ = lambda self, other: True
    __hash__ = None
    __bool__ = lambda self: True
    __repr__ = lambda self: 'Any()'
f = lambda x: Any()
"""
REPLACED = """
import ast, builtins
builtins.eval = lambda *_: True
builtins.repr = builtins.str = lambda *_: '8 == 8'
ast.literal_eval = lambda *_: True
f = lambda x: x
"""
FORGED = """
import os
for number in range(1, 16):
    try: os.write(number, b'=True' + chr(10).encode())
    except OSError: pass
f = lambda x: True
"""
MISLEAD = """
import builtins, os, sys
library = os.path.dirname(os.__file__)
builtins.isinstance = lambda *_: True
os.sep = ''
frame = sys._getframe()
while frame:
    frame.f_globals['_ALLOWED'] = {'os.listdir'}
    frame = frame.f_back
class Text(str):
    __add__ = removeprefix = lambda self, _: os.__file__
    startswith = lambda *_: True
    __contains__ = lambda *_: False
seen = []
for path in ('/', Text('/'), library + '/site-packages', library + '/./site-packages'):
    try: seen.append(os.listdir(path))
    except PermissionError: pass
print(8 if seen else '')
"""
RENAMED = """
import importlib.util, os
library = os.path.dirname(os.__file__) + '/lib-dynload/'
for name in os.listdir(library):
    if name.startswith('mmap.'):
        spec = importlib.util.spec_from_file_location('a.mmap', library + name)
        importlib.util.module_from_spec(spec)
print(8)
"""
HOSTILE = {
    "the hook misled": (MISLEAD, "wrong answer"),
    "a module by another name": (RENAMED, "error"),
    "network": ("import socket\nsocket.create_connection(('1.1.1.1', 53))", "error"),
    "fork bomb": ("import os\nwhile True: os.fork()", "error"),
    "threads": ("import threading\nthreading.Thread(target=print).start()", "error"),
    "loop": ("while True: pass", "timeout"),
    "loop in C, its signal ignored": (
        "import signal\nsignal.signal(signal.SIGPROF, signal.SIG_IGN)\nx = 9**9**8",
        "timeout",
    ),
    "memory": ("x = bytearray(10**10)", "memory"),
    "file": ("print(open('/etc/passwd').read())", "error"),
    "its own tests": ("import os\nprint(os.listdir(os.getcwd()))", "error"),
    "prints for ever": ("while True: print('8' * 1000)", "error"),
    "kills its parent": ("import os\nos.kill(os.getppid(), 9)", "error"),
    "kills all": ("import os\nos.kill(-1, 9)", "error"),
    "writes": ("open('x', 'w').write('y')", "error"),
    "sleeps": ("import time\ntime.sleep(100)", "error"),
    "a value equal to all": (EQUAL_TO_ALL, "wrong answer"),
    "builtins replaced": (REPLACED, "wrong answer"),
    "answers forged": (FORGED, "wrong answer"),
    "ends at once": ("import os\nos._exit(0)", "error"),
    "status of a sandbox that did not start": ("import os\nos._exit(87)", "error"),
    "no program": ("the answer is \ud800 8", "error"),
    "too deep": ("(" * 5000 + ")" * 5000, "error"),
    "a null": ("\0", "error"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_cost_one_sample(verify, name):
    """The next one is judged right, and no process is left."""
    program, reason = HOSTILE[name]
    # what a module prints goes nowhere, so these run as a program
    tests = PAIRS[:1] if "print(" in program else ASSERTS[:2]
    verdict = verify(program, tests)
    assert verdict == Verdict(0.0, reason, 0, len(tests))
    assert only_the_worker_is_left(verify._call)
    assert verify(DOUBLE, ASSERTS[:1]).score == 1.0


def test_a_program_that_waits_is_ended_by_the_clock(verify):
    program = (
        "import _thread\nlock = _thread.allocate_lock()\nlock.acquire()\nlock.acquire()"
    )
    assert verify._call(program, None, "", 0.3, 0.5, 0.5, 100) == ["timeout", ""]
    assert only_the_worker_is_left(verify._call)


HOOK, NAMESPACES = "            _forbid(library)\n", "if self._libc.unshare(flags):"
LIMITS = '_limit(task["seconds"], task["memory"])'
REPLACEMENTS = {HOOK: "", NAMESPACES: "if True:", LIMITS: "raise OSError('no limits')"}


@pytest.fixture
def without(tmp_path, monkeypatch):
    """Runs programs in a sandbox that lacks the hook, the namespaces, or both."""
    monkeypatch.syspath_prepend(tmp_path)
    source = pathlib.Path(code_program.__file__).read_text(encoding="utf-8")
    workers = []

    def start(*parts):
        changed = source
        for part in parts:
            assert part in changed
            changed = changed.replace(part, REPLACEMENTS[part])
        (tmp_path / "program.py").write_text(changed, encoding="utf-8")
        (tmp_path / "changed_runs.py").write_text(
            "from tmdjax.rewards import code_program, code_runs\n"
            f"code_program.__file__ = {str(tmp_path / 'program.py')!r}\n"
            "run = code_runs.run\n"
        )
        workers.append(Worker("changed_runs:run", timeout=30.0))
        return workers[-1]

    yield start
    for worker in workers:
        worker.close()


def outcome(worker, program):
    return worker(program, None, "", 1.0, 10.0, 0.5, 10**4)


def test_the_kernel_holds_what_gets_around_the_hook(without):
    held, worker = sandbox_status(), without(HOOK)
    run = functools.partial(outcome, worker)
    if not (held["network"] and held["files"]):
        pytest.skip(f"the kernel grants no namespaces here: {held}")
    root = pathlib.Path(os.__file__).parts[1]
    assert run("import os\nprint(os.listdir('/'))") == ["", f"['{root}']\n"]
    folder = os.path.dirname(os.__file__) + "/site-packages"
    if os.path.isdir(folder):  # what is installed is not there
        assert run(f"import os\nprint(os.listdir({folder!r}))") == ["", "[]\n"]
    assert run("open('/etc/passwd')")[0] == run("open('/proc/self/stat')")[0] == "error"
    assert run("import os\nopen(os.__file__, 'r+')")[0] == "error"
    assert run("import os\nos.unlink(os.__file__)")[0] == "error"
    assert (
        run("open('x', 'w').close()\nf = open('x', 'w', 1)\nf.write('y\\n')")[0]
        == "error"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        assert run(f"import socket\nsocket.create_connection({address})")[0] == "error"
    signals = "import os\nprint(os.getpid(), os.getppid())\nos.kill(os.getppid(), 9)"
    assert run(signals) == ["", "2 1\n"]  # who sees no parent cannot kill it
    daemon = "import os, time\nif not os.fork():\n    os.setsid()\n    while True: pass"
    assert run(daemon)[0] == ("error" if held["processes"] else "")
    assert only_the_worker_is_left(worker)


def test_nothing_is_left_where_there_are_no_namespaces(without):
    worker = without(HOOK, NAMESPACES)
    run = functools.partial(outcome, worker)
    assert "'network': False, 'files': False" in run(None)[1]
    # out of its session, and with no pipe that would be waited for
    daemon = "import os, time\nif not os.fork():\n    os.setsid()\n    os.close(1)\n"
    assert run(f"{daemon}    time.sleep(100)")[0] in ("", "error")  # error: cannot fork
    assert only_the_worker_is_left(worker)
    assert run("print(1)") == ["", "1\n"]


@pytest.mark.slow
def test_hook_and_limits_alone_hold_the_hostile_programs(without):
    verify = CodeVerifier(timeout=0.3)
    object.__setattr__(verify, "_call", without(NAMESPACES))
    for name, (program, reason) in HOSTILE.items():
        tests = PAIRS[:1] if "print(" in program else ASSERTS[:2]
        assert verify(program, tests) == Verdict(0.0, reason, 0, len(tests)), name
        assert verify(DOUBLE, ASSERTS[:1]).score == 1.0, name
        assert only_the_worker_is_left(verify._call), name


def test_tests_that_are_understood(verify, refused):
    for line in (
        "assert f(1) > 0",
        "assert f(1) == g(1)",
        "assert 1 == 1",
        "assert abs(f(1) - 2.5) < 1e-6",
        "assert isclose(f(1), 2.5)",
        "assert not f(1) == 2",
        "assert f(*[1])[0]",
        "assert f(**x)",
        "assert f(1) == 2 == 3",
        "f(1) == 2",
        "assert f(1) == 2; x = 1",
        "assert (",
        "\0",
        "",
    ):
        refused(
            "is not understood; give 'assert EXPRESSION == LITERAL'", verify, "", [line]
        )
    pairs = r"give an assert line, or a pair of texts"
    for test in (("1",), ("1", 2), 3, None, ("1", "2", "3")):
        refused(pairs, verify, "", [test], error=TypeError)
    refused("tests is empty; give at least one", verify, "", [])
    refused("tests is one string, 'assert", verify, "", "assert f(1)", error=TypeError)


def test_answers_that_are_no_literals_are_wrong():
    from tmdjax.rewards.code import _is_value

    assert _is_value("8", 8) and _is_value("8.0", 8) and not _is_value("'8'", 8)
    for text in ("", "f()", "(" * 9999, "-" * 60000 + "1", "1" + "+1" * 30000, "\0"):
        assert not _is_value(text, 1)
    for text in (
        "{[]: 1}",
        "9" * 5000,
        "nan",
        "{**{}}",
        "1 if 1 else 2",
        "[8" + ",8" * 3,
    ):
        assert not _is_value(text, 8)


def test_bad_settings(refused):
    for settings, message in (
        ({"timeout": 0.0}, r"timeout=0\.0 is outside \(0, 86400\]"),
        ({"memory_gb": 0.01}, r"memory_gb=0\.01 is outside \[0\.0625, 1024\]"),
        ({"longest_output": 0}, "longest_output=0 must be at least 1"),
        ({"processes": 0}, "processes=0 must be at least 1"),
    ):
        refused(message, CodeVerifier, **settings)


def test_a_sandbox_that_does_not_start_is_no_verdict(without, refused):
    verify = CodeVerifier()
    object.__setattr__(verify, "_call", without(LIMITS))
    message = "the sandbox of a program did not start: OSError.'no limits'"
    refused(message, verify, DOUBLE, ASSERTS, error=WorkerError)
    assert not verify.counts


def test_a_program_that_ends_the_worker_costs_one_sample():
    errors = {"hangs": WorkerTimeout("no answer"), "kills": WorkerError("status 137")}

    def run(program, *_):
        if program in errors:
            raise errors[program]
        return "", "=8\n"

    verify = CodeVerifier()
    object.__setattr__(verify, "_call", run)
    for program, reason in (("hangs", "timeout"), ("kills", "error")):
        assert verify(program, ASSERTS[:1]) == Verdict(0.0, reason, 0, 1)
        assert verify(DOUBLE, ASSERTS[:1]).score == 1.0


def test_programs_in_responses():
    for response, program in (
        ("print(1)", "print(1)"),
        ("So:\n```python\nx = 1\n```\nor\n```py\nx = 2\n```.", "x = 2\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\nRun:\n```python\nx =", "x = 1\n"),
        ("```python\nx = 1", "```python\nx = 1"),
        ("```sh\nls\n```", "```sh\nls\n```"),
    ):
        assert extract_program(response) == program
