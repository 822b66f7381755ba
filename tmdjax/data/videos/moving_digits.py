"""Videos of a handwritten digit that moves over a black ground and bounces.

References:
    Srivastava et al. 2015, arXiv 1502.04681 (moving MNIST, there two digits).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import check_batch, check_count, check_range
from tmdjax.core.prng import check_key, fold_in
from tmdjax.core.types import Array, Key, SampleKeys
from tmdjax.data.dataset import Dataset
from tmdjax.data.procedural import draw

FASTEST = 2
"""Pixels a frame, along each axis."""


def moving_digits(
    keys: SampleKeys, images: Any, labels: Any, *, frames: int = 8, size: int = 16
) -> dict[str, Array]:
    """Random videos. Pure and jittable; sample i depends on key i alone.

    The digit and the place where it starts are uniform; the velocity is uniform over
    whole pixels a frame, -2 to 2 along each axis, but never zero along both. At a
    border the digit turns back.

    Args:
        keys: typed keys [batch].
        images: float32 [digit, height, width, channel] in [-1, 1], -1 the ground.
        labels: int32 [digit].
        frames: of a video, >= 1.
        size: height and width of a video, larger than a digit.

    Returns:
        'video' float32 [batch, frame, size, size, channel]; 'label' int32 [batch].

    Raises:
        TypeError: raw keys, or a number that is not an integer.
        ValueError: images that are not smaller than the video, or another number of
            labels.
    """
    check_key(keys, "keys")
    check_count("frames", frames)
    images, labels = jnp.asarray(images, jnp.float32), jnp.asarray(labels, jnp.int32)
    check_batch("labels", labels, len(images))
    height, width, channels = images.shape[1:]
    check_range("size", size, max(height, width), open_low=True)
    room = jnp.array([size - height, size - width])

    def one(key: Key[Array, ""]) -> dict[str, Array]:
        pick_key, start_key, velocity_key = jax.random.split(key, 3)
        number = jax.random.randint(pick_key, (), 0, len(images))
        start = jax.random.randint(start_key, (2,), 0, room + 1)
        # All pairs of the square but its middle.
        side = 2 * FASTEST + 1
        pair = jax.random.randint(velocity_key, (), 0, side**2 - 1)
        pair += pair >= side**2 // 2
        velocity = jnp.stack([pair // side, pair % side]) - FASTEST
        wave = (start + velocity * jnp.arange(frames)[:, None]) % (2 * room)
        corner = room - jnp.abs(room - wave)
        blank = jnp.full((size, size, channels), -1, jnp.float32)

        def frame(place: Array) -> Array:
            digit = images[number]
            return jax.lax.dynamic_update_slice(blank, digit, (*place, 0))

        return {"video": jax.vmap(frame)(corner), "label": labels[number]}

    return jax.vmap(one)(keys)


def make_moving_digits(
    digits: Dataset,
    *,
    train_count: int = 8192,
    test_count: int = 1024,
    seed: int = 0,
    frames: int = 8,
    size: int = 16,
) -> Dataset:
    """A fixed set of :func:`moving_digits`.

    Args:
        digits: training videos show its training digits, test videos its test digits.
        train_count: training videos, >= 1; a larger count extends a split.
        test_count: test videos, >= 1.
        seed: of the root key.
        frames: of a video.
        size: height and width.

    Returns:
        'video' float32 [n, frame, size, size, channel]; 'label' int32 [n].

    Raises:
        ValueError: a count < 1, or a size no larger than the digits.
    """
    check_range("train_count", train_count, 1)
    check_range("test_count", test_count, 1)
    root = jax.random.key(seed)

    def split(index: int, arrays: dict[str, np.ndarray], count: int) -> Any:
        sampler = functools.partial(
            moving_digits,
            images=arrays["image"],
            labels=arrays["label"],
            frames=frames,
            size=size,
        )
        return draw(jax.jit(sampler), fold_in(root, index), count)

    return Dataset(
        name="moving_digits",
        train=split(0, digits.train, train_count),
        test=split(1, digits.test, test_count),
        num_classes=digits.num_classes,
        meta={**digits.meta, "digits": digits.name, "seed": seed},
    )
