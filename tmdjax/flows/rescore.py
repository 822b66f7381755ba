"""Scoring stored transitions under any policy, differentiably.

The log-prob of a step is a function of its two states and the velocity at the first
of them, so a policy other than the one that walked the trajectory (an updated one, a
reference) can be asked for its own, in any order and on any subset of the steps.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import (
    check_batch,
    check_choice,
    check_count,
    check_output,
    check_same_shape,
)
from tmdjax.core.types import Array, Cond, Data, Time, Velocity
from tmdjax.flows.rollout import Trajectory
from tmdjax.flows.table import CoefficientTable
from tmdjax.flows.transition import REDUCTIONS, gaussian_log_prob, transition_mean
from tmdjax.flows.velocities import guidance_differs, guidance_scale

STEP_WEIGHTS = ("none", "inverse_gain")
KL_KINDS = ("transition", "flow_grpo_code", "velocity_mse")


class Scores(NamedTuple):
    """What a policy says of stored transitions.

    Attributes:
        log_prob: [..., batch] in nats (per dimension under 'mean').
        kl: [..., batch], to the reference policy; zeros without one.
    """

    log_prob: Any
    kl: Any


def transition_kl(
    v: Data,
    v_reference: Data,
    rows: Mapping[str, Array],
    kind: str = "transition",
    reduction: str = "mean",
) -> Array:
    """KL divergence of a step from that of a reference with the same noise.

    Both transitions are Gaussians of one standard deviation S whose means differ by
    B (v - v_reference), so the divergence is closed.

    Args:
        v: [batch, *event].
        v_reference: [batch, *event].
        rows: columns of the table for each transition, [batch] (or scalars).
        kind: 'transition', B^2 |v - v_ref|^2 / (2 S^2), the divergence itself;
            'flow_grpo_code', h times that, what Flow-GRPO's code penalises (the
            coefficients published with it belong to this one); 'velocity_mse',
            |v - v_ref|^2.
        reduction: over event dimensions, 'mean' or 'sum'.

    Returns:
        [batch] in nats (of one dimension on average under 'mean'); 0 on deterministic
        rows. With a split scale c and log-probs of the policy, S is the policy's.

    Raises:
        ValueError: an unknown kind or reduction, or two shapes.
    """
    check_choice("kl_kind", kind, KL_KINDS)
    check_choice("reduction", reduction, REDUCTIONS)
    check_same_shape("v", v, "v_reference", v_reference)
    square = jnp.square(v - v_reference)
    reduce = jnp.mean if reduction == "mean" else jnp.sum
    distance = reduce(square, axis=tuple(range(1, v.ndim)))
    distance = jnp.where(rows["mask"], distance, 0.0)
    if kind == "velocity_mse":
        return distance
    t, t_next = rows["t"], rows["t_next"]
    weight = -(1 - t_next) * t + rows["k"] * (1 - t)
    std = jnp.where(rows["mask"], rows["log_prob_std"], 1.0)
    divergence = distance * (weight / std) ** 2 / 2
    return divergence if kind == "transition" else rows["h"] * divergence


def score_transitions(
    velocity: Velocity,
    x: Data,
    x_next: Data,
    rows: Mapping[str, Array],
    cond: Cond = None,
    *,
    reduction: str = "mean",
    reference: Velocity | None = None,
    kl_kind: str = "transition",
    g: Callable[[Data, Time, Cond], Data] | None = None,
) -> Scores:
    """Log-prob, and KL to a reference, of transitions of any steps, one a row.

    Args:
        velocity: the policy scored; its gradient flows.
        x: [batch, *event] float32 states, held constant.
        x_next: [batch, *event], the states they went to, held constant.
        rows: ``table.rows(step)`` with step [batch]: the row of each transition.
        cond: conditions of the batch.
        reduction: 'mean' or 'sum' over event dimensions.
        reference: a policy that receives no gradient; None leaves the KL at 0.
        kl_kind: 'transition', the divergence of the two transitions; others are
            those of :func:`transition_kl`.
        g: the gradient that the rollout was drawn by, if any.

    Returns:
        [batch] each. A deterministic row (mask False) has log-prob and KL 0.

    Raises:
        TypeError: states narrower than float32, or x_next narrower than x.
        ValueError: shapes that disagree, unknown options.
    """
    check_choice("kl_kind", kl_kind, KL_KINDS)
    check_same_shape("x_next", x_next, "x", x)
    for name, state in (("x", x), ("x_next", x_next)):
        if state.dtype not in (jnp.float32, jnp.float64):
            raise TypeError(
                f"{name} is {state.dtype}; rounded states have other log-probs than "
                f"those drawn. Store sampler states in float32."
            )
    x, x_next = jax.lax.stop_gradient((x, x_next))
    t = jnp.broadcast_to(rows["t"], x.shape[:1])
    v = check_output(velocity(x, t, cond), x).astype(x.dtype)
    pull = None if g is None else jax.lax.stop_gradient(g(x, t, cond))
    mean, _ = transition_mean(rows, x, v, pull)
    std = jnp.where(rows["mask"], rows["log_prob_std"], 1.0)
    density = gaussian_log_prob(x_next, mean, std, reduction)
    log_prob = jnp.where(rows["mask"], density, 0.0)
    kl = jnp.zeros_like(log_prob)
    if reference is not None:
        v_reference = jax.lax.stop_gradient(reference(x, t, cond)).astype(x.dtype)
        kl = transition_kl(v, v_reference, rows, kl_kind, reduction)
    return Scores(log_prob, kl)


def rescore(
    velocity: Velocity,
    trajectory: Trajectory,
    table: CoefficientTable,
    cond: Cond = None,
    *,
    steps: Any = None,
    reduction: str = "mean",
    reference: Velocity | None = None,
    kl_kind: str = "transition",
    g: Callable[[Data, Time, Cond], Data] | None = None,
    micro_batch: int | None = None,
) -> Scores:
    """Scores a stored trajectory under a policy, microbatched over (step, sample).

    Args:
        velocity: ``(x, t, cond) -> v``, guided as the one that was rolled out.
        trajectory: from :func:`~tmdjax.flows.rollout` with ``store=True``.
        table: the table it was walked on.
        cond: of the batch.
        steps: which steps, int [n] on the host; None takes every stochastic one.
        reduction: as in the rollout.
        reference: a policy that receives no gradient; None leaves the KL at 0.
        kl_kind: 'transition', the divergence of the two transitions; others are
            those of :func:`transition_kl`.
        g: the gradient that the rollout was drawn by, if any.
        micro_batch: so many (step, sample) pairs are evaluated at a time, and
            recomputed in the backward pass; None takes all at once.

    Returns:
        Scores [n, batch]; of the policy that was rolled out, the log-probs of the
        trajectory (to rounding).

    Raises:
        ValueError: a deterministic step was asked for; trajectory and table of
            different length; another guidance scale than in the rollout; a
            micro_batch that does not divide the pairs.
        TypeError: states narrower than float32.

    Warns:
        UserWarning: guidance that is known of one of the two alone.
    """
    check_batch("trajectory.states", trajectory.states, len(table) + 1)
    _check_guidance(velocity, trajectory)
    steps = _stochastic_steps(table, steps)
    count, batch = len(steps), trajectory.states.shape[1]
    step = jnp.repeat(jnp.asarray(steps), batch)
    sample = jnp.tile(jnp.arange(batch), count)

    def score(pairs: tuple[Array, Array]) -> Scores:
        step, sample = pairs
        x = trajectory.states[step, sample]
        return score_transitions(
            velocity,
            x,
            trajectory.states[step + 1, sample],
            table.rows(step, x.dtype),
            jax.tree.map(lambda leaf: leaf[sample], cond),
            reduction=reduction,
            reference=reference,
            kl_kind=kl_kind,
            g=g,
        )

    pairs = count * batch
    micro_batch = (
        pairs if micro_batch is None else check_count("micro_batch", micro_batch)
    )
    if pairs % micro_batch:
        raise ValueError(
            f"micro_batch={micro_batch} does not divide {count} steps x {batch} "
            f"samples = {pairs}; choose a divisor."
        )
    if micro_batch == pairs:
        scores = score((step, sample))
    else:
        parts = (step.reshape(-1, micro_batch), sample.reshape(-1, micro_batch))
        scores = jax.lax.map(jax.checkpoint(score), parts)
    return Scores(*(x.reshape(count, batch) for x in scores))


def _check_guidance(velocity: Velocity, trajectory: Trajectory) -> None:
    scale, drawn = guidance_scale(velocity), trajectory.guidance
    if not guidance_differs(scale, drawn):
        return
    if scale is not None and drawn is not None:
        raise ValueError(
            f"the trajectory was drawn with guidance scale {drawn}, the velocity has "
            f"{scale}: their ratio would not be 1. Score with the scale of the rollout."
        )
    warnings.warn(
        f"the trajectory was drawn with guidance scale {drawn}, the velocity has "
        f"{scale} (None is unknown): if they differ, their ratio is not 1. Score the "
        f"flows.Guided velocity itself, not a function around it; or say that you "
        f"know, trajectory.replace(guidance=None).",
        UserWarning,
        stacklevel=3,
    )


def _stochastic_steps(table: CoefficientTable, steps: Any) -> np.ndarray:
    traced = isinstance(table.mask, jax.core.Tracer)
    if steps is None:
        if traced:
            raise ValueError("the table is traced: say which steps to score.")
        steps = np.flatnonzero(table.mask)
    steps = np.asarray(steps)
    if not steps.size:
        raise ValueError("no step of this table is stochastic: nothing has a log-prob.")
    outside = steps[(steps < 0) | (steps >= len(table))]
    if outside.size:
        raise ValueError(f"step {outside[0]} is not in a table of {len(table)} steps.")
    if not traced:
        for step in steps[~np.asarray(table.mask)[steps]]:
            raise ValueError(
                f"step {step} is deterministic; exclude it (mask) or set noise."
            )
    return steps


def step_weights(table: CoefficientTable, kind: str = "none") -> Array:
    """How much each step's loss counts.

    The gradient of a log-prob with respect to v has the size |B| / S, which varies
    from step to step by orders of magnitude.

    Args:
        table: of coefficients, on the host or traced.
        kind: 'none' (1 everywhere), or 'inverse_gain' (S / |B|, scaled to mean 1 over
            the stochastic steps).

    Returns:
        float32 [steps], 0 on deterministic steps.
    """
    check_choice("step_weight", kind, STEP_WEIGHTS)
    mask = jnp.asarray(table.mask)
    if kind == "none":
        return mask.astype(jnp.float32)
    gain = jnp.abs(table.velocity_weight) / jnp.where(mask, table.log_prob_std, 1)
    weight = jnp.where(mask, 1 / gain, 0.0)
    mean = jnp.sum(weight) / jnp.maximum(jnp.sum(mask), 1)
    return (weight / jnp.where(mean > 0, mean, 1)).astype(jnp.float32)
