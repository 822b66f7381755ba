"""A room with blocks; numbers are those of the sheet's invariants."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from tmdjax.core import prng
from tmdjax.domains.blocks.ray_caster import (
    BLOCK_HEIGHT,
    BLOCK_WIDTH,
    DIRECTIONS,
    EYE_HEIGHT,
    PALETTE,
    block_places,
    render,
)
from tmdjax.domains.blocks.videos import LOOKS, BlockWorld, block_videos
from tmdjax.models.flow_equivariant.group_actions import (
    CROSS,
    FORWARD,
    LEFT,
    REST,
    RIGHT,
    action_tables,
    flow_table,
)

ROOM, SIZE = 9, 32
FOCAL = SIZE / 2 / math.tan(math.radians(30))
RED, BLUE = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)
WORLD = BlockWorld(room=5, blocks=2, image_size=8, context=60, predicted=60)
KEYS = prng.sample_keys(jax.random.key(0), 4)

drawn = jax.jit(functools.partial(render, room=ROOM, size=SIZE))
videos = jax.jit(functools.partial(block_videos, world=WORLD))


def picture(place, heading, blocks, colours=(RED, BLUE)):
    given = jnp.array(place), jnp.int32(heading), jnp.array(blocks)
    return np.asarray(drawn(*given, jnp.array(colours, jnp.float32)))


def mask(image, colour):
    """Pixels of a block, whatever side of it."""
    lit = np.array(colour) > 0
    return (image[..., lit] >= 0.7).all(-1) & (image[..., ~lit] == 0).all(-1)


@functools.cache
def sampled():
    return jax.device_get(videos(KEYS))


def test_19_a_block_ahead_has_the_size_of_perspective():
    for z in (1, 2, 4, 6):
        seen = mask(picture((1, 4), 0, [(1 + z, 4), (0, 0)]), RED)
        rows, columns = np.nonzero(seen)
        front = z - BLOCK_WIDTH / 2
        # its top is level with the eye, its foot may lie below the picture
        foot = min(FOCAL * EYE_HEIGHT / front, SIZE / 2)
        assert abs(np.ptp(rows) + 1 - foot) <= 1
        assert rows.min() == SIZE / 2
        width = min(FOCAL * BLOCK_WIDTH / front, SIZE)
        assert abs(np.ptp(columns) + 1 - width) <= 1
        assert_array_equal(seen, seen[:, ::-1])
        assert seen.sum() == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    assert BLOCK_HEIGHT == EYE_HEIGHT


def test_19_the_nearer_block_hides_the_other():
    for order in ((0, 1), (1, 0)):
        blocks = np.array([(4, 4), (6, 4)])[list(order)]
        colours = np.array([RED, BLUE])[list(order)]
        image = picture((1, 4), 0, blocks, colours)
        assert mask(image, RED).sum() > 10 and not mask(image, BLUE).any()
    # one that the agent stands in hides nothing
    image = picture((4, 4), 0, [(4, 4), (6, 4)])
    assert mask(image, BLUE).any() and not mask(image, RED).any()


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_19_turned_worlds_look_the_same(turns):
    """Blocks of a room turned with its agent; and a block ahead and to the left."""
    agent, block = np.array([3, 4]), np.array([6, 3])

    def turned(cell):
        x, y = cell - ROOM // 2
        for _ in range(turns):
            x, y = y, -x
        return np.array([x, y]) + ROOM // 2

    one = mask(picture(agent, 0, [block, (0, 0)]), RED)
    other = mask(picture(turned(agent), turns, [turned(block), (0, 0)]), RED)
    assert one.any() and np.mean(one != other) < 0.02  # pixels on an edge
    assert np.nonzero(one)[1].max() < SIZE / 2


def test_19_walls_differ_and_blocks_bounce():
    ahead = [
        picture((4, 4), h, [(0, 0), (0, 0)])[SIZE // 2, SIZE // 2] for h in range(4)
    ]
    assert len({tuple(colour) for colour in ahead}) == 4
    place = functools.partial(block_places, np.array([[1, 2]]), np.array([[1, 0]]))
    path = np.stack([place(t, 4) for t in range(13)])[:, 0]
    assert path[:, 0].tolist() == [1, 2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1]
    assert (path[:, 1] == 2).all()


def test_18_the_state_follows_the_actions():
    sample = sampled()
    directions = np.array(DIRECTIONS)
    assert not sample["heading"][:, 0].any() and (sample["actions"][:, 0] == REST).all()
    turn = {LEFT: 1, RIGHT: -1}
    for i in range(4):
        for t in range(1, WORLD.frames):
            action, before = sample["actions"][i, t], sample["heading"][i, t - 1]
            heading = (before + turn.get(action, 0)) % 4
            assert sample["heading"][i, t] == heading
            moved = sample["place"][i, t] - sample["place"][i, t - 1]
            assert_array_equal(moved, directions[before] * (action == FORWARD))
    assert sample["place"].min() == 0 and sample["place"].max() == WORLD.room - 1
    steps = np.abs(np.diff(sample["blocks"], axis=1))
    assert (steps.sum(-1) == 1).all() and {*np.unique(sample["blocks"])} == {*range(5)}
    again = jax.device_get(videos(KEYS[::-1]))
    assert_array_equal(again["frames"][::-1], sample["frames"])


def test_a_map_around_the_agent_moves_as_its_world_does():
    """By flow and actions alone, content stays where blocks are, in their copy."""
    sample, reach = sampled(), WORLD.room - 1
    side = 2 * reach + 1
    flow, moves = flow_table(side, CROSS), action_tables(side, CROSS)

    def cells(i, t, velocity):
        ahead = np.array(DIRECTIONS)[sample["heading"][i, t]]
        right = np.array([-ahead[1], ahead[0]])
        away = sample["blocks"][i, t] - sample["place"][i, t]
        copies = [CROSS.index((v @ ahead, v @ right)) for v in velocity]
        where = copies, reach + away @ right, reach + away @ ahead
        return np.ravel_multi_index(where, (len(CROSS), side, side))

    for i in range(4):
        for t in range(1, WORLD.frames):
            velocity = sample["blocks"][i, t] - sample["blocks"][i, t - 1]
            source = flow[moves[sample["actions"][i, t]]]
            before, after = (cells(i, s, velocity) for s in (t - 1, t))
            assert_array_equal(source[after], before)


def test_18_frames_are_those_of_the_state():
    sample = sampled()
    frames = sample["frames"]
    assert frames.shape == (4, 120, 8, 8, 3) and frames.dtype == np.float32
    assert frames.min() >= 0 and frames.max() <= 1
    small = jax.jit(functools.partial(render, room=WORLD.room, size=8))
    palette = np.array([*PALETTE.values()], np.float32)
    for i, t in ((0, 0), (1, 30), (3, 119)):
        state = (sample[k][i, t] for k in ("place", "heading", "blocks"))
        image = small(*map(jnp.asarray, state), palette[sample["colour"][i]])
        np.testing.assert_allclose(frames[i, t], image, atol=1e-6)


def test_walks_look_into_the_room_from_its_walls():
    sample = sampled()
    for actions, places, headings in zip(
        *(sample[k] for k in ("actions", "place", "heading"))
    ):
        rests = np.flatnonzero(actions[1:] == REST) + 1
        runs = np.split(rests, np.flatnonzero(np.diff(rests) > 1) + 1)
        whole = [run for run in runs if run[-1] < WORLD.frames - 1]
        assert len(whole) >= 2 and {len(run) for run in whole} == {LOOKS}
        for run in whole:
            x, y = np.array(DIRECTIONS)[headings[run[0]]]
            behind = places[run[0]] - (x, y)
            assert ((behind < 0) | (behind >= WORLD.room)).any()
            assert actions[run[0] - 1] == actions[run[0] - 2] == LEFT
            assert actions[run[-1] + 1] in (LEFT, RIGHT)


def test_bad_inputs(refused):
    refused("room=1 must be at least 2", BlockWorld, room=1)
    refused("blocks=0", BlockWorld, blocks=0)
    refused("image_size=8.0 is of type", BlockWorld, image_size=8.0, error=TypeError)
    refused("view_degrees=180 is outside", BlockWorld, view_degrees=180)
    refused("typed key", block_videos, np.zeros((2, 2)), world=WORLD, error=TypeError)
    state = jnp.zeros(2, int), jnp.int32(0), jnp.zeros((1, 2), int), jnp.zeros((1, 3))
    refused("size=0", render, *state, room=3, size=0)
    refused("view_degrees=0 is outside", render, *state, room=3, size=2, view_degrees=0)
