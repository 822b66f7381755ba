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
    importlib.invalidate_caches()  # files may have been written since
    if path == _folder:
        return
    if _folder and _folder in sys.path:  # '' is the current folder, in a notebook
        sys.path.remove(_folder)
        _forget(_folder)
    _folder = ""
    if path not in sys.path:
        sys.path.append(path)
        _folder = path


def _forget(folder: str) -> None:
    """Drops what was imported of a folder: its files, and packages with all in them."""
    tops = set()
    for name, module in list(sys.modules.items()):
        places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
        parents = {str(pathlib.Path(place).parent) for place in places if place}
        if "." not in name and folder in parents:
            tops.add(name)
    for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
        del sys.modules[name]


def find_module(name: str, package: str) -> ModuleType | None:
    """Imports ``package.name``, or else a module ``name``, such as one beside a config.

    The folder of the config that :func:`tmdjax.harness.load_config` read last is
    importable, so that a paper outside the repository needs no installation.

    Args:
        name: of a module, without dots, such as ``"control"``.
        package: looked into first, such as ``"experiments"`` or ``"tmdjax.systems"``.

    Returns:
        The module, or None if neither is there. What it raises at import is passed on.

    Raises:
        ValueError: the config's folder has a file of that name, which is no config, but
            another module of the name is found first.
    """
    if not name.isidentifier():
        return None
    beside = pathlib.Path(_folder, f"{name}.py")
    for path in (f"{package}.{name}", name):
        spec = importlib.util.find_spec(path)
        if spec is None:
            continue
        hidden = _folder and spec.origin != str(beside) and beside.is_file()
        if hidden and "def get_config" not in beside.read_text():
            raise ValueError(
                f"{beside} would be passed over: {name!r} is {spec.origin}; give the "
                f"file another name."
            )
        return importlib.import_module(path)
    return None
