"""A latent map around an agent that sees a part of the world in perspective."""

import functools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from tmdjax.core.checks import check_batch, check_choice
from tmdjax.core.types import Array, ArrayLike, Float, Int
from tmdjax.models.flow_equivariant import convolution
from tmdjax.models.flow_equivariant.group_actions import (
    CROSS,
    REST,
    action_tables,
    as_velocities,
    field_of_view,
    flow_table,
    permute,
)
from tmdjax.models.layers import (
    Dense,
    MultiHeadAttention,
    check_transformer,
    exact_gelu,
    patchify,
    position_embedding_2d,
    rows_of,
    unpatchify,
)
from tmdjax.models.stack import Stacked
from tmdjax.models.videos.layers import LayerNorm
from tmdjax.quant import Recipe

ACTIONS = 5
SELF_MOTION = ("move", "token")
MIXING = ("grouped", "depthwise", "none")
POOLING = ("max", "flat")

_EPSILON = 1e-5


class _Writer(nn.Module):
    """Self-attention and MLP, each after a layer norm."""

    heads: int
    mlp_width: int
    recipe: Recipe
    implementation: str

    @nn.compact
    def __call__(self, h: Array, c: Any) -> Array:
        x = LayerNorm(_EPSILON, name="norm")(h).astype(h.dtype)
        h = h + MultiHeadAttention(
            self.heads, self.recipe, self.implementation, name="attention"
        )(x, x)
        x = LayerNorm(_EPSILON, name="mlp_norm")(h).astype(h.dtype)
        x = Dense(self.mlp_width, self.recipe, name="mlp_in")(x)
        x = exact_gelu(x)
        return h + Dense(h.shape[-1], self.recipe, name="mlp_out")(x)


class _Reader(nn.Module):
    """Self-attention, attention to the map, MLP, each after a layer norm.

    What attends to the map passes through dense layers of its own before the
    projections of the attention, as in the published network.
    """

    heads: int
    mlp_width: int
    recipe: Recipe
    implementation: str

    @nn.compact
    def __call__(self, h: Array, c: Array) -> Array:
        def norm(x: Array, name: str) -> Array:
            return LayerNorm(_EPSILON, name=name)(x).astype(h.dtype)

        def attend(name: str) -> MultiHeadAttention:
            return MultiHeadAttention(
                self.heads, self.recipe, self.implementation, name=name
            )

        x = norm(h, "norm")
        h = h + attend("attention")(x, x)
        x, memory = norm(h, "query_norm"), norm(c, "memory_norm")
        query, key, value = (
            Dense(h.shape[-1], self.recipe, name=name)(y)
            for name, y in (("query", x), ("key", memory), ("value", memory))
        )
        h = h + attend("map_attention")(query, key, values=value)
        x = Dense(self.mlp_width, self.recipe, name="mlp_in")(norm(h, "mlp_norm"))
        x = exact_gelu(x)
        return h + Dense(h.shape[-1], self.recipe, name="mlp_out")(x)


def identity_kernel(
    mixing: str, copies: int, hidden: int, kept: int
) -> Float[Array, "..."]:
    """The kernel of a mixing that keeps some features as they are.

    Args:
        mixing: 'grouped' or 'depthwise'.
        copies: velocity channels.
        hidden: features.
        kept: how many of them; the others become zero.

    Returns:
        float32 [3, 3, copies, copies, hidden] for 'grouped' (row, column, from, to),
        [3, 3, 3, hidden] for 'depthwise' (velocity, row, column).
    """
    ones = np.arange(hidden) < kept
    if mixing == "depthwise":
        kernel = np.zeros((3, 3, 3, hidden), np.float32)
        kernel[1, 1, 1] = ones
    else:
        kernel = np.zeros((3, 3, copies, copies, hidden), np.float32)
        kernel[1, 1, np.arange(copies), np.arange(copies)] = ones
    return jnp.asarray(kernel)


@struct.dataclass
class EgocentricState:
    """What an :class:`EgocentricMap` remembers.

    Attributes:
        map: float32 [batch, velocity, row, column, hidden], the agent in the middle,
            looking along increasing columns.
        action: int32 [batch], the last one.
    """

    map: Any
    action: Any


