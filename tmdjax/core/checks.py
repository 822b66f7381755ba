"""Checks of arguments. Each error says what was given, what is allowed, and why.

Values can only be checked where they are concrete: a check of a traced array
passes, so call these at the entrance, outside ``jit``.
"""

import dataclasses
import operator
import re
from collections.abc import Iterable
from typing import Any

import jax.core
import jax.numpy as jnp
import numpy as np

from tmdjax.core.registry import suggestion


def _concrete(array: Any) -> np.ndarray | None:
    return None if isinstance(array, jax.core.Tracer) else np.asarray(array)


def first_few(items: Iterable[str], limit: int = 8, separator: str = "; ") -> str:
    """The first items as one text for an error, and how many more there are."""
    items = list(items)
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return separator.join([*items[:limit], *more])


def brief(value: Any, most: int = 200) -> str:
    """A value as Python writes it, cut in the middle where that is long."""
    text = repr(value)
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} ... {text[-half:]} ({len(text)} characters)"


def check_choice(name: str, value: str, options: Iterable[str]) -> None:
    """Raises ValueError unless ``value`` is one of ``options``."""
    options = tuple(options)
    if value not in options:
        known = ", ".join(repr(o) for o in options)
        raise ValueError(
            f"{name}={brief(value)} is not one of {known}.{suggestion(value, options)}"
        )


def check_name(name: str, value: Any) -> str:
    """Returns ``value``, of which a file or folder is called.

    Raises:
        ValueError: it holds more than letters, digits and ``_.=+-``, or begins with a
            dot: as a path it could lead elsewhere.
    """
    if not isinstance(value, str) or not re.fullmatch(r"(?!\.)[\w.=+-]+", value):
        raise ValueError(
            f"{name}={brief(value)} names a file; use letters, digits and _.=+- alone, "
            f"not a dot first."
        )
    return value


def check_fields(kind: type, names: Iterable[str]) -> None:
    """Raises TypeError unless all names are fields of a dataclass."""
    fields = [field.name for field in dataclasses.fields(kind)]
    for name in names:
        if name not in fields:
            raise TypeError(
                f"{kind.__name__} has no setting {name!r}; it has {', '.join(fields)}."
                f"{suggestion(name, fields)}"
            )


def check_range(
    name: str,
    value: float,
    low: float = -np.inf,
    high: float = np.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raises ValueError unless the number lies in the interval, TypeError for none."""
    try:
        above = value > low if open_low else value >= low
        below = value < high if open_high else value <= high
    except TypeError:
        raise TypeError(f"{name}={brief(value)} is no number.") from None
    if not (above and below):
        left, right = "(" if open_low else "[", ")" if open_high else "]"
        raise ValueError(f"{name}={value} is outside {left}{low:g}, {high:g}{right}.")


def check_count(name: str, value: Any, low: int = 1) -> int:
    """Returns ``value`` as a Python int.

    Raises:
        TypeError: it is not an integer (2.0 and True are not).
        ValueError: it is below ``low``.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name}={brief(value)} is of type {type(value).__name__}; give an integer."
        ) from None
    if count < low:
        raise ValueError(f"{name}={count} must be at least {low}.")
    return count


def check_time(t: Any, name: str = "t") -> None:
    """Raises ValueError if a concrete time lies outside [0, 1] or is not finite."""
    values = _concrete(t)
    if values is None:
        return
    bad = ~((values >= 0) & (values <= 1))
    if bad.any():
        first = values[bad].flat[0] if values.ndim else values
        raise ValueError(
            f"{name} has {int(bad.sum())} value(s) outside [0, 1], the first is "
            f"{first}; times run from 1 (noise) to 0 (data). A network's own time "
            f"scale (1000 t, say) belongs into the model wrapper."
        )


def check_finite(array: Any, name: str, remedy: str = "Clean the input first.") -> None:
    """Raises ValueError if a concrete array holds NaN or infinity, naming where."""
    values = _concrete(array)
    if values is None or not jnp.issubdtype(values.dtype, jnp.inexact):
        return
    bad = ~np.isfinite(values)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name} has {int(bad.sum())} non-finite value(s), the first at index "
            f"{where}. {remedy}"
        )


def check_same_shape(name: str, array: Any, other_name: str, other: Any) -> None:
    """Raises ValueError unless two arrays have one shape."""
    if np.shape(array) != np.shape(other):
        raise ValueError(
            f"{name} has shape {np.shape(array)} but {other_name} has shape "
            f"{np.shape(other)}; they must agree."
        )


def check_output(value: Any, x: Any, name: str = "the velocity") -> Any:
    """Returns what a network made of a state, where the two may be added.

    Args:
        value: the network's output.
        x: the state, an array of [batch, *event].
        name: what the output is, for errors.

    Raises:
        TypeError: the output is not one array of floats.
        ValueError: it has another shape than its state. With an axis of length 1, such
            as one channel too few, it would be broadcast without a word.
    """
    dtype = getattr(value, "dtype", None)
    if not jnp.issubdtype(dtype or object, jnp.floating):
        raise TypeError(
            f"{name} is {type(value).__name__ if dtype is None else dtype}; a network "
            f"must return one array of floats, of the shape of its state."
        )
    check_same_shape(name, value, "its state x", x)
    return value


def check_batch(name: str, array: Any, batch: int) -> None:
    """Raises ValueError unless the leading axis has length ``batch``."""
    shape = np.shape(array)
    if not shape or shape[0] != batch:
        raise ValueError(
            f"{name} has shape {shape}; its leading axis must be the batch, {batch}."
        )
