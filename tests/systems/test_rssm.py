"""A recurrent state-space model: its losses, and what it goes on with."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import drawn, lowered, same
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import rel_entr

from tmdjax import models, train
from tmdjax.core import prng
from tmdjax.systems import rssm
from tmdjax.train import world_models

SIZE, BATCH, TIME = 4, 3, 3
TINY = models.RSSM(image_size=SIZE, hidden=6, width=8, groups=2, classes=3)
FN = models.functional(TINY)
KEYS = prng.sample_keys(jax.random.key(3), BATCH)
RNG = np.random.default_rng(0)
FRAMES = np.float32(RNG.random((BATCH, TIME, SIZE, SIZE, 1)))
ACTIONS = np.int32(RNG.integers(-2, 3, (BATCH, TIME + 4, 2)))
BATCH_OF = {"frames": FRAMES, "actions": ACTIONS[:, :TIME]}
FREE = (0.5, 0.1, 1e3)
"""Weights of the two divergences, and free nats that neither divergence reaches."""


@functools.cache
def params_of():
    """None of them 0, so that everything matters."""
    given = jax.random.key(0), FRAMES[:, 0], ACTIONS[:, 0], KEYS
    first = drawn(jax.eval_shape(lambda: models.init_params(TINY, *given)))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: np.float32(p + 0.3 * rng.normal(size=p.shape)), first)


@functools.partial(jax.jit, static_argnames="method")
def call(params, *inputs, method):
    return FN(params, *inputs, method=method)


@jax.jit
def step(params, state, frame, action):
    """A frame is seen; the state after it, and all that is known of it."""
    seen = FN(params, frame, method="encode")
    state, found = FN(params, state, seen, action, method="infer")
    found["frame"] = FN(params, found["features"], method="decode")
    return state, found | {"latent": state.latent}


def infer(params, batch):
    """The steps of a video one by one."""
    actions = np.asarray(call(params, batch["actions"], method="prepare"))
    state, found = call(params, batch["frames"][:, 0], KEYS, method="start"), []
    for t in range(batch["frames"].shape[1]):
        state, one = step(params, state, batch["frames"][:, t], actions[:, t])
        found.append(one)
    return jax.tree.map(lambda *x: np.stack(x), *found)


def losses(params, batch, settings):
    """Mean loss under each of the settings, and what the last ones tell."""
    names = ("dynamics_weight", "representation_weight", "free_nats")
    found = [
        rssm.loss(params, FN, batch, KEYS, **dict(zip(names, given)))
        for given in settings
    ]
    return jnp.stack([loss.mean() for loss, _ in found]), found[-1]


@jax.jit
def gradients(params, batch):
    """Of the mean loss: of the representation alone, of the dynamics alone, of none."""
    settings = (0.0, 0.1, 0.0), (0.5, 0.0, 0.0), FREE
    rows = jax.jacrev(losses, has_aux=True)(params, batch, settings)[0]
    return [jax.tree.map(lambda row, i=i: row[i], rows) for i in range(len(settings))]


def test_the_loss_is_the_sum_of_its_terms():
    found = jax.device_get(infer(params_of(), BATCH_OF))
    target = np.swapaxes(FRAMES, 0, 1)
    error = np.square(found["frame"] - target).sum((2, 3, 4)).mean(0)
    prior, posterior = (np.exp(found[name]) for name in ("prior", "posterior"))
    assert_allclose(prior.sum(-1), 1, rtol=1e-5)
    assert prior.min() > 0.9 * 0.01 / 3  # no class is excluded
    kl = rel_entr(posterior, prior).sum((2, 3)).mean(0)
    assert kl.min() > 1e-3
    settings = (0.5, 0.1, 0.0), FREE
    given = params_of(), BATCH_OF, settings
    means, (loss, told) = jax.jit(losses, static_argnums=2)(*given)
    for mean, (dynamics, representation, free) in zip(means, settings):
        apart = kl.mean() if free == 0 else free
        assert_allclose(
            mean, error.mean() + (dynamics + representation) * apart, rtol=1e-5
        )
    assert_allclose(loss, error + 600, rtol=1e-5)
    assert_allclose(told["kl"], kl, rtol=1e-4)
    assert_allclose(told["error"], error / SIZE**2, rtol=1e-5)
    # drawn classes, one in each group
    assert_array_equal(
        np.sort(found["latent"], -1).round(5), [[[[0, 0, 1]] * 2] * 3] * TIME
    )


ONE = {name: array[:, :1] for name, array in BATCH_OF.items()}
"""Of one frame, prior and posterior know nothing of each other."""


def test_nothing_is_learned_of_a_posterior_that_is_the_prior():
    """It does not read the frame: no divergence, so no gradient of either."""
    params = jax.tree.map(np.array, params_of())
    head = params["posterior_hidden"]
    head["kernel"][6:] = 0  # what comes from the frame
    head["kernel"][:6] = params["prior_hidden"]["kernel"]
    head["bias"] = params["prior_hidden"]["bias"]
    params["posterior_output"] = params["prior_output"]
    found = jax.device_get(infer(params, ONE))
    assert_array_equal(found["prior"], found["posterior"])
    for gradient in gradients(params, ONE):
        assert_allclose(gradient["prior_output"]["bias"], 0, atol=1e-7)


def test_each_divergence_moves_its_own_side():
    each = jax.device_get(gradients(params_of(), ONE))
    for name in ("prior_hidden", "prior_output"):
        representation, dynamics, neither = (g[name]["bias"] for g in each)
        assert np.abs(dynamics).max() > 1e-4
        assert not representation.any() and not neither.any()
    representation, dynamics, neither = (g["posterior_output"]["bias"] for g in each)
    assert_allclose(dynamics, neither, rtol=1e-4, atol=1e-7)
    assert np.abs(representation - neither).max() > 1e-4
    # through what was drawn, the error reaches what reads the frame
    assert np.abs(each[-1]["patch_embedding"]["kernel"]).max() > 1e-4


def test_a_rollout_reads_no_frame_after_the_context():
    """And it is the same whatever it is fed; samples draw for themselves."""
    config = world_models.RolloutConfig(context=TIME, feedback_clip=(0.4, 0.5))

    roll = jax.jit(
        functools.partial(world_models.rollout, config=config), static_argnums=1
    )
    given = params_of(), FN, FRAMES, ACTIONS
    params = given[0]
    found = roll(*given, keys=KEYS)
    frames = np.asarray(found.outputs["frame"])
    assert not found.failed.any() and frames.shape == (4, BATCH, SIZE, SIZE, 1)
    state = call(params, FRAMES[:, 0], KEYS, method="start")
    actions = np.asarray(call(params, ACTIONS, method="prepare"))
    for t in range(TIME):
        state = call(params, state, FRAMES[:, t], actions[:, t], method="observe")
    for t in range(4):
        state, frame = call(params, state, actions[:, TIME + t], method="predict")
        assert_allclose(frames[t], frame, atol=1e-5)
        assert 0 < np.abs(state.hidden).max() < 1
    other = roll(*given, keys=KEYS[::-1]).outputs["frame"]
    assert np.abs(other - frames).max() > 1e-3


def test_what_is_fed_back_is_not_read():
    state = call(params_of(), FRAMES[:, 0], KEYS, method="start")
    same(call(params_of(), state, FRAMES[:, 1], method="feed"), state)


@functools.cache
def update_of(module):
    def loss(params, batch, keys):
        return rssm.loss(params, models.functional(module), batch, keys)

    optimizer = train.make_optimizer(train.OptimizerConfig(learning_rate=3e-3))
    return jax.jit(train.make_train_step(loss, optimizer)), optimizer


def test_the_training_step_runs_on_accelerators():
    update, optimizer = update_of(TINY)
    state = jax.eval_shape(lambda: train.create_state(params_of(), optimizer))
    lowered(update, state, BATCH_OF, jax.random.key(0))


@pytest.mark.slow
def test_it_learns_and_is_rolled_out_as_a_world_model():
    """Which of three dots a video shows only its first frames say."""
    module = dataclasses.replace(TINY, hidden=32, width=32)
    dot = np.zeros((BATCH, TIME + 4, SIZE, SIZE, 1), np.float32)
    for i in range(BATCH):
        dot[i, :, i, i] = 1
    batch = {"frames": jnp.asarray(dot), "actions": jnp.asarray(0 * ACTIONS)}
    update, optimizer = update_of(module)
    inputs = dot[:, 0], batch["actions"][:, 0], KEYS
    params = models.init_params(module, jax.random.key(0), *inputs)
    state = train.create_state(params, optimizer)
    for _ in range(300):
        state, told = update(state, batch, jax.random.key(1))
    assert told["error"] < 0.25 * np.mean(dot**2)
    found = world_models.rollout(
        state.params, models.functional(module), batch["frames"][:, :TIME],
        batch["actions"], world_models.RolloutConfig(context=TIME), keys=KEYS,
    )  # fmt: skip
    error = world_models.frame_errors(found.outputs["frame"], batch["frames"][:, TIME:])
    assert np.median(error) < 0.5 * np.mean(dot**2)


def test_bad_inputs(refused):
    make = functools.partial(dataclasses.replace, TINY)
    refused("patch_size=3 does not divide", make, patch_size=3)
    refused("classes=1 must be at least 2", make, classes=1)
    refused("uniform=0 is outside", make, uniform=0)
    refused("hidden=0 must be at least 1", make, hidden=0)
    apply = functools.partial(FN, params_of())
    refused("needs keys", apply, FRAMES[:, 0], method="start")
    refused(r"\[..., 4, 4, 1\]", apply, FRAMES[:, 0, 1:], KEYS, method="start")
    refused("give integers", apply, 1.0 * ACTIONS, method="prepare", error=TypeError)
    for wrong in (ACTIONS[..., 0], ACTIONS[..., [0, 1, 0]]):
        refused(r"give \(x, y\), \[batch, time, 2\]", apply, wrong, method="prepare")
    longer = {**BATCH_OF, "actions": ACTIONS}
    refused("give an action for every frame", rssm.loss, {}, FN, longer, KEYS)
    for name in ("free_nats", "dynamics_weight", "representation_weight"):
        refused(
            f"{name}=-1 is outside", rssm.loss, {}, FN, BATCH_OF, KEYS, **{name: -1}
        )
