"""Unlimited data made from keys: coloured shapes and 2-D point sets.

Every sampler is ``(keys[batch], **options) -> {name: [batch, ...]}``, pure and
jittable; sample i depends on key i alone.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import check_range
from tmdjax.core.prng import check_key, fold_in, sample_keys
from tmdjax.core.types import Array, Float, Int, Key, SampleKeys
from tmdjax.data.dataset import Dataset
from tmdjax.domains.shapes.specs import COLOURS

Sampler = Callable[[Any], dict[str, Array]]

SHAPES = ("disc", "ring", "square", "frame", "diamond", "triangle", "cross", "star")
"""Sprite classes, in label order."""

MIXTURE: dict[str, tuple[Any, ...]] = {
    "weights": (0.4, 0.3, 0.2, 0.1),
    "means": ((-1.6, 0.8), (1.2, 1.6), (-0.2, -1.9), (1.9, -0.4)),
    "stds": (0.4, 0.3, 0.5, 0.2),
}
"""Components of :func:`mixture`, as ``flows.gaussian_mixture`` takes them."""

_CHUNK = 1024
_MOST_SPARSE_SPRITES = 3


def _disc(x: Array, y: Array) -> Array:
    return jnp.hypot(x, y) - 1


def _ring(x: Array, y: Array) -> Array:
    return jnp.abs(jnp.hypot(x, y) - 0.75) - 0.25


def _square(x: Array, y: Array) -> Array:
    return jnp.maximum(jnp.abs(x), jnp.abs(y)) - 0.5**0.5


def _frame(x: Array, y: Array) -> Array:
    outer = _square(x, y)
    return jnp.maximum(outer, -(outer + 0.5**0.5 / 2))


def _diamond(x: Array, y: Array) -> Array:
    return (jnp.abs(x) + jnp.abs(y) - 1) * 0.5**0.5


def _triangle(x: Array, y: Array) -> Array:
    return jnp.maximum(y, 0.75**0.5 * jnp.abs(x) - y / 2) - 0.5


def _cross(x: Array, y: Array) -> Array:
    x, y = jnp.abs(x), jnp.abs(y)
    arm, width = jnp.maximum(x, y), jnp.minimum(x, y)
    return jnp.maximum(arm - 1, width - 0.3)


def _star(x: Array, y: Array) -> Array:
    """Pentagram with its tip up: fold the angle onto one half of one arm."""
    half = np.pi / 5
    inner = np.sin(np.pi / 10) / np.sin(3 * np.pi / 10)
    angle = jnp.abs((jnp.arctan2(x, -y) + half) % (2 * half) - half)
    along, across = jnp.cos(angle), jnp.sin(angle)
    edge = np.array([inner * np.cos(half) - 1, inner * np.sin(half)])
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    r = jnp.hypot(x, y)
    return normal[0] * (r * along - 1) + normal[1] * r * across


# Signed distances to shapes inside [-1, 1]², negative inside, in SHAPES order.
_DISTANCES = (_disc, _ring, _square, _frame, _diamond, _triangle, _cross, _star)


def shape_mask(
    label: Int[Array, ""],
    centre: Float[Array, "2"],
    radius: Float[Array, ""],
    size: int,
) -> Float[Array, "size size"]:
    """Coverage of each pixel by a shape, anti-aliased over one pixel.

    Args:
        label: class in [0, len(SHAPES)).
        centre: (x, y) in pixels from the upper left corner.
        radius: half the side of the box that holds the shape, in pixels.
        size: of the image, in pixels.

    Returns:
        [size, size] float32 in [0, 1].
    """
    middle = jnp.arange(size, dtype=jnp.float32) + 0.5
    x = (middle[None, :] - centre[0]) / radius
    y = (middle[:, None] - centre[1]) / radius
    distance = jnp.stack([d(*jnp.broadcast_arrays(x, y)) for d in _DISTANCES])[label]
    return jnp.clip(0.5 - distance * radius, 0, 1)


def sprites(keys: SampleKeys, size: int = 32) -> dict[str, Array]:
    """One coloured shape on a plain background; the class is the shape.

    The shape lies wholly inside the image, its box 0.3 to 0.7 of the image wide,
    and differs from the background by at least 0.5 in every colour channel.

    Args:
        keys: typed keys [batch].
        size: height and width, at least 8.

    Returns:
        'image' [batch, size, size, 3], float32 in [-1, 1]; 'label' int32 [batch].

    Raises:
        TypeError: raw keys.
        ValueError: size < 8.
    """
    check_key(keys, "keys")
    check_range("size", size, 8)

    def one(key: Key[Array, ""]) -> dict[str, Array]:
        label_key, radius_key, centre_key, ground_key, colour_key = jax.random.split(
            key, 5
        )
        label = jax.random.randint(label_key, (), 0, len(SHAPES), jnp.int32)
        radius = size * jax.random.uniform(
            radius_key, (), jnp.float32, minval=0.15, maxval=0.35
        )
        centre = radius + (size - 2 * radius) * jax.random.uniform(
            centre_key, (2,), jnp.float32
        )
        ground = jax.random.uniform(ground_key, (3,), jnp.float32, minval=-1)
        # A step of 0.5 to 1.5 around the circle [-1, 1): the contrast is
        # bounded below without rejection.
        step = jax.random.uniform(colour_key, (3,), jnp.float32, minval=0.5, maxval=1.5)
        colour = (ground + step + 1) % 2 - 1
        mask = shape_mask(label, centre, radius, size)[..., None]
        return {"image": ground + mask * (colour - ground), "label": label}

    return jax.vmap(one)(keys)


def sparse_sprites(keys: SampleKeys, size: int = 32) -> dict[str, Array]:
    """One to three small bright shapes of one class on black; the class is the shape.

    Most of an image is exactly -1 and a few pixels are near +1, so the scale of the
    data is far from uniform and the paths of a flow bend. Each shape has its own
    place, size (its box 0.2 to 0.3 of the image wide, wholly inside) and colour, a
    primary or a mix of two; where shapes overlap, each channel shows the brighter one.
    Lines thinner than a pixel stay below +1.

    Args:
        keys: typed keys [batch].
        size: height and width, at least 16: below, shapes cannot be told apart.

    Returns:
        'image' [batch, size, size, 3], float32 in [-1, 1]; 'label' int32 [batch].

    Raises:
        TypeError: raw keys.
        ValueError: size < 16.
    """
    check_key(keys, "keys")
    check_range("size", size, 16)
    colours = jnp.asarray([*COLOURS.values()], jnp.float32)

    def light(key: Key[Array, ""], label: Array) -> Array:
        """What one shape adds to the ground, [size, size, 3] in [0, 2]."""
        radius_key, centre_key, colour_key = jax.random.split(key, 3)
        radius = size * jax.random.uniform(
            radius_key, (), jnp.float32, minval=0.1, maxval=0.15
        )
        centre = radius + (size - 2 * radius) * jax.random.uniform(
            centre_key, (2,), jnp.float32
        )
        colour = colours[jax.random.randint(colour_key, (), 0, len(colours))]
        return shape_mask(label, centre, radius, size)[..., None] * (colour + 1)

    def one(key: Key[Array, ""]) -> dict[str, Array]:
        label_key, count_key, shapes_key = jax.random.split(key, 3)
        label = jax.random.randint(label_key, (), 0, len(SHAPES), jnp.int32)
        count = jax.random.randint(count_key, (), 1, _MOST_SPARSE_SPRITES + 1)
        shape_keys = jax.random.split(shapes_key, _MOST_SPARSE_SPRITES)
        lights = jax.vmap(light, (0, None))(shape_keys, label)
        shown = jnp.arange(_MOST_SPARSE_SPRITES) < count
        image = jnp.max(lights * shown[:, None, None, None], axis=0) - 1
        return {"image": image, "label": label}

    return jax.vmap(one)(keys)


def two_moons(keys: SampleKeys, noise: float = 0.05) -> dict[str, Array]:
    """Two interleaved half circles of radius 2/3, centred, with Gaussian noise.

    Args:
        keys: typed keys [batch].
        noise: standard deviation of the noise, >= 0.

    Returns:
        'point' float32 [batch, 2]; 'label' int32 [batch]: 0 the upper moon around
        (-1/3, -1/6), 1 the lower one around (1/3, 1/6).

    Raises:
        ValueError: negative noise.
    """
    check_key(keys, "keys")
    check_range("noise", noise, 0)

    def one(key: Key[Array, ""]) -> dict[str, Array]:
        moon_key, angle_key, noise_key = jax.random.split(key, 3)
        moon = jax.random.randint(moon_key, (), 0, 2, jnp.int32)
        angle = jax.random.uniform(angle_key, (), jnp.float32, maxval=np.pi)
        sign = 1.0 - 2 * moon
        arc = 2 / 3 * jnp.stack([jnp.cos(angle), jnp.sin(angle)])
        point = sign * (arc - jnp.array([1 / 3, 1 / 6]))
        point += noise * jax.random.normal(noise_key, (2,), jnp.float32)
        return {"point": point, "label": moon}

    return jax.vmap(one)(keys)


def mixture(keys: SampleKeys) -> dict[str, Array]:
    """Points of the four unequal Gaussians of ``MIXTURE``.

    ``flows.gaussian_mixture(**MIXTURE)`` is the exact flow to this set.

    Args:
        keys: typed keys [batch].

    Returns:
        'point' float32 [batch, 2]; 'label' int32 [batch], the component.
    """
    check_key(keys, "keys")
    weights, means, stds = (
        jnp.asarray(MIXTURE[name], jnp.float32) for name in ("weights", "means", "stds")
    )

    def one(key: Key[Array, ""]) -> dict[str, Array]:
        label_key, noise_key = jax.random.split(key)
        label = jax.random.categorical(label_key, jnp.log(weights)).astype(jnp.int32)
        noise = jax.random.normal(noise_key, (2,), jnp.float32)
        return {"point": means[label] + stds[label] * noise, "label": label}

    return jax.vmap(one)(keys)


def make_dataset(
    name: str,
    sampler: Sampler,
    *,
    train_count: int,
    test_count: int,
    seed: int,
    num_classes: int,
    meta: dict[str, Any],
) -> Dataset:
    """Samples a fixed data set.

    Training and test samples come from two keys folded out of the seed: the
    splits share no key, and a larger count extends a split without changing it.

    Args:
        name: of the data set.
        sampler: ``keys[batch] -> {name: [batch, ...]}``.
        train_count: training samples, >= 1.
        test_count: test samples, >= 1.
        seed: of the root key.
        num_classes: how many labels the sampler draws from.
        meta: passed on to the data set.

    Raises:
        ValueError: a count < 1.
    """
    check_range("train_count", train_count, 1)
    check_range("test_count", test_count, 1)
    jitted, root = jax.jit(sampler), jax.random.key(seed)
    return Dataset(
        name=name,
        train=draw(jitted, fold_in(root, 0), train_count),
        test=draw(jitted, fold_in(root, 1), test_count),
        num_classes=num_classes,
        meta=meta,
    )


def draw(sampler: Sampler, key: Key[Array, ""], count: int) -> dict[str, np.ndarray]:
    """Samples on the host, ``count`` of them, made in chunks of one size.

    A larger count extends the samples without changing them.

    Args:
        sampler: ``keys[batch] -> {name: [batch, ...]}``, jitted.
        key: root of the samples' keys.
        count: samples, >= 1.
    """
    parts = [
        jax.device_get(sampler(sample_keys(key, _CHUNK, start)))
        for start in range(0, count, _CHUNK)
    ]
    return {k: np.concatenate([p[k] for p in parts])[:count] for k in parts[0]}


def fixed_set(
    name: str,
    sampler: Callable[..., dict[str, Array]],
    num_classes: int,
    *,
    train_count: int = 16384,
    test_count: int = 4096,
    **meta: Any,
) -> Callable[..., Dataset]:
    """The loader of a fixed set of a sampler's samples, for the registry of sources.

    Args:
        name: of the data set.
        sampler: ``(keys[batch], **options) -> {name: [batch, ...]}``.
        num_classes: how many labels the sampler draws from.
        train_count: default of the option of this name.
        test_count: default of the option of this name.
        **meta: what the data set says of itself, beside the seed and the options.

    Returns:
        ``(files, *, train_count, test_count, seed=0, **options) -> Dataset``, the
        options being the sampler's own, with its defaults.
    """
    own = [*inspect.signature(sampler).parameters.values()][1:]
    defaults = {"train_count": train_count, "test_count": test_count, "seed": 0}
    defaults |= {parameter.name: parameter.default for parameter in own}

    def load(files: Mapping[str, Path], **given: Any) -> Dataset:
        options = defaults | given
        counts = {key: options.pop(key) for key in ("train_count", "test_count")}
        said = {**meta, **options}
        seed = options.pop("seed")
        chosen = functools.partial(sampler, **options)
        return make_dataset(
            name, chosen, **counts, seed=seed, num_classes=num_classes, meta=said
        )

    load.__signature__ = inspect.Signature(  # pyright: ignore
        [
            inspect.Parameter("files", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            *(
                inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=value)
                for key, value in defaults.items()
            ),
        ]
    )
    return load


_IMAGES = {"train_count": 8192, "test_count": 1024, "class_names": SHAPES}
load_sprites = fixed_set("sprites", sprites, len(SHAPES), **_IMAGES)
load_sparse_sprites = fixed_set(
    "sparse_sprites", sparse_sprites, len(SHAPES), **_IMAGES
)
load_two_moons = fixed_set("two_moons", two_moons, 2)
load_mixture = fixed_set("mixture", mixture, len(MIXTURE["weights"]))
