"""Training and judging of world models; numbers are those of the sheet's invariants."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import lowered
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import data, metrics, models, train
from tmdjax.core import prng
from tmdjax.domains.blocks.videos import BlockWorld, block_videos
from tmdjax.domains.torus.videos import TorusWorld
from tmdjax.systems import flow_equivariant as system
from tmdjax.train import world_models

MODULE = models.TorusMap(world=6, window=4, hidden=2, implementation="native")
FN = models.functional(MODULE)
CONTEXT, LENGTH, BATCH = 3, 3, 2
CONFIG = world_models.RolloutConfig(context=CONTEXT)
# a clip of the state so large changes nothing
FORCED = dataclasses.replace(CONFIG, teacher_forcing=1.0, state_clip=1e6)
KEYS = prng.sample_keys(jax.random.key(5), BATCH)


def videos(time):
    rng = np.random.default_rng(0)
    frames = rng.random((BATCH, time, 4, 4, 1)).astype(np.float32)
    actions = rng.integers(-2, 3, (BATCH, time, 2)).astype(np.int32)
    return {"frames": frames, "actions": actions}


LONG = 30
BATCH_OF = videos(time=CONTEXT + LONG)
SHORT = {name: array[:, : CONTEXT + LENGTH] for name, array in BATCH_OF.items()}
PARAMS = {
    name: jnp.float32(np.random.default_rng(6).uniform(-1, 1, shape) / 3)
    for name, shape in {
        "decoder_0": (3, 3, 2, 2),
        "decoder_out": (3, 3, 2, 1),
        "encoder": (3, 3, 1, 2),
        "memory": (3, 3, 2, 2),
    }.items()
}


@functools.partial(jax.jit, static_argnames=("config", "length"))
def roll(params, frames, actions, config, length=None):
    return world_models.rollout(
        params, FN, frames, actions, config, length=length, keys=KEYS
    )


def frames_of(batch, config=CONFIG):
    found = roll(PARAMS, batch["frames"], batch["actions"], config)
    return np.asarray(found.outputs["frame"])


def test_11_gradients_are_differences(x64):
    """Of every kernel, through the context and through frames that are fed back."""
    to64 = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float64))
    params = to64(PARAMS)
    batch = {"frames": to64(SHORT["frames"]), "actions": jnp.asarray(SHORT["actions"])}

    def mean(params, detach=False):
        config = world_models.RolloutConfig(
            context=CONTEXT, detach_feedback=detach, remat_steps=None
        )
        return world_models.loss(params, FN, batch, KEYS, config)[0].mean()

    @jax.jit
    def slopes(params, directions):
        moved = [
            {**params, name: params[name] + h * direction}
            for name, direction in directions.items()
            for h in (1e-6, -1e-6)
        ]
        ends = jax.lax.map(mean, jax.tree.map(lambda *x: jnp.stack(x), *moved))
        ways = {**jax.tree.map(jnp.zeros_like, params), "memory": directions["memory"]}
        detached = jax.jvp(lambda p: mean(p, True), (params,), (ways,))[1]
        return ends.reshape(-1, 2), jax.grad(mean)(params), detached

    rng = np.random.default_rng(1)
    directions = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)
    ends, gradient, detached = jax.device_get(slopes(params, directions))
    for (high, low), (name, direction) in zip(ends, directions.items(), strict=True):
        assert gradient[name].dtype == np.float64
        slope = np.vdot(gradient[name], direction)
        assert_allclose(slope, (high - low) / 2e-6, rtol=1e-6, err_msg=name)
    slope = np.vdot(gradient["memory"], directions["memory"])
    assert abs(slope / detached - 1) > 1e-3


def test_12_a_rollout_is_its_steps():
    """30 steps in one scan are those taken one by one."""
    batch, frames = BATCH_OF, frames_of(BATCH_OF)
    assert frames.shape == (30, BATCH, 4, 4, 1)

    @functools.partial(jax.jit, static_argnames="method")
    def call(*inputs, method):
        return FN(PARAMS, *inputs, method=method)

    time = np.swapaxes(batch["frames"], 0, 1), np.swapaxes(batch["actions"], 0, 1)
    state = call(time[0][0], method="start")
    for t in range(CONTEXT):
        action = time[1][t] * (t > 0)  # 17: the first one is ignored
        state = call(state, time[0][t], action, method="observe")
    for t in range(30):
        state, frame = call(state, time[1][CONTEXT + t], method="predict")
        assert_allclose(frames[t], frame, atol=1e-6)
        state = call(state, frame, method="feed")


def test_12_the_future_has_no_influence():
    frames = frames_of(BATCH_OF)
    changed = {name: np.array(array) for name, array in BATCH_OF.items()}
    changed["frames"][:, CONTEXT:] = np.nan
    changed["actions"][:, CONTEXT + 2 :] += 1
    changed["actions"][:, 0] += 1
    others = frames_of(changed)
    assert_array_equal(others[:2], frames[:2])
    assert np.abs(others[2] - frames[2]).max() > 1e-4
    # forced, a frame is known when it has been predicted and not before
    taught = frames_of(BATCH_OF, FORCED)
    assert_array_equal(taught[0], frames[0])
    other = {**BATCH_OF, "frames": np.array(BATCH_OF["frames"])}
    other["frames"][:, CONTEXT + 1] += 1
    moved = frames_of(other, FORCED)
    assert_array_equal(moved[:2], taught[:2])
    assert np.abs(moved[2] - taught[2]).max() > 1e-4


@pytest.mark.slow
def test_half_of_the_frames_are_forced():
    """Each sample draws for itself: its rows are those of always and of never."""
    config = dataclasses.replace(CONFIG, teacher_forcing=0.5)
    batch = {name: jnp.asarray(a[:1].repeat(64, 0)) for name, a in BATCH_OF.items()}
    keys = prng.sample_keys(jax.random.key(5), 64)
    found = jax.jit(
        functools.partial(world_models.rollout, config=config), static_argnums=1
    )(PARAMS, FN, **batch, keys=keys)
    second = np.asarray(found.outputs["frame"])[1]
    always = frames_of(BATCH_OF, dataclasses.replace(config, teacher_forcing=1.0))
    sides = [
        np.isclose(second, one[1, :1], atol=1e-6).all((1, 2, 3))
        for one in (always, frames_of(BATCH_OF))
    ]
    assert (sides[0] ^ sides[1]).all() and 16 < sides[0].sum() < 48


def test_what_is_fed_back_is_clipped():
    """As if the clipped predictions were true; a loop that grows is told to break."""
    clipped = dataclasses.replace(CONFIG, feedback_clip=(0.0, 1.0))
    believed = frames_of(BATCH_OF, clipped)
    assert believed.min() < -0.01 and np.isfinite(believed).all()
    truth = np.swapaxes(np.clip(believed, 0, 1), 0, 1)
    seen = np.concatenate([BATCH_OF["frames"][:, :CONTEXT], truth], 1)
    told = frames_of({**BATCH_OF, "frames": seen}, FORCED)
    assert_allclose(told, believed, atol=1e-5)
    params = jax.tree.map(lambda leaf: 4 * np.abs(leaf), PARAMS)
    batch = BATCH_OF
    given = params, batch["frames"], batch["actions"]
    free = roll(*given, config=CONFIG)
    assert free.failed.all() and (free.first_bad < 30).all()
    errors = world_models.frame_errors(
        free.outputs["frame"], jnp.asarray(batch["frames"][:, CONTEXT:])
    )
    table = metrics.horizon_errors(errors, [(0, 1), (0, 31)])
    assert table["failed"] == 1 and np.isnan(table["mean_1_30"])
    assert not any("31" in name for name in table)
    good = np.asarray(free.outputs["amplitude"])[: int(free.first_bad.min())]
    assert (good <= CONFIG.state_bound).all()
    quiet = jax.tree.map(lambda leaf: leaf / 20, params)
    kept = roll(quiet, *given[1:], config=clipped)
    assert not kept.failed.any()
    errors = world_models.frame_errors(
        kept.outputs["frame"], jnp.asarray(batch["frames"][:, CONTEXT:])
    )
    table = metrics.horizon_errors(errors, [(0, 20), (20, 50)])
    assert table["failed"] == 0 and table["mean_1_20"] > 0
    assert table["growth"] == pytest.approx(1, abs=0.5)


def test_a_clipped_state_does_not_break():
    """What grew without bound stays at the clip, frame by frame and in the context."""
    params = jax.tree.map(lambda leaf: 4 * np.abs(leaf), PARAMS)
    config = dataclasses.replace(CONFIG, state_clip=2.5)
    found = roll(params, BATCH_OF["frames"], BATCH_OF["actions"], config)
    assert not found.failed.any() and (found.outputs["amplitude"] == 2.5).all()


def test_the_gradient_passes_through_the_clip():
    """Clipped to almost one value, fed-back frames still have a gradient."""
    narrow = world_models.RolloutConfig(
        context=CONTEXT, feedback_clip=(0.0, 1e-9), remat_steps=None
    )
    detached = dataclasses.replace(narrow, detach_feedback=True)

    @jax.jit
    def slopes(params, batch):
        def total(scale, config):
            scaled = {**params, "decoder_out": scale * params["decoder_out"]}
            return world_models.loss(scaled, FN, batch, KEYS, config)[0].sum()

        return [
            jax.jvp(functools.partial(total, config=config), (1.0,), (1.0,))
            for config in (narrow, detached)
        ]

    (value, slope), (same, other) = slopes(PARAMS, SHORT)
    assert_allclose(value, same, rtol=1e-6)
    assert abs(slope / other - 1) > 1e-4


def test_losses_count_what_is_predicted():
    @jax.jit
    def losses(params, *batches):
        return [world_models.loss(params, FN, b, KEYS, CONFIG) for b in batches]

    first = {name: array[:, : CONTEXT + 1] for name, array in SHORT.items()}
    (loss, found), (short, _) = losses(PARAMS, SHORT, first)
    frames = np.swapaxes(frames_of(BATCH_OF)[:LENGTH], 0, 1)
    errors = (frames - SHORT["frames"][:, CONTEXT:]) ** 2
    assert_allclose(loss, errors.mean((1, 2, 3, 4)), rtol=1e-5)
    assert_allclose(found["last_error"], errors[:, -1].mean((1, 2, 3)), rtol=1e-5)
    assert_allclose(short, errors[:, 0].mean((1, 2, 3)), rtol=1e-5)
    assert_allclose(found["first_error"], short, rtol=1e-6)


def test_growing_horizons():
    grown = [
        world_models.growing_horizon(p, (8, 20, 50)) for p in (0, 0.3, 0.4, 0.9, 1)
    ]
    assert grown == [8, 8, 20, 50, 50]


def test_videos_grow_and_go_on_from_their_position():
    rows = {"frames": np.arange(28)[:, None] + np.zeros((28, 9)), "actions": np.eye(28)}

    def videos():
        return world_models.GrowingVideos(data.in_memory(rows, 4), 2, (1, 3), 5)

    first, other = videos(), videos()
    seen = [next(first) for _ in range(7)]
    assert [b["frames"].shape for b in seen] == [(4, 3)] * 3 + [(4, 5)] * 4
    assert [b["actions"].shape[1] for b in seen] == [3] * 3 + [5] * 4
    assert len({x for b in seen for x in b["frames"][:, 0]}) == 28
    for _ in range(2):
        next(other)
    state = json.loads(json.dumps(other.get_state()))
    again = videos()
    again.set_state(state)
    for batch in seen[2:]:
        assert_array_equal(next(again)["frames"], batch["frames"])


def test_trivial_predictions():
    frames = np.zeros((1, 3, 4, 4, 1), np.float32)
    frames[0, 0] = 1
    frames[0, 1, 3, 0] = 1  # the last one seen: row 3, column 0
    actions = np.array([[[9, 9], [9, 9], [-2, 1], [5, 2], [0, 1]]])
    frames, actions = jnp.asarray(frames), jnp.asarray(actions)
    found = jax.jit(
        functools.partial(world_models.trivial_predictions, context=2, world=6)
    )(frames, actions)
    assert found["zero"].shape == (3, 1, 4, 4, 1) and not found["zero"].any()
    assert_allclose(found["mean"][1, 0], (frames[0, 0] + frames[0, 1]) / 2)
    places = [np.argwhere(np.asarray(frame[0, ..., 0])) for frame in found["shifted"]]
    # moved by (2, -1); then by (-3, -3), to row 0 and column 3; then out of view
    assert [p.tolist() for p in places] == [[[2, 2]], [[0, 3]], []]
    still = world_models.trivial_predictions(frames, actions, 2)["shifted"]
    assert_array_equal(still, frames[None, :, 1].repeat(3, 0))


def squares_that_drift():
    """A training step on them, its first state, and the batch."""
    drifting = {"velocities": ((1, 0),), "kernel_size": 1}
    module = models.TorusMap(world=6, window=6, hidden=8, **drifting)
    fn, config = models.functional(module), world_models.RolloutConfig(context=3)
    optimizer = train.make_optimizer(train.OptimizerConfig(learning_rate=1e-2))
    frames = np.zeros((8, 5, 6, 6, 1), np.float32)
    for i in range(8):
        square = np.zeros((6, 6, 1), np.float32)
        square[i % 3 : i % 3 + 2, :2] = 1
        for t in range(5):
            frames[i, t] = np.roll(square, t, 1)
    batch = {
        "frames": jnp.asarray(frames),
        "actions": jnp.zeros((8, 5, 2), jnp.int32),
    }

    def loss(params, batch, keys):
        return world_models.loss(params, fn, batch, keys, config)

    update = jax.jit(train.make_train_step(loss, optimizer))
    inputs = frames[:, 0], np.zeros((8, 2), np.int32)

    def first(key):
        params = module.lazy_init(key, *map(jnp.asarray, inputs))["params"]
        return train.create_state(dict(params), optimizer)

    return update, first, batch


def test_the_training_step_runs_on_accelerators():
    update, first, batch = squares_that_drift()
    key = jax.random.key(0)
    lowered(update, jax.eval_shape(first, key), batch, key)


@pytest.mark.slow
def test_it_learns():
    """The loss falls below that of black, of the mean, and of what was seen last."""
    update, first, batch = squares_that_drift()
    state, losses = jax.jit(first)(jax.random.key(0)), []
    for _ in range(60):
        state, found = update(state, batch, jax.random.key(1))
        losses.append(float(found["loss"]))
    trivial = world_models.trivial_predictions(*batch.values(), context=3)
    for frame in trivial.values():
        rival = np.mean(world_models.frame_errors(frame, batch["frames"][:, 3:]))
        assert np.mean(losses[-5:]) < 0.8 * rival


@pytest.mark.slow
def test_a_walk_is_learned_and_rolled_out():
    """Rooms with blocks: the loss of a small map falls, and its rollouts hold.

    The mixing has no gate: trained so little it doubles the map in every step. Without
    it layer norm and gate bound what is written.
    """
    world = BlockWorld(room=4, blocks=1, image_size=8, context=6, predicted=3)
    sizes = dict(hidden=16, depth=1, decoder_depth=1, heads=2, mixing="none")
    module = models.EgocentricMap(world=3, image_size=8, patch_size=4, **sizes)
    system.check_world(module, world)
    fn = models.functional(module)
    config = world_models.RolloutConfig(context=6, teacher_forcing=0.125)
    optimizer = train.make_optimizer(train.OptimizerConfig(learning_rate=3e-3))
    sample = jax.jit(functools.partial(block_videos, world=world))(
        prng.sample_keys(jax.random.key(0), 4)
    )
    batch = {name: sample[name] for name in ("frames", "actions")}

    def loss(params, batch, keys):
        return world_models.loss(params, fn, batch, keys, config)

    update = jax.jit(train.make_train_step(loss, optimizer))
    inputs = batch["frames"][:, 0], batch["actions"][:, 0]
    params = models.init_params(module, jax.random.key(0), *inputs)
    state, losses = train.create_state(params, optimizer), []
    for _ in range(60):
        state, found = update(state, batch, jax.random.key(1))
        losses.append(float(found["loss"]))
    assert np.mean(losses[-5:]) < 0.3 * losses[0]
    free = world_models.RolloutConfig(context=6, feedback_clip=(0.0, 1.0))
    actions = jnp.tile(batch["actions"], (1, 10))
    found = world_models.rollout(
        state.params, fn, batch["frames"], actions, free, length=80
    )
    assert not found.failed.any()


def test_published_settings():
    """Typed from the sheet, not from the preset."""
    setup = system.preset("torus")
    module, world = setup.module, setup.world
    assert (module.world, module.window, module.hidden) == (50, 32, 64)
    assert len(module.velocities) == 25 and module.feedback == "stale"
    assert module.window_padding == "circular" and module.self_motion == "shift"
    assert (world.world, world.window, world.digits) == (50, 32, 5)
    assert (world.context, world.predicted, world.camera_step) == (50, 20, 10)
    assert (
        setup.config == world_models.RolloutConfig(context=50)
        and setup.batch_size == 32
    )
    assert setup.config.feedback_clip is None and not setup.config.teacher_forcing
    assert setup.optimizer == train.OptimizerConfig(
        name="adam", learning_rate=1e-4, b1=0.9, b2=0.999, clip_norm=1.0
    )
    setup = system.preset("blocks")
    module, world = setup.module, setup.world
    assert (module.hidden, module.depth, module.decoder_depth) == (256, 6, 6)
    assert (module.image_size, module.patch_size, module.side) == (128, 16, 33)
    assert len(module.velocities) == 5 and module.mixing == "grouped"
    assert (world.room, world.blocks, world.view_degrees) == (16, 6, 60)
    assert (world.context, world.predicted, setup.batch_size) == (50, 90, 16)
    assert setup.config == world_models.RolloutConfig(context=50, teacher_forcing=0.125)
    assert setup.optimizer == train.OptimizerConfig(
        name="adamw", learning_rate=1e-4, b2=0.99, weight_decay=1e-3, clip_norm=1.0
    )


def test_bad_inputs(refused):
    config = world_models.RolloutConfig
    refused("context=0 leaves no frame to feed back", config, context=0)
    refused("teacher_forcing=2 is outside", config, teacher_forcing=2)
    refused("feedback_clip, upper=0 is outside", config, feedback_clip=(1, 0))
    refused("state_bound=0 is outside", config, state_bound=0)
    refused("state_clip=0 is outside", config, state_clip=0)
    growing = functools.partial(world_models.GrowingVideos, None, CONTEXT)
    refused("must not decrease", growing, (5, 3), 9)
    refused("steps=0 must be at least 1", growing, (3,), 0)
    frames, actions = SHORT["frames"], SHORT["actions"]
    go = functools.partial(world_models.rollout, PARAMS, FN)
    refused("2 frames are given, fewer than", go, frames[:, :2], actions, CONFIG)
    refused(
        "6 actions are given; to predict 9 frames after 3 takes 12",
        go,
        frames,
        actions,
        CONFIG,
        length=9,
    )
    forced = config(context=CONTEXT, teacher_forcing=0.5)
    refused("needs keys", go, frames, actions, forced)
    refused(
        "needs keys and 6 frames; got 4", go, frames[:, :4], actions, forced, keys=KEYS
    )
    refused("whole pixels", go, frames, 0.5 * actions, CONFIG, error=TypeError)
    refused("of every frame", go, frames, actions[..., :1], CONFIG)
    refused("window is", go, frames[:, :, 1:], actions, CONFIG)
    keeps = lambda params, given, *rest, method: (  # noqa: E731
        given if method == "prepare" else jnp.zeros(BATCH, int)
    )
    words = "state has no array of floats"
    whole = functools.partial(world_models.rollout, PARAMS, keeps, frames)
    refused(words, whole, actions, CONFIG, error=TypeError)
    seen = {name: array[:, :CONTEXT] for name, array in SHORT.items()}
    given = PARAMS, FN, seen, KEYS, CONFIG
    refused("3 frames, none of them after the context", world_models.loss, *given)
    pixels = (255 * frames).astype(np.uint8)
    refused("frames / 255", go, pixels, actions, CONFIG, error=TypeError)
    predicted = np.zeros((3, BATCH, 4, 4, 1))
    refused("they must agree", world_models.frame_errors, predicted, frames[:, :1])
    refused("must not decrease", world_models.growing_horizon, 0, (5, 3))
    refused("progress=2 is outside", world_models.growing_horizon, 2, (3,))
    refused(
        "network has world=6, the data world=8",
        system.check_world,
        MODULE,
        TorusWorld(world=8, window=8),
    )
    refused(
        "the data window=6", system.check_world, MODULE, TorusWorld(world=6, window=6)
    )
    small = models.EgocentricMap(world=3, image_size=8, patch_size=4)
    fit = functools.partial(system.check_world, small)
    fit(BlockWorld(room=4, image_size=8))
    refused("a room of 5 4 from its corner; build", fit, BlockWorld(room=5))
    refused(
        "image_size=8, the data image_size=16", fit, BlockWorld(room=4, image_size=16)
    )
    for name, kind in (("blocks", "EgocentricMap"), ("torus", "TorusMap")):
        wrong = MODULE if name == "blocks" else small
        words = f"build a {kind}"
        refused(words, system.preset, name, module=wrong, error=TypeError)
        world = TorusWorld() if name == "blocks" else BlockWorld()
        words = f"world is a {type(world).__name__}, and preset='{name}'"
        refused(words, system.preset, name, world=world, error=TypeError)
    rival = models.RSSM(image_size=32)  # it has no map
    assert system.preset("torus", module=rival).module == rival
    refused("preset='tours'.*'torus'", system.preset, "tours")
    refused("no setting 'wrld'", system.preset, "torus", wrld=1, error=TypeError)
    with pytest.warns(UserWarning, match="up to 7 pixels lead around a torus of 6"):
        FN(PARAMS, 7 + 0 * actions, method="prepare")
