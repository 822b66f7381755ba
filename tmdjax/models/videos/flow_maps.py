"""Video DiTs as flow maps: two times instead of one, or a small head on a backbone.

Both keep a pretrained network whole under the name ``shared``, so its parameters go in
and come out without renaming.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tmdjax.core import trees
from tmdjax.core.checks import check_choice, check_time, first_few
from tmdjax.core.conventions import expand_time
from tmdjax.core.types import Array, Data, Float, Params
from tmdjax.flows.flow_maps import check_order
from tmdjax.models.layers import (
    Dense,
    check_attributes,
    layer_norm,
    timestep_embedding,
)
from tmdjax.models.videos.dit import VideoDiT, floating_time
from tmdjax.quant import Recipe

FUSIONS = ("gated", "concat")

GATE_SCALE = 10.0
"""The gate of a fusion over the parameter that holds it."""

Features = Mapping[str, Any]
"""What a backbone hands to its head: 'hidden', and the condition's text and tables."""

# what a VideoDiT computes does not hang on these, up to rounding
_FREE = ("name", "parent", "recipe", "remat", "attention_implementation")

_ZEROS = nn.initializers.zeros


class IntervalEmbedding(nn.Module):
    """E_d, an embedding of the length s - r of a jump, zero at the start.

    It is added to the time embedding and, projected, to the six modulation vectors.
    Only the last layer and the projection start at zero: were the first one zero
    too, every gradient that depends on s - r would be zero for ever.

    Attributes:
        features: width of the network.
        frequency_dim: width of the sinusoids, even.
        time_scale: what s - r in [0, 1] is multiplied by.
    Computed in float32, as every embedding of times.

    References:
        arXiv 2601.09881, appendix A.1.
    """

    features: int
    frequency_dim: int = 256
    time_scale: float = 1000.0

    @nn.compact
    def __call__(self, interval: Float[Array, "batch"]) -> tuple[Array, Array]:
        """Maps [batch] to float32 [batch, features] and [batch, 6, features]."""
        y = timestep_embedding(interval, self.frequency_dim, time_scale=self.time_scale)
        y = nn.silu(Dense(self.features, name="hidden")(y))
        time = Dense(self.features, kernel_init=_ZEROS, name="out")(y)
        modulation = Dense(6 * self.features, kernel_init=_ZEROS, name="projection")(
            nn.silu(time)
        )
        shape = (interval.shape[0], 6, self.features)
        return time.astype(jnp.float32), modulation.astype(jnp.float32).reshape(shape)


class Fusion(nn.Module):
    """Joins the head's own state to the backbone's feature; at the start, the feature.

    'gated': q <- q + gate MLP(modulated LN(q)), an adaptive block with the feed-forward
    part of the shared modulation and a table of its own, then m + a (q - m) with one
    learnable number a. The paper writes a as a sigmoid; here a is GATE_SCALE times the
    parameter, so that it may start at exactly 0 with a gradient, and moves although it
    is one number under a network's learning rate: at 1e-5, 3,000 steps of Adam move the
    parameter by 0.03 at most.
    'concat': a linear map of [m, q], the identity on m and N(0, 0.01^2) on q.

    Attributes:
        kind: 'gated' or 'concat'.
        mlp_width: of the adaptive block.
        initial_gate: a at the start.
        recipe: GEMM recipe.

    References:
        arXiv 2601.09881, sec. 3.1, appendices A.1 and B.3.
    """

    kind: str
    mlp_width: int
    initial_gate: float
    recipe: Recipe

    @nn.compact
    def __call__(self, m: Array, q: Array, modulation: Array) -> Array:
        """Joins m and q [batch, position, width]; modulation [batch, 6, width]."""
        width = m.shape[-1]
        if self.kind == "concat":

            def on_feature(key: Any, shape: Any, dtype: Any) -> Array:
                noise = 0.01 * nn.initializers.normal(1.0)(key, shape, dtype)
                return noise.at[:width].set(jnp.eye(width, dtype=dtype))

            joined = jnp.concatenate([m, q.astype(m.dtype)], -1)
            return Dense(width, self.recipe, kernel_init=on_feature, name="joined")(
                joined
            ).astype(m.dtype)
        table = self.param(
            "table", nn.initializers.normal(width**-0.5), (3, width), jnp.float32
        )
        rows = (modulation[:, 3:] + table)[:, :, None]
        shift, scale, gate = rows[:, 0], rows[:, 1], rows[:, 2]
        y = layer_norm(q) * (1 + scale) + shift
        y = y.astype(self.recipe.dtype)
        y = Dense(self.mlp_width, self.recipe, name="mlp_in")(y)
        y = Dense(width, self.recipe, name="mlp_out")(nn.gelu(y, approximate=True))
        q = q.astype(jnp.float32) + gate * y.astype(jnp.float32)
        first = nn.initializers.constant(self.initial_gate / GATE_SCALE)
        a = GATE_SCALE * self.param("gate", first, ())
        m32 = m.astype(jnp.float32)
        return (m32 + a * (q - m32)).astype(m.dtype)


