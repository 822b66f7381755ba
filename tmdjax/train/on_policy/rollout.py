"""The rollout: environments and policy, scanned over time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tmdjax import envs
from tmdjax.core import prng
from tmdjax.core.types import Array
from tmdjax.train.on_policy.state import OnPolicyState, Parts


class Rollout(NamedTuple):
    """One unroll of every environment, and where it leaves them.

    Attributes:
        vector: the environments after it.
        running_return: float32 [env], of the episodes under way after it.
        episodes: int32, how many ended.
        episode_returns: float32, the sum of their returns.
        observation: [time, env, ...], as the environments gave it.
        record: what :meth:`ControlMethod.act` left, [time, env, ...].
        step: what the environments answered, [time, env, ...].
        action_size: float32 [time, env], the largest entry of an action before it is
            squashed.
        action_beyond: float32 [time], share of actions outside the bound.
    """

    vector: envs.VectorState
    running_return: Array
    episodes: Array
    episode_returns: Array
    observation: Array
    record: Any
    step: Any
    action_size: Array
    action_beyond: Array


def collect(parts: Parts, state: OnPolicyState, key: Any) -> Rollout:
    """One unroll of every environment, from where it stands; ends are reset.

    Args:
        parts: environments, networks and rules.
        state: not changed.
        key: of the rollout.
    """
    vector, bound = parts.vector, parts.vector.action_bound
    keys = prng.sample_keys(key, vector.count)
    policy = state.learner.params["policy"]

    def one_step(carry: Any, i: Array) -> tuple[Any, Any]:
        before, running, ended, total = carry
        seen = parts.prepare(state.statistics, before.observation)
        action, record = parts.acting.act(
            policy, seen, prng.fold_in(keys, 2 * i), state.numbers
        )
        after, step = vector.step(before, action, prng.fold_in(keys, 2 * i + 1))
        running = running + step.reward
        done = step.terminated | step.truncated
        finished = done & step.valid
        carry = (
            after,
            jnp.where(done, 0, running),
            ended + finished.sum(),
            total + jnp.sum(jnp.where(finished, running, 0)),
        )
        raw = record.get("action", action) if isinstance(record, dict) else action
        size = jnp.abs(raw).max(1)  # before what squashes it
        beyond = jnp.zeros(()) if bound is None else jnp.mean(jnp.abs(action) > bound)
        return carry, (before.observation, record, step, size, beyond)

    first = (state.vector, state.running_return, jnp.zeros((), int), jnp.zeros(()))
    times = jnp.arange(parts.settings.unroll)
    carry, seen = jax.lax.scan(one_step, first, times)
    return Rollout(*carry, *seen)
