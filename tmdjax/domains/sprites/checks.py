"""Exact check of videos of moving sprites against their prompts, in numpy.

The rules see what is there, without the prompt (:func:`recognise`); :func:`check`
compares. A video that was drawn from a prompt passes; blur and residual noise do not:
at the small scale all drawn videos pass with N(0, 0.1²) added to their pixels, 57 %
with N(0, 0.2²), none with N(0, 0.3²).
"""

import functools
from typing import Any

import numpy as np

from tmdjax.core.checks import check_batch
from tmdjax.core.types import ArrayLike, Bool, Float, Int
from tmdjax.domains.sprites.prompts import check_prompts, prompt_factors
from tmdjax.domains.sprites.scenes import (
    COLOURS,
    GAITS,
    GROUNDS,
    LEAD,
    MOTIONS,
    Scale,
    get_scale,
    templates,
)

CONTRAST = 0.5
"""A pixel shows a sprite where a channel is further than this from the ground."""

LEAST_IOU = 0.7
"""Intersection over union with a template that a shape needs, on average."""

LEAST_SHARE = 0.6
"""Share of the way that a motion needs."""

_TURNED = 2.0  # pixels back from the furthest place: a bounce
_CHUNK = 128  # videos at a time: bounds the memory
_NONE = -1

Found = dict[str, np.ndarray]


def check(
    videos: Float[ArrayLike, "batch frame height width 3"],
    prompts: Int[ArrayLike, "batch"],
    scale: str | Scale = "small",
) -> dict[str, Bool[np.ndarray, "batch"]]:
    """Says which of the things that a prompt asks for a video shows.

    Args:
        videos: [batch, frame, height, width, 3], meant to lie in [-1, 1]; anything
            beyond is taken as it is.
        prompts: int [batch] in [0, num_prompts).
        scale: the scale of videos and prompts, or its name.

    Returns:
        Bool [batch] by factor: 'colour', 'shape' and 'motion'; where the scale varies
        them 'speed', 'bounce' and 'ground', and 'relation' (as many sprites as asked
        for, and the first left of the second in every frame; 'colour' and 'shape' then
        ask for both, whichever is left). 'all' is their conjunction. A video that
        holds a value that is not finite shows nothing.

    Raises:
        TypeError: prompts that are not integers.
        ValueError: videos of another shape than the scale's, or prompts out of range.
    """
    scale = get_scale(scale)
    prompts = np.asarray(prompts)
    check_prompts(prompts, scale)
    videos = _check_videos(videos, scale)
    check_batch("videos", videos, len(prompts))
    found = recognise(videos, scale)
    asked = prompt_factors(prompts, scale)
    second = ("second_colour", "second_shape")
    # Sprites go by their colours; the relation judges where they stand.
    swapped = (asked["second_colour"] >= 0) & (
        (found["second_colour"] == asked["colour"])
        & (found["colour"] == asked["second_colour"])
    )
    for here, there in zip(("colour", "shape"), second):
        first = np.where(swapped, found[there], found[here])
        found[there] = np.where(swapped, found[here], found[there])
        found[here] = first

    right = {name: found[name] == asked[name] for name in ("colour", "shape", "motion")}
    if scale.gaits > 1:
        speed, bounces = np.array([*GAITS.values()])[asked["gait"]].T
        right["speed"] = found["speed"] == speed
        right["bounce"] = found["bounces"] == bounces
    if scale.grounds > 1:
        right["ground"] = found["ground"] == asked["ground"]
    if scale.pairs:
        right["colour"] &= found["second_colour"] == asked["second_colour"]
        right["shape"] &= found["second_shape"] == asked["second_shape"]
        number = 1 + (asked["second_colour"] >= 0)
        right["relation"] = (found["sprites"] == number) & found["ordered"] & ~swapped
    return {**right, "all": np.all([*right.values()], axis=0)}


