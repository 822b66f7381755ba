import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tmdjax.core.prng import sample_keys
from tmdjax.data import load, rendered_text
from tmdjax.rewards import ocr

KEYS = sample_keys(jax.random.key(0), 512)
LUMA = np.array([0.299, 0.587, 0.114])


@pytest.fixture(scope="module")
def data():
    return load("rendered_text", size=32, train_count=300, test_count=60, seed=3)


@pytest.fixture(scope="module")
def words():
    return rendered_text.sample_words(KEYS)


def ground_and_ink(image):
    """The plain ground of an image, and how far each pixel is from it."""
    ground = image[0, 0]
    return ground, np.abs(image - ground).sum(-1)


def offsets_and_contrast(image):
    """Of the pixels from the ground; and of the boldest one, its offset and its luma."""
    ground, ink = ground_and_ink(image)
    offsets = (image - ground).reshape(-1, 3)
    boldest = offsets[ink.argmax()]
    return offsets, boldest, abs(boldest @ LUMA)


def test_arrays_of_the_data_set(data):
    for split, count in ((data.train, 300), (data.test, 60)):
        assert split["image"].shape == (count, 32, 32, 3)
        assert split["image"].dtype == np.float32
        assert -1 <= split["image"].min() and split["image"].max() <= 1
        assert split["ids"].shape == split["mask"].shape == (count, 6)
        assert split["ids"].dtype == np.int32 and split["mask"].dtype == bool
        assert split["label"].dtype == np.int32
        lengths = [len(word) for word in rendered_text.decode(split["ids"])]
        np.testing.assert_array_equal(split["label"], np.array(lengths) - 3)
        np.testing.assert_array_equal(split["mask"].sum(1), lengths)
    assert data.num_classes == 4 and set(data.train["label"]) == {0, 1, 2, 3}
    assert data.meta["class_names"][0] == "3 letters" and data.meta["seed"] == 3


def test_held_out_words_are_never_in_train(data):
    is_held_out = rendered_text.is_held_out
    train, test = (set(rendered_text.decode(s["ids"])) for s in (data.train, data.test))
    assert len(train) > 250 and len(test) > 50
    assert not train & test
    assert not any(map(is_held_out, train)) and all(map(is_held_out, test))
    # Whatever the seed: a word's split is a property of the word.
    other = rendered_text.sample_words(sample_keys(jax.random.key(9), 200))
    assert not any(map(is_held_out, other))
    # One word in eight.
    every = ("".join(w) for w in itertools.product(rendered_text.LETTERS, repeat=3))
    held_out = sum(map(is_held_out, every))
    assert stats.binomtest(held_out, 26**3, 1 / 8).pvalue > 1e-3


def test_a_larger_count_extends_a_split(data):
    fewer = load("rendered_text", size=32, train_count=20, test_count=3, seed=3)
    for name in data.train:
        np.testing.assert_array_equal(data.train[name][:20], fewer.train[name])
        np.testing.assert_array_equal(data.test[name][:3], fewer.test[name])


def test_words_depend_on_their_key_and_are_equally_likely(words):
    assert rendered_text.sample_words(KEYS[100:103]) == words[100:103]
    assert rendered_text.sample_words(KEYS[101:102]) == words[101:102]
    assert len(set(words)) > 480
    lengths = np.bincount([len(word) for word in words], minlength=7)[3:]
    assert lengths.sum() == 512 and stats.chisquare(lengths).pvalue > 1e-3
    joined = "".join(words)
    letters = [joined.count(letter) for letter in rendered_text.LETTERS]
    assert sum(letters) == len(joined) and stats.chisquare(letters).pvalue > 1e-3


def test_ids_count_letters_from_one_and_decode(words):
    encoded = rendered_text.encode(["CAB", "AZALEA"])
    assert encoded["ids"].tolist() == [[3, 1, 2, 0, 0, 0], [1, 26, 1, 12, 5, 1]]
    assert encoded["mask"].tolist() == [[True] * 3 + [False] * 3, [True] * 6]
    ids = rendered_text.encode(words)["ids"]
    for given in (ids, jnp.asarray(ids)):
        assert rendered_text.decode(given) == words
    assert rendered_text.decode(np.zeros((1, 6), np.int32)) == [""]


