"""Closed-loop world models: rollouts that feed a model's own frames back.

A model sees some frames of a world and predicts hundreds that follow. It keeps the
protocol of :class:`tmdjax.models.TorusMap`, ``prepare``, ``start``, ``observe``,
``predict`` and ``feed``, whatever its memory is.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tmdjax import core
from tmdjax.core import prng
from tmdjax.core.checks import check_count, check_range, check_same_shape
from tmdjax.core.types import ApplyFn, Array, Float, Params, PerExample
from tmdjax.core.unrolling import largest
from tmdjax.models.flow_equivariant.group_actions import shift


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How frames are seen and predicted.

    Attributes:
        context: frames that are seen, at least 1.
        teacher_forcing: probability that the true frame is fed back instead of the
            prediction, drawn for each sample and step.
        feedback_clip: (low, high) that predictions are clipped to before they are fed
            back, with the gradient passed straight through; None feeds them back as
            they are, as the published models do. The loop from map to frame to map has
            no gate: a model trained too little grows without bound in long rollouts.
        state_clip: every value of the state is clipped to +-state_clip after each step,
            in training too; None leaves the state, as the published models do. A map
            without a gate can grow by itself, even where frames are clipped.
        detach_feedback: whether no gradient passes through fed-back frames.
        remat_steps: steps that the backward pass computes again at a time; None keeps
            all that they computed.
        state_bound: a rollout is broken where a value of its state or frame is larger.

    Raises:
        TypeError, ValueError: a value out of range.
    """

    context: int = 50
    teacher_forcing: float = 0.0
    feedback_clip: tuple[float, float] | None = None
    state_clip: float | None = None
    detach_feedback: bool = False
    remat_steps: int | None = 1
    state_bound: float = 1e4

    def __post_init__(self) -> None:
        if self.context == 0:
            raise ValueError("context=0 leaves no frame to feed back; see at least 1.")
        check_count("context", self.context)
        check_range("teacher_forcing", self.teacher_forcing, 0, 1)
        check_range("state_bound", self.state_bound, 0, open_low=True)
        if self.remat_steps is not None:
            check_count("remat_steps", self.remat_steps)
        if self.feedback_clip is not None:
            low, high = self.feedback_clip
            check_range("feedback_clip, upper", high, low, open_low=True)
        if self.state_clip is not None:
            check_range("state_clip", self.state_clip, 0, open_low=True)


