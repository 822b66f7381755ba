"""BranchGRPO: one tree of samples a prompt, credit by depth, pruned updates.

All samples of a prompt share a trunk and split in K at a few denoising steps, so early
network calls are shared (arXiv 2509.06040). A node is worth the mean reward of its
leaves; advantages compare the nodes of one depth; pruning leaves transitions out of
the backward pass and nothing else.
"""

import dataclasses
import functools
import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from tmdjax import flows, rl
from tmdjax.core.checks import check_choice, check_count, check_range
from tmdjax.core.types import Array, Grid, Velocity
from tmdjax.train import flow_rl

_LOGGER = logging.getLogger("tmdjax")

WIDTH_MODES = ("branch_best", "first_steps", "extremes")


def depth_window(
    depths: Sequence[int], iteration: int, *, interval: int = 30, stop: int
) -> list[int]:
    """Depths to prune now: the window slides towards the root as training goes on.

    Args:
        depths: child depths pruned at the start.
        iteration: from 0.
        interval: iterations a shift of one.
        stop: the shallowest depth that it may reach.
    """
    check_count("interval", interval)
    if not depths:
        return []
    shift = min(iteration // interval, max(0, min(depths) - stop))
    return sorted(d - shift for d in depths)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trees:
    """A :class:`tmdjax.train.flow_rl.FlowMethod`: one tree of samples a prompt.

    Attributes:
        grid: times, N steps.
        event_shape: of one sample.
        splits: split steps, in [0, N - 2], increasing.
        branches: K.
        num_generations: leaves; None derives it, another number is refused.
        strength: of DanceGRPO's constant noise.
        split_scale: c, noise at splits over that elsewhere, > 0.
        split_log_prob: 'proposal', the density drawn from; 'policy' (the released
            code), biased unless c = 1.
        correlation: s; siblings' noises correlate by 1 / (1 + s^2). None draws them
            independently.
        reduction: of log-probs, 'mean' or 'sum'; that of the objective.
        fusion: what a node is worth: the 'mean' reward of its leaves, or weighted by
            the edges' densities ('prob', the released code), as
            :func:`tmdjax.rl.fuse_rewards` says.
        baseline: what it is compared with: the other nodes of its 'depth', or its
            'parent' (:func:`tmdjax.rl.depth_advantages`).
        std_scope: advantages are divided by the standard deviation of the node's
            'depth' or of the whole 'tree'.
        advantage_clip: bound of an advantage's absolute value.
        train_last: also train the last step, whose noise no sample shows (the
            released code).
        prune_depths: child depths whose edges are left out of the update.
        prune_interval: iterations after which they move one up; None never.
        prune_stop: the shallowest depth that they reach; None is the last split.
        prune_width: share of the branches (or edges) after the last split to keep; 1
            keeps all.
        width_mode: 'branch_best' keeps, of each last split, the better children;
            'first_steps' the first steps of each branch and 'extremes' the edges of
            highest and lowest advantage (both of the released code).
        prune_until: iterations that are pruned; None are all.
        mix: (stride, size): noise in these periodic windows and at splits alone, ODE
            steps elsewhere; None has noise everywhere.
        shuffle: advantages are permuted within each depth: a control in which nothing
            can be learned from credit.
    """

    grid: Grid
    event_shape: tuple[int, ...]
    splits: tuple[int, ...] = (0, 3, 6, 9)
    branches: int = 2
    num_generations: int | None = None
    strength: float = 0.3
    split_scale: float = 1.0
    split_log_prob: str = "proposal"
    correlation: float | None = None
    reduction: str = "mean"
    fusion: str = "mean"
    baseline: str = "depth"
    std_scope: str = "depth"
    advantage_clip: float = 5.0
    train_last: bool = False
    prune_depths: tuple[int, ...] = ()
    prune_interval: int | None = None
    prune_stop: int | None = None
    prune_width: float = 1.0
    width_mode: str = "branch_best"
    prune_until: int | None = None
    mix: tuple[int, int] | None = None
    shuffle: bool = False

    def __post_init__(self) -> None:
        tree = self.tree
        steps = len(self.grid) - 1
        if self.num_generations not in (None, tree.leaves):
            raise ValueError(
                f"num_generations={self.num_generations}, but {self.branches} branches "
                f"at {len(self.splits)} splits make {self.branches}^"
                f"{len(self.splits)} = {tree.leaves} leaves; set it to that, or change "
                f"the splits."
            )
        if tree.leaves < 2:
            raise ValueError("a tree without splits has one sample: nothing to learn.")
        if self.splits[0] > 0:
            warnings.warn(
                f"0 is not a split: the first {self.splits[0]} step(s) have one node a "
                f"tree, zero advantage, and learn nothing.",
                stacklevel=3,
            )
        check_range("split_scale", self.split_scale, 0, open_low=True)
        if self.split_scale != 1 and self.split_log_prob == "policy":
            warnings.warn(
                f"split_scale={self.split_scale} with split_log_prob='policy' is "
                f"biased: the score gradient at splits is {self.split_scale} times too "
                f"large. Use 'proposal'.",
                stacklevel=3,
            )
        if self.correlation is not None:
            check_range("correlation", self.correlation, 0)
        check_choice("fusion", self.fusion, rl.FUSIONS)
        rl.check_depth_options(self.baseline, self.std_scope)
        check_choice("width_mode", self.width_mode, WIDTH_MODES)
        check_choice("reduction", self.reduction, flows.REDUCTIONS)
        if self.prune_stop is not None:
            check_range("prune_stop", self.prune_stop, 1, steps)
        if self.prune_until is not None:
            check_count("prune_until", self.prune_until, 0)
        check_range("advantage_clip", self.advantage_clip, 0, open_low=True)
        check_range("prune_width", self.prune_width, 0, 1, open_low=True)
        outside = [d for d in self.prune_depths if not 1 <= d <= steps]
        if outside:
            raise ValueError(
                f"prune_depths has {outside}, outside [1, {steps}]: a depth is that of "
                f"the node an edge leads to."
            )
        self.plan(0)

    @functools.cached_property
    def tree(self) -> rl.Tree:
        """Its shape."""
        return rl.make_tree(len(self.grid) - 1, self.splits, self.branches)

    @property
    def group_size(self) -> int:
        """Leaves of a tree."""
        return self.tree.leaves

    def table(self) -> flows.CoefficientTable:
        """The coefficients."""
        steps = len(self.grid) - 1
        at_split = np.isin(np.arange(steps), self.splits)
        window = None
        if self.mix is not None:
            window = flows.periodic_windows(steps, *self.mix)
            if not np.any(window & ~at_split):
                _LOGGER.info("mix=%s leaves noise at splits alone", self.mix)
            window |= at_split
        return flows.make_table(
            "dance_grpo",
            self.grid,
            strength=self.strength,
            final="sample" if self.train_last else None,
            c=np.where(at_split, self.split_scale, 1.0),
            window=window,
            split_log_prob=self.split_log_prob,
        )

    def plan(self, iteration: int) -> tuple[flows.CoefficientTable, Any]:
        """The table, and which edges train: those surely kept, and candidates.

        'kept' and 'weight' are padded to a multiple of the leaves, so that a sliding
        window takes few sizes. 'candidates' [branch, edge] are chosen from by reward.
        """
        table, tree = self.table(), self.tree
        live = np.asarray(table.mask)[tree.depth[1:] - 1]
        late = np.zeros(tree.edges, bool)
        if self.prune_until is None or iteration < self.prune_until:
            depths = list(self.prune_depths)
            if self.prune_interval is not None:
                stop = self.prune_stop
                depths = depth_window(
                    depths,
                    iteration,
                    interval=self.prune_interval,
                    stop=tree.last_split if stop is None else stop,
                )
            live &= ~np.isin(tree.depth[1:], depths)
            if self.prune_width < 1:
                late = live & (tree.depth[1:] - 1 > tree.last_split)
        # a late edge belongs to the branch whose leaf it leads to
        branch = np.flatnonzero(late).reshape(-1, tree.leaves).T
        kept = np.flatnonzero(live & ~late)
        if self.width_mode == "first_steps":
            first = max(1, int(self.prune_width * branch.shape[1]))
            kept = np.append(kept, branch[:, :first].reshape(-1))
            branch = branch[:, :0]
        if not kept.size and not branch.size:
            raise ValueError(
                f"prune_depths={self.prune_depths} and mix={self.mix} leave no edge of "
                f"a tree to train; prune fewer depths."
            )
        padding = -len(kept) % tree.leaves
        return table, {
            "kept": np.pad(kept, (0, padding)).astype(np.int32),
            "weight": np.pad(np.ones(len(kept), np.float32), (0, padding)),
            "candidates": branch.astype(np.int32),
        }

    def rollout(
        self,
        samples: flow_rl.Samples,
        velocity: Velocity,
        table: flows.CoefficientTable,
        plan: Any,
    ) -> tuple[Array, rl.Transitions]:
        """Draws a tree a prompt."""
        del plan
        drawn, states, log_prob = flows.tree_rollout(
            samples.keys,
            velocity,
            flows.initial_noise(samples.keys, self.event_shape),
            table,
            samples.cond,
            splits=self.splits,
            branches=self.branches,
            correlation=self.correlation,
            reduction=self.reduction,
        )
        record = rl.tree_transitions(self.tree, states, log_prob)
        return drawn.reshape(-1, *self.event_shape), record

    def credit(
        self,
        rewards: Array,
        group: Array,
        transitions: rl.Transitions,
        plan: Any,
        key: Any,
    ) -> flow_rl.Credit:
        """Fuses rewards, compares depths, prunes."""
        del group  # the leaves of a tree stand in a row
        tree = self.tree
        rewards = rewards.reshape(-1, tree.leaves)
        trees = rewards.shape[0]
        log_prob = transitions.log_prob.reshape(trees, tree.edges)
        value = rl.fuse_rewards(rewards, tree, self.fusion, log_prob)
        advantage = rl.depth_advantages(
            value,
            tree,
            baseline=self.baseline,
            std_scope=self.std_scope,
            clip=self.advantage_clip,
        )
        if self.shuffle:
            advantage = rl.shuffle_depths(advantage, tree, key)
        surely = jnp.broadcast_to(plan["kept"], (trees, plan["kept"].shape[0]))
        chosen = self._choose(value[:, 1:], plan["candidates"])
        edge = jnp.concatenate([surely, chosen], axis=1)
        weight = jnp.append(plan["weight"], jnp.ones(chosen.shape[1]))
        weight = jnp.broadcast_to(weight, edge.shape)
        return flow_rl.Credit(
            (jnp.arange(trees)[:, None] * tree.edges + edge).reshape(-1),
            jnp.take_along_axis(advantage, edge, axis=1).reshape(-1),
            weight.reshape(-1),
        )

    def _choose(self, value: Array, candidates: Array) -> Array:
        """Of the edges [branch, edge] after the last split, those kept: [tree, n].

        They are judged by the value [tree, edge] of the node where they lead, which
        after the last split is that of the branch's leaf.
        """
        candidates = jnp.asarray(candidates)
        trees, length = value.shape[0], candidates.shape[1]
        if not length:
            return jnp.zeros((trees, 0), int)
        if self.width_mode == "extremes":
            flat = candidates.reshape(-1)
            keep = max(2, int(self.prune_width * flat.shape[0]))
            order = flat[jnp.argsort(value[:, flat], axis=1, stable=True)]
            low = keep - keep // 2
            return jnp.concatenate([order[:, :low], order[:, -(keep // 2) :]], 1)
        siblings = candidates.reshape(-1, self.branches, length)
        keep = max(1, int(self.prune_width * self.branches))
        of_branch = value[:, siblings[:, :, 0]]
        best = jnp.argsort(-of_branch, axis=2, stable=True)[:, :, :keep]
        edges = siblings[jnp.arange(siblings.shape[0])[:, None], best]
        return edges.reshape(trees, -1)


_PAPER = {"steps": 20, "updates": 18, "objective": {"clip_range": 1e-3}}
_PUBLISHED: dict[str, dict[str, Any]] = {
    "branchgrpo": _PAPER,
    "branchgrpo_released": {
        **_PAPER,
        "split_scale": 4.0,
        "split_log_prob": "policy",
        "train_last": True,
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
    """The published settings (FLUX), with changes.

    20 steps at shift 3, splits (0, 3, 6, 9), noise 0.3, clip range 1e-3, no KL, 18
    updates a tree. The optimiser is the caller's; published is AdamW with 1e-5, weight
    decay 1e-4, clip norm 1.

    Args:
        name: 'branchgrpo'; or 'branchgrpo_released', as the released script has it:
            noise at splits 4 times that elsewhere but scored under the smaller standard
            deviation, which is biased, and the last step trained.
        event_shape: of one sample.
        objective: changed fields of the objective.
        **changes: 'steps' and 'shift' of the grid (or the whole 'grid'), 'updates', and
            fields of :class:`Trees`.

    Raises:
        ValueError: an unknown preset, or settings out of range.
        TypeError: an unknown field.

    References:
        arXiv 2509.06040.
    """
    check_choice("preset", name, PRESETS)
    published = _PUBLISHED[name]
    return flow_rl.make_setup(Trees, event_shape, published, changes, objective)
