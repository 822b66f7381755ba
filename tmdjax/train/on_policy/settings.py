"""The contract of a method of control, and the settings of its training."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from tmdjax import rl
from tmdjax.core.checks import check_choice, check_count, check_fields, check_range
from tmdjax.core.types import Array, Params
from tmdjax.quant import Precision

VALUE_CLIPS = ("larger", "released")
ADVANTAGES = ("batch", "minibatch", "none")
TRUNCATIONS = ("final", "current", "legacy")
KL_RULES = ("adapt", "stop")
GAE = ("once", "per_minibatch")


class Samples(NamedTuple):
    """What a loss sees of the transitions of a minibatch.

    Attributes:
        observation: [batch, ...], as the policy saw it.
        record: what :meth:`ControlMethod.act` left, [batch, ...].
        advantage: float32 [batch].
    """

    observation: Any
    record: Any
    advantage: Any


@runtime_checkable
class ControlMethod(Protocol):
    """How a policy acts, and what it is trained on.

    A dataclass checks its coefficients when it is made; other values, given to the
    trainer's ``init``, are checked in the same way.
    """

    @property
    def coefficients(self) -> Sequence[str]:
        """Names of attributes, numbers of acting and of the loss, that may be vmapped.

        They stand in the state, and ``act`` and ``loss`` get them from there, together
        with 'iteration', int32, how many iterations were done: what a schedule needs.
        """
        ...

    def init(self, key: Any, observation: Any, action_size: int) -> Params:
        """Parameters, from one observation's shape and dtype."""
        ...

    def act(
        self,
        params: Params,
        observation: Array,
        keys: Any,
        coefficients: Mapping[str, Any],
    ) -> tuple[Array, Any]:
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

    def exported(self, params: Params) -> tuple[dict[str, Any], Params, dict[str, Any]]:
        """What a run leaves: a network's spec, its parameters, and facts beside it.

        The spec is one of :func:`tmdjax.models.build`, the facts are JSON-able.
        """
        ...


@runtime_checkable
class PartlyFrozen(Protocol):
    """A method whose parameters hold entries that no update changes, decay included."""

    @property
    def frozen(self) -> Sequence[str]:
        """Names of these entries; those that are not there are left out."""
        ...


@runtime_checkable
class Diagnosed(Protocol):
    """A method that can say more of an update than its loss does."""

    def diagnose(
        self, params: Params, behaviour: Params, samples: Samples, keys: Any
    ) -> dict[str, Array]:
        """Scalars by name; arguments as those of :meth:`ControlMethod.loss`."""
        ...


@dataclasses.dataclass(frozen=True)
class Normaliser:
    """How observations are normalised by their statistics.

    Attributes:
        update: ``(statistics, observations [..., *feature]) -> statistics``.
        before_update: they move before the update of the policy instead of after it:
            the first ratio is then not 1.
    """

    update: Callable[[rl.RunningStatistics, Any], rl.RunningStatistics] = (
        rl.update_statistics
    )
    before_update: bool = False


