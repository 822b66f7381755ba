import functools
import itertools

import jax
import numpy as np
import pytest
from scipy import ndimage

from tmdjax.core.prng import sample_keys
from tmdjax.data import captioned_shapes, captions, load
from tmdjax.data.captioned_shapes import TAGS, capacity, prompts
from tmdjax.rewards import shapes

COUNT = 384
sample_specs = jax.jit(captioned_shapes.sample_specs, static_argnames=("tags", "size"))
check = jax.jit(shapes.check)
is_held_out = jax.jit(captioned_shapes.is_held_out)
render = jax.jit(captioned_shapes.render, static_argnums=(2, 3))


def keys_of(seed):
    return sample_keys(jax.random.key(seed), COUNT)


@functools.cache
def sampled(size=32):
    return jax.device_get(sample_specs(keys_of(0), tags=TAGS, size=size))


@functools.cache
def drawn(size=32):
    return np.asarray(render(keys_of(1), sampled(size), size))


def batch_of(*rows, relation=0):
    """Specs of one to three (count, colour, shape) each."""
    rows = [[*row] + [(0, -1, -1)] * (3 - len(row)) for row in rows]
    count, colour, shape = np.array(rows, np.int32).transpose(2, 0, 1)
    relation = np.full(len(rows), relation, np.int32)
    return {"count": count, "colour": colour, "shape": shape, "relation": relation}


def rows(specs, *names):
    return {
        tuple(np.ravel([specs[n][i] for n in names])) for i in range(len(specs["tag"]))
    }


# ---- specs ----


@pytest.mark.parametrize("size", [16, 32])
def test_specs_are_valid_and_fit(size):
    specs = sampled(size)
    assert shapes.check_specs(specs) == COUNT
    assert all(array.dtype == np.int32 for array in specs.values())
    assert specs["count"].sum(1).max() <= capacity(size)
    assert set(np.unique(specs["tag"])) == set(range(len(TAGS)))
    unused = specs["count"] == 0
    assert (specs["colour"][unused] == -1).all() and (
        specs["shape"][unused] == -1
    ).all()


def test_capacity():
    sizes = (16, 31, 32, 42, 43, 100)
    assert [capacity(size) for size in sizes] == [4, 4, 9, 9, 12, 12]


@pytest.mark.parametrize("tag", TAGS)
def test_each_tag_asks_for_what_it_says(tag):
    specs = sampled()
    mine = {k: v[specs["tag"] == TAGS.index(tag)] for k, v in specs.items()}
    used = mine["count"] > 0
    clauses, named = used.sum(1), ((mine["colour"] >= 0) & used).sum(1)
    lone = (mine["count"] <= 1).all(1)
    related = mine["relation"] > 0
    expected = {
        "single": (clauses == 1) & lone & (named == 0) & ~related,
        "two": (clauses == 2) & lone & (named == 0) & ~related,
        "counting": (clauses == 1) & ~lone & (named == 0) & ~related,
        "colours": (clauses == 1) & lone & (named == 1) & ~related,
        "position": (clauses == 2) & lone & (named == 2) & related,
        "attribution": (clauses == 2) & lone & (named == 2) & ~related
        & (mine["colour"][:, 0] != mine["colour"][:, 1]),
        "mixed": clauses >= 1,
    }  # fmt: skip
    assert len(clauses) > 20
    assert expected[tag].all()
    for other, holds in expected.items():  # no spec is of two tags
        assert other in (tag, "mixed") or not holds.any()


def test_small_tags_have_all_their_specs():
    specs = jax.device_get(
        sample_specs(
            sample_keys(jax.random.key(2), 2048),
            tags=("single", "two", "counting", "colours"),
            size=16,
        )
    )
    for tag, number in enumerate((4, 12, 12, 24)):
        mine = {k: v[specs["tag"] == tag] for k, v in specs.items()}
        assert len(rows(mine, "count", "colour", "shape")) == number


