"""Digits on a torus; numbers are those of the sheet's invariants."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tmdjax.core import prng
from tmdjax.data import load
from tmdjax.domains.torus.videos import (
    TorusWorld,
    check_covered,
    out_of_view,
    torus_videos,
)

WORLD = TorusWorld(world=12, window=8, digits=2, camera_step=2, context=9, predicted=3)
KEYS = prng.sample_keys(jax.random.key(0), 64)


@functools.cache
def digits():
    return load("digits")


def images_of(split):
    arrays = getattr(digits(), split)
    return (arrays["image"] + 1) / 2, arrays["label"]


draw = jax.jit(torus_videos, static_argnames=("world", "classes"))


@functools.cache
def sampled():
    return jax.device_get(draw(KEYS, *images_of("train"), world=WORLD))


def drawn(sample, i, t, images, world):
    """The window of video i in frame t, by rolls of the whole world."""
    canvas = np.zeros((world.world,) * 2, np.float32)
    for digit, start, velocity in zip(
        *(sample[k][i] for k in ("image", "start", "velocity"))
    ):
        whole = np.zeros_like(canvas)
        whole[: images.shape[1], : images.shape[2]] = images[digit, ..., 0]
        x, y = start + t * velocity
        canvas += np.roll(whole, (y, x), (0, 1))
    x, y = sample["actions"][i, : t + 1].sum(0)
    half = world.window // 2
    canvas = np.roll(canvas.clip(0, 1), (half - y, half - x), (0, 1))
    return canvas[: world.window, : world.window]


def test_18_frames_are_those_of_the_state():
    sample, images = sampled(), images_of("train")[0]
    frames = sample["frames"]
    assert frames.shape == (64, 12, 8, 8, 1) and frames.dtype == np.float32
    assert frames.min() == 0 and frames.max() == 1
    for i in range(8):
        for t in range(WORLD.frames):
            np.testing.assert_array_equal(
                frames[i, t, ..., 0], drawn(sample, i, t, images, WORLD)
            )


def test_18_a_key_is_a_video_whatever_its_batch():
    again = jax.device_get(draw(KEYS[::-1], *images_of("train"), world=WORLD))
    for name, array in sampled().items():
        np.testing.assert_array_equal(again[name][::-1], array)


def test_images_may_be_constants_of_a_program():
    images, labels = map(jax.numpy.asarray, images_of("test"))
    made = jax.eval_shape(lambda k: torus_videos(k, images, labels, world=WORLD), KEYS)
    assert made["frames"].shape == (64, 12, 8, 8, 1)


def test_18_every_context_shows_the_whole_world():
    sample = sampled()
    assert sample["covered"].all()
    check_covered(sample["covered"], WORLD)
    places = np.cumsum(sample["actions"], 1)
    for walk in places[:, : WORLD.context]:
        seen = np.zeros((12, 12), bool)
        for x, y in walk - 4:
            seen[np.ix_((y + np.arange(8)) % 12, (x + np.arange(8)) % 12)] = True
        assert seen.all()
    assert np.abs(sample["actions"]).max() == WORLD.camera_step
    assert not sample["actions"][:, [0, WORLD.context]].any()


def test_what_was_out_of_view_is_followed():
    """Squares of 2 pixels, one a video: columns and rows of the window are world + 4."""
    world = dataclasses.replace(WORLD, digits=1, camera_step=0, context=2, predicted=4)
    # at rest in view; entering from the right; half in view; one that a motion shows
    last, velocity = (
        np.array(xy)
        for xy in ([(0, 0), (5, 1), (3, 0), (5, 0)], [(0, 0), (-1, 0), (0, 1), (0, 0)])
    )
    actions = np.zeros((4, 6, 2), np.int32)
    actions[3, 4] = (2, 0)
    videos = {"start": last - velocity, "velocity": velocity, "actions": actions}
    videos = {
        n: a if n == "actions" else np.int32(a)[:, None] for n, a in videos.items()
    }
    found = np.asarray(
        jax.jit(functools.partial(out_of_view, side=2, world=world))(videos)
    )
    assert found.shape == (4, 4, 8, 8) and not found[0].any()
    pixels = [
        [{(int(r), int(c)) for r, c in np.argwhere(f)} for f in video]
        for video in found
    ]
    assert pixels[1][0] == set() and pixels[1][1] == {(5, 7), (6, 7)}
    assert pixels[1][2] == {(5, 6), (6, 6), (5, 7), (6, 7)}
    assert pixels[1][3] == {(5, 5), (6, 5), (5, 6), (6, 6)}
    # columns 3 and 4 of the world: the window ends with 3, so that 4 is never shown
    assert all(one == set() for one in pixels[2])
    assert pixels[3][1] == set() and pixels[3][2] == {(4, 7), (5, 7)} == pixels[3][3]


def test_what_is_drawn_is_uniform():
    sample, labels = sampled(), images_of("train")[1]
    assert {*sample["velocity"].ravel()} == {-1, 0, 1}
    assert {*sample["start"].ravel()} == {*range(12)}
    assert {*labels[sample["image"]].ravel()} == {*range(10)}
    # independent along the axes, and of each other
    assert abs(np.corrcoef(sample["velocity"].reshape(64, -1).T)[0, 1:]).max() < 0.4


@pytest.mark.slow
def test_18_static_worlds_and_distinct_labels():
    still = TorusWorld(
        world=12, window=10, digits=4, camera_step=0, speed=0, context=2, predicted=2
    )
    still = dataclasses.replace(still, distinct=True)
    images, labels = images_of("test")
    sample = jax.device_get(draw(KEYS, images, labels, world=still))
    assert (sample["frames"] == sample["frames"][:, :1]).all()
    assert not sample["covered"].any()
    check_covered(sample["covered"], still)  # it was not asked to see all
    assert all(len({*row}) == 4 for row in labels[sample["image"]])


def test_18_no_image_is_in_both_splits():
    train, test = ({i.tobytes() for i in images_of(s)[0]} for s in ("train", "test"))
    assert not train & test


def test_bad_inputs(refused):
    images, labels = images_of("test")
    bad = functools.partial(torus_videos, KEYS, world=WORLD)
    refused("window=13 is larger than world=12", TorusWorld, world=12, window=13)
    refused("context=0 must be", TorusWorld, context=0)
    refused("camera_step=1.0 is of type", TorusWorld, camera_step=1.0, error=TypeError)
    refused("raise camera_step or context", TorusWorld, camera_step=1, context=5)
    refused(r"lie in \[-1.0, 1.0\].*\(image \+ 1\) / 2", bad, 2 * images - 1, labels)
    refused("do not fit into world=12", bad, np.ones((1, 14, 14, 1)), labels[:1])
    refused("grey squares", bad, images[..., 0], labels)
    refused("its leading axis must be the batch", bad, images, labels[1:])
    refused("labels are float", bad, images, labels * 1.0, error=TypeError)
    refused("each of 0 .. 9 must be", bad, images, labels.clip(1))
    refused("each of 0 .. 8 must be", bad, images, labels, classes=9)
    many = dataclasses.replace(WORLD, digits=11, distinct=True)
    refused("digits=11 cannot have distinct", bad, images, labels, world=many)
    refused(
        "typed key",
        torus_videos,
        np.zeros((2, 2)),
        images,
        labels,
        world=WORLD,
        error=TypeError,
    )
    refused(r"side=13 is outside \[1, 12\]", out_of_view, {}, 13, world=WORLD)
    short = dataclasses.replace(WORLD, context=4)
    refused(
        "1 of 2 contexts of 4 frames, the first number 1",
        check_covered,
        [True, False],
        short,
    )