def _jump_condition(
    shared: VideoDiT, interval: IntervalEmbedding, condition: Mapping[str, Any],
    s: Array, r: Array,
) -> dict[str, Any]:  # fmt: skip
    """The condition of blocks that step from s to r: E_t(s) + E_d(s - r)."""
    time, modulation = shared.embed_time(s)
    step_time, step_modulation = interval(s - r)
    return {
        **condition,
        "time": time + step_time,
        "modulation": modulation + step_modulation,
    }


def _expand_times(late: Any, early: Any, batch: int, name: str) -> tuple[Array, Array]:
    """Both times of a jump as [batch], ``name`` that of the late one."""
    for time, called in ((late, name), (early, "r")):
        # before anything is cast, or integers would pass
        check_time(floating_time(time, called), called)
    expanded = expand_time(late, batch), expand_time(early, batch)
    # as given: under jit a number is concrete, and its expansion is not
    check_order(*(_float32(time) for time in (late, early)))
    return expanded


def _float32(time: Any) -> Any:
    """A concrete time, rounded as its expansion is: equal times stay equal."""
    return time if isinstance(time, jax.core.Tracer) else np.asarray(time, np.float32)


class TwoTimeDiT(nn.Module):
    """A whole video DiT as average velocity ``(x, t, r, cond) -> u``.

    Attributes:
        shared: the network, in the layout of its pretraining.
    """

    shared: VideoDiT

    def setup(self):
        """Declares the layers."""
        self.interval = _interval(self.shared)

    def __call__(self, x: Data, t: Any, r: Any, cond: Any) -> Data:
        """The average velocity from t down to r.

        Args:
            x: video [batch, frame, height, width, channel].
            t: [batch] or a scalar, in [0, 1]; the s of a flow map.
            r: [batch] or a scalar, in [0, t].
            cond: text, see :class:`VideoDiT`.

        Returns:
            float32 video like x.

        Raises:
            ValueError: an array of integers for a time; concrete times outside [0, 1]
                or with r > t; what :meth:`VideoDiT.embed` refuses.
        """
        t, r = _expand_times(t, r, x.shape[0], "t")
        h, condition = self.shared.embed(x, t, cond)
        condition = _jump_condition(self.shared, self.interval, condition, t, r)
        h, _ = self.shared.blocks(h, condition)
        return self.shared.output(h, condition, x.shape[1:4])


class SplitDiT(nn.Module):
    """A video DiT split into a backbone and a flow head of its last blocks.

    The backbone reads (x_t, t, text) once and gives a feature; the head maps a state
    y_s of an inner flow, from time s to r, conditioned on it. Both patch embeddings
    and both time embeddings are the same. At the start the head's output does not
    depend on y_s, nor on r.

    Attributes:
        shared: the network, in the layout of its pretraining.
        head_blocks: H, the blocks of the head, in [1, depth - 1].
        fusion: 'gated' or 'concat', see :class:`Fusion`.
        fusion_width: of the MLP in the fusion; None means that of the blocks.
        initial_gate: a of the gated fusion at the start; the parameter 'joint/gate' is
            a / GATE_SCALE.

    References:
        Transition Matching Distillation, arXiv 2601.09881, sec. 3.1.
    """

    shared: VideoDiT
    head_blocks: int = 5
    fusion: str = "gated"
    fusion_width: int | None = None
    initial_gate: float = 0.0

    def __post_init__(self):
        check_choice("fusion", self.fusion, FUSIONS)
        check_attributes(self, "head_blocks", "fusion_width")
        # linen replaces the attribute by a bound copy while it runs
        depth = getattr(self.shared, "depth", None)
        if depth is not None and not self.head_blocks < depth:
            raise ValueError(
                f"head_blocks={self.head_blocks} must lie in 1..L-1 = 1..{depth - 1}: "
                f"of L={depth} blocks at least one stays in the backbone."
            )
        super().__post_init__()

    def setup(self):
        """Declares the layers."""
        self.interval = _interval(self.shared)
        self.joint = Fusion(
            self.fusion,
            self.shared.mlp_width if self.fusion_width is None else self.fusion_width,
            self.initial_gate,
            self.shared.recipe,
        )

    def __call__(self, x: Data, t: Any, cond: Any) -> Data:
        """The head's answer to y = x at s = t, r = 0; it makes all parameters."""
        t = expand_time(floating_time(t), x.shape[0])
        return self.head(x, t, jnp.zeros_like(t), self.backbone(x, t, cond))

    def backbone(self, x: Data, t: Any, cond: Any) -> dict[str, Any]:
        """Runs blocks 0 .. L-H-1.

        Args:
            x: video [batch, frame, height, width, channel].
            t: [batch] or a scalar, in [0, 1].
            cond: text, see :class:`VideoDiT`.

        Returns:
            :data:`Features` for :meth:`head`.

        Raises:
            ValueError: what :meth:`VideoDiT.embed` refuses.
        """
        h, condition = self.shared.embed(x, t, cond)
        stop = self.shared.depth - self.head_blocks
        h, _ = self.shared.blocks(h, condition, stop=stop)
        kept = {k: v for k, v in condition.items() if k not in ("time", "modulation")}
        return {"hidden": h, "condition": kept}

    def head(self, y: Data, s: Any, r: Any, features: Features) -> Data:
        """Runs the fusion, blocks L-H .. L-1 and the output layer.

        Args:
            y: state of the inner flow, like x.
            s: [batch] or a scalar, in [0, 1].
            r: [batch] or a scalar, in [0, s].
            features: from :meth:`backbone`.

        Returns:
            float32 video like x.

        Raises:
            ValueError: an array of integers for a time; concrete times outside [0, 1]
                or with r > s; sizes that patch_size does not divide.
        """
        s, r = _expand_times(s, r, y.shape[0], "s")
        q = self.shared.embed_patches(y)
        _, modulation = self.shared.embed_time(s)
        h = self.joint(features["hidden"], q, modulation)
        condition = _jump_condition(
            self.shared, self.interval, features["condition"], s, r
        )
        start = self.shared.depth - self.head_blocks
        h, _ = self.shared.blocks(h, condition, start=start)
        return self.shared.output(h, condition, y.shape[1:4])


