"""Finds modules by a name in a config: those of the project, or beside the config."""

import importlib
import importlib.util
import pathlib
import sys
from types import ModuleType

_folder = ""
"""That of the last config, where nothing else put it on the path."""


def use_folder(folder: pathlib.Path) -> None:
    """Makes the modules of a config's folder importable, after all others.

    They take the place of those of the last config's folder, so that two papers may
    have files of one name.
    """
    global _folder
    path = str(folder.resolve())
    if path in sys.path:
        return
    if _folder in sys.path:
        sys.path.remove(_folder)
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if "." not in name and file and str(pathlib.Path(file).parent) == _folder:
                del sys.modules[name]
    sys.path.append(path)
    _folder = path


def find_module(name: str, package: str) -> ModuleType | None:
    """Imports ``package.name``, or else a module ``name``, such as one beside a config.

    The folder of the config that :func:`tmdjax.harness.load_config` read last is
    importable, so that a paper outside the repository needs no installation.

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
