"""The iteration of a training run, and what compiles and watches it."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tmdjax import envs, models, rl
from tmdjax.core import prng
from tmdjax.core.checks import check_count
from tmdjax.core.types import Array
from tmdjax.train.iteration import Iteration
from tmdjax.train.on_policy.returns import Once, PerMinibatch, targets, unroll_of
from tmdjax.train.on_policy.rollout import Rollout, collect
from tmdjax.train.on_policy.settings import (
    ControlMethod,
    ControlSettings,
    Diagnosed,
    PartlyFrozen,
)
from tmdjax.train.on_policy.state import OnPolicyState, Parts, start
from tmdjax.train.on_policy.update import make_rule, update
from tmdjax.train.sharding import batch_sharding, replicated
from tmdjax.train.supervised import NonFiniteError

MAX_ACTION = 1e3
MAX_BROKEN = 0.01
"""Share of the environments that may break in an iteration, where several steps did."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Trainer(Iteration[OnPolicyState, Rollout]):
    """An iteration in pure functions: jitted, scanned and vmapped as a whole.

    ``init(key, policy=None, statistics=None, **coefficients)`` makes the state: what is
    given begins a run from a policy that was trained before, and coefficients named
    replace the configured ones. Batches are None: the environments stand in the state.

    Attributes:
        settings: as given.
        steps: environment steps an iteration.
        on_host: whether the environments run in Python: one run, one device.
    """

    settings: ControlSettings
    steps: int
    on_host: bool = False


def make_trainer(
    vector: envs.Vector | envs.GymnasiumVector,
    method: ControlMethod,
    settings: ControlSettings,
) -> Trainer:
    """Builds the functions of a training run.

    Args:
        vector: the environments: of this library, or of gymnasium.
        method: see :class:`ControlMethod`.
        settings: everything else.

    Returns:
        Functions that are neither jitted nor vmapped: see :func:`jit_iterations`.

    Raises:
        ValueError: 2^31 transitions or more; minibatches that do not divide
            environments x unroll (or the environments, if advantages are computed per
            minibatch); by ``init``, a coefficient that the method does not have; when
            learning is traced, an adaptive learning rate with a method that reports no
            KL.
        TypeError: a method that lacks something; an environment whose observations no
            network takes.
    """
    needed = "coefficients init act loss exported".split()
    missing = [name for name in needed if not hasattr(method, name)]
    if missing:
        raise TypeError(
            f"{type(method).__name__} has no {', '.join(missing)}; a method needs "
            f"{', '.join(needed)}, see tmdjax.train.on_policy.ControlMethod."
        )
    count, steps = vector.count, vector.count * settings.unroll
    if steps >= 2**31:
        raise ValueError(
            f"{count} environments x unroll={settings.unroll} = {steps} transitions; "
            f"an iteration has fewer than 2^31."
        )
    if steps % settings.minibatches:
        raise ValueError(
            f"{count} environments x unroll={settings.unroll} = {steps} transitions do "
            f"not divide into minibatches={settings.minibatches}; choose a divisor."
        )
    if settings.gae == "per_minibatch" and count % settings.minibatches:
        raise ValueError(
            f"gae='per_minibatch' takes whole environments: {count} of them do not "
            f"divide into minibatches={settings.minibatches}; choose a divisor."
        )
    critic = models.ControlMLP(
        1, settings.critic_hidden, settings.critic_activation, out_scale=0.01
    )
    acting, precision = method, settings.precision
    if precision is not None:
        acting = models.with_recipe(method, precision.rollout)
        method = models.with_recipe(method, precision.train)
        critic = models.with_recipe(critic, precision.train)
    frozen = method.frozen if isinstance(method, PartlyFrozen) else ()
    rule = make_rule(settings, frozen)
    parts = Parts(vector, acting, method, settings, critic, rule)
    returns = (PerMinibatch if settings.gae == "per_minibatch" else Once)(parts)

    def keys_of(state: OnPolicyState, key: Any) -> Array:
        return jax.random.split(jax.random.fold_in(key, state.iteration))

    def rolled_out(state: OnPolicyState, batch: None, key: Any) -> Rollout:
        del batch
        return collect(parts, state, keys_of(state, key)[0])

    def learn(state: OnPolicyState, rollout: Rollout, key: Any) -> Any:
        return _learn(parts, returns, state, rollout, keys_of(state, key)[1])

    return Trainer(
        init=lambda key, **changes: start(parts, key, **changes),
        collect=rolled_out,
        learn=learn,
        settings=settings,
        steps=steps,
        on_host=vector.on_host,
    )


