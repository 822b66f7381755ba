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

KEYS = sample_keys(jax.random.key(0), 256)
SAMPLERS = {
    "sprites": functools.partial(procedural.sprites, size=8),
    "sparse_sprites": functools.partial(procedural.sparse_sprites, size=16),
    "checkerboard": procedural.checkerboard,
    "two_moons": procedural.two_moons,
    "rings": procedural.rings,
    "mixture": procedural.mixture,
}
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
TURN = np.arange(5) * 2 * np.pi / 5
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
        point
        for a in TURN
        for point in (
            (np.sin(a), -np.cos(a)),
            (0.381966 * np.sin(a + np.pi / 5), -0.381966 * np.cos(a + np.pi / 5)),
        )
    ],
}


def drawn(shape, centre, radius, size, scale=16):
    """The shape painted by Pillow at high resolution, then averaged down."""
    canvas = Image.new("L", (size * scale, size * scale), 0)
    pen = ImageDraw.Draw(canvas)
    place = lambda points: [  # noqa: E731
        tuple(scale * (c + radius * np.array(p)) - 0.5)
        for p in points
        for c in [np.array(centre)]
    ]
    if shape in POLYGONS:
        pen.polygon(place(POLYGONS[shape]), fill=255)
    elif shape == "frame":
        pen.polygon(place(POLYGONS["square"]), fill=255)
        pen.polygon(place(np.array(POLYGONS["square"]) / 2), fill=0)
    else:
        pen.ellipse(sum(place([(-1, -1), (1, 1)]), ()), fill=255)
        if shape == "ring":
            pen.ellipse(sum(place([(-0.5, -0.5), (0.5, 0.5)]), ()), fill=0)
    fine = np.asarray(canvas, np.float64) / 255
    return fine.reshape(size, scale, size, scale).mean((1, 3))


@pytest.mark.parametrize("shape", procedural.SHAPES)
def test_masks_match_pillow(shape):
    label = procedural.SHAPES.index(shape)
    centre, radius, size = (13.3, 17.9), 10.4, 32
    mask = procedural.shape_mask(
        jnp.asarray(label), jnp.asarray(centre), jnp.asarray(radius), size
    )
    error = np.abs(np.asarray(mask) - drawn(shape, centre, radius, size))
    # Distance and coverage differ by a fraction of an edge pixel, and at corners.
    assert error.max() < 0.45
    assert error.mean() < 0.008


@pytest.mark.parametrize(("shape", "area"), AREAS.items())
def test_mask_area_is_the_shapes(shape, area):
    label, radius = procedural.SHAPES.index(shape), 25.0
    mask = procedural.shape_mask(
        jnp.asarray(label), jnp.full(2, 32.0), jnp.asarray(radius), 64
    )
    assert float(mask.sum()) / radius**2 == pytest.approx(area, rel=0.01)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_depend_on_their_key_alone(name):
    sampler = jax.jit(SAMPLERS[name])
    whole = sampler(KEYS)
    part = sampler(KEYS[100:103])
    single = SAMPLERS[name](KEYS[101:102])
    for key in whole:
        np.testing.assert_allclose(whole[key][100:103], part[key], atol=1e-6)
        np.testing.assert_allclose(whole[key][101], single[key][0], atol=1e-6)
    assert whole["label"].dtype == jnp.int32
    data = next(key for key in whole if key != "label")
    assert whole[data].dtype == jnp.float32
    assert len(np.unique(np.asarray(whole[data]).reshape(256, -1), axis=0)) == 256


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("sprites", 8),
        ("sparse_sprites", 8),
        ("checkerboard", 8),
        ("two_moons", 2),
        ("rings", 3),
    ],
)
def test_labels_are_uniform(name, classes):
    counts = np.bincount(SAMPLERS[name](KEYS)["label"], minlength=classes)
    assert len(counts) == classes
    assert stats.chisquare(counts).pvalue > 1e-3