def test_specs_depend_on_their_key_alone():
    moved = keys_of(8).at[:3].set(keys_of(0)[100:103])
    for name, array in jax.device_get(sample_specs(moved, tags=TAGS, size=32)).items():
        np.testing.assert_array_equal(array[:3], sampled()[name][100:103])


# ---- images ----


@pytest.mark.parametrize("size", [16, 32, 45])
def test_everything_is_placed_and_nothing_touches(size):
    """Counted by scipy over all pixels that are not grey, whatever their colour."""
    specs, images = sampled(size), drawn(size)
    assert images.shape == (COUNT, size, size, 3) and images.dtype == np.float32
    assert set(np.unique(images)) == {-1.0, 0.0, 1.0}
    for image, wanted in zip(images, specs["count"].sum(1), strict=True):
        label, number = ndimage.label((image != 0).any(-1), np.ones((3, 3)))
        assert number == wanted
        for i, (y, x) in enumerate(ndimage.find_objects(label), 1):
            assert y.stop - y.start == x.stop - x.start >= 5  # whole shapes are square
            assert len(np.unique(image[label == i], axis=0)) == 1


@pytest.mark.parametrize("size", [16, 32])
def test_relations_hold_strictly(size):
    """Of the extreme pixels too: the objects stand in strips of their own."""
    relations = np.arange(COUNT, dtype=np.int32) % 4 + 1
    specs = batch_of(*[[(1, 0, 0), (1, 2, 1)]] * COUNT) | {"relation": relations}
    images = np.asarray(render(keys_of(3), specs, size))
    for image, relation in zip(images, relations):
        first = np.argwhere(image[..., 0] == 1)  # red
        second = np.argwhere(image[..., 2] == 1)  # blue
        axis = 1 if relation < 3 else 0
        first, second = first[:, axis], second[:, axis]
        if relation in (1, 3):
            assert first.max() + 1 < second.min()
        else:
            assert second.max() + 1 < first.min()


def test_objects_reach_every_part_of_the_image():
    """Lone objects cover all pixels; two cover them with either of both."""
    for row in ([(1, 0, 0)], [(1, 0, 0), (1, 2, 0)]):
        images = np.asarray(render(keys_of(4), batch_of(*[row] * COUNT), 16))
        for channel in (0, 2)[: len(row)]:
            assert (images[..., channel] == 1).any(0).all()


def test_colours_and_sizes_not_asked_for_vary():
    images = render(keys_of(5), batch_of(*[[(1, -1, 0)]] * COUNT), 32)
    objects = jax.device_get(jax.jit(shapes.find_objects)(images))
    there = objects["exists"]
    assert np.bincount(objects["colour"][there], minlength=6).min() > 20
    assert set(objects["height"][there]) == {5, 7, 9}


def test_images_depend_on_their_key_alone():
    """And on their spec: two among others bring the images that they had."""
    keys = keys_of(8).at[:2].set(keys_of(1)[7:9])
    specs = {k: np.concatenate([v[7:9], v[2:][::-1]]) for k, v in sampled().items()}
    np.testing.assert_array_equal(render(keys, specs, 32)[:2], drawn()[7:9])


def test_shapes_can_be_told_apart_at_the_smallest_size():
    """Under noise that paints about one pixel in twenty wrongly."""
    shape = np.arange(COUNT) % 4
    specs = batch_of(*[[(1, 0, s)] for s in shape])
    images = np.asarray(render(keys_of(6), specs, 16))
    noisy = images + 0.4 * np.random.default_rng(7).standard_normal(images.shape)
    count = np.asarray(check(np.float32(noisy), specs)["count"])[:, 0]
    accuracy = np.array([np.mean(count[shape == s] == 1) for s in range(4)])
    assert accuracy.min() > 0.85, accuracy


@pytest.mark.parametrize("size", [16, 32])
def test_cells_give_few_images_that_are_right(size):
    images = np.asarray(render(keys_of(0), sampled(size), size, "cells"))
    assert np.all(check(images, sampled(size))["strict"])
    one = batch_of(*[[(1, 0, 0)]] * COUNT)
    assert len(np.unique(render(keys_of(0), one, size, "cells"), axis=0)) <= 24
    with pytest.raises(ValueError, match="Did you mean 'cells'"):
        captioned_shapes.render(keys_of(0), one, size, "cell")