NORMALISERS = {
    "none": None,
    "running": Normaliser(),
    "fixed": Normaliser(update=lambda statistics, observations: statistics),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlSettings:
    """Everything but the method.

    Attributes:
        unroll: steps of every environment an iteration.
        epochs: passes over them.
        minibatches: an epoch; they divide environments x unroll.
        learning_rate: at the start.
        critic_learning_rate: of the critic, which no KL changes; None takes that of the
            policy.
        learning_rate_cycle: (iterations, of them warm-up, share): both learning rates
            run through cycles of so many iterations: linearly up from a share of
            themselves, then down to it by half a cosine, and again. None keeps them.
        critic_cycle_share: of the critic in these cycles; None takes that of the
            policy, 1 keeps the critic's rate.
        critic_warmup: iterations at the start in which the critic alone is changed; the
            optimiser's averages of the policy's gradient gather meanwhile.
        target_kl: of behaviour and policy, what kl_rule holds them to; None lets them
            be.
        kl_rule: 'adapt': at the end of every epoch the learning rate is divided by 1.5
            where the mean KL is above twice target_kl, and multiplied by 1.5 where
            below half of it. 'stop': a minibatch whose KL is above target_kl, and all
            that follow it in the iteration, change nothing.
        learning_rate_bounds: lowest and highest learning rate that 'adapt' leads to.
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
            code). 'legacy' (the code of ReinFlow and DPPO) takes the first one of the
            next episode and sums advantages on into it: a time limit is not seen.
        scale_rewards: divide rewards by the deviation of their running discounted sums
            and clip them to +-10 (:func:`tmdjax.rl.scale_rewards`).
        reward_scale: rewards are multiplied by it before returns.
        normalise: observations by 'running' statistics that move after the update; by
            'fixed' ones, given to the trainer's ``init`` (else mean 0, variance 1); by
            another :class:`Normaliser`, or 'none'. Images never are.
        diagnosed_samples: transitions an iteration on which a method that has a
            ``diagnose`` (arguments of its loss without coefficients; scalars by name)
            is diagnosed after the update; 0 for none.
        max_ratio_error: :func:`check` stops a run whose first minibatch of an iteration
            is above this; None checks nothing.
        precision: recipes of the policy as it acts, and of policy and critic as they
            are trained; None leaves each with its own. Where they differ, ratios to the
            log-probs of the rollout do not start at 1.
        critic_hidden: widths of the critic.
        critic_activation: its activation.
    """

    unroll: int = 32
    epochs: int = 5
    minibatches: int = 4
    learning_rate: float = 2e-4
    critic_learning_rate: float | None = None
    learning_rate_cycle: tuple[int, int, float] | None = None
    critic_cycle_share: float | None = None
    critic_warmup: int = 0
    target_kl: float | None = None
    kl_rule: str = "adapt"
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
    scale_rewards: bool = False
    reward_scale: float = 1.0
    normalise: str | Normaliser = "none"
    diagnosed_samples: int = 0
    max_ratio_error: float | None = 1e-4
    precision: Precision | None = None
    critic_hidden: tuple[int, ...] = (256, 128, 64)
    critic_activation: str = "mish"

    def __post_init__(self) -> None:
        for name in ("unroll", "epochs", "minibatches"):
            check_count(name, getattr(self, name))
        for name in ("learning_rate", "reward_scale"):
            value = getattr(self, name)
            check_range(name, value, 0, open_low=True, open_high=True)
        optional = "target_kl clip_norm value_clip max_ratio_error critic_learning_rate"
        for name in optional.split():
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 0, open_low=True)
        for name in ("weight_decay", "value_coefficient"):
            check_range(name, getattr(self, name), 0)
        for name in ("discount", "gae_lambda"):
            check_range(name, getattr(self, name), 0, 1)
        low, high = self.learning_rate_bounds
        check_range("learning_rate_bounds, upper", high, 0, open_high=True)
        check_range("learning_rate_bounds, lower", low, 0, high, open_low=True)
        check_count("critic_warmup", self.critic_warmup, 0)
        if self.learning_rate_cycle is not None:
            if len(self.learning_rate_cycle) != 3:
                raise ValueError(
                    f"learning_rate_cycle={self.learning_rate_cycle} must be three "
                    f"numbers: iterations, warm-up and share."
                )
            cycle, warmup, share = self.learning_rate_cycle
            check_count("learning_rate_cycle, iterations", cycle)
            check_count("learning_rate_cycle, warm-up", warmup, 0)
            check_range("learning_rate_cycle, warm-up", warmup, 0, cycle - 1)
            check_range("learning_rate_cycle, share", share, 0, 1)
        if self.critic_cycle_share is not None:
            check_range("critic_cycle_share", self.critic_cycle_share, 0, 1)
        check_choice("kl_rule", self.kl_rule, KL_RULES)
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
        if not isinstance(self.normalise, Normaliser):
            check_choice("normalise", self.normalise, NORMALISERS)

    @property
    def normaliser(self) -> Normaliser | None:
        """The rule that observations are normalised by, None for 'none'."""
        if isinstance(self.normalise, Normaliser):
            return self.normalise
        return NORMALISERS[self.normalise]


class ControlSetup(NamedTuple):
    """What a paper fixes, as its system's ``preset`` returns it.

    Attributes:
        method: how the policy acts and learns.
        settings: of the trainer.
    """

    method: Any
    settings: ControlSettings


def make_setup(
    method: type,
    published: Mapping[str, Any],
    changes: Mapping[str, Any],
    settings: Mapping[str, Any] | None = None,
) -> ControlSetup:
    """A paper's settings with changes: what a system's ``preset`` returns.

    Args:
        method: dataclass of the method; its defaults are the published ones.
        published: fields of :class:`ControlSettings` that the paper sets.
        changes: fields of the method.
        settings: fields of :class:`ControlSettings`, over the published ones.

    Raises:
        TypeError: an unknown field.
        ValueError: settings out of range.
    """
    found = {**published, **(settings or {})}
    check_fields(method, changes)
    check_fields(ControlSettings, found)
    return ControlSetup(method(**changes), ControlSettings(**found))
