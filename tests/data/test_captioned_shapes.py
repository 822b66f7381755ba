import functools
import itertools

import jax
import numpy as np
import pytest
from scipy import ndimage

from tmdjax.core.prng import sample_keys
from tmdjax.data import captioned_shapes, load
from tmdjax.data.images.captioned_shapes import prompts
from tmdjax.domains.shapes import captions, drawing
from tmdjax.domains.shapes import checks as shapes
from tmdjax.domains.shapes.specs import TAGS

COUNT = 384
sample_specs = jax.jit(drawing.sample_specs, static_argnames=("tags", "size"))
check = jax.jit(shapes.check)
is_held_out = jax.jit(captioned_shapes.is_held_out)
render = jax.jit(drawing.render, static_argnums=(2, 3))


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


@pytest.mark.parametrize("size", [16, 32])
def test_specs_are_valid_and_fit(size):
    specs = sampled(size)
    assert shapes.check_specs(specs) == COUNT
    assert all(array.dtype == np.int32 for array in specs.values())
    sizes = (16, 31, 32, 42, 43, 100)
    assert [drawing.capacity(size) for size in sizes] == [4, 4, 9, 9, 12, 12]
    assert specs["count"].sum(1).max() <= drawing.capacity(size)
    assert set(np.unique(specs["tag"])) == set(range(len(TAGS)))
    unused = specs["count"] == 0
    for name in ("colour", "shape"):
        assert (specs[name][unused] == -1).all()


def test_each_tag_asks_for_what_it_says():
    specs = sampled()
    used = specs["count"] > 0
    clauses, named = used.sum(1), ((specs["colour"] >= 0) & used).sum(1)
    lone = (specs["count"] <= 1).all(1)
    related = specs["relation"] > 0
    expected = {
        "single": (clauses == 1) & lone & (named == 0) & ~related,
        "two": (clauses == 2) & lone & (named == 0) & ~related,
        "counting": (clauses == 1) & ~lone & (named == 0) & ~related,
        "colours": (clauses == 1) & lone & (named == 1) & ~related,
        "position": (clauses == 2) & lone & (named == 2) & related,
        "attribution": (clauses == 2) & lone & (named == 2) & ~related
        & (specs["colour"][:, 0] != specs["colour"][:, 1]),
        "mixed": clauses >= 1,
    }  # fmt: skip
    assert np.bincount(specs["tag"]).min() > 20
    for number, tag in enumerate(TAGS):
        mine = specs["tag"] == number
        assert expected[tag][mine].all(), tag
        if tag != "mixed":  # no spec is of two tags
            assert not expected[tag][~mine].any(), tag


def test_small_tags_have_all_their_specs():
    keys, tags = sample_keys(jax.random.key(2), 2048), TAGS[:4]
    assert tags == ("single", "two", "counting", "colours")
    specs = jax.device_get(sample_specs(keys, tags=tags, size=16))
    for tag, number in enumerate((4, 12, 12, 24)):
        mine = {k: v[specs["tag"] == tag] for k, v in specs.items()}
        assert len(rows(mine, "count", "colour", "shape")) == number


def test_specs_depend_on_their_key_alone():
    moved = keys_of(8).at[:3].set(keys_of(0)[100:103])
    for name, array in jax.device_get(sample_specs(moved, tags=TAGS, size=32)).items():
        np.testing.assert_array_equal(array[:3], sampled()[name][100:103])


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
        axis = 1 if relation < 3 else 0
        red, blue = (np.argwhere(image[..., c] == 1)[:, axis] for c in (0, 2))
        first, second = (red, blue) if relation in (1, 3) else (blue, red)
        assert first.max() + 1 < second.min()


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


def test_held_out_share_and_small_tags():
    specs = sampled()
    held = np.asarray(is_held_out(specs))
    assert 0.1 < held.mean() < 0.25
    assert not held[specs["tag"] == TAGS.index("single")].any()

    def of(*rows):
        return np.asarray(is_held_out(batch_of(*rows)))

    by_colour = of(*[[(1, c, s)] for c in range(6) for s in range(4)]).reshape(6, 4)
    assert by_colour.sum() == 5
    assert by_colour.sum(1).max() == 1 and by_colour.sum(0).max() <= 2
    by_count = of(*[[(n, -1, s)] for n in (2, 3, 4) for s in range(4)]).reshape(3, 4)
    assert by_count.sum() == 3
    assert by_count.sum(1).max() == by_count.sum(0).max() == 1
    pairs = itertools.permutations(range(4), 2)
    assert of(*[[(1, -1, a), (1, -1, b)] for a, b in pairs]).sum() == 2


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