# ---- split ----


def test_held_out_share_and_small_tags():
    specs = sampled()
    held = np.asarray(is_held_out(specs))
    assert 0.1 < held.mean() < 0.25
    assert not held[specs["tag"] == TAGS.index("single")].any()
    colours = batch_of(*[[(1, c, s)] for c in range(6) for s in range(4)])
    by_colour = np.asarray(is_held_out(colours)).reshape(6, 4)
    assert by_colour.sum() == 5
    assert by_colour.sum(1).max() == 1 and by_colour.sum(0).max() <= 2
    counting = batch_of(*[[(n, -1, s)] for n in (2, 3, 4) for s in range(4)])
    by_count = np.asarray(is_held_out(counting)).reshape(3, 4)
    assert by_count.sum() == 3
    assert by_count.sum(1).max() == by_count.sum(0).max() == 1
    pairs = batch_of(
        *[[(1, -1, a), (1, -1, b)] for a, b in itertools.permutations(range(4), 2)]
    )
    assert np.asarray(is_held_out(pairs)).sum() == 2


@pytest.mark.parametrize("relation, mirrored", [(0, 0), (1, 2), (3, 4)])
def test_the_same_meaning_is_on_one_side_of_the_split(relation, mirrored):
    both = [(1, c, s) for c in range(6) for s in range(4)]
    pairs = [[a, b] for a, b in itertools.combinations(both, 2)]
    ours = np.asarray(is_held_out(batch_of(*pairs, relation=relation)))
    swapped = batch_of(*[pair[::-1] for pair in pairs], relation=mirrored)
    np.testing.assert_array_equal(ours, is_held_out(swapped))
    if relation:  # "A left of B" is another composition than "B left of A"
        other = batch_of(*[pair[::-1] for pair in pairs], relation=relation)
        assert (ours != np.asarray(is_held_out(other))).any()


def test_prompts_are_distinct_and_split():
    train = prompts(19, tags=("colours",), size=16)
    assert len(rows(train, "count", "colour", "shape")) == 19
    assert not np.asarray(is_held_out(train)).any()
    held = prompts(5, tags=("colours",), size=16, held_out=True)
    assert np.asarray(is_held_out(held)).all()
    assert not rows(train, "colour", "shape") & rows(held, "colour", "shape")
    shorter = prompts(6, tags=("colours",), size=16)
    for name, array in shorter.items():
        np.testing.assert_array_equal(array, train[name][:6])


def test_prompts_exclude_others_of_the_same_meaning():
    taken = prompts(4, tags=("two",), size=16)
    mirrored = {
        k: np.concatenate([v[:, 1::-1], v[:, 2:]], 1) if v.ndim == 2 else v
        for k, v in taken.items()
    }
    left = prompts(1, tags=("two",), size=16, exclude=mirrored)
    assert not rows(left, "shape") & (rows(taken, "shape") | rows(mirrored, "shape"))
    with pytest.raises(ValueError, match="only 1 training specs of the tags two that"):
        prompts(2, tags=("two",), size=16, exclude=mirrored)


def test_prompts_that_do_not_exist():
    with pytest.raises(ValueError, match="count=20, but there are only 19 training"):
        prompts(20, tags=("colours",), size=16)
    with pytest.raises(ValueError, match="only 0 held-out specs of the tags single"):
        prompts(1, tags=("single",), size=16, held_out=True)


# ---- source ----


@pytest.fixture(scope="module")
def source():
    return load("captioned_shapes", train_count=300, test_count=40)