def _learn(
    parts: Parts,
    returns: Once | PerMinibatch,
    state: OnPolicyState,
    rollout: Rollout,
    key: Any,
) -> tuple[OnPolicyState, dict[str, Array]]:
    settings, step = parts.settings, rollout.step
    normaliser, statistics = settings.normaliser, state.statistics
    if statistics is not None and normaliser is not None:
        statistics = normaliser.update(statistics, rollout.observation)
    before = normaliser is not None and normaliser.before_update
    used = statistics if before else state.statistics
    reward_scale = state.reward_scale
    if reward_scale is not None:
        reward, reward_scale = rl.scale_rewards(
            reward_scale,
            step.reward,
            step.terminated | step.truncated,
            step.valid,
            discount=state.coefficients["discount"],
        )
        rollout = rollout._replace(step=step._replace(reward=reward))
    unroll = unroll_of(parts, state, rollout, used)
    given = targets(unroll, settings, state.coefficients)
    good = jnp.sum(step.valid)
    learner, learning_rate, metrics = update(
        parts,
        returns,
        state,
        returns.data(unroll, given),
        parts.steps / jnp.maximum(good, 1),
        key,
    )
    if settings.diagnosed_samples and isinstance(parts.method, Diagnosed):
        size = min(settings.diagnosed_samples, parts.steps)
        some = jax.tree.map(lambda x: x[:: parts.steps // size][:size], given.samples)
        metrics |= parts.method.diagnose(
            learner.params["policy"],
            state.learner.params["policy"],
            some,
            prng.sample_keys(key, some.advantage.shape[0]),
        )
    ended = rollout.episodes
    episode_return = jnp.where(
        ended > 0,
        rollout.episode_returns / jnp.maximum(ended, 1),
        state.episode_return,
    )
    valid = step.valid.reshape(-1)
    spread = jnp.var(given.returns, where=valid)
    left = jnp.var(given.returns - given.value, where=valid)
    metrics |= {
        "reward_mean": jnp.sum(step.reward) / jnp.maximum(good, 1),
        "episode_return": episode_return,
        "episodes": ended.astype(jnp.float32),
        "terminated_fraction": step.terminated.mean(),
        "invalid_steps": (parts.steps - good).astype(jnp.float32),
        "broken_environments": 1 - step.valid.all(0).mean(dtype=jnp.float32),
        "action_clip_fraction": rollout.action_beyond.mean(),
        "action_abs_max": rollout.action_size.max(),
        "action_abs_max_env": rollout.action_size.max(0).argmax().astype(jnp.float32),
        "explained_variance": 1 - left / jnp.maximum(spread, 1e-12),
    }
    state = dataclasses.replace(
        state,
        iteration=state.iteration + 1,
        learner=learner,
        learning_rate=learning_rate,
        statistics=statistics,
        vector=rollout.vector,
        running_return=rollout.running_return,
        episode_return=episode_return,
        reward_scale=reward_scale,
    )
    return state, metrics


def jit_iterations(
    trainer: Trainer,
    iterations: int = 1,
    *,
    seeds: bool = False,
    mesh: Mesh | None = None,
) -> Callable[[OnPolicyState, Any], tuple[OnPolicyState, dict[str, Array]]]:
    """Compiles some iterations into one program, its state donated.

    Args:
        trainer: from :func:`make_trainer`.
        iterations: a call; they are scanned, and their metrics stacked.
        seeds: whether state and key have a leading axis of runs side by side.
        mesh: cuts the environments over its devices; None leaves all on one. The
            environments divide by their number. Not together with seeds.

    Returns:
        ``(state, key) -> (state, metrics [iteration] or [seed, iteration])``.

    Raises:
        ValueError: a mesh and seeds; either of them with environments on the host.
    """
    check_count("iterations", iterations)
    if trainer.on_host and (seeds or mesh is not None):
        raise ValueError(
            "the environments run on the host, one after the other: seeds=True and a "
            "mesh need environments written in JAX (envs.Vector); leave them out."
        )
    if mesh is not None and seeds:
        raise ValueError("seeds=True runs on one device; leave out the mesh.")

    def some(state: OnPolicyState, key: Any) -> tuple[OnPolicyState, Any]:
        return jax.lax.scan(
            lambda state, _: trainer.iterate(state, None, key),
            state,
            None,
            length=iterations,
        )

    if mesh is None:
        return jax.jit(jax.vmap(some) if seeds else some, donate_argnums=0)
    whole = replicated(mesh)
    state = jax.eval_shape(trainer.init, jax.eval_shape(lambda: jax.random.key(0)))
    shardings = jax.tree.map(lambda _: whole, state)
    cut = batch_sharding(mesh)
    shardings = shardings.replace(
        vector=jax.tree.map(lambda _: cut, state.vector), running_return=cut
    )
    return jax.jit(
        some,
        in_shardings=(shardings, whole),
        out_shardings=(shardings, whole),
        donate_argnums=0,
    )


def check(metrics: Mapping[str, Any], settings: ControlSettings) -> None:
    """Looks at the metrics of some iterations; call it where they reach the host.

    Args:
        metrics: from :func:`jit_iterations`, numbers or arrays.
        settings: that the trainer was made with.

    Raises:
        RatioError: before its first update an iteration had ratios that are not 1.
        NonFiniteError: three updates in a row were not finite; or an action was, or was
            larger than 1000; or several steps of an iteration broke, in more than 1 %
            of the environments.
        ValueError: more than half of the log-probs that a method clips were clipped.

    Warns:
        UserWarning: more than half of all actions lie outside the bound, all standard
            deviations are at theirs, or 5 % of the log-probs were clipped.
    """
    host = {k: np.asarray(v) for k, v in metrics.items()}
    largest = host["action_abs_max"]
    if not (largest <= MAX_ACTION).all():
        at = tuple(int(i) for i in np.argwhere(~(largest <= MAX_ACTION))[0])
        raise NonFiniteError(
            f"actions of size {largest[at]} in environment "
            f"{int(host['action_abs_max_env'][at])} (iteration {at} of those checked): "
            f"the policy has exploded. Lower the learning rate, or what pushes it "
            f"outwards (brownian_coefficient, entropy_coefficient)."
        )
    if host["skipped_in_a_row"].max() >= 3:
        raise NonFiniteError(
            f"{int(host['skipped_in_a_row'].max())} updates in a row had a loss or "
            f"gradient that was not finite, and were skipped; lower the learning rate, "
            f"or look at the rewards."
        )
    several = host["invalid_steps"] > 1
    found = np.where(several, host["broken_environments"], 0.0).max()
    if found > MAX_BROKEN:
        raise NonFiniteError(
            f"{found:.1%} of the environments broke in one iteration: a step gave a "
            f"value that was not finite. Such steps are left out and their environment "
            f"begins anew, but at most {MAX_BROKEN:.0%} may break; bound the actions, "
            f"shorten the simulator's steps, or lower the learning rate."
        )
    error, most = host["first_ratio_error"].max(), settings.max_ratio_error
    if most is not None and not error <= most:
        why = "" if settings.precision is None else settings.precision.disagreement()
        why = why and f" Here {why}: set both to 'fp32', or raise max_ratio_error."
        raise rl.RatioError(
            f"max |ratio - 1| = {error:.3g} in the first minibatch of an iteration, "
            f"before any update; it must be below max_ratio_error={most:g}. Usual "
            f"causes: acting with averaged parameters but updating against the raw "
            f"ones; statistics of observations that moved in between; a chain that is "
            f"scored on other times than it was walked on (legacy_grid).{why}"
        )
    clipped = host.get("log_prob_clipped", np.zeros(1)).max()
    outside = (
        f"{clipped:.0%} of the log-probs lie outside log_prob_range, where they have "
        f"no gradient; raise the lowest noise (std_lower, std_floor), or widen the "
        f"range."
    )
    if clipped > 0.5:
        raise ValueError(f"no policy gradient flows: {outside}")
    if clipped > 0.05:
        warnings.warn(outside, stacklevel=2)
    if host.get("std_at_bound", np.zeros(1)).max() >= 1:
        warnings.warn(
            "every standard deviation is at its bound (log_std_bounds), where it has "
            "no gradient; widen the bounds, or lower the entropy coefficient.",
            stacklevel=2,
        )
    beyond = host["action_clip_fraction"].max()
    if beyond > 0.5:
        warnings.warn(
            f"{beyond:.0%} of the actions lie outside the environment's bound and are "
            f"clipped: they give no signal. Lower the entropy or Brownian term.",
            stacklevel=2,
        )