def test_prompts_of_one_meaning_are_taken_once(refused):
    """Of 12 ordered pairs of shapes there are 6, one of them held out."""
    pairs = prompts(5, tags=("two",), size=16)["shape"][:, :2]
    assert len({tuple(sorted(pair)) for pair in pairs.tolist()}) == 5
    refused(
        "only 5 training specs of the tags two;", prompts, 6, tags=("two",), size=16
    )


@pytest.fixture(scope="module")
def source():
    return load("captioned_shapes", train_count=300, test_count=40)


def test_source_arrays(source):
    for split, count in ((source.train, 300), (source.test, 40)):
        types = {k: (v.shape, v.dtype.name) for k, v in split.items()}
        assert types == {
            "image": ((count, 16, 16, 3), "float32"),
            **dict.fromkeys(("label", "relation", "tag"), ((count,), "int32")),
            **dict.fromkeys(("count", "colour", "shape"), ((count, 3), "int32")),
            "ids": ((count, 24), "int32"),
            "mask": ((count, 24), "bool"),
        }
        np.testing.assert_array_equal(split["label"], split["tag"])
        assert {TAGS[t] for t in split["tag"]} == {"colours", "position"}
        assert np.asarray(check(split["image"], split)["strict"]).all()
    assert source.num_classes == len(TAGS)
    assert not np.asarray(is_held_out(source.train)).any()
    assert np.asarray(is_held_out(source.test)).all()


def test_source_captions_say_the_specs(source):
    """Test captions are canonical; training captions come from all wordings."""
    canonical = []
    for split in (source.train, source.test):
        texts = captions.detokenise(split["ids"], split["mask"])
        for i, text in enumerate(texts):
            for name, value in captions.parse(text).items():
                np.testing.assert_array_equal(value, split[name][i])
        canonical.append(np.mean([text.startswith("a photo of") for text in texts]))
    assert 0.2 < canonical[0] < 0.5 and canonical[1] == 1


def test_a_larger_source_extends_a_smaller(source):
    small = load("captioned_shapes", train_count=20, test_count=3)
    for name in source.train:
        np.testing.assert_array_equal(small.train[name], source.train[name][:20])
        np.testing.assert_array_equal(small.test[name], source.test[name][:3])


def test_source_options():
    data = load("captioned_shapes", train_count=8, test_count=8, tags=("single",),
                wordings=("W2",), length=30, seed=3)  # fmt: skip
    assert data.train["ids"].shape == (8, 30)
    assert (data.test["tag"] == 0).all()
    assert (data.train["image"] != data.test["image"]).any()


KEYS = sample_keys(jax.random.key(0), 2)
SPECS = batch_of([(1, 0, 0)], [(4, -1, 1), (1, 0, 0)])


def test_bad_input(refused):
    raw, size = np.zeros((2, 2), np.uint32), r"size=15 is outside \[16"
    sample, render = drawing.sample_specs, drawing.render
    refused("typed key", sample, raw, size=16, error=TypeError)
    refused("typed key", render, raw, SPECS, 32, error=TypeError)
    refused(size, sample, KEYS, size=15)
    refused(size, render, KEYS, SPECS, 15)
    refused("spec 1 asks for 5 objects; .* 16 hold 4", render, KEYS, SPECS, 16)
    refused("keys has shape .* the batch, 2", render, KEYS[:1], SPECS, 32)
    refused("Did you mean 'cells'", render, KEYS, SPECS, 32, "cell")
    refused("count=0 must be at least 1", prompts, 0, size=16)
    counts = "count=20, but there are only 19 training"
    refused(counts, prompts, 20, tags=("colours",), size=16)
    held_out = {"tags": ("single",), "size": 16, "held_out": True}
    refused("only 0 held-out specs of the tags single", prompts, 1, **held_out)


def test_bad_options_of_the_source(refused):
    few = {"train_count": 2, "test_count": 2, "length": 3}
    for message, options in (
        (r"size=15 is outside \[16", {"size": 15}),
        ("wording='W3' is not one of 'W0'", {"wordings": ("W0", "W3")}),
        ("train_count=0", {"train_count": 0}),
        ("words but length=3: .* Raise the length", few),
    ):
        refused(message, load, "captioned_shapes", **options)


def test_bad_tags(refused):
    for tags, message in (
        (("colour",), "tag='colour' is not one of .* Did you mean 'colours'"),
        ((), "tags is empty"),
        ("colours", "is one text; give a sequence"),
    ):
        refused(message, drawing.sample_specs, KEYS, tags=tags, size=16)
        refused(message, prompts, 1, tags=tags, size=16)
        refused(message, load, "captioned_shapes", tags=tags)
