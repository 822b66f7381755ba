"""Names and paths in the code spans of pages: do they exist, and where?

Names of the package stand without the folders before them (`flows.rollout`,
`boss.search`); paths begin at the root or in tmdjax/ (`train/state.py`).
The site links names to the API, and tests refuse what is gone.
"""

import functools
import importlib
import pathlib
import re
import types
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent

_FENCE = re.compile(r"^( *)```.*?^\1```$", re.S | re.M)
_SPAN = re.compile(r"`([^`\n]+)`")
_NAME = re.compile(r"([A-Za-z_]\w*(?:\.\w+)+)(?![\w.*<=/-]|: )")
_PATH = re.compile(r"[\w.-]+(?:/[\w.-]+)+/?")
_FILES = (
    "csv gguf gif html ini ipynb json jsonl md npz png py toml yml".split()
)
_MADE = ("build", "runs", "stages", "units", "figures")
"""Folders that only a run makes."""


def names(text: str) -> Iterator[str]:
    """Dotted names that may be of the package; no variables of the page."""
    code = "".join(found[0] for found in _FENCE.finditer(text))
    variables = set(re.findall(r"\b(\w+)(?:, \w+)* = ", code))
    for span in _SPAN.findall(_FENCE.sub("", text)):
        found = _NAME.match(span)
        if found and found[1].rpartition(".")[2] not in _FILES:
            if found[1].partition(".")[0] not in variables:
                yield found[1]


def missing_paths(text: str) -> list[str]:
    """Paths that lead nowhere, but for placeholders in capitals."""
    spans = _SPAN.findall(_FENCE.sub("", text))
    found = [
        s
        for s in spans
        if _PATH.fullmatch(s) and s.split("/")[0] not in _MADE
    ]
    commands = re.findall(
        r"-m ((?:experiments|benchmarks|tmdjax)[\w.]*)", text
    )
    found += [command.replace(".", "/") + ".py" for command in commands]
    found += re.findall(r"--config=(configs/\w+\.py)", text)
    return [
        path
        for path in found
        if not re.search(r"[A-Z]{3,}\b(?!\.md)", path)
        and not any(
            (ROOT / start / path).exists() for start in ("", "tmdjax")
        )
    ]


@functools.cache
def _modules() -> dict[str, list[str]]:
    """Modules and packages of tmdjax by their last name, outer first."""
    places: dict[str, list[str]] = {"tmdjax": ["tmdjax"]}
    for path in sorted(
        (ROOT / "tmdjax").rglob("*.py"), key=lambda p: len(p.parts)
    ):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if len(parts) > 1:
            places.setdefault(parts[-1], []).append(".".join(parts))
    return places


def find(name: str) -> Any:
    """What a name means; None if it is none of the package's.

    Raises:
        AttributeError: it begins like one of them, and is not there.
    """
    first, *rest = name.split(".")
    fault = None
    for place in _modules().get(first, []):
        found: Any = importlib.import_module(place)
        try:
            for part in rest:
                if isinstance(found, types.ModuleType) and not hasattr(
                    found, part
                ):
                    importlib.import_module(f"{found.__name__}.{part}")
                found = getattr(found, part)
            return found
        except (AttributeError, ModuleNotFoundError) as error:
            fault = error
    if fault is not None:
        raise AttributeError(
            f"`{name}` is mentioned, and does not exist."
        ) from fault
    return None


def identifier(name: str) -> str | None:
    """Where the API documents a name: 'tmdjax.flows.rollout.rollout'."""
    try:
        found = find(name)
    except AttributeError:
        return None
    if isinstance(found, types.ModuleType):
        return (
            found.__name__ if found.__name__.startswith("tmdjax.") else None
        )
    module = getattr(found, "__module__", None) or ""
    if not module.startswith("tmdjax.") or not hasattr(
        found, "__qualname__"
    ):
        return None
    return f"{module}.{found.__qualname__}"
