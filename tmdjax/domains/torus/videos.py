"""Videos of digits that drift over a torus, seen through a window that moves.

The world is a square of whole pixels that wraps around ("MNIST-World"). A digit moves
by its own velocity in every frame, whether or not it is in view; an agent sees a part
of the world and knows how it moved. Places, velocities and motions are integers (x, y):
columns to the right, rows down.

References:
    Lillemark et al., "Flow Equivariant World Models", arXiv 2601.01075.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from tmdjax.core import prng
from tmdjax.core.checks import check_batch, check_count, check_range
from tmdjax.core.types import Array, ArrayLike, Bool, Float, Int, Key, SampleKeys

_TRIES = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorusWorld:
    """Sizes of a world, and what moves in it; the defaults are the published ones.

    Variants: ``speed=0`` is a static world, ``window=world`` one that is fully
    observed, ``camera_step=0`` an agent that stands still (and need not see all).

    Attributes:
        world: side of the torus in pixels.
        window: side of what is seen, at most ``world``.
        digits: how many.
        camera_step: most pixels that the window moves along each axis in a frame.
        speed: velocities have components in -speed .. speed, (0, 0) among them.
        context: frames that a model may see, at least 1. In them the agent looks at
            every pixel of the world.
        predicted: frames after those, at least 1.
        distinct: whether the digits of a world have distinct labels.

    Raises:
        TypeError: a size that is no integer.
        ValueError: one out of range; a window larger than the world; a context in which
            the window cannot pass over the whole world.
    """

    world: int = 50
    window: int = 32
    digits: int = 5
    camera_step: int = 10
    speed: int = 1
    context: int = 50
    predicted: int = 20
    distinct: bool = False

    def __post_init__(self) -> None:
        for name in ("world", "window", "digits", "context", "predicted"):
            check_count(name, getattr(self, name))
        for name in ("camera_step", "speed"):
            check_count(name, getattr(self, name), 0)
        if self.window > self.world:
            raise ValueError(
                f"window={self.window} is larger than world={self.world}; on a torus "
                f"it would show pixels twice. Make it at most as large."
            )
        new = self.window**2 - max(self.window - self.camera_step, 0) ** 2
        if self.searches and self.window**2 + (self.context - 1) * new < self.world**2:
            raise ValueError(
                f"a window of {self.window} that moves by {self.camera_step} cannot "
                f"pass over a world of {self.world} in {self.context} frames; raise "
                f"camera_step or context."
            )

    @property
    def frames(self) -> int:
        """Frames of a video."""
        return self.context + self.predicted

    @property
    def searches(self) -> bool:
        """Whether the agent moves to look at every pixel of the world."""
        return self.camera_step > 0 and self.window < self.world


def torus_videos(
    keys: SampleKeys,
    images: Float[ArrayLike, "image side side 1"],
    labels: Int[ArrayLike, "image"],
    *,
    world: TorusWorld,
    classes: int = 10,
) -> dict[str, Array]:
    """Random videos. Pure and jittable; sample i depends on key i alone.

    Of each digit the label is uniform, then the image among those of the label; place
    and velocity are uniform. Overlapping digits add, up to 1. The window moves by
    uniform steps; in the context, as long as the world has pixels that were not seen,
    by steps towards one of them chosen at random, and a context that leaves some is
    drawn again, up to 100 times. It rests in the first frame and in the first predicted
    one, as in the published sets.

    Args:
        keys: typed keys [batch].
        images: of digits, in [0, 1]; black is 0. Those of :func:`tmdjax.data.load` lie
            in [-1, 1]: give ``(image + 1) / 2``.
        labels: int [image] in [0, classes), each of them at least once.
        world: sizes.
        classes: how many labels there are.

    Returns:
        'frames' float32 [batch, frame, window, window, 1] in [0, 1]; 'actions' int32
        [batch, frame, 2], the window's motion from the frame before to this one;
        'covered' bool [batch], whether the context shows every pixel of the world
        (:func:`check_covered`); and what was drawn, int32: 'image' [batch, digit],
        'start' and 'velocity' [batch, digit, 2], a digit's upper left corner in the
        first frame and its motion.

    Raises:
        TypeError: raw keys, labels that are no integers.
        ValueError: images larger than the world or (concrete) beyond [0, 1]; more
            distinct digits than classes; a (concrete) label out of range or missing.
    """
    prng.check_key(keys, "keys")
    _check_images(images, labels, world, classes)
    images = jnp.asarray(images, jnp.float32)[..., 0]
    rest = world.world - images.shape[-1]
    padded = jnp.pad(images, ((0, 0), (0, rest), (0, rest)))
    labels = jnp.asarray(labels)
    order = jnp.argsort(labels, stable=True)
    first = jnp.searchsorted(labels[order], jnp.arange(classes + 1))

    def sample(key: Key[Array, ""]) -> dict[str, Array]:
        what, where, drift, walk, wander = jax.random.split(key, 5)
        chosen = order[_draw_images(what, first, world, classes)]
        shape, side, v = (world.digits, 2), world.world, world.speed
        start = jax.random.randint(where, shape, 0, side, jnp.int32)
        velocity = jax.random.randint(drift, shape, -v, v + 1, jnp.int32)
        actions, covered = _context_motions(walk, world)
        later = _uniform_steps(wander, world, world.predicted).at[0].set(0)
        actions = jnp.concatenate([actions, later])
        time = jnp.arange(world.frames)[:, None, None]
        return {
            "frames": _frames(
                padded[chosen], start + time * velocity, jnp.cumsum(actions, 0), world
            ),
            "actions": actions,
            "covered": covered,
            "image": chosen.astype(jnp.int32),
            "start": start,
            "velocity": velocity,
        }

    return jax.vmap(sample)(keys)


def out_of_view(
    videos: Mapping[str, Any], side: int, *, world: TorusWorld
) -> Bool[Array, "batch predicted window window"]:
    """Which pixels of the predicted frames show a part of a digit that was out of view.

    A digit is its whole square, dark pixels too. Its parts that lay outside the window
    in the last frame of the context are followed as the digit moves: where the window
    shows one of them later, what is right there cannot be read from that last frame,
    but from memory and from how the digit moved on unseen. Pure and jittable.

    Args:
        videos: of :func:`torus_videos`: 'start' and 'velocity' [batch, digit, 2],
            'actions' [batch, frame, 2].
        side: height and width of the images of digits, at most that of the world.
        world: sizes of the videos.

    Raises:
        ValueError: images larger than the world.
    """
    check_range("side", check_count("side", side), 1, world.world)
    pixel = jnp.arange(world.world)
    square = (pixel < side)[:, None] & (pixel < side)

    def sample(start: Array, velocity: Array, actions: Array) -> Array:
        camera = jnp.cumsum(actions, 0)
        places = start + jnp.arange(len(camera))[:, None, None] * velocity
        last = world.context - 1
        corner = camera[last] - world.window // 2
        away = (places[last] - corner)[..., None] + pixel
        column, row = jnp.moveaxis(away % world.world < world.window, 1, 0)
        hidden = square & ~(row[:, :, None] & column[:, None, :])
        given = places[last + 1 :], camera[last + 1 :]
        return _frames(hidden.astype(jnp.float32), *given, world)[..., 0] > 0

    return jax.vmap(sample)(*(videos[n] for n in ("start", "velocity", "actions")))


def check_covered(covered: Bool[ArrayLike, "batch"], world: TorusWorld) -> None:
    """Raises ValueError where a context does not show the whole world.

    Args:
        covered: of :func:`torus_videos`, concrete.
        world: sizes of the videos.
    """
    missing = np.flatnonzero(~np.asarray(covered))
    if world.searches and missing.size:
        raise ValueError(
            f"{missing.size} of {np.size(covered)} contexts of {world.context} frames, "
            f"the first number {missing[0]}, do not show every pixel of a world of "
            f"{world.world} after {_TRIES} tries at camera_step={world.camera_step}; "
            f"raise camera_step or context."
        )


def _check_images(images: Any, labels: Any, world: TorusWorld, classes: int) -> None:
    shape = np.shape(images)
    if len(shape) != 4 or shape[1] != shape[2] or shape[3] != 1:
        raise ValueError(
            f"images have shape {shape}; give grey squares [image, side, side, 1]."
        )
    if shape[1] > world.world:
        raise ValueError(
            f"images of {shape[1]} x {shape[1]} do not fit into world={world.world}; "
            f"make the world larger."
        )
    check_batch("labels", labels, shape[0])
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise TypeError(f"labels are {jnp.result_type(labels)}; give integers.")
    check_count("classes", classes)
    if world.distinct and world.digits > classes:
        raise ValueError(
            f"digits={world.digits} cannot have distinct labels of classes={classes}; "
            f"ask for fewer, or distinct=False."
        )
    # in numpy: jax would trace what is done to constants of a program
    if not isinstance(labels, jax.core.Tracer):
        labels = np.asarray(labels)
        counts = np.bincount(np.clip(labels, 0, classes), minlength=classes + 1)
        if labels.min() < 0 or counts[classes] or not counts[:classes].all():
            raise ValueError(
                f"labels lie in {labels.min()} .. {labels.max()} and have "
                f"{np.unique(labels).size} values; each of 0 .. {classes - 1} must be "
                f"there, and nothing else (classes={classes})."
            )
    if not isinstance(images, jax.core.Tracer):
        values = np.asarray(images)
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"images lie in [{low}, {high}]; give values in [0, 1], "
                f"(image + 1) / 2 of an image in [-1, 1]."
            )


def _draw_images(key: Any, first: Array, world: TorusWorld, classes: int) -> Array:
    """Places of images in the order of their labels, [digit]."""
    which, among = jax.random.split(key)
    if world.distinct:
        labels = jax.random.permutation(which, classes)[: world.digits]
    else:
        labels = jax.random.randint(which, (world.digits,), 0, classes)
    return jax.random.randint(
        among, (world.digits,), first[labels], first[labels + 1], jnp.int32
    )


def _uniform_steps(key: Any, world: TorusWorld, count: int) -> Int[Array, "frame 2"]:
    step = world.camera_step
    return jax.random.randint(key, (count, 2), -step, step + 1, jnp.int32)


def _in_view(place: Int[Array, "2"], world: TorusWorld) -> Bool[Array, "world world"]:
    """Which pixels of the world a window shows."""
    away = jnp.arange(world.world) - (place - world.window // 2)[:, None]
    column, row = away % world.world < world.window
    return row[:, None] & column


def _context_motions(
    key: Any, world: TorusWorld
) -> tuple[Int[Array, "frame 2"], Bool[Array, ""]]:
    """Motions of the window in the context, and whether it passed over everything."""
    side, most = world.world, world.camera_step

    def step(carry: Any, given: Any) -> Any:
        place, seen = carry
        key, free = given
        wish = jnp.argmax(jnp.where(seen, -1.0, jax.random.uniform(key, seen.shape)))
        away = jnp.stack([wish % side, wish // side]) - place
        near = (away + side // 2) % side - side // 2
        motion = jnp.where(seen.all(), free, jnp.clip(near, -most, most))
        place = (place + motion) % side
        return (place, seen | _in_view(place, world)), motion.astype(jnp.int32)

    def walk(key: Any) -> tuple[Array, Array]:
        wishes, free = jax.random.split(key)
        keys = jax.random.split(wishes, world.context)
        place = jnp.zeros(2, jnp.int32)
        given = (keys, _uniform_steps(free, world, world.context))
        given = jax.tree.map(lambda leaf: leaf[1:], given)
        start = (place, _in_view(place, world))
        (_, seen), motions = jax.lax.scan(step, start, given)
        return jnp.concatenate([place[None], motions]), seen.all()

    def again(state: Any) -> Any:
        number, _, _ = state
        return number + 1, *walk(jax.random.fold_in(key, number))

    tries = _TRIES if world.searches else 1
    start = jnp.int32(1), *walk(jax.random.fold_in(key, 0))
    _, motions, covered = jax.lax.while_loop(
        lambda state: (state[0] < tries) & ~state[2], again, start
    )
    return motions, covered


def _frames(
    pictures: Float[Array, "digit world world"],
    places: Int[Array, "frame digit 2"],
    camera: Int[Array, "frame 2"],
    world: TorusWorld,
) -> Float[Array, "frame window window 1"]:
    """What the window shows of pictures, a frame at a time."""

    def frame(given: Any) -> Array:
        places, camera = given
        corner = camera - world.window // 2 - places
        at = (corner[..., None] + jnp.arange(world.window)) % world.world
        column, row = at[:, 0, None, :], at[:, 1, :, None]
        seen = pictures[jnp.arange(len(pictures))[:, None, None], row, column]
        return jnp.clip(seen.sum(0), 0, 1)[..., None]

    return jax.lax.map(frame, (places, camera))
