"""What a command says when it fails: one line that names the remedy, and a status.

What is foreseen is raised on purpose by our own code, or comes from files, memory or an
interrupt. Anything else is a fault of the code: its traceback is kept whole in a file,
which the line names.
"""

import dis
import errno
import sys
import sysconfig
import tempfile
import traceback
from pathlib import Path

FAULT, MISTAKE = 1, 2
"""Exit statuses: a fault of the code; something that whoever runs it can mend."""

_KINDS = (ImportError, OSError, RuntimeError, TypeError, ValueError)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OUT_OF_MEMORY = (
    "Make batches, chunks or microbatches smaller: python -m experiments.plan says "
    "what a step needs, docs/troubleshooting.md what helps."
)


def explain(error: BaseException) -> tuple[str, int]:
    """The line to print for an error that ends a command, and the exit status.

    Returns:
        A text of one line ('' for a reader that went away), and ``MISTAKE``, ``FAULT``
        or 128 + the number of the signal. The traceback of a fault is written to a file
        in the folder for temporary files.
    """
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command goes on from its last checkpoint.", 130
    if isinstance(error, BrokenPipeError):
        return "", 141
    if isinstance(error, OSError) and error.strerror:
        remedy = "Check the path and its permissions."
        if error.errno in _FULL:
            remedy = "Free space; the same command then goes on."
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