def test_an_image_mixes_two_colours_of_enough_contrast(words):
    for image in rendered_text.render(words[:64], KEYS[:64], 32):
        offsets, boldest, contrast = offsets_and_contrast(image)
        direction = boldest / np.linalg.norm(boldest)
        off_line = offsets - np.outer(offsets @ direction, direction)
        assert np.abs(off_line).max() < 1e-5
        # Thin letters cover no pixel wholly at this size.
        assert contrast > 0.4
    images = rendered_text.render(["HIM"] * 64, KEYS[:64], 128)
    assert min(offsets_and_contrast(image)[2] for image in images) > 0.8 - 1e-5
    grounds = images[:, 0, 0]
    assert stats.kstest(grounds.ravel(), "uniform", (-1, 2)).pvalue > 1e-6


@pytest.mark.parametrize("size", [32, 45, 64])
def test_the_text_lies_inside_the_band(size, words):
    tall = ["QJQ", "JQJ", "OQO", *words[:50]]
    images = rendered_text.render(tall, KEYS[: len(tall)], size)
    outside = np.ones(size, bool)
    outside[ocr.text_band(size)] = False
    assert outside.sum() == 2 * (size // 4)
    for image in images:
        assert (image[outside] == image[0, 0]).all()
        assert (image != image[0, 0]).any()


@pytest.mark.parametrize("size", [32, 64])
def test_letters_are_centred_and_whole(size):
    # Each of these words is its own mirror image.
    mirrored = ["WWWWWW", "WWW", "MMMMMM", "HOH", "AVA", "IOOOOI"]
    places = np.arange(size) + 0.5
    images = rendered_text.render(mirrored, jnp.repeat(KEYS[:1], len(mirrored)), size)
    inks = [ground_and_ink(image)[1] for image in images]
    for ink in inks:
        centre = np.average(places, weights=ink.sum(0))
        assert centre == pytest.approx(size / 2, abs=0.6)
    # Twice as many letters of half the size cover half the area, if none is cut.
    assert inks[0].sum() == pytest.approx(inks[1].sum() / 2, rel=0.03)
    (image,) = rendered_text.render(["III"], KEYS[:1], size)
    rows = ground_and_ink(image)[1].sum(1)
    assert np.average(places, weights=rows) == pytest.approx(size / 2, abs=0.3)


def test_words_are_as_large_as_fits():
    spans = []
    for image in rendered_text.render(["WWWWWW", "III", "OOO"], KEYS[:3], 64):
        ink = ground_and_ink(image)[1] > 0
        spans.append([np.ptp(np.flatnonzero(ink.any(axis))) + 1 for axis in (0, 1)])
    (wide, low), (narrow, tall), (_, round_tall) = spans
    assert 58 <= wide <= 64 and low < 16  # width is the limit
    assert narrow < 40 and 20 <= tall <= 26  # font size is the limit
    assert 20 <= round_tall <= 26


def test_an_image_depends_on_its_word_and_key_alone(words):
    whole = rendered_text.render(words[:9], KEYS[:9], 32)
    part = rendered_text.render(words[4:6], KEYS[4:6], 32)
    np.testing.assert_array_equal(whole[4:6], part)
    other = rendered_text.render(["ABC"], KEYS[4:5], 32)
    np.testing.assert_array_equal(other[0, 0, 0], whole[4, 0, 0])
    assert len(np.unique(whole[:, 0, 0], axis=0)) == 9


def test_words_that_cannot_be_rendered(refused):
    for word, message in (
        ("LETTERS", "has 7 characters; give 3 to 6"),
        ("NO", "has 2 characters; give 3 to 6"),
        ("WORD5", "has other characters than the capital"),
        ("word", "has other characters"),
        ("TWO W", "has other characters"),
        ("ÄRGER", "has other characters"),
    ):
        message = rf"words\[1\]='{word}' {message}"
        refused(message, rendered_text.encode, ["GOOD", word])
        refused(message, rendered_text.render, ["GOOD", word], KEYS[:2])


def test_bad_input(refused):
    render, raw = rendered_text.render, np.zeros((2, 2), np.uint32)
    refused("words='WORD' is one string", rendered_text.encode, "WORD", error=TypeError)
    refused("size=31 must be at least 32", render, ["WORD"], KEYS[:1], 31)
    refused("size=16 must be at least 32", load, "rendered_text", size=16)
    refused("test_count=0 must be at least 1", load, "rendered_text", test_count=0)
    count = {"train_count": 1.5, "error": TypeError}
    refused(r"train_count=1\.5", load, "rendered_text", **count)
    refused(r"keys has shape \(2,\); give one key a word", render, ["WORD"], KEYS[:2])
    typed = "keys must be a typed key"
    refused(typed, rendered_text.sample_words, raw, error=TypeError)
    outside, ids = r"2 value\(s\) outside \[0, 26\].* is 27", [[1, 27, -1, 0, 0, 0]]
    refused(outside, rendered_text.decode, np.array(ids))
