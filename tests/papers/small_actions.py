"""A made-up method of control: a Gaussian policy that is drawn to small actions."""

import dataclasses

import jax.numpy as jnp

from tmdjax.systems import ppo
from tmdjax.train import on_policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmallActions(ppo.GaussianPolicy):
    """PPO whose loss adds the mean square of the policy's mean action."""

    pull: float = 0.1

    def loss(self, params, behaviour, samples, keys, coefficients):
        """Loss and metrics, [batch]."""
        given = params, behaviour, samples, keys, coefficients
        loss, metrics = super().loss(*given)
        mean, _ = self.mean_and_log_std(params, samples.observation)
        size = jnp.mean(jnp.square(mean), axis=-1)
        return loss + self.pull * size, metrics | {"action_size": size}


def preset(name, *, settings=None, **changes):
    """The published settings, with changes of the method and of its training."""
    return on_policy.make_setup(SmallActions, {"epochs": 2}, changes, settings)
