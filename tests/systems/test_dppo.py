"""DPPO, the rival of ReinFlow: the rules of its sheet."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from checks import drawn
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import envs, models, quant
from tmdjax.core import prng
from tmdjax.systems import dppo
from tmdjax.systems.dppo import DPPO
from tmdjax.train import on_policy
from tmdjax.train.on_policy import Samples

BATCH, SIZE, STEPS, TUNED = 64, 24, 5, 3
KEYS = prng.sample_keys(jax.random.key(7), BATCH)
COEFFICIENTS = {"clip_range": 0.1, "clip_base": 0.01, "denoising_discount": 0.9}


def method_of(**options):
    small = {"hidden": (16, 16, 16), "frequencies": (1.0, 8.0, 4)}
    small |= {"advantage_quantiles": (0.05, 0.95)}
    return DPPO(**small | {"steps": STEPS, "fine_tuned_steps": TUNED} | options)


def nudged(tree, size=0.02):
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda x: x + np.float32(rng.normal(0, size, x.shape)), tree)


@functools.cache
def done():
    """A policy, what it did, and its loss as it was and 'moved' a little."""
    method, rng = method_of(), np.random.default_rng(0)
    seen = jnp.float32(rng.normal(size=(BATCH, 4)))
    shapes = jax.eval_shape(lambda: method.init(jax.random.key(0), seen[:1], SIZE))
    network = drawn(shapes["network"])
    network["out"]["kernel"] *= np.float32(0.01)  # as it is drawn
    params = method.pretrained(network)
    assert jax.tree.structure(params) == jax.tree.structure(shapes)
    advantage = np.float32(1 + 2 * rng.normal(size=BATCH))

    @jax.jit
    def score(params, behaviour, record):
        def of(params):
            samples = Samples(seen, record, advantage)
            found = method.loss(params, behaviour, samples, KEYS, COEFFICIENTS)
            return found[0].sum(), found

        slope, found = jax.grad(of, has_aux=True)(params)
        return found, slope, method.rescore(params, seen, record["chain"])

    action, record = jax.jit(lambda p: method.act(p, seen, KEYS))(params)
    new = {**params, "network": nudged(network)}
    (_, same), *_ = score(params, params, record)
    moved, slope, chain = score(new, params, record)
    found = {
        "params": params,
        "new": new,
        "samples": Samples(seen, record, advantage),
        "action": action,
        "same": same,
        "moved": moved,
        "slope": slope,
        "chain": chain,
    }
    return method, jax.device_get(found)


def test_1_ratios_are_one_before_the_first_update():
    _, found = done()
    assert found["samples"].record["chain"].shape == (BATCH, TUNED + 1, SIZE)
    assert found["same"]["ratio_error"].max() < 1e-5
    assert_array_equal(found["action"], found["samples"].record["chain"][:, -1])
    assert np.abs(found["action"]).max() == 1  # clipped


def test_14_clip_ranges():
    clips = np.asarray(jax.jit(functools.partial(dppo.clip_ranges, 10))(0.01, 0.001))
    assert_allclose(clips[[0, -1]], [0.001, 0.01], rtol=1e-6)
    i = np.arange(10) / 9
    expected = 0.001 + 0.009 * (np.exp(3 * i) - 1) / (np.exp(3) - 1)
    assert_allclose(clips, expected, rtol=1e-5)
    # as released a single step would have none, and never learn
    assert_allclose(dppo.clip_ranges(1, 0.01, 0.001), [0.01], rtol=1e-6)


def test_14_advantages_are_clipped_and_then_discounted():
    a = np.float32(scipy.stats.norm.rvs(size=200, random_state=0))
    rule = functools.partial(dppo.step_advantages, steps=4, quantiles=(0.05, 0.95))
    found = np.asarray(jax.jit(rule)(a, discount=0.9))
    clipped = np.clip(a, *np.quantile(a, [0.05, 0.95]))
    assert (clipped != a).sum() == 20
    for i in range(4):  # the last step has weight 1
        assert_allclose(found[i], 0.9 ** (3 - i) * clipped, rtol=1e-5)


def test_loss_by_hand():
    method, found = done()
    chain, samples = found["chain"], found["samples"]
    x, mean_law = samples.record["chain"].swapaxes(0, 1), chain.log_density
    std = np.maximum([0.1] * TUNED, method.schedule.columns()["std"][2::-1])
    assert_allclose(chain.std[:, 0, 0], std, rtol=1e-5)
    assert x.shape == (TUNED + 1, BATCH, SIZE)
    new = np.clip(np.float64(mean_law), -5, 2).mean(-1)
    r = np.exp(new - samples.record["log_prob"].T)
    a = np.clip(samples.advantage, *np.quantile(samples.advantage, [0.05, 0.95]))
    a = a * 0.9 ** np.arange(TUNED)[::-1, None]
    e = 0.01 + 0.09 * np.expm1([0, 1.5, 3]) / np.expm1(3)
    e = e[:, None]
    expected = np.maximum(-a * r, -a * np.clip(r, 1 - e, 1 + e)).mean(0)
    loss, metrics = found["moved"]
    assert_allclose(loss, expected, rtol=1e-3, atol=1e-5)
    assert_allclose(metrics["kl"], (r - 1 - np.log(r)).mean(0), rtol=1e-2, atol=1e-6)
    outside = (mean_law < -5) | (mean_law > 2)
    assert_allclose(metrics["log_prob_clipped"], outside.mean((0, 2)), atol=1e-6)


def test_only_the_last_steps_are_trained():
    slope = done()[1]["slope"]
    assert slope["network"]["out"]["kernel"].any()
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(slope["base"]))
    whole = method_of(fine_tuned_steps=STEPS)
    assert set(whole.pretrained({})) == {"network"}


def test_what_is_exported_answers_for_every_step():
    """The base's network for the steps before, the trained one for the last three."""
    method, found = done()
    spec, network, _ = method.exported(found["new"])
    whole, fn = models.functional(models.build(spec)), method.function(network["base"])
    # all samples in the first trained level, and again in the level before it
    x, seen = (
        jnp.tile(x, (2, 1))
        for x in (found["samples"].record["chain"][:, 0], found["samples"].observation)
    )
    t = np.repeat(np.float32([TUNED, TUNED + 1]) / STEPS, BATCH)
    answers = lambda p: (  # noqa: E731
        whole(p, x, t, seen),
        *(fn(p[name], x, t, seen) for name in ("network", "base")),
    )
    ours, tuned, base = jax.device_get(jax.jit(answers)(network))
    assert_allclose(ours[:BATCH], tuned[:BATCH], rtol=1e-5, atol=1e-6)
    assert_allclose(ours[BATCH:], base[BATCH:], rtol=1e-5, atol=1e-6)
    assert np.abs(tuned - base).mean() > 1e-3


