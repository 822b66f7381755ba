"""PPO with a Gaussian policy, the baseline of flow policies.

The mean is a network of the observation, the standard deviation a free vector.

References:
    arXiv 1707.06347; the settings are those that PolicyFlow compares with.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from tmdjax import flows, models, rl
from tmdjax.core import prng
from tmdjax.core.checks import check_choice, check_range
from tmdjax.core.types import Array, Params
from tmdjax.train import on_policy
from tmdjax.train.on_policy import Samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianPolicy:
    """A :class:`tmdjax.train.on_policy.ControlMethod`.

    Attributes:
        hidden: widths of the network of the mean.
        activation: its activation.
        recipe: its GEMM recipe, or the name of one.
        initial_std: standard deviation at the start.
        log_std_bounds: within which it is learned.
        clip_range: of the ratio, in (0, 1).
        entropy_coefficient: of the entropy in nats, >= 0.
    """

    hidden: tuple[int, ...] = (256, 128, 64)
    activation: str = "mish"
    recipe: Any = "fp32"
    initial_std: float = 1.0
    log_std_bounds: tuple[float, float] = (-20.0, 4.0)
    clip_range: float = 0.2
    entropy_coefficient: float = 0.001
    coefficients: ClassVar[tuple[str, ...]] = ("clip_range", "entropy_coefficient")

    def __post_init__(self) -> None:
        rl.check_std(self.initial_std, self.log_std_bounds)
        check_range("clip_range", self.clip_range, 0, 1, open_low=True, open_high=True)
        check_range("entropy_coefficient", self.entropy_coefficient, 0)

    def _module(self, size: int) -> models.ControlMLP:
        return models.ControlMLP(
            size, self.hidden, self.activation, out_scale=0.01, recipe=self.recipe
        )

    def init(self, key: Any, observation: Any, action_size: int) -> Params:
        """Parameters: those of the mean's network, and log_std [action_size]."""
        module = self._module(action_size)
        return {
            "network": models.init_params(module, key, observation),
            "log_std": jnp.full(action_size, jnp.log(self.initial_std)),
        }

    def exported(self, params: Params) -> tuple[dict[str, Any], Params, dict[str, Any]]:
        """The network of the mean, and log_std."""
        module = self._module(len(params["log_std"]))
        facts = {"log_std": np.asarray(params["log_std"]).tolist()}
        return models.spec_of(module), params["network"], facts

    def mean_and_log_std(
        self, params: Params, observation: Array
    ) -> tuple[Array, Array]:
        """Mean [batch, action_size] and log_std [action_size], within its bounds."""
        module = self._module(len(params["log_std"]))
        mean = models.functional(module)(params["network"], observation)
        return mean, jnp.clip(params["log_std"], *self.log_std_bounds)

    def act(
        self, params: Params, observation: Array, keys: Any, coefficients: Any = None
    ) -> tuple[Array, Any]:
        """An action, its mean and its log-prob (a sum over dimensions)."""
        mean, log_std = self.mean_and_log_std(params, observation)
        std = jnp.exp(log_std)
        action = flows.gaussian_transition(
            mean, std[None], prng.normal(keys, std.shape)
        )
        log_prob = flows.gaussian_log_prob(action, mean, std[None], "sum")
        return action, {"action": action, "mean": mean, "log_prob": log_prob}

    def loss(
        self,
        params: Params,
        behaviour: Params,
        samples: Samples,
        keys: Any,
        coefficients: Mapping[str, Any],
    ) -> tuple[Array, dict[str, Array]]:
        """Clipped surrogate less the entropy, [batch]."""
        record = samples.record
        mean, log_std = self.mean_and_log_std(params, samples.observation)
        std, old = (
            jnp.exp(log_std),
            jnp.clip(behaviour["log_std"], *self.log_std_bounds),
        )
        log_prob = flows.gaussian_log_prob(record["action"], mean, std[None], "sum")
        loss = rl.clipped_surrogate(
            log_prob,
            record["log_prob"],
            samples.advantage,
            clip_range=coefficients["clip_range"],
        )
        loss = loss - coefficients["entropy_coefficient"] * rl.gaussian_entropy(log_std)
        return loss, {
            "kl": rl.gaussian_kl(mean - record["mean"], log_std, old),
            "ratio_error": rl.ratio_error(log_prob - record["log_prob"]),
            "std_at_bound": rl.at_bounds(params["log_std"], self.log_std_bounds, loss),
            "std": jnp.broadcast_to(std.mean(), loss.shape),
        }


def preset(
    name: str, *, settings: Mapping[str, Any] | None = None, **changes: Any
) -> on_policy.ControlSetup:
    """PPO as PolicyFlow compares with it, with changes.

    Args:
        name: 'ppo'.
        settings: changed fields of :class:`tmdjax.train.on_policy.ControlSettings`.
        **changes: fields of :class:`GaussianPolicy`.

    Raises:
        ValueError: an unknown preset, or settings out of range.
        TypeError: an unknown field.
    """
    check_choice("preset", name, ("ppo",))
    return on_policy.make_setup(GaussianPolicy, {"target_kl": 0.01}, changes, settings)
