"""Pictures of samples: grids of images, contact sheets and animations of videos."""

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tmdjax.core.checks import check_count, check_finite
from tmdjax.core.files import write_atomically

_GAP = 2  # pixels between frames and rows
_MODEL_GAP = 10  # between models
_WHITE = 255
_FRAME_MS = 250  # of an animation
_MOST_COLOURS = 256  # of a GIF
_NO_SHADES = "1"  # text in plain black: colours are scarce in a GIF


def image_grid(
    images: Mapping[str, Any] | Any,
    path: str | os.PathLike[str],
    columns: int | None = None,
    *,
    scale: int = 4,
) -> Path:
    """Writes images side by side as one PNG.

    Args:
        images: [n, height, width, 1 or 3], values in [-1, 1] (clipped); or such arrays,
            all of one shape, by the text that is drawn to their left: a row each.
        path: the PNG to write; folders are made.
        columns: images a row; the last row may have fewer. Of arrays by name it is
            their length, and not given.
        scale: how many pixels wide a pixel becomes (nearest neighbour).

    Returns:
        The path.

    Raises:
        TypeError: columns is no integer, or is given beside arrays by name.
        ValueError: another shape, shapes that differ, no image, NaN or infinity,
            columns or scale below 1.
    """
    if isinstance(images, Mapping):
        if columns is not None:
            raise TypeError(
                f"columns={columns} beside arrays by name, of which each is a row; "
                f"leave columns out."
            )
        found = {name: _images(array, name) for name, array in images.items()}
        shapes = sorted({array.shape for array in found.values()})
        if len(shapes) != 1:
            raise ValueError(
                f"rows need arrays of one shape, at least one; {', '.join(found)} have "
                f"{', '.join(map(str, shapes)) or 'none'}."
            )
        rows, labels = np.stack(list(found.values())), list(found)
    else:
        columns, array, labels = check_count("columns", columns), _images(images), []
        white = np.ones((-len(array) % columns, *array.shape[1:]))
        rows = np.concatenate([array, white]).reshape(-1, columns, *array.shape[1:])
    return video_strips(rows, path, row_labels=labels, scale=scale)


def _images(given: Any, name: str = "") -> np.ndarray:
    """Images in float32, checked."""
    return _samples(given, "images", name, ("n", "height", "width", "channel"))


def _samples(given: Any, kind: str, name: str, axes: tuple[str, ...]) -> np.ndarray:
    """An array of such axes in float32, checked; errors call it KIND['NAME']."""
    array = np.asarray(given, np.float32)
    what = f"{kind}[{name!r}]" if name else kind
    if array.ndim != len(axes) or array.shape[-1] not in (1, 3) or 0 in array.shape:
        raise ValueError(
            f"{what} of shape {array.shape} are no {kind}; give [{', '.join(axes)}] "
            f"with n >= 1 and 1 or 3 channels."
        )
    check_finite(array, what)
    return array


def video_strips(
    videos: Mapping[str, Any] | Any,
    path: str | os.PathLike[str],
    *,
    row_labels: Sequence[str] = (),
    scale: int = 4,
) -> Path:
    """Writes a contact sheet: a row a video, its frames side by side.

    Args:
        videos: [n, frame, height, width, 1 or 3], values in [-1, 1] (clipped); or such
            arrays, all of one shape, by the name that is written above: row i shows
            video i of each, beside each other.
        path: the PNG to write; folders are made.
        row_labels: one text a video, such as its prompt, drawn to its left.
        scale: how many pixels wide a pixel becomes (nearest neighbour).

    Returns:
        The path.

    Raises:
        ValueError: another shape, shapes that differ, no video, NaN or infinity, scale
            below 1, or as many labels as there are not videos.
    """
    blocks = _pixels(videos, scale)
    sheets = {name: _beside(block)[None] for name, block in blocks.items()}
    canvas = _sheet(sheets, row_labels)
    picture = io.BytesIO()
    Image.fromarray(canvas[0]).save(picture, format="PNG")
    write_atomically(path, picture.getvalue())
    return Path(path)


def animation(
    videos: Mapping[str, Any] | Any,
    path: str | os.PathLike[str],
    *,
    row_labels: Sequence[str] = (),
    scale: int = 4,
) -> Path:
    """Writes videos that play at once, four frames a second and for ever, as a GIF.

    Up to 256 colours are kept exactly; of more, the nearest of a common palette are
    shown. A frame that equals the one before is stored as a longer one.

    Args:
        videos: [n, frame, height, width, 1 or 3], values in [-1, 1] (clipped), one a
            row; or such arrays, all of one shape, by the name that is written above
            them: models beside each other.
        path: the GIF to write; folders are made.
        row_labels: one text a row, drawn to its left.
        scale: how many pixels wide a pixel becomes (nearest neighbour).

    Returns:
        The path.

    Raises:
        ValueError: another shape, shapes that differ, no video, NaN or infinity, scale
            below 1, or as many labels as there are not videos.
    """
    blocks = {
        name: block.swapaxes(0, 1)  # [frame, row, ...]
        for name, block in _pixels(videos, scale).items()
    }
    frames = _in_one_palette(_sheet(blocks, row_labels))
    picture = io.BytesIO()
    frames[0].save(
        picture,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=_FRAME_MS,
        loop=0,
        optimize=False,
    )
    write_atomically(path, picture.getvalue())
    return Path(path)


