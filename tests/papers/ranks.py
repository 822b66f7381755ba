"""A made-up objective of language models: advantages are ranks within a group."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from scipy import stats

from tmdjax import runtime


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranks(runtime.GroupRelativeObjective):
    """GRPO that sees the order of rewards and not their size."""

    temperature: float = 1.0

    def advantages(self, records):
        """[sequence], in [-1/2, 1/2] over the temperature; ties share their rank."""
        group = np.array([record.group for record in records])
        reward = np.array([record.reward for record in records])
        found = np.zeros(len(records), np.float32)
        for each in np.unique(group):
            inside = group == each
            ranks = stats.rankdata(reward[inside])
            found[inside] = ranks / inside.sum() - ranks.mean() / inside.sum()
        return jnp.asarray(found / self.temperature)

    def loss(self, log_prob, batch):
        """Of every token, [sequence, token]."""
        loss, metrics = super().loss(log_prob, batch)
        spread = jnp.broadcast_to(jnp.abs(batch.advantage)[:, None], loss.shape)
        return loss, metrics | {"rank_spread": spread}


def preset(name, **changes):
    """The published settings, with changes."""
    return Ranks(**{"aggregation": "token-mean", **changes})
