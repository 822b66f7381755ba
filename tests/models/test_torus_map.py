"""Maps of a torus that move; numbers are those of the sheet's invariants."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import draw, shapes_of
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import models
from tmdjax.core import trees
from tmdjax.models import TorusState
from tmdjax.models.flow_equivariant.convolution import convolve, mix_velocities
from tmdjax.models.flow_equivariant.group_actions import (
    as_velocities,
    drift,
    shift,
    square_velocities,
)
from tmdjax.train.world_models import RolloutConfig, rollout

SIDE, TIME, BATCH = 6, 4, 2
# Programs of one convolution each are compiled sooner; that both forms agree is a test.
WHOLE = models.TorusMap(world=SIDE, window=SIDE, hidden=3, implementation="native")
FRAMES = np.random.default_rng(0).random((TIME, BATCH, SIDE, SIDE, 1))
FRAMES = FRAMES.astype(np.float32)
ACTIONS = np.random.default_rng(1).integers(-7, 8, (TIME, BATCH, 2)).astype(np.int32)
STILL = np.zeros_like(ACTIONS)
TIMES = np.arange(TIME)[:, None, None]


@functools.cache
def params_of(module):
    """Of the scale of the initialisers, without a program that draws them."""
    frame = jnp.zeros((1, module.window, module.window, module.channels))
    shapes = shapes_of(module, frame, np.zeros((1, 2), int))
    rng = np.random.default_rng(4)
    return {
        name: jnp.float32(rng.uniform(-1, 1, leaf.shape) / leaf.shape[2] ** 0.5 / 3)
        for name, leaf in sorted(shapes.items())
    }


PARAMS = params_of(WHOLE)


jitted_shift = jax.jit(shift)


def rolled(x, steps):
    """The oracle of shifts: numpy, map by map."""
    x = np.asarray(x)
    steps = np.broadcast_to(steps, (*x.shape[:-3], 2)).reshape(-1, 2)
    maps = [
        np.roll(one, (down, right), (0, 1))
        for one, (right, down) in zip(x.reshape(-1, *x.shape[-3:]), steps, strict=True)
    ]
    return np.stack(maps).reshape(x.shape)


def circular(x, kernel):
    """The oracle of circular convolutions of 3 x 3."""
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="wrap")
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))
    return np.einsum("brcixy,xyio->brco", windows, kernel)


def cell_of(module, params):
    def cell(state, given):
        return models.functional(module)(params, state, *given, method="observe")

    return cell


@functools.cache
def program(module):
    """States after every frame, and what is read of them."""
    fn = models.functional(module)

    def run(params, frames, actions):
        def step(state, given):
            state = cell_of(module, params)(state, given)
            return state, (state.map, fn(params, state.map, method="read"))

        state = fn(params, frames[0], method="start")
        return jax.lax.scan(step, state, (frames, actions))[1]

    return jax.jit(run)


def run(module, frames, actions, params=PARAMS):
    return jax.device_get(program(module)(params, frames, actions))


def test_1_shifts_are_rolls():
    x = draw(3, 2, 5, 4, 2)
    for steps in ([[0, 0], [-3, 2], [9, -13]], [[1, -2]] * 3, [[4, 5]] * 3):
        steps = np.array(steps)[:, None]
        moved = jitted_shift(x, steps)
        assert_array_equal(moved, rolled(x, steps))
        # one after the other is their sum; the other way is back
        assert_array_equal(jitted_shift(moved, 2 - steps), rolled(x, 0 * steps + 2))
    assert_array_equal(moved, x)  # the whole way round


def test_velocities():
    square = square_velocities(1)
    assert [len(square_velocities(r)) for r in range(3)] == [1, 9, 25]
    assert square[:4] == ((-1, -1), (-1, 0), (-1, 1), (0, -1))
    assert as_velocities([[1, 0], [0, 2]]) == ((1, 0), (0, 2))


@pytest.mark.parametrize("padding", ["circular", "zeros"])
def test_convolutions_agree(padding):
    x, kernel = np.asarray(draw(2, 3, 5, 4, 2)), draw(3, 3, 2, 4)
    ours = [
        np.asarray(
            jax.jit(functools.partial(convolve, padding=padding, implementation=how))(
                x, kernel
            )
        )
        for how in ("shifts", "native")
    ]
    assert_allclose(*ours, atol=1e-5)
    if padding == "zeros":
        x = np.pad(x, [(0, 0)] * 2 + [(1, 1)] * 2 + [(0, 0)])
    there = circular(np.reshape(x, (6, *x.shape[2:])), kernel)
    there = there[:, 1:-1, 1:-1] if padding == "zeros" else there
    assert_allclose(ours[0].reshape(there.shape), there, atol=1e-5)
    if padding == "circular":
        # 3 velocities to 2, feature by feature
        weights = np.asarray(draw(3, 3, 3, 2, 2))
        mixed = [
            np.asarray(
                jax.jit(functools.partial(mix_velocities, implementation=how))(
                    x, weights
                )
            )
            for how in ("shifts", "native")
        ]
        assert_allclose(*mixed, atol=1e-5)
        for u, d in ((0, 0), (1, 0), (0, 1), (1, 1)):
            one = np.moveaxis(x[..., d], 1, -1)
            there = circular(one, weights[:, :, :, u, d, None])[..., 0]
            assert_allclose(mixed[0][:, u, ..., d], there, atol=1e-5)


def test_3_the_order_of_shifts_is_free():
    """The one gather of a step is the flow, then the motion, and the other way."""
    v = np.array(WHOLE.velocities)
    h, action = draw(BATCH, 9, SIDE, SIDE, 3), ACTIONS[0][:, None]
    once = jitted_shift(h, v - action)
    assert_array_equal(once, rolled(rolled(h, v), -action))
    assert_array_equal(once, rolled(rolled(h, -action), v))


@pytest.mark.parametrize("velocity", [(1, 0), (-1, 1)])
def test_4_states_move_with_what_moves_in_the_world(velocity):
    moved = rolled(FRAMES, TIMES * np.array(velocity))
    square = WHOLE.velocities
    known = np.array([(x - velocity[0], y - velocity[1]) in square for x, y in square])
    assert known.sum() == (6 if 0 in velocity else 4)

    def act(t, state):
        maps, there = drift(state.map, square, velocity, t)
        assert_array_equal(there, known)
        return state.replace(map=maps)

    cell = cell_of(WHOLE, PARAMS)
    state = TorusState(map=jnp.zeros((BATCH, 9, SIDE, SIDE, 3)), frame=FRAMES[0])
    given = cell, state, (FRAMES, STILL), (moved, STILL), act
    models.check_equivariance(*given, select=lambda state: state.map[:, known])
    if 0 in velocity:  # at the edge of the set there is no image
        with pytest.raises(ValueError, match=r"after the inputs 0 \(by"):
            models.check_equivariance(*given)


def test_4_without_velocity_channels_states_do_not_move():
    still = dataclasses.replace(WHOLE, velocities=0)
    steps = TIMES * np.array([1, 0])
    maps, _ = run(still, FRAMES, STILL)
    others, _ = run(still, rolled(FRAMES, steps), STILL)
    ahead = rolled(maps, steps[:, None])
    assert_allclose(others[0], ahead[0], atol=1e-6)
    assert np.abs(others[-1] - ahead[-1]).max() > 0.01


def test_5_states_move_against_the_agent():
    place = np.cumsum(ACTIONS, 0)
    seen = rolled(FRAMES, -place)
    maps, reads = run(WHOLE, FRAMES, STILL)
    others, moved_reads = run(WHOLE, seen, ACTIONS)
    assert_allclose(others, rolled(maps, -place[:, :, None]), atol=1e-6)
    assert_allclose(moved_reads, rolled(reads, -place), atol=1e-6)
    ignoring = dataclasses.replace(WHOLE, self_motion="none")
    blind, _ = run(ignoring, seen, ACTIONS)
    assert np.abs(blind - others).max() > 0.01
    # without motion the two networks are one
    for one, other in zip(run(ignoring, FRAMES, STILL), (maps, reads)):
        assert_array_equal(one, other)


def test_6_the_order_of_velocities_is_free():
    order = np.random.default_rng(2).permutation(9)
    other = dataclasses.replace(
        WHOLE, velocities=tuple(WHOLE.velocities[i] for i in order)
    )
    maps, reads = run(WHOLE, FRAMES, ACTIONS)
    others, other_reads = run(other, FRAMES, ACTIONS)
    assert_allclose(others, maps[:, :, order], atol=1e-6)
    assert_allclose(other_reads, reads, atol=1e-6)


def test_7_without_velocities_it_is_a_convolutional_recurrent_network():
    still = dataclasses.replace(WHOLE, velocities=0)
    maps, reads = run(still, FRAMES, STILL)

    h = np.zeros((BATCH, SIDE, SIDE, 3))
    for t in range(TIME):
        h = np.maximum(
            circular(h, PARAMS["memory"]) + circular(FRAMES[t], PARAMS["encoder"]), 0
        )
        assert_allclose(maps[t][:, 0], h, atol=1e-5)
    hidden = np.maximum(circular(h, PARAMS["decoder_0"]), 0)
    assert_allclose(reads[-1], circular(hidden, PARAMS["decoder_out"]), atol=1e-5)


def test_8_what_left_the_window_moves_on_for_500_steps():
    module = models.TorusMap(
        world=12, window=4, hidden=1, feedback="none", implementation="native"
    )
    centre = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1)
    params = dict.fromkeys(params_of(module), centre)
    frame = jnp.zeros((1, 4, 4, 1)).at[0, 1, 2].set(0.7)  # row 1, column 2
    actions = np.random.default_rng(3).integers(-3, 4, (500, 1, 2))
    fn = models.functional(module)

    @jax.jit
    def walk(params, actions):
        state = fn(params, frame, method="start")
        state = fn(params, state, frame, 0 * actions[0], method="observe")

        def step(state, action):
            state, seen = fn(params, state, action, method="predict")
            return state, (state.map, seen)

        return jax.lax.scan(step, state, actions)[1]

    maps, seen = jax.device_get(walk(params, actions))
    camera = np.cumsum(actions[:, 0], 0)
    for t in (0, 1, 2, 49, 250, 499):
        expected = np.zeros((9, 12, 12))
        for i, (x, y) in enumerate(module.velocities):
            right, down = np.array([2, 1]) + (t + 1) * np.array([x, y]) - camera[t]
            expected[i, down % 12, right % 12] = np.float32(0.7)
        assert_array_equal(maps[t, 0, ..., 0], expected)
        assert_array_equal(seen[t, 0, ..., 0], expected[:, :4, :4].max(0))


def test_9_parameters():
    for r in (0, 2):
        module = models.TorusMap(world=50, window=32, velocities=r)
        inputs = jnp.zeros((1, 32, 32, 1)), np.zeros((1, 2), int)
        assert trees.count(shapes_of(module, *inputs)) == 74_880
    assert models.build(models.spec_of(WHOLE)) == WHOLE
    listed = models.TorusMap(world=6, window=6, velocities=[[0, 0], [1, 0]])
    assert models.build(models.spec_of(listed)) == listed


def test_a_memory_starts_at_the_identity_on_request():
    """Both from one draw, uniform in +-1 / sqrt(inputs); actions beside the map too."""
    module = dataclasses.replace(WHOLE, velocities=0, self_motion="concat")
    kept = dataclasses.replace(module, memory_init="identity")
    given = jax.random.key(0), FRAMES[0], ACTIONS[0]
    ours = jax.jit(
        lambda *given: [m.lazy_init(*given)["params"] for m in (module, kept)]
    )
    uniform, identity = jax.device_get(ours(*given))
    bound = 1 / np.sqrt(9 * 5)
    assert 0.9 * bound < np.abs(uniform["memory"]).max() <= bound
    start = np.zeros((3, 3, 5, 3))
    start[1, 1, :3] = np.eye(3)
    assert_allclose(identity.pop("memory"), start + uniform["memory"] / 10, atol=1e-6)
    assert all((identity[name] == uniform[name]).all() for name in identity)


def test_10_a_frame_is_written_in_the_window_alone():
    module = dataclasses.replace(WHOLE, world=9, window=4, hidden=2, velocities=0)
    params = params_of(module)
    frames = FRAMES[:1, :, :4, :4]
    (maps, _) = run(module, frames, STILL[:1], params)
    assert (maps[0, :, :, :4, :4] != 0).any() and not maps[0, :, :, 4:].any()
    assert not maps[0, :, :, :, 4:].any()
    # beyond the edges of a part lies nothing; the published network wraps it around
    wrapped = dataclasses.replace(module, window_padding="circular")
    (others, _) = run(wrapped, frames, STILL[:1], params)
    inside = np.s_[0, :, :, 1:3, 1:3]
    assert_allclose(others[inside], maps[inside], atol=1e-6)
    assert np.abs(others - maps).max() > 0.01


def test_a_map_has_32_bits_whatever_frames_have():
    config = RolloutConfig(context=TIME)
    videos = np.swapaxes(FRAMES, 0, 1), np.zeros((BATCH, TIME + 3, 2), int)
    cases = ("shifts", jnp.bfloat16), ("shifts", jnp.float16), ("native", jnp.bfloat16)
    for implementation, dtype in (*cases, ("native", jnp.float32)):
        module = dataclasses.replace(WHOLE, implementation=implementation)
        found = jax.eval_shape(
            lambda frames, actions, module=module: rollout(
                PARAMS, models.functional(module), frames, actions, config
            ),
            videos[0].astype(dtype),
            videos[1],
        )
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(found.state)}
        assert dtypes == {np.dtype("float32")} == {found.outputs["frame"].dtype}


def test_actions_beside_the_frame():
    """'concat' gives the action as two planes, to the frame and to the map."""
    module = dataclasses.replace(WHOLE, velocities=0, self_motion="concat")
    params = params_of(module)
    assert params["encoder"].shape == (3, 3, 3, 3)
    assert params["memory"].shape == (3, 3, 5, 3)
    maps, _ = run(module, FRAMES[:1], ACTIONS[:1], params)
    for b, (x, y) in enumerate(ACTIONS[0]):
        planes = np.concatenate([FRAMES[0, b], np.full((6, 6, 2), (x, y))], -1)
        h = circular(planes[None], params["encoder"])[0]
        h += (params["memory"][:, :, 3:].sum((0, 1)) * np.array([[x], [y]])).sum(0)
        assert_allclose(maps[0, b, 0], np.maximum(h, 0), atol=1e-5)


def test_bad_inputs(refused):
    make = functools.partial(models.TorusMap, world=8, window=6)
    refused("window=9 is larger than world=8", make, window=9)
    refused("kernel_size=2 must be odd", make, kernel_size=2)
    refused("self_motion='shit' is not one of.*'shift'", make, self_motion="shit")
    refused("feedback='old'", make, feedback="old")
    refused("memory_init='eye'", make, memory_init="eye")
    refused(
        "window_padding='wrap' is not one of 'circular'", make, window_padding="wrap"
    )
    refused("implementation='fast'", make, implementation="fast")
    refused("have 0.5; give integers", make, velocities=[(0.5, 0)], error=TypeError)
    refused("name one twice", make, velocities=[(0, 0), (0, 0)])
    refused("give pairs", make, velocities=[(0, 0, 1)])
    refused("most=-1", make, velocities=-1)
    call = functools.partial(jax.eval_shape, models.functional(WHOLE), PARAMS)
    refused(r"\[batch, 6, 6, 1\]", call, FRAMES[0, :, 1:], ACTIONS[0])
    refused("actions are float", call, FRAMES[0], 1.0 * ACTIONS[0], error=TypeError)
    refused("must be the batch, 2", call, FRAMES[0], ACTIONS[0, :1])
    refused(r"give \(x, y\), \[batch, 2\]", call, FRAMES[0], ACTIONS[0, :, :1])
    steps = np.ones(2, np.float32)
    refused("steps are float", shift, FRAMES[0], steps, error=TypeError)
    refused("tolerance=-1", models.check_equivariance, tolerance=-1)
