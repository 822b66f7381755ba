"""FPO: PPO for flow policies by the change of their flow matching loss.

The ratio is exp(old loss - new loss), averaged over a few stored (noise, time) pairs of
each action: a lower loss stands for a higher likelihood.

The released trainer also lets its statistics of observations forget their variance, and
moves them before the update: ``ControlSettings(normalise=fpo.RELEASED_NORMALISER)``,
mended by 'running'.

References:
    arXiv 2507.21053 and its JAX code.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from tmdjax import flows, models, rl
from tmdjax.core import prng
from tmdjax.core.checks import check_choice, check_count, check_range
from tmdjax.core.types import Array, Params
from tmdjax.train import on_policy
from tmdjax.train.on_policy import Normaliser, Samples

RATIOS = ("mean", "per_sample")
ERRORS = ("noise", "velocity")

RELEASED_NORMALISER = Normaliser(
    functools.partial(rl.update_statistics, forget=True), before_update=True
)
"""The standard deviation of observations keeps shrinking, and the first ratio is not 1:
for comparison alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FPO:
    """A :class:`tmdjax.train.on_policy.ControlMethod`.

    Attributes:
        hidden: widths of the velocity network.
        activation: its activation.
        recipe: its GEMM recipe, or the name of one.
        frequencies: of its time embedding.
        output_scale: what its output is multiplied by.
        steps: of the Euler solver.
        pairs: stored (noise, time) pairs an action; times are those of the solver.
        error: what the loss measures: the 'noise', (1 - t)^2 times the error of the
            'velocity'.
        ratio: of the 'mean' loss, or 'per_sample', each clipped at e^+-3, with the
            surrogate averaged over pairs.
        squash: the environment gets bound tanh(action).
        bound: the largest action that squashing gives.
        clip_range: of the ratio, in (0, 1).
    """

    hidden: tuple[int, ...] = (32, 32, 32, 32)
    activation: str = "silu"
    recipe: Any = "fp32"
    frequencies: tuple[float, float, int] = (1.0, 8.0, 4)
    output_scale: float = 0.25
    steps: int = 10
    pairs: int = 8
    error: str = "noise"
    ratio: str = "mean"
    squash: bool = True
    bound: float = 1.0
    clip_range: float = 0.05
    coefficients: ClassVar[tuple[str, ...]] = ("clip_range",)

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_count("pairs", self.pairs)
        check_choice("error", self.error, ERRORS)
        check_choice("ratio", self.ratio, RATIOS)
        check_range("bound", self.bound, 0, open_low=True)
        check_range("clip_range", self.clip_range, 0, 1, open_low=True, open_high=True)

    def _module(self, size: int) -> models.ControlVelocity:
        return models.ControlVelocity(
            size,
            self.hidden,
            self.activation,
            self.frequencies,
            out_scale=1.0,
            output_scale=self.output_scale,
            recipe=self.recipe,
        )

    def init(self, key: Any, observation: Any, action_size: int) -> Params:
        """Parameters: those of the velocity network."""
        point = jax.ShapeDtypeStruct((1, action_size), jnp.float32)
        time = jax.ShapeDtypeStruct((1,), jnp.float32)
        module = self._module(action_size)
        return {"network": models.init_params(module, key, point, time, observation)}

    def act(
        self, params: Params, observation: Array, keys: Any, coefficients: Any = None
    ) -> tuple[Array, Any]:
        """An action, its (noise, time) pairs and their losses."""
        size = params["network"]["out"]["bias"].shape
        x = models.solve_action(
            models.functional(self._module(*size)),
            params["network"],
            observation,
            prng.normal(prng.fold_in(keys, 0), size),
            steps=self.steps,
            solver="euler",
        )
        starts = jnp.asarray(flows.uniform_grid(self.steps)[:-1], jnp.float32)
        pick = jax.vmap(lambda k: jax.random.randint(k, (self.pairs,), 0, self.steps))
        t = starts[pick(prng.fold_in(keys, 1))]
        noise = prng.normal(prng.fold_in(keys, 2), (self.pairs, *size))
        record = {"action": x, "noise": noise, "t": t}
        record["loss"] = self.losses(params, observation, record)
        return (self.bound * jnp.tanh(x) if self.squash else x), record

    def exported(self, params: Params) -> tuple[dict[str, Any], Params, dict[str, Any]]:
        """The velocity network; steps, and the bound actions are squashed to."""
        module = self._module(*params["network"]["out"]["bias"].shape)
        bound = self.bound if self.squash else None
        facts = {"steps": self.steps, "solver": "euler", "bound": bound}
        return models.spec_of(module), params["network"], facts

    def losses(self, params: Params, observation: Array, record: Any) -> Array:
        """Flow matching loss of every pair, [batch, pairs], a mean over dimensions."""
        shape, size = record["t"].shape, record["action"].shape[-1]
        action = jnp.repeat(record["action"], shape[1], 0)
        noise, t = record["noise"].reshape(-1, size), record["t"].reshape(-1)
        apply_fn = models.functional(self._module(size))
        embedded = apply_fn(params["network"], observation, method="embed")
        embedded = jnp.repeat(embedded, shape[1], 0)
        x_t = flows.interpolate(action, noise, t)
        v = apply_fn(params["network"], x_t, t, embedded, method="velocity")
        if self.error == "velocity":
            error = v - flows.conditional_velocity(action, noise)
        else:
            error = noise - flows.convert(v, "velocity", "noise", x_t, t)
        return jnp.mean(error**2, -1).reshape(shape)

    def loss(
        self,
        params: Params,
        behaviour: Params,
        samples: Samples,
        keys: Any,
        coefficients: Mapping[str, Any],
    ) -> tuple[Array, dict[str, Array]]:
        """Clipped surrogate of the loss difference, [batch]."""
        old = samples.record["loss"]
        new = self.losses(params, samples.observation, samples.record)
        if self.ratio == "mean":
            log_ratio = (old - new).mean(1)
        else:
            log_ratio = jnp.clip(old - new, -3, 3)
        loss = rl.clipped_surrogate(
            log_ratio,
            jnp.zeros_like(log_ratio),
            samples.advantage,
            clip_range=coefficients["clip_range"],
        )
        error = rl.ratio_error(log_ratio)
        if self.ratio == "per_sample":
            loss, error = loss.mean(1), error.max(1)
        return loss, {"ratio_error": error, "flow_loss": new.mean(1)}


