"""Rollouts that branch: samples share the network calls of their common past."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax import rl
from tmdjax.core import prng
from tmdjax.core.checks import check_batch
from tmdjax.core.types import Array, Cond, Data, SampleKeys, Velocity
from tmdjax.flows.rollout import rollout
from tmdjax.flows.table import CoefficientTable
from tmdjax.flows.transition import gaussian_log_prob, gaussian_transition

_CHILD = 1 << 21
"""Folded into the key of a branch, plus b, for its child b; steps are below it."""


def tree_rollout(
    keys: SampleKeys | None,
    velocity: Velocity,
    x: Data,
    table: CoefficientTable,
    cond: Cond = None,
    *,
    splits: Sequence[int],
    branches: int = 2,
    correlation: float | None = None,
    reduction: str = "mean",
    noise: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Walks a table from one root a tree; all live nodes of all trees in one batch.

    Between splits a branch is a rollout of a slice of the table under its own key; at a
    split every node is evaluated once and its children differ in their noise alone. So
    noise depends on a node's ancestry, not on the layout of the batch, and a tree
    without splits is a rollout.

    Args:
        keys: typed keys [tree]; None where the noise is given.
        velocity: ``(x, t, cond) -> v``.
        x: roots [tree, *event].
        table: coefficients; at splits the column c scales the noise.
        cond: pytree of [tree * leaf, ...], one condition a leaf, or None. A node is
            conditioned as the first leaf below it.
        splits: steps at which every node gets its children, increasing, static, in
            [0, steps - 2].
        branches: K.
        correlation: s of (z_0 + s eta_b) / sqrt(1 + s^2), z_0 shared by siblings: each
            child's noise is standard normal, siblings correlate by 1 / (1 + s^2). None
            draws them independently (s -> infinity).
        reduction: of log-probs.
        noise: standard normal noise of the edges [tree, node - 1, *event], in the order
            of their log-probs, instead of keys: to replay what other code drew. Rows
            without noise ignore theirs.

    Returns:
        Samples x0_hat of the last step [tree, leaf, *event]; states [tree, node,
        *event]; log-probs of the edges [tree, node - 1], 0 where a step has none.

    Raises:
        ValueError: splits that do not fit the table, conditions that are not one a
            leaf, noise of another shape, or noise beside a correlation to draw it with.
    """
    tree = rl.make_tree(len(table), splits, branches)
    for leaf in jax.tree.leaves(cond):
        check_batch("cond", leaf, x.shape[0] * tree.leaves)
    if noise is not None:
        _check_noise(noise, (x.shape[0], tree.edges, *x.shape[1:]), correlation)
    trees, event = x.shape[0], x.shape[1:]
    states, log_probs = [x[:, None]], []

    def store(level: Array, log_prob: Array) -> None:
        """Keeps [step, tree * node, ...] by tree."""
        for kept, stacked in ((states, level), (log_probs, log_prob)):
            by_tree = stacked.reshape(len(stacked), trees, -1, *stacked.shape[2:])
            by_tree = jnp.moveaxis(by_tree, 0, 1)
            kept.append(by_tree.reshape(trees, -1, *stacked.shape[2:]))

    def of_step(step: int) -> Array:
        """The noise of the edges of a step, [tree * node, *event]."""
        first, last = np.searchsorted(tree.depth[1:], [step + 1, step + 2])
        return jnp.asarray(noise, x.dtype)[:, first:last].reshape(-1, *event)

    x0_hat, start = x, 0
    for stop in [*(s + 1 for s in splits), len(table)]:
        splitting = stop - 1 in splits
        piece = table[start:stop]
        if splitting:
            piece = dataclasses.replace(
                piece, final="mean"
            )  # its noise is drawn by child
        here = jax.tree.map(functools.partial(_of_first_leaf, len(x)), cond)
        given = None
        if noise is not None:
            own = [of_step(step) for step in range(start, stop - splitting)]
            given = jnp.stack([*own, *[jnp.zeros_like(x)] * splitting])
        drawn = rollout(
            keys, velocity, x, piece, here, reduction=reduction, noise=given
        )
        x, x0_hat, start = drawn.states[-1], drawn.x0_hat, stop
        inner = slice(0, -1 if splitting else None)
        if len(piece) > splitting:
            store(drawn.states[1:][inner], drawn.log_prob[inner])
        if not splitting:
            continue
        row = table.rows(stop - 1, x.dtype)
        if noise is None:
            keys, z = _drawn(keys, row["step"], branches, correlation, x)
        else:
            z = of_step(stop - 1)
        mean = jnp.repeat(x, branches, 0)
        x = gaussian_transition(mean, row["c"] * row["S"], z)
        std = jnp.where(row["mask"], row["log_prob_std"], 1.0)
        density = gaussian_log_prob(x, mean, std, reduction)
        store(x[None], jnp.where(row["mask"], density, 0.0)[None])
    return (
        x0_hat.reshape(trees, -1, *event),
        jnp.concatenate(states, axis=1),
        jnp.concatenate(log_probs, axis=1),
    )


def _check_noise(
    noise: Array, shape: tuple[int, ...], correlation: float | None
) -> None:
    if np.shape(noise) != shape:
        raise ValueError(
            f"noise has shape {np.shape(noise)}; give one an edge, {shape}."
        )
    if correlation is not None:
        raise ValueError(
            f"correlation={correlation} says how siblings' noise is drawn, but noise "
            f"is given; give noise that correlates, and correlation=None."
        )


def _drawn(
    keys: Any, step: Array, branches: int, correlation: float | None, x: Array
) -> tuple[Any, Array]:
    """Keys of the children of every node, and the noise that leads to them."""
    event = x.shape[1:]
    children = prng.fold_in(keys[:, None], _CHILD + jnp.arange(branches)).reshape(-1)
    z = prng.normal(prng.fold_in(children, step), event, x.dtype)
    if correlation is not None:
        shared = prng.normal(prng.fold_in(keys, step), event, x.dtype)
        scale = 1 / math.sqrt(1 + correlation**2)
        z = scale * (jnp.repeat(shared, branches, 0) + correlation * z)
    return children, z


def _of_first_leaf(nodes: int, leaf: Array) -> Array:
    """Rows [tree * leaf, ...] of the first leaf below each of so many nodes."""
    return leaf.reshape(nodes, -1, *leaf.shape[1:])[:, 0]
