"""Diffusion transformer of frames that have a noise level each."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from tmdjax.core import prng
from tmdjax.core.checks import check_count, check_range
from tmdjax.core.types import Array, ArrayLike, Float, Int
from tmdjax.models.images.dit import AdaptiveBlock, AdaptiveOutput
from tmdjax.models.layers import (
    Dense,
    TimeEmbedding,
    check_ids,
    check_transformer,
    patchify,
    position_embedding_2d,
    rows_of,
    unpatchify,
)
from tmdjax.models.stack import Stacked, StackedNetwork


@struct.dataclass
class ForcingState:
    """The frames that a :class:`ForcingDiT` still sees, the latest last.

    Attributes:
        frames: [batch, frame, height, width, channel].
        actions: that led to them, int [batch, frame, ...].
        known: bool [frame]; the others were not there yet, or are to be predicted.
        keys: [batch], of the samples' noise.
        step: predictions made so far, int32.
    """

    frames: Any
    actions: Any
    known: Any
    keys: Any
    step: Any


class ForcingDiT(StackedNetwork):
    """Velocity network of short videos, and a world model that samples frame by frame.

    Every frame has a time of its own (diffusion forcing), so that frames which are
    known, at a time near 0, condition those that are drawn, and a frame at time 1 is
    as good as absent. A prediction walks the last frame of the window from noise to
    data under history guidance: v(no history) + w (v(history) - v(no history)). What
    has left the window is forgotten.

    It keeps the protocol of world models, see :class:`tmdjax.models.TorusMap`; its
    ``start`` needs keys. Frames of the protocol lie in [0, 1], those of the velocity in
    [-1, 1].

    Attributes:
        image_size: height and width of a frame.
        frames: of the window, at least 2.
        patch_size: side of a patch, a divisor of ``image_size``.
        hidden: width, a multiple of 4 and of ``heads``.
        depth: number of blocks.
        heads: attention heads.
        mlp_ratio: width of the MLP over ``hidden``; the product is rounded down.
        channels: of a frame.
        num_actions: actions are codes in [0, num_actions); None: integers (x, y).
        steps: Euler steps a predicted frame.
        history_guidance: w, at least 0; 1 is the conditional velocity alone, at half
            the cost.
        stabilisation: time in [0, 1) that known frames are noised to and said to have,
            so that small errors of its own frames look familiar.
        recipe: GEMM recipe of every dense layer; of an 8-bit one as in
            :class:`tmdjax.models.DiT`.
        remat: recompute each block in the backward pass.
        attention_implementation: see :func:`tmdjax.models.attention`.

    References:
        History-guided video diffusion, arXiv 2502.06764; diffusion forcing, arXiv
        2407.01392.
    """

    image_size: int
    frames: int = 8
    patch_size: int = 2
    hidden: int = 64
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 4.0
    channels: int = 1
    num_actions: int | None = None
    steps: int = 8
    history_guidance: float = 1.5
    stabilisation: float = 0.02
    recipe: Any = "fp32"
    remat: bool = True
    attention_implementation: str = "auto"

    def __post_init__(self):
        sizes = ("image_size", "depth", "channels", "steps", "num_actions")
        check_transformer(self, *sizes)
        check_count("frames", self.frames, 2)
        check_range("history_guidance", self.history_guidance, 0, open_high=True)
        check_range("stabilisation", self.stabilisation, 0, 1, open_high=True)
        super().__post_init__()

    def setup(self):
        """Declares the layers."""
        wide = self.recipe.unquantised
        self.patch_embedding = Dense(self.hidden, wide)
        self.time_embedding = TimeEmbedding(self.hidden, recipe=self.recipe)
        if self.num_actions is None:
            self.action_projection = Dense(self.hidden, wide)
        else:
            shape, normal = (
                (self.num_actions, self.hidden),
                nn.initializers.normal(0.02),
            )
            self.action_codes = self.param("action_codes", normal, shape, jnp.float32)
        self.stack = self.param("blocks", self._init_stack)
        self.final = AdaptiveOutput(wide)

    def _blocks(self) -> Stacked:
        block = AdaptiveBlock(
            self.heads,
            int(self.hidden * self.mlp_ratio),
            self.recipe,
            self.attention_implementation,
            parent=None,
        )
        return Stacked(block, self.depth, self.remat)

    def _init_stack(self, key: Array) -> Any:
        h = jnp.zeros((1, 1, self.hidden), self.recipe.dtype)
        c = {"modulation": jnp.zeros((1, 1, self.hidden))}
        return self._blocks().init(key, h, c)

    def __call__(
        self,
        x: Float[Array, "batch frame height width channel"],
        t: Float[Array, "batch frame"],
        actions: Int[Array, "batch frame ..."],
    ) -> Float[Array, "batch frame height width channel"]:
        """Velocity of frames at times of their own.

        Args:
            x: frames, as many as the window has or fewer; noise at t = 1, data in
                [-1, 1] at t = 0.
            t: in [0, 1].
            actions: that led to the frames: codes [batch, frame], or vectors.

        Returns:
            float32, of the shape of x.

        Raises:
            ValueError: frames of another size than the network's, or times or actions
                of another number.
        """
        size = (self.image_size, self.image_size, self.channels)
        if x.ndim != 5 or x.shape[2:] != size:
            raise ValueError(
                f"frames have shape {x.shape}; the network's are "
                f"[batch, frame, {', '.join(map(str, size))}]."
            )
        batch, frames = x.shape[:2]
        if t.shape != (batch, frames) or actions.shape[:2] != (batch, frames):
            raise ValueError(
                f"times have shape {t.shape} and actions {actions.shape}; give one a "
                f"frame, [batch, frame] = ({batch}, {frames})."
            )
        h, c = self._embed(x, t, actions)
        h, _ = self.blocks(h, c)
        area = self.patch_size**2
        y = self.final(h, c["modulation"], area * self.channels).astype(jnp.float32)
        y = y.reshape(batch * frames, -1, area * self.channels)
        return unpatchify(y, self.patch_size, *size[:2]).reshape(x.shape)

    def _embed(self, x: Array, t: Array, actions: Array) -> tuple[Array, Mapping]:
        (batch, frames), rows = t.shape, self.image_size // self.patch_size
        patches = patchify(x.reshape(-1, *x.shape[2:]), self.patch_size)
        h = self.patch_embedding(patches).reshape(batch, frames, rows**2, self.hidden)
        h = h + position_embedding_2d(rows, rows, self.hidden)
        h = h + position_embedding_2d(frames, 1, self.hidden)[:, None]
        level = self.time_embedding(t.reshape(-1)).reshape(batch, frames, self.hidden)
        if self.num_actions is None:
            done = self.action_projection(actions.astype(self.recipe.dtype))
        else:
            done = rows_of(self.action_codes, actions)
        level = level.astype(jnp.float32) + done.astype(jnp.float32)
        c = {"modulation": jnp.repeat(level, rows**2, 1)}
        return h.reshape(batch, -1, self.hidden).astype(self.recipe.dtype), c

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
    ) -> ForcingState:
        """The state before the first frame.

        Args:
            frame: of the shape of all that follow.
            keys: [batch], of the samples' noise.

        Raises:
            ValueError: no keys.
        """
        if keys is None:
            raise ValueError("a model that draws its frames needs keys [batch].")
        batch, size = frame.shape[0], () if self.num_actions else (2,)
        return ForcingState(
            frames=jnp.zeros((batch, self.frames, *frame.shape[1:]), frame.dtype),
            actions=jnp.zeros((batch, self.frames, *size), jnp.int32),
            known=jnp.zeros(self.frames, bool),
            keys=keys,
            step=jnp.int32(0),
        )

    def observe(
        self,
        state: ForcingState,
        frame: Float[Array, "batch height width channel"],
        action: Int[Array, "batch ..."],
    ) -> ForcingState:
        """The state after a frame in [0, 1] and the action that led to it."""
        return self.feed(_moved_on(state, action), frame)

    def predict(
        self, state: ForcingState, action: Int[Array, "batch ..."]
    ) -> tuple[ForcingState, Float[Array, "batch height width channel"]]:
        """The state a step later, and a frame drawn there, of any value.

        Args:
            state: of :meth:`observe` or :meth:`feed`.
            action: that leads to the predicted frame.
        """
        state = _moved_on(state, action)
        keys = prng.split(prng.fold_in(state.keys, state.step))
        history = 2 * state.frames[:, :-1] - 1
        blank = prng.normal(keys[:, 0], history.shape[1:])
        level = jnp.where(state.known[:-1], self.stabilisation, 1.0)
        wide = level[:, None, None, None]
        seen = jnp.where(wide < 1, (1 - wide) * history + wide * blank, blank)
        x = prng.normal(keys[:, 1], history.shape[2:])
        pasts = [(seen, level), (blank, jnp.ones_like(level))]
        if self.history_guidance == 1:
            pasts = pasts[:1]
        actions = jnp.concatenate([state.actions] * len(pasts))

        network, variables = self.unbind()  # a bound one cannot stand in a scan

        def velocity(x: Array, t: Array) -> Array:
            inputs = [jnp.concatenate([past, x[:, None]], 1) for past, _ in pasts]
            times = [jnp.append(level, t) for _, level in pasts]
            times = [jnp.broadcast_to(row, (x.shape[0], self.frames)) for row in times]
            given = jnp.concatenate(inputs), jnp.concatenate(times), actions
            v = jnp.asarray(network.apply(variables, *given))[:, -1]
            if len(pasts) == 1:
                return v
            with_history, without = jnp.split(v, 2)
            return without + self.history_guidance * (with_history - without)

        def euler(x: Array, t: Array) -> tuple[Array, None]:
            return x - velocity(x, t) / self.steps, None

        x, _ = jax.lax.scan(euler, x, jnp.linspace(1, 1 / self.steps, self.steps))
        state = dataclasses.replace(state, step=state.step + 1)
        return state, (x + 1) / 2

    def feed(
        self, state: ForcingState, frame: Float[Array, "batch height width channel"]
    ) -> ForcingState:
        """The state once the last frame of the window is known, or believed."""
        frames = state.frames.at[:, -1].set(frame)
        known = state.known.at[-1].set(True)
        return dataclasses.replace(state, frames=frames, known=known)


def prepare_actions(
    actions: Int[ArrayLike, "batch time ..."], num_actions: int | None
) -> Int[Array, "batch time ..."]:
    """Actions of a video, the first of them idle: no frame precedes it.

    Idle are (0, 0) and the last code, which is rest where an agent turns and walks.

    Args:
        actions: that led to its frames: codes [batch, time], or integers (x, y),
            [batch, time, 2].
        num_actions: number of codes; None for (x, y).

    Raises:
        TypeError: actions that are no integers.
        ValueError: actions of another shape, or concrete codes out of range.
    """
    if not jnp.issubdtype(jnp.result_type(actions), jnp.integer):
        raise TypeError(f"actions are {jnp.result_type(actions)}; give integers.")
    wanted = (2,) if num_actions is None else ()
    if jnp.ndim(actions) != 2 + len(wanted) or jnp.shape(actions)[2:] != wanted:
        given = "(x, y), [batch, time, 2]" if wanted else "codes, [batch, time]"
        raise ValueError(f"actions have shape {jnp.shape(actions)}; give {given}.")
    if num_actions is not None:
        check_ids("actions", actions, num_actions)
    idle = 0 if num_actions is None else num_actions - 1
    return jnp.asarray(actions).at[:, 0].set(idle)


def _moved_on(state: ForcingState, action: Array) -> ForcingState:
    """The window a frame later; the new frame is not known."""
    return dataclasses.replace(
        state,
        frames=jnp.roll(state.frames, -1, 1),
        actions=jnp.concatenate([state.actions[:, 1:], action[:, None]], 1),
        known=jnp.append(state.known[1:], False),
    )
