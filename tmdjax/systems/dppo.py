"""DPPO: PPO on the denoising steps of a diffusion policy.

A policy draws its action by the ancestral steps of a diffusion model, Gaussians with a
likelihood already. The last of them are fine-tuned, each one a sample of PPO with the
advantage of its environment step; those before stay as pretrained. The rival that
ReinFlow is measured against.

References:
    arXiv 2409.00588 and its code.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax import flows, models, rl
from tmdjax.core import prng
from tmdjax.core.checks import check_choice, check_count, check_range
from tmdjax.core.types import Array, Params
from tmdjax.train import on_policy
from tmdjax.train.on_policy import Samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPPO(models.ChainPolicy):
    """A :class:`tmdjax.train.on_policy.ControlMethod`; the network predicts the noise.

    Attributes, beside those of :class:`tmdjax.models.ChainPolicy`:
        steps: K, levels of the cosine schedule; their time is (level + 1) / K.
        fine_tuned_steps: how many of the last steps are trained.
        std_floor: least standard deviation of a step while training.
        clip_data: predicted actions stay within +-clip_data; None does not clip.
        log_prob_range: of the log-probs of single dimensions, before their mean.
        advantage_quantiles: advantages of a minibatch are clipped to these; (0, 1)
            clips none. Where few steps are rewarded, quantiles cut what these tell.
        denoising_discount: of the advantage, per step before the last one, in [0, 1].
        clip_range: of the ratio in the last step.
        clip_base: of the ratio in the first trained step, in (0, 1).
    """

    frequencies: tuple[float, float, int] = (2e-3, 20.0, 8)
    steps: int = 20
    fine_tuned_steps: int = 10
    std_floor: float = 0.1
    clip_data: float | None = 1.0
    log_prob_range: tuple[float, float] = (-5.0, 2.0)
    advantage_quantiles: tuple[float, float] = (0.0, 1.0)
    denoising_discount: float = 0.99
    clip_base: float = 0.01
    coefficients: ClassVar[tuple[str, ...]] = (
        "clip_range",
        "clip_base",
        "denoising_discount",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if check_count("fine_tuned_steps", self.fine_tuned_steps) > self.steps:
            raise ValueError(
                f"fine_tuned_steps={self.fine_tuned_steps} of steps={self.steps}; give "
                f"at most all."
            )
        check_range("std_floor", self.std_floor, 0, open_low=True)
        if self.clip_data is not None:
            check_range("clip_data", self.clip_data, 0, open_low=True)
        low, high = self.advantage_quantiles
        check_range("advantage_quantiles, upper", high, low, open_low=True)
        for quantile in self.advantage_quantiles:
            check_range("advantage_quantiles", quantile, 0, 1)
        check_range("denoising_discount", self.denoising_discount, 0, 1)
        check_range("clip_base", self.clip_base, 0, 1, open_low=True, open_high=True)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The network of the steps that are not trained."""
        return ("base",) if self.fine_tuned_steps < self.steps else ()

    @property
    def schedule(self) -> flows.DiffusionSchedule:
        """The noise levels."""
        return flows.cosine_schedule(self.steps)

    def _rows(self, *, trained: bool) -> dict[str, Array]:
        """Rows of the last steps, which are trained, or of those before."""
        levels = np.arange(self.steps)[::-1]
        untrained = self.steps - self.fine_tuned_steps
        return self.schedule.rows(levels[untrained:] if trained else levels[:untrained])

    def init(self, key: Any, observation: Any, action_size: int) -> Params:
        """Parameters 'network', which is trained, and 'base', which is not."""
        return self.pretrained(self.init_network(key, observation, action_size))

    def exported(self, params: Params) -> tuple[dict[str, Any], Params, dict[str, Any]]:
        """One network for all steps, from the trained one and the base's, and facts."""
        module: Any = self.module(models.action_size_of(params["network"]))
        network, last = params["network"], self.fine_tuned_steps
        if last < self.steps:
            time = (last + 0.5) / self.steps  # between the levels of the two
            module, network = models.FineTunedVelocity(module, time), dict(params)
        names = ("steps", "fine_tuned_steps", "clip_data", "clip_last", "bound")
        facts = {name: getattr(self, name) for name in names}
        facts |= {"solver": "ancestral", "schedule": "cosine", "predicts": "noise"}
        return models.spec_of(module), network, facts

    def act(
        self, params: Params, observation: Array, keys: Any, coefficients: Any = None
    ) -> tuple[Array, Any]:
        """An action, the trained part of its chain, and the log-prob of every step.

        The chain is [batch, fine_tuned_steps + 1, action_size], the log-probs
        [batch, fine_tuned_steps], means over dimensions.
        """
        x_0 = self.start(params, keys)
        chain = self._walk(params, observation, keys, x_0, self.std_floor)
        record = {"chain": chain.states.swapaxes(0, 1)}
        record["log_prob"] = self.log_probs(chain).T
        return self.bound * chain.states[-1], record

    def deployed_end(
        self, params: Params, observation: Array, keys: Any, x_0: Array
    ) -> Array:
        """The end of a chain with the model's own noise, none in the last step.

        Raises:
            TypeError: keys that are not typed; the noise of the steps needs them.
        """
        prng.check_key(keys, "keys")
        return self._walk(params, observation, keys, x_0, None).states[-1]

    def _walk(
        self, params: Params, observation: Array, keys: Any, x: Array, floor: Any
    ) -> flows.Chain:
        """The trained part of a chain from x."""
        if self.fine_tuned_steps < self.steps:
            transition, cond = self._transition(params["base"], observation, floor)
            rows, clip = self._rows(trained=False), self.clip_noise
            given = keys, transition, x, rows, cond
            x = flows.noisy_chain(*given, clip_noise=clip).end
        transition, cond = self._transition(params["network"], observation, floor)
        return flows.noisy_chain(
            keys,
            transition,
            x,
            self._rows(trained=True),
            cond,
            clip_noise=self.clip_noise,
            clip_last=self.clip_last,
        )

    def rescore(self, params: Params, observation: Array, chain: Array) -> flows.Chain:
        """The trained part of stored chains under a policy, in one call of its network.

        Args:
            params: of the policy, whose gradient flows.
            observation: [batch, ...].
            chain: [batch, fine_tuned_steps + 1, action_size], as :meth:`act` recorded.

        Raises:
            ValueError: chains of another number of steps, or observations of another
                size than the policy was made for.
        """
        transition, cond = self._transition(
            params["network"], observation, self.std_floor
        )
        self.check_given(params["network"], observation, chain)
        rows = self._rows(trained=True)
        return flows.rescore_chain(chain.swapaxes(0, 1), transition, rows, cond)

    def log_probs(self, chain: flows.Chain) -> Array:
        """Log-prob of every step [step, batch]: clipped by dimension, then the mean.

        Clipping a sum over dimensions instead saturates where there are many, and no
        gradient is left.
        """
        return jnp.clip(chain.log_density, *self.log_prob_range).mean(-1)

    def loss(
        self,
        params: Params,
        behaviour: Params,
        samples: Samples,
        keys: Any,
        coefficients: Mapping[str, Any],
    ) -> tuple[Array, dict[str, Array]]:
        """Clipped surrogate, the mean over the trained steps, [batch]."""
        record, count = samples.record, self.fine_tuned_steps
        chain = self.rescore(params, samples.observation, record["chain"])
        log_prob, old = self.log_probs(chain), record["log_prob"].T
        advantage = step_advantages(
            samples.advantage,
            count,
            coefficients["denoising_discount"],
            self.advantage_quantiles,
        )
        clip = clip_ranges(count, coefficients["clip_range"], coefficients["clip_base"])
        loss = jax.vmap(
            lambda new, old, a, clip: rl.clipped_surrogate(new, old, a, clip_range=clip)
        )(log_prob, old, advantage, clip)
        low, high = self.log_prob_range
        outside = (chain.log_density < low) | (chain.log_density > high)
        return loss.mean(0), {
            "kl": rl.kl_estimate(old, log_prob).mean(0),
            "ratio_error": rl.ratio_error(log_prob - old).max(0),
            "std": chain.std.mean((0, 2)),
            "log_prob_clipped": outside.mean((0, 2)),
        }

    def generative_loss(
        self, network: Params, observation: Array, x_data: Array, keys: Any
    ) -> Array:
        """Denoising at a random level of the schedule, [batch]."""
        fn, schedule = self.function(network), self.schedule
        given = network, fn, x_data, keys, observation
        return flows.diffusion_loss(*given, schedule=schedule)

    def _transition(
        self, network: Params, observation: Array, floor: float | None
    ) -> tuple[flows.Transition, Array]:
        """Ancestral steps under a network, and the embedded observation.

        Their deviation is at least ``floor``; None leaves the model's own, at least
        1e-3, and has no noise in the last step.
        """
        fn = self.function(network)

        def transition(x: Array, row: Any, embedded: Array) -> tuple[Array, Array]:
            noise = fn(network, x, row["t"], embedded, method="velocity")
            mean, std = flows.ancestral_step(noise, x, row, clip_data=self.clip_data)
            if floor is None:
                return mean, jnp.where(row["level"] == 0, 0.0, jnp.maximum(std, 1e-3))
            return mean, jnp.maximum(std, floor)

        return transition, self.seen(network, observation)[0]


