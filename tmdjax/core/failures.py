"""How a command ends: where it fails, one line that names the remedy, and a status.

What is foreseen is raised on purpose by our own code, or comes from files, memory or an
interrupt. Anything else is a fault of the code: its traceback is kept whole in a file,
which the line names.
"""

import dis
import errno
import logging
import os
import signal
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

FAULT, MISTAKE = 1, 2
"""Exit statuses: a fault of the code; something that whoever runs it can mend."""

_KINDS = (ImportError, OSError, RuntimeError, TypeError, ValueError)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OUT_OF_MEMORY = (
    "Make batches, chunks or microbatches smaller: python -m experiments.plan says "
    "what a step needs, docs/troubleshooting.md what helps."
)


def exit_with(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Runs a command on the process's arguments; what fails is said in one line.

    Args:
        main: takes the arguments but for ``--traceback``, which has errors raised as
            they are, and returns the exit status.

    Raises:
        SystemExit: always; with the status of ``main``, or that of :func:`explain`.
    """
    logging.basicConfig(format="%(message)s")
    for name in ("absl", "asyncio"):  # their faults are raised
        logging.getLogger(name).setLevel(logging.CRITICAL)
    signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = _of_a_thread
    arguments = [a for a in sys.argv[1:] if a != "--traceback"]
    try:
        status = main(arguments)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        if "--traceback" in sys.argv:
            raise
        line, status = explain(error)
        if line:
            print(f"{line} (--traceback shows where)", file=sys.stderr)
        else:  # whoever read the output went away: nothing is left to flush to
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def _interrupt(number: int, frame: Any) -> None:
    """The first interrupt ends the command, the next one at once and in silence."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


def _of_a_thread(found: Any) -> None:
    """Prints what nobody could catch, but for writes to a full disk.

    Orbax gives up at the first array that cannot be written, and says so; the others
    then report to an event loop that is closed.
    """
    if str(found.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(found)


def explain(error: BaseException) -> tuple[str, int]:
    """The line to print for an error that ends a command, and the exit status.

    Returns:
        A text of one line ('' for a reader that went away), and ``MISTAKE``, ``FAULT``
        or 128 + the number of the signal. The traceback of a fault is written to a file
        in the folder for temporary files.
    """
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        said = "interrupted; the same command goes on, from its last checkpoint if any."
        return said, 130
    if isinstance(error, BrokenPipeError):
        return "", 141
    if isinstance(error, OSError) and error.strerror:
        remedy = "Check the path and its permissions."
        if error.errno in _FULL:
            remedy = "Free space; the same command then goes on."
        if error.errno == errno.EIO:  # which is all that SQLite says of a quota, too
            remedy = "Free space or mend the disk; the same command then goes on."
        where = "" if error.filename is None else f"{error.filename}: "
        return f"{type(error).__name__}: {where}{error.strerror}. {remedy}", MISTAKE
    if raised_on_purpose(error) and isinstance(error, _KINDS):
        return f"{type(error).__name__}: {text}", MISTAKE
    if "No space left on device" in text:  # RESOURCE_EXHAUSTED to tensorstore
        return f"the disk is full: {text} Free space; then run it again.", MISTAKE
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return f"out of memory: {text or 'of the host'}. {_OUT_OF_MEMORY}", MISTAKE
    if "Unable to initialize backend" in text:
        return f"{text} Set JAX_PLATFORMS to a platform that is there.", MISTAKE
    return f"{type(error).__name__}: {text} {_kept(error)}", FAULT


def raised_on_purpose(error: BaseException) -> bool:
    """Whether a ``raise`` of our code, or of a paper's own, brought the error about."""
    end = error.__traceback__
    while end is not None and end.tb_next is not None:
        end = end.tb_next
    if end is None or _is_foreign(end.tb_frame.f_code.co_filename):
        return False
    instruction = end.tb_frame.f_code.co_code[end.tb_lasti]
    return dis.opname[instruction] == "RAISE_VARARGS"


def _is_foreign(file: str) -> bool:
    """Whether a file is of Python or of an installed package other than this one."""
    if Path(file).is_relative_to(Path(__file__).parents[1]):
        return False
    places = {sysconfig.get_path(n) for n in ("stdlib", "purelib", "platlib")}
    return file.startswith("<") or any(Path(file).is_relative_to(p) for p in places)


def _kept(error: BaseException) -> str:
    """Writes the traceback; says where it is."""
    lines = traceback.format_exception(error)
    text = f"{' '.join(sys.argv)}\n\n{''.join(lines)}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="tmdjax-fault-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(text)
    except OSError:
        return f"(this is a fault of the code, and its traceback fits nowhere)\n{text}"
    return f"(this is a fault of the code; please report it with {file.name})"