def student_from_teacher(
    student: SplitDiT | TwoTimeDiT,
    params: Params,
    teacher: VideoDiT,
    teacher_params: Params,
) -> dict[str, Any]:
    """The student's parameters with 'shared' taken from its teacher.

    Shapes alone do not tell 3 heads of 8 from 2 of 12, so the attributes of the two
    networks are compared as well; recipe, remat and attention_implementation may
    differ.

    Args:
        student: the student's module, unbound.
        params: its parameters, freshly drawn; under 'shared' their shapes do.
        teacher: the teacher's module, unbound.
        teacher_params: its parameters.

    Returns:
        ``{**params, 'shared': teacher_params}``, nothing copied or cast.

    Raises:
        TypeError: a module of another class.
        ValueError: networks whose attributes differ, or parameters of other names or
            shapes; the differences are listed.
    """
    if not isinstance(student, SplitDiT | TwoTimeDiT):
        raise TypeError(
            f"student is of type {type(student).__name__}; give a SplitDiT or a "
            f"TwoTimeDiT."
        )
    if not isinstance(teacher, VideoDiT):
        raise TypeError(
            f"teacher is of type {type(teacher).__name__}; give a VideoDiT, what "
            f"stands under 'shared' in the student."
        )
    names = [field.name for field in dataclasses.fields(teacher)]  # pyright: ignore[reportArgumentType]
    pairs = {n: (getattr(student.shared, n), getattr(teacher, n)) for n in names}
    _refuse_differences(
        {n: pair for n, pair in pairs.items() if n not in _FREE and pair[0] != pair[1]},
        "networks",
        "Build the student on the teacher's attributes.",
    )
    if "shared" not in params:
        raise ValueError(
            f"params holds {sorted(params)}; a student's hold 'shared' beside what is "
            f"new in it. Draw them by init_params(student, ...)."
        )
    mine, theirs = (
        {name: np.shape(leaf) for name, leaf in trees.flatten(tree).items()}
        for tree in (params["shared"], teacher_params)
    )
    pairs = {n: (mine.get(n), theirs.get(n)) for n in sorted({*mine, *theirs})}
    _refuse_differences(
        {name: pair for name, pair in pairs.items() if pair[0] != pair[1]},
        "parameters (shapes, None where there is none)",
        "Draw the student's with inputs of as many channels as the teacher's.",
    )
    return {**params, "shared": teacher_params}


def _refuse_differences(
    pairs: Mapping[str, tuple[Any, Any]], what: str, remedy: str
) -> None:
    if pairs:
        shown = [f"{n}: {mine}, {theirs}" for n, (mine, theirs) in pairs.items()]
        raise ValueError(
            f"the {what} of student and teacher differ in (student's value, teacher's "
            f"value) {first_few(shown)}. {remedy}"
        )


def _interval(shared: VideoDiT) -> IntervalEmbedding:
    return IntervalEmbedding(
        shared.heads * shared.head_dim,
        shared.frequency_dim,
        shared.time_scale,
    )