def _pixels(videos: Mapping[str, Any] | Any, scale: int) -> dict[str, np.ndarray]:
    """Enlarged RGB bytes [n, frame, height, width, 3] by model."""
    check_count("scale", scale)
    named = dict(videos) if isinstance(videos, Mapping) else {"": videos}
    if not named:
        raise ValueError("videos is empty; give at least one array.")
    blocks: dict[str, np.ndarray] = {}
    shape = None
    for name, given in named.items():
        axes = ("n", "frame", "height", "width", "channel")
        array = _samples(given, "videos", name, axes)
        shape = shape or array.shape
        if array.shape != shape:
            raise ValueError(
                f"videos[{name!r}] has shape {array.shape} but the first has {shape}; "
                f"models beside each other need the same number and size of videos."
            )
        levels = np.rint((np.clip(array, -1, 1) + 1) * 127.5).astype(np.uint8)
        levels = levels.repeat(scale, axis=2).repeat(scale, axis=3)
        blocks[name] = np.broadcast_to(levels, (*levels.shape[:-1], 3))
    return blocks


def _beside(images: np.ndarray) -> np.ndarray:
    """[row, column, height, width, 3] as one picture a row, [row, height, w, 3]."""
    rows, columns, height, width, _ = images.shape
    step = width + _GAP
    strip = np.full((rows, height, columns * step - _GAP, 3), _WHITE, np.uint8)
    for column in range(columns):
        strip[:, :, column * step : column * step + width] = images[:, column]
    return strip


def _sheet(blocks: Mapping[str, np.ndarray], row_labels: Sequence[str]) -> np.ndarray:
    """Blocks [frame, row, height, width, 3] beside each other, with their labels.

    Returns:
        uint8 [frame, height, width, 3].
    """
    frames, rows, height, width, _ = next(iter(blocks.values())).shape
    if row_labels and len(row_labels) != rows:
        raise ValueError(
            f"{len(row_labels)} row labels for {rows} rows; give one each."
        )
    font: Any = ImageFont.load_default()
    top = max(_text_size(font, name)[1] for name in blocks)
    labels = [_text_size(font, label) for label in row_labels]
    left = max((width + _GAP for width, _ in labels), default=0)
    step = max([height + _GAP, *(tall for _, tall in labels)])
    places, end = {}, left
    for name in blocks:
        places[name] = end
        end += max(width, _text_size(font, name)[0]) + _MODEL_GAP
    size = (end - _MODEL_GAP, top + rows * step - _GAP)

    paper = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(paper)
    draw.fontmode = _NO_SHADES
    for name, x in places.items():
        draw.text((x, 0), name, fill="black", font=font)
    for row, label in enumerate(row_labels):
        draw.text((0, top + row * step), label, fill="black", font=font)
    canvas = np.repeat(np.asarray(paper)[None], frames, axis=0)
    for name, block in blocks.items():
        x = places[name]
        for row in range(rows):
            y = top + row * step
            canvas[:, y : y + height, x : x + width] = block[:, row]
    return canvas


def _text_size(font: Any, text: str) -> tuple[int, int]:
    """Width and height that a text takes, with a gap; nothing for no text."""
    if not text:
        return 0, 0
    _, _, right, bottom = font.getbbox(text, mode=_NO_SHADES)
    return math.ceil(right) + _GAP, math.ceil(bottom) + _GAP


def _in_one_palette(frames: np.ndarray) -> list[Image.Image]:
    """Frames [frame, height, width, 3] as pictures that share one palette."""
    packed = frames.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    colours, index = np.unique(packed, return_inverse=True)
    if len(colours) <= _MOST_COLOURS:
        channels = [(colours >> shift) & 255 for shift in (16, 8, 0)]
        palette = np.stack(channels, 1).astype(np.uint8).ravel().tolist()
        index = index.astype(np.uint8)
    else:
        tall = Image.fromarray(frames.reshape(-1, *frames.shape[2:]))
        reduced = tall.quantize(_MOST_COLOURS, dither=Image.Dither.NONE)
        palette, index = reduced.getpalette() or [], np.asarray(reduced)
    pictures = []
    for one in index.reshape(frames.shape[:3]):
        picture = Image.fromarray(np.ascontiguousarray(one))
        picture.putpalette(palette)
        pictures.append(picture)
    return pictures
