r"""Programs of a policy, judged by unit tests that they cannot read.

    verify = CodeVerifier()
    verify("def double(x):\n    return 2 * x", ["assert double(4) == 8"])  # score 1.0
    verify("print(int(input()) + 1)", [("4\n", "5\n")])

The text is never run in this process. It runs in one of its own, started by a worker
(:mod:`tmdjax.rewards.worker`), which is told what to read and what to call, and sends
back what it wrote and the values, as literals. They are compared here: whatever a
program does to its builtins, or writes in the place of an answer, it must have the
right value, and the right values are where it is not.

What holds a program, from the strongest:

- Linux namespaces, where the kernel grants them (to root, or to users by user
  namespaces): no network, no other process to see or to signal; no file but Python's
  standard library, to read, and none of an installed package; and all that it started
  ends with it.
- Limits: CPU seconds, address space, size of written files 0, no core, 16 open files;
  no further process or thread, unless it runs as root. As root it goes on as 'nobody'
  where that user may read the standard library. No capabilities, an empty environment,
  and a working directory that is removed already.
- An audit hook with a list of what is allowed: to compute, and to import from the
  standard library. Sockets, processes, threads, sleeping, ``ctypes`` and other files
  raise.

:func:`sandbox_status` says which of them the kernel holds here. What only the hook
holds (everything but the limits in most containers, and outside of Linux), a program
that means to can walk around: an audit hook shares the interpreter with it, and is no
wall against the import system's own functions or hand-made bytecode. And no layer holds
faults of the kernel, or what the time of a run tells. Where a policy is not your own,
run the trainer itself in a container or a virtual machine.
"""

import ast
import dataclasses
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from tmdjax.core.checks import brief, check_count, check_range
from tmdjax.rewards.worker import Worker, WorkerError, WorkerPool, WorkerTimeout

REASONS = ("timeout", "memory", "error", "wrong answer")
"""Why a test failed: the CPU seconds were over, the memory was, the program raised or
died or wrote too much, or its answer is another one."""

Test = str | tuple[str, str]
"""An assert line, or standard input and the standard output that belongs to it."""

