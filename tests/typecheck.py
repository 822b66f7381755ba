"""What the import hook does: functions with shapes are checked, all others left alone.

Shapes are checked by beartype, with int accepted for float. A call of a checked function
costs 50 microseconds more, a program that is traced makes thousands, and what is annotated
by plain types alone is seen by basedpyright.
"""

import dataclasses
import functools
import inspect
import typing

import jaxtyping
from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_decorate = jaxtyping.jaxtyped


def _has_shapes(annotation) -> bool:
    """Whether it is an array type of jaxtyping, or holds one; unread ones may be."""
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    inner = typing.get_args(annotation)
    return isinstance(annotation, str) or any(map(_has_shapes, inner))


def _functions(decorated):
    """Of a function, a method, a property or a dataclass: what would be checked."""
    if inspect.isclass(decorated):
        return [decorated.__init__] if dataclasses.is_dataclass(decorated) else []
    if isinstance(decorated, property):
        return [f for f in (decorated.fget, decorated.fset) if f is not None]
    return [getattr(decorated, "__func__", decorated)]


def _where_there_are_shapes(decorated=None, *, typechecker):
    """The decorator that the hook puts on all functions and classes of the package."""
    if decorated is None:
        return functools.partial(_where_there_are_shapes, typechecker=typechecker)
    for function in _functions(decorated):
        annotations = getattr(function, "__annotations__", {})
        if any(map(_has_shapes, annotations.values())):
            return _decorate(decorated, typechecker=typechecker)
    return decorated


def install(package: str) -> None:
    """Checks the shapes of a package that is not imported yet."""
    jaxtyping.jaxtyped = _where_there_are_shapes
    jaxtyping.install_import_hook(package, f"{__name__}.check")
