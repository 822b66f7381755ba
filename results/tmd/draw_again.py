"""Draws the figures of tmd's cpu record again, each column under its own name.

    python -m results.tmd.draw_again

The record's run named columns in the order of sorted metrics and drew videos in the
order in which they were sampled, so 'real.' stood above samples of two steps and
'steps2.' above real videos. Its arrays are gone, but the picture of frames is lossless:
the videos are cut out of it, as bytes, and drawn by what draws them now. The column
that must be the real videos is compared with them, byte by byte. The next ``--record``
of this tier makes the figures from arrays, and this file has done its work.
"""

import io
import pathlib
import subprocess

import numpy as np
from PIL import Image

from experiments import video_measures, video_samples, video_tasks
from experiments.arms import arms, of_arm
from tmdjax.data.videos.files import to_float, to_uint8
from tmdjax.domains.sprites.prompts import prompt_words
from tmdjax.harness import load_config
from tmdjax.harness.pictures import animation, video_strips

COMMIT = "f05035b"  # that recorded the run
FOLDER = pathlib.Path("results/tmd")
SCALE, GAP, BETWEEN = 4, 2, 10  # pixels: of a pixel, between frames, between columns


def cut(picture: np.ndarray, columns: int, shape: tuple[int, ...]) -> list[np.ndarray]:
    """The videos of each column of a contact sheet.

    Args:
        picture: uint8 [height, width, 3].
        columns: of videos.
        shape: [row, frame, height, width, 3], of a column.

    Returns:
        uint8 arrays of that shape, from left to right.
    """
    rows, frames, height, width, _ = shape
    down, right = height * SCALE + GAP, width * SCALE + GAP
    wide = frames * right - GAP + BETWEEN
    top = picture.shape[0] - (rows * down - GAP)
    left = picture.shape[1] - (columns * wide - BETWEEN)
    found = []
    for column in range(columns):
        videos = np.empty(shape, np.uint8)
        for row in range(rows):
            for frame in range(frames):
                y, x = top + row * down, left + column * wide + frame * right
                enlarged = picture[y : y + down - GAP, x : x + right - GAP]
                videos[row, frame] = enlarged[::SCALE, ::SCALE]
                back = videos[row, frame].repeat(SCALE, 0).repeat(SCALE, 1)
                assert (back == enlarged).all(), (column, row, frame)
        found.append(videos)
    return found


def main() -> None:
    """Writes the figures of every arm."""
    config = load_config("configs/tmd.py:cpu")
    asked = video_tasks.prompts(config)
    scale = video_tasks.scale_of(config)
    rows = [" ".join(prompt_words(int(p), scale)) for p in asked[: video_samples.SHOWN]]
    for arm in arms(config):
        name = f"cpu-{arm}-frames.png"
        old = subprocess.run(
            ["git", "show", f"{COMMIT}:{FOLDER}/{name}"],
            check=True,
            capture_output=True,
        ).stdout
        picture = np.asarray(Image.open(io.BytesIO(old)).convert("RGB"))
        titles = list(video_samples.ways(of_arm(config, arm)).values())
        if arm == "teacher":
            titles.append("real videos")
        columns = cut(picture, len(titles), (len(rows), *scale.event_shape))
        videos = dict(zip(titles, map(to_float, columns), strict=True))
        if arm == "teacher":
            real = video_measures.real_videos(config, asked, draw=1)[: len(rows)]
            assert (to_uint8(real) == columns[-1]).all()
        video_strips(videos, FOLDER / name, row_labels=rows)
        animation(videos, FOLDER / f"cpu-{arm}-videos.gif", row_labels=rows)


if __name__ == "__main__":
    main()
