"""Recurrent state-space model: a world model that goes on in a latent state."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from tmdjax.core import prng
from tmdjax.core.checks import check_count, check_range
from tmdjax.core.types import Array, ArrayLike, Float, Int
from tmdjax.models.layers import (
    Dense,
    check_attributes,
    check_patches,
    patchify,
    unpatchify,
)
from tmdjax.models.videos.forcing_dit import prepare_actions

Found = dict[str, Array]


@struct.dataclass
class RSSMState:
    """What an :class:`RSSM` knows.

    Attributes:
        hidden: of its recurrent network, float32 [batch, hidden] in (-1, 1).
        latent: a class of each group, one-hot, float32 [batch, group, class].
        keys: [batch], of the samples' draws.
        step: draws made so far, int32.
    """

    hidden: Any
    latent: Any
    keys: Any
    step: Any


class RSSM(nn.Module):
    """World model of a deterministic and a stochastic latent state.

    In every step a gated recurrent unit takes in the last latent and the action. From
    what it then knows the *prior* is a distribution of the next latent before the frame
    is seen, and the *posterior*, which is given the frame too, one after it. A latent
    is some groups of classes, drawn with straight-through gradients; a frame is decoded
    from it and the recurrent state. A prediction draws from the prior alone, step after
    step, and reads no frame: what is fed back to it is ignored.

    It keeps the protocol of world models, see :class:`tmdjax.models.TorusMap`; its
    ``start`` needs keys. It is trained by :func:`tmdjax.systems.rssm.loss`.

    Attributes:
        image_size: height and width of a frame.
        patch_size: side of the patches that frames are read and written in, a divisor.
        hidden: width of the recurrent state.
        width: of all other layers, and of a patch.
        groups: of a latent.
        classes: of a group, at least 2.
        channels: of a frame.
        num_actions: actions are codes in [0, num_actions); None: integers (x, y).
        uniform: share of the uniform distribution in prior and posterior, in (0, 1):
            neither ever excludes a class, so that divergences are finite.
        recipe: GEMM recipe of every dense layer.

    References:
        Hafner et al., arXiv 1811.04551 (the model), 2010.02193 (latents of classes, the
        gated unit), 2301.04104 (the share of the uniform distribution).
    """

    image_size: int
    patch_size: int = 2
    hidden: int = 64
    width: int = 64
    groups: int = 8
    classes: int = 8
    channels: int = 1
    num_actions: int | None = None
    uniform: float = 0.01
    recipe: Any = "fp32"

    def __post_init__(self):
        sizes = ("image_size", "patch_size", "hidden", "width", "groups", "channels")
        check_attributes(self, *sizes, "num_actions")
        check_count("classes", self.classes, 2)
        ends = {"open_low": True, "open_high": True}
        check_range("uniform", self.uniform, 0, 1, **ends)
        check_patches(self.image_size, self.image_size, self.patch_size)
        super().__post_init__()

    def setup(self):
        """Declares the layers."""

        def dense(features: int) -> Dense:
            return Dense(features, self.recipe)

        patches = (self.image_size // self.patch_size) ** 2
        classes = self.groups * self.classes
        self.patch_embedding = dense(self.width)
        self.frame_embedding = dense(self.width)
        self.recurrent_input = dense(self.width)
        self.gates = dense(3 * self.hidden)
        self.prior_hidden, self.prior_output = dense(self.width), dense(classes)
        self.posterior_hidden, self.posterior_output = dense(self.width), dense(classes)
        self.frame_hidden = dense(patches * self.width)
        self.patch_output = dense(self.patch_size**2 * self.channels)

    def __call__(
        self,
        frame: Float[Array, "batch height width channel"],
        action: Int[Array, "batch ..."],
        keys: Any,
    ) -> Float[Array, "batch height width channel"]:
        """The frame after one that is seen, drawn, if the agent does an action."""
        state = self.start(frame, keys)
        state = self.observe(state, frame, jnp.zeros_like(action))
        return self.predict(state, action)[1]

    def prepare(
        self, actions: Int[ArrayLike, "batch time ..."]
    ) -> Int[Array, "batch time ..."]:
        """Actions of a video, checked; the first, which no frame precedes, idle.

        Raises:
            TypeError: actions that are no integers.
            ValueError: actions of another shape, or concrete codes out of range.
        """
        return prepare_actions(actions, self.num_actions)

    def start(
        self, frame: Float[Array, "batch height width channel"], keys: Any = None
    ) -> RSSMState:
        """The state before the first frame, of zeros.

        Args:
            frame: of the shape of all that follow.
            keys: [batch], of the samples' draws.

        Raises:
            ValueError: no keys, or frames of another size than the network's.
        """
        if keys is None:
            raise ValueError("a model that draws its latents needs keys [batch].")
        self._check_frames(frame)
        batch = frame.shape[0]
        return RSSMState(
            hidden=jnp.zeros((batch, self.hidden)),
            latent=jnp.zeros((batch, self.groups, self.classes)),
            keys=keys,
            step=jnp.int32(0),
        )

    def observe(
        self,
        state: RSSMState,
        frame: Float[Array, "batch height width channel"],
        action: Int[Array, "batch ..."],
    ) -> RSSMState:
        """The state after a frame in [0, 1] and the action that led to it."""
        return self.infer(state, self.encode(frame), action)[0]

    def predict(
        self, state: RSSMState, action: Int[Array, "batch ..."]
    ) -> tuple[RSSMState, Float[Array, "batch height width channel"]]:
        """The state a step later, its latent drawn from the prior, and its frame.

        Args:
            state: of :meth:`observe`, or of this method.
            action: that leads to the predicted frame.
        """
        state = self._advanced(state, action)
        state = self._drawn(state, self._prior(state.hidden))
        return state, self.decode(_features(state))

    def feed(
        self, state: RSSMState, frame: Float[Array, "batch height width channel"]
    ) -> RSSMState:
        """The same state: a model that goes on in its latent reads no frame."""
        self._check_frames(frame)
        return state

    def infer(
        self,
        state: RSSMState,
        embedding: Float[Array, "batch embedding"],
        action: Int[Array, "batch ..."],
    ) -> tuple[RSSMState, Found]:
        """A step of what is seen, and what the prior said of it.

        Args:
            state: before the frame.
            embedding: of the frame, by :meth:`encode`.
            action: that led to it.

        Returns:
            The state, its latent drawn from the posterior; and 'features' [batch,
            feature] that :meth:`decode` makes a frame of, 'prior' and 'posterior',
            log-probabilities [batch, group, class].
        """
        state = self._advanced(state, action)
        prior, h = self._prior(state.hidden), state.hidden
        h = jnp.concatenate([h, embedding.astype(h.dtype)], -1)
        posterior = self._log_probs(
            self.posterior_output(nn.silu(self.posterior_hidden(h)))
        )
        state = self._drawn(state, posterior)
        found = {"features": _features(state), "prior": prior, "posterior": posterior}
        return state, found

    def encode(
        self, frames: Float[Array, "*lead height width channel"]
    ) -> Float[Array, "*lead embedding"]:
        """What the posterior is given of frames."""
        self._check_frames(frames)
        patches = patchify(frames.reshape(-1, *frames.shape[-3:]), self.patch_size)
        h = nn.silu(self.patch_embedding(2 * patches - 1))
        h = nn.silu(self.frame_embedding(h.reshape(len(h), -1)))
        return h.astype(jnp.float32).reshape(*frames.shape[:-3], -1)

    def decode(
        self, features: Float[Array, "*lead feature"]
    ) -> Float[Array, "*lead height width channel"]:
        """Frames, float32 of any value, of the 'features' of :meth:`infer`."""
        size, flat = self.image_size, features.reshape(-1, features.shape[-1])
        h = nn.silu(self.frame_hidden(flat)).reshape(len(flat), -1, self.width)
        patches = (self.patch_output(h).astype(jnp.float32) + 1) / 2
        frames = unpatchify(patches, self.patch_size, size, size)
        return frames.reshape(*features.shape[:-1], size, size, -1)

    def _advanced(self, state: RSSMState, action: Array) -> RSSMState:
        """The recurrent state a step later; the latent is still the last one."""
        given = action.astype(jnp.float32)
        if self.num_actions is not None:
            given = jax.nn.one_hot(action, self.num_actions)
        latent = state.latent.reshape(len(given), -1)
        x = nn.silu(self.recurrent_input(jnp.concatenate([latent, given], -1)))
        gates = jnp.concatenate([x.astype(jnp.float32), state.hidden], -1)
        gates = self.gates(gates).astype(jnp.float32)
        reset, candidate, update = jnp.split(gates, 3, -1)
        candidate = nn.tanh(nn.sigmoid(reset) * candidate)
        update = nn.sigmoid(update - 1)  # remembers at the start
        hidden = update * candidate + (1 - update) * state.hidden
        return dataclasses.replace(state, hidden=hidden)

    def _prior(self, hidden: Array) -> Float[Array, "batch group class"]:
        return self._log_probs(self.prior_output(nn.silu(self.prior_hidden(hidden))))

    def _log_probs(self, logits: Array) -> Float[Array, "batch group class"]:
        logits = logits.astype(jnp.float32).reshape(-1, self.groups, self.classes)
        even = self.uniform / self.classes
        return jnp.log((1 - self.uniform) * jax.nn.softmax(logits) + even)

    def _drawn(self, state: RSSMState, log_probs: Array) -> RSSMState:
        """The state with a latent of these classes; gradients pass straight through."""
        keys = prng.fold_in(state.keys, state.step)
        which = jax.vmap(jax.random.categorical)(keys, log_probs)
        probs = jnp.exp(log_probs)
        latent = jax.nn.one_hot(which, self.classes)
        latent = latent + (probs - jax.lax.stop_gradient(probs))
        return dataclasses.replace(state, latent=latent, step=state.step + 1)

    def _check_frames(self, frames: Array) -> None:
        size = (self.image_size, self.image_size, self.channels)
        if frames.shape[-3:] != size:
            raise ValueError(
                f"frames have shape {frames.shape}; the network's are "
                f"[..., {', '.join(map(str, size))}]."
            )


def _features(state: RSSMState) -> Float[Array, "batch feature"]:
    flat = state.latent.reshape(len(state.hidden), -1)
    return jnp.concatenate([state.hidden, flat], -1)
