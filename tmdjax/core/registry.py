"""Named entries that refuse duplicates and suggest the nearest name."""

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


def suggestion(name: str, options: Iterable[str]) -> str:
    """Returns ' Did you mean ...?' for the nearest of ``options``, or ''."""
    near = difflib.get_close_matches(str(name), [str(o) for o in options], n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


class Registry(Generic[T]):
    """A table from names to entries.

    Example:
        >>> presets = Registry("preset")
        >>> @presets.register("ode")
        ... def ode(): return 1
        >>> presets["ode"]()
        1
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds an entry.

        Raises:
            ValueError: the name is taken.
        """

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(
                    f"{self.kind} {name!r} is registered already; choose another name."
                )
            self._entries[name] = entry
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            known = ", ".join(sorted(self._entries))
            raise ValueError(
                f"unknown {self.kind} {name!r}; known: {known}."
                f"{suggestion(name, self._entries)}"
            )
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)
