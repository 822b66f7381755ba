"""PolicyFlow: PPO for flow policies without likelihoods in the loss.

An action is the end of an ODE flow from noise, plus a small learned Gaussian. The ratio
is that of two Gaussians around the *stored* end, whose mean shift is the change of the
velocity at one random point of a path between noise and end: one forward and backward
of the network a sample, no solve.

In this library's time (1 is noise, 0 the action) dv = v - v_behaviour moves the end by
-dv. The paper's time runs the other way: with t = 1 - tau and v = -u its formulae are
those below.

References:
    arXiv 2602.01156.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax import flows, models, rl
from tmdjax.core import prng
from tmdjax.core.checks import check_choice, check_count, check_range, check_same_shape
from tmdjax.core.types import Array, Params
from tmdjax.train import on_policy
from tmdjax.train.on_policy import Samples

PATHS = ("rectified_flow", "stochastic_interpolant", "trigflow")
REDUCTIONS = ("mean", "sum")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyFlow:
    """A :class:`tmdjax.train.on_policy.ControlMethod`.

    Attributes:
        hidden: widths of the velocity network.
        activation: its activation.
        recipe: its GEMM recipe, or the name of one.
        frequencies: of its time embedding, see :class:`tmdjax.models.ControlVelocity`.
        out_scale: of its output at the start; the paper starts at 0.
        steps: K, of the midpoint solver; 2 K evaluations an action.
        path: where velocities are compared, one of PATHS.
        times: points of the path a sample and visit (n_t), averaged.
        initial_std: of the Gaussian at the start.
        log_std_bounds: within which it is learned.
        clip_range: of the ratio, in (0, 1).
        entropy_coefficient: of the Gaussian's entropy (w_g), >= 0.
        brownian_coefficient: of the regulariser that spreads the flow (w_b), >= 0.
        brownian_reduction: 'mean' over dimensions, as the code, or 'sum', as the paper.
        deterministic_start: start from 0 in place of noise: a Gaussian policy.
    """

    hidden: tuple[int, ...] = (256, 128, 64)
    activation: str = "mish"
    recipe: Any = "fp32"
    frequencies: tuple[float, float, int] = (1.0, 100.0, 32)
    out_scale: float = 0.01
    steps: int = 10
    path: str = "rectified_flow"
    times: int = 1
    initial_std: float = 1.0
    log_std_bounds: tuple[float, float] = (-5.0, 2.0)
    clip_range: float = 0.2
    entropy_coefficient: float = 0.001
    brownian_coefficient: float = 0.25
    brownian_reduction: str = "mean"
    deterministic_start: bool = False
    coefficients: ClassVar[tuple[str, ...]] = (
        "clip_range",
        "entropy_coefficient",
        "brownian_coefficient",
    )

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        check_count("times", self.times)
        check_choice("path", self.path, PATHS)
        check_choice("brownian_reduction", self.brownian_reduction, REDUCTIONS)
        rl.check_std(self.initial_std, self.log_std_bounds)
        check_range("clip_range", self.clip_range, 0, 1, open_low=True, open_high=True)
        for name in ("entropy_coefficient", "brownian_coefficient"):
            check_range(name, getattr(self, name), 0)

    @property
    def nodes(self) -> np.ndarray:
        """float32 [2 K + 1]: where the solver evaluates, 1 to 0, both included."""
        return np.linspace(1, 0, 2 * self.steps + 1, dtype=np.float32)

    def _module(self, size: int) -> models.ControlVelocity:
        return models.ControlVelocity(
            size,
            self.hidden,
            self.activation,
            self.frequencies,
            self.out_scale,
            recipe=self.recipe,
        )

    def init(self, key: Any, observation: Any, action_size: int) -> Params:
        """Parameters: those of the velocity network, and log_std [action_size]."""
        point = jax.ShapeDtypeStruct((1, action_size), jnp.float32)
        time = jax.ShapeDtypeStruct((1,), jnp.float32)
        module = self._module(action_size)
        return {
            "network": models.init_params(module, key, point, time, observation),
            "log_std": jnp.full(action_size, jnp.log(self.initial_std)),
        }

    def exported(self, params: Params) -> tuple[dict[str, Any], Params, dict[str, Any]]:
        """The velocity network; log_std, and the steps it was trained with."""
        log_std = np.asarray(params["log_std"])
        module = self._module(len(log_std))
        facts = {"steps": self.steps, "solver": "midpoint", "log_std": log_std.tolist()}
        return models.spec_of(module), params["network"], facts

    def log_std(self, params: Params) -> Array:
        """Logarithm of the Gaussian's deviation, [action_size], within its bounds."""
        return jnp.clip(params["log_std"], *self.log_std_bounds)

    def flow(self, params: Params, observation: Array, x_0: Array) -> Array:
        """Where the flow takes the noise x_0: the action before its Gaussian.

        Args:
            params: of the policy.
            observation: [batch, ...].
            x_0: [batch, action_size], at t = 1.

        Returns:
            x_1 [batch, action_size], at t = 0.
        """
        return models.solve_action(
            models.functional(self._module(x_0.shape[-1])),
            params["network"],
            observation,
            x_0,
            steps=self.steps,
            solver="midpoint",
        )

    def act(
        self, params: Params, observation: Array, keys: Any, coefficients: Any = None
    ) -> tuple[Array, Any]:
        """An action and what made it: noise, end of the flow, Gaussian part."""
        std = jnp.exp(self.log_std(params))
        shape = (observation.shape[0], *std.shape)
        if self.deterministic_start:
            x_0 = jnp.zeros(shape)
        else:
            x_0 = prng.normal(prng.fold_in(keys, 0), std.shape)
        x_1 = self.flow(params, observation, x_0)
        z = prng.normal(prng.fold_in(keys, 1), std.shape)
        delta = flows.gaussian_transition(jnp.zeros(shape), std[None], z)
        return x_1 + delta, {"x_0": x_0, "x_1": x_1, "delta": delta}

    def loss(
        self,
        params: Params,
        behaviour: Params,
        samples: Samples,
        keys: Any,
        coefficients: Mapping[str, Any],
    ) -> tuple[Array, dict[str, Array]]:
        """Clipped surrogate, entropy of the Gaussian, Brownian regulariser; [batch]."""
        x_t, t, v, v_old = self.velocities(params, behaviour, samples, keys)
        dv = (v - v_old).mean(0)
        log_std, old_log_std = self.log_std(params), self.log_std(behaviour)
        log_ratio = rl.shifted_log_ratio(
            samples.record["delta"], -dv, log_std, old_log_std
        )
        loss = rl.clipped_surrogate(
            log_ratio,
            jnp.zeros_like(log_ratio),
            samples.advantage,
            clip_range=coefficients["clip_range"],
        )
        spread = brownian_penalty(self.path, x_t, t, v, v_old).mean(0)
        if self.brownian_reduction == "sum":
            spread = spread * dv.shape[-1]
        loss = (
            loss
            - coefficients["entropy_coefficient"] * rl.gaussian_entropy(log_std)
            + coefficients["brownian_coefficient"] * spread
        )
        return loss, {
            "kl": rl.gaussian_kl(dv, log_std, old_log_std),
            "ratio_error": rl.ratio_error(log_ratio),
            "brownian": spread,
            "std_at_bound": rl.at_bounds(params["log_std"], self.log_std_bounds, loss),
            "std": jnp.broadcast_to(jnp.exp(log_std).mean(), loss.shape),
        }

    def velocities(
        self, params: Params, behaviour: Params, samples: Samples, keys: Any
    ) -> tuple[Array, Array, Array, Array]:
        """Points of the path and both velocities there.

        Returns:
            x_t [times, batch, action_size], t [times, batch] in [0, 1], v with
            gradient, and v of the behaviour without. The shift is their plain
            difference on every path, as in the code: that of 'trigflow' is not scaled
            by pi / 2.
        """
        x_0, x_1 = samples.record["x_0"], samples.record["x_1"]
        check_same_shape("x_0", x_0, "x_1", x_1)
        draws = prng.fold_in(keys[None], jnp.arange(self.times)[:, None])
        pick = jax.vmap(
            jax.vmap(lambda k: jax.random.randint(k, (), 0, 2 * self.steps + 1))
        )
        t = jnp.asarray(self.nodes)[pick(draws)]
        z = None
        if self.path == "stochastic_interpolant":
            z = jax.vmap(lambda k: prng.normal(prng.fold_in(k, 1), x_0.shape[1:]))(
                draws
            )
        point = functools.partial(path_point, self.path, x_0, x_1)
        x_t = jax.vmap(point)(t, z)
        apply_fn = models.functional(self._module(x_0.shape[-1]))

        flat, times = x_t.reshape(-1, x_t.shape[-1]), t.reshape(-1)

        def at(network: Params) -> Array:
            embedded = apply_fn(network, samples.observation, method="embed")
            embedded = jnp.tile(embedded, (self.times, 1))
            v = apply_fn(network, flat, times, embedded, method="velocity")
            return v.reshape(x_t.shape)

        # one program for both: equal parameters give equal bits, and a ratio of 1
        both = jax.tree.map(
            lambda new, old: jnp.stack([new, jax.lax.stop_gradient(old)]),
            params["network"],
            behaviour["network"],
        )
        v, v_old = jax.vmap(at)(both)
        return x_t, t, v, jax.lax.stop_gradient(v_old)

    def diagnose(
        self, params: Params, behaviour: Params, samples: Samples, keys: Any
    ) -> dict[str, Array]:
        """The approximate log-ratio beside the exact one, solving the ODE once more.

        Args:
            params: trained policy.
            behaviour: the policy that acted.
            samples: some hundred transitions.
            keys: [batch].

        Returns:
            Scalars: 'ratio_correlation' of the two log-ratios, 'ratio_bias' (mean of
            approximate less exact), 'ratio_rms_error' (root mean square of it) and
            'ratio_spread' (standard deviation of the exact one).
        """
        record = samples.record
        *_, v, v_old = self.velocities(params, behaviour, samples, keys)
        stds = self.log_std(params), self.log_std(behaviour)
        shift = -(v - v_old).mean(0)
        approximate = rl.shifted_log_ratio(record["delta"], shift, *stds)
        moved = self.flow(params, samples.observation, record["x_0"]) - record["x_1"]
        exact = rl.shifted_log_ratio(record["delta"], moved, *stds)
        away = approximate - exact
        return {
            "ratio_correlation": jnp.corrcoef(approximate, exact)[0, 1],
            "ratio_bias": away.mean(),
            "ratio_rms_error": jnp.sqrt(jnp.mean(away**2)),
            "ratio_spread": exact.std(),
        }


