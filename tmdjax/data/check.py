"""Prints which data sources are present, and how to get the rest.

Usage: ``python -m tmdjax.data.check``
"""

from tmdjax.data.sources import SOURCES, Source, find_files

_HEADER = ("name", "package", "status", "licence", "how to get it")


def status(source: Source) -> str:
    """Returns 'built in', 'present', 'absent' or 'checksum differs'."""
    try:
        found = find_files(source)
    except FileNotFoundError:
        return "absent"
    except ValueError:
        return "checksum differs"
    return "present" if found else "built in"


def table() -> str:
    """One line a source, in aligned columns."""
    rows: list[tuple[str, ...]] = [_HEADER]
    for source in (SOURCES[name] for name in SOURCES):
        rows.append(
            (
                source.name,
                source.package,
                status(source),
                source.licence,
                source.install,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
