"""Coloured shapes on grey by specification: sampled specs and exact images of them.

A batch of specs is a plain dict of int32 arrays: 'count', 'colour' and 'shape'
[batch, 3], 'relation' and 'tag' [batch]; see :mod:`tmdjax.domains.shapes.checks`, whose
``check`` gives every image of :func:`render` the score 1. Samplers are pure and
jittable; sample i depends on key i alone.

A fifth of all specs is held out (:func:`is_held_out`): training sets and prompts for
training never hold them, so a test of composition is one.

References:
    GenEval, arXiv 2310.11513: the tasks that ``TAGS`` names.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import check_batch, check_choice, check_count, check_range
from tmdjax.core.prng import check_key, fold_in, sample_keys
from tmdjax.core.types import Array, Bool, Float, Int, Key, SampleKeys
from tmdjax.data.dataset import Dataset
from tmdjax.domains.shapes import captions
from tmdjax.domains.shapes.checks import (
    BACKGROUND,
    CLAUSES,
    COLOURS,
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
_HELD_OUT_OF = 5
_SALT = 2468
_CHUNK = 1024
_PATIENCE = 8
_MIXED_THROWS = 13
_NAMES = ("count", "colour", "shape", "relation")


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
        tags: of ``TAGS``.
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
    arrays = {name: jnp.asarray(specs[name], jnp.int32) for name in _NAMES}

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


def is_held_out(specs: Specs) -> Bool[Array, "batch"]:
    """Which specs no training set may hold. Jittable.

    A hash of what is asked for, whatever the order of clauses that no relation
    orders ("A left of B" and "B right of A" are one), holds out a fifth. The four
    specs of 'single' all stay in training: they are what the others are made of. Of
    the other small sets it holds out 5 of the 24 of 'colours', 3 of the 12 of
    'counting' and 2 of the 12 of 'two' (one pair, in both orders), never all of a
    colour, number or shape.

    Args:
        specs: batch of specs; 'tag' is not needed.

    Raises:
        ValueError: bad specs.
    """
    check_specs(specs)
    count, colour, shape, relation = (
        jnp.asarray(specs[name], jnp.int32) for name in _NAMES
    )
    used = count > 0
    what = ((shape + 1) * (len(COLOURS) + 1) + colour + 1) * (MOST_OF_A_CLAUSE + 1)
    what = jnp.where(used, what + count, 0)
    backward = (relation == 2) | (relation == 4)
    role = jnp.stack([1 + backward, 2 - backward, 0 * relation], axis=1)
    role = jnp.where(relation[:, None] > 0, role, 0)
    clauses = _scramble((what * 3 + role).astype(jnp.uint32) + jnp.uint32(_SALT))
    axis = ((relation + 1) // 2).astype(jnp.uint32)
    number = _scramble(jnp.sum(clauses, axis=1, dtype=jnp.uint32) + axis)
    single = (used.sum(1) == 1) & (count.sum(1) == 1) & (colour < 0).all(1)
    return (number % _HELD_OUT_OF == 0) & ~single


def _scramble(x: Array) -> Array:
    """A bijection of uint32 in which every bit depends on all (MurmurHash3's end)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def prompts(
    count: int,
    *,
    tags: Sequence[str] = TAGS,
    size: int,
    seed: int = 0,
    held_out: bool = False,
    exclude: Specs | None = None,
) -> dict[str, np.ndarray]:
    """Distinct specs for prompts, none of which means the same as another.

    Args:
        count: how many.
        tags: of ``TAGS``.
        size: of the images.
        seed: of the order; a larger count extends a smaller one.
        held_out: take those of :func:`is_held_out` only; else never any of them.
        exclude: specs that may not be among them.

    Returns:
        Host arrays 'count', 'colour', 'shape' int32 [count, 3]; 'relation', 'tag'
        int32 [count].

    Raises:
        ValueError: there are not as many; or as :func:`sample_specs`.
    """
    check_count("count", count)
    tags = check_tags(tags)
    taken = set() if exclude is None else {*map(_meaning, _rows(exclude))}
    found: list[dict[str, np.ndarray]] = []
    idle = 0
    for chunk in _chunks(fold_in(jax.random.key(seed), 2), tags, size):
        keep = np.array(_held_out(chunk)) == held_out
        before = len(found)
        for row in _rows({name: array[keep] for name, array in chunk.items()}):
            if _meaning(row) not in taken:
                taken.add(_meaning(row))
                found.append(row)
        if len(found) >= count:
            break
        idle = idle + 1 if len(found) == before else 0
        if idle == _PATIENCE:
            kind = "held-out" if held_out else "training"
            left = " that are not excluded" if exclude else ""
            raise ValueError(
                f"count={count}, but there are only {len(found)} {kind} specs of the "
                f"tags {', '.join(tags)}{left}; ask for fewer or allow more tags."
            )
    names = found[0]
    return {name: np.stack([row[name] for row in found[:count]]) for name in names}