def test_sprites_range_and_contrast():
    image = np.asarray(procedural.sprites(KEYS)["image"])
    assert image.shape == (256, 32, 32, 3)
    assert image.min() >= -1 and image.max() <= 1
    # At most one corner can be touched by the shape: the median is the ground.
    corners = image[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    ground = np.median(corners, axis=1)
    contrast = np.abs(image - ground[:, None, None]).max((1, 2))
    assert contrast.min() >= 0.5 - 1e-5
    covered = (np.abs(image - ground[:, None, None]).max(-1) > 1e-5).mean((1, 2))
    assert 0.02 < covered.min() and covered.max() < 0.5


@pytest.mark.parametrize("size", [16, 32])
def test_sparse_sprites_are_bright_on_a_flat_ground(size):
    image = np.asarray(procedural.sparse_sprites(KEYS, size)["image"])
    assert image.shape == (256, size, size, 3)
    assert image.min() == -1 and image.max() == 1
    ground = (image == -1).all(-1).mean((1, 2))
    # Three of the largest discs, with a pixel of blur, cover this much at most.
    assert ground.min() > 1 - 3 * np.pi * (0.15 + 1 / size) ** 2
    assert 0.8 < ground.mean() and ground.max() < 1
    if size == 32:
        assert (image.max((1, 2, 3)) > 0.9).mean() > 0.97


def test_sparse_sprites_are_one_to_three_of_their_class_and_palette():
    out = procedural.sparse_sprites(sample_keys(jax.random.key(2), 512))
    light = (np.asarray(out["image"], np.float64) + 1) / 2
    pieces = [ndimage.label(grey > 0, np.ones((3, 3))) for grey in light.max(-1)]
    numbers = np.array([number for _, number in pieces])
    # Shapes that touch are one piece: a third of the images, or more, has one
    # piece and a third, or less, has three.
    assert set(numbers) == {1, 2, 3}
    assert 0.27 < (numbers == 1).mean() < 0.6 and 0.05 < (numbers == 3).mean() < 0.33
    palette = (np.array([*procedural.SPARSE_PALETTE.values()]) + 1) / 2
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


def test_mixture_has_its_moments():
    out = procedural.mixture(sample_keys(jax.random.key(3), 20000))
    point, label = np.asarray(out["point"], np.float64), np.asarray(out["label"])
    weights, means, stds = (np.array(MIXTURE[k]) for k in ("weights", "means", "stds"))
    counts = np.bincount(label, minlength=4)
    assert stats.chisquare(counts, weights * len(label)).pvalue > 1e-3

    def agree(samples, expected):
        error = samples.std(0) / np.sqrt(len(samples))
        assert (np.abs(samples.mean(0) - expected) < 4 * error).all()

    agree(point, weights @ means)
    second = sum(
        w * (s**2 * np.eye(2) + np.outer(m, m)) for w, m, s in zip(weights, means, stds)
    )
    agree(point[:, :, None] * point[:, None, :], second)
    for k in range(4):
        agree(point[label == k], means[k])
        agree((point[label == k] - means[k]) ** 2, stds[k] ** 2)


def test_mixtures_exact_flow_is_that_of_its_samples():
    point = procedural.mixture(sample_keys(jax.random.key(4), 4096))["point"]
    flow = flows.gaussian_mixture(**MIXTURE)
    # Stein: E[grad log p] = 0 and E[x . grad log p] = -dim, if x is drawn from p.
    zeros = jnp.zeros(len(point))
    score = jax.grad(lambda x: flow.log_density(x, zeros).sum())(point)
    values = np.c_[score, np.sum(score * point, axis=1)]
    error = values.std(0) / np.sqrt(len(values))
    assert (np.abs(values.mean(0) - [0, 0, -2]) < 4 * error).all()
    # Pure noise says nothing about the data: there the velocity is x - E[data].
    mean = -np.asarray(flow.velocity(jnp.zeros((1, 2)), jnp.ones(1)))[0]
    error = np.std(point, axis=0) / np.sqrt(len(point))
    assert (np.abs(np.mean(point, axis=0) - mean) < 4 * error).all()


def test_checkerboard_is_uniform_on_the_dark_squares():
    keys = sample_keys(jax.random.key(1), 4096)
    out = procedural.checkerboard(keys)
    point = np.asarray(out["point"])
    cell = np.floor((point + 1) * 2).astype(int)
    assert (cell.sum(1) % 2 == 0).all()
    # Each row and column of the board holds two dark squares of four.
    for axis in (0, 1):
        assert stats.kstest(point[:, axis], stats.uniform(-1, 2).cdf).pvalue > 1e-3
    # A label is a square, and a square is a label.
    assert len({(*c, k) for c, k in zip(cell.tolist(), np.asarray(out["label"]))}) == 8


def test_moons_without_noise_are_scikit_learns_half_circles():
    out = procedural.two_moons(KEYS, noise=0.0)
    # Undo the scale and the centring: the textbook moons have radius 1.
    x, y = np.asarray(out["point"]).T * 1.5 + np.array([[0.5], [0.25]])
    upper = np.asarray(out["label"]) == 0
    np.testing.assert_allclose(np.hypot(x, y)[upper], 1, atol=1e-5)
    np.testing.assert_allclose(np.hypot(x - 1, y - 0.5)[~upper], 1, atol=1e-5)
    assert (y[upper] >= -1e-6).all() and (y[~upper] <= 0.5 + 1e-6).all()
    assert np.abs(np.asarray(out["point"]).mean(0)).max() < 0.15


def test_rings_have_their_radii_and_noise():
    clean = procedural.rings(KEYS, noise=0.0)
    radius = np.linalg.norm(clean["point"], axis=1)
    np.testing.assert_allclose(radius, (np.asarray(clean["label"]) + 1) / 3, atol=1e-6)
    noisy = procedural.rings(KEYS, noise=0.1)
    spread = np.std(np.asarray(noisy["point"] - clean["point"]))
    assert spread == pytest.approx(0.1, rel=0.15)


def test_dataset_prefixes_do_not_depend_on_counts():
    small = load("checkerboard", train_count=5, test_count=3, seed=4)
    large = load("checkerboard", train_count=1100, test_count=7, seed=4)
    assert small.train["point"].shape == (5, 2) and len(large.train["point"]) == 1100
    for key in ("point", "label"):
        np.testing.assert_array_equal(small.train[key], large.train[key][:5])
        np.testing.assert_array_equal(small.test[key], large.test[key][:3])
    other = load("checkerboard", train_count=5, test_count=3, seed=5)
    assert not np.array_equal(small.train["point"], other.train["point"])


def test_splits_share_no_sample():
    data = load("rings", train_count=1500, test_count=1500)
    rows = np.concatenate([data.train["point"], data.test["point"]])
    assert len(np.unique(rows, axis=0)) == 3000


def test_sprite_options_reach_the_sampler():
    data = load("sprites", train_count=6, test_count=2, size=16)
    assert data.train["image"].shape == (6, 16, 16, 3)
    assert data.num_classes == len(data.meta["class_names"]) == 8
    data = load("sparse_sprites", train_count=6, test_count=2, size=16)
    assert data.train["image"].shape == (6, 16, 16, 3)
    assert data.num_classes == len(data.meta["class_names"]) == 8


def test_mixture_loads_with_a_class_for_each_component():
    data = load("mixture", train_count=64, test_count=2)
    assert data.train["point"].shape == (64, 2)
    assert data.num_classes == len(np.unique(data.train["label"])) == 4


def test_bad_inputs_are_named(as_shipped):
    with pytest.raises(TypeError, match=r"keys must be a typed key"):
        procedural.sprites(jnp.zeros((4, 2), jnp.uint32))
    with pytest.raises(ValueError, match=r"size=4 is outside \[8"):
        procedural.sprites(KEYS, size=4)
    with pytest.raises(ValueError, match=r"size=15 is outside \[16"):
        procedural.sparse_sprites(KEYS, size=15)
    with pytest.raises(TypeError, match=r"keys must be a typed key"):
        procedural.mixture(jnp.zeros((4, 2), jnp.uint32))
    with pytest.raises(ValueError, match=r"noise=-0.1 is outside"):
        procedural.two_moons(KEYS, noise=-0.1)
    with pytest.raises(ValueError, match=r"test_count=0 is outside \[1"):
        load("rings", test_count=0)
