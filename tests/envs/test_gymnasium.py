"""Vectors of gymnasium: what the trainer sees equals what they did."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax import envs
from tmdjax.core import prng
from tmdjax.systems import ppo
from tmdjax.train import on_policy

gymnasium = pytest.importorskip("gymnasium")
SAME_STEP = gymnasium.vector.AutoresetMode.SAME_STEP
NEXT_STEP = gymnasium.vector.AutoresetMode.NEXT_STEP


spaces = gymnasium.spaces


class Countdown(gymnasium.Env):
    """Counts steps; ends after 3 (odd instances) or is cut after 2; NaN on demand."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Box(0.0, 10.0, (1,), np.float32)

    def __init__(self, odd: bool = False):
        self.odd, self.t = odd, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.start = 0, self.np_random.uniform()
        return np.array([self.start, 0.0]), {}

    def step(self, action):
        self.t += 1
        value = np.nan if action[0] > 9.9 else float(action[0])
        seen = np.array([self.start, self.t])
        return seen, value, self.odd and self.t == 3, not self.odd and self.t == 2, {}


class Seven(Countdown):
    """An action of 7 is best."""

    def step(self, action):
        seen, reward, *ends = super().step(np.minimum(action, 9.5))  # no NaN
        return seen, 5 - abs(reward - 7), *ends


def make(*odd: bool, mode=SAME_STEP, env=Countdown):
    made = [functools.partial(env, o) for o in odd]
    return gymnasium.vector.SyncVectorEnv(made, autoreset_mode=mode)


@pytest.fixture
def vector():
    return envs.GymnasiumVector(functools.partial(make, False, True))


def steps(vector, state, actions):
    """Scans the vector over actions [time, env, size]."""

    def body(state, action):
        keys = prng.sample_keys(jax.random.key(1), vector.count)
        return vector.step(state, action, keys)

    return jax.jit(lambda s, a: jax.lax.scan(body, s, a))(state, actions)


def test_last_observations_are_those_of_the_step_and_actions_are_rescaled(vector):
    state = jax.jit(vector.reset)(jax.random.key(0))
    assert state.observation.dtype == jnp.float32
    action = jnp.asarray([-1.0, 0.0, 0.5, 7.0])[:, None, None] * jnp.ones((4, 2, 1))
    action = action.at[3].set(-0.5)
    after, step = steps(vector, state, action)
    counts = step.final_observation[..., 1]
    np.testing.assert_array_equal(counts, [[1, 1], [2, 2], [1, 3], [2, 1]])
    np.testing.assert_array_equal(step.truncated[:, 0], [False, True, False, True])
    np.testing.assert_array_equal(step.terminated[:, 1], [False, False, True, False])
    np.testing.assert_allclose(step.reward[:, 0], [0, 5, 7.5, 2.5])
    np.testing.assert_array_equal(after.observation[:, 1], [0, 1])
    assert step.valid.all()
    # episodes do not share their start
    assert step.final_observation[0, 0, 0] != step.final_observation[2, 0, 0]


@pytest.mark.parametrize("bad", [1.0, np.nan])
def test_broken_instances_are_reset_and_marked(vector, bad):
    """An action of 1 is 10 there, and gives a reward of NaN."""
    state = jax.jit(vector.reset)(jax.random.key(0))
    _, step = steps(vector, state, jnp.zeros((2, 2, 1)).at[0, 1].set(bad))
    np.testing.assert_array_equal(step.valid, [[True, False], [True, True]])
    np.testing.assert_array_equal(step.reward[0], [5, 0])
    np.testing.assert_array_equal(step.truncated[0], [False, True])
    np.testing.assert_array_equal(step.final_observation[0, 1], state.observation[1])
    np.testing.assert_array_equal(step.final_observation[1, :, 1], [2, 1])


def test_a_continued_run_begins_its_episodes_anew(vector):
    """What was saved is not where the instances stand."""
    state = jax.jit(vector.reset)(jax.random.key(0))
    saved, _ = steps(vector, state, jnp.zeros((3, 2, 1)))
    fresh = envs.GymnasiumVector(functools.partial(make, False, True))
    _, step = steps(fresh, saved, jnp.zeros((2, 2, 1)))
    np.testing.assert_array_equal(step.valid, [[False, False], [True, True]])
    np.testing.assert_array_equal(step.final_observation[1, :, 1], [1, 1])


def test_the_trainer_learns_in_it(refused):
    build = functools.partial(make, *[False, True] * 8, env=Seven)
    settings = on_policy.ControlSettings(
        unroll=8, learning_rate=3e-3, critic_hidden=(16,)
    )
    policy = ppo.GaussianPolicy(hidden=(16,), initial_std=0.3)
    trainer = on_policy.make_trainer(envs.GymnasiumVector(build), policy, settings)
    key = jax.random.key(0)
    run = on_policy.jit_iterations(trainer, 15)
    _, metrics = run(trainer.init(key), key)
    on_policy.check(metrics, settings)
    reward = np.asarray(metrics["reward_mean"])
    assert reward[-3:].mean() > reward[0] + 1
    refused("run on the host", on_policy.jit_iterations, trainer, seeds=True)


