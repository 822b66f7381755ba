"""One iteration of RL on a flow model: rollout, rewards, credit, updates.

What differs between methods is how samples are drawn and how rewards become the
advantages of single transitions; a :class:`Method` says both. Everything else is here:
chunks of prompts, rewards on the device or on the host, minibatches, microbatches,
a mesh of devices, KL to a reference, EMA, the check that the first ratio is 1, and the
counting of updates that were skipped.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from tmdjax import flows, rl
from tmdjax.core import prng
from tmdjax.core.checks import (
    check_batch,
    check_choice,
    check_count,
    check_range,
    check_same_shape,
)
from tmdjax.core.mesh import cut_by_batch, under_mesh
from tmdjax.core.types import Array, ArrayLike, Cond, Params, PyTree, Velocity
from tmdjax.rewards import host
from tmdjax.train.iteration import Iteration
from tmdjax.train.sharding import fsdp_shardings
from tmdjax.train.state import TrainState, create_state, make_train_step

# What a key of an iteration is folded with.
_ROLLOUT, _UPDATE = 0, 1


class Policy(NamedTuple):
    """A flow model as RL sees it: what is trained, and what is held constant.

    Attributes:
        velocity: ``(params, frozen) -> velocity(x, t, cond)``, the same function in
            rollout and update, with its guidance.
        reference: ``frozen -> velocity`` that the KL refers to, or None.
        condition: ``(frozen, batch) -> cond`` [prompt, ...], such as the encoding of a
            text; computed once for the rollout and once for the update.
        frozen: arrays that no update changes (a base under adapters, an encoder).
    """

    velocity: Callable[[Params, PyTree], Velocity]
    reference: Callable[[PyTree], Velocity] | None = None
    condition: Callable[[PyTree, Any], Cond] = lambda frozen, batch: None
    frozen: PyTree = ()


class Credit(NamedTuple):
    """Which transitions train, and how.

    Attributes:
        edge: int [n], transitions of the record, n known before the rewards.
        advantage: float32 [n].
        weight: float32 [n] >= 0, 0 leaves a transition out of loss and denominator.
    """

    edge: Any
    advantage: Any
    weight: Any


@runtime_checkable
class Method(Protocol):
    """How samples are drawn and how credit is given; pure but for ``plan``.

    Attributes:
        group_size: samples a prompt.
        reduction: of log-probs over event dimensions, that of the objective.
    """

    group_size: int
    reduction: str

    def plan(self, iteration: int) -> tuple[flows.CoefficientTable, PyTree]:
        """Table and plan of an iteration, on the host (arrays of recurring shapes)."""
        ...

    def rollout(
        self,
        keys: Any,
        velocity: Velocity,
        cond: Cond,
        table: flows.CoefficientTable,
        plan: PyTree,
    ) -> tuple[Array, rl.Transitions]:
        """Samples [prompt * group_size, *event], groups in a row, and transitions.

        Nodes and edges of the record are ordered by prompt first. Keys are [prompt].
        """
        ...

    def credit(
        self, rewards: Array, transitions: rl.Transitions, plan: PyTree, key: Any
    ) -> Credit:
        """Credit from the rewards [prompt * group_size]; traced."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostReward:
    """A reward computed on the host, see :mod:`tmdjax.rewards.host`.

    Attributes:
        fn: ``(images numpy [n, ...], prompts: list of n rows) -> n numbers``; a row is
            the batch at that prompt, {name: numpy array}. It runs in a thread; with
            several chunks it may run in several at once.
        timeout: seconds for one chunk.
    """

    fn: Callable[[np.ndarray, list[Any]], Any]
    timeout: float = 600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss of a transition: clipped surrogate and KL to the reference.

    Attributes:
        clip_range: of the ratio, a number or (low, high); it belongs to `reduction`.
        reduction: of log-probs over event dimensions, 'mean' or 'sum'.
        kl_coefficient: weight of the KL, >= 0.
        kl_kind: see :func:`tmdjax.flows.transition_kl`.
        step_weight: see :func:`tmdjax.flows.step_weights`.
    """

    clip_range: rl.ClipRange = 1e-4
    reduction: str = "mean"
    kl_coefficient: float = 0.0
    kl_kind: str = "transition"
    step_weight: str = "none"

    def __post_init__(self) -> None:
        rl.check_clip_range(self.clip_range, self.reduction)
        check_range("kl_coefficient", self.kl_coefficient, 0)
        check_choice("kl_kind", self.kl_kind, flows.KL_KINDS)
        check_choice("step_weight", self.step_weight, flows.STEP_WEIGHTS)


_START = 1 << 20
"""Folded into a key for the initial noise; steps of a grid are below it."""


def initial_noise(keys: Any, event_shape: tuple[int, ...]) -> Array:
    """Where the walks under these keys start: standard normal [key, *event]."""
    return prng.normal(prng.fold_in(keys, _START), event_shape)


class Rollout(NamedTuple):
    """What an iteration drew and how it was rewarded.

    Attributes:
        batch: the prompts, {name: [prompt, ...]}.
        records: transitions of each chunk of the prompts, in order.
        rewards: float32 numpy [prompt * group_size].
        number: of the iteration, int32.
        table: coefficients of the sampler, see :meth:`Method.plan`.
        plan: see :meth:`Method.plan`.
    """

    batch: Any
    records: tuple[rl.Transitions, ...]
    rewards: np.ndarray
    number: Any
    table: flows.CoefficientTable
    plan: PyTree


class Setup(NamedTuple):
    """What a paper fixes.

    Attributes:
        method: how samples are drawn and credited.
        objective: the loss.
        updates: minibatches an iteration.
    """

    method: Any
    objective: Objective
    updates: int


def make_iteration(
    policy: Policy,
    method: Method,
    reward: Callable[[Array, Any], ArrayLike] | HostReward,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    *,
    updates: int = 1,
    microbatches: int = 1,
    chunks: int = 1,
    ema_decay: float | None = None,
    skip_above: float | None = None,
    mesh: Mesh | None = None,
) -> Iteration[TrainState, Rollout]:
    """Builds ``iteration(state, batch, key) -> (state, metrics)``, a host function.

    Collecting runs a compiled program once a chunk, and the reward; learning runs one
    once. Noise depends on key, iteration, prompt and sample alone, not on chunks or
    devices. The number of the iteration is that of the state: ``state.step //
    updates``.

    Args:
        policy: what is trained.
        method: how it is rolled out and credited.
        reward: ``(samples [n, *event], prompts) -> [n]``, jittable, prompts being the
            batch with each row repeated ``group_size`` times; or a
            :class:`HostReward`, which scores a chunk while the next one is drawn.
        optimizer: optax transformation.
        objective: the loss.
        updates: minibatches an iteration, each one optimiser step.
        microbatches: parts of a minibatch (memory, not maths).
        chunks: parts of the batch of prompts, rolled out one after the other.
        ema_decay: see :func:`tmdjax.train.make_train_step`.
        skip_above: see there.
        mesh: from :func:`tmdjax.train.make_mesh`; prompts and transitions are spread
            over its data and fsdp axes, large parameters over fsdp. None leaves all on
            one device.

    Returns:
        The iteration; ``init(params)`` makes its state. ``batch`` is {name: [prompt,
        ...]}; learning donates the state. Metrics are float32 scalars: reward_mean,
        reward_group_std, tied_group_fraction, loss, grad_norm, kl (means over updates
        that were not skipped), skipped_updates, ratio_error (max |ratio - 1| in the
        first minibatch), clip_fraction_first and clip_fraction_last (of the
        minibatches).

    Raises:
        ValueError: a KL without a reference, a reduction unlike the method's, counts
            below 1; (when called) a batch that does not divide into chunks, or a chunk
            over the mesh.
        RewardError: (when called) a reward that fails or is not finite; the state is
            as it was before the iteration, and can be used again.
        RatioError: (at the first call) training and sampling disagree; the updates of
            this iteration are lost with the state.
    """
    for name, count in (
        ("updates", updates),
        ("microbatches", microbatches),
        ("chunks", chunks),
    ):
        check_count(name, count)
    if objective.kl_coefficient and policy.reference is None:
        raise ValueError(
            f"kl_coefficient={objective.kl_coefficient} needs a reference policy; give "
            f"Policy(reference=...), or set it to 0."
        )
    if objective.reduction != method.reduction:
        raise ValueError(
            f"the objective reduces log-probs by {objective.reduction!r}, the method "
            f"by {method.reduction!r}; set both alike (and the clip range with them)."
        )
    group_size = method.group_size
    ways = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    frozen = policy.frozen
    if mesh is not None:
        frozen = jax.device_put(frozen, fsdp_shardings(frozen, mesh))

    def on_mesh(fn: Any) -> Any:
        return fn if mesh is None else under_mesh(fn, mesh)

    @jax.jit
    @on_mesh
    def rollout(
        params: Any,
        frozen: Any,
        batch: Any,
        key: Any,
        number: Any,
        first: Any,
        table: Any,
        plan: Any,
    ) -> Any:
        size = jax.tree.leaves(batch)[0].shape[0]
        key = jax.random.fold_in(jax.random.fold_in(key, number), _ROLLOUT)
        keys = cut_by_batch(prng.sample_keys(key, size, first))
        velocity = policy.velocity(params, frozen)
        cond = policy.condition(frozen, cut_by_batch(batch))
        return method.rollout(keys, velocity, cond, table, plan)

    @functools.partial(jax.jit, donate_argnums=0)
    @on_mesh
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
        prompts = rewards.shape[0] // group_size
        transitions = rl.concatenate(records, prompts // len(records))
        credit = method.credit(rewards, transitions, plan, credit_key)
        check_same_shape("advantage", credit.advantage, "edge", credit.edge)
        check_same_shape("weight", credit.weight, "edge", credit.edge)
        loss_fn = functools.partial(
            _loss,
            policy,
            objective,
            frozen,
            policy.condition(frozen, cut_by_batch(batch)),
            transitions,
            table,
        )
        step = make_train_step(
            loss_fn,
            optimizer,
            ema_decay=ema_decay,
            microbatches=microbatches,
            reductions={"ratio_error": jnp.max},
            skip_above=skip_above,
        )
        parts = _minibatches(credit, updates, microbatches * ways, order_key)
        initial = state
        state, each = jax.lax.scan(
            lambda state, part: step(state, cut_by_batch(part), step_key), state, parts
        )
        if mesh is not None:
            shardings = fsdp_shardings(initial, mesh)
            state = jax.lax.with_sharding_constraint(state, shardings)
        group = jnp.repeat(jnp.arange(prompts), group_size)
        metrics = rl.group_statistics(rewards, group, prompts)
        good = each["skipped"] == 0
        done = jnp.maximum(jnp.sum(good), 1)
        for name in ("loss", "kl", "grad_norm"):
            metrics[name] = jnp.sum(jnp.where(good, each[name], 0)) / done
        metrics["skipped_updates"] = jnp.sum(each["skipped"])
        metrics["ratio_error"] = each["ratio_error"][0]
        clipped = jnp.where(good, each["clip_fraction"], 0)
        metrics["clip_fraction_first"] = clipped[0]
        metrics["clip_fraction_last"] = clipped[-1]
        return state, metrics

    score = None
    if not isinstance(reward, HostReward):
        score = jax.jit(
            lambda samples, prompts: reward(samples, _repeat(prompts, group_size))
        )
    checked = False

    def on_devices(tree: Any) -> Any:
        return (
            tree if mesh is None else jax.device_put(tree, fsdp_shardings(tree, mesh))
        )

    def init(params: Params) -> TrainState:
        return on_devices(create_state(params, optimizer, ema=ema_decay is not None))

    def collect(state: TrainState, batch: Any, key: Any) -> Rollout:
        size = _chunk_size(batch, chunks, ways)
        number = np.int32(int(state.step) // updates)
        table, plan = method.plan(int(number))
        params = on_devices(state.params)
        records, scored = [], []
        for first in range(0, size * chunks, size):
            part = jax.tree.map(lambda leaf: leaf[first : first + size], batch)  # noqa: B023
            samples, record = rollout(
                params, frozen, part, key, number, np.int32(first), table, plan
            )
            records.append(record)
            scored.append(_submit(reward, score, samples, part, first, group_size))
        rewards = np.concatenate([pending() for pending in scored])
        return Rollout(batch, tuple(records), rewards, number, table, plan)

    def learn(state: TrainState, drawn: Rollout, key: Any) -> Any:
        nonlocal checked
        _chunk_size(drawn.batch, chunks, ways)
        state, metrics = update(
            on_devices(state),
            frozen,
            drawn.batch,
            drawn.records,
            drawn.rewards,
            key,
            drawn.number,
            drawn.table,
            drawn.plan,
        )
        if not checked:
            error = float(metrics["ratio_error"])
            rl.check_first_ratio(error, objective.clip_range)
            checked = error > 0  # at 0 nothing need have been live: look again
        return state, metrics

    return Iteration(
        init=init,
        collect=collect,
        learn=learn,
        programs={"rollout": rollout, "update": update},
    )


def _chunk_size(batch: Any, chunks: int, ways: int) -> int:
    """Prompts a chunk."""
    leaves = jax.tree.leaves(batch)
    if not leaves:
        raise ValueError(
            "the batch holds no arrays; give {name: [prompt, ...]}, or the number of "
            "each prompt where there is nothing else."
        )
    prompts = np.shape(leaves[0])[0]
    for leaf in leaves:
        check_batch("an array of the batch", leaf, prompts)
    if prompts % chunks:
        raise ValueError(
            f"{prompts} prompts do not divide into chunks={chunks}; choose a divisor."
        )
    size = prompts // chunks
    if size % ways:
        raise ValueError(
            f"a chunk of {size} prompts does not divide over {ways} devices; choose a "
            f"multiple."
        )
    return size


def _repeat(batch: Any, group_size: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, group_size, axis=0), batch)


def _submit(
    reward: Any, score: Any, samples: Array, part: Any, first: int, group_size: int
) -> Callable[[], np.ndarray]:
    """Starts to score a chunk; the call waits for its rewards, checked."""
    first_sample = first * group_size

    def prompts() -> list[Any]:
        host_part = jax.device_get(part)
        rows = [
            jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), host_part)
            for i in range(samples.shape[0] // group_size)
        ]
        return [row for row in rows for _ in range(group_size)]

    if score is None:
        pending = host.submit(
            reward.fn, samples, prompts(), first_sample, timeout=reward.timeout
        )
        return pending.result
    found = score(samples, part)

    def result() -> np.ndarray:
        values = np.asarray(found)
        if values.shape == samples.shape[:1] and np.isfinite(values).all():
            return values.astype(np.float32)
        return host.check_rewards(values, prompts(), first_sample)

    return result


def _minibatches(credit: Credit, updates: int, multiple: int, key: Any) -> Any:
    """[updates, n] each: transitions in random order, padded with weight 0.

    n is a multiple of the one given, which does not change what is in a minibatch.
    Weights are scaled so that a plain mean over a minibatch is its weighted mean.
    """
    count = credit.edge.shape[0]
    share = -(-count // updates)
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


def _loss(
    policy: Policy,
    objective: Objective,
    frozen: Any,
    cond: Any,
    transitions: rl.Transitions,
    table: flows.CoefficientTable,
    params: Params,
    part: Any,
    keys: Any,
) -> tuple[Array, dict[str, Array]]:
    """Weighted loss and metrics of each transition of a microbatch."""
    del keys
    edge, weight = part["edge"], part["weight"]
    step = transitions.step[edge]
    reference = None
    if objective.kl_coefficient and policy.reference is not None:
        reference = policy.reference(frozen)
    scores = flows.score_transitions(
        policy.velocity(params, frozen),
        transitions.states[transitions.source[edge]],
        transitions.states[transitions.target[edge]],
        table.rows(step, jnp.float32),
        jax.tree.map(lambda leaf: leaf[transitions.prompt[edge]], cond),
        reduction=objective.reduction,
        reference=reference,
        kl_kind=objective.kl_kind,
    )
    behaviour = transitions.log_prob[edge]
    surrogate = rl.clipped_surrogate(
        scores.log_prob,
        behaviour,
        part["advantage"],
        clip_range=objective.clip_range,
    )
    if objective.step_weight != "none":
        surrogate *= flows.step_weights(table, objective.step_weight)[step]
    log_ratio = scores.log_prob - behaviour
    low, high = rl.beyond_clip(log_ratio, objective.clip_range)
    live = weight > 0
    loss = weight * (surrogate + objective.kl_coefficient * scores.kl)
    return jnp.where(live, loss, 0.0), {
        "kl": jnp.where(live, weight * scores.kl, 0.0),
        "clip_fraction": weight * (low | high),
        "ratio_error": jnp.where(live, rl.ratio_error(log_ratio), 0.0),
    }
