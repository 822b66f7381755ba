"""The distillation cycle (TMD sheet, section 6: 9, 12, 13, 14), on Gaussians."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import flows, train
from tmdjax.core import prng

TEACHER = flows.gaussian_mixture([1.0], [[0.7, -0.3]], [0.5])


def teacher(params, x, t, cond):
    """Exact for one Gaussian; the condition shifts it, its features are its input."""
    shift = 0 if cond is None else cond
    velocity = TEACHER.velocity(x - (1 - t)[:, None] * shift, t) - shift
    return params["scale"] * velocity, (x,)


def score(params, x, t, cond):
    h = jnp.concatenate([x, t[:, None]], -1)
    h = jnp.tanh(h @ params["a"])
    return h @ params["b"], (h,)


def generate(params, batch, keys):
    return prng.normal(keys, (2,)) * params["std"] + params["mean"]


def discriminator(params, features):
    return features[0] @ params["w"]


LEVELS = []
"""What the teacher of the cycle is asked at."""
FROZEN = {"scale": jnp.ones(())}
GENERATOR = {"mean": jnp.array([-1.0, 1.0]), "std": jnp.ones(2)}
_RNG = np.random.default_rng(0)
_A, _B = _RNG.normal(size=(3, 32)), 0.1 * _RNG.normal(size=(32, 2))
CRITIC = {
    "score": {"a": jnp.asarray(_A, jnp.float32), "b": jnp.asarray(_B, jnp.float32)},
    "discriminator": {"w": jnp.zeros((2, 1))},
}
LOUD = {**CRITIC, "discriminator": {"w": jnp.array([[0.7], [-0.4]])}}
"""A critic whose discriminator says something."""
NETWORKS = train.Networks(teacher, score, discriminator)
plain = functools.partial(train.DistillationConfig, guidance=1.0)
PLAIN = plain(shift=1.0)
KEYS = jax.random.split(jax.random.key(3), 16)
BATCH = {"x_data": jnp.asarray(0.5 * _RNG.normal(size=(16, 2)), jnp.float32)}
CONDITIONED = {**BATCH, "cond": jnp.full((16, 2), 0.4)}
NULL = np.zeros(2, np.float32)
RULES = tuple(
    train.make_optimizer(train.OptimizerConfig(name="adam", learning_rate=rate))
    for rate in (1e-2, 2e-2)
)


def method(config=PLAIN, networks=NETWORKS, null_cond=None, generate=generate):
    return train.Distillation(generate, networks, config, null_cond)


def generator_loss(losses, batch=BATCH, critic=CRITIC, **given):
    """Per row, at GENERATOR."""
    loss = lambda *args, **given: losses.generator_loss(*args, **given)[0]  # noqa: E731
    return np.asarray(jax.jit(loss)(GENERATOR, batch, KEYS, critic, FROZEN, **given))


@pytest.mark.parametrize("trained", ["generator", "critic"])
def test_9_each_loss_reaches_its_own_network_alone(trained):
    losses = method()

    def total(generator, critic, frozen):
        if trained == "generator":
            args = (generator, BATCH, KEYS, critic, frozen)
            return losses.generator_loss(*args)[0].sum()
        return losses.critic_loss(critic, BATCH, KEYS, generator, frozen)[0].sum()

    slopes = jax.jit(jax.grad(total, (0, 1, 2)))
    generator, critic, frozen = slopes(GENERATOR, CRITIC, FROZEN)
    own, others = critic, (generator, frozen)
    # the discriminator's part in the generator's loss: its step sees only the generator
    if trained == "generator":
        own, others = generator, critic["score"]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(own))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(others))


def test_13_guidance_of_one_costs_and_changes_nothing():
    called = []

    def counting(*inputs):
        called.append(inputs)
        return teacher(*inputs)

    networks = NETWORKS._replace(teacher=counting)
    unguided = generator_loss(method(PLAIN, networks, NULL), CONDITIONED)
    assert len(called) == 1
    nearly = dataclasses.replace(PLAIN, guidance=1.0 + 1e-7)
    guided = generator_loss(method(nearly, networks, NULL), CONDITIONED)
    assert len(called) == 3
    assert_allclose(guided, unguided, rtol=1e-4)


def test_guidance_is_that_of_the_predictions_of_data():
    """g_c + (w - 1) (g_c - g_neg): a shift of 1 becomes one of w."""
    config = train.DistillationConfig(guidance=3.0, shift=1.0, adversarial_weight=0.0)

    @jax.jit
    def run(params):
        seen = []

        def spy(*inputs):
            seen.append(inputs[1:3])
            return teacher(*inputs)

        def made(*inputs):
            seen.append(generate(*inputs))
            return seen[-1]

        losses = method(config, NETWORKS._replace(teacher=spy), NULL, made)
        args = (GENERATOR, CONDITIONED, KEYS, CRITIC, params)
        return losses.generator_loss(*args)[0], seen[:2]

    found, (x, (x_tau, tau)) = run(FROZEN)
    cond, at = CONDITIONED["cond"], tau[:, None]
    data = [x_tau - at * teacher(FROZEN, x_tau, tau, c)[0] for c in (cond, 0 * cond)]
    critic = x_tau - at * score(CRITIC["score"], x_tau, tau, cond)[0]
    guided = data[0] + 2.0 * (data[0] - data[1])
    expected, _ = flows.distribution_matching_loss(x, guided, critic)
    assert_allclose(found, expected, rtol=1e-3)
    noise = (x_tau - (1 - at) * x) / at
    assert abs(float(noise.mean())) < 0.6 and 0.4 < float(noise.var()) < 1.8


def test_negative_pass_of_its_own():
    """Guided by another network than the teacher's: as if that were one teacher."""

    negative = lambda *inputs: teacher(*inputs)[0] + 0.5  # noqa: E731

    def guided(params, x, t, cond):
        velocity, features = teacher(params, x, t, cond)
        return 3.0 * velocity - 2.0 * negative(params, x, t, 0 * cond), features

    def loss(scale, **networks):
        config = train.DistillationConfig(guidance=scale, adversarial_weight=0.0)
        losses = method(config, NETWORKS._replace(**networks), NULL)
        return generator_loss(losses, CONDITIONED)

    found, expected = loss(3.0, negative=negative), loss(1.0, teacher=guided)
    assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("same_noise", [True, False])