_RUN = "tmdjax.rewards.code_runs:run"
_START, _WALL = 5.0, 10.0  # on the clock: at first, and for each CPU second
_LONGEST_TIMEOUT = 86400.0
_MEMORY = 1 / 16, 1024.0  # GiB; an interpreter alone needs about half of the first
_BLOCK = re.compile(r"```[ \t]*(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL | re.I)


class Verdict(NamedTuple):
    """What a program earns.

    Attributes:
        score: in [0, 1].
        reason: of the first test that failed (assert lines come before the others), one
            of ``REASONS``; '' where none did.
        passed: tests that passed, of those that were run.
        tests: tests there are.
    """

    score: float
    reason: str
    passed: int
    tests: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeVerifier:
    """Judges programs by tests; it may be called from several threads.

    All assert lines of a program share one run of it, as a module whose name is not
    '__main__': a call that raises fails alone, and what was not reached before an end
    has failed too. Each pair of input and output is a run of its own. Hashes of strings
    are the same in all runs, so a verdict repeats, unless the program draws random
    numbers or is close to a limit.

    Attributes:
        timeout: CPU seconds of one run, in (0, 86400]. On the clock a run ends after
            ten times as long and 5 s, however it waits.
        memory_gb: address space of one run in GiB, 1/16 to 1024.
        longest_output: bytes that one run may write (its answers, for assert lines).
        all_or_nothing: the score is 1.0 if all tests pass, else 0.0, and the first
            failed run is the last; by default it is the share of tests that pass.
        processes: programs that run at the same time where as many threads call; more
            wait. With more of them than cores, a run may be ended by the clock before
            its CPU seconds are over.
        counts: verdicts so far by reason, 'passed' where there is none.

    Raises:
        TypeError: longest_output or processes is no integer.
        ValueError: a number outside its range.
    """

    timeout: float = 2.0
    memory_gb: float = 0.5
    longest_output: int = 1 << 16
    all_or_nothing: bool = False
    processes: int = 1
    counts: Counter[str] = dataclasses.field(
        default_factory=Counter, init=False, compare=False, repr=False
    )
    _counting: threading.Lock = dataclasses.field(
        default_factory=threading.Lock, init=False, compare=False, repr=False
    )
    _call: WorkerPool = dataclasses.field(init=False, compare=False, repr=False)

    def __post_init__(self):
        check_range("timeout", self.timeout, 0, _LONGEST_TIMEOUT, open_low=True)
        check_range("memory_gb", self.memory_gb, *_MEMORY)
        check_count("longest_output", self.longest_output)
        # the worker's own bounds are behind those of the run
        call = WorkerPool(
            _RUN,
            processes=self.processes,
            timeout=self._wall + 5.0,
            memory_gb=self.memory_gb + 1.0,
        )
        object.__setattr__(self, "_call", call)

    def __call__(self, program: str, tests: Sequence[Test]) -> Verdict:
        """Runs a program against its tests.

        Args:
            program: Python, any text; see :func:`extract_program`.
            tests: at least one, each either a text 'assert EXPRESSION == LITERAL'
                (or the sides exchanged), 'assert NAME(LITERALS)' or 'assert not
                NAME(LITERALS)', the expression evaluated where the program is and its
                value compared here by Python's ==, so a value must be a literal too
                (numbers, texts, None, and lists, tuples, dicts and sets of them); or a
                pair of texts, standard input and output, compared line by line without
                blanks at the ends of lines and of the text. What the program does not
                need to be told, such as the literal, it is not told.

        Raises:
            TypeError: tests is one string, or a test neither a text nor a pair of them.
            ValueError: no tests, or an assert line of another form.
            WorkerError: the sandbox itself cannot be started.
        """
        if isinstance(tests, str):
            raise TypeError(
                f"tests is one string, {brief(tests)}; give a list of them."
            )
        if not len(tests):
            raise ValueError("tests is empty; give at least one.")
        asserts, pairs = _parsed(tests)
        passed, first = 0, ""
        for reason in self._reasons(program, asserts, pairs):
            passed += not reason
            first = first or reason
            if first and self.all_or_nothing:
                break
        score = passed / len(tests)
        if self.all_or_nothing:
            score = float(passed == len(tests))
        with self._counting:
            self.counts[first or "passed"] += 1
        return Verdict(score, first, passed, len(tests))

    def close(self) -> None:
        """Ends the workers; later calls would start others."""
        self._call.close()

    @property
    def _wall(self) -> float:
        """Seconds of one run, on the clock."""
        return _START + _WALL * self.timeout

    def _reasons(
        self,
        program: str,
        asserts: list[tuple[str, Any]],
        pairs: list[tuple[str, str]],
    ) -> Iterator[str]:
        """Why each test failed, '' for one that passed."""
        if asserts:
            end, output = self._run(program, [call for call, _ in asserts], "")
            lines = output.split("\n")[:-1]  # behind the last line is its unended rest
            for number, (_, expected) in enumerate(asserts):
                if number >= len(lines):
                    yield end or "error"
                elif lines[number] == "!memory":
                    yield "memory"
                elif not lines[number].startswith("="):
                    yield "error"
                else:
                    right = _is_value(lines[number][1:], expected)
                    yield "" if right else "wrong answer"
        for given, expected in pairs:
            end, output = self._run(program, None, given)
            right = _lines(output) == _lines(expected)
            yield end or ("" if right else "wrong answer")

    def _run(self, program: str, calls: list[str] | None, text: str) -> tuple[str, str]:
        limits = self.timeout, self._wall, self.memory_gb, self.longest_output
        try:
            end, output = self._call(program, calls, text, *limits)
        except WorkerTimeout:
            return "timeout", ""
        except WorkerError:
            # the program's doing, unless one that does nothing fails as well
            self._call("", None, "", *limits)
            return "error", ""
        return end, output


def sandbox_status() -> dict[str, bool]:
    """Which parts of the sandbox the kernel holds here; the hook holds the others.

    Returns:
        'network' (no address outside is reached, no other process is signalled),
        'files' (none but the standard library; where this is False, other processes can
        be seen in /proc, and sockets that are files reached), 'processes' (none may be
        started).

    Raises:
        WorkerError: the sandbox cannot be started.
    """
    worker = Worker(_RUN, timeout=60.0)
    try:
        _, output = worker(None, None, "", 5.0, 55.0, 0.5, 1000)
    finally:
        worker.close()
    return ast.literal_eval(output)


def extract_program(response: str) -> str:
    """The last complete block of code between triple backticks, else all of the text.

    Blocks that name another language than Python are passed over.
    """
    blocks = _BLOCK.findall(response)
    return blocks[-1] if blocks else response


def _parsed(
    tests: Sequence[Test],
) -> tuple[list[tuple[str, Any]], list[tuple[str, str]]]:
    asserts, pairs = [], []
    for test in tests:
        if isinstance(test, str):
            asserts.append(_assertion(test))
            continue
        try:
            given, expected = test
        except (TypeError, ValueError):
            given = expected = None
        if not (isinstance(given, str) and isinstance(expected, str)):
            raise TypeError(
                f"a test is {brief(test)}; give an assert line, or a pair of texts, "
                f"standard input and output."
            )
        pairs.append((given, expected))
    return asserts, pairs


def _assertion(line: str) -> tuple[str, Any]:
    """What the program's side evaluates, and the value that it must have."""
    try:
        body = ast.parse(line.strip()).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        body = []
    if len(body) == 1 and isinstance(body[0], ast.Assert):
        match body[0].test:
            case ast.Compare(left=left, ops=[ast.Eq()], comparators=[right]):
                for call, value in ((left, right), (right, left)):
                    if _is_literal(value) and not _is_literal(call):
                        return ast.unparse(call), ast.literal_eval(value)
            case ast.UnaryOp(op=ast.Not(), operand=call) if _tells_nothing(call):
                return f"not {ast.unparse(call)}", True
            case call if _tells_nothing(call):
                return f"not {ast.unparse(call)}", False
            case _:
                pass
    raise ValueError(
        f"test {brief(line)} is not understood; give 'assert EXPRESSION == LITERAL', "
        f"'assert NAME(LITERALS)' or 'assert not NAME(LITERALS)', or a pair of texts, "
        f"standard input and output."
    )


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, MemoryError, RecursionError):
        return False
    return True


def _tells_nothing(node: ast.expr) -> bool:
    """Says whether this is a call of literals, with no answer in it."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and all(map(_is_literal, node.args))
        and all(k.arg is not None and _is_literal(k.value) for k in node.keywords)
    )


def _is_value(text: str, expected: Any) -> bool:
    """Says whether a text that the program's side wrote is a literal of that value."""
    try:
        return bool(ast.literal_eval(text) == expected)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
