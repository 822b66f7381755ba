import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import same
from numpy.testing import assert_allclose

from tmdjax import train
from tmdjax.core import prng

SGD = optax.sgd(0.1)
KEY = jax.random.key(0)


def linear_loss(params, batch, keys):
    noise = 0.01 * prng.normal(keys, ())
    error = batch["x"] @ params["w"] + params["b"] - batch["y"] + noise
    return jnp.square(error), {"absolute": jnp.abs(error)}


def problem(size=16):
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=3).astype(np.float32), "b": np.zeros((), np.float32)}
    params = jax.tree.map(jnp.asarray, params)
    x = rng.normal(size=(size, 3)).astype(np.float32)
    y = (x @ np.array([1.0, -2.0, 0.5]) + 0.3).astype(np.float32)
    return params, {"x": x, "y": y}


@functools.cache
def program(optimizer, **options):
    return jax.jit(train.make_train_step(linear_loss, optimizer, **options))


def run(params, batch, steps, optimizer=SGD, **options):
    state = train.create_state(params, optimizer, ema="ema_decay" in options)
    if "reductions" in options:  # a dict, which no cache holds
        step = jax.jit(train.make_train_step(linear_loss, optimizer, **options))
    else:
        step = program(optimizer, **options)
    history = []
    for _ in range(steps):
        state, metrics = step(state, batch, jax.random.key(1))
        history.append(metrics)
    return state, history


@pytest.mark.parametrize("unroll", [False, True])
def test_microbatches_change_memory_not_maths(unroll):
    params, batch = problem()
    whole, history = run(params, batch, 5)
    parts, parts_history = run(params, batch, 5, microbatches=4, unroll=unroll)
    assert_allclose(whole.params["w"], parts.params["w"], rtol=1e-5)
    same(history, parts_history, rtol=1e-4)


def test_a_microbatch_is_its_share_of_the_batch():
    (params, batch), sizes = problem(), set()

    def loss(params, batch, keys):
        sizes.add(len(batch["x"]))
        return linear_loss(params, batch, keys)

    step = train.make_train_step(loss, SGD, microbatches=2)
    jax.eval_shape(step, train.create_state(params, SGD), batch, jax.random.key(1))
    assert sizes == {8}


def test_gradient_against_finite_differences(x64):
    params, batch = problem()
    params = jax.tree.map(lambda p: jnp.asarray(np.asarray(p, np.float64)), params)
    state, _ = run(params, batch, 1, optax.sgd(1.0))
    keys = prng.sample_keys(jax.random.fold_in(jax.random.key(1), 0), 16)
    mean = jax.jit(lambda w: linear_loss({**params, "w": w}, batch, keys)[0].mean())
    w = np.asarray(params["w"])
    for i, eps in enumerate(1e-6 * np.eye(3)):
        step = w[i] - np.asarray(state.params["w"])[i]
        assert_allclose(step, (mean(w + eps) - mean(w - eps)) / 2e-6, rtol=1e-5)


def test_ema_ramp():
    params, batch = problem()
    state, _ = run(params, batch, 1, optax.sgd(0.1), ema_decay=0.999)
    # at n = 0 the rate is 1/10: one tenth of the start remains
    expected = 0.1 * params["w"] + 0.9 * state.params["w"]
    assert_allclose(state.ema_params["w"], expected, rtol=1e-5)
    assert state.eval_params is state.ema_params
    late = train.ema_update({"w": 0.0}, {"w": 1.0}, jnp.int32(10**6), 0.999)
    assert_allclose(late["w"], 0.001, rtol=1e-3)


def test_infinite_gradient_with_finite_loss_is_skipped():
    # the gradient is infinite at 0
    loss = lambda p, batch, keys: (jnp.sqrt(p["w"]) * jnp.ones(keys.shape), {})  # noqa: E731
    step = jax.jit(train.make_train_step(loss, SGD))
    state = train.create_state({"w": jnp.zeros(())}, SGD)
    state, metrics = step(state, jnp.ones(4), KEY)
    assert np.isfinite(metrics["loss"]) and state.skipped == 1
    assert float(state.params["w"]) == 0