def test_pendulum_is_what_gymnasium_says():
    """An environment of its own, against stepping it by hand."""

    def build():
        options = {"autoreset_mode": SAME_STEP}
        return gymnasium.make_vec("Pendulum-v1", 2, "sync", vector_kwargs=options)

    vector = envs.GymnasiumVector(build)
    assert (vector.action_size, vector.action_bound) == (1, 1.0)
    state = jax.jit(vector.reset)(jax.random.key(3))
    actions = np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2, 1)
    _, step = steps(vector, state, jnp.asarray(actions))
    seed = jax.random.randint(jax.random.key(3), (), 0, np.iinfo(np.int32).max)
    byhand = build()
    seen, _ = byhand.reset(seed=int(seed))
    np.testing.assert_array_equal(state.observation, seen)
    for i, action in enumerate(actions):
        seen, reward, *_ = byhand.step(2 * action)
        np.testing.assert_allclose(step.final_observation[i], seen, rtol=1e-6)
        np.testing.assert_allclose(step.reward[i], reward, rtol=1e-6)


class Recorded(Countdown):
    """Keeps what it was given."""

    given: ClassVar[list] = []

    def step(self, action):
        self.given.append(action)
        assert self.action_space.contains(action), action
        return super().step(np.zeros(1))


@pytest.mark.parametrize(
    "low, high, dtype",
    [
        (0.1, 0.7, np.float32),  # 0.1 + (0.7 - 0.1) is more than 0.7 there
        (-1.0 / 3, 3.3, np.float32),
        (-3e38, 3e38, np.float32),
        (-1.5e308, 1.7e308, np.float64),
        (-6e4, 6e4, np.float16),
        (-np.inf, np.inf, np.float16),
        (-np.inf, np.inf, np.float64),
    ],
)
def test_actions_never_leave_the_space(low, high, dtype):
    space = spaces.Box(np.full(1, low, dtype), np.full(1, high, dtype), dtype=dtype)
    env = type("Wide", (Recorded,), {"action_space": space, "given": []})
    vector = envs.GymnasiumVector(functools.partial(make, False, env=env))
    state = vector.reset(jax.random.key(0))
    actions = [-1.0, -0.3, 1.0, 1.5] if np.isfinite(low) else [-1e6, 0.5, 3e38]
    for action in actions:
        keys = prng.sample_keys(jax.random.key(1), 1)
        state, step = vector.step(state, jnp.full((1, 1), action), keys)
        assert step.valid.all()
    given = np.concatenate(env.given)
    assert given.dtype == dtype and (given[1:3] > given[:2]).all()
    if np.isfinite(low):
        assert given[0] == space.low[0] and given[2] == given[3] == space.high[0]


def test_what_an_error_names_helps():
    """Each remedy in a text, done."""
    parts = {"near": spaces.Box(-1, 1, (2,)), "far": spaces.Box(-1, 1, (3,))}

    class Both(Countdown):
        observation_space = spaces.Dict(parts)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return self._seen(), {}

        def step(self, action):
            _, *rest = super().step(action)
            return self._seen(), *rest

        def _seen(self):
            return {k: np.ones(s.shape, np.float32) for k, s in parts.items()}

    half = spaces.Box(np.float32([0, -np.inf]), np.float32([1, 1]))
    Half = type("Half", (Countdown,), {"action_space": half})
    options = {
        "vectorization_mode": "sync",
        "vector_kwargs": {"autoreset_mode": SAME_STEP},
    }
    for env, wrapper, size in (
        (Both, gymnasium.wrappers.FlattenObservation, 5),
        (Half, gymnasium.wrappers.ClipAction, 2),
    ):
        gymnasium.register("Mended-v0", entry_point=env)
        try:
            make_vec = functools.partial(
                gymnasium.make_vec, wrappers=[wrapper], **options
            )
            vector = envs.GymnasiumVector(functools.partial(make_vec, "Mended-v0", 2))
            state = vector.reset(jax.random.key(0))
            assert state.observation.shape == (2, size)
            action = jnp.zeros((2, vector.action_size))
            keys = prng.sample_keys(jax.random.key(1), 2)
            for _ in range(2):  # one of them ends an episode
                state, step = vector.step(state, action, keys)
            assert step.valid.all() and step.truncated.all()
        finally:
            del gymnasium.registry["Mended-v0"]


def test_bad_vectors(refused):
    image = spaces.Dict({"image": spaces.Box(0, 255, (2,), np.uint8)})
    image, choice = {"observation_space": image}, {"action_space": spaces.Discrete(3)}
    half = spaces.Box(np.float32([0, -np.inf]), np.float32([1, 1]))
    half = {"action_space": half}
    for message, changes, mode, error in (
        ("Dict with 'image'; a policy takes one array", image, SAME_STEP, TypeError),
        ("actions are Discrete.*need a Box", choice, SAME_STEP, TypeError),
        ("bounded in some dimensions only", half, SAME_STEP, ValueError),
        ("must be AutoresetMode.SAME_STEP", {}, NEXT_STEP, ValueError),
    ):
        env = type("Changed", (Countdown,), changes)
        build = functools.partial(make, False, mode=mode, env=env)
        refused(message, envs.GymnasiumVector, build, error=error)
