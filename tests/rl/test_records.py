import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from tmdjax import rl


def fork(seed):
    """Two trees, each a trunk with two branches: 4 nodes and 3 edges a tree."""
    rng = np.random.default_rng(seed)
    return rl.Transitions(
        states=jnp.asarray(rng.normal(size=(8, 5)), jnp.float32),
        source=jnp.asarray([0, 1, 1, 4, 5, 5], jnp.int32),
        target=jnp.asarray([1, 2, 3, 5, 6, 7], jnp.int32),
        step=jnp.asarray([0, 1, 1, 0, 1, 1], jnp.int32),
        sample=jnp.asarray([0, 0, 0, 1, 1, 1], jnp.int32),
        log_prob=jnp.asarray(rng.normal(size=6), jnp.float32),
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_joined_edges_still_join_the_same_states(compiled):
    parts = [fork(i) for i in range(3)]
    join = functools.partial(rl.concatenate, samples=2)
    joined = (jax.jit(join) if compiled else join)(parts)
    assert len(joined) == 18 and len(parts[0]) == 6
    assert joined.states.shape == (24, 5)  # every state once
    for i, part in enumerate(parts):
        for j in range(6):
            edge = 6 * i + j
            for a, b in ((joined.source, part.source), (joined.target, part.target)):
                assert_array_equal(joined.states[a[edge]], part.states[b[j]])
            assert joined.sample[edge] == 2 * i + part.sample[j]
            assert joined.step[edge] == part.step[j]
            assert joined.log_prob[edge] == part.log_prob[j]
    for name in ("source", "target", "step", "sample"):
        assert getattr(joined, name).dtype == jnp.int32, name


def test_one_part_is_itself_and_bad_inputs(refused):
    part = fork(0)
    assert rl.concatenate([part], 2) is part
    refused("nothing to concatenate", rl.concatenate, [], 2)
    refused("samples=0 must be at least 1", rl.concatenate, [part, part], 0)
    other = part.replace(states=part.states[:7])
    message = r"states has shape \(7, 5\).*\(8, 5\)"
    refused(message, rl.concatenate, [part, other], 2)
    other = part.replace(source=part.source[:4])
    message = r"source has shape \(4,\).*\(6,\)"
    refused(message, rl.concatenate, [part, other], 2)


def test_chains_are_joined_state_by_state():
    rng = np.random.default_rng(0)
    draw = lambda *size: rng.normal(size=size).astype(np.float32)  # noqa: E731
    states, log_prob = draw(4, 2, 5), draw(3, 2)
    record = rl.chain_transitions(states, log_prob, np.arange(5, 8))
    assert record.states.shape == (8, 5)  # every state once
    for edge in range(len(record)):
        chain, place = int(record.sample[edge]), int(record.step[edge]) - 5
        assert_array_equal(record.states[record.source[edge]], states[place, chain])
        assert_array_equal(record.states[record.target[edge]], states[place + 1, chain])
        assert record.log_prob[edge] == log_prob[place, chain]
    assert_array_equal(np.bincount(record.sample), [3, 3])