@pytest.mark.parametrize(
    "rule",
    [
        optax.sgd(1e38),  # the step itself is infinite
        optax.adam(0.1, b2=1.0),  # 0 / 0
        optax.chain(optax.scale(jnp.inf)),
    ],
)
def test_an_update_that_is_not_finite_is_skipped_though_its_gradient_is(rule):
    loss = lambda p, batch, keys: (1e15 * p["w"] * batch["x"], {})  # noqa: E731
    step = jax.jit(train.make_train_step(loss, rule))
    state = train.create_state({"w": jnp.ones(())}, rule)
    after, metrics = step(state, {"x": jnp.ones(4)}, KEY)
    assert np.isfinite(metrics["grad_norm"]) and int(after.skipped) == 1
    same(state.params, after.params)
    same(state.opt_state, after.opt_state)
    keys = prng.sample_keys(KEY, 4)
    text = train.nonfinite_report(loss, state.params, {"x": jnp.ones(4)}, keys)
    assert "look at its numbers (learning rate" in text


@pytest.mark.parametrize("wrong", [0.0, -1.0, np.inf, np.nan])
def test_numbers_of_an_optimiser_out_of_range(wrong, refused):
    config = train.OptimizerConfig
    for name in ("learning_rate", "eps", "clip_norm"):
        refused(rf"optimizer.{name}=.* is outside \(0, inf\)", config, **{name: wrong})
    for name in ("b1", "b2"):
        value = wrong or 1.0  # 0 is allowed: no average
        refused(rf"{name}=.* is outside \[0, 1\)", config, **{name: value})
    refused("weight_decay=.* is outside", config, weight_decay=wrong or -1e-9)
    config(b1=0.0, clip_norm=None)
    # as float32 holds them: no step at all, or NaN
    for change in (
        {"learning_rate": 1e-50},
        {"learning_rate": 1e39},
        {"clip_norm": 1e-50},
        {"eps": 1e-50},
        {"b1": 1 - 1e-9},
        {"b2": 1 - 1e-9},
        {"weight_decay": 1e39},
    ):
        ((name, value),) = change.items()
        words = re.escape(f"optimizer.{name}={value!r} in float32=")
        refused(words, config, **change)
    refused("total_steps=10.5 is of type", config, total_steps=10.5, error=TypeError)


def test_nan_in_a_batch_is_skipped_counted_and_reported():
    (params, batch), optimizer = problem(), optax.adam(0.1)
    step = program(optimizer, ema_decay=0.9)
    state = train.create_state(params, optimizer, ema=True)
    state, _ = step(state, batch, KEY)
    broken = {**batch, "x": batch["x"].copy()}
    broken["x"][3, 1] = np.nan
    given = (params, broken, prng.sample_keys(KEY, 16))
    text = train.nonfinite_report(linear_loss, *given)
    assert "inputs: ['batch/x']" in text and "loss: [3]" in text and "'b', 'w'" in text
    after, _ = step(state, broken, KEY)
    for name in ("params", "opt_state", "ema_params"):
        same(getattr(state, name), getattr(after, name))
    assert int(after.skipped) == int(after.skipped_in_a_row) == 1
    assert int(after.step) == 2
    again, _ = step(after, batch, KEY)
    assert int(again.skipped) == 1 and int(again.skipped_in_a_row) == 0


def test_compiles_once_and_donates(count_compiles):
    (params, batch), optimizer = problem(), optax.adam(0.1)
    step = jax.jit(train.make_train_step(linear_loss, optimizer), donate_argnums=0)
    state = train.create_state(params, optimizer)
    first = state.params["w"]
    jax.block_until_ready(state)
    state, _ = step(state, batch, KEY)
    with count_compiles() as compiled:
        for _ in range(3):
            state, _ = step(state, batch, KEY)
    assert not compiled and first.is_deleted() and not params["w"].is_deleted()


def test_a_step_grows_no_faster_than_its_parameters():
    """What selects the update by its being finite is computed once, not in each leaf."""

    def lines(leaves):
        def loss(params, batch, keys):
            return jnp.square(batch["x"] + sum(params.values())).sum(-1), {}

        optimizer = optax.adam(1e-3)
        state = train.create_state(
            {str(i): jnp.ones(3) for i in range(leaves)}, optimizer
        )
        step = jax.jit(train.make_train_step(loss, optimizer))
        lowered = step.lower(state, {"x": jnp.ones((2, 3))}, jax.random.key(0))
        return lowered.compile().as_text().count("\n")

    few, many = lines(8), lines(32)
    assert many < 4 * few  # with the check in every leaf it was 5.8 times


