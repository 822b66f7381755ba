"""Prints which data sources and weights are present, and how to get the rest.

Usage: ``python -m tmdjax.data.check``
"""

import os
from collections.abc import Sequence

from tmdjax.core.failures import exit_with
from tmdjax.data.sources import DATA_VARIABLE, SOURCES, Source, find_files
from tmdjax.data.weights import WEIGHTS

_HEADER = ("name", "package", "status", "licence", "how to get it")


def status(source: Source) -> str:
    """Returns 'built in', 'present', 'absent' or 'checksum differs'."""
    if source.present is not None:
        return "present" if source.present() else "absent"
    try:
        found = find_files(source)
    except FileNotFoundError:
        return "absent"
    except ValueError:
        return "checksum differs"
    return "present" if found else "built in"


def table() -> str:
    """One line a source, in aligned columns."""
    sources = [table[name] for table in (SOURCES, WEIGHTS) for name in table]
    rows = [(s.name, s.package, status(s), s.licence, s.install) for s in sources]
    rows = [_HEADER, *rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def unpacking() -> str:
    """How to fill the folder that ``TMDJAX_DATA`` names, and what it names now."""
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        state = "is not set"
    else:
        state = f"is {folder}" + ("" if os.path.isdir(folder) else ", not a folder")
    commands = [SOURCES[name].unpack for name in SOURCES if SOURCES[name].unpack]
    return "\n  ".join(
        (
            f"Without root, or for a machine without a package manager: fill a FOLDER "
            f"and set {DATA_VARIABLE}=FOLDER (it {state}).",
            *commands,
        )
    )


def main(arguments: Sequence[str]) -> int:
    """Prints both; takes no arguments.

    Raises:
        ValueError: an argument.
    """
    if arguments:
        raise ValueError(f"{arguments[0]!r} is too much: this command takes nothing.")
    print(table(), unpacking(), sep="\n\n")
    return 0


if __name__ == "__main__":
    exit_with(main)
