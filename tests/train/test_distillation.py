"""The distillation cycle (TMD sheet, section 6: 9, 12, 13, 14), on Gaussians."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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
    noise = prng.normal(keys, (2,))
    return noise * params["std"] + params["mean"]


def discriminator(params, features):
    return features[0] @ params["w"]


FROZEN = {"scale": jnp.ones(())}
GENERATOR = {"mean": jnp.array([-1.0, 1.0]), "std": jnp.ones(2)}
CRITIC = {
    "score": {
        "a": jax.random.normal(jax.random.key(0), (3, 32)),
        "b": 0.1 * jax.random.normal(jax.random.key(1), (32, 2)),
    },
    "discriminator": {"w": jnp.zeros((2, 1))},
}
NETWORKS = train.Networks(teacher, score, discriminator)
PLAIN = train.DistillationConfig(guidance=1.0, shift=1.0)
KEYS = jax.random.split(jax.random.key(3), 16)
BATCH = {"x_data": 0.5 * jax.random.normal(jax.random.key(4), (16, 2))}
RULES = tuple(
    train.make_optimizer(train.OptimizerConfig(name="adam", learning_rate=rate))
    for rate in (1e-2, 2e-2)
)


def method(config=PLAIN, networks=NETWORKS, null_cond=None):
    return train.Distillation(generate, networks, config, null_cond)


def test_9_the_generators_loss_reaches_the_generator_alone():
    losses = method()
    grads = jax.grad(
        lambda g, c, f: losses.generator_loss(g, BATCH, KEYS, c, f)[0].sum(), (0, 1, 2)
    )(GENERATOR, CRITIC, FROZEN)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads[0]))
    for leaf in jax.tree.leaves(grads[1]["score"]):
        np.testing.assert_array_equal(leaf, 0)
    # what the step differentiates is the generator: make_train_step sees only it


def test_9_the_critics_loss_reaches_the_critic_alone():
    losses = method()
    grads = jax.grad(
        lambda c, g, f: losses.critic_loss(c, BATCH, KEYS, g, f)[0].sum(), (0, 1, 2)
    )(CRITIC, GENERATOR, FROZEN)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads[0]))
    for leaf in jax.tree.leaves(grads[1:]):
        np.testing.assert_array_equal(leaf, 0)


def test_13_guidance_of_one_costs_and_changes_nothing():
    called = []

    def counting(params, x, t, cond):
        called.append(cond)
        return teacher(params, x, t, cond)

    cond = jnp.ones((16, 2))
    batch = {**BATCH, "cond": cond}
    networks = NETWORKS._replace(teacher=counting)
    null = np.zeros(2, np.float32)
    plain = method(PLAIN, networks, null).generator_loss(
        GENERATOR, batch, KEYS, CRITIC, FROZEN
    )[0]
    assert len(called) == 1
    import dataclasses

    nearly = dataclasses.replace(PLAIN, guidance=1.0 + 1e-7)
    guided = method(nearly, networks, null).generator_loss(
        GENERATOR, batch, KEYS, CRITIC, FROZEN
    )[0]
    assert len(called) == 3
    np.testing.assert_allclose(guided, plain, rtol=1e-4)


def test_guidance_is_that_of_the_predictions_of_data():
    """g_c + (w - 1) (g_c - g_neg): a shift of 1 becomes one of w."""
    cond, null = jnp.full((16, 2), 0.4), np.zeros(2, np.float32)
    config = train.DistillationConfig(guidance=3.0, shift=1.0, adversarial_weight=0.0)
    batch = {**BATCH, "cond": cond}
    found, _ = method(config, null_cond=null).generator_loss(
        GENERATOR, batch, KEYS, CRITIC, FROZEN
    )
    keys = jax.vmap(lambda k: jax.random.split(k, 2))(prng.fold_in(KEYS, 0))
    x = generate(GENERATOR, batch, keys[:, 0])
    keys = jax.vmap(lambda k: jax.random.split(k, 2))(keys[:, 1])
    tau = flows.ranged_time(1.0)(keys[:, 0])
    x_tau = flows.interpolate(x, prng.normal(keys[:, 1], (2,)), tau)
    at = tau[:, None]
    data = [x_tau - at * teacher(FROZEN, x_tau, tau, c)[0] for c in (cond, 0 * cond)]
    critic = x_tau - at * score(CRITIC["score"], x_tau, tau, cond)[0]
    guided = data[0] + 2.0 * (data[0] - data[1])
    expected, _ = flows.distribution_matching_loss(x, guided, critic)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_14_real_and_fake_share_their_noise():
    seen = []

    def watching(params, features):
        seen.append(features[0])
        return discriminator(params, features)

    config = train.DistillationConfig(guidance=1.0)
    networks = NETWORKS._replace(discriminator=watching)
    # real data that are the generator's own samples: then both inputs are equal
    keys = jax.vmap(lambda k: jax.random.split(k, 4))(prng.fold_in(KEYS, 1))
    own = {"x_data": generate(GENERATOR, None, keys[:, 0])}
    losses = method(config, networks)
    _, metrics = losses.critic_loss(CRITIC, own, KEYS, GENERATOR, FROZEN)
    np.testing.assert_allclose(*seen, atol=1e-6)
    np.testing.assert_allclose(metrics["discriminator_loss"], 2 * np.log(2), rtol=1e-5)
    seen.clear()
    config = train.DistillationConfig(guidance=1.0, same_noise=False, r1_weight=0.1)
    losses = method(config, networks)
    _, metrics = losses.critic_loss(CRITIC, own, KEYS, GENERATOR, FROZEN)
    assert np.abs(seen[0] - seen[1]).min() > 0 and len(seen) == 3
    np.testing.assert_array_equal(metrics["r1"], 0)  # D is 0 everywhere


def test_features_of_the_critic():
    config = train.DistillationConfig(guidance=1.0, features="critic")
    critic = {**CRITIC, "discriminator": {"w": jnp.ones((32, 1))}}
    losses = method(config)
    loss, _ = losses.generator_loss(GENERATOR, BATCH, KEYS, critic, FROZEN)
    other, _ = losses.critic_loss(critic, BATCH, KEYS, GENERATOR, FROZEN)
    assert loss.shape == other.shape == (16,)


@functools.cache
def cycle(config=PLAIN):
    losses = method(config)
    state = train.create_distillation_state(GENERATOR, CRITIC, RULES, ema=True)
    return train.compile_cycle(losses, RULES, state, FROZEN, ema_decay=0.99)


def data(seed, batches):
    key = jax.random.key(seed)
    sample = TEACHER.sample(key, 16 * batches)
    return {"x_data": np.asarray(sample)}


def test_12_twenty_updates_of_a_hundred_are_the_students():
    step, state, place = cycle()
    state = jax.tree.map(jnp.array, state)
    assert PLAIN.batches == 5
    for i in range(20):
        state, metrics = step(state, place(data(i, 5)), jax.random.key(7))
    assert int(state.generator.step) == 20 and int(state.critic.step) == 80
    assert metrics["skipped"] == 0 and "critic/score_loss" in metrics


NULL = np.zeros(2, np.float32)
LOUD = {**CRITIC, "discriminator": {"w": jnp.array([[0.7], [-0.4]])}}
"""A critic whose discriminator says something."""


@pytest.mark.parametrize("still", ["generator", "critic"])
def test_12_each_update_leaves_the_other_alone(still):
    """A whole cycle in which one of the two learns at rate 0."""
    rates = [0.0 if still == name else 0.1 for name in ("generator", "critic")]
    rules = tuple(optax.sgd(rate) for rate in rates)
    losses = method(train.DistillationConfig(guidance=3.0), null_cond=NULL)
    state = train.create_distillation_state(GENERATOR, LOUD, rules)
    frozen = jax.tree.map(np.array, FROZEN)
    step, state, place = train.compile_cycle(losses, rules, state, FROZEN)
    batch = {**data(0, 5), "cond": np.full((80, 2), 0.4, np.float32)}
    state, metrics = step(state, place(batch), jax.random.key(7))
    assert metrics["adversarial_loss"] > 0 and metrics["skipped"] == 0
    for name, before in (("generator", GENERATOR), ("critic", LOUD)):
        after = getattr(state, name).params
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
            assert (np.asarray(a) == b).all() == (name == still)
    np.testing.assert_array_equal(FROZEN["scale"], frozen["scale"])


def test_9_the_adversarial_gradient_passes_the_frozen_teacher(x64):
    """Where teacher and critic agree it is the only one; against differences."""
    networks = NETWORKS._replace(critic=lambda p, x, t, c: teacher(FROZEN, x, t, c))
    losses = method(train.DistillationConfig(guidance=1.0), networks)

    def total(mean):
        generator = {**GENERATOR, "mean": mean}
        return losses.generator_loss(generator, BATCH, KEYS, LOUD, FROZEN)[0].sum()

    mean = jnp.array([-1.0, 1.0])
    slope = jax.grad(total)(mean)
    for i in range(2):
        step = jnp.zeros(2).at[i].set(1e-3)
        expected = (total(mean + step) - total(mean - step)) / 2e-3
        assert abs(expected) > 1e-3
        np.testing.assert_allclose(slope[i], expected, rtol=2e-2)


def test_negative_pass_of_its_own():
    """Guided by another network than the teacher's: as if that were one teacher."""

    def negative(params, x, t, cond):
        return teacher(params, x, t, cond)[0] + 0.5

    def guided(params, x, t, cond):
        velocity, features = teacher(params, x, t, cond)
        less = negative(params, x, t, 0 * cond)
        return 3.0 * velocity - 2.0 * less, features

    batch = {**BATCH, "cond": jnp.full((16, 2), 0.4)}
    found, expected = (
        method(
            train.DistillationConfig(guidance=scale, adversarial_weight=0.0),
            NETWORKS._replace(**networks),
            NULL,
        ).generator_loss(GENERATOR, batch, KEYS, CRITIC, FROZEN)[0]
        for scale, networks in (
            (3.0, {"negative": negative}),
            (1.0, {"teacher": guided}),
        )
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_r1_of_a_linear_discriminator():
    """E (D(x) - D(x + sigma z))^2 = sigma^2 |w|^2."""
    config = train.DistillationConfig(guidance=1.0, r1_weight=0.1, r1_std=0.2)
    keys = jax.random.split(jax.random.key(5), 4000)
    batch = {"x_data": jnp.zeros((4000, 2))}
    _, metrics = method(config).critic_loss(LOUD, batch, keys, GENERATOR, FROZEN)
    expected = 0.2**2 * (0.7**2 + 0.4**2)
    assert float(metrics["r1"].mean()) == pytest.approx(expected, rel=0.1)


def test_the_largest_weight_of_a_batch_is_logged():
    losses = method()
    step = train.make_steps(losses, RULES, microbatches=2)[0]
    state = train.create_distillation_state(GENERATOR, CRITIC, RULES)
    key = jax.random.key(7)
    _, metrics = jax.jit(step)(state.generator, BATCH, key, CRITIC, FROZEN)
    keys = prng.sample_keys(jax.random.fold_in(key, 0), 16)
    rows = losses.generator_loss(GENERATOR, BATCH, keys, CRITIC, FROZEN)[1]["weight"]
    np.testing.assert_allclose(metrics["weight"], rows.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["weight_max"], rows.max(), rtol=1e-4)


def test_levels_that_are_reported_are_those_of_the_update():
    """A row of each batch is no number, in the last batch another than before."""
    seen = []

    def watching(params, x, t, cond):
        jax.debug.callback(lambda t: seen.append(np.round(t, 4).tolist()), t)
        return teacher(params, x, t, cond)

    losses = method(PLAIN, NETWORKS._replace(teacher=watching))
    state = train.create_distillation_state(GENERATOR, CRITIC, RULES)
    step, state, place = train.compile_cycle(losses, RULES, state, FROZEN)
    rows = np.zeros((80, 2), np.float32)
    rows[[5, 21, 37, 53, 67]] = np.nan
    parts, key = place({"x_data": rows, "cond": rows}), jax.random.key(7)
    for _ in range(2):
        state, _ = step(state, parts, key)
    jax.effects_barrier()
    # a cycle asks once for the generator, twice for each update of the critic
    assert len(seen) == 2 * 9
    levels = {"generator": seen[9], "critic": seen[-1]}

    def told(*frozen, state=state):
        text = losses.report(state, parts, jax.random.fold_in(key, 1), *frozen)
        head, _, text = text.partition(": ")
        assert head == "not finite"
        pattern = r"(\w+), (all rows|rows \[\d\]) at noise levels (\[.*?\])"
        return {
            name: (rows, json.loads(listed))
            for name, rows, listed in re.findall(pattern, text)
        }

    for name, listed in told().items():
        assert listed[0] == "all rows"
        np.testing.assert_allclose(listed[1], levels[name], atol=2e-4)
    for name, listed in told(FROZEN).items():
        row = {"generator": 5, "critic": 3}[name]
        assert listed[0] == f"rows [{row}]"
        np.testing.assert_allclose(listed[1], levels[name][row : row + 1], atol=2e-4)
    assert told().keys() == told(FROZEN).keys() == levels.keys()
    for name in levels:
        good = getattr(state, name).replace(skipped_in_a_row=jnp.int32(0))
        assert told(state=state.replace(**{name: good})).keys() == levels.keys() - {
            name
        }


def test_a_gaussian_is_distilled(count_compiles):
    """The generator ends at the teacher's mean and spread, without a compilation more."""
    config = train.DistillationConfig(guidance=1.0, shift=1.0, adversarial_weight=0.0)
    step, state, place = cycle(config)
    state = jax.tree.map(jnp.array, state)
    state, _ = step(state, place(data(0, 5)), jax.random.key(7))
    state, _ = step(state, place(data(0, 5)), jax.random.key(7))
    with count_compiles() as compiled:
        for _ in range(1000):
            state, _ = step(state, place(data(0, 5)), jax.random.key(7))
    assert not compiled
    found = state.generator.eval_params
    np.testing.assert_allclose(found["mean"], [0.7, -0.3], atol=0.15)
    np.testing.assert_allclose(np.abs(found["std"]), 0.5, atol=0.2)


def test_updates_that_are_not_finite_are_skipped_and_reported():
    step, state, place = cycle()
    state = jax.tree.map(jnp.array, state)
    broken = state.replace(
        generator=state.generator.replace(
            params={**state.generator.params, "mean": jnp.full(2, jnp.nan)}
        )
    )
    parts = place(data(0, 5))
    after, metrics = step(broken, parts, jax.random.key(7))
    assert metrics["skipped"] == 1 and int(after.skipped) == 5
    assert int(after.skipped_in_a_row) == 4
    text = method().report(
        after, parts, jax.random.fold_in(jax.random.key(7), 0), FROZEN
    )
    assert text.count(f"rows {list(range(16))} at noise levels") == 2


def test_the_cycle_takes_whole_cycles(as_shipped):
    _, _, place = cycle()
    with pytest.raises(ValueError, match="a cycle takes 5 batches, but 16 rows"):
        place({"x_data": np.zeros((16, 2), np.float32)})


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: method(train.DistillationConfig()), "needs null_cond"),
        (
            lambda: method(PLAIN, train.Networks(teacher, score)),
            "needs a discriminator",
        ),
        (lambda: train.DistillationConfig(critic_updates=0), "critic_updates=0"),
        (lambda: train.DistillationConfig(shift=0.1), "shift=0.1"),
        (lambda: train.DistillationConfig(normalisation="sum"), "normalisation='sum'"),
        (lambda: train.DistillationConfig(features="fake"), "features='fake'"),
        (lambda: train.DistillationConfig(time_range=(0.9, 0.1)), "time_range"),
        (
            lambda: train.DistillationConfig(adversarial_weight=-1.0),
            "adversarial_weight=-1",
        ),
    ],
)
def test_bad_inputs(call, message, as_shipped):
    with pytest.raises(ValueError, match=message):
        call()
