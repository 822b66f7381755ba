"""GRPO on flow models whose samples are independent chains.

Flow-GRPO, its fast variant, DanceGRPO and MixGRPO are settings of one method: how much
noise a step adds, in which steps, which of them train, and how rewards of a group
become advantages. ``preset(name)`` has the published settings.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax import flows, rl
from tmdjax.core.checks import check_choice, check_count, check_range
from tmdjax.core.types import Array, Grid, Velocity
from tmdjax.rl.advantages import SCALES
from tmdjax.train import flow_rl


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chains:
    """A :class:`tmdjax.train.flow_rl.FlowMethod`: G independent samples a prompt.

    Attributes:
        grid: times, see :mod:`tmdjax.flows.grids`.
        event_shape: of one sample.
        group_size: samples a prompt, at least 2.
        preset: stochastic preset of the table.
        strength: of its noise, > 0.
        final: rule of the last state; None is the preset's.
        same_noise: all samples of a group start from the same noise.
        window: options of :func:`tmdjax.flows.window_start` but ``iteration``: noise in
            that window alone. 'high' defaults to the end of the last step with a
            log-prob. None has noise everywhere.
        trained: of the stochastic steps the 'first' ones, or 'random' ones of each
            sample.
        fraction: how many, rounded down, in (0, 1]: of all steps for 'first' (those of
            them that are stochastic), of the stochastic ones for 'random'.
        reduction: of log-probs, 'mean' or 'sum'; that of the objective.
        scale: what advantages are divided by: the standard deviation of the 'batch'
            (Flow-GRPO), of the 'group', or 'none'.
        ddof: of that standard deviation, 0 or 1.
        eps: added to it.
        advantage_clip: bound of an advantage's absolute value.
        drop_tied: groups whose rewards are all equal leave the loss altogether, the
            KL too; otherwise their advantage is 0.
        best_and_worst: train only so many best and worst samples of a group (their
            advantages still compare the whole group); None trains all.
    """

    grid: Grid
    event_shape: tuple[int, ...]
    group_size: int = 24
    preset: str = "flow_grpo"
    strength: float = 0.7
    final: str | None = None
    same_noise: bool = False
    window: Mapping[str, Any] | None = None
    trained: str = "first"
    fraction: float = 0.99
    reduction: str = "mean"
    scale: str = "batch"
    ddof: int = 0
    eps: float = 1e-4
    advantage_clip: float = 5.0
    drop_tied: bool = True
    best_and_worst: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_count("group_size", self.group_size)
        if self.group_size < 2:
            raise ValueError(
                "group_size=1: an advantage compares the samples of a group, so all "
                "would be 0; draw at least 2."
            )
        check_choice("trained", self.trained, ("first", "random"))
        check_choice("reduction", self.reduction, flows.REDUCTIONS)
        check_choice("scale", self.scale, SCALES)
        check_range("ddof", self.ddof, 0, 1)
        check_range("eps", self.eps, 0)
        check_range("fraction", self.fraction, 0, 1, open_low=True)
        check_range("advantage_clip", self.advantage_clip, 0, open_low=True)
        if self.best_and_worst is not None:
            best, worst = self.best_and_worst
            kept = check_count("best", best, 0) + check_count("worst", worst, 0)
            check_range("best + worst", kept, 1, self.group_size)
        self.plan(0)  # table, window and strength are refused here, if at all

    def table(self, iteration: int) -> flows.CoefficientTable:
        """The coefficients of an iteration."""
        whole = self._table(None)
        if self.window is None:
            return whole
        usable = int(np.flatnonzero(whole.mask)[-1]) + 1 if whole.mask.any() else 0
        options = {"high": usable, **self.window}
        check_range("window high", options["high"], 1, usable)
        start = flows.window_start(iteration, **options)
        return self._table(flows.window(len(whole), start, options["size"]))

    def _table(self, window: Any) -> flows.CoefficientTable:
        return flows.make_table(
            self.preset,
            self.grid,
            strength=self.strength,
            final=self.final,
            window=window,
        )

    def plan(self, iteration: int) -> tuple[flows.CoefficientTable, Any]:
        """The table, and the steps that are stored: its stochastic ones."""
        table = self.table(iteration)
        steps = np.flatnonzero(table.mask)
        if not steps.size:
            raise ValueError(
                f"no step of preset={self.preset!r} with strength={self.strength} and "
                f"window={self.window} has a log-prob: there is nothing to train. "
                f"Raise the strength or move the window."
            )
        if self.trained == "first":
            steps = steps[: max(1, int(len(table) * self.fraction))]
        return table, {"steps": steps.astype(np.int32)}

    def rollout(
        self,
        samples: flow_rl.Samples,
        velocity: Velocity,
        table: flows.CoefficientTable,
        plan: Any,
    ) -> tuple[Array, rl.Transitions]:
        """Draws chains; the record keeps the states around the stored steps."""
        keys, group, cond = samples
        steps, walk = plan["steps"], samples.sample_keys
        if self.same_noise:
            start = flows.initial_noise(keys, self.event_shape)[group]
        else:
            start = flows.initial_noise(walk, self.event_shape)
        drawn = flows.rollout(
            walk, velocity, start, table, cond, reduction=self.reduction
        )
        # stored steps are consecutive, and share states
        count = steps.shape[0] + 1
        states = jax.lax.dynamic_slice_in_dim(drawn.states, steps[0], count)
        record = rl.chain_transitions(states, drawn.log_prob[steps], steps)
        return drawn.states[-1], record

    def credit(
        self,
        rewards: Array,
        group: Array,
        transitions: rl.Transitions,
        plan: Any,
        key: Any,
    ) -> flow_rl.Credit:
        """Every transition of a sample gets the sample's advantage."""
        batch = rewards.shape[0]
        groups = batch // self.group_size
        advantage = rl.group_advantages(
            rewards,
            group,
            num_groups=groups,
            scale=self.scale,
            ddof=self.ddof,
            eps=self.eps,
            clip=self.advantage_clip,
        )
        live = jnp.ones(batch, bool)
        if self.drop_tied:
            live = jax.ops.segment_max(jnp.abs(advantage), group, groups)[group] > 0
        sample = jnp.arange(batch)
        if self.best_and_worst is not None:
            chosen = rl.best_and_worst(rewards, group, groups, *self.best_and_worst)
            sample = jnp.flatnonzero(chosen, size=groups * sum(self.best_and_worst))
        steps = plan["steps"].shape[0]
        shape = (sample.shape[0], steps)
        kept = jnp.broadcast_to(jnp.arange(steps), shape)
        if self.trained == "random":
            order = jnp.argsort(jax.random.uniform(key, shape), axis=1)
            kept = order[:, : max(1, int(steps * self.fraction))]
        edge = sample[:, None] * steps + kept
        return flow_rl.Credit(
            edge.reshape(-1),
            jnp.repeat(advantage[sample], kept.shape[1]),
            jnp.repeat(live[sample].astype(jnp.float32), kept.shape[1]),
        )


