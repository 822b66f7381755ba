"""What commands say and return when they fail."""

import importlib
import json
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tmdjax
from tmdjax.core.checks import check_count
from tmdjax.core.failures import FAULT, MISTAKE, explain
from tmdjax.core.files import json_of, read_bounded
from tmdjax.core.optional import import_optional


def failed(call, *arguments):
    """What is said of the error of a call, and the status."""
    with pytest.raises(BaseException) as caught:
        call(*arguments)
    line, status = explain(caught.value)
    assert "\n" not in line
    return line, status


def raising(error):
    raise error


def test_what_is_foreseen_is_a_line(tmp_path):
    absent = tmp_path / "absent.json"
    odd = tmp_path / "odd.json"
    odd.write_text("[" * 100_000)
    for call, arguments, words in (
        (check_count, ("steps", 0), "ValueError: steps=0 must be at least 1"),
        (check_count, ("steps", 2.5), "TypeError: steps=2.5 is of type float"),
        (import_optional, ("no_such", "it", "llm"), "ImportError: it needs no_such"),
        (absent.read_text, (), f"{absent}: No such file or directory. Check the path"),
        (json_of, (absent,), f"{absent}: No such file"),
        (json_of, (odd,), f"{odd} is not JSON"),
        (read_bounded, (tmp_path,), "is no plain file"),
        (read_bounded, (odd, 10), "has 100000 bytes; such a file has at most 10"),
        (raising, (MemoryError(),), "out of memory: of the host. Make batches"),
        (
            raising,
            (RuntimeError("RESOURCE_EXHAUSTED: No space left"),),
            "RuntimeError: RESOURCE",
        ),
        (raising, (OSError(28, "No space left", "x"),), "x: No space left. Free space"),
        (raising, (OSError(5, "I/O error", "x"),), "x: I/O error. Free space or"),
        (raising, (ValueError("two\nlines"),), "ValueError: two lines"),
    ):
        line, status = failed(call, *arguments)
        assert words in line and status == MISTAKE, line
    assert failed(raising, KeyboardInterrupt())[1] == 128 + signal.SIGINT
    assert failed(raising, BrokenPipeError(32, "Broken pipe")) == ("", 141)


def test_a_fault_is_kept_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    x = jnp.ones(3)
    for call, arguments in (
        (lambda: {}["steps"], ()),
        (lambda: None + 1, ()),
        (lambda: jax.jit(lambda a, b: a @ b)(x, jnp.ones(4)), ()),
        (np.reshape, (np.ones(3), 7)),
        (raising, (AssertionError("never"),)),
        (json.loads, ("{",)),
    ):
        line, status = failed(call, *arguments)
        assert status == FAULT, line
        (kept,) = tmp_path.iterdir()
        assert str(kept) in line
        text = kept.read_text()
        assert "Traceback" in text and __file__ in text
        kept.unlink()


def test_where_nothing_can_be_written_the_traceback_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    try:
        {}["steps"]
    except KeyError as error:
        line, status = explain(error)
    assert status == FAULT and "Traceback" in line and "KeyError" in line


SLOW = """
import signal, sys, time
from tmdjax.core.failures import exit_with

# a shell starts its background jobs with interrupts ignored
signal.signal(signal.SIGINT, signal.default_int_handler)

def main(arguments):
    print("ready", flush=True)
    {body}
    return 0

sys.argv = ["command"]
exit_with(main)
"""


def start(body):
    return subprocess.Popen(
        [sys.executable, "-c", SLOW.format(body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_interrupts_and_closed_pipes_are_quiet():
    stopped = start("time.sleep(20)")
    assert stopped.stdout.readline() == "ready\n"
    stopped.send_signal(signal.SIGINT)
    _, said = stopped.communicate(timeout=15)
    assert stopped.returncode == 130 and said.startswith("interrupted;")
    body = (
        "from tmdjax.harness.runner import _stopper; stopper = _stopper(None);"
        "asked = stopper.__enter__(); print('training', flush=True);"
        "[time.sleep(0.01) for _ in iter(asked.should_stop, True)];"
        "print('at a log', flush=True); time.sleep(20)"
    )
    asked = start(body)
    lines = [asked.stdout.readline(), asked.stdout.readline()]
    asked.send_signal(signal.SIGINT)
    assert [*lines, asked.stdout.readline()] == ["ready\n", "training\n", "at a log\n"]
    asked.send_signal(signal.SIGINT)
    _, said = asked.communicate(timeout=15)
    assert asked.returncode == -signal.SIGINT  # 130 in a shell
    assert said.startswith("stopping at the next log;") and said.count("\n") == 1
    left = start("[print('x' * 1000) for _ in range(1000)]")
    assert left.stdout.readline() == "ready\n"
    left.stdout.close()
    assert left.stderr.read() == "" and left.wait(15) == 141


def test_a_command_that_is_still_imported_ends_quietly(monkeypatch):
    """One of ours alone: a program of somebody else keeps its interrupts."""
    before = signal.getsignal(signal.SIGINT)
    for command, quiet in (("tmdjax.data.convert", True), ("mine.train", False)):
        monkeypatch.setattr(sys, "argv", ["-m", "arrays"])
        monkeypatch.setattr(sys, "orig_argv", ["python", "-m", command, "arrays"])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        importlib.reload(tmdjax)
        assert (signal.getsignal(signal.SIGINT) == signal.SIG_DFL) == quiet
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_a_full_disk_is_one_line(tmp_path):
    body = (
        "import resource; from tmdjax.train import Checkpoints; import numpy as np;"
        f"kept = Checkpoints({str(tmp_path)!r}); kept.save(0, {{'a': np.ones(3)}});"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000));"
        "draw = np.random.default_rng(0).random;"
        "kept.save(1, {str(i): draw(20_000) for i in range(40)})"
    )
    for _ in range(3):  # which of the writes fails first is chance
        full = start(body)
        _, said = full.communicate(timeout=120)
        assert full.returncode == MISTAKE and said.count("\n") == 1, said
        assert said.startswith("CheckpointError: cannot write step 1") and (
            "intact: step 0. Free space" in said
        )
