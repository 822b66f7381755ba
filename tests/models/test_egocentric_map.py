"""Maps around an agent; numbers are those of the sheet's invariants."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from model_helpers import draw, shapes_of, stirred
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import models
from tmdjax.core import trees
from tmdjax.models.flow_equivariant.egocentric_map import identity_kernel
from tmdjax.models.flow_equivariant.group_actions import (
    CROSS,
    FORWARD,
    LEFT,
    REST,
    RIGHT,
    action_tables,
    field_of_view,
    flow_table,
    permute,
)

SIDE, BATCH = 7, 2
TINY = models.EgocentricMap(
    image_size=4, patch_size=2, world=3, hidden=4, depth=1, decoder_depth=1, heads=2,
    mlp_ratio=1.0, channels=1,
)  # fmt: skip
FRAME = jnp.asarray(np.random.default_rng(0).random((BATCH, 4, 4, 1)), jnp.float32)
ACTION = jnp.array([LEFT, FORWARD], jnp.int32)
COMPAT = dataclasses.replace(TINY, compat_init=True)
STARTED, COMPAT_STARTED = jax.jit(
    lambda key: (
        TINY.lazy_init(key, FRAME, ACTION)["params"],
        COMPAT.lazy_init(key, FRAME, ACTION)["params"]["mixing_kernel"],
    )
)(jax.random.key(0))
PARAMS = stirred(jax.device_get(STARTED))
MAPS = np.asarray(draw(BATCH, 5, SIDE, SIDE, 4))


@functools.partial(jax.jit, static_argnames=("module", "method"))
def call(module, params, *inputs, method):
    return models.functional(module)(params, *inputs, method=method)


def state_of(maps, action=ACTION):
    return models.EgocentricState(map=maps, action=jnp.asarray(action))


def after(actions, velocities=CROSS):
    """Where content of cells is after actions, by the tables."""
    cells = np.arange(len(velocities) * SIDE**2)
    for action in actions:
        cells = cells[action_tables(SIDE, velocities)[action]]
    return cells.reshape(-1, SIDE, SIDE)


def test_2_turns_and_steps():
    still = after([])
    assert_array_equal(after([LEFT, RIGHT]), still)
    assert_array_equal(after([LEFT] * 4), still)
    assert not (after([LEFT] * 2) == still).all()
    assert_array_equal(after([LEFT, FORWARD, RIGHT]), np.roll(still, 1, 1))
    assert_array_equal(after([FORWARD]), np.roll(still, -1, 2))
    assert_array_equal(after([REST]), still)
    # a thing ahead is on the right after a left turn, in the copy of its velocity
    maps = np.zeros((1, 5, SIDE, SIDE, 1), np.float32)
    maps[0, CROSS.index((1, 0)), 3, 5] = 1
    turned = permute(jnp.asarray(maps), action_tables(SIDE, CROSS), jnp.array([LEFT]))
    assert turned[0, CROSS.index((0, 1)), 5, 3] == 1 and turned.sum() == 1


def test_2_flow_and_turns_commute_with_the_copies():
    flow = flow_table(SIDE, CROSS)
    for action in (LEFT, RIGHT, FORWARD, REST):
        table = action_tables(SIDE, CROSS)[action]
        assert_array_equal(flow[table], table[flow])
    # turned in their places, without the exchange of copies, they do not
    cells = np.arange(flow.size).reshape(5, SIDE, SIDE)
    table = np.rot90(cells, -1, (1, 2)).ravel()
    assert (flow[table] != table[flow]).any()


def test_2_flows_are_rolls():
    moved = MAPS.reshape(BATCH, -1, 4)[:, flow_table(SIDE, CROSS)].reshape(MAPS.shape)
    for i, (x, y) in enumerate(CROSS):
        assert_array_equal(moved[:, i], np.roll(MAPS[:, i], (y, x), (1, 2)))


def test_13_fields_of_view():
    counts = {7: 12, 15: 42, 33: 177}
    for side, count in counts.items():
        view = field_of_view(side, 60.0)
        assert view.sum() == count
        assert_array_equal(view, view[::-1])
        assert view[side // 2, side // 2] and not view[:, : side // 2].any()
    assert [field_of_view(s, 90.0).sum() for s in (33, 15, 7)] == [289, 64, 16]


def test_14_a_frame_is_written_into_the_cells_in_view_alone():
    view = field_of_view(SIDE, 60.0)
    maps = call(TINY, PARAMS, state_of(MAPS), FRAME, method="feed").map
    changed = (np.asarray(maps) != MAPS).any((0, 1, 4))
    assert_array_equal(changed, view)
    # the gate shut keeps the map; open, it forgets what was there but by attention
    for bias, kept in ((-np.inf, True), (np.inf, False)):
        gate = {**PARAMS["gate"], "bias": np.full(4, bias, "f")}
        params = {**PARAMS, "gate": gate}
        found = call(TINY, params, state_of(MAPS), FRAME, method="feed").map
        if kept:
            assert_array_equal(found, MAPS)
            continue
        norm = PARAMS["writer_norm"]
        new = (np.asarray(found)[:, :, view] - norm["bias"]) / norm["scale"]
        assert_allclose(new.mean(-1), 0, atol=1e-4)
        assert_allclose((new**2).mean(-1), 1, atol=1e-2)


def test_15_the_mixing_starts_as_the_identity():
    for mixing in ("grouped", "depthwise", "none"):
        module = dataclasses.replace(TINY, mixing=mixing, implementation="native")
        for compat in (False, True)[: 1 + (mixing != "none")]:
            params = PARAMS
            if mixing != "none":
                kernel = identity_kernel(mixing, 5, 4, 1 if compat else 4)
                params = {**PARAMS, "mixing_kernel": kernel}
            mixed = call(module, params, MAPS, method="mix")
            expected = MAPS * (np.arange(4) < (1 if compat else 4))
            assert_array_equal(mixed, expected)


def test_mixing_is_within_a_feature():
    """One feature of one copy at one place reaches 3 x 3 of all copies, or of three."""
    maps = np.zeros((1, 5, SIDE, SIDE, 4), np.float32)
    maps[0, 2, 3, 6, 1] = 1
    kernel = {"grouped": (3, 3, 5, 5, 4), "depthwise": (3, 3, 3, 4)}
    for mixing, copies in (("grouped", [0, 1, 2, 3, 4]), ("depthwise", [1, 2, 3])):
        module = dataclasses.replace(TINY, mixing=mixing, implementation="native")
        weights = np.abs(draw(*kernel[mixing])) + np.float32(0.1)
        params = {**PARAMS, "mixing_kernel": weights}
        reached = np.argwhere(np.asarray(call(module, params, maps, method="mix"))[0])
        places = {(c, r, k, 1) for c in copies for r in (2, 3, 4) for k in (5, 6, 0)}
        assert {*map(tuple, reached.tolist())} == places


def test_16_the_map_moves_by_flow_and_action_alone():
    kernel = {"mixing_kernel": identity_kernel("grouped", 5, 4, 4)}
    flow = np.stack(
        [np.roll(MAPS[:, i], (y, x), (1, 2)) for i, (x, y) in enumerate(CROSS)], 1
    )
    for action in (REST, 3, FORWARD, RIGHT, LEFT):
        actions = np.full(BATCH, action)
        state, _ = call(
            TINY, PARAMS | kernel, state_of(MAPS), actions, method="predict"
        )
        flat = flow.reshape(BATCH, -1, 4)[:, action_tables(SIDE, CROSS)[action]]
        assert_array_equal(state.map, flat.reshape(MAPS.shape))
    # moved, then mixed: a kernel of any direction does not turn with the map
    mixed = call(TINY, PARAMS, flat.reshape(MAPS.shape), method="mix")
    state, _ = call(TINY, PARAMS, state_of(MAPS), actions, method="predict")
    assert_allclose(state.map, mixed, atol=1e-6)
    unknown = call(TINY, PARAMS, state_of(MAPS), np.array([REST, 5]), method="predict")[
        0
    ]
    assert np.isfinite(unknown.map[0]).all() and np.isnan(unknown.map[1]).all()


def test_17_the_first_action_is_ignored():
    actions = np.array([[LEFT, RIGHT], [FORWARD, LEFT]])
    prepared = models.functional(TINY)(PARAMS, actions, method="prepare")
    assert_array_equal(prepared, [[REST, RIGHT], [REST, LEFT]])


def test_9_parameters():
    frame = jnp.zeros((1, 128, 128, 3))
    shapes = shapes_of(models.EgocentricMap(), frame, np.zeros(1, int))
    assert trees.count(shapes) == 12_830_976
    assert trees.count(shapes["mixing_kernel"]) == 57_600
    # what initialisers make
    assert_array_equal(STARTED["mixing_kernel"], identity_kernel("grouped", 5, 4, 4))
    assert_array_equal(COMPAT_STARTED, identity_kernel("grouped", 5, 4, 1))
    assert models.build(models.spec_of(TINY)) == TINY


def test_variants_read_what_they_should():
    """No self-motion: the action is a token, and the map does not turn."""
    module = dataclasses.replace(
        TINY,
        self_motion="token",
        mixing="none",
        pooling="flat",
        velocity_embedding=True,
    )
    extra = {"action": draw(5, 4), "velocity": draw(5, 4, seed=1)}
    frames = [
        call(module, PARAMS | extra, state_of(MAPS), np.full(2, a), method="predict")
        for a in (LEFT, REST)
    ]
    assert_array_equal(frames[0][0].map, frames[1][0].map)
    assert np.abs(frames[0][1] - frames[1][1]).max() > 1e-4
    swapped = {**extra, "velocity": np.array(extra["velocity"])[::-1]}
    other = call(
        module, PARAMS | swapped, state_of(MAPS), np.full(2, LEFT), method="predict"
    )
    assert np.abs(other[1] - frames[0][1]).max() > 1e-4


def test_bad_inputs(refused):
    make = functools.partial(dataclasses.replace, TINY)
    refused("patch_size=3 does not divide an image of 4 x 4", make, patch_size=3)
    refused("hidden=6 must be a multiple of heads=2 and of 4", make, hidden=6)
    refused("self_motion='shift'.*'token'", make, self_motion="shift")
    refused("mixing='3d' is not one of 'grouped'", make, mixing="3d")
    refused("pooling='mean'", make, pooling="mean")
    refused(r"lack \(0, 1\), which one", make, velocities=((0, 0), (1, 0)))
    refused("degrees=200 is outside", make, view_degrees=200)
    refused("side=4 has no middle cell", field_of_view, 4, 60.0)
    refused("side=4 has no middle cell", action_tables, 4, CROSS)
    # traced: nothing is computed on the way to the error
    call = functools.partial(jax.eval_shape, models.functional(TINY), PARAMS)
    refused(r"\[batch, 4, 4, 1\]", call, FRAME[:, 1:], ACTION)
    refused("actions are float32", call, FRAME, np.ones(2, np.float32), error=TypeError)
    refused("must be the batch, 2", call, FRAME, ACTION[:1])
    refused(r"one a row, \[batch\]", call, FRAME, ACTION[:, None])
    prepare = functools.partial(models.functional(TINY), PARAMS, method="prepare")
    codes = np.array([[0, 1], [2, 7]])
    refused("the action of row 1 at time 1 is 7; codes are 0", prepare, codes)
    refused("codes 0", prepare, 1.0 * codes, error=TypeError)
    refused(r"give \[batch, time\]", prepare, codes[0])
