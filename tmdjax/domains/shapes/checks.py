"""Exact check of images of coloured shapes against what was asked for.

A spec says what an image must show. A batch of specs is a plain dict of int32
arrays, so it can be sharded, sampled and checked like any other batch:

- 'count' [batch, 3]: objects of each clause, 0 to 4; 0 leaves the clause unused.
- 'colour' [batch, 3]: index into ``COLOURS``; -1 asks for no colour.
- 'shape' [batch, 3]: index into ``SHAPES``; -1 in an unused clause.
- 'relation' [batch]: index into ``RELATIONS``, of the object of clause 0 to that of
  clause 1, both of count 1; 0 asks for none.

Clauses of one shape must ask for different colours: "two squares and a red square"
has no single meaning.

References:
    GenEval, arXiv 2310.11513 (tasks and the rule of relative position); PromptRL,
    arXiv 2602.01382 (soft score).
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import check_batch
from tmdjax.core.types import Array, ArrayLike, Bool, Float, Int

COLOURS = {
    "red": (1.0, -1.0, -1.0),
    "green": (-1.0, 1.0, -1.0),
    "blue": (-1.0, -1.0, 1.0),
    "yellow": (1.0, 1.0, -1.0),
    "magenta": (1.0, -1.0, 1.0),
    "cyan": (-1.0, 1.0, 1.0),
}
"""Colours of objects, by name."""

BACKGROUND = (0.0, 0.0, 0.0)
"""Grey: a faded colour turns into it without passing near another colour."""

SHAPES = ("square", "disc", "triangle", "cross")
RELATIONS = ("none", "left of", "right of", "above", "below")
TAGS = (
    "single",
    "two",
    "counting",
    "colours",
    "position",
    "attribution",
    "mixed",
)
"""Tasks: one object; two objects; two to four of one; one object of a colour; two
coloured objects and their relation; two objects of different colours; anything else
of up to three clauses. The content of a spec decides its tag."""

CLAUSES = 3
MOST_OF_A_CLAUSE = 4

LEAST_PIXELS = 3
"""Smaller components are noise."""

LONGEST_ASPECT = 2
"""Components longer than this times their width have no shape."""

_SHRINK = 0.1
_DIRECTION = 0.5

Specs = Mapping[str, Any]


def shape_masks(row: Any, column: Any, height: Any, width: Any) -> tuple[Any, ...]:
    """Which shapes cover a pixel of a box that they fill from edge to edge.

    Args:
        row: int, of the pixel from the top of the box.
        column: int, from its left.
        height: int, of the box.
        width: int, of the box.

    Returns:
        One bool array a shape, in the order of ``SHAPES``; False outside the box.
        Numpy in, numpy out.
    """
    # Twice the offset of the pixel's middle from the box's: whole numbers.
    x, y = abs(2 * column + 1 - width), abs(2 * row + 1 - height)
    box = (x < width) & (y < height)
    disc = (x / width) ** 2 + (y / height) ** 2 < 1
    triangle = 4 * x * height <= (4 * row + 3) * width
    cross = (4 * x <= width) | (4 * y <= height)
    return box, box & disc, box & triangle, box & cross


def check_specs(specs: Specs) -> int:
    """Checks a batch of specs; values only where they are concrete.

    Args:
        specs: arrays by name, see the module.

    Returns:
        The length of the batch.

    Raises:
        TypeError: an array that does not hold integers.
        ValueError: a missing array, a wrong shape, a value out of range, two
            clauses that cannot be told apart, or a relation of other clauses than
            two of count 1. The message names the first bad spec.
    """
    missing = {"count", "colour", "shape", "relation"} - set(specs)
    if missing:
        raise ValueError(
            f"specs lack {', '.join(map(repr, sorted(missing)))}; they have "
            f"{', '.join(map(repr, sorted(specs)))}."
        )
    batch = np.shape(specs["relation"])
    if len(batch) != 1:
        raise ValueError(
            f"specs['relation'] has shape {batch}; it needs (batch,): one relation a "
            f"spec."
        )
    for name in ("count", "colour", "shape"):
        if np.shape(specs[name]) != (*batch, CLAUSES):
            raise ValueError(
                f"specs[{name!r}] has shape {np.shape(specs[name])}; it needs "
                f"{(*batch, CLAUSES)}: {CLAUSES} clauses for each of the {batch[0]} "
                f"specs that 'relation' has."
            )
    names = ("count", "colour", "shape", "relation")
    for name in names:
        dtype = getattr(specs[name], "dtype", None) or np.asarray(specs[name]).dtype
        if not np.issubdtype(dtype, np.integer):
            raise TypeError(f"specs[{name!r}] is of dtype {dtype}; give int32.")
    if not any(isinstance(specs[name], jax.core.Tracer) for name in names):
        _check_values(*(np.asarray(specs[name]) for name in names))
    return batch[0]


def _check_values(
    count: np.ndarray, colour: np.ndarray, shape: np.ndarray, relation: np.ndarray
) -> None:
    def refuse(bad: Any, what: str) -> None:
        if np.any(bad):
            i = int(np.argmax(np.reshape(bad, (len(bad), -1)).any(1)))
            raise ValueError(
                f"spec {i} (count {count[i].tolist()}, colour {colour[i].tolist()}, "
                f"shape {shape[i].tolist()}, relation {relation[i]}): {what}"
            )

    used = count > 0
    refuse(
        (count < 0) | (count > MOST_OF_A_CLAUSE),
        f"a count lies outside [0, {MOST_OF_A_CLAUSE}].",
    )
    refuse(
        (colour < -1) | (colour >= len(COLOURS)),
        f"a colour lies outside [-1, {len(COLOURS) - 1}].",
    )
    refuse(
        used & ((shape < 0) | (shape >= len(SHAPES))),
        f"a shape lies outside [0, {len(SHAPES) - 1}].",
    )
    refuse(
        (relation < 0) | (relation >= len(RELATIONS)),
        f"the relation lies outside [0, {len(RELATIONS) - 1}].",
    )
    refuse(~used.any(1), "it asks for nothing.")
    refuse(
        (relation > 0) & (count[:, :2] != 1).any(1),
        "a relation needs clauses 0 and 1 of count 1.",
    )
    for i in range(CLAUSES):
        for j in range(i):
            same = used[:, i] & used[:, j] & (shape[:, i] == shape[:, j])
            vague = (colour[:, i] < 0) | (colour[:, j] < 0)
            refuse(
                same & (vague | (colour[:, i] == colour[:, j])),
                f"clauses {j} and {i} have one shape, so each needs a colour of its "
                f"own.",
            )


def check(
    images: Float[ArrayLike, "batch size size 3"], specs: Specs, *, legacy: bool = False
) -> dict[str, Array]:
    """Scores images by what their specs ask for. Pure and jittable.

    Each pixel takes the nearest colour of the palette (six colours and grey);
    8-connected pixels of one colour are a component; one of at least
    ``LEAST_PIXELS`` and no more than twice as long as wide is an object, of the
    shape that differs in the fewest pixels from it in its bounding box. There is one
    part in [0, 1] a requirement:

    - count of a clause: max(0, 1 - |wanted - found| / wanted) over the objects of
      its shape, whatever their colour (``wanted`` adds up over clauses of one shape);
    - colour of a clause: the same over the objects of its shape and colour;
    - relation: 1 if it holds, else 0. Each clause needs exactly one candidate: the
      objects of its shape and colour, or, if there is none, those of its shape that
      the other clause does not claim. Offsets between the middles of the boxes are
      shrunk by a tenth of both sides, per axis, and divided by the distance; a
      relation holds where the result exceeds 0.5 in its direction.

    Objects of shapes that were not asked for are ignored.

    Args:
        images: float [batch, size, size, 3], clipped to [-1, 1]; pixels that are not
            finite count as background.
        specs: what was asked for; 'tag' is not needed.
        legacy: the score becomes that of the public GenEval rewards, quirks
            included: count parts unbounded below; a wrong count puts one 0 in place
            of the clause's colour and relation; a relation is looked at only if both
            clauses are right so far; and a failed one adds both a 0 and a 1. The
            other results stay.

    Returns:
        'score' float32 [batch]: mean over the parts asked for, in [0, 1] and 1
        exactly where strict (unless legacy). 'strict' bool [batch]: every part is
        right. 'count', 'colour' float32 [batch, 3] and 'relation' float32 [batch]:
        the parts, 1 where nothing is asked for.

    Raises:
        ValueError: images or specs of a wrong shape, or bad concrete specs.
    """
    shape = np.shape(images)
    if len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3 or not shape[1]:
        raise ValueError(
            f"images have shape {shape}; they need (batch, size, size, 3): square, "
            f"three colour channels, last."
        )
    check_batch("images", images, check_specs(specs))
    spec = {
        name: jnp.asarray(specs[name], jnp.int32)
        for name in ("count", "colour", "shape", "relation")
    }
    objects = find_objects(jnp.asarray(images))
    is_shape = objects["exists"][:, None] & (
        objects["shape"][:, None] == spec["shape"][..., None]
    )
    is_right = is_shape & (
        (objects["colour"][:, None] == spec["colour"][..., None])
        | (spec["colour"][..., None] < 0)
    )
    found, right = is_shape.sum(-1), is_right.sum(-1)
    same_shape = spec["shape"][:, :, None] == spec["shape"][:, None, :]
    wanted = (same_shape * spec["count"][:, None, :]).sum(-1)
    holds = _relation_holds(objects, is_shape, is_right, spec["relation"])

    asked = {
        "count": spec["count"] > 0,
        "colour": (spec["count"] > 0) & (spec["colour"] >= 0),
        "relation": spec["relation"] > 0,
    }
    exact = {
        "count": found == wanted,
        "colour": right == spec["count"],
        "relation": holds,
    }
    raw_count = 1 - jnp.abs(wanted - found) / jnp.maximum(wanted, 1)
    raw_colour = 1 - jnp.abs(spec["count"] - right) / jnp.maximum(spec["count"], 1)
    parts = {
        "count": jnp.maximum(raw_count, 0),
        "colour": jnp.maximum(raw_colour, 0),
        "relation": holds.astype(jnp.float32),
    }
    parts = {name: jnp.where(asked[name], part, 1) for name, part in parts.items()}
    strict = jnp.all(_columns(exact) | ~_columns(asked), axis=1)
    if legacy:
        score = _legacy_score(raw_count, raw_colour, asked, exact)
    else:
        score = jnp.mean(_columns(parts), axis=1, where=_columns(asked))
    return {"score": score, "strict": strict, **parts}


def _columns(parts: Mapping[str, Array]) -> Array:
    """All parts side by side, [batch, 2 * CLAUSES + 1]."""
    return jnp.concatenate(
        [parts["count"], parts["colour"], parts["relation"][:, None]], axis=1
    )


def _relation_holds(
    objects: Mapping[str, Array], is_shape: Array, is_right: Array, relation: Array
) -> Bool[Array, "batch"]:
    pair, claimed = is_shape[:, :2], is_right[:, :2]
    spare = pair & ~claimed[:, ::-1]
    candidates = jnp.where(claimed.any(-1, keepdims=True), claimed, spare)
    alone = (candidates.sum(-1) == 1).all(-1)

    def of_pair(name: str) -> Array:
        """A number of the two candidates, [batch, 2], where each is alone."""
        return jnp.sum(objects[name][:, None] * candidates, axis=-1)

    def offset(start: str, length: str) -> tuple[Array, Array]:
        """From the middle of the second to that of the first: full and shrunk."""
        starts, lengths = of_pair(start), of_pair(length)
        middles = starts + 0.5 * lengths
        full = middles[:, 0] - middles[:, 1]
        rest = jnp.maximum(jnp.abs(full) - _SHRINK * lengths.sum(1), 0)
        return full, jnp.sign(full) * rest

    x, shrunk_x = offset("left", "width")
    y, shrunk_y = offset("top", "height")
    along = jnp.stack([-shrunk_x, shrunk_x, -shrunk_y, shrunk_y], axis=1)
    far = along > _DIRECTION * jnp.hypot(x, y)[:, None]
    asked = relation[:, None] == jnp.arange(1, len(RELATIONS))
    return alone & (far & asked).any(1)


def _legacy_score(
    raw_count: Array,
    raw_colour: Array,
    asked: Mapping[str, Array],
    exact: Mapping[str, Array],
) -> Float[Array, "batch"]:
    """Mean of the rewards that the public code appends, clause 1 before clause 0."""
    first = jnp.arange(CLAUSES) == 0
    has_relation = asked["relation"][:, None] & first
    counted = exact["count"]
    matched = counted & (exact["colour"] | ~asked["colour"])
    needs_more = asked["colour"] | has_relation
    looked_at = has_relation & matched
    target = matched[:, 1:2]
    good = exact["relation"][:, None] & target
    total = (
        jnp.where(asked["count"], raw_count, 0)
        + jnp.where(asked["colour"] & counted, raw_colour, 0)
        + (looked_at & target)  # a failed relation appends 0, and then 1 as well
    )
    appended = (
        asked["count"],
        asked["count"] & ~counted & needs_more,
        asked["colour"] & counted,
        looked_at,
        looked_at & target & ~good,
    )
    number = jnp.stack(appended).sum((0, 2))
    return total.sum(1) / number


def find_objects(
    images: Float[Array, "batch size size 3"],
) -> dict[str, Array]:
    """Components of equal colour, each described at its first pixel.

    Args:
        images: float [batch, size, size, 3].

    Returns:
        Arrays [batch, size * size], one entry a pixel in reading order: 'exists'
        bool, True at the first pixel of each object; 'colour' and 'shape' int32;
        'top', 'left', 'height' and 'width' of its box, int32.
    """
    size = images.shape[1]
    palette = jnp.asarray([*COLOURS.values(), BACKGROUND], jnp.float32)
    pixels = jnp.clip(
        jnp.nan_to_num(images.astype(jnp.float32), posinf=0, neginf=0), -1, 1
    )
    # Not as |p|² - 2 p x: jaxlib 0.10.2 compiles the sum of products of [1, 16, 16, 1,
    # 3] with a constant [7, 3] wrongly on CPU.
    distances = jnp.square(pixels[..., None, :] - palette).sum(-1)
    colour = jnp.argmin(distances, axis=-1).astype(jnp.int32)
    label = _components(colour)

    batch = label.shape[0]
    places = size * size
    flat = label.reshape(batch, places)
    # The background's label, one past the last pixel, is a segment of its own.
    segment = (flat + (places + 1) * jnp.arange(batch)[:, None]).reshape(-1)
    segments = batch * (places + 1)
    row, column = (
        jnp.broadcast_to(jnp.asarray(a, jnp.int32).reshape(places), flat.shape)
        for a in np.indices((size, size))
    )

    def reduce(how: Any, values: Array) -> Array:
        values = values.reshape(-1, *values.shape[2:])
        whole = how(values, segment, segments)
        return whole.reshape(batch, places + 1, *whole.shape[1:])

    area = reduce(jax.ops.segment_sum, jnp.ones_like(flat))
    top, left = (reduce(jax.ops.segment_min, a) for a in (row, column))
    bottom, right = (reduce(jax.ops.segment_max, a) for a in (row, column))
    height, width = bottom - top + 1, right - left + 1

    def at_pixel(values: Array) -> Array:
        return jnp.take_along_axis(values, flat, axis=1)

    masks = shape_masks(
        row - at_pixel(top), column - at_pixel(left), at_pixel(height), at_pixel(width)
    )
    shared = reduce(jax.ops.segment_sum, jnp.stack(masks, -1).astype(jnp.int32))
    area, top, left, height, width, shared = (
        a[:, :places] for a in (area, top, left, height, width, shared)
    )
    exists = (flat == jnp.arange(places)) & (area >= LEAST_PIXELS)
    exists &= jnp.maximum(height, width) <= LONGEST_ASPECT * jnp.minimum(height, width)
    height, width = jnp.where(exists, height, 0), jnp.where(exists, width, 0)
    ideal = jnp.asarray(_shape_areas(size))[height, width]
    mismatch = area[..., None] + ideal - 2 * shared
    return {
        "exists": exists,
        "colour": colour.reshape(batch, places),
        "shape": jnp.argmin(mismatch, axis=-1).astype(jnp.int32),
        "top": jnp.where(exists, top, 0),
        "left": jnp.where(exists, left, 0),
        "height": height,
        "width": width,
    }


@functools.cache
def _shape_areas(size: int) -> np.ndarray:
    """Pixels of each shape by height and width of its box, [size+1, size+1, 4]."""
    areas = np.zeros((size + 1, size + 1, len(SHAPES)), np.int32)
    for height in range(1, size + 1):
        for width in range(1, size + 1):
            row, column = np.indices((height, width))
            masks = shape_masks(row, column, height, width)
            areas[height, width] = [mask.sum() for mask in masks]
    return areas


def _components(colour: Int[Array, "batch size size"]) -> Int[Array, "batch size size"]:
    """The number of the first pixel of each 8-connected component of one colour.

    Labels spread to neighbours until nothing changes: as many rounds as the longest
    way inside a component. The background gets the label size * size.
    """
    size = colour.shape[1]
    none = size * size
    offsets = [(y, x) for y in range(3) for x in range(3) if (y, x) != (1, 1)]

    def neighbours(values: Array, outside: int) -> list[Array]:
        padded = jnp.pad(values, ((0, 0), (1, 1), (1, 1)), constant_values=outside)
        return [padded[:, y : y + size, x : x + size] for y, x in offsets]

    alike = [colour == other for other in neighbours(colour, -1)]
    first = jnp.arange(none, dtype=jnp.int32).reshape(size, size)
    start = jnp.where(colour == len(COLOURS), none, first)

    def spread(state: tuple[Array, Array]) -> tuple[Array, Array]:
        label, _ = state
        new = label
        for same, other in zip(alike, neighbours(label, none)):
            new = jnp.where(same, jnp.minimum(new, other), new)
        return new, jnp.any(new != label)

    return jax.lax.while_loop(lambda s: s[1], spread, (start, jnp.array(True)))[0]