def test_what_a_run_left_is_taken_up_whole(refused):
    """Both networks of a fine-tuned policy; what they are computed in is free."""
    method, found = done()
    spec, left, facts = method.exported(found["new"])
    meta = json.loads(json.dumps({**facts, "spec": spec, "chunk": 4, "mean": [0, 1.5]}))
    assert method.pretrained(left, meta) == left and set(left) == {"network", "base"}
    cloned = method.pretrained(left["network"], meta)
    assert cloned["base"] is cloned["network"] is left["network"]
    models.with_recipe(method, quant.RECIPES["bf16"]).pretrained(left, meta)
    words = "has time=0.7, here 0.58.*; steps=5, here 6"
    refused(words, method_of(steps=6).pretrained, left, meta)
    same = {"chunk": 4, "mean": np.float32([0, 1.5])}
    assert method.pretrained(left, meta, **same) == left
    words = r"chunk=4, here 2; mean=\[0, 1.5\], here \[0.0, 1.0\]"
    other = {"chunk": 2, "mean": np.float32([0, 1])}
    refused(words, method.pretrained, left, meta, **other)


def test_a_run_does_not_begin_from_half_a_policy(refused):
    """Without 'base' the first steps would be those of a network that was drawn."""
    method, vector = method_of(), envs.Vector(envs.PROBES["follow"], 4)
    settings = on_policy.ControlSettings(critic_hidden=(8,))
    trainer, key = on_policy.make_trainer(vector, method, settings), jax.random.key(0)

    def begin(entries):
        def start(key):
            policy = trainer.init(key).learner.params["policy"]
            return trainer.init(key, policy={name: policy[name] for name in entries})

        return jax.eval_shape(start, key)

    begin(("network", "base"))
    refused(
        "policy gives 'network' and not 'base', which no update", begin, ["network"]
    )


def test_clipping_a_sum_over_dimensions_would_saturate():
    """24 dimensions of log-densities near 1 sum to far above 2: no gradient is left."""
    method, found = done()
    chain = found["chain"]
    last = chain.log_density[-1:]

    @jax.jit
    @jax.jacrev
    def slopes(scale):
        ours = method.log_probs(chain.replace(log_density=scale * last)).sum()
        summed_first = jnp.clip((scale * last).sum(-1), -5, 2).sum()
        return ours, summed_first

    assert last.sum(-1).min() > 2
    ours, summed_first = slopes(1.0)
    assert summed_first == 0 and ours > 1


