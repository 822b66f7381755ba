"""A latent map of a torus that an agent sees through a window which it moves."""

import warnings
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from tmdjax.core.checks import check_batch, check_choice, check_count
from tmdjax.core.types import Array, ArrayLike, Float, Int
from tmdjax.models.flow_equivariant import convolution
from tmdjax.models.flow_equivariant.group_actions import as_velocities, shift
from tmdjax.models.layers import check_attributes

SELF_MOTION = ("shift", "none", "concat")
FEEDBACK = ("stale", "none")
MEMORY_INIT = ("uniform", "identity")

# PyTorch's default: uniform up to 1 / sqrt(inputs)
_UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _near_identity(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """The identity, and a tenth of what 'uniform' draws."""
    middle, channels = shape[0] // 2, np.arange(shape[3])
    kernel = _UNIFORM(key, shape, dtype) / 10
    return kernel.at[middle, middle, channels, channels].add(1)


@struct.dataclass
class TorusState:
    """What a :class:`TorusMap` remembers.

    Attributes:
        map: float32, or float64 of frames in float64, [batch, velocity, row, column,
            channel], at least 0.
        frame: the frame seen or predicted last, [batch, window, window, channel], of
            the map's dtype.
    """

    map: Any
    frame: Any


class TorusMap(nn.Module):
    """Recurrent network that predicts what a window on a moving world will show.

    Its map of the world has a copy for each velocity that things may have, which
    slides by that velocity in every step; the whole map moves against the window's
    motion. Then h = relu(W * h + U * frame), where * are convolutions without bias,
    shared by the copies, and the frame lies in the map's upper left corner. A frame is
    read there: the largest of the copies, convolution, relu, convolution. What has left
    the window moves on in the map.

    It keeps the protocol of world models: ``prepare`` checks the actions of a video,
    ``start`` makes the state before its first frame, ``observe`` takes in a frame,
    ``predict`` says the next one, and ``feed`` tells what that was or is taken to be.

    Attributes:
        world: side of the torus, the true period of the data.
        window: side of frames, at most ``world``.
        hidden: channels of the map.
        velocities: of the copies: pairs (x, y), or r for all of {-r .. r}^2; 0 is a
            network without velocity channels.
        self_motion: 'shift' moves the map against the agent; 'none' ignores actions;
            'concat' gives them to the network as two constant planes beside the frame
            and beside the map.
        channels: of a frame.
        kernel_size: of all convolutions, odd.
        decoder_layers: hidden convolutions of the reader.
        feedback: 'stale' writes the last frame before the next one is read, where it
            is a step old (the published network does); 'none' writes nothing.
        window_padding: beyond the edges of a window lie 'zeros', or it is taken as
            'circular', as the published network does; None is 'circular' where the
            window is the whole world and 'zeros' elsewhere.
        memory_init: how W starts: 'uniform', in +-1 / sqrt(its inputs), as the
            published network, which forgets over half of the map in every step until
            it has learned not to; 'identity', which adds a tenth of that to the
            identity and keeps the map from the first update on.
        implementation: of :func:`tmdjax.models.flow_equivariant.convolution.convolve`.

    References:
        arXiv 2601.01075 (its 2-D model) and 2507.14793. Its parameters, 74,880 at 64
        channels, do not depend on the velocities. Recurrent networks of relu that start
        at the identity: Le et al., arXiv 1504.00941.
    """

    world: int
    window: int
    hidden: int = 64
    velocities: Any = 1
    self_motion: str = "shift"
    channels: int = 1
    kernel_size: int = 3
    decoder_layers: int = 1
    feedback: str = "stale"
    window_padding: str | None = None
    memory_init: str = "uniform"
    implementation: str = "auto"

    def __post_init__(self):
        check_attributes(self, "world", "window", "hidden", "channels", "kernel_size")
        check_count("decoder_layers", self.decoder_layers, 0)
        if self.window > self.world:
            raise ValueError(
                f"window={self.window} is larger than world={self.world}; it is a part "
                f"of the map."
            )
        if self.kernel_size % 2 == 0 or self.kernel_size > 2 * self.window + 1:
            raise ValueError(
                f"kernel_size={self.kernel_size} must be odd and at most "
                f"2 window + 1 = {2 * self.window + 1}."
            )
        check_choice("self_motion", self.self_motion, SELF_MOTION)
        check_choice("feedback", self.feedback, FEEDBACK)
        check_choice("memory_init", self.memory_init, MEMORY_INIT)
        if self.window_padding is not None:
            check_choice("window_padding", self.window_padding, convolution.PADDINGS)
        convolution.choose(self.implementation)
        object.__setattr__(self, "velocities", as_velocities(self.velocities))
        super().__post_init__()

    def setup(self):
        """Declares the kernels."""
        planes = 2 * (self.self_motion == "concat")

        def kernel(
            name: str, inputs: int, outputs: int, start: Any = _UNIFORM
        ) -> Array:
            shape = (self.kernel_size, self.kernel_size, inputs, outputs)
            return self.param(name, start, shape, jnp.float32)

        start = _near_identity if self.memory_init == "identity" else _UNIFORM
        self.encoder = kernel("encoder", self.channels + planes, self.hidden)
        self.memory = kernel("memory", self.hidden + planes, self.hidden, start)
        self.decoder = [
            kernel(f"decoder_{layer}", self.hidden, self.hidden)
            for layer in range(self.decoder_layers)
        ] + [kernel("decoder_out", self.hidden, self.channels)]

    def __call__(
        self,
        frame: Float[Array, "batch window window channel"],
        action: Int[Array, "batch 2"],
    ) -> Float[Array, "batch window window channel"]:
        """The frame after one that is seen, if the agent moves by an action."""
        state = self.observe(self.start(frame), frame, jnp.zeros_like(action))
        return self.predict(state, action)[1]

    def prepare(
        self, actions: Int[ArrayLike, "batch time 2"]
    ) -> Int[Array, "batch time 2"]:
        """Actions of a video, whose first one (nothing was seen before it) is 0.

        Where actions are concrete and reach around the whole torus, a warning says so,
        once.

        Raises:
            TypeError: actions that are no integers.
            ValueError: actions of another shape.
        """
        _check_integers(actions)
        if jnp.ndim(actions) != 3 or jnp.shape(actions)[2] != 2:
            raise ValueError(
                f"actions have shape {jnp.shape(actions)}; give (x, y) of every frame, "
                f"[batch, time, 2]."
            )
        if not isinstance(actions, jax.core.Tracer):
            most = int(np.abs(actions).max(initial=0))
            if most >= self.world:
                warnings.warn(
                    f"actions of up to {most} pixels lead around a torus of "
                    f"{self.world}; is that meant?",
                    stacklevel=2,
                )
        return jnp.asarray(actions).at[:, 0].set(0)

    def start(
        self, frame: Float[Array, "batch window window channel"], keys: Any = None
    ) -> TorusState:
        """The state that knows nothing, for frames of that shape; no keys are used.

        Whatever the dtype of frames, a map has at least 32 bits: it is added to in
        every step, and in 16 bits rounding would add up over a long rollout.

        Raises:
            ValueError: frames of another size than the window.
        """
        self._check_frame(frame)
        shape = (len(self.velocities), self.world, self.world, self.hidden)
        dtype = jnp.promote_types(frame.dtype, jnp.float32)
        maps = jnp.zeros((frame.shape[0], *shape), dtype)
        return TorusState(map=maps, frame=jnp.zeros(frame.shape, dtype))

    def observe(
        self,
        state: TorusState,
        frame: Float[Array, "batch window window channel"],
        action: Int[Array, "batch 2"],
    ) -> TorusState:
        """The state after a frame.

        Args:
            state: before it.
            frame: in [0, 1] as a rule.
            action: the window's motion (x, y) from the frame before to this one, in
                whole pixels of any size.

        Raises:
            TypeError: actions that are no integers.
            ValueError: a frame or action of another shape.
        """
        self._check_frame(frame)
        frame = jnp.asarray(frame, state.map.dtype)
        return TorusState(map=self._advance(state.map, frame, action), frame=frame)

    def predict(
        self, state: TorusState, action: Int[Array, "batch 2"]
    ) -> tuple[TorusState, Float[Array, "batch window window channel"]]:
        """The state a step later, and the frame there; linear, so of any value.

        Args:
            state: of :meth:`observe`, or of :meth:`feed` after a prediction.
            action: the window's motion (x, y) to the predicted frame.

        Raises:
            TypeError: actions that are no integers.
            ValueError: an action of another shape.
        """
        frame = state.frame if self.feedback == "stale" else None
        maps = self._advance(state.map, frame, action)
        return TorusState(map=maps, frame=state.frame), self.read(maps)

    def feed(
        self, state: TorusState, frame: Float[Array, "batch window window channel"]
    ) -> TorusState:
        """The state once the predicted frame is known, or the prediction is believed.

        The map is as it was: the frame is written with the next step ('stale').
        """
        self._check_frame(frame)
        return TorusState(map=state.map, frame=jnp.asarray(frame, state.map.dtype))

    def read(
        self, maps: Float[Array, "batch velocity row column hidden"]
    ) -> Float[Array, "batch window window channel"]:
        """What a map shows in the window."""
        h = maps[:, :, : self.window, : self.window].max(1)
        for kernel in self.decoder[:-1]:
            h = nn.relu(self._convolve_window(h, kernel))
        return self._convolve_window(h, self.decoder[-1])

    def _advance(self, maps: Array, frame: Array | None, action: Array) -> Array:
        action = self._check_action(action, maps.shape[0])
        steps = jnp.array(self.velocities, jnp.int32)
        if self.self_motion == "shift":
            steps = steps - action[:, None]
        maps = shift(maps, steps)
        h = convolution.convolve(
            self._beside(maps, action), self.memory, implementation=self.implementation
        )
        if frame is not None:
            seen = self._convolve_window(self._beside(frame, action), self.encoder)
            room = (0, self.world - self.window)
            h = h + jnp.pad(seen, ((0, 0), room, room, (0, 0)))[:, None]
        return nn.relu(h)

    def _beside(self, x: Array, action: Array) -> Array:
        if self.self_motion != "concat":
            return x
        action = action.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 2), 2)
        planes = jnp.broadcast_to(action, (*x.shape[:-1], 2))
        return jnp.concatenate([x, planes], -1)

    def _convolve_window(self, x: Array, kernel: Array) -> Array:
        whole = "circular" if self.window == self.world else "zeros"
        return convolution.convolve(
            x,
            kernel,
            padding=self.window_padding or whole,
            implementation=self.implementation,
        )

    def _check_frame(self, frame: Array) -> None:
        size = (self.window, self.window, self.channels)
        if frame.ndim != 4 or frame.shape[1:] != size:
            raise ValueError(
                f"a frame has shape {frame.shape}; the network's window is "
                f"[batch, {', '.join(map(str, size))}]."
            )

    def _check_action(self, action: Any, batch: int) -> Array:
        _check_integers(action)
        check_batch("action", action, batch)
        if jnp.shape(action) != (batch, 2):
            raise ValueError(
                f"actions have shape {jnp.shape(action)}; give (x, y), [batch, 2]."
            )
        return jnp.asarray(action)


def _check_integers(actions: Any) -> None:
    if not jnp.issubdtype(jnp.result_type(actions), jnp.integer):
        raise TypeError(
            f"actions are {jnp.result_type(actions)}; the window moves by whole "
            f"pixels: give integers (x, y)."
        )