_TRAINER = {
    "unroll": 30,
    "epochs": 16,
    "minibatches": 32,
    "learning_rate": 3e-4,
    "target_kl": None,
    "weight_decay": 0.0,
    "clip_norm": None,
    "discount": 0.995,
    "reward_scale": 10.0,
    "advantages": "minibatch",
    "value_coefficient": 0.25,
    "value_clip": None,
    "normalise": "running",
    "critic_hidden": (256,) * 5,
    "critic_activation": "silu",
}
_RELEASED = {
    "normalise": RELEASED_NORMALISER,
    "gae": "per_minibatch",
    "max_ratio_error": None,
}
_PUBLISHED = {"fpo": _TRAINER, "released": {**_TRAINER, **_RELEASED}}
PRESETS = tuple(_PUBLISHED)


def preset(
    name: str, *, settings: Mapping[str, Any] | None = None, **changes: Any
) -> on_policy.ControlSetup:
    """The settings of the JAX code, with changes.

    There an iteration takes 16 unrolls of 30 steps in each of 2048 environments, and
    each of its 32 minibatches has 1024 unrolls; here an environment has one unroll, so
    that 16 * 2048 environments give minibatches of that size.

    Args:
        name: 'fpo', mended: statistics of observations keep their variance and move
            after the update, advantages come once an iteration; or 'released', as it
            is.
        settings: changed fields of :class:`tmdjax.train.on_policy.ControlSettings`.
        **changes: fields of :class:`FPO`.

    Raises:
        ValueError: an unknown preset, or settings out of range.
        TypeError: an unknown field.
    """
    check_choice("preset", name, PRESETS)
    return on_policy.make_setup(FPO, _PUBLISHED[name], changes, settings)
