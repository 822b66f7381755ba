"""What images of coloured shapes may show, and what may be asked of one.

A spec says what an image must show. A batch of specs is a plain dict of int32
arrays, so it can be sharded, sampled and checked like any other batch:

- 'count' [batch, 3]: objects of each clause, 0 to 4; 0 leaves the clause unused.
- 'colour' [batch, 3]: index into ``COLOURS``; -1 asks for no colour.
- 'shape' [batch, 3]: index into ``SHAPES``; -1 in an unused clause.
- 'relation' [batch]: index into ``RELATIONS``, of the object of clause 0 to that of
  clause 1, both of count 1; 0 asks for none.

Clauses of one shape must ask for different colours: "two squares and a red square"
has no single meaning.
"""

from collections.abc import Mapping
from typing import Any

import jax.core
import numpy as np

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

FIELDS = ("count", "colour", "shape", "relation")
"""Arrays of a batch of specs."""

Specs = Mapping[str, Any]


def shape_masks(row: Any, column: Any, height: Any, width: Any) -> tuple[Any, ...]:
    """Which shapes cover a pixel of a box that they fill from edge to edge.

    Args:
        row: int, of the pixel from the top of the box.
        column: int, of the pixel from the left of the box.
        height: int, pixels of the box.
        width: int, pixels of the box.

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
        specs: integers by name: 'count', 'colour', 'shape' [batch, 3], 'relation'
            [batch].

    Returns:
        The length of the batch.

    Raises:
        TypeError: an array that does not hold integers.
        ValueError: a missing array, a wrong shape, a value out of range, two
            clauses that cannot be told apart, or a relation of other clauses than
            two of count 1. The message names the first bad spec.
    """
    missing = set(FIELDS) - set(specs)
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
    for name in FIELDS[:3]:
        if np.shape(specs[name]) != (*batch, CLAUSES):
            raise ValueError(
                f"specs[{name!r}] has shape {np.shape(specs[name])}; it needs "
                f"{(*batch, CLAUSES)}: {CLAUSES} clauses for each of the {batch[0]} "
                f"specs that 'relation' has."
            )
    for name in FIELDS:
        dtype = getattr(specs[name], "dtype", None) or np.asarray(specs[name]).dtype
        if not np.issubdtype(dtype, np.integer):
            raise TypeError(f"specs[{name!r}] is of dtype {dtype}; give int32.")
    if not any(isinstance(specs[name], jax.core.Tracer) for name in FIELDS):
        _check_values(*(np.asarray(specs[name]) for name in FIELDS))
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


def tag_of(spec: Mapping[str, Any]) -> int:
    """The tag that the content of one spec row has, an index into ``TAGS``."""
    counts = [int(n) for n in spec["count"] if n]
    colours = [int(c) for c, n in zip(spec["colour"], spec["count"]) if n]
    named = [c >= 0 for c in colours]
    relation = int(spec["relation"])
    if len(counts) == 1 and not all(named):
        tag = "single" if counts == [1] else "counting"
    elif counts == [1]:
        tag = "colours"
    elif counts == [1, 1] and relation and all(named):
        tag = "position"
    elif counts == [1, 1] and not relation and not any(named):
        tag = "two"
    elif counts == [1, 1] and not relation and all(named) and colours[0] != colours[1]:
        tag = "attribution"
    else:
        tag = "mixed"
    return TAGS.index(tag)
