"""Frames with a noise level each, and a world model made of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import drawn
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import models, train
from tmdjax.core import prng
from tmdjax.models.flow_equivariant.group_actions import REST
from tmdjax.systems import diffusion_forcing
from tmdjax.train import world_models

SIZE, BATCH, WINDOW = 4, 3, 3
TINY = models.ForcingDiT(
    image_size=SIZE, frames=WINDOW, hidden=8, depth=1, heads=2, steps=2, remat=False
)
FN = models.functional(TINY)
KEYS = prng.sample_keys(jax.random.key(3), BATCH)
RNG = np.random.default_rng(0)
FRAMES = np.float32(RNG.random((BATCH, 6, SIZE, SIZE, 1)))
ACTIONS = np.int32(RNG.integers(-2, 3, (BATCH, 9, 2)))


@functools.cache
def params_of():
    """Parameters whose output layer is as it starts, and others, nowhere zero."""
    given = FRAMES[:, :WINDOW], np.ones((BATCH, WINDOW), "f"), ACTIONS[:, :WINDOW]
    init = functools.partial(models.init_params, TINY, jax.random.key(0), *given)
    start = jax.device_get(jax.jit(lambda: init()["final"])())
    first = {**drawn(jax.eval_shape(init)), "final": start}
    rng = np.random.default_rng(1)
    stir = lambda p: (p + 0.3 * rng.normal(size=p.shape)).astype(np.float32)  # noqa: E731
    return first, jax.tree.map(stir, first)


@functools.partial(jax.jit, static_argnames="module")
def predict(params, state, action, module=TINY):
    return models.functional(module)(params, state, action, method="predict")


def state_of(frames, known):
    return models.ForcingState(
        frames=jnp.asarray(frames),
        actions=ACTIONS[:, :WINDOW],
        known=jnp.array(known),
        keys=KEYS,
        step=jnp.int32(4),
    )


def test_a_network_that_starts_at_zero_leaves_its_noise():
    state = state_of(FRAMES[:, :WINDOW], [True] * WINDOW)
    after, frame = predict(params_of()[0], state, ACTIONS[:, 3])
    for i in range(BATCH):
        key = jax.random.split(jax.random.fold_in(KEYS[i], 4))[1]
        noise = jax.random.normal(key, (SIZE, SIZE, 1))
        assert_allclose(frame[i], (noise + 1) / 2, atol=1e-6)
    assert after.step == 5 and after.known.tolist() == [True, True, False]
    assert_array_equal(after.actions[:, -1], ACTIONS[:, 3])
    assert_array_equal(after.frames[:, :2], FRAMES[:, 1:3])


def test_what_is_not_known_is_not_read():
    """A frame at time 1 is absent; without guidance by history all of them are."""
    params = params_of()[1]
    changed = FRAMES[:, :WINDOW] + np.float32([0, 1, 0])[:, None, None, None]
    blind = dataclasses.replace(TINY, history_guidance=0)

    def frames_of(known, module=TINY):
        return [
            np.asarray(predict(params, state_of(f, known), ACTIONS[:, 3], module)[1])
            for f in (FRAMES[:, :WINDOW], changed)
        ]

    # the second of three is the first of the window that predicts
    one, other = frames_of([True, False, True])
    assert_array_equal(one, other)
    one, other = frames_of([True] * 3)
    assert np.abs(one - other).max() > 1e-3
    assert_array_equal(*frames_of([True] * 3, blind))


def test_a_prediction_is_the_guided_walk_of_the_last_frame():
    """By hand: Euler steps from t = 1, the known past at 0.02 and the other at 1."""
    params, velocity = params_of()[1], jax.jit(FN)
    state = state_of(FRAMES[:, :WINDOW], [True, False, True])
    found = predict(params, state, ACTIONS[:, 5])[1]
    keys = [jax.random.split(jax.random.fold_in(key, 4)) for key in KEYS]
    blank = np.stack([jax.random.normal(key[0], (2, SIZE, SIZE, 1)) for key in keys])
    x = np.stack([jax.random.normal(key[1], (SIZE, SIZE, 1)) for key in keys])
    past = blank.copy()
    past[:, 1] = 0.98 * (2 * FRAMES[:, 2] - 1) + 0.02 * blank[:, 1]
    actions = np.concatenate([ACTIONS[:, 1:WINDOW], ACTIONS[:, 5:6]], 1)
    for t in (1.0, 0.5):
        with_history, without = (
            np.asarray(
                velocity(
                    params,
                    np.concatenate([before, x[:, None]], 1),
                    np.tile(np.float32([1, level, t]), (BATCH, 1)),
                    actions,
                )
            )[:, -1]
            for before, level in ((past, 0.02), (blank, 1))
        )
        x = x - (without + 1.5 * (with_history - without)) / 2
    assert_allclose(found, (x + 1) / 2, atol=1e-5)


def test_the_first_action_is_idle():
    """Pairs become (0, 0), codes rest, as of the room: 4 of 0 .. 4."""
    pairs = FN(params_of()[0], ACTIONS, method="prepare")
    assert_array_equal(pairs, np.where(np.arange(9)[:, None] == 0, 0, ACTIONS))
    codes = models.functional(dataclasses.replace(TINY, num_actions=5))
    table = {**params_of()[0], "action_codes": np.zeros((5, 8), np.float32)}
    found = codes(table, np.array([[2, 0, 3]]), method="prepare")
    assert_array_equal(found, [[REST, 0, 3]])


@pytest.mark.slow
def test_guidance_is_linear_in_its_weight():
    """Of one Euler step: w = 0 and 1 give all others."""
    params, state = params_of()[1], state_of(FRAMES[:, :WINDOW], [True] * WINDOW)
    without, alone, twice = (
        predict(
            params, state, ACTIONS[:, 3],
            dataclasses.replace(TINY, steps=1, history_guidance=w),
        )[1]
        for w in (0.0, 1.0, 2.0)
    )  # fmt: skip
    assert np.abs(alone - without).max() > 1e-3
    assert_allclose(twice - alone, alone - without, atol=1e-5)


def test_the_loss_of_no_velocity_is_that_of_the_target():
    frames = np.full((BATCH, 5, SIZE, SIZE, 1), 0.75, np.float32)
    batch = {"frames": frames, "actions": ACTIONS[:, :5]}
    loss = jax.jit(
        functools.partial(diffusion_forcing.loss, apply_fn=FN, frames=WINDOW)
    )
    found = loss(params_of()[0], batch=batch, keys=KEYS)[0]
    for i in range(BATCH):  # data of 0.5 in [-1, 1]
        key = jax.random.split(KEYS[i], 3)[2]
        noise = np.asarray(jax.random.normal(key, (WINDOW, SIZE, SIZE, 1)))
        assert_allclose(found[i], np.mean((noise - 0.5) ** 2), rtol=1e-5)


def test_levels_are_those_of_the_frames():
    """What the network is given: parts of the video, each frame at its own time."""

    @jax.jit
    def given(batch):
        seen = {}

        def spy(params, x, t, actions):
            seen.update(x=x, t=t, actions=actions)
            return jnp.zeros_like(x)

        diffusion_forcing.loss({}, spy, batch, KEYS, frames=WINDOW)
        return seen

    actions = jnp.asarray(np.arange(6)[None, :, None] * np.ones((BATCH, 1, 2), "i"))
    seen = jax.device_get(given({"frames": FRAMES, "actions": actions}))
    t = np.asarray(seen["t"])[..., None, None, None]
    first = np.asarray(seen["actions"])[:, 0, 0]
    assert len(np.unique(t)) == t.size and 0 <= t.min() and t.max() <= 1
    for i in range(BATCH):
        part = 2 * np.asarray(FRAMES)[i, first[i] : first[i] + WINDOW] - 1
        noise = jax.random.normal(jax.random.split(KEYS[i], 3)[2], part.shape)
        assert_allclose(seen["x"][i], (1 - t[i]) * part + t[i] * noise, atol=1e-5)
        assert_array_equal(seen["actions"][i, :, 0], first[i] + np.arange(WINDOW))


@pytest.mark.slow
def test_it_learns_and_is_rolled_out_as_a_world_model():
    optimizer = train.make_optimizer(train.OptimizerConfig(learning_rate=3e-3))
    dot = np.zeros((BATCH, 12, SIZE, SIZE, 1), np.float32)
    for i in range(BATCH):  # which of them it is only the history says
        dot[i, :, i, i] = 1
    batch = {
        "frames": jnp.asarray(dot),
        "actions": jnp.zeros((BATCH, 12, 2), jnp.int32),
    }
    module = dataclasses.replace(TINY, hidden=32, steps=8, history_guidance=1.0)
    fn = models.functional(module)

    def loss(params, batch, keys):
        return diffusion_forcing.loss(params, fn, batch, keys, frames=WINDOW)

    update = jax.jit(train.make_train_step(loss, optimizer))
    given = (batch[k][:, :WINDOW] for k in ("frames", "actions"))
    frames, actions = given
    params = models.init_params(
        module, jax.random.key(0), frames, jnp.ones((BATCH, WINDOW)), actions
    )
    state, losses = train.create_state(params, optimizer), []
    for _ in range(300):
        state, metrics = update(state, batch, jax.random.key(1))
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-50:]) < 0.25 * losses[0]
    config = world_models.RolloutConfig(context=4, feedback_clip=(0.0, 1.0))
    found = world_models.rollout(
        state.params, fn, batch["frames"][:, :4], batch["actions"], config, keys=KEYS
    )
    error = world_models.frame_errors(found.outputs["frame"], batch["frames"][:, 4:])
    assert not found.failed.any() and np.median(error) < 2 * np.mean(dot**2)


def test_bad_inputs(refused):
    make = functools.partial(dataclasses.replace, TINY)
    refused("frames=1 must be at least 2", make, frames=1)
    refused("patch_size=3 does not divide", make, patch_size=3)
    refused("hidden=6 must be a multiple of heads=2 and of 4", make, hidden=6)
    refused("stabilisation=1 is outside", make, stabilisation=1)
    refused("history_guidance=-1 is outside", make, history_guidance=-1)
    call = functools.partial(jax.eval_shape, FN, params_of()[0])
    t = np.ones((BATCH, 6), np.float32)
    refused(r"\[batch, frame, 4, 4, 1\]", call, FRAMES[:, :, 1:], t, ACTIONS[:, :6])
    refused(r"\(3, 6\)", call, FRAMES, t[:, 1:], ACTIONS[:, :6])
    apply = functools.partial(FN, params_of()[0])
    refused("needs keys", apply, FRAMES[:, 0], method="start")
    refused("give integers", apply, 1.0 * ACTIONS, method="prepare", error=TypeError)
    for wrong in (ACTIONS[..., 0], ACTIONS[..., [0, 1, 0]]):
        refused(r"give \(x, y\), \[batch, time, 2\]", apply, wrong, method="prepare")
    codes = models.functional(make(num_actions=5))
    table = {**params_of()[0], "action_codes": np.zeros((5, 8), np.float32)}
    refused("actions=5 is outside", codes, table, np.full((1, 2), 5), method="prepare")
    batch = {"frames": FRAMES, "actions": ACTIONS}
    refused(
        "no part of frames=7", diffusion_forcing.loss, {}, FN, batch, KEYS, frames=7
    )
    part = functools.partial(diffusion_forcing.loss, {}, FN, frames=WINDOW)
    fewer = {"frames": FRAMES, "actions": ACTIONS[:, :5]}
    refused("give an action for every frame", part, fewer, KEYS)
