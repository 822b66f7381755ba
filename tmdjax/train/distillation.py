"""Distillation by distribution matching: a generator, its critic, a frozen teacher.

What differs between methods is how the generator makes a sample from a batch; that is
an argument. The losses are here, the updates in
:mod:`tmdjax.train.distillation_cycle`.

References:
    DMD2, arXiv 2405.14867; the variant for videos, arXiv 2601.09881, sec. 2.2 and
    appendix A.3.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tmdjax import flows
from tmdjax.core import prng, trees
from tmdjax.core.checks import (
    check_choice,
    check_count,
    check_output,
    check_range,
    check_same_shape,
)
from tmdjax.core.types import Array, Cond, Params, PyTree

FEATURES = ("teacher", "critic")

Generate = Callable[[Params, Any, Any], Array]
"""``generate(params, batch, keys) -> x [batch, *event]``, differentiable."""

Scorer = Callable[..., tuple[Array, tuple[Array, ...]]]
"""``(params, x, t, cond) -> (velocity, features)``; features of the network, or ()."""

_GENERATOR, _CRITIC = 0, 1
_KEYS = (2, 4)
"""Keys a row for the generator's loss and the critic's: the second draws the noise."""

_UPDATES = 2**31 - 1
"""Folds into a cycle's key for the critic's updates; no row has this number."""


class Networks(NamedTuple):
    """What judges the generator.

    Attributes:
        teacher: scorer of the frozen teacher under the condition, without guidance.
        critic: scorer of the fake score.
        discriminator: ``(params, features) -> logits [batch, head]``, or None.
        negative: ``(params, x, t, cond) -> velocity`` of the teacher under the
            negative condition, such as with a layer skipped; None is the teacher's.
    """

    teacher: Scorer
    critic: Scorer
    discriminator: Callable[[Params, Any], Array] | None = None
    negative: Callable[..., Array] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Settings of a cycle.

    Attributes:
        guidance: scale of the teacher's classifier-free guidance; 1 is none.
        critic_updates: of the critic for one of the generator.
        shift: of the noise levels tau at which scores are compared, >= 1.
        time_range: tau's range, before and after the shift.
        normalisation: see :func:`tmdjax.flows.distribution_matching_loss`.
        adversarial_weight: of the generator's adversarial loss; 0 is none.
        features: whose features the discriminator reads, 'teacher' or 'critic'.
        same_noise: noise real and generated samples by the same tau and noise.
        r1_weight: of the approximate R1 penalty; 0 is none.
        r1_std: noise on real samples for that penalty.
    """

    guidance: float = 5.0
    critic_updates: int = 4
    shift: float = 5.0
    time_range: tuple[float, float] = (0.001, 0.999)
    normalisation: str = "distance"
    adversarial_weight: float = 0.03
    features: str = "teacher"
    same_noise: bool = True
    r1_weight: float = 0.0
    r1_std: float = 0.1

    def __post_init__(self) -> None:
        check_range("guidance", self.guidance, 0)
        check_count("critic_updates", self.critic_updates)
        self.noise_levels()
        check_choice("normalisation", self.normalisation, flows.NORMALISATIONS)
        check_range("adversarial_weight", self.adversarial_weight, 0)
        check_choice("features", self.features, FEATURES)
        check_range("r1_weight", self.r1_weight, 0)
        check_range("r1_std", self.r1_std, 0, open_low=True)

    def noise_levels(self) -> flows.TimeSampler:
        """Draws tau."""
        return flows.ranged_time(self.shift, *self.time_range)

    @property
    def batches(self) -> int:
        """Batches a cycle: one for the generator, one for each critic update."""
        return 1 + self.critic_updates


