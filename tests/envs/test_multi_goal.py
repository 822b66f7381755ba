import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax import envs

MULTI = envs.MultiGoal()
STEP = jax.jit(MULTI.step)


def by_hand(p, v, a):
    """One step in float64, goals on a circle of radius 5 every 60 degrees."""
    p, v, a = (np.asarray(x, np.float64) for x in (p, v, a))
    new = p + 0.1 * v
    angles = np.deg2rad([0, 60, 120, 180, 240, 300])
    goals = 5 * np.stack([np.cos(angles), np.sin(angles)], 1)
    d = ((new - goals) ** 2).sum(1).min()
    reward = 0.1 * (np.exp(-0.3 * d) + np.exp(-0.1 * d)) - 0.001 * (a**2).sum()
    return new, v + 0.1 * np.clip(a, -5, 5), reward


@pytest.mark.parametrize("action", [(0.3, -2.0), (9.0, -30.0)])
def test_14_a_step_is_the_released_one(action):
    state, _ = MULTI.at((1.0, 2.0), (3.0, -1.0))
    step = STEP(state, jnp.array(action), None)
    p, v, r = by_hand((1, 2), (3, -1), action)
    np.testing.assert_allclose(step.observation, [*p, *v], rtol=1e-6)
    np.testing.assert_allclose(step.reward, r, rtol=1e-5)
    assert not step.terminated and not step.truncated


def test_14_at_a_goal_at_rest():
    for goal in MULTI.goal_positions:
        step = STEP(MULTI.at(goal)[0], jnp.zeros(2), None)
        np.testing.assert_allclose(step.reward, 0.2, rtol=1e-6)


def test_14_fifty_one_steps_and_the_square():
    state, _ = MULTI.at((0.0, 0.0))
    for i in range(51):
        step = STEP(state, jnp.zeros(2), None)
        assert bool(step.truncated) == (i == 50) and not step.terminated
        state = step.state
    # the position moves by the old velocity: out by that, back by this
    for speed, force, ends in ((1.0, -5.0, True), (0.0, 5.0, False)):
        state, _ = MULTI.at((7.95, 0.0), (speed, 0.0))
        assert STEP(state, jnp.array([force, 0.0]), None).terminated == ends


def test_starts():
    keys = jax.random.split(jax.random.key(0), 4096)
    state, seen = jax.vmap(MULTI.reset)(keys)
    assert (np.asarray(state.steps) == 0).all() and (seen[:, 2:] == 0).all()
    place = np.asarray(state.position)
    assert np.abs(place).max() < 7 and abs(place.mean()) < 0.2
    np.testing.assert_allclose(place.std(), 14 / np.sqrt(12), rtol=0.03)
    first, _ = jax.vmap(lambda k: MULTI.reset(k, first=True))(keys)
    counts = np.bincount(first.steps, minlength=50)
    assert len(counts) == 50 and counts.min() > 40


def test_goals_are_counted_and_their_entropy():
    last = np.array([[5, 0], [4, 1], [-5, 0.5], [0, 0], [5, 0]])
    inside = np.array([True, True, True, True, False])
    counts = envs.goal_counts(MULTI, last, inside)
    assert counts.tolist() == [2, 0, 0, 1, 0, 0]
    third = np.array([2 / 3, 1 / 3])
    expected = -(third * np.log(third)).sum() / np.log(6)
    assert envs.goal_entropy(counts) == pytest.approx(expected)
    assert envs.goal_entropy(np.full(6, 7)) == pytest.approx(1)
    assert envs.goal_entropy([5, 0, 0, 0, 0, 0]) == 0 == envs.goal_entropy(np.zeros(6))


def test_bad_inputs(refused):
    refused("goals=0", envs.MultiGoal, goals=0)
    refused("horizon=0", envs.MultiGoal, horizon=0)
    refused(r"radius=-1.0 is outside", envs.MultiGoal, radius=-1.0)
    refused("action_cost=-1.0", envs.MultiGoal, action_cost=-1.0)
