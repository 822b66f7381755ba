"""One iteration of RL on a flow model: rollout, rewards, credit, updates.

Here are chunks of prompts, rewards on the device or on the host, a mesh of devices, and
the check that the first ratio is 1; :mod:`tmdjax.train.flow_rl.contracts` has what is
plugged in, :mod:`tmdjax.train.flow_rl.update` the minibatches and their loss.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from tmdjax import rl
from tmdjax.core import prng
from tmdjax.core.checks import check_batch, check_count
from tmdjax.core.mesh import cut_by_batch, under_mesh
from tmdjax.core.types import Array, ArrayLike, Params
from tmdjax.rewards import host
from tmdjax.train.flow_rl.contracts import (
    FlowMethod,
    FlowObjective,
    HostReward,
    Policy,
    Rollout,
    samples_of,
)
from tmdjax.train.flow_rl.update import make_update
from tmdjax.train.iteration import Iteration
from tmdjax.train.sharding import fsdp_shardings
from tmdjax.train.state import TrainState, create_state

_ROLLOUT = 0
"""Folded into the key of an iteration; its updates fold 1."""


def make_iteration(
    policy: Policy,
    method: FlowMethod,
    reward: Callable[[Array, Any], ArrayLike] | HostReward,
    optimizer: optax.GradientTransformation,
    objective: FlowObjective,
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
        ema_decay: of averaged parameters, each update; None keeps no average.
        skip_above: gradient norm above which an update is skipped; None skips those
            that are not finite alone.
        mesh: from :func:`tmdjax.train.make_mesh`; prompts and transitions are spread
            over its data and fsdp axes, large parameters over fsdp. None leaves all on
            one device.

    Returns:
        The iteration; ``init(params)`` makes its state. ``batch`` is {name: [prompt,
        ...]}; learning donates the state. Metrics are float32 scalars: reward_mean,
        reward_group_std, tied_group_fraction, loss, grad_norm, kl (means over updates
        that were not skipped; the state counts the others), ratio_error (max |ratio -
        1| in the first minibatch), clip_fraction_first and clip_fraction_last (of the
        minibatches); where the objective recomputes, behaviour_ratio_error (the same
        of the recomputed log-probs to the rollout's: what precision does).

    Raises:
        ValueError: a KL without a reference, a reduction unlike the method's, counts
            below 1; (when called) a batch that does not divide into chunks, or a chunk
            over the mesh.
        RewardError: (when called) a reward that fails or is not finite; the state is
            as it was before the iteration, and can be used again.
        RatioError: (at the first call; at any where ``policy.precision`` disagrees)
            training and sampling disagree; the updates of this iteration are lost with
            the state.
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
    precision, checked = policy.precision, False
    differ = precision is not None and precision.disagreement() != ""
    if objective.proximal == "auto":
        proximal = "recompute" if differ else "behaviour"
        objective = dataclasses.replace(objective, proximal=proximal)
    group_size = method.group_size
    ways = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    frozen = policy.frozen
    if mesh is not None:
        frozen = jax.device_put(frozen, fsdp_shardings(frozen, mesh))

    def draw(
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
        velocity = policy.acting(params, frozen)
        cond = policy.condition(frozen, cut_by_batch(batch))
        samples = samples_of(keys, group_size, cond)
        return method.rollout(samples, velocity, table, plan)

    rollout = jax.jit(draw if mesh is None else under_mesh(draw, mesh))
    update = make_update(
        policy,
        method,
        optimizer,
        objective,
        updates=updates,
        microbatches=microbatches,
        ema_decay=ema_decay,
        skip_above=skip_above,
        mesh=mesh,
    )
    score = None
    if not isinstance(reward, HostReward):
        score = jax.jit(
            lambda samples, prompts: reward(samples, _repeat(prompts, group_size))
        )

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
            rl.check_first_ratio(error, objective.clip_range, precision)
            # At 0 nothing need have been live: look again. In two precisions the error
            # depends on the parameters.
            checked = error > 0 and not differ
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