class Distillation:
    """The losses of one method, per example, as pure functions.

    Args:
        generate: makes samples from a batch; keys [batch].
        networks: what judges them.
        config: settings.
        null_cond: condition of the guidance's negative pass, a pytree like a row of
            the batch's condition.

    Raises:
        ValueError: guidance without a negative condition; an adversarial weight without
            a discriminator.
    """

    def __init__(
        self,
        generate: Generate,
        networks: Networks,
        config: DistillationConfig,
        null_cond: Cond = None,
    ):
        if config.guidance != 1 and null_cond is None:
            raise ValueError(
                f"guidance={config.guidance} needs null_cond, the negative condition; "
                f"give it, or set guidance=1."
            )
        if config.adversarial_weight and networks.discriminator is None:
            raise ValueError(
                f"adversarial_weight={config.adversarial_weight} needs a "
                f"discriminator; give one, or set adversarial_weight=0."
            )
        self.generate, self.networks = generate, networks
        self.config, self.null_cond = config, null_cond

    @property
    def adversarial(self) -> bool:
        """Whether there is a discriminator to train."""
        return self.config.adversarial_weight > 0

    def noised(
        self, x: Array, keys: Any, tau: Any = None, noise: Any = None
    ) -> tuple[Array, Array]:
        """X at a random noise level, and the level [batch].

        Args:
            x: [batch, *event].
            keys: [batch].
            tau: levels [batch] in [0, 1] that other code drew, instead of keys.
            noise: [batch, *event] that other code drew, instead of keys.
        """
        keys = prng.split(keys, 2)
        if tau is None:
            tau = self.config.noise_levels()(keys[:, 0])
        if noise is None:
            noise = prng.normal(keys[:, 1], x.shape[1:])
        check_same_shape("noise", noise, "x", x)
        return flows.interpolate(x, noise, tau), tau

    def generator_loss(
        self,
        params: Params,
        batch: Any,
        keys: Any,
        critic: Params,
        frozen: PyTree,
        **given: Any,
    ) -> tuple[Array, dict[str, Array]]:
        """Distribution matching and adversarial loss of the generator.

        Args:
            params: of the generator.
            batch: {'x_data': ..., 'cond': ...}, rows [batch, ...].
            keys: [batch].
            critic: parameters of the critic.
            frozen: parameters of the teacher.
            **given: 'tau' and 'noise' of :meth:`noised`, to replay what other code
                drew.
        """
        config, networks = self.config, self.networks
        keys = prng.split(prng.fold_in(keys, _GENERATOR), _KEYS[_GENERATOR])
        x = self.generate(params, batch, keys[:, 0])
        x_tau, tau = self.noised(x, keys[:, 1], **given)
        cond = batch.get("cond")
        velocity, features = networks.teacher(frozen, x_tau, tau, cond)
        check_output(velocity, x_tau, "the teacher's velocity")
        at = jax.lax.stop_gradient(x_tau)
        guided = jax.lax.stop_gradient(velocity)
        if config.guidance != 1:
            null = trees.in_every_row(self.null_cond, cond)
            negative = self._negative(frozen, at, tau, null)
            check_output(negative, at, "the teacher's velocity, negative condition,")
            guided = negative + config.guidance * (guided - negative)
        fake, critic_features = networks.critic(critic["score"], x_tau, tau, cond)
        predict = functools.partial(flows.convert, source="velocity", target="data")
        loss, metrics = flows.distribution_matching_loss(
            x,
            jax.lax.stop_gradient(predict(guided, x=at, t=tau)),
            jax.lax.stop_gradient(predict(fake, x=at, t=tau)),
            normalisation=config.normalisation,
        )
        metrics |= {"matching_loss": loss, "weight_max": metrics["weight"]}
        if self.adversarial:
            shown = features if config.features == "teacher" else critic_features
            assert networks.discriminator is not None
            logits = networks.discriminator(critic["discriminator"], shown)
            adversarial = flows.generator_loss(logits)
            loss = loss + config.adversarial_weight * adversarial
            metrics |= {"adversarial_loss": adversarial}
        return loss, metrics

    def _negative(self, frozen: PyTree, x: Array, tau: Array, null: Any) -> Array:
        if self.networks.negative is not None:
            return self.networks.negative(frozen, x, tau, null)
        return self.networks.teacher(frozen, x, tau, null)[0]

    def critic_loss(
        self,
        params: Params,
        batch: Any,
        keys: Any,
        generator: Params,
        frozen: PyTree,
        **given: Any,
    ) -> tuple[Array, dict[str, Array]]:
        """Denoising loss of the fake score, and the discriminator's.

        Args:
            params: {'score': ..., 'discriminator': ...}.
            batch: as for the generator.
            keys: [batch].
            generator: parameters of the generator.
            frozen: parameters of the teacher.
            **given: 'tau' and 'noise' of :meth:`noised`, to replay what other code
                drew; those of real samples too where they share them (same_noise).
        """
        config, networks = self.config, self.networks
        keys = prng.split(prng.fold_in(keys, _CRITIC), _KEYS[_CRITIC])
        x = jax.lax.stop_gradient(self.generate(generator, batch, keys[:, 0]))
        x_tau, tau = self.noised(x, keys[:, 1], **given)
        cond = batch.get("cond")
        fake, fake_features = networks.critic(params["score"], x_tau, tau, cond)
        prediction = flows.convert(fake, "velocity", "data", x_tau, tau)
        loss = flows.denoising_loss(prediction, x)
        metrics = {"score_loss": loss}
        if not self.adversarial:
            return loss, metrics
        if config.same_noise:
            real_tau, level = self.noised(batch["x_data"], keys[:, 1], **given)
        else:
            real_tau, level = self.noised(batch["x_data"], keys[:, 2])

        def logits(x: Array, t: Array, known: Any = None) -> Array:
            if config.features == "teacher":
                _, known = networks.teacher(frozen, x, t, cond)
            elif known is None:
                _, known = networks.critic(params["score"], x, t, cond)
            assert networks.discriminator is not None
            known = jax.lax.stop_gradient(known)
            return networks.discriminator(params["discriminator"], known)

        on_fake, on_real = logits(x_tau, tau, fake_features), logits(real_tau, level)
        adversarial = flows.discriminator_loss(on_fake, on_real)
        metrics |= {
            "discriminator_loss": adversarial,
            "logit_fake": jnp.mean(on_fake, -1),
            "logit_real": jnp.mean(on_real, -1),
        }
        if config.r1_weight:
            noise = prng.normal(keys[:, 3], real_tau.shape[1:])
            near = logits(real_tau + config.r1_std * noise, level)
            penalty = flows.approximate_r1(on_real, near)
            adversarial = adversarial + config.r1_weight * penalty
            metrics |= {"r1": penalty}
        return loss + adversarial, metrics

    def critic_key(self, key: Any) -> Any:
        """The key, of the cycle's, that the critic's updates fold their number into."""
        return jax.random.fold_in(key, _UPDATES)

    def report(self, state: Any, parts: Any, key: Any, frozen: PyTree = None) -> str:
        """Which network's last update was not finite, and its samples' noise levels.

        Args:
            state: of the cycle.
            parts: the batches of a cycle.
            key: of the cycle, with its number folded in.
            frozen: parameters of the teacher, to tell the rows whose loss is not finite
                from the others; None lists all rows.
        """
        generator, critic = state.generator, state.critic
        found = []
        if int(generator.skipped_in_a_row):
            loss = self.generator_loss
            args = (generator.params, parts[0], key, critic.params, frozen)
            found.append(f"generator, {self._levels(_GENERATOR, loss, *args)}")
        if int(critic.skipped_in_a_row):
            key = jax.random.fold_in(self.critic_key(key), critic.step - 1)
            loss = self.critic_loss
            args = (critic.params, parts[-1], key, generator.params, frozen)
            found.append(f"critic, {self._levels(_CRITIC, loss, *args)}")
        return f"not finite: {'; '.join(found)}"

    def _levels(
        self, role: int, loss: Any, params: Any, batch: Any, key: Any, *others: Any
    ) -> str:
        size = jax.tree.leaves(batch)[0].shape[0]
        keys = prng.sample_keys(key, size)
        of_samples = prng.split(prng.fold_in(keys, role), _KEYS[role])[:, 1]
        levels = np.asarray(self.noised(jnp.zeros((size, 1)), of_samples)[1])
        bad = np.zeros(size, bool)
        if others[-1] is not None:
            bad = ~np.isfinite(jax.jit(loss)(params, batch, keys, *others)[0])
        rows = f"rows {np.flatnonzero(bad).tolist()}" if bad.any() else "all rows"
        listed = levels[bad] if bad.any() else levels
        return f"{rows} at noise levels {[round(float(x), 4) for x in listed]}"
