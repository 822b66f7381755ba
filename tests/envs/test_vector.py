"""Many environments at once: automatic reset, true last observations, broken steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax import envs


@dataclasses.dataclass(frozen=True)
class Counter:
    """Counts from 100 times a start drawn in 1..9; every fourth step is the last."""

    ends: str = "truncated"
    breaks_at: int = -1
    action_size: int = dataclasses.field(default=1, init=False)
    action_bound: None = dataclasses.field(default=None, init=False)

    def reset(self, key, first=False):
        start = 100.0 * jax.random.randint(key, (), 1, 10)
        return (start, jnp.int32(0)), start[None]

    def step(self, state, action, key):
        value, count = state
        value, count = value + 1, count + 1
        broken = jnp.where(count == self.breaks_at, jnp.nan, 0.0)
        last = count >= 4
        return envs.Transition(
            (value + broken, count),
            value[None] + broken,
            value + broken,
            last & (self.ends == "terminated"),
            last & (self.ends == "truncated"),
        )


def walk(environment, steps, count=3, **options):
    vector = envs.Vector(environment, count, **options)
    state, take = jax.jit(vector.reset)(jax.random.key(0)), jax.jit(vector.step)
    keys = jax.random.split(jax.random.key(1), (steps, count))
    seen, taken = [np.asarray(state.observation)[:, 0]], []
    for i in range(steps):
        state, step = take(state, np.zeros((count, 1), np.float32), keys[i])
        seen.append(np.asarray(state.observation)[:, 0])
        taken.append(jax.tree.map(np.asarray, step))
    return np.array(seen), taken


@pytest.mark.parametrize("ends", ["terminated", "truncated"])
def test_the_last_observation_is_kept_and_a_new_episode_begins(ends):
    seen, taken = walk(Counter(ends), 8)
    for i, step in enumerate(taken):
        last = i % 4 == 3
        assert (step.terminated == (last and ends == "terminated")).all()
        assert (step.truncated == (last and ends == "truncated")).all()
        np.testing.assert_array_equal(step.final_observation[:, 0], seen[i] + 1)
        begins = seen[i + 1] % 100 == 0
        assert (begins if last else seen[i + 1] == seen[i] + 1).all()
        assert step.valid.all() and step.reward.dtype == np.float32


def test_resets_are_fresh_or_the_first():
    fresh, _ = walk(Counter(), 40, count=20)
    assert len(set(fresh[::4].reshape(-1))) > 5
    assert (fresh[4] != fresh[0]).any()
    first, _ = walk(Counter(), 40, count=20, resets="first")
    for i in range(4, 41, 4):
        np.testing.assert_array_equal(first[i], first[0])


def test_a_step_that_is_not_finite_resets_and_is_marked():
    seen, taken = walk(Counter(breaks_at=3), 6)
    broken = taken[2]
    assert not broken.valid.any() and broken.truncated.all()
    assert not broken.terminated.any() and (broken.reward == 0).all()
    np.testing.assert_array_equal(broken.final_observation[:, 0], seen[2])
    assert np.isfinite(seen).all() and (seen[3] % 100 == 0).all()
    assert all(step.valid.all() for step in (*taken[:2], *taken[3:5]))


def test_instances_depend_on_their_key_alone():
    keys = jax.random.split(jax.random.key(5), 6)
    six, two = (envs.Vector(envs.MultiGoal(), n) for n in (6, 2))
    a, b = six.reset(jax.random.key(2)), two.reset(jax.random.key(2))
    np.testing.assert_array_equal(a.observation[:2], b.observation)
    action = jnp.ones((6, 2))
    a, _ = six.step(a, action, keys)
    b, _ = two.step(b, action[:2], keys[:2])
    np.testing.assert_array_equal(a.observation[:2], b.observation)


def test_bad_inputs(refused):
    def observes(seen):
        reset = lambda self, key, first=False: (jnp.zeros(()), seen)  # noqa: E731
        return type("Observes", (Counter,), {"reset": reset})()

    several = {"state": jnp.zeros(1), "privileged": jnp.zeros(2)}
    integers = jnp.zeros(3, jnp.int32)
    for message, environment, count, options, error in (
        ("dict with 'privileged', 'state'", observes(several), 2, {}, TypeError),
        ("int32; give a float32", observes(integers), 2, {}, TypeError),
        ("is no environment: it needs action_si", object(), 2, {}, TypeError),
        ("count=0", Counter(), 0, {}, ValueError),
        ("='frsh'.*'fresh'", Counter(), 2, {"resets": "frsh"}, ValueError),
    ):
        refused(message, envs.Vector, environment, count, error=error, **options)
    vector, keys = envs.Vector(Counter(), 2), jax.random.split(jax.random.key(0), 2)
    state, actions = vector.reset(jax.random.key(0)), jnp.zeros((3, 1))
    batch = "leading axis must be the batch, 2"
    refused(batch, vector.step, state, actions, keys)


def test_delayed_pays_at_the_last_step_alone():
    env, rewards = envs.PROBES["delayed"], []
    step = jax.jit(env.step)
    state, _ = env.reset(jax.random.key(0))
    for action in (0.5, 9.0, 9.0):
        transition = step(state, jnp.array([action]), None)
        state = transition.state
        rewards.append(float(transition.reward))
    np.testing.assert_allclose(rewards, [0, 0, -((0.5 - 0.7) ** 2)], rtol=1e-6)
    for name, probe in envs.PROBES.items():
        envs.check_environment(probe)
        assert np.isfinite(probe.optimum), name
