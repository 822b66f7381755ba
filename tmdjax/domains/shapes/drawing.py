"""Random specs of coloured shapes on grey, and exact images of specs.

:func:`tmdjax.domains.shapes.checks.check` gives every image of :func:`render` the score
1. Both samplers are pure and jittable; sample i depends on key i alone.

References:
    GenEval, arXiv 2310.11513: the tasks that ``TAGS`` names.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import check_batch, check_choice, check_range
from tmdjax.core.prng import check_key
from tmdjax.core.types import Array, Float, Int, Key, SampleKeys
from tmdjax.domains.shapes.specs import (
    BACKGROUND,
    CLAUSES,
    COLOURS,
    FIELDS,
    MOST_OF_A_CLAUSE,
    RELATIONS,
    SHAPES,
    TAGS,
    Specs,
    check_specs,
    shape_masks,
)

LEAST_SIZE = 16
LAYOUTS = ("free", "cells")
_LEAST_SIDE = 5
_CELL = 11
_FEWEST_LINES, _MOST_LINES = 2, 4
_MIXED_THROWS = 13


def _lines(size: int) -> int:
    """Rows (and columns) of the finest grid that objects of an image stand in."""
    return min(max((size + 1) // _CELL, _FEWEST_LINES), _MOST_LINES)


def capacity(size: int) -> int:
    """Most objects of an image: 4 from size 16, 9 from 32, 12 from 43.

    Raises:
        ValueError: size < 16.
    """
    check_range("size", size, LEAST_SIZE)
    return min(_lines(size) ** 2, CLAUSES * MOST_OF_A_CLAUSE)


def check_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """Returns the tags as a tuple.

    Raises:
        ValueError: none, or one that is not in ``TAGS``.
    """
    if isinstance(tags, str):
        raise ValueError(f"tags={tags!r} is one text; give a sequence, ({tags!r},).")
    tags = tuple(tags)
    if not tags:
        raise ValueError(f"tags is empty; give some of {', '.join(TAGS)}.")
    for tag in tags:
        check_choice("tag", tag, TAGS)
    return tags


def sample_specs(
    keys: SampleKeys, *, tags: Sequence[str] = TAGS, size: int
) -> dict[str, Array]:
    """Random specs, each tag equally likely and each choice inside it uniform.

    Two clauses of 'two', 'attribution' and 'mixed' have different shapes; those of
    'position' differ in shape or colour.

    Args:
        keys: typed keys [batch].
        tags: some of ``TAGS``, equally likely.
        size: of the images, >= 16; no spec asks for more than ``capacity(size)``
            objects.

    Returns:
        'count', 'colour', 'shape' int32 [batch, 3]; 'relation', 'tag' int32 [batch].

    Raises:
        TypeError: raw keys.
        ValueError: no tag, an unknown one, or size < 16.
    """
    check_key(keys, "keys")
    most = capacity(size)
    numbers = jnp.asarray([TAGS.index(tag) for tag in check_tags(tags)], jnp.int32)

    def one(key: Key[Array, ""]) -> dict[str, Array]:
        integer = _dice(key, 8 + _MIXED_THROWS)
        tag = numbers[integer(0, len(numbers))]

        def other(first: Array, high: int) -> Array:
            """Another number below high."""
            return (first + integer(1, high)) % high

        shape_a, colour_a = integer(0, len(SHAPES)), integer(0, len(COLOURS))
        shape_b, colour_b = other(shape_a, len(SHAPES)), other(colour_a, len(COLOURS))
        number, relation = integer(2, MOST_OF_A_CLAUSE + 1), integer(1, len(RELATIONS))
        kind = shape_a * len(COLOURS) + colour_a
        kind_b = other(kind, len(SHAPES) * len(COLOURS))

        def spec(*clauses: Sequence[Any], relation: Any = 0) -> dict[str, Array]:
            """Of (count, colour, shape) for each clause."""
            rows = [*clauses] + [(0, -1, -1)] * (CLAUSES - len(clauses))
            columns = [jnp.stack([*map(jnp.int32, column)]) for column in zip(*rows)]
            return {
                **dict(zip(("count", "colour", "shape"), columns)),
                "relation": jnp.int32(relation),
            }

        position = (1, kind_b % len(COLOURS), kind_b // len(COLOURS))
        options = [
            spec((1, -1, shape_a)),
            spec((1, -1, shape_a), (1, -1, shape_b)),
            spec((number, -1, shape_a)),
            spec((1, colour_a, shape_a)),
            spec((1, colour_a, shape_a), position, relation=relation),
            spec((1, colour_a, shape_a), (1, colour_b, shape_b)),
            _mixed(integer, most),
        ]
        chosen = jax.tree.map(lambda *leaves: jnp.stack(leaves)[tag], *options)
        return {**chosen, "tag": tag}

    return jax.vmap(one)(keys)


def _dice(key: Key[Array, ""], number: int) -> Callable[[Any, Any], Array]:
    """Makes ``integer(low, high)``, uniform in [low, high), for ``number`` throws.

    All come from one call of the generator, which compiles in seconds a call.
    """
    bits = iter(jax.random.bits(key, (number,)))

    def integer(low: Any, high: Any) -> Array:
        return low + _below(next(bits), high - low)

    return integer


def _below(bits: Array, high: Any) -> Array:
    """Int32 in [0, high) from uniform uint32, uniform to one part in 2³²."""
    return (bits % jnp.uint32(high)).astype(jnp.int32)


def _mixed(integer: Callable[[Any, Any], Array], most: int) -> dict[str, Array]:
    """A spec that has no other tag, of at most ``most`` objects."""
    number = integer(1, CLAUSES + 1)
    has_relation = (number > 1) & (integer(0, 2) == 1)
    relation = jnp.where(has_relation, integer(1, len(RELATIONS)), 0)
    counts, left = [], jnp.int32(most)
    for i in range(CLAUSES):
        # Each later clause keeps room for one object.
        high = jnp.minimum(left - jnp.maximum(number - i - 1, 0), MOST_OF_A_CLAUSE)
        # Several of the first: one or two lone objects have a tag of their own.
        low = jnp.where((i == 0) & (number < CLAUSES), 2, 1)
        count = integer(low, jnp.maximum(high, low) + 1)
        count = jnp.where(has_relation & (i < 2), 1, count)
        counts.append(jnp.where(i < number, count, 0))
        left -= counts[-1]

    used = jnp.stack(counts) > 0
    asked = jnp.stack([integer(0, 3) > 0 for _ in range(CLAUSES)])
    asked |= number == 1  # without a colour it would be a 'counting'
    # With both colours it would be a 'position'.
    asked &= ~((jnp.arange(CLAUSES) == 1) & has_relation & (number == 2))
    colour = jnp.stack([integer(0, len(COLOURS)) for _ in range(CLAUSES)])
    orders = jnp.asarray([*itertools.permutations(range(len(SHAPES)), CLAUSES)])
    shape = orders[integer(0, len(orders))]
    return {
        "count": jnp.stack(counts),
        "colour": jnp.where(used & asked, colour, -1),
        "shape": jnp.where(used, shape, -1),
        "relation": relation,
    }


def render(
    keys: SampleKeys, specs: Specs, size: int, layout: str = "free"
) -> Float[Array, "batch size size 3"]:
    """Draws exactly what the specs ask for, at random places and sizes.

    Objects stand in random distinct cells of a grid that is as coarse as their
    number allows, anywhere inside the cell, so nothing can fail: each is 5 or more
    pixels wide (an odd number), lies wholly inside the image, and is at least one
    pixel of background apart from the others, diagonals included. Colours that are
    not asked for are drawn for each object. Masks are crisp: every pixel has a colour
    of ``COLOURS`` or ``BACKGROUND``.

    Args:
        keys: typed keys [batch].
        specs: of :func:`sample_specs` or made by hand; 'tag' is not needed.
        size: height and width, >= 16.
        layout: 'free'; or 'cells', where every object is as large as any and stands in
            the middle of its cell, of at least 2 x 2: few images, for small networks.

    Returns:
        float32 [batch, size, size, 3] in [-1, 1].

    Raises:
        TypeError: raw keys.
        ValueError: size < 16, bad specs (values only where they are concrete), or
            another number of specs than of keys, or more objects than
            ``capacity(size)``.
    """
    check_key(keys, "keys")
    check_choice("layout", layout, LAYOUTS)
    most = capacity(size)
    check_batch("keys", keys, check_specs(specs))
    if not isinstance(specs["count"], jax.core.Tracer):
        totals = np.asarray(specs["count"]).sum(1)
        if totals.size and totals.max() > most:
            raise ValueError(
                f"spec {int(totals.argmax())} asks for {totals.max()} objects; images "
                f"of size {size} hold {most}. Ask for fewer or raise the size."
            )
    arrays = {name: jnp.asarray(specs[name], jnp.int32) for name in FIELDS}

    def one(key: Key[Array, ""], spec: dict[str, Array]) -> Array:
        place_key, kind_key = jax.random.split(key)
        side_bits, colour_bits = jax.random.bits(kind_key, (2, most))
        total = spec["count"].sum()
        slot = jnp.arange(most)
        clause = (slot[:, None] >= jnp.cumsum(spec["count"])).sum(1)
        shown = slot < total
        clause = jnp.where(shown, clause, 0)

        largest = (size + 1) // _lines(size) - 1
        choices = (largest - _LEAST_SIDE) // 2 + 1
        side = _LEAST_SIDE + 2 * _below(side_bits, choices)
        if layout == "cells":
            side = jnp.full_like(side, _LEAST_SIDE + 2 * (choices - 1))
        corner = _corners(place_key, side, total, spec["relation"], size, layout)
        row, column = (
            jnp.arange(size)[None, :] - corner[axis][:, None] for axis in range(2)
        )
        masks = shape_masks(
            row[:, :, None],
            column[:, None, :],
            side[:, None, None],
            side[:, None, None],
        )
        shape = spec["shape"][clause][:, None, None]
        mask = shown[:, None, None] & jnp.select(
            [shape == i for i in range(len(SHAPES))], masks, False
        )
        colour = spec["colour"][clause]
        colour = jnp.where(colour < 0, _below(colour_bits, len(COLOURS)), colour)
        # Objects never overlap, so what they add to the background can be summed.
        ground = jnp.asarray(BACKGROUND, jnp.float32)
        added = jnp.asarray([*COLOURS.values()], jnp.float32)[colour] - ground
        return ground + jnp.einsum("oyx,oc->yxc", mask.astype(jnp.float32), added)

    return jax.vmap(one)(keys, arrays)


def _corners(
    key: Key[Array, ""],
    side: Int[Array, "object"],
    total: Int[Array, ""],
    relation: Int[Array, ""],
    size: int,
    layout: str,
) -> tuple[Int[Array, "object"], Int[Array, "object"]]:
    """Top and left of every object; the first two stand in the relation, if any."""
    cells, most = _MOST_LINES**2, len(side)
    bits = jax.random.bits(key, (cells + 5 + 2 * most,))
    order_bits, (line, start, step, *shifts), insides = jnp.split(
        bits, (cells, cells + 5)
    )
    lines = 1 + (total > 1) + (total > 4) + (total > 9)
    if layout == "cells":
        lines = jnp.maximum(lines, 2)
    sideways = (relation == 1) | (relation == 2)
    # then the cells are two whole strips
    alone = (layout == "free") & (relation > 0) & (total == 2)
    rows = jnp.where(alone & sideways, 1, lines)
    columns = jnp.where(alone & ~sideways, 1, lines)

    row, column = (
        jnp.asarray(a.reshape(-1)) for a in np.indices((_MOST_LINES, _MOST_LINES))
    )
    last = jnp.iinfo(jnp.int32).max
    order = _below(order_bits, last)
    order = jnp.where((row < rows) & (column < columns), order, last)
    # A relation takes two cells of one line: they come first, in its order.
    along, across = jnp.where(sideways, column, row), jnp.where(sideways, row, column)
    length, breadth = (
        jnp.where(sideways, columns, rows),
        jnp.where(sideways, rows, columns),
    )
    start = _below(start, length)
    end = (start + 1 + _below(step, jnp.maximum(length - 1, 1))) % length
    low, high = jnp.minimum(start, end), jnp.maximum(start, end)
    forward = (relation == 1) | (relation == 3)
    first, second = jnp.where(forward, low, high), jnp.where(forward, high, low)
    in_line = (relation > 0) & (across == _below(line, breadth))
    order = jnp.where(in_line & (along == first), -2, order)
    order = jnp.where(in_line & (along == second), -1, order)
    cell = jnp.argsort(order)[:most]

    def place(shift: Array, inside: Array, index: Array, number: Array) -> Array:
        pitch = (size + 1) // number
        if layout == "cells":
            return index * pitch + (pitch - side) // 2
        shift = _below(shift, size + 2 - number * pitch)
        return shift + index * pitch + _below(inside, jnp.maximum(pitch - side, 1))

    top = place(shifts[0], insides[:most], row[cell], rows)
    left = place(shifts[1], insides[most:], column[cell], columns)

    # Across a relation the middles may lie no further apart than along it: its
    # share of the distance then exceeds 0.8 / sqrt(2). Sides are odd, so the halves
    # are whole.
    def tie(free: Array, bound: Array) -> Array:
        reach = jnp.abs(2 * (bound[0] - bound[1]) + side[0] - side[1])
        middle = 2 * free[0] + side[0] - side[1]
        tied = jnp.clip(free[1], (middle - reach) // 2, (middle + reach) // 2)
        return free.at[1].set(tied)

    top = jnp.where((relation > 0) & sideways, tie(top, left), top)
    left = jnp.where((relation > 0) & ~sideways, tie(left, top), left)
    return top, left
