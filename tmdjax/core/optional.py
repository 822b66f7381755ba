"""Packages that only some adapters need: imported there, named when absent."""

import importlib
from typing import Any


def import_optional(module: str, purpose: str, extra: str) -> Any:
    """Imports a package that an extra of tmdjax brings.

    Args:
        module: its name, or that of a module in it.
        purpose: what needs it, the beginning of the error: 'reading text'.
        extra: the name in brackets after tmdjax that brings it.

    Raises:
        ImportError: it, or a package that it needs, is absent; with the command that
            installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs {error.name or module}: {error}. Run: pip install "
            f"'tmdjax[{extra}]'"
        ) from error
