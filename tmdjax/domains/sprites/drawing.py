"""Videos of coloured sprites that move over a flat ground.

Rendering is pixel exact: every pixel has a sprite's colour or the ground's. What may
be shown is in :mod:`tmdjax.domains.sprites.scenes`, what prompts say in
:mod:`tmdjax.domains.sprites.prompts`; :mod:`tmdjax.domains.sprites.checks` checks a
video against its prompt.

At the small scale a video is 6 x 12 x 12 and shows one sprite that moves straight at
1 pixel a frame: 48 prompts, 24 starts each. With five grey levels the set is finite
(:func:`bank`), and its flow known exactly (``flows.empirical_flow``).
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import check_batch, check_count
from tmdjax.core.prng import check_key
from tmdjax.core.types import Array, ArrayLike, Float, Int, Key, SampleKeys
from tmdjax.domains.sprites.prompts import check_prompts, prompt_factors
from tmdjax.domains.sprites.scenes import (
    COLOURS,
    GAITS,
    GAPS,
    GROUNDS,
    LEAD,
    LIFT,
    MOTIONS,
    Scale,
    get_scale,
    templates,
)

LEVELS = 5
"""Grey levels of the ground in a :func:`bank`."""


def moving_sprites(
    keys: SampleKeys,
    *,
    scale: str | Scale = "small",
    levels: int | None = None,
    prompts: Int[ArrayLike, "batch"] | None = None,
) -> dict[str, Array]:
    """Random videos. Pure and jittable; sample i depends on key i alone.

    The start is uniform over the places from which all frames fit (where the sprite
    bounces: from which the border is met no earlier than ``LEAD`` steps after the
    start and before the end). The first sprite of two keeps its distance to the
    second.

    Args:
        keys: typed keys [batch].
        scale: of the videos, or its name.
        levels: None draws the ground's level from the uniform law of the scale; a
            number, from so many equidistant levels of the same range.
        prompts: int32 [batch], each in [0, num_prompts), what to show; None draws
            them uniformly.

    Returns:
        'video' [batch, frame, height, width, 3], float32 in [-1, 1]; 'prompt' int32
        [batch]; 'start' int32 [batch, 2], row and column of the first sprite's box in
        the first frame.

    Raises:
        TypeError: raw keys, or prompts that are not integers.
        ValueError: unknown scale, levels < 2, or concrete prompts out of range.
    """
    check_key(keys, "keys")
    scale = get_scale(scale)
    if levels is not None:
        check_count("levels", levels, 2)
    if prompts is None:
        prompts = jax.vmap(
            lambda key: jax.random.randint(
                jax.random.fold_in(key, 0), (), 0, scale.num_prompts, jnp.int32
            )
        )(keys)
    check_batch("prompts", prompts, keys.shape[0])
    check_prompts(prompts, scale)
    prompts = jnp.asarray(prompts, jnp.int32)
    factors = prompt_factors(prompts, scale)
    places = jax.vmap(functools.partial(_places, scale=scale))(keys, factors)

    def level(key: Key[Array, ""]) -> Array:
        key = jax.random.fold_in(key, 1)
        if levels is None:
            return jax.random.uniform(
                key, (), jnp.float32, minval=-scale.level, maxval=scale.level
            )
        return _levels(scale, levels)[jax.random.randint(key, (), 0, levels)]

    video = jax.vmap(functools.partial(_render, scale=scale))(
        factors, *places, jax.vmap(level)(keys)
    )
    start = places[0] + jnp.maximum(-places[1], 0) * jnp.array([1, 0])
    return {"video": video, "prompt": prompts, "start": start}


def _levels(scale: Scale, levels: int) -> Float[Array, "level"]:
    return jnp.linspace(-scale.level, scale.level, levels, dtype=jnp.float32)


def _room(offset: Int[Array, "2"], scale: Scale) -> Int[Array, "2"]:
    """Last place of a box that holds both sprites, along each axis."""
    return scale.size - scale.box - jnp.abs(offset)


def _starts(
    factors: Mapping[str, Array], offset: Int[Array, "2"], scale: Scale
) -> tuple[Int[Array, "2"], Int[Array, "2"]]:
    """First and last place of the box of both sprites in frame 0, along each axis."""
    direction = jnp.asarray([*MOTIONS.values()], jnp.int32)[factors["motion"]]
    speed, bounces = jnp.asarray([*GAITS.values()], jnp.int32)[factors["gait"]]
    room, steps = _room(offset, scale), scale.frames - 1
    # Distance to the border ahead.
    least = jnp.where(bounces, LEAD, steps) * speed
    most = jnp.where(bounces, jnp.minimum(room, (steps - LEAD) * speed), room)
    first = jnp.where(direction > 0, room - most, jnp.where(direction < 0, least, 0))
    last = jnp.where(direction > 0, room - least, jnp.where(direction < 0, most, room))
    return first, last


def _places(
    key: Key[Array, ""], factors: Mapping[str, Array], *, scale: Scale
) -> tuple[Int[Array, "2"], Int[Array, "2"]]:
    """Where the box starts, and the second sprite's offset from the first."""
    offset = jnp.zeros(2, jnp.int32)
    if scale.pairs:
        low = jnp.array([-LIFT, scale.box + GAPS[0]])
        high = jnp.array([LIFT, scale.box + GAPS[1]])
        drawn = jax.random.randint(jax.random.fold_in(key, 2), (2,), low, high + 1)
        offset = jnp.where(factors["second_colour"] >= 0, drawn, 0).astype(jnp.int32)
    first, last = _starts(factors, offset, scale)
    key = jax.random.fold_in(key, 3)
    return jax.random.randint(key, (2,), first, last + 1, jnp.int32), offset