def recognise(
    videos: Float[ArrayLike, "batch frame height width 3"], scale: str | Scale = "small"
) -> Found:
    """Says what videos show, whatever was asked for.

    - The ground is the median of each channel of each frame; a pixel shows a sprite
      where a channel differs by more than ``CONTRAST``.
    - The colour is the nearest to the mean over those pixels of all frames. Where
      there may be two sprites, each such pixel takes its nearest colour, and a colour
      is a sprite if it has half the pixels of the smallest template.
    - The shape has the highest intersection over union at its best place, averaged
      over the frames, if that exceeds ``LEAST_IOU``.
    - The motion is the axis and sign of the larger part of the way of the sprite's
      centre, from the first frame to the last (where sprites may bounce, to frame
      ``LEAD``), if that is ``LEAST_SHARE`` of a pixel a frame.

    Args:
        videos: [batch, frame, height, width, 3].
        scale: or its name.

    Returns:
        Arrays [batch]: 'colour', 'shape', 'motion', 'ground', 'second_colour' and
        'second_shape' int64, indices or -1 for none; 'sprites' their number; 'speed'
        in pixels a frame, -1 for none; 'bounces' 0 or 1, -1 for none; 'ordered' bool,
        whether no sprite passes the other. 'start' float64 [batch, 2], the middle
        (row, column) of the first sprite in the first frame, NaN for none. The first
        of two sprites is the left one.

    Raises:
        ValueError: videos of another shape than the scale's.
    """
    scale = get_scale(scale)
    videos = _check_videos(videos, scale)
    parts = [
        _recognise(videos[i : i + _CHUNK], scale)
        for i in range(0, max(len(videos), 1), _CHUNK)
    ]
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def _check_videos(videos: Any, scale: Scale) -> np.ndarray:
    videos = np.asarray(videos)
    if videos.ndim != 5 or videos.shape[1:] != scale.event_shape:
        raise ValueError(
            f"videos have shape {videos.shape}; scale {scale.name!r} has [batch, "
            f"{', '.join(map(str, scale.event_shape))}]."
        )
    return videos.astype(np.float32, copy=False)


def _recognise(videos: np.ndarray, scale: Scale) -> Found:
    finite = np.isfinite(videos).all((1, 2, 3, 4), keepdims=True)
    videos = np.where(finite, videos, 0)
    planes = np.moveaxis(videos, -1, 2).reshape(*videos.shape[:2], 3, scale.size**2)
    ground = np.median(planes, axis=-1)[:, :, None, None]
    mask = np.abs(videos - ground).max(-1) > CONTRAST
    grounds = np.array([*GROUNDS.values()][: scale.grounds])
    level = ground.mean((1, 2, 3))
    found = {"ground": np.where(finite.ravel(), _nearest(level, grounds), _NONE)}
    if scale.pairs:
        masks, colours, found["sprites"] = _two_sprites(videos, mask, scale)
    else:
        masks, colours = [mask], [_mean_colour(videos, mask, scale)]
    tracks = [_track(mask) for mask in masks]
    shapes = [_shape(mask, scale) for mask in masks]
    if scale.pairs:
        # From left to right, on average over the frames where both are seen.
        gaps = tracks[1][..., 1] - tracks[0][..., 1]
        seen = np.isfinite(gaps)
        mean = np.where(seen, gaps, 0).sum(1)
        swap = (colours[1] >= 0) & (mean < 0)
        signed = np.where(swap[:, None], -gaps, gaps)
        found["ordered"] = (colours[1] < 0) | (seen & (signed > 0)).all(1)
        colours, shapes, tracks = (
            _ordered(pair, swap) for pair in (colours, shapes, tracks)
        )
        found["second_colour"], found["second_shape"] = colours[1], shapes[1]
    else:
        found["second_colour"] = np.full(len(videos), _NONE)
        found["second_shape"] = found["second_colour"].copy()
        found["sprites"] = (colours[0] >= 0) * 1
        found["ordered"] = np.full(len(videos), True)
    found["colour"], found["shape"] = colours[0], shapes[0]
    found["start"] = tracks[0][:, 0]
    return {**found, **_movement(tracks[0], scale)}


def _ordered(pair: list[np.ndarray], swap: np.ndarray) -> list[np.ndarray]:
    first, second = pair
    swap = swap.reshape(-1, *(1,) * (first.ndim - 1))
    return [np.where(swap, second, first), np.where(swap, first, second)]


