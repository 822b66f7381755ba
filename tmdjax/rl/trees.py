"""Trees of samples: their shape, what nodes are worth, advantages by depth.

Nodes are numbered breadth-first: node 0 is the root, depth d holds the states after d
steps, child b of the n-th node of a level is number K n + b of the next. Edge e leads
to node e + 1; its step is the depth of that node minus one.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax.core.checks import check_choice, check_count
from tmdjax.core.types import Array
from tmdjax.rl.advantages import group_advantages
from tmdjax.rl.records import Transitions

FUSIONS = ("mean", "prob")
TREE_BASELINES = ("depth", "parent")
STD_SCOPES = ("depth", "tree")
_MOST_LEAVES = 100_000


@dataclasses.dataclass(frozen=True, eq=False)
class Tree:
    """The shape of a tree, on the host.

    Attributes:
        parent: int [node], -1 for the root.
        depth: int [node].
        live: int [step], nodes before each step: the network calls.
        leaves: number of nodes of the last depth.
        last_split: the last step that splits, -1 if none does.
    """

    parent: np.ndarray
    depth: np.ndarray
    live: np.ndarray
    leaves: int
    last_split: int

    @property
    def nodes(self) -> int:
        """Number of nodes, the root included."""
        return len(self.parent)

    @property
    def edges(self) -> int:
        """Transitions: every node but the root has one that leads to it."""
        return len(self.parent) - 1

    @property
    def first_leaf(self) -> np.ndarray:
        """The first of the leaves below each node, int [node]."""
        level = np.append(self.live, self.leaves)[self.depth]
        in_level = np.arange(self.nodes) - np.searchsorted(self.depth, self.depth)
        return in_level * (self.leaves // level)

    @property
    def calls(self) -> int:
        """Network calls of one rollout."""
        return int(self.live.sum())


def make_tree(steps: int, splits: Sequence[int], branches: int = 2) -> Tree:
    """The tree of so many steps that splits in ``branches`` at each split step.

    Raises:
        ValueError: splits out of [0, steps - 2] (two children of the last step would
            share one x0_hat), unsorted or repeated; more than 100 000 leaves.
        TypeError: a split that is no integer.
    """
    check_count("steps", steps)
    check_count("branches", branches, 2)
    splits = [check_count("a split step", s, 0) for s in splits]
    wrong = [s for s in splits if s > steps - 2]
    if wrong or splits != sorted(set(splits)):
        raise ValueError(
            f"splits={splits} must be increasing, without repeats, in [0, {steps - 2}] "
            f"for {steps} steps{f'; {wrong} are outside' if wrong else ''}."
        )
    if branches ** len(splits) > _MOST_LEAVES:
        raise ValueError(
            f"branches={branches} at {len(splits)} splits make "
            f"{branches ** len(splits)} leaves; a tree has at most {_MOST_LEAVES}."
        )
    parent, depth, live = [-1], [0], []
    first, count = 0, 1
    for step in range(steps):
        live.append(count)
        children = branches if step in splits else 1
        parent += [first + n for n in range(count) for _ in range(children)]
        first, count = first + count, count * children
        depth += [step + 1] * count
    return Tree(
        parent=np.array(parent),
        depth=np.array(depth),
        live=np.array(live),
        leaves=count,
        last_split=splits[-1] if splits else -1,
    )


def tree_transitions(tree: Tree, states: Array, log_prob: Array) -> Transitions:
    """The record of several trees of one shape, whose samples are their leaves.

    A transition belongs to the first of the samples below the node where it begins.

    Args:
        tree: their shape.
        states: [tree, node, *event].
        log_prob: [tree, node - 1].
    """
    count = len(states)
    number, parent = np.arange(count)[:, None], tree.parent[1:]
    first = number * tree.nodes
    sample = number * tree.leaves + tree.first_leaf[parent]
    return Transitions(
        states=states.reshape(-1, *states.shape[2:]),
        source=jnp.asarray((first + parent).reshape(-1)),
        target=jnp.asarray((first + np.arange(1, tree.nodes)).reshape(-1)),
        step=jnp.asarray(np.tile(tree.depth[1:] - 1, count)),
        sample=jnp.asarray(sample.reshape(-1)),
        log_prob=log_prob.reshape(-1),
    )


def shuffle_depths(advantage: Array, tree: Tree, key: Any) -> Array:
    """Permutes advantages [tree, node - 1] among the nodes of each depth of a tree.

    A control: their values are kept, and which edge earned them is lost.
    """
    draw = jax.random.uniform(key, advantage.shape)
    depth = jnp.asarray(tree.depth[1:])
    order = jnp.lexsort((draw, jnp.broadcast_to(depth, draw.shape)), axis=1)
    return jnp.take_along_axis(advantage, order, axis=1)


def fuse_rewards(
    rewards: Any, tree: Tree, rule: str = "mean", log_prob: Any = None
) -> Array:
    """What every node is worth, from the rewards of the leaves below it.

    Args:
        rewards: [tree, leaf].
        tree: its shape; any parent array will do, leaves in the order of their nodes.
        rule: 'mean' over leaves, the unbiased estimate of E[R | node]; or 'prob',
            bottom-up means over children weighted by the softmax of their edges'
            log-probs (the released code; counts the density twice).
        log_prob: [tree, node - 1], for 'prob'.

    Returns:
        [tree, node] float32.

    Raises:
        ValueError: an unknown rule, log-probs missing, or rewards that are not one a
            leaf.
    """
    check_choice("rule", rule, FUSIONS)
    rewards = jnp.asarray(rewards, jnp.float32)
    leaf = np.setdiff1d(np.arange(tree.nodes), tree.parent)
    if rewards.ndim != 2 or rewards.shape[1] != len(leaf):
        raise ValueError(
            f"rewards have shape {rewards.shape}; give [tree, leaf] with "
            f"{len(leaf)} leaves, in the order of their nodes."
        )
    if rule == "prob" and log_prob is None:
        raise ValueError("rule='prob' weighs children by log_prob; give it.")
    trees = rewards.shape[0]
    value = jnp.zeros((trees, tree.nodes)).at[:, leaf].set(rewards)
    count = jnp.zeros(tree.nodes).at[leaf].set(1.0)
    for depth in range(int(tree.depth.max()), 0, -1):
        node = np.flatnonzero(tree.depth == depth)
        parent = tree.parent[node]
        if rule == "mean":
            value = value.at[:, parent].add(value[:, node])
            count = count.at[parent].add(count[node])
            continue
        assert log_prob is not None
        edge = log_prob[:, node - 1]
        top = jnp.full(value.shape, -jnp.inf).at[:, parent].max(edge)
        weight = jnp.exp(edge - top[:, parent])
        total = jnp.zeros(value.shape).at[:, parent].add(weight)
        value = value.at[:, parent].add(weight / total[:, parent] * value[:, node])
    return value / count if rule == "mean" else value


def check_depth_options(baseline: str, std_scope: str) -> None:
    """Raises ValueError unless :func:`depth_advantages` takes these together."""
    check_choice("baseline", baseline, TREE_BASELINES)
    check_choice("std_scope", std_scope, STD_SCOPES)
    if baseline == "parent" and std_scope != "tree":
        raise ValueError(
            "baseline='parent' compares across depths; set std_scope='tree'."
        )


def depth_advantages(
    value: Any,
    tree: Tree,
    *,
    baseline: str = "depth",
    std_scope: str = "depth",
    clip: float = 5.0,
) -> Array:
    """Advantage of every edge: its end node's, among the nodes of that depth and tree.

    (value - mean) / (std + 1e-8), ddof 1, 0 for ties and single nodes. Depths with two
    nodes therefore give +-1/sqrt(2) whatever their difference.

    Args:
        value: [tree, node], of :func:`fuse_rewards`.
        tree: its shape.
        baseline: 'depth', the mean value at the node's depth; 'parent', the value of
            the node's parent, so that an edge is credited with its own branching alone.
        std_scope: 'depth'; or 'tree', one standard deviation (of the leaves) for all
            depths, which keeps magnitudes. The parent's baseline uses 'tree'.
        clip: bound of the absolute value.

    Returns:
        [tree, node - 1].

    Raises:
        ValueError: unknown options, or 'parent' with std_scope='depth'.
    """
    check_depth_options(baseline, std_scope)
    value = jnp.asarray(value)
    trees, levels = value.shape[0], int(tree.depth.max()) + 1
    group = (jnp.arange(trees)[:, None] * levels + tree.depth).reshape(-1)

    def within(scale: str, eps: float = 1e-8) -> Array:
        found = group_advantages(
            value.reshape(-1),
            group,
            num_groups=trees * levels,
            scale=scale,
            ddof=1,
            eps=eps,
            allow_singletons=True,
        )
        return found.reshape(value.shape)

    if baseline == "depth" and std_scope == "depth":
        advantage = within("group")
    else:
        # raw and normalised deviations of the leaves give their standard deviation
        raw, leaf = within("none"), tree.depth == levels - 1
        normalised = within("group", 0.0)
        std = jnp.sqrt(
            jnp.sum(jnp.square(raw), axis=1, where=leaf) / max(int(leaf.sum()) - 1, 1)
        )
        tied = ~jnp.any(jnp.where(leaf, normalised, 0) != 0, axis=1)
        if baseline == "parent":
            raw = value - value[:, np.maximum(tree.parent, 0)]
        advantage = jnp.where(tied[:, None], 0, raw / (std + 1e-8)[:, None])
    return jnp.clip(advantage, -clip, clip)[:, 1:]