def clip_ranges(steps: int, clip_range: Any, clip_base: Any) -> Array:
    """Clip range of each trained step [steps], the noisiest first.

    clip_base + (clip_range - clip_base) (e^(3 i / (steps - 1)) - 1) / (e^3 - 1): the
    last step has clip_range; a single one too, where the released code divides 0 by 0
    and leaves it none.

    Args:
        steps: at least 1.
        clip_range: of the last step, scalar, may be traced.
        clip_base: of the first one, likewise.

    References:
        The code of arXiv 2409.00588.
    """
    i = jnp.arange(steps) / (steps - 1) if steps > 1 else jnp.ones(1)
    return clip_base + (clip_range - clip_base) * jnp.expm1(3 * i) / np.expm1(3)


def step_advantages(
    advantage: Array, steps: int, discount: Any, quantiles: tuple[float, float]
) -> Array:
    """Advantages of trained steps: of the environment step, clipped, then discounted.

    Args:
        advantage: [batch], of a minibatch.
        steps: at least 1.
        discount: of each step before the last one, scalar, may be traced.
        quantiles: of the minibatch, between which advantages are clipped.

    Returns:
        [steps, batch], the noisiest step first; the last one has weight 1.
    """
    low, high = jnp.quantile(advantage, jnp.asarray(quantiles))
    weight = discount ** jnp.arange(steps)[::-1]
    return weight[:, None] * jnp.clip(advantage, low, high)


_TRAINER = {"unroll": 500, "epochs": 5, "minibatches": 4, "advantages": "minibatch"}
_TRAINER |= {"learning_rate": 1e-4, "critic_learning_rate": 1e-3, "weight_decay": 0.0}
_TRAINER |= {"target_kl": 1.0, "kl_rule": "stop", "clip_norm": None}
_TRAINER |= {"value_coefficient": 0.25, "value_clip": None, "scale_rewards": True}
_TRAINER |= {"normalise": "fixed", "critic_hidden": (256, 256, 256)}


def preset(
    name: str, *, settings: Mapping[str, Any] | None = None, **changes: Any
) -> on_policy.ControlSetup:
    """The settings of the released code for hopper, with changes.

    Its clip range is 0.01 in every step; for robomimic it rises from 0.001
    (``clip_base=0.001``).

    Args:
        name: 'dppo'.
        settings: changed fields of :class:`tmdjax.train.on_policy.ControlSettings`.
        **changes: fields of :class:`DPPO`.

    Raises:
        ValueError: an unknown preset, or settings out of range.
        TypeError: an unknown field.
    """
    check_choice("preset", name, ("dppo",))
    return on_policy.make_setup(DPPO, _TRAINER, changes, settings)
