import functools

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import envs
from tmdjax.core import prng
from tmdjax.systems.fpo import FPO, RELEASED_NORMALISER
from tmdjax.train import on_policy

BATCH = 32
KEYS = prng.sample_keys(jax.random.key(7), BATCH)
loss_of, losses = (jax.jit(f, static_argnums=0) for f in (FPO.loss, FPO.losses))


@functools.cache
def made(**options):
    method = FPO(hidden=(16, 16), steps=5, pairs=4, **options)

    @jax.jit
    def begin(key):
        seen = jax.random.normal(jax.random.key(1), (BATCH, 3))
        params = method.init(key, seen[:1], 2)
        action, record = method.act(params, seen, KEYS)
        advantage = jax.random.normal(jax.random.key(2), (BATCH,))
        return params, on_policy.Samples(seen, record, advantage), action

    return method, *begin(jax.random.key(0))


@pytest.mark.parametrize("ratio", ["mean", "per_sample"])
@pytest.mark.parametrize("error", ["noise", "velocity"])
def test_11_equal_parameters_give_a_ratio_of_one(ratio, error):
    method, params, samples, _ = made(ratio=ratio, error=error)
    loss, metrics = loss_of(method, params, params, samples, KEYS, {"clip_range": 0.05})
    assert np.max(metrics["ratio_error"]) < 1e-6
    assert_allclose(loss, -np.asarray(samples.advantage), rtol=1e-5, atol=1e-6)


def test_11_the_two_errors_differ_by_a_power_of_time():
    noise, params, samples, _ = made()
    velocity = made(error="velocity")[0]
    record, seen = samples.record, samples.observation
    ours, theirs = (losses(m, params, seen, record) for m in (noise, velocity))
    weight = (1 - np.asarray(record["t"])) ** 2
    assert_allclose(ours, weight * theirs, rtol=1e-4, atol=1e-6)


def test_times_are_those_of_the_solver_and_actions_are_squashed():
    *_, samples, action = made(bound=3.0)
    t = np.unique(np.asarray(samples.record["t"]))
    assert_allclose(t, [0.2, 0.4, 0.6, 0.8, 1.0], atol=1e-6)
    assert_allclose(action, 3 * np.tanh(samples.record["action"]), rtol=1e-5)
    free = made(squash=False)
    assert_array_equal(free[3], free[2].record["action"])


def test_ratios_by_hand():
    method, params, samples, _ = made()
    new = jax.tree.map(lambda x: x + 0.05, params)
    now = np.asarray(losses(method, new, samples.observation, samples.record))
    fallen, a = samples.record["loss"] - now, np.asarray(samples.advantage)[:, None]
    each = made(ratio="per_sample")[0]
    for used, r in (
        (method, np.exp(fallen.mean(1, keepdims=True))),
        (each, np.exp(np.clip(fallen, -3, 3))),
    ):
        loss, _ = loss_of(used, new, params, samples, KEYS, {"clip_range": 0.1})
        expected = np.maximum(-a * r, -a * np.clip(r, 0.9, 1.1)).mean(1)
        assert_allclose(loss, expected, rtol=1e-4)


@pytest.mark.slow
def test_as_released_the_first_ratio_is_off_and_mended_it_is_one():
    method = FPO(hidden=(16,), steps=3, pairs=2, bound=5.0)
    common = {"unroll": 8, "epochs": 1, "minibatches": 2, "max_ratio_error": None}

    def first_ratio_error(**options):
        settings = on_policy.ControlSettings(critic_hidden=(16,), **common, **options)
        vector = envs.Vector(envs.MultiGoal(), 16)
        trainer = on_policy.make_trainer(vector, method, settings)
        run = on_policy.jit_iterations(trainer, 3)
        _, metrics = run(trainer.init(jax.random.key(0)), jax.random.key(0))
        return np.asarray(metrics["first_ratio_error"])

    assert first_ratio_error(normalise="running").max() < 1e-5
    assert first_ratio_error(normalise=RELEASED_NORMALISER)[0] > 1e-3


def test_bad_settings(refused):
    refused("pairs=0", FPO, pairs=0)
    unknown = functools.partial(FPO, error="eps")
    refused("error='eps' is not one of 'noise', 'velocity'", unknown)
    refused("Did you mean 'mean'", FPO, ratio="means")
    refused("bound=0.0 is outside", FPO, bound=0.0)
