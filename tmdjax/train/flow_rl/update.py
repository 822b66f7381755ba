"""The updates of an iteration of RL on a flow model: credit, minibatches, loss."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tmdjax import flows, rl
from tmdjax.core.checks import check_same_shape
from tmdjax.core.mesh import cut_by_batch, under_mesh
from tmdjax.core.types import Array, Params
from tmdjax.train.flow_rl.contracts import Credit, FlowMethod, FlowObjective, Policy
from tmdjax.train.sharding import fsdp_shardings
from tmdjax.train.state import TrainState, make_train_step

_UPDATE = 1
"""Folded into the key of an iteration; its rollout folds 0."""


def make_update(
    policy: Policy,
    method: FlowMethod,
    optimizer: optax.GradientTransformation,
    objective: FlowObjective,
    *,
    updates: int,
    microbatches: int,
    ema_decay: float | None,
    skip_above: float | None,
    mesh: Mesh | None,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """The compiled program that learns from a rollout; options as of the iteration.

    Returns:
        ``(state, frozen, batch, records, rewards, key, number, table, plan) -> (state,
        metrics)``; the state is donated.
    """
    ways = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    group_size = method.group_size

    def update(
        state: TrainState,
        frozen: Any,
        batch: Any,
        records: Any,
        rewards: Array,
        key: Any,
        number: Any,
        table: flows.CoefficientTable,
        plan: Any,
    ) -> Any:
        key = jax.random.fold_in(jax.random.fold_in(key, number), _UPDATE)
        credit_key, order_key, step_key = jax.random.split(key, 3)
        samples = rewards.shape[0]
        prompts = samples // group_size
        group = jnp.repeat(jnp.arange(prompts), group_size)
        transitions = rl.concatenate(records, samples // len(records))
        credit = method.credit(rewards, group, transitions, plan, credit_key)
        check_same_shape("advantage", credit.advantage, "edge", credit.edge)
        check_same_shape("weight", credit.weight, "edge", credit.edge)
        shared = _Shared(
            policy=policy,
            objective=objective,
            frozen=frozen,
            cond=policy.condition(frozen, cut_by_batch(batch)),
            samples=samples,
            transitions=transitions,
            table=table,
        )
        step = make_train_step(
            functools.partial(transition_loss, shared),
            optimizer,
            ema_decay=ema_decay,
            microbatches=microbatches,
            reductions={"ratio_error": jnp.max},
            skip_above=skip_above,
        )
        parts = _minibatches(credit, updates, microbatches, ways, order_key)
        if objective.proximal == "recompute":
            edges = parts["edge"].reshape(updates * microbatches, -1)
            parts["proximal"] = jax.lax.map(
                lambda edge: _score(shared, state.params, cut_by_batch(edge)).log_prob,
                edges,
            ).reshape(parts["edge"].shape)
        initial = state

        def one(state: TrainState, part: Any) -> tuple[TrainState, dict[str, Array]]:
            after, found = step(state, cut_by_batch(part), step_key)
            return after, {**found, "good": after.skipped == state.skipped}

        state, each = jax.lax.scan(one, state, parts)
        if mesh is not None:
            shardings = fsdp_shardings(initial, mesh)
            state = jax.lax.with_sharding_constraint(state, shardings)
        metrics = rl.group_statistics(rewards, group, prompts)
        good = each["good"]
        done = jnp.maximum(jnp.sum(good), 1)
        for name in ("loss", "kl", "grad_norm"):
            metrics[name] = jnp.sum(jnp.where(good, each[name], 0)) / done
        metrics["ratio_error"] = each["ratio_error"][0]
        clipped = jnp.where(good, each["clip_fraction"], 0)
        if objective.proximal == "recompute":
            away = parts["proximal"] - transitions.log_prob[parts["edge"]]
            live = parts["weight"] > 0
            error = jnp.where(live, rl.ratio_error(away), 0)
            metrics["behaviour_ratio_error"] = jnp.max(error)
        metrics["clip_fraction_first"] = clipped[0]
        metrics["clip_fraction_last"] = clipped[-1]
        return state, metrics

    traced = update if mesh is None else under_mesh(update, mesh)
    return jax.jit(traced, donate_argnums=0)


def _minibatches(
    credit: Credit, updates: int, microbatches: int, ways: int, key: Any
) -> Any:
    """[updates, n] each: transitions in random order, padded with weight 0.

    n is a multiple of microbatches times ways, which does not change what is in a
    minibatch.
    Weights are scaled so that a plain mean over a minibatch is its weighted mean.
    """
    count = credit.edge.shape[0]
    if updates > count:
        raise ValueError(
            f"updates={updates}, but an iteration has {count} transitions to train on; "
            f"make at most as many."
        )
    share = -(-count // updates)
    if microbatches > share:
        raise ValueError(
            f"microbatches={microbatches}, but a minibatch has {share} transitions; "
            f"make at most as many."
        )
    multiple = microbatches * ways
    size = -(-share // multiple) * multiple
    parts = {
        "edge": credit.edge,
        "advantage": credit.advantage,
        "weight": credit.weight,
    }
    if updates > 1:
        order = jax.random.permutation(key, count)
        parts = {name: column[order] for name, column in parts.items()}
    parts = {
        name: jnp.pad(
            jnp.pad(column, (0, updates * share - count)).reshape(updates, share),
            ((0, 0), (0, size - share)),
        )
        for name, column in parts.items()
    }
    total = jnp.sum(parts["weight"], axis=1, keepdims=True)
    parts["weight"] *= size / jnp.where(total > 0, total, 1)
    return parts


class _Shared(NamedTuple):
    """What all minibatches of an iteration have in common.

    Attributes:
        policy: what is trained.
        objective: the loss.
        frozen: arrays that no update changes.
        cond: conditions, one a prompt or one a sample.
        samples: their number.
        transitions: of all samples.
        table: coefficients of the sampler.
    """

    policy: Policy
    objective: FlowObjective
    frozen: Any
    cond: Any
    samples: int
    transitions: rl.Transitions
    table: flows.CoefficientTable


def _score(shared: _Shared, params: Params, edge: Array, reference: Any = None) -> Any:
    """Log-probs of some transitions under the policy as it is trained, and their KL."""
    drawn, count = shared.transitions, shared.samples
    sample = drawn.sample[edge]
    return flows.score_transitions(
        shared.policy.velocity(params, shared.frozen),
        drawn.states[drawn.source[edge]],
        drawn.states[drawn.target[edge]],
        shared.table.rows(drawn.step[edge], jnp.float32),
        jax.tree.map(
            lambda leaf: leaf[sample // (count // leaf.shape[0])], shared.cond
        ),
        reduction=shared.objective.reduction,
        reference=reference,
        kl_kind=shared.objective.kl_kind,
    )


def transition_loss(
    shared: _Shared, params: Params, part: Any, keys: Any
) -> tuple[Array, dict[str, Array]]:
    """Weighted loss and metrics of each transition of a microbatch."""
    del keys
    edge, weight, objective = part["edge"], part["weight"], shared.objective
    reference = None
    if objective.kl_coefficient and shared.policy.reference is not None:
        reference = shared.policy.reference(shared.frozen)
    scores = _score(shared, params, edge, reference)
    proximal = part.get("proximal", shared.transitions.log_prob[edge])
    surrogate = rl.clipped_surrogate(
        scores.log_prob,
        proximal,
        part["advantage"],
        clip_range=objective.clip_range,
    )
    if objective.step_weight != "none":
        step = shared.transitions.step[edge]
        surrogate *= flows.step_weights(shared.table, objective.step_weight)[step]
    log_ratio = scores.log_prob - proximal
    low, high = rl.beyond_clip(log_ratio, objective.clip_range)
    live = weight > 0
    loss = weight * (surrogate + objective.kl_coefficient * scores.kl)
    return jnp.where(live, loss, 0.0), {
        "kl": jnp.where(live, weight * scores.kl, 0.0),
        "clip_fraction": weight * (low | high),
        "ratio_error": jnp.where(live, rl.ratio_error(log_ratio), 0.0),
    }