class EgocentricMap(nn.Module):
    """Recurrent network that predicts what an agent will see as it walks and turns.

    Its map has a copy for each velocity that things may have. In every step each copy
    slides by its velocity, the map moves and turns against the agent (a thing that
    moved right moves down after a left turn, in another copy), and a convolution may
    move content between copies: things bounce off walls. A transformer writes a frame
    into the cells in view through a gate; another reads the next frame from there.

    The convolution is not itself equivariant to turns, once it is trained; nor is it
    bounded: the map out of view passes through it in every step, and grows without end
    where training has left it a gain above 1.

    It keeps the protocol of world models, see :class:`tmdjax.models.TorusMap`; unlike
    there, the frame that is fed back is written at once, in the step that it shows.

    Attributes:
        image_size: height and width of a frame.
        patch_size: side of its patches, a divisor.
        world: how far the map reaches in every direction; it has 2 world + 1 rows and
            columns, and wraps around.
        hidden: width of everything, a multiple of 4 and of ``heads``.
        depth: blocks of the writer.
        decoder_depth: blocks of the reader.
        heads: of attention.
        mlp_ratio: width of MLPs over ``hidden``; the product is rounded down.
        velocities: of the copies, pairs (x, y) closed under turns by 90 degrees, or r
            for all of {-r .. r}^2; 0 is a network without velocity channels.
        self_motion: 'move' moves the map against the agent; 'token' leaves it and gives
            the action as a token to writer and reader.
        mixing: between copies: 'grouped', every feature alone, 3 x 3 and all copies;
            'depthwise', 3 x 3 and neighbouring copies of the list; 'none'. Identity at
            the start.
        compat_init: starts the mixing as the published code does, where the first
            feature alone is kept and the rest of the map forgotten in every step.
        pooling: what the reader attends to: 'max', the largest of the copies, or
            'flat', all of them.
        velocity_embedding: whether a learned vector tells a copy.
        view_degrees: angle of the view, in (0, 180].
        channels: of a frame.
        recipe: GEMM recipe of every dense layer; the map is float32 under any.
        remat: recompute each block in the backward pass.
        attention_implementation: see :func:`tmdjax.models.attention`.
        implementation: of the grouped mixing, as of
            :func:`tmdjax.models.flow_equivariant.convolution.convolve`.

    References:
        arXiv 2601.01075 (its 3-D model). The defaults are the published "10M", of
        12,830,976 parameters.
    """

    image_size: int = 128
    patch_size: int = 16
    world: int = 16
    hidden: int = 256
    depth: int = 6
    decoder_depth: int = 6
    heads: int = 8
    mlp_ratio: float = 4.0
    velocities: Any = CROSS
    self_motion: str = "move"
    mixing: str = "grouped"
    compat_init: bool = False
    pooling: str = "max"
    velocity_embedding: bool = False
    view_degrees: float = 60.0
    channels: int = 3
    recipe: Any = "fp32"
    remat: bool = True
    attention_implementation: str = "auto"
    implementation: str = "auto"

    def __post_init__(self):
        sizes = ("image_size", "world", "channels", "depth", "decoder_depth")
        check_transformer(self, *sizes)
        check_choice("self_motion", self.self_motion, SELF_MOTION)
        check_choice("mixing", self.mixing, MIXING)
        check_choice("pooling", self.pooling, POOLING)
        convolution.choose(self.implementation)
        object.__setattr__(self, "velocities", as_velocities(self.velocities))
        action_tables(self.side, self.velocities)
        field_of_view(self.side, self.view_degrees)
        super().__post_init__()

    @property
    def side(self) -> int:
        """Rows and columns of the map."""
        return 2 * self.world + 1

    def setup(self):
        """Declares the layers."""
        normal = nn.initializers.normal(0.02)
        copies = len(self.velocities)
        if self.mixing != "none":
            kept = 1 if self.compat_init else self.hidden
            self.mixing_kernel = self.param(
                "mixing_kernel",
                lambda key: identity_kernel(self.mixing, copies, self.hidden, kept),
            )
        if self.velocity_embedding:
            shape = (copies, self.hidden)
            self.copy_codes = self.param("velocity", normal, shape, jnp.float32)
        if self.self_motion == "token":
            shape = (ACTIONS, self.hidden)
            self.action_codes = self.param("action", normal, shape, jnp.float32)
        self.patch_embedding = Dense(self.hidden, self.recipe)
        self.writer = self.param("writer", self._init_writer)
        self.writer_norm = LayerNorm(_EPSILON)
        self.gate = Dense(self.hidden, self.recipe)
        self.mask_token = self.param("mask_token", normal, (self.hidden,), jnp.float32)
        self.reader = self.param("reader", self._init_reader)
        self.reader_norm = LayerNorm(_EPSILON)
        self.patch_output = Dense(self.patch_size**2 * self.channels, self.recipe)

    def __call__(
        self,
        frame: Float[Array, "batch height width channel"],
        action: Int[Array, "batch"],
    ) -> Float[Array, "batch height width channel"]:
        """The frame after one that is seen, if the agent does an action."""
        state = self.observe(self.start(frame), frame, jnp.full_like(action, REST))
        return self.predict(state, action)[1]

    def prepare(
        self, actions: Int[ArrayLike, "batch time"]
    ) -> Int[Array, "batch time"]:
        """Actions of a video, whose first one (nothing was seen before it) is REST.

        Raises:
            TypeError: actions that are no integers.
            ValueError: actions of another shape; where they are concrete, a code
                outside 0 .. 4, with the row that has it.
        """
        if not jnp.issubdtype(jnp.result_type(actions), jnp.integer):
            raise TypeError(
                f"actions are {jnp.result_type(actions)}; give codes 0 (left), 1 "
                f"(right), 2 (forward), 3 (back) or 4 (rest)."
            )
        if jnp.ndim(actions) != 2:
            raise ValueError(
                f"actions have shape {jnp.shape(actions)}; give [batch, time]."
            )
        if not isinstance(actions, jax.core.Tracer):
            codes = np.asarray(actions)
            wrong = np.argwhere((codes < 0) | (codes >= ACTIONS))
            if wrong.size:
                row, time = (int(i) for i in wrong[0])
                raise ValueError(
                    f"the action of row {row} at time {time} is "
                    f"{codes[row, time]}; codes are 0 (left), 1 (right), 2 "
                    f"(forward), 3 (back) and 4 (rest)."
                )
        return jnp.asarray(actions).at[:, 0].set(REST)

    def start(
        self, frame: Float[Array, "batch height width channel"], keys: Any = None
    ) -> EgocentricState:
        """The state that knows nothing, for frames of that shape; no keys are used.

        Raises:
            ValueError: frames of another size than the network's.
        """
        self._check_frame(frame)
        shape = (len(self.velocities), self.side, self.side, self.hidden)
        return EgocentricState(
            map=jnp.zeros((frame.shape[0], *shape)),
            action=jnp.full(frame.shape[:1], REST, jnp.int32),
        )

    def observe(
        self,
        state: EgocentricState,
        frame: Float[Array, "batch height width channel"],
        action: Int[Array, "batch"],
    ) -> EgocentricState:
        """The state after a frame.

        Args:
            state: before it.
            frame: in [0, 1] as a rule.
            action: int [batch] that led to it: LEFT, RIGHT, FORWARD, BACK or REST of
                ``models.flow_equivariant.group_actions``, 0 .. 4. Another code makes
                the map NaN.

        Raises:
            TypeError: actions that are no integers.
            ValueError: a frame or action of another shape.
        """
        return self.feed(self._advance(state, action), frame)

    def predict(
        self, state: EgocentricState, action: Int[Array, "batch"]
    ) -> tuple[EgocentricState, Float[Array, "batch height width channel"]]:
        """The state a step later, and the frame there, float32 of any value.

        Args:
            state: of :meth:`observe` or :meth:`feed`.
            action: int [batch] in 0 .. 4 that leads to the predicted frame.

        Raises:
            TypeError: actions that are no integers.
            ValueError: an action of another shape.
        """
        state = self._advance(state, action)
        return state, self._read(state)

    def feed(
        self,
        state: EgocentricState,
        frame: Float[Array, "batch height width channel"],
    ) -> EgocentricState:
        """The state once a frame is written into the cells in view; others stay."""
        self._check_frame(frame)
        seen = self._seen(state.map)
        dtype = self.recipe.dtype
        rows = self.image_size // self.patch_size
        patches = self.patch_embedding(patchify(frame, self.patch_size))
        patches = patches + position_embedding_2d(rows, rows, self.hidden)
        memory = self._with_codes(seen)
        tokens = [memory.reshape(memory.shape[0], -1, self.hidden), patches]
        h = jnp.concatenate([*tokens, *self._action_token(state)], 1).astype(dtype)
        h, _ = self._stack(_Writer, self.depth).run(self.writer, h, None)
        h = self.writer_norm(h)[:, : tokens[0].shape[1]]
        new = h.reshape(seen.shape).astype(jnp.float32)
        gate = self.gate(jnp.concatenate([seen, new], -1)).astype(jnp.float32)
        gate = nn.sigmoid(gate)
        row, column = self._cells()
        written = (1 - gate) * seen + gate * new
        maps = state.map.at[:, :, row, column].set(written, unique_indices=True)
        return EgocentricState(map=maps, action=state.action)

    def mix(
        self, maps: Float[Array, "batch velocity row column hidden"]
    ) -> Float[Array, "batch velocity row column hidden"]:
        """Maps after the convolution between the copies of each feature."""
        if self.mixing == "none":
            return maps
        if self.mixing == "grouped":
            return convolution.mix_velocities(
                maps, self.mixing_kernel, self.implementation
            )
        around = [(0, 0)] + 3 * [(1, 1)] + [(0, 0)]
        x, (copies, rows, columns) = jnp.pad(maps, around, mode="wrap"), maps.shape[1:4]
        parts = [
            x[:, i : i + copies, j : j + rows, k : k + columns]
            * self.mixing_kernel[i, j, k]
            for i in range(3)
            for j in range(3)
            for k in range(3)
        ]
        return functools.reduce(jnp.add, parts)

    def _advance(self, state: EgocentricState, action: Any) -> EgocentricState:
        if not jnp.issubdtype(jnp.result_type(action), jnp.integer):
            raise TypeError(
                f"actions are {jnp.result_type(action)}; give integers in 0 .. 4."
            )
        check_batch("action", action, state.map.shape[0])
        if jnp.ndim(action) != 1:
            raise ValueError(
                f"actions have shape {jnp.shape(action)}; give one a row, [batch]."
            )
        action = jnp.asarray(action).astype(jnp.int32)
        flow = flow_table(self.side, self.velocities)
        if self.self_motion == "move":
            tables = flow[action_tables(self.side, self.velocities)]
        else:
            tables = np.broadcast_to(flow, (ACTIONS, flow.size))
        maps = self.mix(permute(state.map, tables, action))
        return EgocentricState(map=maps, action=action)

    def _read(self, state: EgocentricState) -> Array:
        memory = self._with_codes(self._seen(state.map))
        if self.pooling == "max":
            memory = memory.max(1)
        memory = memory.reshape(memory.shape[0], -1, self.hidden)
        memory = jnp.concatenate([memory, *self._action_token(state)], 1)
        rows = self.image_size // self.patch_size
        queries = self.mask_token + position_embedding_2d(rows, rows, self.hidden)
        h = jnp.broadcast_to(queries, (memory.shape[0], *queries.shape))
        dtype = self.recipe.dtype
        h, _ = self._stack(_Reader, self.decoder_depth).run(
            self.reader, h.astype(dtype), memory.astype(dtype)
        )
        patches = self.patch_output(self.reader_norm(h).astype(dtype))
        size = self.image_size
        return unpatchify(patches.astype(jnp.float32), self.patch_size, size, size)

    def _cells(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the cells in view."""
        row, column = np.nonzero(field_of_view(self.side, self.view_degrees))
        return row, column

    def _seen(self, maps: Array) -> Float[Array, "batch velocity cell hidden"]:
        row, column = self._cells()
        return maps[:, :, row, column]

    def _with_codes(self, seen: Array) -> Array:
        """Cells in view, with their places and, on request, velocities."""
        row, column = self._cells()
        codes = position_embedding_2d(self.side, self.side, self.hidden)
        seen = seen + codes.reshape(self.side, self.side, -1)[row, column]
        return seen + self.copy_codes[:, None] if self.velocity_embedding else seen

    def _action_token(self, state: EgocentricState) -> list[Array]:
        if self.self_motion != "token":
            return []
        return [rows_of(self.action_codes, state.action)[:, None]]

    def _stack(self, kind: Any, depth: int) -> Stacked:
        block = kind(
            self.heads,
            int(self.hidden * self.mlp_ratio),
            self.recipe,
            self.attention_implementation,
            parent=None,
        )
        return Stacked(block, depth, self.remat)

    def _init_writer(self, key: Array) -> Any:
        h = jnp.zeros((1, 1, self.hidden), self.recipe.dtype)
        return self._stack(_Writer, self.depth).init(key, h, None)

    def _init_reader(self, key: Array) -> Any:
        h = jnp.zeros((1, 1, self.hidden), self.recipe.dtype)
        return self._stack(_Reader, self.decoder_depth).init(key, h, h)

    def _check_frame(self, frame: Array) -> None:
        size = (self.image_size, self.image_size, self.channels)
        if frame.ndim != 4 or frame.shape[1:] != size:
            raise ValueError(
                f"a frame has shape {frame.shape}; the network's is "
                f"[batch, {', '.join(map(str, size))}]."
            )
