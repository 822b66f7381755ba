"""Adapters, on a stand-in: no physics is compiled here."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from tmdjax import envs
from tmdjax.core.optional import import_optional
from tmdjax.envs import simulators


@struct.dataclass
class State:
    """As brax's: the names that adapters read."""

    pipeline_state: jax.Array
    obs: object
    reward: jax.Array
    done: jax.Array


class Simulator:
    """Adds the action; falls over beyond 3."""

    action_size = 2

    def __init__(self, several=False):
        self.several = several

    def _state(self, place, reward):
        seen = {"state": place, "pixels": jnp.zeros(4)} if self.several else place
        fallen = jnp.where(jnp.abs(place).max() > 3, 1.0, 0.0)
        return State(place, seen, reward, fallen)

    def reset(self, rng):
        return self._state(jax.random.uniform(rng, (2,)), jnp.zeros(()))

    def step(self, state, action):
        place = state.pipeline_state + action
        return self._state(place, action.sum())


@pytest.fixture
def simulator(monkeypatch):
    found = Simulator()
    monkeypatch.setattr(simulators, "_brax", lambda name, backend: found)
    monkeypatch.setattr(simulators, "_playground", lambda name, implementation: found)
    return found


@pytest.mark.parametrize("kind", [envs.Brax, envs.Playground])
def test_actions_are_clipped_and_episodes_end(kind, simulator):
    environment = kind("any", horizon=5)
    assert environment.action_size == 2 and environment.action_bound == 1.0
    state, seen = environment.reset(jax.random.key(0))
    assert seen.shape == (2,) and state[1] == 0
    step = environment.step(state, jnp.array([9.0, -0.5]), None)
    np.testing.assert_allclose(step.observation, seen + jnp.array([1, -0.5]), rtol=1e-6)
    assert step.reward == 0.5 and not step.terminated and not step.truncated
    for _ in range(3):
        step = environment.step(step.state, jnp.array([1.0, 0.0]), None)
    assert step.terminated and not step.truncated
    assert environment.step(step.state, jnp.zeros(2), None).truncated
    keys = jax.random.split(jax.random.key(0), 64)
    (_, steps), _ = jax.vmap(lambda k: environment.reset(k, first=True))(keys)
    assert set(np.unique(steps)) == set(range(5))


def test_many_return_to_where_they_began(simulator):
    vector = envs.Vector(envs.Brax("any", horizon=3), 4, resets="first")
    state, take = jax.jit(vector.reset)(jax.random.key(0)), jax.jit(vector.step)
    start = np.asarray(state.observation)
    keys = jax.random.split(jax.random.key(1), 4)
    ends = []
    for _ in range(9):
        state, step = take(state, np.full((4, 2), 0.1, np.float32), keys)
        ended = np.asarray(step.truncated)
        seen = np.asarray(state.observation)
        np.testing.assert_array_equal(seen[ended], start[ended])
        ends.append(ended)
    # only the first episodes, which began somewhere inside, are shorter
    at = [np.flatnonzero(column) for column in np.array(ends).T]
    assert all(set(np.diff(places)) == {3} for places in at)
    assert len({int(places[0]) for places in at}) > 1


def test_one_of_several_observations(simulator, refused):
    simulator.several = True
    for options, width in (({}, 2), ({"observation": "pixels"}, 4)):
        _, seen = envs.Playground("any", **options).reset(jax.random.key(0))
        assert seen.shape == (width,)
    states = envs.Playground("any", observation="states")
    given = "observes 'state', 'pixels', not .*'states'"
    refused(given, states.reset, jax.random.key(0))
    refused("a dict with", envs.Vector, envs.Brax("any"), 2, error=TypeError)


def test_absent_simulators_name_their_extra(refused):
    asked = ("no_such_simulator", "this", "none")
    extra = r"this needs no_such_simulator: .*pip install 'tmdjax\[none\]'"
    refused(extra, import_optional, *asked, error=ImportError)
    refused("horizon=0", envs.Brax, "hopper", horizon=0)


@pytest.mark.slow
def test_brax_itself_is_an_environment():
    if importlib.util.find_spec("brax") is None:
        pytest.skip("pip install 'tmdjax[brax]'")
    environment = envs.Brax("inverted_pendulum")
    envs.check_environment(environment)
    state, _ = jax.eval_shape(environment.reset, jax.random.key(0))
    action = jnp.zeros(environment.action_size)
    step = jax.eval_shape(environment.step, state, action, None)
    assert step.observation.shape == (4,) and step.reward.shape == ()