def test_14_real_and_fake_share_their_noise(same_noise):
    """Real data that are the generator's own samples: then both inputs are equal."""
    config = plain(same_noise=same_noise, r1_weight=0.1)

    @jax.jit
    def run(generator):
        seen = []

        def watching(params, features):
            seen.append(features[0])
            return discriminator(params, features)

        losses = method(config, NETWORKS._replace(discriminator=watching))
        own = {"x_data": jnp.broadcast_to(generator["mean"], (16, 2))}
        return losses.critic_loss(CRITIC, own, KEYS, generator, FROZEN)[1], seen

    still = {**GENERATOR, "std": jnp.zeros(2)}
    metrics, (fake, real, near) = jax.tree.map(np.asarray, run(still))
    assert np.abs(near - real).min() > 0
    if same_noise:
        assert_allclose(fake, real, atol=1e-6)
    else:
        assert np.abs(fake - real).min() > 0
    assert_allclose(metrics["discriminator_loss"], 2 * np.log(2), rtol=1e-5)
    assert_array_equal(metrics["r1"], 0)  # D is 0 everywhere


def test_levels_and_noise_may_be_given_in_place_of_keys(refused):
    losses = method()
    still = prng.split(prng.fold_in(KEYS, 0))[:, 1]  # of the generator's loss
    zero = jnp.zeros((16, 2))
    noise = losses.noised(zero, still, tau=jnp.ones(16))[0]
    tau = losses.noised(zero, still)[1]
    keyed = generator_loss(losses)
    assert_allclose(generator_loss(losses, tau=tau, noise=noise), keyed, rtol=1e-3)
    assert np.abs(generator_loss(losses, tau=tau[::-1]) - keyed).max() > 1e-3

    def both(tau, noise):
        given = (CRITIC, BATCH, KEYS, GENERATOR, FROZEN)
        seen, watching = [], lambda p, f: seen.append(f[0]) or discriminator(p, f)
        watched = method(PLAIN, NETWORKS._replace(discriminator=watching))
        watched.critic_loss(*given, tau=tau, noise=noise)
        return seen

    fake, real = jax.jit(both)(tau, noise)
    away = np.asarray((1 - tau)[:, None] * BATCH["x_data"] + tau[:, None] * noise)
    assert_allclose(real, away, rtol=1e-5, atol=1e-6)
    assert fake.shape == real.shape
    refused("noise has shape", losses.noised, zero, KEYS, noise=noise[:3])