def test_source_arrays(source):
    for split, count in ((source.train, 300), (source.test, 40)):
        assert {k: (v.shape[1:], v.dtype.name) for k, v in split.items()} == {
            "image": ((16, 16, 3), "float32"),
            "label": ((), "int32"),
            "count": ((3,), "int32"),
            "colour": ((3,), "int32"),
            "shape": ((3,), "int32"),
            "relation": ((), "int32"),
            "tag": ((), "int32"),
            "ids": ((24,), "int32"),
            "mask": ((24,), "bool"),
        }
        assert len(split["image"]) == count
        np.testing.assert_array_equal(split["label"], split["tag"])
        assert {TAGS[t] for t in split["tag"]} == {"colours", "position"}
        assert np.asarray(check(split["image"], split)["strict"]).all()
    assert source.num_classes == len(TAGS)
    assert not np.asarray(is_held_out(source.train)).any()
    assert np.asarray(is_held_out(source.test)).all()


def test_source_captions_say_the_specs(source):
    """Test captions are canonical; training captions come from all wordings."""
    for split in (source.train, source.test):
        texts = captions.detokenise(split["ids"], split["mask"])
        for i, text in enumerate(texts):
            for name, value in captions.parse(text).items():
                np.testing.assert_array_equal(value, split[name][i])
    assert all(text.startswith("a photo of") for text in texts)
    train = captions.detokenise(source.train["ids"], source.train["mask"])
    canonical = np.mean([text.startswith("a photo of") for text in train])
    assert 0.2 < canonical < 0.5


def test_a_larger_source_extends_a_smaller(source):
    small = load("captioned_shapes", train_count=20, test_count=3)
    for name, array in small.train.items():
        np.testing.assert_array_equal(array, source.train[name][:20])
    for name, array in small.test.items():
        np.testing.assert_array_equal(array, source.test[name][:3])


def test_source_options():
    data = load("captioned_shapes", train_count=8, test_count=8, tags=("single",),
                wordings=("W2",), length=30, seed=3)  # fmt: skip
    assert data.train["ids"].shape == (8, 30)
    assert (data.test["tag"] == 0).all()
    assert (data.train["image"] != data.test["image"]).any()


KEYS = sample_keys(jax.random.key(0), 2)
SPECS = batch_of([(1, 0, 0)], [(4, -1, 1), (1, 0, 0)])
RAW = np.zeros((2, 2), np.uint32)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: captioned_shapes.sample_specs(RAW, size=16), TypeError, "typed key"),
        (lambda: captioned_shapes.render(RAW, SPECS, 32), TypeError, "typed key"),
        (
            lambda: captioned_shapes.sample_specs(KEYS, size=15),
            ValueError,
            r"size=15 is outside \[16",
        ),
        (
            lambda: captioned_shapes.render(KEYS, SPECS, 15),
            ValueError,
            r"size=15 is outside \[16",
        ),
        (
            lambda: captioned_shapes.render(KEYS, SPECS, 16),
            ValueError,
            "spec 1 asks for 5 objects; .* 16 hold 4",
        ),
        (
            lambda: captioned_shapes.render(KEYS[:1], SPECS, 32),
            ValueError,
            "keys has shape .* the batch, 2",
        ),
        (lambda: prompts(0, size=16), ValueError, "count=0 must be at least 1"),
    ],
)
def test_bad_input(call, error, message, as_shipped):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": 15}, r"size=15 is outside \[16"),
        ({"wordings": ("W0", "W3")}, "wording='W3' is not one of 'W0'"),
        ({"train_count": 0}, "train_count=0"),
        (
            {"train_count": 2, "test_count": 2, "length": 3},
            "words but length=3: .* Raise the length",
        ),
    ],
)
def test_bad_options_of_the_source(options, message, as_shipped):
    with pytest.raises(ValueError, match=message):
        load("captioned_shapes", **options)


@pytest.mark.parametrize(
    "tags, message",
    [
        (("colour",), "tag='colour' is not one of .* Did you mean 'colours'"),
        ((), "tags is empty"),
        ("colours", "is one text; give a sequence"),
    ],
)
def test_bad_tags(tags, message, as_shipped):
    for call in (
        lambda: captioned_shapes.sample_specs(KEYS, tags=tags, size=16),
        lambda: prompts(1, tags=tags, size=16),
        lambda: load("captioned_shapes", tags=tags),
    ):
        with pytest.raises(ValueError, match=message):
            call()
