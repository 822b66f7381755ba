import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage, stats

from tmdjax import flows
from tmdjax.core.prng import sample_keys
from tmdjax.data import MIXTURE, load, procedural
from tmdjax.domains.shapes.specs import COLOURS

KEYS = sample_keys(jax.random.key(0), 512)
POINT_KEYS = sample_keys(jax.random.key(1), 20_000)
IMAGES = {
    "sprites": procedural.sprites,
    "sparse_sprites": procedural.sparse_sprites,
    "sparse_sprites of 16": functools.partial(procedural.sparse_sprites, size=16),
}
POINTS = {
    "two_moons": procedural.two_moons,
    "two_moons without noise": functools.partial(procedural.two_moons, noise=0.0),
    "mixture": procedural.mixture,
}


@jax.jit
def draw_images(keys):
    return {name: sampler(keys) for name, sampler in IMAGES.items()}


@jax.jit
def draw_points(keys):
    return {name: sampler(keys) for name, sampler in POINTS.items()}


@functools.cache
def samples():
    """A batch of every sampler, by its name."""
    return jax.device_get(draw_images(KEYS) | draw_points(POINT_KEYS))


# In units of the squared radius.
AREAS = {
    "disc": np.pi,
    "ring": np.pi * 0.75,
    "square": 2,
    "frame": 1.5,
    "diamond": 2,
    "triangle": 3 * np.sqrt(3) / 4,
    "cross": 4 * 0.6 - 0.36,
    "star": 10 * 0.5 * 0.381966 * np.sin(np.pi / 5),
}
ROOT = np.sqrt(0.5)
# Corners of each polygon in units of the radius, y downwards.
POLYGONS = {
    "square": [(-ROOT, -ROOT), (ROOT, -ROOT), (ROOT, ROOT), (-ROOT, ROOT)],
    "diamond": [(0, -1), (1, 0), (0, 1), (-1, 0)],
    "triangle": [(0, -1), (np.sqrt(0.75), 0.5), (-np.sqrt(0.75), 0.5)],
    "cross": [
        *[(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3)],
        *[(0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
    ],
    # A pentagram: joining every second tip leaves an inner radius of phi^-2.
    "star": [
        (radius * np.sin(k * np.pi / 5), -radius * np.cos(k * np.pi / 5))
        for k, radius in enumerate([1, 0.381966] * 5)
    ],
}


def drawn(shape, centre, radius, size, scale=16):
    """The shape painted by Pillow at high resolution, then averaged down."""
    canvas = Image.new("L", (size * scale, size * scale), 0)
    pen = ImageDraw.Draw(canvas)

    def place(points, of=1):
        points = centre + radius * of * np.array(points)
        return [tuple(point) for point in scale * points - 0.5]

    box = [(-1, -1), (1, 1)]
    if shape in POLYGONS:
        pen.polygon(place(POLYGONS[shape]), fill=255)
    elif shape == "frame":
        pen.polygon(place(POLYGONS["square"]), fill=255)
        pen.polygon(place(POLYGONS["square"], 0.5), fill=0)
    else:
        pen.ellipse(place(box), fill=255)
        if shape == "ring":
            pen.ellipse(place(box, 0.5), fill=0)
    fine = np.asarray(canvas, np.float64) / 255
    return fine.reshape(size, scale, size, scale).mean((1, 3))


@jax.jit
def masks(centre, radius):
    """Of every shape, in an image of 64 pixels."""
    labels = jnp.arange(len(procedural.SHAPES))
    return jax.vmap(lambda i: procedural.shape_mask(i, centre, radius, 64))(labels)


def test_masks_match_pillow_and_have_the_areas_of_the_shapes():
    centre, radius = np.array([13.3, 17.9]), 10.4
    for shape, mask in zip(procedural.SHAPES, np.asarray(masks(centre, radius))):
        error = np.abs(mask - drawn(shape, centre, radius, 64))
        # Distance and coverage differ by a fraction of an edge pixel, and at corners.
        assert error.max() < 0.45, shape
        assert error.mean() < 0.002, shape
    found = np.asarray(masks(np.array([32.0, 32.0]), 25.0)).sum((1, 2)) / 25.0**2
    expected = [AREAS[shape] for shape in procedural.SHAPES]
    np.testing.assert_allclose(found, expected, rtol=0.01)


@pytest.mark.parametrize("sampler", [draw_images, draw_points])
def test_samples_depend_on_their_key_alone(sampler):
    """A few keys among others and at other places bring the samples that they had."""
    own, count = (KEYS, 512) if sampler is draw_images else (POINT_KEYS, 20_000)
    others = sample_keys(jax.random.key(2), count)
    places = np.arange(count)
    moved = jax.device_get(sampler(jnp.where(places < 3, own[places - 7], others)))
    alone = jax.device_get(sampler(own[-7:-4]))  # in a batch of another size
    for name, found in moved.items():
        whole = samples()[name]
        for key, array in whole.items():
            for again in (found[key][:3], alone[name][key]):
                np.testing.assert_allclose(again, array[-7:-4], atol=1e-6)
        assert whole["label"].dtype == np.int32
        (data,) = whole.keys() - {"label"}
        assert whole[data].dtype == np.float32
        assert len(np.unique(whole[data][:256].reshape(256, -1), axis=0)) == 256, name


def test_labels_are_uniform():
    for name, number in {"sprites": 8, "sparse_sprites": 8, "two_moons": 2}.items():
        counts = np.bincount(samples()[name]["label"], minlength=number)
        assert len(counts) == number
        assert stats.chisquare(counts).pvalue > 1e-3, name


def test_sprites_range_and_contrast():
    image = samples()["sprites"]["image"]
    assert image.shape == (512, 32, 32, 3)
    assert image.min() >= -1 and image.max() <= 1
    # At most one corner can be touched by the shape: the median is the ground.
    corners = image[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    distance = np.abs(image - np.median(corners, axis=1)[:, None, None])
    assert distance.max((1, 2)).min() >= 0.5 - 1e-5
    covered = (distance.max(-1) > 1e-5).mean((1, 2))
    assert 0.02 < covered.min() and covered.max() < 0.5


def test_sparse_sprites_are_bright_on_a_flat_ground():
    for name, size in (("sparse_sprites", 32), ("sparse_sprites of 16", 16)):
        image = samples()[name]["image"]
        assert image.shape == (512, size, size, 3)
        assert image.min() == -1 and image.max() == 1
        ground = (image == -1).all(-1).mean((1, 2))
        # Three of the largest discs, with a pixel of blur, cover this much at most.
        assert ground.min() > 1 - 3 * np.pi * (0.15 + 1 / size) ** 2
        assert 0.8 < ground.mean() and ground.max() < 1
        if size == 32:
            assert (image.max((1, 2, 3)) > 0.9).mean() > 0.97


def test_sparse_sprites_are_one_to_three_of_their_class_and_palette():
    out = samples()["sparse_sprites"]
    light = (np.asarray(out["image"], np.float64) + 1) / 2
    pieces = [ndimage.label(grey > 0, np.ones((3, 3))) for grey in light.max(-1)]
    numbers = np.array([number for _, number in pieces])
    # Shapes that touch are one piece: a third of the images, or more, has one
    # piece and a third, or less, has three.
    assert set(numbers) == {1, 2, 3}
    assert 0.27 < (numbers == 1).mean() < 0.6 and 0.05 < (numbers == 3).mean() < 0.33
    palette = (np.array([*COLOURS.values()]) + 1) / 2
    counts = np.zeros(len(palette))
    for index in np.flatnonzero(numbers == 3):
        shape = procedural.SHAPES[int(out["label"][index])]
        for piece in range(1, 4):
            pixels = light[index][pieces[index][0] == piece]
            # Its area names the shape, whole, between the two allowed sizes.
            radius = np.sqrt(pixels.max(-1).sum() / AREAS[shape])
            assert 0.1 * 32 - 0.2 < radius < 0.15 * 32 + 0.2
            distance = np.abs(pixels / pixels.max(-1, keepdims=True) - palette[:, None])
            match = distance.max((1, 2)) < 1e-6
            assert match.sum() == 1
            counts += match
    assert stats.chisquare(counts).pvalue > 1e-3


def agrees(samples, expected):
    """The mean is the expected one within four standard errors."""
    error = samples.std(0) / np.sqrt(len(samples))
    assert (np.abs(samples.mean(0) - expected) < 4 * error).all()


def test_mixture_has_its_moments():
    out = samples()["mixture"]
    point, label = np.asarray(out["point"], np.float64), out["label"]
    weights, means, stds = (np.array(MIXTURE[k]) for k in ("weights", "means", "stds"))
    counts = np.bincount(label, minlength=4)
    assert stats.chisquare(counts, weights * len(label)).pvalue > 1e-3
    for k in range(4):  # of each component, so of the whole
        agrees(point[label == k], means[k])
        agrees((point[label == k] - means[k]) ** 2, stds[k] ** 2)


def test_mixtures_exact_flow_is_that_of_its_samples():
    point = samples()["mixture"]["point"]
    flow = flows.gaussian_mixture(**MIXTURE)
    # Stein: E[grad log p] = 0 and E[x . grad log p] = -dim, if x is drawn from p.
    density = lambda x: flow.log_density(x, jnp.zeros(len(x))).sum()  # noqa: E731
    score = np.asarray(jax.jit(jax.grad(density))(point))
    agrees(np.c_[score, np.sum(score * point, axis=1)], [0, 0, -2])
    # Pure noise says nothing about the data: there the velocity is x - E[data].
    mean = -np.asarray(jax.jit(flow.velocity)(jnp.zeros((1, 2)), jnp.ones(1)))[0]
    agrees(point, mean)


def test_moons_without_noise_are_scikit_learns_half_circles():
    out = samples()["two_moons without noise"]
    # Undo the scale and the centring: the textbook moons have radius 1.
    x, y = out["point"].T * 1.5 + np.array([[0.5], [0.25]])
    upper = out["label"] == 0
    np.testing.assert_allclose(np.hypot(x, y)[upper], 1, atol=1e-5)
    np.testing.assert_allclose(np.hypot(x - 1, y - 0.5)[~upper], 1, atol=1e-5)
    assert (y[upper] >= -1e-6).all() and (y[~upper] <= 0.5 + 1e-6).all()
    assert np.abs(out["point"].mean(0)).max() < 0.02
    spread = np.std(samples()["two_moons"]["point"] - out["point"])
    assert spread == pytest.approx(0.05, rel=0.02)


def test_dataset_prefixes_do_not_depend_on_counts_and_splits_share_no_sample():
    small, other = (
        load("two_moons", train_count=5, test_count=3, seed=seed) for seed in (4, 5)
    )
    large = load("two_moons", train_count=1100, test_count=1100, seed=4)
    for key in ("point", "label"):
        np.testing.assert_array_equal(small.train[key], large.train[key][:5])
        np.testing.assert_array_equal(small.test[key], large.test[key][:3])
    assert not np.array_equal(small.train["point"], other.train["point"])
    rows = np.concatenate([large.train["point"], large.test["point"]])
    assert rows.shape == np.unique(rows, axis=0).shape == (2200, 2)


def test_options_reach_the_sampler():
    for name in ("sprites", "sparse_sprites"):
        data = load(name, train_count=6, test_count=2, size=16)
        assert data.train["image"].shape == (6, 16, 16, 3)
        assert data.num_classes == len(data.meta["class_names"]) == 8
    counts = {"train_count": 64, "test_count": 2}
    data = load("mixture", **counts)
    assert data.train["point"].shape == (64, 2)
    assert data.num_classes == len(np.unique(data.train["label"])) == 4
    clean, noisy = (load("two_moons", **counts, noise=n).train for n in (0, 0.1))
    assert np.std(noisy["point"] - clean["point"]) == pytest.approx(0.1, rel=0.3)
    assert set(clean["label"]) == {0, 1}


def test_bad_inputs_are_named(refused):
    raw = jnp.zeros((4, 2), jnp.uint32)
    for sampler in (procedural.sprites, procedural.mixture):
        refused("keys must be a typed key", sampler, raw, error=TypeError)
    refused(r"size=4 is outside \[8", procedural.sprites, KEYS, size=4)
    refused(r"size=15 is outside \[16", procedural.sparse_sprites, KEYS, size=15)
    refused(r"noise=-0.1 is outside", procedural.two_moons, KEYS, noise=-0.1)
    refused(r"test_count=0 is outside \[1", load, "two_moons", test_count=0)
