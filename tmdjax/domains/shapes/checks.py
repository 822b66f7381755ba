"""Exact check of images of coloured shapes against what was asked for.

References:
    GenEval, arXiv 2310.11513 (tasks and the rule of relative position); PromptRL,
    arXiv 2602.01382 (soft score).
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import check_batch
from tmdjax.core.types import Array, ArrayLike, Bool, Float, Int
from tmdjax.domains.shapes.specs import (
    BACKGROUND,
    CLAUSES,
    COLOURS,
    FIELDS,
    RELATIONS,
    SHAPES,
    Specs,
    check_specs,
    shape_masks,
)

LEAST_PIXELS = 3
"""Smaller components are noise."""

LONGEST_ASPECT = 2
"""Components longer than this times their width have no shape."""

_SHRINK = 0.1
_DIRECTION = 0.5


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
    spec = {name: jnp.asarray(specs[name], jnp.int32) for name in FIELDS}
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
