"""Push a disc onto a target with another disc; reward only at the target."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tmdjax.core.checks import check_choice, check_count, check_range
from tmdjax.core.types import Array, Key
from tmdjax.envs.base import Transition

_PUSHER, _OBJECT = 0.08, 0.12
_SPEED = 0.08
_COLOURS = ((0.25, 0.75, 0.35), (0.85, 0.3, 0.25), (0.25, 0.4, 0.85))
OBSERVATIONS = ("state", "pixels")


@struct.dataclass
class PushState:
    """Positions of pusher, object and target, float32 [2] each; steps, int32."""

    pusher: Any
    object: Any
    target: Any
    steps: Any


@dataclasses.dataclass(frozen=True)
class Push:
    """Quasi-static pushing in the square [-1, 1]^2.

    The action moves the pusher by up to 0.08 along each axis; where it meets the object
    it pushes it along the line of their centres, and both stay inside the square. The
    episode terminates with reward 1 when the object's centre is within ``reach`` of the
    target; every other step gives 0. It is truncated after ``horizon`` steps.

    Attributes:
        observation: 'state', float32 [6] (pusher, object - pusher, target - object),
            or 'pixels', uint8 [side, side, 3].
        side: height and width of the image in pixels.
        reach: distance between centres at which the object is at its target.
        distance: the target is so far from the object at the start, at most; it is
            2 ``reach`` away at least.
        horizon: steps an episode.
    """

    observation: str = "state"
    side: int = 64
    reach: float = 0.15
    distance: float = 0.8
    horizon: int = 60
    action_size: int = dataclasses.field(default=2, init=False)
    action_bound: float = dataclasses.field(default=1.0, init=False)

    def __post_init__(self) -> None:
        check_choice("observation", self.observation, OBSERVATIONS)
        check_count("side", self.side, 8)
        check_count("horizon", self.horizon)
        check_range("reach", self.reach, 0, open_low=True)
        check_range("distance", self.distance, 2 * self.reach, 1.2)

    def reset(
        self, key: Key[Array, ""], first: bool = False
    ) -> tuple[PushState, Array]:
        """Object near the middle, target and pusher around it, apart from it."""
        where, start, far, when = jax.random.split(key, 4)
        centre = jax.random.uniform(where, (2,), minval=-0.3, maxval=0.3)
        gap = 1.5 * (_PUSHER + _OBJECT)
        state = PushState(
            pusher=_clip(centre + _around(start, gap, 2 * gap), _PUSHER),
            object=centre,
            target=_clip(centre + _around(far, 2 * self.reach, self.distance), _OBJECT),
            steps=jax.random.randint(when, (), 0, self.horizon if first else 1),
        )
        return state, self.observe(state)

    def step(self, state: PushState, action: Array, key: Any) -> Transition:
        """Moves the pusher, the object if it is met, and pays at the target.

        The same state and action always lead to the same step; key is not used.
        """
        move = _SPEED * jnp.clip(action, -self.action_bound, self.action_bound)
        pusher = _clip(state.pusher + move, _PUSHER)
        gap, normal = _apart(state.object - pusher)
        push = jnp.maximum(_PUSHER + _OBJECT - gap, 0) * normal
        moved = _clip(state.object + push, _OBJECT)
        # an object at the wall pushes back
        gap, normal = _apart(moved - pusher)
        pusher = pusher - jnp.maximum(_PUSHER + _OBJECT - gap, 0) * normal
        state = PushState(
            pusher=pusher, object=moved, target=state.target, steps=state.steps + 1
        )
        done = self.success(state)
        return Transition(
            state=state,
            observation=self.observe(state),
            reward=done.astype(jnp.float32),
            terminated=done,
            truncated=state.steps >= self.horizon,
        )

    def success(self, state: PushState) -> Array:
        """Whether the object is at its target."""
        return jnp.linalg.norm(state.object - state.target, axis=-1) <= self.reach

    def observe(self, state: PushState) -> Array:
        """What the policy sees of a state: float32 [6], or the image of render."""
        if self.observation == "pixels":
            return self.render(state)
        return jnp.concatenate(
            [state.pusher, state.object - state.pusher, state.target - state.object]
        )

    def render(self, state: PushState) -> Array:
        """uint8 [side, side, 3], y upwards: target green, object red, pusher blue."""
        centre = (jnp.arange(self.side) + 0.5) / self.side * 2 - 1
        x, y = centre[None, :], -centre[:, None]
        image = jnp.ones((self.side, self.side, 3))
        sizes = (self.reach, _OBJECT, _PUSHER)
        places = (state.target, state.object, state.pusher)
        for place, size, colour in zip(places, sizes, _COLOURS):
            away = jnp.sqrt((x - place[0]) ** 2 + (y - place[1]) ** 2)
            # one pixel of soft edge, so that images change with every motion
            cover = jnp.clip((size - away) * self.side / 2 + 0.5, 0, 1)[..., None]
            image = image * (1 - cover) + cover * jnp.asarray(colour)
        return jnp.round(255 * image).astype(jnp.uint8)


def _clip(place: Array, radius: float) -> Array:
    return jnp.clip(place, radius - 1, 1 - radius)


def _around(key: Any, low: float, high: float) -> Array:
    turn, far = jax.random.uniform(key, (2,))
    angle = 2 * jnp.pi * turn
    return (low + (high - low) * far) * jnp.stack([jnp.cos(angle), jnp.sin(angle)])


def _apart(difference: Array) -> tuple[Array, Array]:
    """Length, and direction (x where the length is 0)."""
    length = jnp.sqrt(jnp.sum(difference**2))
    safe = jnp.where(length > 1e-6, length, 1.0)
    normal = jnp.where(length > 1e-6, difference / safe, jnp.array([1.0, 0.0]))
    return length, normal