def _chunks(
    key: Key[Array, ""], tags: tuple[str, ...], size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Random specs without end, on the host."""
    for start in itertools.count(step=_CHUNK):
        keys = sample_keys(key, _CHUNK, start)
        yield jax.device_get(_sample(keys, tags=tags, size=size))


_held_out = jax.jit(is_held_out)
_sample = jax.jit(sample_specs, static_argnames=("tags", "size"))
_draw = jax.jit(render, static_argnames=("size", "layout"))


def _rows(specs: Specs) -> Iterator[dict[str, np.ndarray]]:
    arrays = {name: np.asarray(array) for name, array in specs.items()}
    for i in range(check_specs(specs)):
        yield {name: array[i] for name, array in arrays.items()}


def _meaning(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Equal for two specs exactly if they ask for the same."""
    columns = [row[name].tolist() for name in ("count", "colour", "shape")]
    clauses = [clause for clause in zip(*columns) if clause[0]]
    relation = int(row["relation"])
    if not relation:
        return (0, *sorted(clauses))
    if relation in (2, 4):
        clauses[:2] = clauses[1::-1]
    return ((relation + 1) // 2, *clauses)


def load_captioned_shapes(
    files: Mapping[str, Path],
    *,
    size: int = 16,
    train_count: int = 8192,
    test_count: int = 1024,
    tags: Sequence[str] = ("colours", "position"),
    wordings: Sequence[str] = captions.WORDINGS,
    seed: int = 0,
    length: int | None = None,
    layout: str = "free",
) -> Dataset:
    """A fixed set of images with captions.

    The training split holds no spec of :func:`is_held_out`; the test split holds
    nothing else (where 'single', of which none is held out, is the only tag, new
    images of the same specs). A larger count extends a split without changing it.

    Args:
        files: none.
        size: height and width, >= 16.
        train_count: training samples, >= 1.
        test_count: test samples, >= 1.
        tags: of ``TAGS``.
        wordings: of ``captions.WORDINGS``, for training; equally likely (one that
            stands twice is twice as likely). Test captions are canonical, 'W0';
            ``captions.batch(test, wording)`` gives paraphrases.
        seed: of the root key.
        length: words of a row of ids; None for ``captions.longest(tags)``.
        layout: see :func:`render`.

    Returns:
        Arrays 'image' float32 [n, size, size, 3]; 'label' int32 [n], the tag;
        'count', 'colour', 'shape' int32 [n, 3]; 'relation', 'tag' int32 [n];
        'ids' int32 and 'mask' bool [n, length], as ``captions.tokenise`` gives them.

    Raises:
        ValueError: a bad size, count, tag, wording, or a length that a caption does
            not fit in.
    """
    check_range("train_count", train_count, 1)
    check_range("test_count", test_count, 1)
    tags = check_tags(tags)
    wordings = captions.check_wordings(wordings)
    length = captions.longest(tags) if length is None else length
    root = jax.random.key(seed)

    def split(index: int, count: int, said: Sequence[str]) -> dict[str, np.ndarray]:
        key = fold_in(root, index)
        parts: list[dict[str, np.ndarray]] = []
        number = 0
        for i, chunk in enumerate(_chunks(fold_in(key, 0), tags, size)):
            keys = sample_keys(fold_in(key, 1), _CHUNK, i * _CHUNK)
            keep = np.array(_held_out(chunk)) == bool(index)
            if index and tags == ("single",):
                keep[:] = True
            image = np.asarray(_draw(keys, chunk, size=size, layout=layout))
            part = {"image": image, "label": chunk["tag"], **chunk}
            parts.append({name: array[keep] for name, array in part.items()})
            number += int(keep.sum())
            if number >= count:
                break
        whole = {k: np.concatenate([p[k] for p in parts])[:count] for k in parts[0]}
        texts = captions.batch(whole, said, seed)
        return {**whole, **captions.tokenise(texts, length)}

    return Dataset(
        name="captioned_shapes",
        train=split(0, train_count, wordings),
        test=split(1, test_count, ("W0",)),
        num_classes=len(TAGS),
        meta={
            "class_names": TAGS,
            "tags": tags,
            "wordings": wordings,
            "vocabulary": len(captions.VOCABULARY),
            "seed": seed,
        },
    )