def test_the_deployed_policy_has_the_models_own_noise_and_none_in_the_end():
    method, found = done()
    params, seen = found["new"], jnp.asarray(found["samples"].observation)
    fn = method.function(params["network"])
    predicts = jax.jit(lambda network, x, t: fn(network, x, t, seen))
    draw = jax.jit(lambda i: prng.normal(prng.fold_in(KEYS, i), (SIZE,)))
    beta, bar = method.schedule.beta, method.schedule.alpha_bar
    x = start = jnp.float32(np.random.default_rng(1).normal(size=(BATCH, SIZE)))
    for i, k in enumerate(range(STEPS - 1, -1, -1)):  # the textbook's formula
        t = np.full(BATCH, (k + 1) / STEPS, np.float32)
        e = predicts(params["network" if k < TUNED else "base"], np.float32(x), t)
        x_0 = np.clip((x - np.sqrt(1 - bar[k]) * e) / np.sqrt(bar[k]), -1, 1)
        before = bar[k - 1] if k else 1.0
        x = (
            np.sqrt(before) * beta[k] * x_0 + np.sqrt(1 - beta[k]) * (1 - before) * x
        ) / (1 - bar[k])
        if k:
            std = max(np.sqrt((1 - before) / (1 - bar[k]) * beta[k]), 1e-3)
            x = x + std * np.clip(draw(np.uint32(i)), -3, 3)
    deployed = jax.jit(lambda p: method.evaluate(p, seen, KEYS, start))(params)
    assert_allclose(deployed, np.clip(x, -1, 1), rtol=1e-3, atol=1e-4)


def test_cloning_trains_the_network_alone():
    method, found = method_of(bound=2.0), done()[1]
    seen = jnp.asarray(found["samples"].observation)
    action = 2 * jnp.tanh(seen[:, :1] + np.zeros(SIZE, np.float32))

    @jax.jit
    def both(params):
        def of(params):
            loss = method.cloning_loss(params, seen, action, KEYS)
            return loss.mean(), loss

        return jax.grad(of, has_aux=True)(params)

    slope, loss = jax.device_get(both(found["params"]))
    assert loss.shape == (BATCH,) and 0.8 < loss.mean() < 1.2  # it predicts about 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(slope["base"]))
    assert all(leaf.any() for leaf in jax.tree.leaves(slope["network"]))


@pytest.mark.slow
def test_a_known_optimum_is_approached():
    method = method_of(clip_range=0.1, clip_base=0.05, bound=2.0)
    settings = on_policy.ControlSettings(
        unroll=8, epochs=4, minibatches=2, critic_hidden=(16,), learning_rate=3e-3,
        discount=0.9, value_clip=None, weight_decay=0.01,
    )  # fmt: skip
    environment = envs.Vector(envs.PROBES["target"], 64)
    trainer = on_policy.make_trainer(environment, method, settings)
    run, key = on_policy.jit_iterations(trainer, 100), jax.random.key(0)
    state = jax.jit(trainer.init)(key)
    base = jax.device_get(state.learner.params["policy"]["base"])
    state, metrics = run(state, key)
    jax.tree.map(assert_array_equal, state.learner.params["policy"]["base"], base)
    reward = metrics["reward_mean"]
    assert metrics["first_ratio_error"].max() < 1e-4
    assert reward[-10:].mean() > 0.3 * reward[0], (reward[0], reward[-10:].mean())


def test_bad_inputs(refused):
    refused("fine_tuned_steps=3 of steps=2", DPPO, steps=2, fine_tuned_steps=3)
    refused("std_floor=0.0 is outside", DPPO, std_floor=0.0)
    refused("advantage_quantiles, upper=0.1", DPPO, advantage_quantiles=(0.5, 0.1))
    refused("advantage_quantiles=1.5", DPPO, advantage_quantiles=(0.5, 1.5))
    refused(r"denoising_discount=1.1 is outside \[0, 1\]", DPPO, denoising_discount=1.1)
    refused("clip_data=0 is outside", DPPO, clip_data=0)
    refused("preset='hopper' is not one of 'dppo'", dppo.preset, "hopper")
    assert dppo.preset("dppo").method == DPPO()
    method, found = done()
    chain = found["samples"].record["chain"][:, 1:]
    refused(r"a chain of 3 steps has shape \(3, 64, 24\)", method.rescore,
            found["params"], found["samples"].observation, chain)  # fmt: skip
    given = found["params"], found["samples"].observation, None
    words = "keys must be a typed key .* got NoneType"
    refused(words, method.evaluate, *given, error=TypeError)
    refused(words, method.evaluate, *given, chain[:, 0], error=TypeError)
