"""A made-up method of flow RL: a sample is better than its group or worse, no more."""

import dataclasses

import jax.numpy as jnp

from tmdjax.systems import flow_grpo
from tmdjax.train import flow_rl


@dataclasses.dataclass(frozen=True, kw_only=True)
class Signs(flow_grpo.Chains):
    """Independent samples whose advantages are signs."""

    unit: float = 1.0

    def credit(self, rewards, group, transitions, plan, key):
        """Credit from the rewards [sample] and their groups."""
        found = super().credit(rewards, group, transitions, plan, key)
        return found._replace(advantage=self.unit * jnp.sign(found.advantage))


def preset(name, event_shape, *, objective=None, **changes):
    """The published settings, with changes of method, grid and objective."""
    published = {"steps": 4, "shift": 1.0, "updates": 1, "group_size": 4}
    published["objective"] = {"clip_range": 0.05}
    return flow_rl.make_setup(Signs, event_shape, published, changes, objective)
