import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tmdjax.core.prng import sample_keys
from tmdjax.data import load, moving_sprites
from tmdjax.domains.sprites import scenes as sprite_scenes
from tmdjax.domains.sprites.checks import check
from tmdjax.domains.sprites.drawing import bank
from tmdjax.domains.sprites.prompts import (
    prompt_factors,
    prompt_words,
    text_embedding,
)
from tmdjax.domains.sprites.scenes import SCALES

KEYS = sample_keys(jax.random.key(0), 512)

# Drawn by hand.
SPRITES = {
    ("square", 5): ["####."] * 4 + ["....."],
    ("plus", 5): ["..#..", "..#..", "#####", "..#..", "..#.."],
    ("ring", 5): ["#####", *["#...#"] * 3, "#####"],
    ("square", 6): ["#####."] * 5 + ["......"],
    ("plus", 6): ["..##.."] * 2 + ["######"] * 2 + ["..##.."] * 2,
    ("ring", 6): ["######", *["#....#"] * 4, "######"],
}
STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}


sample = jax.jit(moving_sprites.moving_sprites, static_argnames=("scale", "levels"))


@functools.cache
def sampled(scale):
    return jax.device_get(sample(KEYS, scale=scale))


def sprite(name, box):
    return np.array([[c == "#" for c in line] for line in SPRITES[name, box]])


def ground_of(video):
    return np.median(video, axis=(1, 2), keepdims=True)


def test_templates_are_those_drawn_by_hand():
    for box in (5, 6):
        for mask, name in zip(sprite_scenes.templates(box), sprite_scenes.SHAPES):
            np.testing.assert_array_equal(mask, sprite(name, box))


@pytest.mark.parametrize("scale", ["tiny", "small", "large"])
def test_arrays_of_a_batch(scale):
    samples, settings = sampled(scale), SCALES[scale]
    video, prompt = samples["video"], samples["prompt"]
    assert video.shape == (512, *settings.event_shape) and video.dtype == np.float32
    assert np.abs(video).max() == 1
    assert prompt.dtype == samples["start"].dtype == np.int32
    assert samples["start"].shape == (512, 2)
    assert 0 <= prompt.min() and prompt.max() < settings.num_prompts


def test_a_small_video_is_what_its_prompt_says_pixel_by_pixel():
    samples = sampled("small")
    for i in range(128):
        colour, shape, motion = prompt_words(int(samples["prompt"][i]), "small")
        video = samples["video"][i]
        ground = ground_of(video)
        assert (ground == ground.flat[0]).all() and abs(ground.flat[0]) <= 0.3
        expected = np.broadcast_to(ground, video.shape).copy()
        for frame in range(6):
            y, x = samples["start"][i] + frame * np.array(STEPS[motion])
            assert 0 <= y <= 7 and 0 <= x <= 7
            window = expected[frame, y : y + 5, x : x + 5]
            window[sprite(shape, 5)] = sprite_scenes.COLOURS[colour]
        np.testing.assert_array_equal(video, expected)


def test_a_large_video_is_what_its_prompt_says():
    samples = sampled("large")
    factors = prompt_factors(samples["prompt"], "large")
    colours, shapes = [*sprite_scenes.COLOURS.values()], sprite_scenes.SHAPES
    gaits = [*sprite_scenes.GAITS.values()]
    pairs = 0
    for i in range(256):
        video = samples["video"][i]
        value = {name: int(array[i]) for name, array in factors.items()}
        ground = ground_of(video)
        named = np.array([*sprite_scenes.GROUNDS.values()])[value["ground"]]
        assert np.ptp(ground - named) < 1e-6 and np.abs(ground - named).max() <= 0.1001
        # Where the first sprite is, by its colour.
        mask = (video == np.float32(colours[value["colour"]])).all(-1)
        y, x = samples["start"][i]
        template = sprite(shapes[value["shape"]], 6)
        np.testing.assert_array_equal(mask[0, y : y + 6, x : x + 6], template)
        assert (mask.sum((1, 2)) == template.sum()).all()
        rows, columns = mask.any(2).argmax(1), mask.any(1).argmax(1)
        step = np.diff(np.stack([rows, columns], 1), axis=0)
        direction = np.array([*STEPS.values()])[value["motion"]]
        speed, bounces = gaits[value["gait"]]
        np.testing.assert_array_equal(step[:4], np.tile(direction * speed, (4, 1)))
        along = step @ direction
        assert ((along < 0).sum() >= 3) if bounces else (along == speed).all()
        assert (step @ direction[::-1] == 0).all()
        # What is left is the second sprite, or ground.
        rest = (video != ground).any(-1) & ~mask
        if value["second_colour"] < 0:
            assert not rest.any()
            continue
        pairs += 1
        second = (video == np.float32(colours[value["second_colour"]])).all(-1)
        np.testing.assert_array_equal(rest, second)
        count = sprite(shapes[value["second_shape"]], 6).sum()
        assert (second.sum((1, 2)) == count).all()
        second_columns = second.any(1).argmax(1)
        assert (second_columns >= columns + 7).all()
        # They move as one.
        np.testing.assert_array_equal(np.diff(second_columns), np.diff(columns))
    assert pairs > 200


