"""Chunks of actions: executed whole, summed, and stopped by an end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import envs


@dataclasses.dataclass(frozen=True)
class Sums:
    """Adds up its actions [2]; ends beyond 10, is cut at the sixth step."""

    action_size: int = dataclasses.field(default=2, init=False)
    action_bound: float = dataclasses.field(default=3.0, init=False)
    horizon: int = dataclasses.field(default=6, init=False)

    def reset(self, key, first=False):
        start = jnp.zeros(2)
        return (start, jnp.int32(0)), start

    def step(self, state, action, key):
        total, count = state[0] + action, state[1] + 1
        ended = total.sum() > 10
        # nothing is to be seen of what happens after an end
        reward = jnp.where(state[0].sum() > 10, jnp.nan, total[0])
        return envs.Transition((total, count), total, reward, ended, count >= 6)


CHUNK = envs.Chunked(Sums(), 4, discount=0.5)
STEP = jax.jit(CHUNK.step)


@pytest.mark.parametrize(
    "actions, executed, reward, terminated, truncated",
    [
        ([[1, 0], [1, 1], [1, 0], [1, 0]], 4, 1 + 2 / 2 + 3 / 4 + 4 / 8, False, False),
        # beyond 10 with the second: nothing of the third
        ([[4, 0], [0, 7], [9, 9], [9, 9]], 2, 4 + 4 / 2, True, False),
        ([[0, 11], [9, 9], [9, 9], [9, 9]], 1, 0, True, False),
    ],
)
def test_a_chunk_is_its_actions_up_to_an_end(
    actions, executed, reward, terminated, truncated
):
    state, _ = CHUNK.reset(jax.random.key(0))
    step = STEP(state, jnp.float32(actions).reshape(-1), jax.random.key(1))
    assert_array_equal(step.observation, np.sum(actions[:executed], 0))
    assert_array_equal(step.state[0], step.observation)
    assert step.state[1] == executed
    assert_allclose(step.reward, reward)
    assert (step.terminated, step.truncated) == (terminated, truncated)


def test_a_time_limit_inside_a_chunk_stops_it():
    state, _ = CHUNK.reset(jax.random.key(0))
    ones = jnp.tile(jnp.float32([1, 0]), 4)
    first = STEP(state, ones, jax.random.key(1))
    last = STEP(first.state, ones, jax.random.key(1))
    assert not first.truncated and last.truncated and not last.terminated
    assert last.state[1] == 6 and last.reward == 5 + 6 / 2
    assert CHUNK.horizon == 2


def test_a_chunk_is_as_many_steps_of_the_environment():
    maze = envs.PointMaze()
    chunk = envs.Chunked(maze, 3)
    assert (chunk.action_size, chunk.action_bound, chunk.horizon) == (6, 1.0, 200)
    state, seen = chunk.reset(jax.random.key(0))
    assert seen.shape == (6,)
    action = jax.random.uniform(jax.random.key(1), (6,), minval=-1)
    whole = jax.jit(chunk.step)(state, action, jax.random.key(2))
    one, rewards = jax.jit(maze.step), []
    for part in action.reshape(3, 2):
        step = one(state, part, jax.random.key(2))
        state, rewards = step.state, [*rewards, step.reward]
    jax.tree.map(assert_allclose, whole.state, state)
    assert_allclose(whole.reward, np.sum(rewards), rtol=1e-6)
    assert_allclose(whole.observation, step.observation)


def test_bad_inputs(refused):
    refused("length=0 must be at least 1", envs.Chunked, Sums(), 0)
    refused("length=2.0 is of type", envs.Chunked, Sums(), 2.0, error=TypeError)
    refused("discount=1.5 is outside", envs.Chunked, Sums(), 2, 1.5)
    refused("is no environment", envs.Chunked, object(), 2, error=TypeError)
    state, _ = CHUNK.reset(jax.random.key(0))
    words = r"\(2,\); a chunk of length=4 actions of 2 is \[8\]"
    refused(words, CHUNK.step, state, jnp.zeros(2), jax.random.key(0))