def _render(
    factors: Mapping[str, Array],
    start: Int[Array, "2"],
    offset: Int[Array, "2"],
    level: Float[Array, ""],
    *,
    scale: Scale,
) -> Float[Array, "frame height width 3"]:
    direction = jnp.asarray([*MOTIONS.values()], jnp.int32)[factors["motion"]]
    speed = jnp.asarray([*GAITS.values()], jnp.int32)[factors["gait"], 0]
    room = _room(offset, scale)
    step = jnp.arange(scale.frames, dtype=jnp.int32)[:, None]
    # A triangle wave: straight until a border, then back.
    wave = (start + direction * speed * step) % (2 * room)
    box = room - jnp.abs(room - wave)
    ground = jnp.asarray([*GROUNDS.values()], jnp.float32)[factors["ground"]] + level
    palette = jnp.asarray([*COLOURS.values()], jnp.float32)
    video = jnp.broadcast_to(ground, scale.event_shape)
    # With a negative lift the second sprite touches the top of the box, else the
    # first does.
    first = jnp.maximum(-offset, 0) * jnp.array([1, 0])
    mask = _mask(factors["shape"], box + first, scale)
    video = jnp.where(mask, palette[factors["colour"]], video)
    if scale.pairs:
        mask = _mask(factors["second_shape"], box + first + offset, scale)
        mask &= factors["second_colour"] >= 0
        video = jnp.where(mask, palette[factors["second_colour"]], video)
    return video


def _mask(shape: Int[Array, ""], corner: Int[Array, "frame 2"], scale: Scale) -> Array:
    """Which pixels a sprite covers, bool [frame, height, width, 1]."""
    pixel, inside = np.arange(scale.size)[:, None], np.arange(scale.box)
    row, column = (
        (pixel - corner[:, axis, None, None] == inside).astype(jnp.float32)
        for axis in range(2)
    )
    template = jnp.asarray(templates(scale.box), jnp.float32)[shape]
    # Products of 0 and 1: exact in any precision.
    return jnp.einsum("fya,ab,fxb->fyx", row, template, column)[..., None] > 0.5


def bank(
    scale: str | Scale = "small", levels: int = LEVELS
) -> Float[np.ndarray, "prompt video frame height width 3"]:
    """Every video of every prompt, at equidistant levels of the ground.

    Args:
        scale: of one straight sprite on grey ('tiny' and 'small' are), or its name.
        levels: of the ground, >= 2.

    Returns:
        float32, on the host; at the small scale [48, 120, 6, 12, 12, 3], 60 MB. A
        prompt's videos are ordered by row and column of the start, then by level.

    Raises:
        ValueError: a scale with gaits, grounds or pairs, or levels < 2.
    """
    scale = get_scale(scale)
    check_count("levels", levels, 2)
    if scale.gaits > 1 or scale.grounds > 1 or scale.pairs:
        raise ValueError(
            f"scale {scale.name!r} has {scale.num_prompts} prompts with numbers of "
            f"videos that differ; a bank needs one straight sprite on grey ('small')."
        )
    offset, groups = jnp.zeros(2, jnp.int32), []
    draw = jax.jit(
        jax.vmap(functools.partial(_render, scale=scale), in_axes=(None, 0, None, 0))
    )
    grey = np.asarray(_levels(scale, levels))
    for number in range(scale.num_prompts):
        arrays = prompt_factors(jnp.array([number]), scale)
        factors = {name: array[0] for name, array in arrays.items()}
        first, last = (np.asarray(a) for a in _starts(factors, offset, scale))
        rows, columns, level = np.meshgrid(
            *(np.arange(a, b + 1) for a, b in zip(first, last)), grey, indexing="ij"
        )
        start = np.stack([rows.ravel(), columns.ravel()], 1).astype(np.int32)
        groups.append(np.asarray(draw(factors, start, offset, level.ravel())))
    return np.stack(groups)
