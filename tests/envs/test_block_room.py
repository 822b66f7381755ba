"""A room with blocks as an environment."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from tmdjax import envs
from tmdjax.domains.blocks.ray_caster import DIRECTIONS
from tmdjax.envs.block_room import BlockRoomState

ROOM = envs.BlockRoom(room=4, blocks=2, side=8, horizon=6)
LEFT, RIGHT, FORWARD = np.eye(3, dtype=np.float32)
STEP = jax.jit(ROOM.step)


def state_at(place, heading, start=((0, 3), (3, 3)), velocity=((0, 0), (0, 0))):
    arrays = (jnp.array(x, jnp.int32) for x in (place, heading, start, velocity))
    return BlockRoomState(*arrays, jnp.int32(0))


def test_an_agent_turns_and_walks_and_walls_stop_it():
    state, seen = state_at((1, 1), 0), []
    for action in (FORWARD, FORWARD, FORWARD, LEFT, FORWARD, RIGHT):
        step = STEP(state, action, None)
        state = step.state
        seen.append((*state.place.tolist(), int(state.heading)))
        assert step.reward == 0 and not step.terminated
    assert seen == [(2, 1, 0), (3, 1, 0), (3, 1, 0), (3, 1, 1), (3, 0, 1), (3, 0, 0)]
    assert step.truncated and state.steps == ROOM.horizon
    assert not STEP(state_at((1, 1), 0), 5 * LEFT - 7, None).truncated


def test_the_green_block_is_caught_where_it_then_is():
    green = ((0, 1), (3, 3)), ((1, 0), (0, 0))  # in column 1 after a step
    caught = STEP(state_at((0, 1), 0, *green), FORWARD, None)
    assert (
        caught.reward == 1 and caught.terminated and caught.reward.dtype == np.float32
    )
    left = STEP(state_at((0, 1), 0, *green), LEFT, None)  # it moved away
    assert left.reward == 0 and not left.terminated
    other = ((3, 3), (0, 1)), ((0, 0), (1, 0))
    assert not STEP(state_at((0, 1), 0, *other), FORWARD, None).terminated


def test_pixels_show_the_block_ahead():
    step = STEP(state_at((0, 1), 1, start=((3, 1), (0, 0))), RIGHT, None)
    image = np.asarray(step.observation)
    assert image.shape == (8, 8, 3) and image.dtype == np.uint8
    assert_array_equal(image[4, 4] > 0, [False, True, False])
    assert (image[0] == image[0, 0]).all()  # the ceiling


def test_a_vector_of_rooms_starts_anywhere():
    vector = envs.Vector(dataclasses.replace(ROOM, side=1), 300)
    assert vector.observation.shape == (1, 1, 3) and vector.action_size == 3
    state = jax.jit(vector.reset)(jax.random.key(0)).state
    for name, values in (
        ("place", range(4)),
        ("heading", range(4)),
        ("start", range(4)),
        ("steps", range(6)),
    ):
        assert {*np.unique(getattr(state, name))} == {*values}, name
    assert {*map(tuple, np.reshape(state.velocity, (-1, 2)).tolist())} == {*DIRECTIONS}


@pytest.mark.parametrize(
    "change", ["room=1", "blocks=0", "side=0", "horizon=0", "view_degrees=180"]
)
def test_bad_inputs(change, refused):
    name, _, value = change.partition("=")
    refused(change, envs.BlockRoom, **{name: int(value)})
