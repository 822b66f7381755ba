"""What a rollout leaves for the update: states once, transitions as indices."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tmdjax.core.checks import check_count, check_same_shape


@struct.dataclass
class Transitions:
    """Transitions of many samples: chains, or trees whose branches share a trunk.

    A state is stored once, however many transitions begin or end in it; a transition
    is an edge between two of them.

    Attributes:
        states: [node, *event] float32.
        source: int32 [edge], node where a transition begins.
        target: int32 [edge], node where it ends.
        step: int32 [edge], its row of the coefficient table.
        sample: int32 [edge], the sample under whose condition it was drawn.
        log_prob: float32 [edge], of the policy that drew it.
    """

    states: Any
    source: Any
    target: Any
    step: Any
    sample: Any
    log_prob: Any

    def __len__(self) -> int:
        return self.source.shape[0]


def chain_transitions(states: Any, log_prob: Any, step: Any) -> Transitions:
    """The record of independent chains over consecutive steps.

    Args:
        states: [step + 1, sample, *event], the states around the steps.
        log_prob: [step, sample].
        step: int32 [step], rows of the coefficient table.
    """
    count, samples = log_prob.shape
    node = jnp.arange(samples)[:, None] * (count + 1) + jnp.arange(count)
    return Transitions(
        states=jnp.moveaxis(states, 0, 1).reshape(-1, *states.shape[2:]),
        source=node.reshape(-1),
        target=node.reshape(-1) + 1,
        step=jnp.tile(step, samples),
        sample=jnp.repeat(jnp.arange(samples), count),
        log_prob=log_prob.T.reshape(-1),
    )


def concatenate(parts: Sequence[Transitions], samples: int) -> Transitions:
    """One record of several that were drawn one after the other.

    Args:
        parts: records with the same number of nodes and edges.
        samples: number of samples in each part; the ``sample`` of part i is raised
            by i * ``samples``.

    Raises:
        ValueError: no parts, or parts of different shape.
    """
    check_count("samples", samples)
    if not parts:
        raise ValueError("nothing to concatenate: give at least one record.")
    first = parts[0]
    if len(parts) == 1:
        return first
    for part in parts[1:]:
        check_same_shape("states", part.states, "those of the first part", first.states)
        check_same_shape("source", part.source, "that of the first part", first.source)
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    part_of = jnp.asarray(np.repeat(np.arange(len(parts)), len(first)), jnp.int32)
    node = part_of * first.states.shape[0]
    return joined.replace(
        source=joined.source + node,
        target=joined.target + node,
        sample=joined.sample + part_of * samples,
    )