def rollout(
    params: Params,
    apply_fn: ApplyFn,
    frames: Float[Array, "batch frame height width channel"],
    actions: Array,
    config: RolloutConfig,
    *,
    length: int | None = None,
    keys: Any = None,
) -> core.Unrolled:
    """Predicted frames after a context, the model's own fed back. Jittable.

    Args:
        params: of the model.
        apply_fn: ``(params, *inputs, method=name)``, of a model that keeps the protocol
            of :class:`tmdjax.models.TorusMap`.
        frames: the context first; frames after it are read under teacher forcing alone.
        actions: integers [batch, frame, ...], number t led to frame t; the first one is
            ignored.
        config: how.
        length: predicted frames; None predicts one for every action after the context.
        keys: [batch], for teacher forcing and for models that draw; None without.

    Returns:
        Outputs 'frame' [length, batch, height, width, channel] and 'amplitude' [length,
        batch], the largest absolute value of the state. A row's ``first_bad`` step is
        the first with a value that is not finite or beyond ``state_bound``; its outputs
        from there are NaN.

    Raises:
        TypeError: frames that are no floats, or a state without any.
        ValueError: fewer frames than the context, fewer actions than frames to predict,
            teacher forcing without keys or without the frames to force.
    """
    context = config.context
    if not jnp.issubdtype(frames.dtype, jnp.floating):
        raise TypeError(
            f"frames are {frames.dtype}; give floats in [0, 1], such as frames / 255."
        )
    if frames.shape[1] < context:
        raise ValueError(
            f"{frames.shape[1]} frames are given, fewer than context={context}."
        )
    if length is None:
        length = actions.shape[1] - context
    check_count("length", length)
    if actions.shape[1] < context + length:
        raise ValueError(
            f"{actions.shape[1]} actions are given; to predict {length} frames after "
            f"{context} takes {context + length}."
        )
    forced = config.teacher_forcing > 0
    if forced and (keys is None or frames.shape[1] < context + length):
        raise ValueError(
            f"teacher_forcing={config.teacher_forcing} needs keys and "
            f"{context + length} frames; got "
            f"{'no keys' if keys is None else frames.shape[1]}."
        )

    def call(method: str, *inputs: Any) -> Any:
        return apply_fn(params, *inputs, method=method)

    actions = jnp.swapaxes(call("prepare", actions), 0, 1)[: context + length]
    time_first = jnp.swapaxes(frames, 0, 1)

    def observe(state: Any, given: Any) -> tuple[Any, Array]:
        state = _clipped(call("observe", state, *given), config.state_clip)
        return state, largest(state)

    def predict(state: Any, given: Any) -> tuple[Any, dict[str, Array]]:
        step, action, target = given
        state, frame = call("predict", state, action)
        fed = frame
        if config.feedback_clip is not None:
            clipped = jnp.clip(fed, *config.feedback_clip)
            fed = fed + jax.lax.stop_gradient(clipped - fed)
        if forced:
            drawn = prng.uniform(prng.fold_in(keys, step)) < config.teacher_forcing
            fed = jnp.where(drawn[:, None, None, None], target, fed)
        if config.detach_feedback:
            fed = jax.lax.stop_gradient(fed)
        state = _clipped(call("feed", state, fed), config.state_clip)
        return state, {"frame": frame, "amplitude": largest(state)}

    state = call("start", time_first[0], keys)
    chunk = config.remat_steps
    seen = time_first[:context], actions[:context]
    state = core.unroll(observe, state, context, seen, remat_steps=chunk).state
    targets = time_first[context : context + length] if forced else None
    given = jnp.arange(length), actions[context:], targets
    return core.unroll(
        predict, state, length, given, bound=config.state_bound, remat_steps=chunk
    )


def loss(
    params: Params,
    apply_fn: ApplyFn,
    batch: Mapping[str, Array],
    keys: Any,
    config: RolloutConfig,
) -> tuple[PerExample, dict[str, Array]]:
    """Mean squared error of the predicted frames; those of the context do not count.

    Every frame after the context is predicted; a shorter batch trains a shorter
    horizon, see :class:`GrowingVideos`.

    Args:
        params: of the model.
        apply_fn: of the model, see :func:`rollout`.
        batch: 'frames' [batch, frame, height, width, channel] and 'actions'.
        keys: [batch].
        config: how.

    Returns:
        Loss [batch], and metrics [batch]: 'first_error' and 'last_error' of the first
        and the last predicted frame. A rollout beyond the bound has a loss of NaN.

    Raises:
        ValueError: as :func:`rollout`, or no frame after the context.

    References:
        arXiv 2601.01075.
    """
    frames, context = batch["frames"], config.context
    length = frames.shape[1] - context
    if length < 1:
        raise ValueError(
            f"the batch has {frames.shape[1]} frames, none of them after the context "
            f"of {context}; give longer videos."
        )
    found = rollout(
        params, apply_fn, frames, batch["actions"], config, length=length, keys=keys
    )
    error = frame_errors(found.outputs["frame"], frames[:, context:])
    return error.mean(0), {"first_error": error[0], "last_error": error[-1]}


def frame_errors(
    predicted: Float[Array, "time batch height width channel"],
    target: Float[Array, "batch frame height width channel"],
) -> Float[Array, "time batch"]:
    """Mean squared error of each frame, neither of them clipped.

    Args:
        predicted: of :func:`rollout`.
        target: frames from the first predicted one, at least as many.

    Raises:
        ValueError: fewer of them, or frames of another size or batch.
    """
    target = jnp.swapaxes(target, 0, 1)[: predicted.shape[0]]
    check_same_shape("predicted", predicted, "target", target)
    return jnp.square(predicted - target).mean((2, 3, 4))


def check_videos(frames: Any, actions: Any) -> None:
    """Raises ValueError unless every frame has an action that led to it.

    Args:
        frames: [batch, frame, ...].
        actions: [batch, frame, ...].
    """
    if jnp.shape(frames)[:2] != jnp.shape(actions)[:2]:
        raise ValueError(
            f"frames have shape {jnp.shape(frames)} and actions {jnp.shape(actions)}; "
            f"give an action for every frame, [batch, frame, ...] of both."
        )


