"""Finds modules by a name in a config: those of the project, or beside the config."""

import importlib
import importlib.util
from types import ModuleType


def find_module(name: str, package: str) -> ModuleType | None:
    """Imports ``package.name``, or else a module ``name``, such as one beside a config.

    The folder of a config is importable once :func:`tmdjax.harness.load_config` has
    read it, so that a paper outside the repository needs no installation. Python keeps
    one module a name: two such papers in one process need files of different names.

    Args:
        name: of a module, without dots, such as ``"control"``.
        package: looked into first, such as ``"experiments"`` or ``"tmdjax.systems"``.

    Returns:
        The module, or None if neither is there. What it raises at import is passed on.
    """
    if name.isidentifier():
        for path in (f"{package}.{name}", name):
            if importlib.util.find_spec(path) is not None:
                return importlib.import_module(path)
    return None
