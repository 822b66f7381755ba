import base64

import numpy as np
import pytest
from PIL import Image

from tmdjax.harness.pictures import animation, image_grid, video_strips
from tmdjax.harness.report import write_report

RNG = np.random.default_rng(0)
# Levels that are bytes exactly, so that pictures can be compared.
BYTES = RNG.integers(0, 256, (3, 4, 2, 5, 3), np.uint8)
VIDEOS = BYTES / 127.5 - 1


def sheet(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def frames_of(path):
    with Image.open(path) as picture:
        frames = []
        for i in range(picture.n_frames):
            picture.seek(i)
            frames.append(np.asarray(picture.convert("RGB")))
        return np.stack(frames), picture.info


def places_of(bare, frames):
    """Columns at which the bare pictures stand in frames, below their labels."""
    top, width = frames.shape[1] - bare.shape[1], bare.shape[2]
    columns = range(frames.shape[2] - width + 1)
    return [x for x in columns if (frames[:, top:, x : x + width] == bare).all()]


def test_grid_places_every_image_and_scales_it(tmp_path):
    levels = [-1.0, -0.5, 0.0, 0.5, 1.0]
    images = np.stack([np.full((3, 2, 1), v) for v in levels])
    images[4, 0, 1] = -1
    grid = sheet(image_grid(images, tmp_path / "a" / "grid.png", 3, scale=2))
    assert grid.shape == (3 * 2 * 2 + 2, 2 * 2 * 3 + 4, 3)
    np.testing.assert_array_equal(grid, grid[..., :1].repeat(3, -1))
    assert [grid[0, x, 0] for x in (0, 6, 12)] == [0, 64, 128]
    last = grid[8:14, 6:10]
    np.testing.assert_array_equal(last[:2, 2:], 0)
    np.testing.assert_array_equal(last[2:], 255)
    assert (grid[8:, 12:] == 255).all()  # the place of a sixth image
    assert (grid[6:8] == 255).all()


def test_grid_keeps_colours_and_clips(tmp_path):
    images = np.array([1.0, -1.0, 7.0]).reshape(1, 1, 1, 3)
    grid = sheet(image_grid(images, tmp_path / "grid.png", 1, scale=1))
    assert grid.tolist() == [[[255, 0, 255]]]


def test_rows_stand_beside_their_own_names(tmp_path):
    """Each name's row holds its array, in whatever order a mapping has them."""
    names = ["steps2", "real", "1 step", "|"]
    arrays = {n: np.full((2, 6, 6, 1), -1 + i / 4) for i, n in enumerate(names)}
    margins = {}
    for order in (names, sorted(names), names[::-1]):
        grid = sheet(image_grid({n: arrays[n] for n in order}, tmp_path / "a.png"))
        margin = grid.shape[1] - (2 * 6 * 4 + 2)
        for row, name in enumerate(order):
            top = row * (6 * 4 + 2)
            level = np.rint((arrays[name][0, 0, 0, 0] + 1) * 127.5)
            assert (grid[top : top + 24, margin : margin + 24] == level).all()
            label = grid[top : top + 24, :margin].tobytes()
            assert margins.setdefault(name, label) == label
    assert len(set(margins.values())) == 4


def test_grid_refuses_bad_input(tmp_path, refused):
    def grid_refused(words, *shape, columns=2, **options):
        images = options.pop("images", np.zeros(shape))
        path = tmp_path / "grid.png"
        refused(words, image_grid, images, path, columns, **options)

    words = r"shape \(2, 4, 4\) are no images; give \[n, height, width, channel\]"
    grid_refused(words, 2, 4, 4)
    grid_refused("1 or 3 channels", 2, 4, 4, 2)
    grid_refused("n >= 1", 0, 4, 4, 1)
    grid_refused("columns=0 must be at least 1", 2, 4, 4, 1, columns=0)
    grid_refused("scale=0 must be at least 1", 2, 4, 4, 1, scale=0)
    pair = {"a": np.zeros((2, 4, 4, 1)), "b": np.zeros((3, 4, 4, 1))}
    grid_refused("one shape, at least one; a, b have", images=pair, columns=None)
    grid_refused("at least one;  have none", images={}, columns=None)
    words = r"images\['b'\] of shape \(3, 4\)"
    grid_refused(words, images={"b": np.zeros((3, 4))}, columns=None)
    words = "columns=2 beside arrays by name"
    refused(words, image_grid, pair, tmp_path / "grid.png", 2, error=TypeError)
    images = np.zeros((2, 2, 2, 1))
    images[1, 0, 1, 0] = np.nan
    grid_refused(r"at index \(1, 0, 1, 0\)", images=images)
    assert not (tmp_path / "grid.png").exists()


def test_a_row_is_a_video_with_its_frames_side_by_side(tmp_path):
    path = video_strips(VIDEOS, tmp_path / "a" / "strips.png", scale=2)
    grid = sheet(path)
    assert grid.shape == (3 * 4 + 2 * 2, 4 * 10 + 3 * 2, 3)
    big = BYTES.repeat(2, 2).repeat(2, 3)
    for row in range(3):
        for frame in range(4):
            y, x = row * 6, frame * 12
            np.testing.assert_array_equal(grid[y : y + 4, x : x + 10], big[row, frame])
    assert (grid[4:6] == 255).all() and (grid[:, 10:12] == 255).all()


def test_models_stand_beside_each_other_under_their_names(tmp_path):
    models = {"teacher": VIDEOS, "a student of two steps": -VIDEOS}
    bare = sheet(video_strips(VIDEOS, tmp_path / "bare.png", scale=8))
    labels = ["red square", "up", ""]
    path = video_strips(models, tmp_path / "both.png", row_labels=labels, scale=8)
    grid = sheet(path)
    top = grid.shape[0] - bare.shape[0]
    dark = (grid < 128).all(-1)
    # The first strip is the only place where the bare sheet fits.
    (left,) = places_of(bare[None], grid[None])
    right = left + bare.shape[1]
    assert top > 0
    assert dark[:top, left:right].any() and dark[:top, right:].any()
    step = bare.shape[0] // 3
    assert dark[top : top + step, :left].any()
    assert not dark[top + 2 * step + 4 :, :left].any()
    other = sheet(video_strips(-VIDEOS, tmp_path / "other.png", scale=8))
    beyond = grid[top:, right + 10 : right + 10 + other.shape[1]]
    np.testing.assert_array_equal(beyond, other)


def test_an_animation_plays_every_frame_in_its_colours(tmp_path):
    videos = np.rint(VIDEOS)  # few colours: kept exactly
    frames, info = frames_of(animation(videos, tmp_path / "a" / "rows.gif", scale=3))
    assert frames.shape == (4, 3 * 6 + 2 * 2, 15, 3)
    assert info["duration"] == 250 and info["loop"] == 0
    exact = np.rint((videos + 1) * 127.5).astype(np.uint8).repeat(3, 2).repeat(3, 3)
    for row in range(3):
        np.testing.assert_array_equal(frames[:, row * 8 : row * 8 + 6], exact[row])
    assert (frames[:, 6:8] == 255).all()


def test_an_animation_of_many_colours_is_close(tmp_path):
    smooth, blue = np.linspace(-1, 1, 40), np.linspace(-1, 1, 3)[:, None, None]
    colours = np.broadcast_arrays(smooth[:, None], smooth[None], blue)
    videos = np.stack(colours, -1)[None]
    frames, _ = frames_of(animation(videos, tmp_path / "many.gif", scale=1))
    exact = np.rint((videos[0] + 1) * 127.5)
    assert frames.shape == exact.shape
    assert np.abs(frames - exact).mean() < 16


def test_animations_show_models_with_labels(tmp_path):
    flat = np.sign(VIDEOS)
    models = {"t": flat, "s": -flat}
    path = animation(models, tmp_path / "m.gif", row_labels=["a", "b", "c"], scale=8)
    frames, _ = frames_of(path)
    bare, _ = frames_of(animation(flat, tmp_path / "b.gif", scale=8))
    assert len(frames) == len(bare) == 4 and len(places_of(bare, frames)) == 1
    top, width = frames.shape[1] - bare.shape[1], bare.shape[2]
    student = frames[:, top : top + 16, -width:]
    np.testing.assert_array_equal(student, 255 - bare[:, :16])


def test_grey_videos(tmp_path):
    grey = VIDEOS[..., :1]
    grid = sheet(video_strips(grey, tmp_path / "grey.png", scale=1))
    np.testing.assert_array_equal(grid[:2, :5], BYTES[0, 0, ..., :1].repeat(3, -1))
    assert len(frames_of(animation(grey, tmp_path / "grey.gif"))[0]) == 4


def test_a_report_embeds_an_animation_as_one(tmp_path):
    path = animation(VIDEOS, tmp_path / "a.gif")
    given = {"title": "t", "command": "c", "environment": {}}
    given["figures"] = [("moving", path)]
    page = write_report(tmp_path / "report.html", **given).read_text()
    data = base64.b64encode(path.read_bytes()).decode()
    assert f"data:image/gif;base64,{data}" in page


@pytest.mark.parametrize("write", [video_strips, animation])
def test_bad_input(tmp_path, write, refused):
    path = tmp_path / "x"
    words = r"videos of shape \(4, 2, 5, 3\) are no videos; give \[n, frame"
    refused(words, write, VIDEOS[0], path)
    refused("n >= 1", write, VIDEOS[:0], path)
    refused("1 or 3 channels", write, VIDEOS[..., :2], path)
    refused("videos is empty", write, {}, path)
    words = r"videos\['b'\] has shape .* same number"
    refused(words, write, {"a": VIDEOS, "b": VIDEOS[:2]}, path)
    refused(r"videos\['a'\] has 360 non-finite", write, {"a": VIDEOS * np.nan}, path)
    refused("1 row labels for 3 rows", write, VIDEOS, path, row_labels=["a"])
    refused("scale=0 must be at least 1", write, VIDEOS, path, scale=0)
    assert not path.exists()