def test_prompts_and_starts_are_uniform():
    samples = sampled("small")
    assert stats.chisquare(np.bincount(samples["prompt"], minlength=48)).pvalue > 1e-3
    assert prompt_words(29, "small") == ("blue", "plus", "right")
    prompts = np.full(512, 29, np.int32)
    one = jax.device_get(sample(KEYS, scale="small", prompts=prompts))
    np.testing.assert_array_equal(one["prompt"], prompts)
    assert check(one["video"], prompts, "small")["all"].all()
    places = one["start"][:, 0] * 3 + one["start"][:, 1]
    assert places.min() == 0 and places.max() == 23
    assert stats.chisquare(np.bincount(places, minlength=24)).pvalue > 1e-3
    level = one["video"][:, 0, 0, 0, 0]
    assert stats.kstest(level / 0.6 + 0.5, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("scale", ["small", "large"])
def test_a_sample_depends_on_its_key_alone(scale):
    others = sample_keys(jax.random.key(1), 512)
    moved = sample(others.at[:3].set(KEYS[100:103]), scale=scale)
    for name, array in jax.device_get(moved).items():
        np.testing.assert_array_equal(array[:3], sampled(scale)[name][100:103])


def test_the_bank_holds_every_video_once():
    videos = bank("small")
    assert videos.shape == (48, 120, 6, 12, 12, 3) and videos.dtype == np.float32
    assert len({video.tobytes() for video in videos.reshape(5760, -1)}) == 5760
    samples = jax.device_get(sample(KEYS, scale="small", levels=5))
    levels = np.unique(np.median(samples["video"], axis=(1, 2, 3)))
    np.testing.assert_allclose(levels, [-0.3, -0.15, 0, 0.15, 0.3], atol=1e-7)
    for video, prompt in zip(samples["video"][:64], samples["prompt"]):
        assert (videos[prompt] == video).all((1, 2, 3, 4)).sum() == 1
    assert bank("tiny", levels=2).shape == (8, 4 * 2, 4, 6, 6, 3)


@pytest.mark.parametrize("scale, count", [("tiny", 8), ("small", 48), ("large", 5760)])
def test_prompts_factors_and_words_are_one_to_one(scale, count):
    assert SCALES[scale].num_prompts == count
    prompts = np.arange(count, dtype=np.int32)
    factors = prompt_factors(prompts, scale)
    jitted = jax.jit(prompt_factors, static_argnums=1)(prompts, scale)
    for name, array in factors.items():
        np.testing.assert_array_equal(jitted[name], array)
    assert len({*zip(*(array.tolist() for array in factors.values()))}) == count
    assert (factors["second_colour"] != factors["colour"]).all()
    words = [prompt_words(prompt, scale) for prompt in range(0, count, 7)]
    assert len({*words}) == len(words)
    assert {*map(len, words)} == {SCALES[scale].length}


def test_words_say_what_the_factors_say():
    names = ("colour", "shape", "motion", "gait", "ground")
    names += ("second_colour", "second_shape")
    factors = prompt_factors(np.arange(5760), "large")
    shown = np.all([factors[n] == v for n, v in zip(names, (0, 2, 3, 2, 1, 3, 0))], 0)
    assert prompt_words(int(np.flatnonzero(shown).item()), "large") == (
        "red", "ring", "down", "fast bouncing", "dark", "left of", "yellow", "square",
    )  # fmt: skip
    assert prompt_words(48, "small") == ("", "", "")
    assert prompt_words(0, "large")[5:] == ("alone", "-", "-")


def test_text_embeddings():
    text = np.asarray(text_embedding(np.arange(49), "small"))
    assert text.shape == (49, 3, 32) and text.dtype == np.float32
    jitted = jax.jit(lambda p: text_embedding(p, "small"))(jnp.array([3, 48]))
    np.testing.assert_array_equal(jitted, text[[3, 48]])
    null, text = text[48], text[:48]
    # 4 + 3 + 4 words, told apart, of unit variance.
    words = np.unique(text.reshape(-1, 32), axis=0)
    assert len(words) == 11
    assert 0.8 < words.std() < 1.2 and abs(words.mean()) < 0.2
    assert (null == null[0]).all()
    assert (np.abs(words - null[0]).max(1) > 0.5).all()
    colour = prompt_factors(np.arange(48), "small")["colour"]
    same = (text[:, None, 0] == text[None, :, 0]).all(-1)
    np.testing.assert_array_equal(same, colour[:, None] == colour[None])
    # Scales share words, and places tell them apart.
    again, large = np.asarray(text_embedding(np.array([0, 5759]), "large"))
    np.testing.assert_array_equal(again[:3], text[0])
    words = prompt_words(5759, "large")
    assert words[1] == words[7] == "ring"
    assert np.abs(large[1] - large[7]).max() > 0.5


def test_the_source():
    options = {"test_count": 5, "seed": 3, "scale": "tiny"}
    data, more = (load("moving_sprites", train_count=n, **options) for n in (20, 30))
    assert data.train["video"].shape == (20, 4, 6, 6, 3)
    assert data.test["prompt"].shape == (5,) and data.num_classes == 8
    np.testing.assert_array_equal(data.train["label"], data.train["prompt"])
    assert data.meta["scale"] == "tiny"
    np.testing.assert_array_equal(more.train["video"][:20], data.train["video"])


def test_a_scale_of_ones_own():
    scale = sprite_scenes.Scale(name="wide", frames=9, size=16, box=5, gaits=2)
    assert scale.num_prompts == 96 and scale.length == 4
    samples = jax.device_get(sample(KEYS[:32], scale=scale))
    assert check(samples["video"], samples["prompt"], scale)["all"].all()
    assert "slow bouncing" in prompt_words(95, scale)
    single = sprite_scenes.Scale(name="s", frames=4, size=9, box=4, colours=1)
    assert bank(single, levels=2).shape[:2] == (12, 3 * 6 * 2)


def test_scales_that_do_not_fit(refused):
    given = {"name": "mine", "frames": 6, "size": 12, "box": 5}
    frames = "5 wide that move 8 pixels in 9 frames need a size of 13"
    pairs = "14 wide that move 5 pixels in 6 frames need a size of 19"
    for message, options in (
        (r"colours=5 is outside \[1, 4\]", {"colours": 5}),
        (frames, {"frames": 9}),
        (pairs, {"pairs": True}),
        ("to bounce takes 9 frames and 4 pixels", {"gaits": 2}),
        (r"level=0.5 is outside \[0, 0.3\]", {"level": 0.5}),
    ):
        refused(message, sprite_scenes.Scale, **given | options)


def test_bad_input(refused):
    draw = moving_sprites.moving_sprites
    refused("scale='smal' is not one of", sampled, "smal")
    refused("levels=1 must be at least 2", draw, KEYS, scale="small", levels=1)
    outside = r"prompts\[1\] = 48 is outside \[0, 47\].*null prompt"
    refused(outside, draw, KEYS[:2], prompts=np.array([0, 48], np.int32))
    floats = {"prompts": np.zeros(2), "error": TypeError}
    refused("float64; give int32", draw, KEYS[:2], **floats)
    refused("typed key", draw, np.zeros((2, 2), np.uint32), error=TypeError)
    refused("5760 prompts .*'small'", bank, "large")
    refused(r"outside \[0, 48\]", text_embedding, np.array([49]))