def test_r1_of_a_linear_discriminator():
    """E (D(x) - D(x + sigma z))^2 = sigma^2 |w|^2."""
    config = plain(r1_weight=0.1, r1_std=0.2)
    keys, batch = jax.random.split(KEYS[0], 4000), {"x_data": jnp.zeros((4000, 2))}
    critic_loss = jax.jit(method(config).critic_loss)
    loss, metrics = critic_loss(LOUD, batch, keys, GENERATOR, FROZEN)
    r1 = float(metrics["r1"].mean())
    assert r1 == pytest.approx(0.2**2 * (0.7**2 + 0.4**2), rel=0.1)
    parts = metrics["score_loss"] + metrics["discriminator_loss"]
    assert_allclose(loss, parts + 0.1 * metrics["r1"], rtol=1e-5)


def test_features_of_the_critic():
    losses, wide = method(plain(features="critic")), {"w": jnp.ones((32, 1))}
    both, critic = (BATCH, KEYS), {**CRITIC, "discriminator": wide}
    found = jax.eval_shape(losses.generator_loss, GENERATOR, *both, critic, FROZEN)
    other = jax.eval_shape(losses.critic_loss, critic, *both, GENERATOR, FROZEN)
    assert found[0].shape == other[0].shape == (16,)


def test_9_the_adversarial_gradient_passes_the_frozen_teacher(x64):
    """Where teacher and critic agree it is the only one; against differences."""
    networks = NETWORKS._replace(critic=lambda p, *inputs: teacher(FROZEN, *inputs))
    losses, mean = method(plain(), networks), GENERATOR["mean"]

    @jax.jit
    def total(mean):
        generator = {**GENERATOR, "mean": mean}
        return losses.generator_loss(generator, BATCH, KEYS, LOUD, FROZEN)[0].sum()

    slope = jax.jit(jax.grad(total))(mean)
    for i, step in enumerate(np.float32(1e-3) * np.eye(2, dtype=np.float32)):
        expected = (total(mean + step) - total(mean - step)) / 2e-3
        assert abs(expected) > 1e-3
        assert_allclose(slope[i], expected, rtol=2e-2)


@pytest.fixture(scope="module")
def compiled():
    """Methods, cycle, its first state, and the cut of a batch; all without guidance."""

    def watching(params, x, t, cond):
        jax.debug.callback(lambda t: LEVELS.append(np.round(t, 4).tolist()), t)
        return teacher(params, x, t, cond)

    losses = method(PLAIN, NETWORKS._replace(teacher=watching))
    state = train.create_distillation_state(GENERATOR, CRITIC, RULES, ema=True)
    return losses, *train.compile_cycle(losses, RULES, state, FROZEN, ema_decay=0.99)


@pytest.fixture
def cycle(compiled):
    losses, step, state, place = compiled
    return losses, step, jax.tree.map(jnp.array, state), place


def data(cond=0.0):
    """Five batches of the teacher's own samples."""
    x = np.random.default_rng(1).normal(size=(80, 2)) * 0.5 + [0.7, -0.3]
    return {"x_data": np.float32(x), "cond": np.full((80, 2), cond, np.float32)}


def test_12_each_update_leaves_the_other_alone():
    """Whole cycles in which one of the two learns at rate 0."""
    rule = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    losses = method(train.DistillationConfig(guidance=3.0), null_cond=NULL)
    start = train.create_distillation_state(GENERATOR, LOUD, (rule, rule))
    step, placed, place = train.compile_cycle(losses, (rule, rule), start, FROZEN)
    before = {"generator": GENERATOR, "critic": LOUD}
    for still in before:
        state = jax.tree.map(jnp.array, placed)
        frozen = getattr(state, still)
        rates = jax.tree.map(jnp.zeros_like, frozen.opt_state.hyperparams)
        frozen = frozen.replace(opt_state=frozen.opt_state._replace(hyperparams=rates))
        state = state.replace(**{still: frozen})
        state, metrics = step(state, place(data(0.4)), jax.random.key(7))
        assert metrics["adversarial_loss"] > 0 and state.skipped == 0
        for name in before:
            after = getattr(state, name).params
            kept = jax.tree.map(lambda a, b: bool((a == b).all()), before[name], after)
            assert set(jax.tree.leaves(kept)) == {name == still}
    assert_array_equal(FROZEN["scale"], 1)