def preset(
    name: str, *, settings: Mapping[str, Any] | None = None, **changes: Any
) -> on_policy.ControlSetup:
    """The settings of the released code (MultiGoal), with changes.

    Not as released, on purpose: the value loss is the larger of clipped and unclipped
    error (``value_clip_kind``), a time limit is bootstrapped from the last observation
    (``truncation``), the KL that moves the learning rate is that of one epoch, and
    sinusoids of the time, of frequencies of our own, enter the first layer directly.

    Args:
        name: 'policyflow'.
        settings: changed fields of :class:`tmdjax.train.on_policy.ControlSettings`.
        **changes: fields of :class:`PolicyFlow`.

    Raises:
        ValueError: an unknown preset, or settings out of range.
        TypeError: an unknown field.
    """
    check_choice("preset", name, ("policyflow",))
    return on_policy.make_setup(PolicyFlow, {"target_kl": 0.01}, changes, settings)


def path_point(path: str, x_0: Array, x_1: Array, t: Array, z: Any = None) -> Array:
    """A point between the noise x_0 (t = 1) and the end x_1 (t = 0).

    Args:
        path: one of PATHS.
        x_0: [batch, dim].
        x_1: [batch, dim].
        t: [batch] in [0, 1]; 'trigflow' turns it into the angle pi t / 2.
        z: standard normal noise [batch, dim] of 'stochastic_interpolant'.

    Returns:
        [batch, dim].
    """
    if path == "trigflow":
        angle = 0.5 * jnp.pi * t[:, None]
        return jnp.sin(angle) * x_0 + jnp.cos(angle) * x_1
    x_t = flows.interpolate(x_1, x_0, t)
    if path == "stochastic_interpolant":
        t = t[:, None]
        x_t = x_t + jnp.sqrt(jnp.maximum(2 * t * (1 - t), 1e-6)) * z
    return x_t


def brownian_penalty(path: str, x_t: Array, t: Array, v: Array, v_old: Array) -> Array:
    """How far the flow is from moving along minus its score, which raises entropy.

    For 'rectified_flow' the mean over dimensions of (t v + x_t + (1 - t) v_old)^2:
    zero for v = v_old = -x, the velocity that expands outwards, and without gradient at
    t = 0. 'stochastic_interpolant' has the weight 2 (t - 1/2)^2 + 1/2 for t; 'trigflow'
    sin and cos of the angle.

    Args:
        path: one of PATHS.
        x_t: [..., dim].
        t: [...] in [0, 1].
        v: [..., dim], with gradient.
        v_old: [..., dim], without.

    Returns:
        [...].

    References:
        arXiv 2602.01156, eqs. 14-16 (algorithm 1: the first term is the trained v).
    """
    t = t[..., None]
    if path == "trigflow":
        angle = 0.5 * jnp.pi * t
        residual = jnp.sin(angle) * (v + x_t) + jnp.cos(angle) * v_old
    else:
        weight = t if path == "rectified_flow" else 2 * (t - 0.5) ** 2 + 0.5
        residual = weight * v + x_t + (1 - t) * v_old
    return jnp.mean(residual**2, axis=-1)
