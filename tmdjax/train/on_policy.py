"""On-policy RL in one compiled program: rollout, returns, epochs of minibatches.

    rollout     scan over time: method.act, environments, automatic reset
    returns     values of all observations, advantages over time
    update      scan over epochs, in each a scan over minibatches: method.loss + value
    statistics  of observations, after the update: within an iteration nothing moves

What differs between methods is how they act and what they are trained on; a
:class:`Method` says both. Everything is a pure function of the state: `jax.vmap` of
:func:`iterate` over states made from several keys, or with several coefficients, trains
them side by side.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from tmdjax import envs, models, rl
from tmdjax.core import prng
from tmdjax.core.checks import check_choice, check_count, check_range
from tmdjax.core.types import Array, Params, PyTree
from tmdjax.train.optimizer import OptimizerConfig, make_optimizer
from tmdjax.train.sharding import batch_sharding, replicated
from tmdjax.train.state import TrainState, create_state, make_train_step
from tmdjax.train.supervised import NonFiniteError

VALUE_CLIPS = ("larger", "released")
NORMALISATIONS = ("none", "running", "forgetful")
ADVANTAGES = ("batch", "minibatch", "none")
TRUNCATIONS = ("final", "current")
GAE = ("once", "per_minibatch")
MAX_ACTION = 1e3


class Samples(NamedTuple):
    """What a loss sees of the transitions of a minibatch.

    Attributes:
        observation: [batch, ...], as the policy saw it.
        record: what :meth:`Method.act` left, [batch, ...].
        advantage: float32 [batch].
    """

    observation: Any
    record: Any
    advantage: Any


@runtime_checkable
class Method(Protocol):
    """How a policy acts, and what it is trained on.

    Attributes:
        coefficients: numbers of the loss by name; they stand in the state, so that they
            may be vmapped.
    """

    @property
    def coefficients(self) -> Mapping[str, float]:
        """See the class."""
        ...

    def init(self, key: Any, observation: Any, action_size: int) -> Params:
        """Parameters, from one observation's shape and dtype."""
        ...

    def act(self, params: Params, observation: Array, keys: Any) -> tuple[Array, Any]:
        """Actions [env, action_size], and what the loss needs of them, [env, ...].

        An entry 'action' of the record is the action before it is squashed.
        """
        ...

    def loss(
        self,
        params: Params,
        behaviour: Params,
        samples: Samples,
        keys: Any,
        coefficients: Mapping[str, Any],
    ) -> tuple[Array, dict[str, Array]]:
        """Loss and metrics, [batch] each.

        Metrics include 'ratio_error', |ratio - 1|, and, for an adaptive learning rate,
        'kl', KL(behaviour || policy).
        """
        ...

    def exported(self, params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
        """The spec that rebuilds ``params['network']``, and JSON-able facts beside it.

        The spec is one of :func:`tmdjax.models.build`.
        """
        ...


@runtime_checkable
class Diagnosed(Protocol):
    """A method that can say more of an update than its loss does."""

    def diagnose(
        self, params: Params, behaviour: Params, samples: Samples, keys: Any
    ) -> dict[str, Array]:
        """Scalars by name; arguments as those of :meth:`Method.loss`."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything but the method.

    Attributes:
        unroll: steps of every environment an iteration.
        epochs: passes over them.
        minibatches: an epoch; they divide environments x unroll.
        learning_rate: at the start.
        target_kl: at the end of every epoch the learning rate is divided by 1.5 where
            the mean KL is above twice this, and multiplied by 1.5 where below half of
            it; None keeps it.
        learning_rate_bounds: of that.
        weight_decay: of AdamW.
        clip_norm: of the gradient of policy and critic together; None does not clip.
        discount: of returns.
        gae_lambda: of advantages.
        gae: advantages are computed 'once' an iteration, or 'per_minibatch' from the
            values of the critic as it is by then (brax's and FPO's code); minibatches
            are then whole unrolls of some environments. Only what a time limit cut off
            keeps its value from before the update (with truncation='final').
        advantages: standardised over the 'batch', each 'minibatch', or 'none'.
        value_coefficient: of the squared error of the value (no factor 1/2).
        value_clip: width of the band around the old value, or None.
        value_clip_kind: 'larger' takes the larger of clipped and unclipped error (PPO),
            'released' the clipped one alone: no gradient outside the band.
        truncation: which value stands for what a time limit cut off: that of the
            'final' observation, or of the 'current' one, before the step (PolicyFlow's
            code).
        reward_scale: rewards are multiplied by it before returns.
        normalise: observations by 'running' statistics, 'none', or 'forgetful' (FPO's
            code: the standard deviation keeps shrinking). Images are never.
        normalise_before_update: update the statistics before the update, not after: the
            first ratio is then not 1 (FPO's code).
        diagnosed_samples: transitions an iteration on which a method that has a
            ``diagnose`` (arguments of its loss without coefficients; scalars by name)
            is diagnosed after the update; 0 for none.
        max_ratio_error: :func:`check` stops a run whose first minibatch of an iteration
            is above this; None checks nothing.
        critic_hidden: widths of the critic.
        critic_activation: its activation.
    """

    unroll: int = 32
    epochs: int = 5
    minibatches: int = 4
    learning_rate: float = 2e-4
    target_kl: float | None = None
    learning_rate_bounds: tuple[float, float] = (1e-6, 1e-2)
    weight_decay: float = 1e-5
    clip_norm: float | None = 1.0
    discount: float = 0.99
    gae_lambda: float = 0.95
    gae: str = "once"
    advantages: str = "batch"
    value_coefficient: float = 1.0
    value_clip: float | None = 0.2
    value_clip_kind: str = "larger"
    truncation: str = "final"
    reward_scale: float = 1.0
    normalise: str = "none"
    normalise_before_update: bool = False
    diagnosed_samples: int = 0
    max_ratio_error: float | None = 1e-4
    critic_hidden: tuple[int, ...] = (256, 128, 64)
    critic_activation: str = "mish"

    def __post_init__(self) -> None:
        for name in ("unroll", "epochs", "minibatches"):
            check_count(name, getattr(self, name))
        for name in ("learning_rate", "reward_scale"):
            check_range(name, getattr(self, name), 0, open_low=True)
        for name in ("target_kl", "clip_norm", "value_clip", "max_ratio_error"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 0, open_low=True)
        for name in ("weight_decay", "value_coefficient"):
            check_range(name, getattr(self, name), 0)
        for name in ("discount", "gae_lambda"):
            check_range(name, getattr(self, name), 0, 1)
        low, high = self.learning_rate_bounds
        check_range("learning_rate_bounds, lower", low, 0, high, open_low=True)
        check_choice("advantages", self.advantages, ADVANTAGES)
        check_choice("value_clip_kind", self.value_clip_kind, VALUE_CLIPS)
        check_choice("truncation", self.truncation, TRUNCATIONS)
        check_choice("gae", self.gae, GAE)
        check_count("diagnosed_samples", self.diagnosed_samples, 0)
        if self.gae == "per_minibatch" and self.advantages == "batch":
            raise ValueError(
                "gae='per_minibatch' has no batch of advantages to standardise over; "
                "use advantages='minibatch' or 'none'."
            )
        if self.gae == "per_minibatch" and self.value_clip is not None:
            raise ValueError(
                f"gae='per_minibatch' has no old values to clip around; use "
                f"value_clip=None instead of {self.value_clip}."
            )
        check_choice("normalise", self.normalise, NORMALISATIONS)


@struct.dataclass
class OnPolicyState:
    """Everything an iteration changes.

    Attributes:
        iteration: how many were done, int32 (environment steps overflow int32; count
            them on the host).
        learner: parameters {'policy', 'critic'} and optimiser state.
        learning_rate: float32.
        coefficients: of the method, and 'discount', 'gae_lambda'; float32 each.
        statistics: of observations, or None for images.
        vector: the environments.
        running_return: float32 [env], of the episodes under way.
        episode_return: mean of the last episodes that ended; NaN before any did.
    """

    iteration: Any
    learner: TrainState
    learning_rate: Any
    coefficients: Any
    statistics: Any
    vector: envs.VectorState
    running_return: Any
    episode_return: Any

    @property
    def skipped(self) -> Any:
        """Updates that were not finite and were skipped, of all seeds together."""
        return jnp.sum(self.learner.skipped)

    @property
    def skipped_in_a_row(self) -> Any:
        """Of these, how many since the last good one, of the worst seed."""
        return jnp.max(self.learner.skipped_in_a_row)


class Trainer(NamedTuple):
    """Pure functions of one training run.

    Attributes:
        init: ``(key, **coefficients) -> state``; coefficients named replace the
            configured ones.
        iterate: ``(state, key) -> (state, metrics)``, one iteration; the key is that of
            the run.
        settings: as given.
        steps: environment steps an iteration.
        on_host: whether the environments run in Python: one run, one device.
    """

    init: Callable[..., OnPolicyState]
    iterate: Callable[[OnPolicyState, Any], tuple[OnPolicyState, dict[str, Array]]]
    settings: Settings
    steps: int
    on_host: bool = False


def make_trainer(
    vector: envs.Vector | envs.GymnasiumVector, method: Method, settings: Settings
) -> Trainer:
    """Builds the functions of a training run.

    Args:
        vector: the environments: of this library, or of gymnasium.
        method: see :class:`Method`.
        settings: everything else.

    Returns:
        Functions that are neither jitted nor vmapped: see :func:`jit_iterations`.

    Raises:
        ValueError: minibatches that do not divide environments x unroll (or the
            environments, if advantages are computed per minibatch); a coefficient
            that the method does not have; an adaptive learning rate with a method that
            reports no KL.
        TypeError: an environment whose observations no network takes.
    """
    count, size = vector.count, vector.action_size
    steps = count * settings.unroll
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
    seen = vector.observation
    one = jax.ShapeDtypeStruct((1, *seen.shape), seen.dtype)
    is_image = seen.dtype == jnp.uint8
    critic = models.ControlMLP(
        1, settings.critic_hidden, settings.critic_activation, out_scale=0.01
    )
    value_of = models.functional(critic)
    rule = _with_learning_rate(
        make_optimizer(
            OptimizerConfig(
                name="adamw",
                learning_rate=1.0,
                weight_decay=settings.weight_decay,
                clip_norm=settings.clip_norm,
            )
        )
    )
    bound, afresh = vector.action_bound, settings.gae == "per_minibatch"

    def init(key: Any, **changes: Any) -> OnPolicyState:
        prng.check_key(key)
        known = {
            **method.coefficients,
            "discount": settings.discount,
            "gae_lambda": settings.gae_lambda,
        }
        learning_rate = changes.pop("learning_rate", settings.learning_rate)
        for name, value in changes.items():
            check_choice("coefficient", name, (*known, "learning_rate"))
            _check_coefficient(name, value)
        # apart from the keys of the iterations, which fold their number in
        policy_key, critic_key, start = jax.random.split(
            jax.random.fold_in(key, np.uint32(2**32 - 1)), 3
        )
        params = {
            "policy": method.init(policy_key, one, size),
            "critic": models.init_params(critic, critic_key, one),
        }
        state = OnPolicyState(
            iteration=jnp.zeros((), jnp.int32),
            learner=create_state(params, rule),
            learning_rate=jnp.asarray(learning_rate, jnp.float32),
            coefficients={
                k: jnp.asarray(v, jnp.float32) for k, v in (known | changes).items()
            },
            statistics=None if is_image else rl.RunningStatistics.start(seen.shape),
            vector=vector.reset(start),
            running_return=jnp.zeros(count),
            episode_return=jnp.full((), jnp.nan),
        )
        # weak types would become strong in the first iteration, and compile it twice;
        # one buffer in two places could not be donated
        return jax.tree.map(lambda x: jnp.array(x, x.dtype, copy=True), state)

    def prepare(statistics: Any, observation: Array) -> Array:
        if statistics is None or settings.normalise == "none":
            return observation
        return statistics.normalise(observation)

    def values(critic_params: Params, observation: Array) -> Array:
        """[time, env]; images one time step after the other, to bound memory."""

        def at(seen: Array) -> Array:
            return value_of(critic_params, seen)[:, 0]

        if is_image:
            return jax.lax.map(at, observation)
        flat = observation.reshape(-1, *observation.shape[2:])
        return at(flat).reshape(observation.shape[:2])

    def rollout(state: OnPolicyState, key: Any) -> Any:
        keys = prng.sample_keys(key, count)
        policy = state.learner.params["policy"]

        def one_step(carry: Any, i: Array) -> tuple[Any, Any]:
            before, running, ended, total = carry
            act_keys = prng.fold_in(keys, 2 * i)
            action, record = method.act(
                policy, prepare(state.statistics, before.observation), act_keys
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
            beyond = (
                jnp.zeros(()) if bound is None else jnp.mean(jnp.abs(action) > bound)
            )
            return carry, (before.observation, record, step, (size, beyond))

        start = (state.vector, state.running_return, jnp.zeros((), int), jnp.zeros(()))
        return jax.lax.scan(one_step, start, jnp.arange(settings.unroll))

    def with_advantages(
        unrolled: Any, value: Array, next_value: Array, coefficients: Any
    ) -> Any:
        """What a loss takes of [time, env] transitions, as [time * env].

        The values are those of the observations acted on, and of what followed.
        """
        seen, record, step = unrolled
        if settings.truncation == "current":
            next_value = jnp.where(step.truncated, value, next_value)
        advantage, returns = rl.generalised_advantages(
            settings.reward_scale * step.reward,
            value,
            next_value,
            step.terminated,
            step.truncated,
            discount=coefficients["discount"],
            gae_lambda=coefficients["gae_lambda"],
            valid=step.valid,
        )
        if settings.advantages == "batch":
            advantage = rl.standardise(advantage, step.valid)
        weight = step.valid.astype(jnp.float32)
        return jax.tree.map(
            lambda x: x.reshape(-1, *x.shape[2:]),
            (Samples(seen, record, advantage), value, returns, weight),
        )

    def loss_of(behaviour: Params, coefficients: Mapping[str, Any]) -> Any:
        def loss_afresh(params: Params, batch: Any, keys: Any) -> Any:
            """Of unrolls [env, time]: advantages are those of the critic as it is."""
            (unrolled, next_value), last, scale = batch
            unrolled, next_value = jax.tree.map(
                lambda x: x.swapaxes(0, 1), (unrolled, next_value)
            )
            step = unrolled[2]
            shape = step.reward.shape
            value = values(params["critic"], unrolled[0])
            fixed = jax.lax.stop_gradient(value)
            end = values(jax.lax.stop_gradient(params["critic"]), last[None])
            following = jnp.concatenate([fixed[1:], end])
            next_value = jnp.where(step.truncated, next_value, following)
            samples, old_value, returns, weight = with_advantages(
                unrolled, fixed, next_value, coefficients
            )
            if settings.advantages == "minibatch":
                advantage = rl.standardise(samples.advantage, weight > 0)
                samples = samples._replace(advantage=advantage)
            keys = prng.fold_in(keys[None], jnp.arange(shape[0])[:, None]).reshape(-1)
            batch = (samples, old_value, returns, jnp.tile(scale, shape[0]) * weight)
            loss, metrics = loss_of_value(params, value.reshape(-1), batch, keys)
            metrics = {
                k: getattr(jnp, "max" if k == "ratio_error" else "mean")(
                    v.reshape(shape), 0
                )
                for k, v in metrics.items()
            }
            return loss.reshape(shape).mean(0), metrics

        def loss_fn(params: Params, batch: Any, keys: Any) -> Any:
            value = value_of(params["critic"], batch[0].observation)[:, 0]
            return loss_of_value(params, value, batch, keys)

        def loss_of_value(params: Params, value: Array, batch: Any, keys: Any) -> Any:
            samples, old_value, returns, weight = batch
            loss, metrics = method.loss(
                params["policy"], behaviour["policy"], samples, keys, coefficients
            )
            if settings.target_kl is not None and "kl" not in metrics:
                raise ValueError(
                    f"target_kl={settings.target_kl} adapts the learning rate to the "
                    f"KL, which {type(method).__name__} does not report; use "
                    f"target_kl=None."
                )
            error = _value_error(value, old_value, returns, settings)
            metrics = {"policy_loss": loss, "value_error": error, **metrics}
            live = weight > 0
            # where, not a product: what is not finite there must not pass
            metrics = {
                k: jnp.where(live, v, 0) * (1 if k == "ratio_error" else weight)
                for k, v in metrics.items()
            }
            loss = loss + settings.value_coefficient * error
            return jnp.where(live, loss, 0) * weight, metrics

        return loss_afresh if afresh else loss_fn

    def update(
        state: OnPolicyState, data: Any, scale: Array, key: Any
    ) -> tuple[TrainState, Array, dict[str, Array]]:
        """Data is [time * env], or [env, time] for advantages computed afresh."""
        shuffle, noise = jax.random.split(key)
        behaviour = state.learner.params
        train_step = make_train_step(
            loss_of(behaviour, state.coefficients),
            rule,
            reductions={"ratio_error": jnp.max},
        )

        def minibatch(learner: TrainState, rows: Array) -> tuple[Any, Any]:
            batch = jax.tree.map(lambda x: x[rows], data)
            if afresh:
                batch = (*batch, jnp.full(rows.shape, scale))
            else:
                samples, old_value, returns, weight = batch
                if settings.advantages == "minibatch":
                    advantage = rl.standardise(samples.advantage, weight > 0)
                    samples = samples._replace(advantage=advantage)
                batch = (samples, old_value, returns, scale * weight)
            learner, metrics = train_step(learner, batch, noise)
            in_a_row = learner.skipped_in_a_row.astype(jnp.float32)
            return learner, {**metrics, "skipped_in_a_row": in_a_row}

        def epoch(carry: Any, key: Any) -> tuple[Any, Any]:
            learner, learning_rate = carry
            rows = jax.random.permutation(key, count if afresh else steps)
            learner, metrics = jax.lax.scan(
                minibatch, learner, rows.reshape(settings.minibatches, -1)
            )
            if settings.target_kl is not None:
                learning_rate = adapted_learning_rate(
                    learning_rate, metrics["kl"].mean(), settings
                )
                learner = _set_learning_rate(learner, learning_rate)
            return (learner, learning_rate), metrics

        learner = _set_learning_rate(state.learner, state.learning_rate)
        (learner, learning_rate), metrics = jax.lax.scan(
            epoch,
            (learner, state.learning_rate),
            jax.random.split(shuffle, settings.epochs),
        )
        first = metrics.pop("ratio_error")[0, 0]
        skipped = metrics.pop("skipped").sum()
        in_a_row = metrics.pop("skipped_in_a_row").max()
        means = {k: v.mean() for k, v in metrics.items()}
        return (
            learner,
            learning_rate,
            means
            | {
                "first_ratio_error": first,
                "skipped": skipped,
                "skipped_in_a_row": in_a_row,
            },
        )

    def iterate(state: OnPolicyState, key: Any) -> tuple[Any, dict[str, Array]]:
        key = jax.random.fold_in(key, state.iteration)
        roll_key, update_key = jax.random.split(key)
        carry, (observation, record, step, sizes) = rollout(state, roll_key)
        vector_state, running, ended, total = carry
        statistics = state.statistics
        if statistics is not None and settings.normalise != "none":
            statistics = rl.update_statistics(
                statistics, observation, forget=settings.normalise == "forgetful"
            )
        used = statistics if settings.normalise_before_update else state.statistics
        seen, final_seen = (
            prepare(used, x) for x in (observation, step.final_observation)
        )
        critic_params = state.learner.params["critic"]
        value = values(critic_params, seen)
        next_value = values(critic_params, final_seen)
        unrolled = (seen, record, step._replace(final_observation=None))
        data = with_advantages(unrolled, value, next_value, state.coefficients)
        _, value, returns, _ = data
        good = jnp.sum(step.valid)
        scale = steps / jnp.maximum(good, 1)
        by_environment = (
            jax.tree.map(lambda x: x.swapaxes(0, 1), (unrolled, next_value)),
            final_seen[-1],
        )
        learner, learning_rate, metrics = update(
            state,
            by_environment if afresh else data,
            scale,
            update_key,
        )
        if settings.diagnosed_samples and isinstance(method, Diagnosed):
            size = min(settings.diagnosed_samples, steps)
            some = jax.tree.map(lambda x: x[:: steps // size][:size], data[0])
            metrics |= method.diagnose(
                learner.params["policy"],
                state.learner.params["policy"],
                some,
                prng.sample_keys(update_key, some.advantage.shape[0]),
            )
        episode_return = jnp.where(
            ended > 0, total / jnp.maximum(ended, 1), state.episode_return
        )
        largest, beyond = sizes
        valid = step.valid.reshape(-1)
        spread = jnp.var(returns, where=valid)
        metrics |= {
            "reward_mean": jnp.sum(step.reward) / jnp.maximum(good, 1),
            "episode_return": episode_return,
            "episodes": ended.astype(jnp.float32),
            "terminated_fraction": step.terminated.mean(),
            "invalid_steps": (steps - good).astype(jnp.float32),
            "action_clip_fraction": beyond.mean(),
            "action_abs_max": largest.max(),
            "action_abs_max_env": largest.max(0).argmax().astype(jnp.float32),
            "explained_variance": 1
            - jnp.var(returns - value, where=valid) / jnp.maximum(spread, 1e-12),
            "learning_rate": learning_rate,
        }
        state = dataclasses.replace(
            state,
            iteration=state.iteration + 1,
            learner=learner,
            learning_rate=learning_rate,
            statistics=statistics,
            vector=vector_state,
            running_return=running,
            episode_return=episode_return,
        )
        return state, metrics

    return Trainer(init, iterate, settings, steps, vector.on_host)


def _check_coefficient(name: str, value: Any) -> None:
    """What the settings check, for a number given beside them; not if traced."""
    if isinstance(value, jax.core.Tracer):
        return
    high = 1.0 if name in ("discount", "gae_lambda", "clip_range") else np.inf
    for number in np.ravel(value):
        check_range(name, float(number), 0, high)


def _value_error(value: Array, old: Array, returns: Array, settings: Settings) -> Array:
    error = (value - returns) ** 2
    if settings.value_clip is None:
        return error
    near = old + jnp.clip(value - old, -settings.value_clip, settings.value_clip)
    clipped = (near - returns) ** 2
    if settings.value_clip_kind == "released":
        return clipped
    return jnp.maximum(error, clipped)


def adapted_learning_rate(learning_rate: Any, kl: Any, settings: Settings) -> Array:
    """Divided by 1.5 where the KL is too large (or NaN), multiplied where too small.

    Args:
        learning_rate: now, scalar.
        kl: mean KL(behaviour || policy) of an epoch.
        settings: target_kl and learning_rate_bounds.

    References:
        The schedule of rsl_rl, which PolicyFlow's code follows.
    """
    assert settings.target_kl is not None
    low, high = settings.learning_rate_bounds
    rate, kl = jnp.asarray(learning_rate), jnp.asarray(kl)
    slower = ~(kl <= 2 * settings.target_kl)
    return jnp.where(
        slower,
        jnp.maximum(rate / 1.5, low),
        jnp.where(kl < settings.target_kl / 2, jnp.minimum(rate * 1.5, high), rate),
    )


def _with_learning_rate(rule: optax.GradientTransformation) -> Any:
    """A rule of learning rate 1 with the rate as an array in its state."""

    def init(params: PyTree) -> Any:
        return rule.init(params), jnp.ones(())

    def update(grads: PyTree, state: Any, params: PyTree) -> Any:
        inner, rate = state
        updates, inner = rule.update(grads, inner, params)
        return jax.tree.map(lambda u: rate * u, updates), (inner, rate)

    return optax.GradientTransformation(init, update)  # pyright: ignore


def _set_learning_rate(learner: TrainState, rate: Array) -> TrainState:
    opt_state = (learner.opt_state[0], rate)
    return dataclasses.replace(learner, opt_state=opt_state)


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
            lambda state, _: trainer.iterate(state, key), state, None, length=iterations
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


def check(metrics: Mapping[str, Any], settings: Settings) -> None:
    """Looks at the metrics of some iterations; call it where they reach the host.

    Args:
        metrics: from :func:`jit_iterations`, numbers or arrays.
        settings: of the run.

    Raises:
        RatioError: before its first update an iteration had ratios that are not 1.
        NonFiniteError: three updates in a row were not finite; or an action was, or was
            larger than 1000.

    Warns:
        UserWarning: more than half of all actions lie outside the bound, or all
            standard deviations are at theirs.
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
    error, most = host["first_ratio_error"].max(), settings.max_ratio_error
    if most is not None and not error <= most:
        raise rl.RatioError(
            f"max |ratio - 1| = {error:.3g} in the first minibatch of an iteration, "
            f"before any update; it must be below max_ratio_error={most:g}. Usual "
            f"causes: acting with averaged parameters but updating against the raw "
            f"ones; statistics of observations that moved in between; a network in 16 "
            f"bits."
        )
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