def test_the_largest_weight_of_a_batch_is_logged():
    losses, key = method(), jax.random.key(7)
    step = jax.jit(train.make_steps(losses, RULES, microbatches=2)[0])
    state = train.create_distillation_state(GENERATOR, CRITIC, RULES)
    _, metrics = step(state.generator, BATCH, key, CRITIC, FROZEN)
    keys = prng.sample_keys(jax.random.fold_in(key, 0), 16)
    loss = jax.jit(losses.generator_loss)
    rows = np.asarray(loss(GENERATOR, BATCH, keys, CRITIC, FROZEN)[1]["weight"])
    assert_allclose(metrics["weight"], rows.mean(), rtol=1e-4)
    assert_allclose(metrics["weight_max"], rows.max(), rtol=1e-4)


def test_levels_that_are_reported_are_those_of_the_update(cycle):
    """A row of each batch is no number, in the last batch another than before."""
    losses, step, state, place = cycle
    jax.effects_barrier()
    LEVELS.clear()
    rows = np.zeros((80, 2), np.float32)
    rows[[5, 21, 37, 53, 67]] = np.nan
    parts, key = place({"x_data": rows, "cond": rows}), jax.random.key(7)
    for _ in range(2):
        state, _ = step(state, parts, key)
    jax.effects_barrier()
    # a cycle asks once for the generator, twice for each update of the critic
    assert len(LEVELS) == 2 * 9
    levels = {"generator": LEVELS[9], "critic": LEVELS[-1]}

    def told(*frozen, state=state):
        text = losses.report(state, parts, jax.random.fold_in(key, 1), *frozen)
        head, _, text = text.partition(": ")
        assert head == "not finite"
        pattern = r"(\w+), (all rows|rows \[\d\]) at noise levels (\[.*?\])"
        found = re.findall(pattern, text)
        return {name: (rows, json.loads(listed)) for name, rows, listed in found}

    everything, rowwise = told(), told(FROZEN)
    assert everything.keys() == rowwise.keys() == levels.keys()
    for name, row in (("generator", 5), ("critic", 3)):
        assert everything[name][0] == "all rows"
        assert_allclose(everything[name][1], levels[name], atol=2e-4)
        assert rowwise[name][0] == f"rows [{row}]"
        assert_allclose(rowwise[name][1], levels[name][row], atol=2e-4)
        good = getattr(state, name).replace(skipped_in_a_row=jnp.int32(0))
        told_of = told(state=state.replace(**{name: good}))
        assert told_of.keys() == levels.keys() - {name}


def test_12_a_gaussian_is_distilled_by_one_update_in_five(cycle, count_compiles):
    """The generator ends at the teacher's mean and spread, without a compilation more."""
    _, step, state, place = cycle
    parts, key = place(data()), jax.random.key(7)
    state, _ = step(state, parts, key)
    state, _ = step(state, parts, key)
    with count_compiles() as compiled:
        for _ in range(600):
            state, metrics = step(state, parts, key)
    assert not compiled and PLAIN.batches == 5
    assert int(state.generator.step) == 602 and int(state.critic.step) == 4 * 602
    assert state.skipped == 0 and "critic/score_loss" in metrics
    found = state.generator.eval_params
    assert_allclose(found["mean"], [0.7, -0.3], atol=0.15)
    assert_allclose(np.abs(found["std"]), 0.5, atol=0.2)


def test_updates_that_are_not_finite_are_skipped_and_reported(cycle):
    losses, step, state, place = cycle
    broken = {**state.generator.params, "mean": jnp.full(2, jnp.nan)}
    state = state.replace(generator=state.generator.replace(params=broken))
    parts, key = place(data()), jax.random.key(7)
    after, _ = step(state, parts, key)
    assert int(after.skipped) == 5
    assert int(after.skipped_in_a_row) == 4
    text = losses.report(after, parts, jax.random.fold_in(key, 0), FROZEN)
    assert text.count(f"rows {list(range(16))} at noise levels") == 2


def test_bad_inputs(cycle, refused):
    given = {"x_data": np.zeros((16, 2), np.float32)}
    refused("a cycle takes 5 batches, but 16 rows", cycle[-1], given)
    refused("needs null_cond", method, train.DistillationConfig())
    refused("needs a discriminator", method, PLAIN, train.Networks(teacher, score))
    refused("critic_updates=0", plain, critic_updates=0)
    refused("shift=0.1", plain, shift=0.1)
    refused("normalisation='sum'", plain, normalisation="sum")
    refused("features='fake'", plain, features="fake")
    refused("time_range", plain, time_range=(0.9, 0.1))
    refused("adversarial_weight=-1", plain, adversarial_weight=-1.0)