def test_bad_inputs(refused):
    params, batch = problem()
    refused("batch of 16 does not divide into 3", run, params, batch, 1, microbatches=3)
    message = r"skip_above=0 is outside \(0, inf\]"
    refused(message, run, params, batch, 1, skip_above=0)
    for name in ("absolut", "loss"):
        message = f"names '{name}', but loss_fn reports absol"
        refused(message, run, params, batch, 1, reductions={name: jnp.max})
    make, state = train.make_train_step, train.create_state(params, SGD)
    refused("ema_decay=2", make, linear_loss, SGD, ema_decay=2.0)
    refused("microbatches=0", make, linear_loss, SGD, microbatches=0)
    scalar = make(lambda p, b, k: (p["w"].sum(), {}), SGD)
    refused("one loss an example", scalar, state, batch, KEY)
    for name, shape in (("loss", 16), ("grad_norm", 16), ("a", ())):
        metrics = {name: jnp.zeros(shape)}
        step = make(lambda p, b, k, m=metrics: (b["y"] * p["b"], m), SGD)
        refused(r"metrics are \[batch\].*are taken", step, state, batch, KEY)
    for ema, decay in ((True, None), (False, 0.9)):
        state = train.create_state(params, SGD, ema=ema)
        step = make(linear_loss, SGD, ema_decay=decay)
        refused("create_state", step, state, batch, KEY)
    config, sgd = train.OptimizerConfig, {"name": "sgd", "weight_decay": 0.1}
    refused("Did you mean 'adam", config, name="adamm")
    refused("needs total_steps > warmup_steps", config, schedule="cosine")
    refused("learning_rate=0", config, learning_rate=0.0)
    refused("use optimizer.name='adamw'", config, **sgd)


def test_schedules():
    config = {"schedule": "cosine", "warmup_steps": 10, "total_steps": 110}
    rate = train.make_schedule(train.OptimizerConfig(learning_rate=2.0, **config))
    rates = [rate(step) for step in (0, 5, 10, 60, 110)]
    assert_allclose(rates, [0, 1, 2, 1, 0], atol=1e-6)
    config = {"schedule": "linear", "total_steps": 4}
    rate = train.make_schedule(train.OptimizerConfig(learning_rate=1.0, **config))
    assert_allclose([rate(i) for i in range(5)], [1, 0.75, 0.5, 0.25, 0])


def test_weight_decay_spares_vectors_and_gradients_are_clipped():
    def updates(gradient, params, **options):
        optimizer = train.make_optimizer(train.OptimizerConfig(**options))
        return optimizer.update(gradient, optimizer.init(params), params)[0]

    # a stacked block's bias has two axes and is a bias all the same
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((3, 2)), "gain": jnp.ones(2)}
    zero = jax.tree.map(jnp.zeros_like, params)
    options = {"learning_rate": 0.1, "weight_decay": 0.5, "clip_norm": None}
    found = updates(zero, params, **options)
    assert_allclose(found["kernel"], -0.05, rtol=1e-6)
    assert not found["bias"].any() and not found["gain"].any()
    options = {"name": "sgd", "learning_rate": 1.0, "clip_norm": 1.0}
    found = updates(jnp.array([3.0, 4.0]), jnp.zeros(2), **options)
    assert_allclose(found, [-0.6, -0.8], rtol=1e-6)


def test_a_metric_is_reduced_as_asked_over_the_whole_batch():
    params, batch = problem()
    for microbatches in (1, 4):
        options = {"microbatches": microbatches, "reductions": {"absolute": jnp.max}}
        _, history = run(params, batch, 1, **options)
        keys = prng.sample_keys(jax.random.fold_in(jax.random.key(1), 0), 16)
        each = linear_loss(params, batch, keys)[1]["absolute"]
        assert_allclose(history[0]["absolute"], np.max(each), rtol=1e-6)


def test_large_gradients_are_skipped_and_counted():
    params, batch = problem()
    _, history = run(params, batch, 1)
    norm = float(history[0]["grad_norm"])
    for bound, skipped in ((0.99 * norm, 1), (1.01 * norm, 0)):
        state, history = run(params, batch, 1, skip_above=bound, ema_decay=0.9)
        assert int(state.skipped) == skipped
        assert int(state.skipped_in_a_row) == skipped and int(state.step) == 1
        for kept in (state.params, state.ema_params):
            assert np.array_equal(kept["w"], params["w"]) == bool(skipped)
        # the norm that was too large is reported
        assert_allclose(history[0]["grad_norm"], norm, rtol=1e-6)
