"""Neural solvers of equations: what one says of a step, its losses, its rollouts.

A network is ``(params, x, t, cond) -> answer [batch, *space, channel]``: x has the
channels of the states it is given, oldest first, t [batch] is in [0, 1], cond float
[batch, n] or None. Its answer is the next state, or what times a weight is to be added
to the last state, or to what a coarse solver makes of it. States are float32.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax import metrics
from tmdjax.core import prng
from tmdjax.core.checks import check_count, check_output, check_range
from tmdjax.core.types import ApplyFn, Array, Params, PerExample, SampleKeys
from tmdjax.core.unrolling import Unrolled, unroll

Step = Callable[[Array, SampleKeys], Array]
"""``step(history [batch, frame, *space, channel], keys [batch]) -> next state``."""


@dataclasses.dataclass(frozen=True)
class OneStep:
    """A solver of one call a step, and how it is trained.

    Attributes:
        difference_weight: d, > 0, or None, as of its answer.
        history: states that it is given, at least 1.
        steps: that an example is rolled out for.
        pushforward: the loss is that of the last step alone, and no gradient passes to
            the steps before (Brandstetter et al. 2022, arXiv 2202.03376).
        sobolev: p >= 0, weights (1 + n^2)^p of the squared error at n waves a domain; 0
            is the squared error.
        solver: a coarse solver that the network corrects, ``state -> next state``,
            [batch, *space, channel] both, without parameters of its own. The network is
            given the solver's next state beside the history, and answers what to add to
            it, over ``difference_weight`` (a hybrid solver; Um et al. 2020, arXiv
            2007.00016). Gradients of unrolled steps pass through it. None: there is no
            solver, and the answer is added to the last state.

    Raises:
        TypeError, ValueError: a setting out of range, naming it, or a solver without
            ``difference_weight``.
    """

    difference_weight: float | None = 0.3
    history: int = 1
    steps: int = 1
    pushforward: bool = False
    sobolev: float = 0.0
    solver: Callable[[Array], Array] | None = None

    def __post_init__(self) -> None:
        check_solver(self.difference_weight, self.history)
        check_count("steps", self.steps, 2 if self.pushforward else 1)
        check_range("sobolev", self.sobolev, 0)
        if self.solver is not None and self.difference_weight is None:
            raise ValueError(
                "difference_weight=None beside a solver: a correction is a difference; "
                "give the deviation of what the solver gets wrong in a step."
            )

    @property
    def window(self) -> int:
        """Successive states of an example to train on."""
        return self.history + self.steps

    def loss(
        self,
        params: Params,
        apply_fn: ApplyFn,
        batch: Mapping[str, Any],
        keys: SampleKeys | None = None,
    ) -> PerExample:
        """Squared error of the answers, the mean over the steps that count.

        Args:
            params: nested dict handed to apply_fn.
            apply_fn: a network of the history (and the solver's state); its t is 1.
            batch: 'states' float32 [batch, history + steps, *space, channel], 'cond'.
            keys: not needed.

        Returns:
            [batch]: the sum over channels, the mean over space.
        """
        states = states_of(batch["states"], self.window)
        history, total = states[:, : self.history], jnp.zeros(len(states))
        for i in range(self.steps):
            value, base = self._ask(params, apply_fn, history, batch.get("cond"))
            target = states[:, self.history + i]
            pair = jnp.stack([base[:, -1], target], 1)
            if not self.pushforward or i == self.steps - 1:
                error = value - answer_of(pair, self.difference_weight)
                total += squared(_weighted(error, self.sobolev))
            after = next_state(base, value, self.difference_weight)
            if self.pushforward:
                after = jax.lax.stop_gradient(after)
            history = jnp.concatenate([history[:, 1:], after[:, None]], 1)
        return total / (1 if self.pushforward else self.steps)

    def step(
        self,
        params: Params,
        apply_fn: ApplyFn,
        history: Any,
        keys: SampleKeys | None = None,
        cond: Any = None,
    ) -> Array:
        """The next state [batch, *space, channel], by one call of the network."""
        history = states_of(history, self.history)
        value, base = self._ask(params, apply_fn, history, cond)
        return next_state(base, value, self.difference_weight)

    def _ask(
        self, params: Params, apply_fn: ApplyFn, history: Array, cond: Any
    ) -> tuple[Array, Array]:
        """The network's answer, and frames to the last of which it is added."""
        if self.solver is None:
            return ask(apply_fn, params, history, None, None, cond), history
        last = history[:, -1]
        coarse = check_output(self.solver(last), last, "the solver's next state")
        return ask(apply_fn, params, history, coarse, None, cond), coarse[:, None]


def rollout(
    step: Step, history: Any, keys: SampleKeys, length: int, **options: Any
) -> Unrolled:
    """A solver's own states for many steps.

    Args:
        step: ``(history, keys) -> next state``; the ``step`` of a solver with its
            other arguments filled in.
        history: [batch, history, *space, channel], true states before the first step.
        keys: [batch], folded by step.
        length: steps.
        **options: bound, remat_steps and loop of :func:`tmdjax.core.unroll`.

    Returns:
        Outputs [length, batch, *space, channel], NaN from a row's first bad step on.
    """

    def one(history: Array, number: Array) -> tuple[Array, Array]:
        state = step(history, prng.fold_in(keys, number))
        return jnp.concatenate([history[:, 1:], state[:, None]], 1), state

    history = jnp.asarray(history)
    return unroll(one, history, length, jnp.arange(length), **options)


def ensemble_rollout(
    step: Step,
    history: Any,
    keys: SampleKeys,
    length: int,
    members: int = 16,
    **options: Any,
) -> Unrolled:
    """Rollouts from one state that differ in their refinement noise.

    Args:
        step: as of :func:`rollout`.
        history: [batch, history, *space, channel].
        keys: [batch], folded by member.
        length: steps.
        members: rollouts of each state, at least 2.
        **options: of :func:`tmdjax.core.unroll`.

    Returns:
        Leaves [member, ...] of what :func:`rollout` returns.
    """
    numbers = jnp.arange(check_count("members", members, 2))
    run = jax.vmap(
        lambda number: rollout(
            step, history, prng.fold_in(keys, number), length, **options
        )
    )
    return run(numbers)


def reliable_time(
    ensemble: Any, threshold: float = 0.8, dt: Any = 1.0
) -> metrics.HighCorrelationTime:
    """For how long an ensemble agrees with itself, a prediction of when it is right.

    Args:
        ensemble: [member, time, batch, *space, channel].
        threshold: of the mean correlation of pairs, in (-1, 1).
        dt: time of a model's step, a scalar or [batch].

    Returns:
        Times [batch], interpolated between steps, and which are censored.
    """
    r = metrics.ensemble_correlation(ensemble)
    return metrics.high_correlation_time(r, threshold, dt, interpolate=True)


def check_solver(difference_weight: float | None, history: int) -> None:
    """Raises TypeError or ValueError for a weight or a history that cannot be."""
    if difference_weight is not None:
        check_range("difference_weight", difference_weight, 0, open_low=True)
    check_count("history", history)


def states_of(states: Any, frames: int) -> Array:
    """States [batch, frame, *space, channel], float32 or wider.

    Raises:
        TypeError: integers, or floats of 16 bits.
        ValueError: another number of frames or axes.
    """
    states = jnp.asarray(states)
    if not jnp.issubdtype(states.dtype, jnp.floating) or states.dtype.itemsize < 4:
        raise TypeError(
            f"states are {states.dtype}; a relative change of 6e-4 is below the "
            f"resolution of 16 bits: give float32, and lower precision inside the "
            f"network alone."
        )
    if states.ndim < 4 or states.shape[1] != frames:
        raise ValueError(
            f"states have shape {states.shape}; these settings take {frames} frame(s), "
            f"[batch, {frames}, *space, channel]."
        )
    return states


def answer_of(states: Array, weight: float | None) -> Array:
    """What a network is to say of the last two states: (last - first) / weight."""
    if weight is None:
        return states[:, -1]
    return (states[:, -1] - states[:, -2]) / weight


def next_state(history: Array, answer: Array, weight: float | None) -> Array:
    """The state that an answer stands for: the last one and weight * answer."""
    return answer if weight is None else history[:, -1] + weight * answer


def ask(
    apply_fn: ApplyFn, params: Params, history: Array, x: Any, t: Any, cond: Any
) -> Array:
    """A network's answer about a history and what else it is given of the next state.

    Args:
        apply_fn: the network.
        params: handed to it.
        history: [batch, frame, *space, channel].
        x: [batch, *space, channel], beside the history on the channel axis: a refiner's
            noised answer, or the next state of a coarse solver. None: nothing.
        t: [batch], or None for 1.
        cond: float [batch, n], or None.

    Raises:
        TypeError: an answer of 16 bits.
        ValueError: an answer of another shape than a state.
    """
    frames = [history[:, i] for i in range(history.shape[1])]
    inputs = jnp.concatenate(frames if x is None else [*frames, x], -1)
    t = jnp.ones(len(inputs)) if t is None else t
    value = check_output(apply_fn(params, inputs, t, cond), frames[-1], "the answer")
    if value.dtype.itemsize < 4:
        raise TypeError(
            f"the network answers in {value.dtype}, which cannot say how small parts "
            f"change; let its last layer be float32."
        )
    return value


def squared(error: Array) -> Array:
    """Sum over channels, mean over space, [batch]."""
    return jnp.square(error).sum(-1).reshape(len(error), -1).mean(-1)


def _weighted(error: Array, power: float) -> Array:
    """The error whose square is that of the Sobolev norm."""
    if not power:
        return error
    axes = tuple(range(1, error.ndim - 1))
    sides = [error.shape[axis] for axis in axes]
    waves = [np.abs(np.fft.fftfreq(n, 1 / n)) for n in sides]
    waves[-1] = np.arange(sides[-1] // 2 + 1, dtype=np.float64)
    square = np.sum([np.square(n) for n in np.meshgrid(*waves, indexing="ij")], 0)
    weights = jnp.asarray((1 + square) ** (power / 2), error.dtype)[..., None]
    modes = jnp.fft.rfftn(error, axes=axes) * weights
    return jnp.fft.irfftn(modes, sides, axes=axes)