def _nearest(values: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Index of the nearest colour, [...], for [..., 3]."""
    distances = [np.square(values - colour).sum(-1) for colour in palette]
    return np.argmin(distances, axis=0)


def _palette(scale: Scale) -> np.ndarray:
    return np.array([*COLOURS.values()][: scale.colours], np.float32)


def _mean_colour(videos: np.ndarray, mask: np.ndarray, scale: Scale) -> np.ndarray:
    number = mask.sum((1, 2, 3))
    total = (videos * mask[..., None]).sum((1, 2, 3), dtype=np.float64)
    mean = total / np.maximum(number, 1)[:, None]
    return np.where(number > 0, _nearest(mean, _palette(scale)), _NONE)


def _two_sprites(
    videos: np.ndarray, mask: np.ndarray, scale: Scale
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Masks and colours of the two colours with most pixels, and how many are sprites.

    A colour is -1, and its mask empty, where it is not a sprite.
    """
    nearest = np.full(mask.shape, _NONE)
    nearest[mask] = _nearest(videos[mask], _palette(scale))
    areas = np.stack([(nearest == i).sum((1, 2, 3)) for i in range(scale.colours)], 1)
    least = templates(scale.box)[: scale.shapes].sum((1, 2)).min() / 2
    present = areas >= least * scale.frames
    masks, colours = [], []
    for rank in np.argsort(-areas, axis=1, kind="stable")[:, :2].T:
        there = np.take_along_axis(present, rank[:, None], 1)[:, 0]
        colours.append(np.where(there, rank, _NONE))
        wanted = np.where(there, rank, scale.colours)
        masks.append(nearest == wanted[:, None, None, None])
    return masks, colours, present.sum(1)


def _track(mask: np.ndarray) -> np.ndarray:
    """Middle (row, column) of each frame's pixels, [batch, frame, 2]; NaN for none."""
    number = mask.sum((2, 3)).astype(np.float64)
    place = np.arange(mask.shape[2])
    total = np.stack([mask.sum(3) @ place, mask.sum(2) @ place], -1)
    empty = number == 0
    return np.where(
        empty[..., None], np.nan, total / np.where(empty, 1, number)[..., None]
    )


@functools.cache
def _tight_templates(box: int) -> tuple[np.ndarray, ...]:
    """Templates without empty rows and columns."""
    return tuple(mask[mask.any(1)][:, mask.any(0)] for mask in templates(box))


def _shape(mask: np.ndarray, scale: Scale) -> np.ndarray:
    area = mask.sum((2, 3))
    mask = mask.astype(np.uint8)
    scores = []
    for template in _tight_templates(scale.box)[: scale.shapes]:
        height, width = (scale.size + 1 - side for side in template.shape)
        shared = np.zeros((*mask.shape[:2], height, width), np.uint8)
        for y, x in np.argwhere(template):
            shared += mask[:, :, y : y + height, x : x + width]
        most = shared.max((2, 3)).astype(int)
        scores.append((most / (area + template.sum() - most)).mean(1))
    return np.where(np.max(scores, 0) > LEAST_IOU, np.argmax(scores, 0), _NONE)


def _movement(track: np.ndarray, scale: Scale) -> Found:
    lead = LEAD if scale.gaits > 1 else scale.frames - 1
    way = np.nan_to_num(track[:, lead] - track[:, 0])  # [batch, 2]
    axis = np.argmax(np.abs(way), axis=1)
    along = np.take_along_axis(way, axis[:, None], 1)[:, 0]
    moved = np.abs(along) >= LEAST_SHARE * lead
    directions = np.array([*MOTIONS.values()][: scale.motions])
    walked = np.where(np.arange(2) == axis[:, None], np.sign(along)[:, None], 0)
    same = (walked[:, None] == directions).all(-1) & moved[:, None]
    motion = np.where(same.any(1), same.argmax(1), _NONE)

    places = np.take_along_axis(track, axis[:, None, None], 2)[..., 0]
    places = places * np.sign(along)[:, None]
    whole = moved & np.isfinite(places).all(1)
    places = np.where(whole[:, None], places, 0)
    step = np.median(np.abs(np.diff(places, axis=1)), axis=1)
    back = (np.maximum.accumulate(places, axis=1) - places).max(1)
    return {
        "motion": motion,
        "speed": np.where(whole, np.rint(step), _NONE).astype(int),
        "bounces": np.where(whole, back >= _TURNED, _NONE).astype(int),
    }
