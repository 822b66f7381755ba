"""The ray caster of rooms against the simulator of the published videos.

Miniworld draws with OpenGL, here without a screen: `pip install miniworld`, and Mesa's EGL.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax.domains.blocks.ray_caster import (
    BLOCK_HEIGHT,
    BLOCK_WIDTH,
    EYE_HEIGHT,
    PALETTE,
    render,
)

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.filterwarnings("default"),  # of pyglet
]

ROOM, SIZE = 16, 128
COLOURS = ("red", "green", "blue")
POSES = (  # cell and heading of the agent, cells of the blocks
    ((2, 8), 0, ((5, 8), (9, 6), (7, 10))),
    ((8, 13), 1, ((8, 10), (8, 6), (6, 5))),  # the second stands behind the first
    ((13, 3), 2, ((10, 4), (3, 1), (11, 3))),
    ((4, 1), 3, ((5, 4), (2, 9), (4, 14))),
)


@functools.cache
def theirs():
    """Their pictures of the poses, uint8 [pose, SIZE, SIZE, 3]."""
    pyglet = pytest.importorskip("pyglet", reason="needs miniworld")
    pyglet.options["headless"] = True
    world = pytest.importorskip("miniworld.miniworld", reason="needs miniworld, OpenGL")
    from miniworld.entity import Box

    class Room(world.MiniWorldEnv):
        def __init__(self, pose):
            self.pose = pose
            super().__init__(obs_width=SIZE, obs_height=SIZE)

        def _gen_world(self):
            def at(cell):
                return np.array([cell[0] + 0.5, 0, cell[1] + 0.5])

            place, heading, blocks = self.pose
            self.add_rect_room(min_x=0, max_x=ROOM, min_z=0, max_z=ROOM)
            size = np.array([BLOCK_WIDTH, BLOCK_HEIGHT, BLOCK_WIDTH])
            for colour, cell in zip(COLOURS, blocks):
                box = Box(color=colour, size=size)
                self.place_entity(box, pos=at(cell), dir=0)
            self.place_agent(pos=at(place), dir=heading * math.pi / 2)

    try:
        rooms = [Room(pose) for pose in POSES]
    except Exception as error:  # of a machine without a device to draw on
        pytest.skip(f"no OpenGL: {error!r}")
    assert rooms[0].agent.cam_height == EYE_HEIGHT
    return np.stack([room.reset(seed=0)[0] for room in rooms])


def silhouettes(image):
    """Pixels of each colour, whatever light falls on them."""
    image = np.asarray(image, np.float32)
    return [
        (image[..., i] > 2 * image[..., [j for j in range(3) if j != i]].max(-1))
        & (image[..., i] > 0.1 * image.max())
        for i in range(3)
    ]


@pytest.mark.parametrize("number", range(len(POSES)))
def test_blocks_stand_where_miniworld_draws_them(number):
    place, heading, blocks = POSES[number]
    colours = jnp.array([PALETTE[name] for name in COLOURS], jnp.float32)
    draw = jax.jit(functools.partial(render, room=ROOM, size=SIZE))
    ours = draw(jnp.array(place), jnp.int32(heading), jnp.array(blocks), colours)
    pairs = zip(silhouettes(ours), silhouettes(theirs()[number]), strict=True)
    seen = [(np.sum(a & b), np.sum(a | b)) for a, b in pairs if a.any() or b.any()]
    assert len(seen) >= 2
    for both, either in seen:
        assert both > 0.9 * either, (both, either)