_BY_GROUP = {"scale": "group", "ddof": 1, "eps": 1e-8, "drop_tied": False}
_WITH_KL = {"objective": {"kl_coefficient": 0.04, "kl_kind": "flow_grpo_code"}}
_PUBLISHED: dict[str, dict[str, Any]] = {
    "flow_grpo": {"steps": 10, "updates": 2, "group_size": 24, **_WITH_KL},
    "flow_grpo_fast": {
        "steps": 10,
        "updates": 2,
        "group_size": 24,
        "window": {"schedule": "random", "size": 3, "high": 5},
        "same_noise": True,
        "fraction": 1.0,
        **_WITH_KL,
    },
    "dance_grpo": {
        "steps": 16,
        "updates": 3,
        "group_size": 12,
        "preset": "dance_grpo",
        "strength": 0.3,
        "same_noise": True,
        "trained": "random",
        "fraction": 0.6,
        **_BY_GROUP,
    },
    "mix_grpo": {
        "steps": 25,
        "updates": 4,
        "group_size": 12,
        "window": {"schedule": "progressive", "size": 4, "iterations": 25},
        "final": "x0_hat",
        "same_noise": True,
        "fraction": 1.0,
        **_BY_GROUP,
    },
}
PRESETS = tuple(_PUBLISHED)


def preset(
    name: str,
    event_shape: Sequence[int],
    *,
    objective: Mapping[str, Any] | None = None,
    **changes: Any,
) -> flow_rl.Setup:
    """The published settings of a method, with changes.

    Grids are uniform ones, shifted by 3, which is not the grid of the published runs:
    Flow-GRPO and its fast variant walked SD3.5's own, ``grid=flows
    .discrete_shifted_grid(10, 3.0)``. The optimiser is the caller's; published are
    AdamW with 3e-4 for LoRA (Flow-GRPO) and 1e-5 for all weights (DanceGRPO), weight
    decay 1e-4, clip norm 1.

    Args:
        name: 'flow_grpo', 'flow_grpo_fast', 'dance_grpo' or 'mix_grpo'.
        event_shape: of one sample.
        objective: changed fields of the objective.
        **changes: 'steps' and 'shift' of the grid (or the whole 'grid'), 'updates', and
            fields of :class:`Chains`.

    Raises:
        ValueError: an unknown preset, or settings out of range.
        TypeError: an unknown field.

    Example:
        >>> setup = preset("mix_grpo", (32, 32, 3), steps=10)
        >>> iteration = flow_rl.make_iteration(
        ...     policy, setup.method, reward, optimizer, setup.objective,
        ...     updates=setup.updates,
        ... )  # doctest: +SKIP

    References:
        Flow-GRPO, arXiv 2505.05470 (SD3.5; KL 0.04 as its code scales it). DanceGRPO,
        arXiv 2505.07818 (FLUX). MixGRPO, arXiv 2507.21802 (FLUX).
    """
    check_choice("preset", name, PRESETS)
    published = _PUBLISHED[name]
    return flow_rl.make_setup(Chains, event_shape, published, changes, objective)
