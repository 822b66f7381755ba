"""How latent maps move: with the world, and against the agent's own motion. All exact.

A latent map is [batch, velocity, row, column, channel]. It has a copy for each velocity
that things of the world may have (a *velocity channel*), which slides by that velocity
in every step. Velocities and motions are integers (x, y): columns to the right, rows
down.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import check_count, check_range
from tmdjax.core.types import Array, Bool, Float, Int

Velocities = tuple[tuple[int, int], ...]

CROSS: Velocities = ((0, 0), (1, 0), (0, 1), (-1, 0), (0, -1))
"""Rest and the four directions."""

LEFT, RIGHT, FORWARD, BACK, REST = range(5)
"""Actions of an agent that turns by 90 degrees and walks cell by cell. No map moves for
BACK, which the published agent never does, nor for REST."""


def square_velocities(most: int) -> Velocities:
    """All (x, y) of {-most .. most}^2, ordered by x, then y: (2 most + 1)^2 of them."""
    span = range(-check_count("most", most, 0), most + 1)
    return tuple((x, y) for x in span for y in span)


def as_velocities(velocities: Any) -> Velocities:
    """A set of velocities, from the largest component or from pairs.

    Args:
        velocities: an integer of at least 0, for :func:`square_velocities`; or a
            sequence of pairs of integers.

    Raises:
        TypeError: a component that is no integer: maps move by whole cells.
        ValueError: no velocity, one that is no pair, or one that stands twice.
    """
    if isinstance(velocities, int | np.integer):
        return square_velocities(int(velocities))
    pairs = [tuple(pair) for pair in velocities]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"velocities={velocities!r}; give pairs (x, y), at least one.")
    for x in (x for pair in pairs for x in pair):
        if isinstance(x, bool) or not isinstance(x, int | np.integer):
            raise TypeError(
                f"velocities={velocities!r} have {x!r}; give integers: a map moves by "
                f"whole cells."
            )
    if len({*pairs}) < len(pairs):
        raise ValueError(f"velocities={velocities!r} name one twice; name each once.")
    return tuple((int(x), int(y)) for x, y in pairs)


def shift(
    x: Float[Array, "*lead row column channel"], steps: Int[Any, "*lead_or_1 2"]
) -> Float[Array, "*lead row column channel"]:
    """Moves content by x columns to the right and y rows down, on a torus.

    Args:
        x: maps or images, with any axes before (row, column, channel).
        steps: integers (x, y) of any size, which may be traced; axes before the last
            one broadcast against those of x.

    Returns:
        Of the shape and dtype of x; one gather.

    Raises:
        TypeError: steps that are no integers.
    """
    steps = jnp.asarray(steps)
    if not jnp.issubdtype(steps.dtype, jnp.integer):
        raise TypeError(
            f"steps are {steps.dtype}; a torus is shifted by whole cells: give "
            f"integers."
        )
    *lead, rows, columns, channels = x.shape
    steps = jnp.broadcast_to(steps, (*lead, 2)).reshape(-1, 2, 1)
    flat = x.reshape(-1, rows, columns, channels)
    row = (jnp.arange(rows) - steps[:, 1]) % rows
    column = (jnp.arange(columns) - steps[:, 0]) % columns
    number = jnp.arange(len(flat))[:, None, None]
    moved = flat.at[number, row[:, :, None], column[:, None, :]].get(
        mode="promise_in_bounds", unique_indices=True
    )
    return moved.reshape(x.shape)


def drift(
    maps: Float[Array, "batch velocity row column channel"],
    velocities: Velocities,
    extra: tuple[int, int],
    time: Any = 1,
) -> tuple[Float[Array, "batch velocity row column channel"], Bool[np.ndarray, "v"]]:
    """Maps of the same world, had everything in it moved by ``extra`` more a step.

    What was in the channel of velocity v is in that of v + extra, and ``time * extra``
    further: h'(v) = T(time * extra) h(v - extra).

    Args:
        maps: latent maps.
        velocities: of their channels.
        extra: (x, y).
        time: steps that it lasted, which may be traced.

    Returns:
        The maps, and for which channels they say something: those v for which
        v - extra is one of the velocities. The others are zero.
    """
    sources = [(x - extra[0], y - extra[1]) for x, y in velocities]
    known = np.array([source in velocities for source in sources])
    at = [velocities.index(s) if s in velocities else 0 for s in sources]
    moved = shift(maps[:, np.array(at)], jnp.asarray(time) * jnp.array(extra))
    return jnp.where(known[:, None, None, None], moved, 0), known


@functools.cache
def flow_table(side: int, velocities: Velocities) -> Int[np.ndarray, "cell"]:
    """Where each cell of a map comes from when every channel slides by its velocity.

    Args:
        side: rows and columns of the map.
        velocities: of its channels.

    Returns:
        int32 [velocity * row * column], indices into a flattened map.
    """
    cells = _cells(side, velocities)
    moved = [np.roll(c, (y, x), (0, 1)) for c, (x, y) in zip(cells, velocities)]
    return _frozen(np.stack(moved).ravel())


@functools.cache
def action_tables(side: int, velocities: Velocities) -> Int[np.ndarray, "action cell"]:
    """Where each cell comes from when the agent in the middle turns or walks.

    The agent looks along increasing columns. After LEFT the map has turned by 90
    degrees clockwise as displayed, and what moved with velocity (x, y) moves with
    (-y, x), in another channel; RIGHT undoes it; FORWARD moves the map one column to
    the left.

    Args:
        side: rows and columns of the map, odd.
        velocities: of its channels, closed under turns by 90 degrees.

    Returns:
        int32 [5, velocity * row * column], indices into a flattened map, for LEFT,
        RIGHT, FORWARD, BACK and REST.

    Raises:
        ValueError: a turned velocity that is not there, or an even side.
    """
    if side % 2 == 0:
        raise ValueError(f"side={side} has no middle cell; give an odd one.")
    turned = [(-y, x) for x, y in velocities]
    missing = [v for v in turned if v not in velocities]
    if missing:
        raise ValueError(
            f"velocities={velocities} lack {missing[0]}, which one of them becomes "
            f"when the agent turns; add it."
        )
    cells = _cells(side, velocities)
    clockwise = np.rot90(cells, -1, (1, 2))
    left = np.empty_like(cells)
    left[[velocities.index(v) for v in turned]] = clockwise
    right = np.rot90(cells, 1, (1, 2))[[velocities.index(v) for v in turned]]
    forward = np.roll(cells, -1, 2)
    return _frozen(np.stack([left, right, forward, cells, cells]).reshape(5, -1))


def permute(
    maps: Float[Array, "batch velocity row column channel"],
    tables: Int[np.ndarray, "action cell"],
    actions: Int[Array, "batch"],
) -> Float[Array, "batch velocity row column channel"]:
    """Moves each map by the permutation of its action; one gather.

    Args:
        maps: latent maps.
        tables: of :func:`action_tables`; ``flow_table(...)[tables]`` slides by the
            velocities first.
        actions: int [batch] in [0, action); one out of range makes its map NaN.
    """
    source = (
        jnp.asarray(tables)
        .at[actions]
        .get(mode="fill", fill_value=-1, wrap_negative_indices=False)
    )
    flat = maps.reshape(maps.shape[0], -1, maps.shape[-1])
    moved = flat.at[jnp.arange(len(flat))[:, None], source].get(
        mode="fill", unique_indices=True, wrap_negative_indices=False
    )
    return moved.reshape(maps.shape)


@functools.cache
def field_of_view(side: int, degrees: float) -> Bool[np.ndarray, "row column"]:
    """Which cells of a map are in view of an agent in its middle that looks right.

    A cell is, where at least one of 5 x 5 points of it lies within degrees / 2 of the
    heading, however far.

    Args:
        side: rows and columns, odd.
        degrees: angle of the view, in (0, 180].

    Returns:
        bool [side, side]; symmetric in rows.

    Raises:
        ValueError: a number out of range.
    """
    check_count("side", side)
    check_range("degrees", degrees, 0, 180, open_low=True)
    if side % 2 == 0:
        raise ValueError(f"side={side} has no middle cell; give an odd one.")
    offsets = (np.arange(5) + 0.5) / 5 - 0.5
    points = (np.arange(side)[:, None] - side // 2 + offsets).ravel()
    y, x = points[:, None], points[None, :]
    distance = np.maximum(np.hypot(x, y), 1e-9)
    # to 1e-12: points that lie on the edge are in view above and below alike
    inside = x / distance >= np.cos(np.radians(degrees) / 2) - 1e-12
    return _frozen(inside.reshape(side, 5, side, 5).any((1, 3)))


def _cells(side: int, velocities: Sequence[Any]) -> np.ndarray:
    count = len(velocities) * side * side
    return np.arange(count, dtype=np.int32).reshape(len(velocities), side, side)


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
