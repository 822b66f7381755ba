import jax
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from tmdjax.core.prng import sample_keys
from tmdjax.data import load
from tmdjax.data.videos.moving_digits import moving_digits

KEYS = sample_keys(jax.random.key(1), 256)
# Three digits of one level each, 2 x 3 pixels.
LEVELS = np.array([0.0, 0.5, 1.0], np.float32)[:, None, None, None]
IMAGES = np.broadcast_to(LEVELS, (3, 2, 3, 1))
LABELS = np.array([7, 8, 9], np.int32)


draw = jax.jit(lambda k: moving_digits(k, IMAGES, LABELS, frames=9, size=6))


@pytest.fixture(scope="module")
def videos():
    return jax.device_get(draw(KEYS))


def test_a_digit_stays_whole_and_keeps_its_label(videos):
    video, label = videos["video"], videos["label"]
    assert video.shape == (256, 9, 6, 6, 1) and label.dtype == np.int32
    shown = video > -1
    assert (shown.sum((2, 3, 4)) == 6).all()
    for one, mask, number in zip(video, shown, label):
        assert (one[mask] == LEVELS[number - 7]).all()
        assert (mask.any(2).sum(1) == 2).all() and (mask.any(1).sum(1) == 3).all()
    assert set(label) == {7, 8, 9}


def bouncing(place, speed, room):
    """Nine places of a walk: one pixel at a time, turning at the walls."""
    sign, walk = np.sign(speed), [place]
    for _ in range(8):
        for _ in range(abs(speed)):
            if not 0 <= place + sign <= room:
                sign = -sign
            place += sign
        walk.append(place)
    return walk


def test_a_digit_bounces_at_constant_speed(videos):
    shown = videos["video"][..., 0] > -1
    rows, columns = shown.any(3).argmax(2), shown.any(2).argmax(2)
    velocities = set()
    for track, room in ((rows, 4), (columns, 3)):
        assert track.min() == 0 and track.max() == room
        for places in track.tolist():
            walks = [bouncing(places[0], speed, room) for speed in range(-2, 3)]
            velocities.add(walks.index(places) - 2)  # there is one
    assert velocities == {-2, -1, 0, 1, 2}
    moves = (np.diff(rows) != 0).any(1) | (np.diff(columns) != 0).any(1)
    assert moves.all()


def test_a_sample_depends_on_its_key_alone(videos):
    others = sample_keys(jax.random.key(2), 256)
    moved = draw(others.at[:2].set(KEYS[9:11]))
    np.testing.assert_array_equal(moved["video"][:2], videos["video"][9:11])


def test_the_source_shows_the_digits_of_its_split():
    pytest.importorskip("sklearn")
    data = load("moving_digits", train_count=12, test_count=6, frames=3, size=10)
    assert data.train["video"].shape == (12, 3, 10, 10, 1)
    assert data.num_classes == 10 and data.meta["digits"] == "digits"
    digits = load("digits")
    for arrays, known in ((data.train, digits.train), (data.test, digits.test)):
        for video, label in zip(arrays["video"], arrays["label"]):
            images = known["image"][known["label"] == label][..., 0]
            windows = sliding_window_view(video[0, ..., 0], (8, 8)).reshape(-1, 1, 8, 8)
            assert (windows == images).all((2, 3)).any()


def test_bad_input(refused):
    size = r"size=3 is outside \(3, inf\]"
    refused(size, moving_digits, KEYS, IMAGES, LABELS, size=3)
    refused("labels has shape", moving_digits, KEYS, IMAGES, LABELS[:2])
    frames = {"frames": 1.5, "error": TypeError}
    refused("frames=1.5", moving_digits, KEYS, IMAGES, LABELS, **frames)
    refused("unknown data source 'digit'", load, "moving_digits", digits="digit")
