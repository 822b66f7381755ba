"""ReinFlow: PPO for flow policies that sample in a few steps.

A flow policy is deterministic given its start noise. While it is trained, a small
network adds bounded Gaussian noise after every Euler step, so that the chain of states
has a likelihood; afterwards it is thrown away, and the policy is the ODE again with the
velocity that PPO left. Policies begin as clones of demonstrations.

In this library's time (1 is noise, 0 the action) a step is x - v / K; the paper's time
runs the other way.

References:
    arXiv 2505.22094 and its code.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tmdjax import flows, models, rl
from tmdjax.core.checks import check_choice, check_count, check_range
from tmdjax.core.types import Array, Params
from tmdjax.train import on_policy
from tmdjax.train.on_policy import Samples

VARIANTS = ("rectified", "shortcut")
NOISE_INPUTS = ("observation", "observation_time", "none")
W2_NOISES = ("normal", "zero")
CLONING_TIMES = {
    "uniform": flows.uniform_time(),
    "logit_normal": flows.logit_normal_time(),
    "beta": flows.beta_time(),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReinFlow(models.ChainPolicy):
    """A :class:`tmdjax.train.on_policy.ControlMethod`.

    Attributes, beside those of :class:`tmdjax.models.ChainPolicy`:
        variant: 'rectified', or 'shortcut': the network also takes the step's length.
        noise_hidden: widths of the noise network (tanh).
        noise_input: what it sees: 'observation', 'observation_time' (the velocity
            network's embedding of the time too, without gradient), or 'none': the
            standard deviation is std_lower everywhere.
        std_lower: lowest standard deviation of a step's noise, > 0.
        std_upper: highest one, >= std_lower.
        decay_iterations: of training; the highest deviation falls over them as
            :func:`tmdjax.flows.decayed_bound` says. None holds it.
        learned_noise_steps: how many of the last steps have a learned deviation; those
            before have std_lower. None is all.
        stochastic_steps: how many consecutive steps of a chain have noise and are
            scored, drawn anew for every action; an update calls the network so many
            times an action. None is all, as published.
        clip_mean: means of steps stay within +-clip_mean; None does not clip.
        log_prob_reduction: 'mean' over steps and dimensions, as published, or 'sum';
            clip_range, log_prob_range and the entropy go by it.
        count_start: the start noise counts as a step in log-prob and entropy, where
            all steps are scored.
        entropy_coefficient: of the entropy, >= 0.
        w2_coefficient: of the squared distance to the action that the pretrained policy
            takes from the same start, >= 0; 0 leaves it out, with the copy it needs.
        w2_noise: that start: 'normal' noise (the paper), or 'zero' (its code).
        cloning_times: those that cloning draws: 'uniform', 'logit_normal', or 'beta'
            (more near the noise); a shortcut policy's are uniform.
        legacy_grid: chains are walked on the times of the released code, K points from
            1 to 0, and scored on others: ratios do not start at 1. To compare alone.
    """

    variant: str = "rectified"
    noise_hidden: tuple[int, ...] = (64, 64)
    noise_input: str = "observation_time"
    std_lower: float = 0.1
    std_upper: float = 0.24
    decay_iterations: int | None = 1000
    learned_noise_steps: int | None = None
    stochastic_steps: int | None = None
    clip_mean: float | None = 1.0
    log_prob_reduction: str = "mean"
    count_start: bool = True
    entropy_coefficient: float = 0.03
    w2_coefficient: float = 0.0
    w2_noise: str = "normal"
    cloning_times: str = "uniform"
    legacy_grid: bool = False
    coefficients: ClassVar[tuple[str, ...]] = (
        "clip_range", "entropy_coefficient", "std_lower", "std_upper",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("variant", self.variant, VARIANTS)
        check_choice("noise_input", self.noise_input, NOISE_INPUTS)
        check_choice("w2_noise", self.w2_noise, W2_NOISES)
        check_choice("cloning_times", self.cloning_times, CLONING_TIMES)
        check_choice("log_prob_reduction", self.log_prob_reduction, flows.REDUCTIONS)
        if not 0 < self.std_lower <= self.std_upper < float("inf"):
            raise ValueError(
                f"std_lower={self.std_lower}, std_upper={self.std_upper}: the noise of "
                f"a step needs 0 < std_lower <= std_upper."
            )
        if self.decay_iterations is not None:
            check_count("decay_iterations", self.decay_iterations)
        for name in ("learned_noise_steps", "stochastic_steps"):
            if getattr(self, name) is not None:
                check_range(name, check_count(name, getattr(self, name)), 1, self.steps)
        if self.clip_mean is not None:
            check_range("clip_mean", self.clip_mean, 0, open_low=True)
        for name in ("entropy_coefficient", "w2_coefficient"):
            check_range(name, getattr(self, name), 0)
        shortcut = self.variant == "shortcut"
        if shortcut and self.steps & (self.steps - 1):
            warnings.warn(
                f"steps={self.steps} of a shortcut policy is no power of 2: cloning "
                f"trains steps of 1, 1/2, 1/4, 1/8, not of 1/{self.steps}.",
                stacklevel=3,
            )
        if shortcut and (self.legacy_grid or self.cloning_times != "uniform"):
            raise ValueError(
                f"legacy_grid={self.legacy_grid}, cloning_times={self.cloning_times!r};"
                f" a shortcut policy has one grid and uniform times: leave both out."
            )

    @property
    def frozen(self) -> tuple[str, ...]:
        """The copy that the W2 term compares with."""
        return ("pretrained",) if self.w2_coefficient else ()

    @property
    def step_size(self) -> float | None:
        """1 / K for a shortcut policy, None for a rectified flow."""
        return 1 / self.steps if self.variant == "shortcut" else None

    @property
    def _rows(self) -> dict[str, Array]:
        grid = flows.uniform_grid(self.steps)
        return flows.make_table("ode", grid).rows(slice(None), jnp.float32)

    def init(self, key: Any, observation: Any, action_size: int) -> Params:
        """Parameters 'network' (velocity), and 'noise' and 'pretrained' if needed."""
        keys = jax.random.split(key)
        network = self.init_network(keys[0], observation, action_size)
        params = self.pretrained(network)
        if self.noise_input != "none":
            given = jax.eval_shape(
                lambda n, x: self._noise_seen(n, self.seen(n, x)[1], jnp.zeros(1)),
                network,
                observation,
            )
            noise = self._noise_module(action_size)
            params["noise"] = models.init_params(noise, keys[1], given)
        return params

    def exported(self, params: Params) -> tuple[dict[str, Any], Params, dict[str, Any]]:
        """The velocity network, and how it is walked; no noise is left."""
        module = self.module(models.action_size_of(params["network"]))
        names = ("steps", "step_size", "clip_mean", "clip_last", "bound")
        facts = {name: getattr(self, name) for name in names}
        return models.spec_of(module), params["network"], {"solver": "euler", **facts}

    def std_bounds(self, coefficients: Mapping[str, Any] | None = None) -> Any:
        """Lowest and highest deviation in an iteration, the first without any given."""
        if coefficients is None:
            return self.std_lower, self.std_upper
        low, high = coefficients["std_lower"], coefficients["std_upper"]
        if self.decay_iterations is not None:
            done = coefficients["iteration"] / self.decay_iterations
            high = flows.decayed_bound(done, low, high)
        return low, high

    def deployed_end(
        self, params: Params, observation: Array, keys: Any, x_0: Array
    ) -> Array:
        """The end of K Euler steps without noise; the noise network is not asked."""
        cond = self.seen(params["network"], observation)
        given = self._transition(params), x_0, self._rows, cond
        return flows.noisy_chain(None, *given, clip_last=self.clip_last).end

    def act(
        self, params: Params, observation: Array, keys: Any, coefficients: Any = None
    ) -> tuple[Array, Any]:
        """An action, its chain [batch, K + 1, action_size] and the chain's log-prob.

        With stochastic_steps the chain is of these steps alone, and 'step', int32
        [batch, stochastic_steps], says which they are.
        """
        bounds, x_0 = self.std_bounds(coefficients), self.start(params, keys)
        transition = self._transition(params, bounds, legacy=self.legacy_grid)
        cond = self.seen(params["network"], observation)
        clips = {"clip_noise": self.clip_noise, "clip_last": self.clip_last}
        given = keys, transition, x_0, self._rows, cond
        chain = flows.noisy_chain(*given, noisy_steps=self.stochastic_steps, **clips)
        record = {
            "chain": chain.states.swapaxes(0, 1),
            "log_prob": self.log_prob(chain),
        }
        if chain.step is not None:
            record["step"] = chain.step.T
        return self.bound * chain.end, record

    def rescore(
        self,
        params: Params,
        observation: Array,
        chain: Array,
        coefficients: Any = None,
        step: Array | None = None,
    ) -> flows.Chain:
        """Chains [batch, K + 1, action_size] under a policy, all steps in one call.

        ``step`` is what :meth:`act` recorded of chains of stochastic_steps.

        Raises:
            ValueError: chains of another number of steps, or sizes that the policy was
                not made for.
        """
        self.check_given(params["network"], observation, chain)
        transition = self._transition(params, self.std_bounds(coefficients))
        cond = self.seen(params["network"], observation)
        given = chain.swapaxes(0, 1), transition, self._rows, cond
        return flows.rescore_chain(*given, None if step is None else step.T)

    def log_prob(self, chain: flows.Chain) -> Array:
        """Log-prob of a chain as the ratio takes it, [batch], before it is clipped."""
        return self._reduced(flows.chain_log_prob, chain)

    def _reduced(self, rule: Any, chain: flows.Chain) -> Array:
        start = self.count_start and chain.step is None
        return rule(chain, self.log_prob_reduction, count_start=start)

    def loss(
        self,
        params: Params,
        behaviour: Params,
        samples: Samples,
        keys: Any,
        coefficients: Mapping[str, Any],
    ) -> tuple[Array, dict[str, Array]]:
        """Clipped surrogate less the entropy, plus the W2 term, [batch]."""
        seen, record = samples.observation, samples.record
        given = record["chain"], coefficients, record.get("step")
        chain = self.rescore(params, seen, *given)
        whole = self.log_prob(chain)
        log_prob, old = (
            jnp.clip(x, *self.log_prob_range) for x in (whole, record["log_prob"])
        )
        entropy = self._reduced(flows.chain_entropy, chain)
        loss = rl.clipped_surrogate(
            log_prob, old, samples.advantage, clip_range=coefficients["clip_range"]
        )
        loss = loss - coefficients["entropy_coefficient"] * entropy
        metrics = {
            "kl": rl.kl_estimate(old, log_prob),
            "ratio_error": rl.ratio_error(whole - record["log_prob"]),
            "entropy": entropy,
            "std": chain.std.mean((0, 2)),
            "log_prob_clipped": (whole != log_prob).astype(jnp.float32),
        }
        if self.w2_coefficient:
            distance = self._w2(params, seen, keys)
            loss, metrics["w2"] = loss + self.w2_coefficient * distance, distance
        return loss, metrics

    def generative_loss(
        self, network: Params, observation: Array, x_data: Array, keys: Any
    ) -> Array:
        """Flow matching, with the self-consistency of a shortcut policy, [batch]."""
        fn, times = self.function(network), CLONING_TIMES[self.cloning_times]
        if self.variant == "rectified":
            given = network, fn, x_data, keys, observation
            return flows.flow_matching_loss(*given, time_sampler=times)[0]
        return flows.shortcut_loss(
            lambda y, s, r: fn(network, y, s, observation, s - r), x_data, keys
        )

    def _noise_module(self, size: int) -> models.ControlMLP:
        return models.ControlMLP(size, self.noise_hidden, "tanh", 0.01, self.recipe)

    def _noise_seen(self, network: Params, features: Array, t: Array) -> Array:
        if self.noise_input == "observation":
            return features
        time = self.function(network)(network, t, self.step_size, method="time")
        return jnp.concatenate([features, jax.lax.stop_gradient(time)], -1)

    def _transition(
        self, params: Params, bounds: Any = None, *, legacy: bool = False
    ) -> flows.Transition:
        """Euler steps, whose deviation lies within bounds; None is for no noise."""
        network = params["network"]
        fn = self.function(network)
        noise = models.functional(self._noise_module(models.action_size_of(network)))

        def clock(t: Array) -> Array:
            # the released code walks K points from 1 to 0 in steps of 1 / K
            return 1 - (1 - t) * self.steps / max(self.steps - 1, 1) if legacy else t

        def velocity(x: Array, t: Array, cond: Any) -> Array:
            given = x, clock(t), cond[0], self.step_size
            return fn(network, *given, method="velocity")

        def std(t: Array, cond: Any) -> Any:
            if bounds is None or self.noise_input == "none":
                return 1.0 if bounds is None else bounds[0]
            given = self._noise_seen(network, cond[1], clock(t))
            learned = flows.bounded_std(noise(params["noise"], given), *bounds)
            if self.learned_noise_steps is None:
                return learned
            late = t < (self.learned_noise_steps + 0.5) / self.steps
            return jnp.where(late[:, None], learned, bounds[0])

        return flows.euler_transition(velocity, std, clip_mean=self.clip_mean)

    def _w2(self, params: Params, observation: Array, keys: Any) -> Array:
        """Squared distance to the pretrained policy's action, a mean, [batch]."""
        x_0 = self.start(params, keys)
        x_0 = jnp.zeros_like(x_0) if self.w2_noise == "zero" else x_0
        given = observation, None, x_0
        before = self.evaluate({"network": params["pretrained"]}, *given)
        there = jax.lax.stop_gradient(before)
        return jnp.mean((self.evaluate(params, *given) - there) ** 2, -1)


_TRAINER = {"unroll": 500, "epochs": 5, "minibatches": 4, "advantages": "minibatch"}
_TRAINER |= {"learning_rate": 4.5e-5, "critic_learning_rate": 6.5e-4}
_TRAINER |= {"learning_rate_cycle": (100, 10, 4 / 9), "critic_cycle_share": 6 / 13}
_TRAINER |= {"target_kl": 1.0, "kl_rule": "stop", "clip_norm": None}
_TRAINER |= {"value_coefficient": 0.25, "value_clip": None, "scale_rewards": True}
_TRAINER |= {"normalise": "fixed", "critic_hidden": (256,) * 3, "weight_decay": 0.0}
_NARROW = {"std_lower": 0.08, "std_upper": 0.16}
_HELD = {"decay_iterations": None, "entropy_coefficient": 0.0}
_KITCHEN = {**_HELD, "variant": "shortcut", "std_lower": 0.05, "std_upper": 0.12}
_KITCHEN |= {"hidden": (256,) * 3, "activation": "mish"}
_IMAGE = {**_HELD, "std_lower": 0.08, "std_upper": 0.14, "steps": 1, "clip_range": 1e-3}
_IMAGE |= {"noise_hidden": (256,) * 3}
_WALKER = {"learning_rate": 4.5e-4, "critic_learning_rate": 4e-3, "critic_warmup": 5}
_WALKER |= {"learning_rate_cycle": (100, 10, 8 / 9), "critic_cycle_share": 1.0}
_HALFCHEETAH = {"learning_rate": 3e-5, "critic_learning_rate": 3e-4}
_HALFCHEETAH |= {"learning_rate_cycle": (100, 10, 1 / 2), "critic_cycle_share": 1 / 2}
_HALFCHEETAH |= {"critic_warmup": 10}
_CAN = {"unroll": 300, "epochs": 10, "minibatches": 20, "learning_rate": 2e-5}
_CAN |= {"critic_warmup": 2, "discount": 0.999, "target_kl": 0.01}
_TASKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "reinflow": ({}, {}),
    "hopper": ({}, {}),
    "walker": ({}, _WALKER),
    "halfcheetah": ({}, _HALFCHEETAH),
    "ant": (_NARROW, {}),
    "humanoid": (_NARROW, {}),
    "kitchen": (_KITCHEN, {"unroll": 200, "epochs": 10, "minibatches": 16}),
    "image": (_IMAGE, _CAN),
}
PRESETS = tuple(_TASKS)


def preset(
    name: str, *, settings: Mapping[str, Any] | None = None, **changes: Any
) -> on_policy.ControlSetup:
    """The settings of the released code, corrected by the paper's text, with changes.

    A sample is seen once an epoch; the code has each ten times among its indices, for
    about as many updates of ten times the size. It has 40 environments, 'image' 50.

    Args:
        name: 'hopper' ('reinflow' is the same), 'walker', 'halfcheetah', 'ant',
            'humanoid', 'kitchen', or 'image' (robomimic's can from pixels; in the code
            its rate falls to 1/2, not to 4/9, and noise_input is 'observation').
        settings: changed fields of :class:`tmdjax.train.on_policy.ControlSettings`.
        **changes: fields of :class:`ReinFlow`.

    Raises:
        ValueError: an unknown preset, or settings out of range.
        TypeError: an unknown field.
    """
    check_choice("preset", name, PRESETS)
    method, trainer = _TASKS[name]
    trainer = {**_TRAINER, **trainer}
    return on_policy.make_setup(ReinFlow, trainer, {**method, **changes}, settings)