def growing_horizon(progress: float, horizons: Sequence[int]) -> int:
    """How many frames to predict in a part of training; each has an equal share.

    Args:
        progress: share of the updates that are done, in [0, 1].
        horizons: numbers of frames, not decreasing, such as (8, 20, 50).

    Raises:
        ValueError: a progress out of range, or horizons that decrease.
    """
    check_range("progress", progress, 0, 1)
    steps = [check_count("horizons", h) for h in horizons]
    if not steps or steps != sorted(steps):
        raise ValueError(f"horizons={horizons} must not decrease; give at least one.")
    return steps[min(int(progress * len(steps)), len(steps) - 1)]


class GrowingVideos:
    """Batches of videos that begin short and grow as training goes on.

    :func:`loss` counts every frame that its batch has, so a jitted update is compiled
    once a horizon, when the first batch of that length comes; a training that goes on
    from a checkpoint finds its horizon by the position of its data. It is a
    :class:`tmdjax.train.DataIterator`.

    Args:
        batches: another, of whole videos: 'frames' and 'actions' [batch, frame, ...].
        context: frames that are seen.
        horizons: predicted frames, not decreasing, see :func:`growing_horizon`.
        steps: updates of the training, which share them out.

    Raises:
        TypeError, ValueError: a number out of range, or horizons that decrease.
    """

    def __init__(
        self, batches: Any, context: int, horizons: Sequence[int], steps: int
    ) -> None:
        growing_horizon(0, horizons)
        self.batches, self.horizons = batches, tuple(horizons)
        self.context = check_count("context", context)
        self.steps = check_count("steps", steps)
        self._taken = 0

    def __next__(self) -> dict[str, Any]:
        """The next batch, cut to the horizon of its place in the training."""
        progress = min(self._taken / self.steps, 1)
        frames = self.context + growing_horizon(progress, self.horizons)
        batch = next(self.batches)
        self._taken += 1
        return {name: array[:, :frames] for name, array in batch.items()}

    def get_state(self) -> dict[str, Any]:
        """The position, JSON-able."""
        return {"taken": self._taken, "batches": self.batches.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position of :meth:`get_state`."""
        self.batches.set_state(state["batches"])
        self._taken = check_count("taken", state["taken"], 0)


def trivial_predictions(
    frames: Float[Array, "batch frame height width channel"],
    actions: Array,
    context: int,
    *,
    world: int | None = None,
) -> dict[str, Float[Array, "time batch height width channel"]]:
    """What a model must beat: predictions that need no learning.

    Args:
        frames: [batch, frame, ...], of which the context is read.
        actions: [batch, context + time, ...].
        context: frames that are seen.
        world: side of the torus on which the view moves by actions (x, y); None for
            other worlds, where the last frame stays.

    Returns:
        'zero': black; 'mean': the mean frame of the context; 'shifted': the last seen
        frame, moved against the actions, black where nothing was seen then.
    """
    seen, side = frames[:, :context], frames.shape[2]
    later = actions[:, context:]
    length = later.shape[1]
    last = seen[:, -1]
    every = (length, *last.shape)
    shifted = jnp.broadcast_to(last, every)
    if world is not None:
        room = (0, world - side)
        whole = jnp.pad(last, ((0, 0), room, room, (0, 0)))
        place = jnp.swapaxes(jnp.cumsum(later, 1), 0, 1)
        whole = jnp.broadcast_to(whole, (length, *whole.shape))
        shifted = shift(whole, -place)[:, :, :side, :side]
    return {
        "zero": jnp.zeros(every, frames.dtype),
        "mean": jnp.broadcast_to(seen.mean(1), every),
        "shifted": shifted,
    }


def _clipped(state: Any, most: float | None) -> Any:
    """A state without values beyond +-most; integers and keys are left."""
    if most is None:
        return state

    def clipped(leaf: Array) -> Array:
        inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
        return jnp.clip(leaf, -most, most) if inexact else leaf

    return jax.tree.map(clipped, state)
