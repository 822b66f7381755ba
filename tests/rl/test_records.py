import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax import rl


def fork(seed):
    """Two prompts, each a trunk with two branches: 4 nodes and 3 edges a prompt."""
    rng = np.random.default_rng(seed)
    source = np.array([0, 1, 1, 4, 5, 5], np.int32)
    target = np.array([1, 2, 3, 5, 6, 7], np.int32)
    return rl.Transitions(
        states=jnp.asarray(rng.normal(size=(8, 5)), jnp.float32),
        source=jnp.asarray(source),
        target=jnp.asarray(target),
        step=jnp.asarray([0, 1, 1, 0, 1, 1], jnp.int32),
        prompt=jnp.asarray([0, 0, 0, 1, 1, 1], jnp.int32),
        log_prob=jnp.asarray(rng.normal(size=6), jnp.float32),
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_joined_edges_still_join_the_same_states(compiled):
    parts = [fork(i) for i in range(3)]

    def join(parts):
        return rl.concatenate(parts, 2)

    joined = (jax.jit(join) if compiled else join)(parts)
    assert len(joined) == 18 and len(parts[0]) == 6
    for i, part in enumerate(parts):
        for j in range(6):
            edge = 6 * i + j
            for end in ("source", "target"):
                np.testing.assert_array_equal(
                    joined.states[getattr(joined, end)[edge]],
                    part.states[getattr(part, end)[j]],
                )
            assert joined.prompt[edge] == 2 * i + part.prompt[j]
            assert joined.step[edge] == part.step[j]
            assert joined.log_prob[edge] == part.log_prob[j]
    for name in ("source", "target", "step", "prompt"):
        assert getattr(joined, name).dtype == jnp.int32, name


def test_every_state_is_stored_once():
    parts = [fork(i) for i in range(3)]
    joined = rl.concatenate(parts, 2)
    assert joined.states.shape == (24, 5)
    assert joined.states.nbytes == sum(part.states.nbytes for part in parts)
    np.testing.assert_array_equal(np.sort(np.unique(joined.source)), [0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21])  # fmt: skip


def test_one_part_is_itself():
    part = fork(0)
    assert rl.concatenate([part], 2) is part


def test_bad_inputs():
    part = fork(0)
    with pytest.raises(ValueError, match="nothing to concatenate"):
        rl.concatenate([], 2)
    other = part.replace(states=part.states[:7])
    with pytest.raises(ValueError, match=r"states has shape \(7, 5\).*\(8, 5\)"):
        rl.concatenate([part, other], 2)
    other = part.replace(source=part.source[:4])
    with pytest.raises(ValueError, match=r"source has shape \(4,\).*\(6,\)"):
        rl.concatenate([part, other], 2)
    with pytest.raises(ValueError, match="prompts=0 must be at least 1"):
        rl.concatenate([part, part], 0)
