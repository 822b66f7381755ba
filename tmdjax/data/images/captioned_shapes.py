"""Sets of images of coloured shapes with captions, and prompts for such images.

A fifth of all specs is held out (:func:`is_held_out`): training sets and prompts for
training never hold them, so a test of composition is one. What a spec is stands in
:mod:`tmdjax.domains.shapes.specs`.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import check_count, check_range
from tmdjax.core.prng import fold_in, sample_keys
from tmdjax.core.types import Array, Bool, Key
from tmdjax.data.dataset import Dataset
from tmdjax.domains.shapes import captions, grammar
from tmdjax.domains.shapes.drawing import check_tags, render, sample_specs
from tmdjax.domains.shapes.specs import (
    COLOURS,
    FIELDS,
    MOST_OF_A_CLAUSE,
    TAGS,
    Specs,
    check_specs,
)

_HELD_OUT_OF = 5
_SALT = 2468
_CHUNK = 1024
_PATIENCE = 8


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
        jnp.asarray(specs[name], jnp.int32) for name in FIELDS
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
) -> dict[str, np.ndarray]:
    """Distinct specs for prompts, none of which means the same as another.

    Args:
        count: how many.
        tags: some of ``TAGS``.
        size: of the images.
        seed: of the order; a larger count extends a smaller one.
        held_out: take those of :func:`is_held_out` only; else never any of them.

    Returns:
        Host arrays 'count', 'colour', 'shape' int32 [count, 3]; 'relation', 'tag'
        int32 [count].

    Raises:
        ValueError: there are not as many; or as :func:`sample_specs`.
    """
    check_count("count", count)
    tags = check_tags(tags)
    taken: set[tuple[Any, ...]] = set()
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
            raise ValueError(
                f"count={count}, but there are only {len(found)} {kind} specs of the "
                f"tags {', '.join(tags)}; ask for fewer or allow more tags."
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
    wordings: Sequence[str] = grammar.WORDINGS,
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
        tags: some of ``TAGS``.
        wordings: of ``grammar.WORDINGS``, for training; equally likely (one that
            stands twice is twice as likely). Test captions are canonical, 'W0';
            ``captions.batch(test, wording)`` gives paraphrases.
        seed: of the root key.
        length: words of a row of ids; None for ``captions.longest(tags)``.
        layout: 'free' or 'cells', see :func:`tmdjax.domains.shapes.drawing.render`.

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
    wordings = grammar.check_wordings(wordings)
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
