import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax import envs
from tmdjax.envs.push import PushState

PUSH = envs.Push()
STEP = jax.jit(PUSH.step)


def state_at(pusher, thing, target):
    places = (jnp.array(p, jnp.float32) for p in (pusher, thing, target))
    return PushState(*places, jnp.int32(0))


@pytest.mark.parametrize(
    "thing, target, action, pusher, moved, reward",
    [
        # the object moves along the line of centres
        ((0.21, 0.0), (0.9, 0.9), (1.0, 0.0), (0.08, 0), (0.28, 0), 0),
        # out of reach it stays
        ((0.5, 0.0), (0.9, 0.9), (-3.0, 1.0), (-0.08, 0.08), (0.5, 0), 0),
        # a reward only at the target
        ((0.21, 0.0), (0.4, 0.0), (1.0, 0.0), (0.08, 0), (0.28, 0), 1),
    ],
)
def test_pushing(thing, target, action, pusher, moved, reward):
    step = STEP(state_at((0.0, 0.0), thing, target), jnp.array(action), None)
    np.testing.assert_allclose(step.state.pusher, pusher, atol=1e-6)
    np.testing.assert_allclose(step.state.object, moved, atol=1e-6)
    assert step.reward == reward and step.terminated == bool(reward)
    assert PUSH.success(step.state) == bool(reward)


def test_nothing_overlaps_or_leaves():
    def walk(key):
        state, _ = PUSH.reset(key)

        def body(state, key):
            action = jax.random.uniform(key, (2,), minval=-2.0, maxval=2.0)
            # towards the object, so that they do meet
            action = action + 3 * (state.object - state.pusher)
            state = STEP(state, action, None).state
            return state, state

        return jax.lax.scan(body, state, jax.random.split(key, 200))[1]

    path = jax.jit(jax.vmap(walk))(jax.random.split(jax.random.key(0), 100))
    gap = np.linalg.norm(np.asarray(path.object - path.pusher), axis=-1)
    assert gap.min() > 0.2 - 1e-4
    assert np.abs(path.object).max() <= 0.88 + 1e-6
    moved = np.linalg.norm(np.asarray(path.object[:, -1] - path.object[:, 0]), axis=-1)
    assert (moved > 0.1).mean() > 0.5


def test_starts_are_apart():
    state, seen = jax.vmap(PUSH.reset)(jax.random.split(jax.random.key(0), 2000))
    assert seen.shape == (2000, 6)
    gap = np.linalg.norm(np.asarray(state.object - state.pusher), axis=-1)
    far = np.linalg.norm(np.asarray(state.object - state.target), axis=-1)
    assert gap.min() > 0.2 and far.min() > PUSH.reach and far.max() <= 0.8 + 1e-5
    assert not PUSH.success(state).any()


def test_a_scripted_policy_solves_it():
    """Behind the object as seen from the target, then straight on."""

    def policy(seen):
        to_object, to_target = seen[2:4], seen[4:]
        aim = to_target / jnp.linalg.norm(to_target)
        behind = to_object - 0.25 * aim
        side = jnp.array([-aim[1], aim[0]])
        offset = to_object @ side
        ahead = to_object @ aim
        around = behind + jnp.where(ahead < 0.1, 0.35, 0.0) * side * -jnp.sign(offset)
        lined_up = (ahead > 0.15) & (jnp.abs(offset) < 0.04)
        return 15 * jnp.where(lined_up, to_object, around)

    def episode(key):
        state, seen = PUSH.reset(key)

        def body(carry, _):
            state, seen, won = carry
            step = STEP(state, policy(seen), None)
            return (step.state, step.observation, won | step.terminated), None

        return jax.lax.scan(body, (state, seen, False), None, length=60)[0][2]

    won = jax.jit(jax.vmap(episode))(jax.random.split(jax.random.key(3), 500))
    assert np.mean(won) > 0.8


def test_pixels_show_all_three():
    pixels = envs.Push(observation="pixels")
    state = state_at((-0.5, 0.5), (0.5, 0.5), (0.5, -0.5))
    image = np.asarray(pixels.observe(state))
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    blue, red, green = image[16, 16], image[16, 48], image[48, 48]
    assert blue.argmax() == 2 and red.argmax() == 0 and green.argmax() == 1
    assert (image[32, 32] == 255).all()
    nudged = state_at((-0.5, 0.51), (0.5, 0.5), (0.5, -0.5))
    assert (np.asarray(pixels.observe(nudged)) != image).any()
    _, seen = jax.jit(pixels.reset)(jax.random.key(0))
    assert seen.shape == (64, 64, 3)


def test_bad_inputs(refused):
    refused("Did you mean 'pixels'", envs.Push, observation="pixel")
    refused("side=4", envs.Push, side=4)
    refused("distance=0.1 is outside", envs.Push, distance=0.1)
    refused("horizon=0", envs.Push, horizon=0)
