import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax import flows
from tmdjax.core import conventions, prng

loss_of = jax.jit(flows.flow_matching_loss, static_argnums=1)


def keys_of(count, seed=0):
    return prng.sample_keys(jax.random.key(seed), count)


def affine(x, t, cond):
    return x * t[:, None] + cond[:, None]


def test_guidance_extrapolates():
    x, t, cond = np.ones((3, 2)), np.full(3, 0.5), np.array([1.0, 2.0, 3.0])
    assert flows.classifier_free_guidance(affine, 1.0, 0.0) is affine
    v_cond, v_null = affine(x, t, cond), affine(x, t, np.zeros(3))
    unconditional = jax.jit(flows.classifier_free_guidance(affine, 0.0, 0.0))
    np.testing.assert_allclose(unconditional(x, t, cond), v_null)
    guided = jax.jit(flows.classifier_free_guidance(affine, 3.0, 0.0))(x, t, cond)
    np.testing.assert_allclose(guided - v_cond, 2 * (v_cond - v_null), rtol=1e-6)


def test_guidance_is_one_call_a_step():
    calls = []

    def velocity(x, t, cond):
        calls.append(x.shape)
        return x + cond["tokens"].sum((1, 2))[:, None]

    null = {"tokens": jnp.zeros((4, 5))}
    guided = flows.classifier_free_guidance(velocity, 2.0, null)
    jax.eval_shape(guided, np.ones((3, 2)), np.ones(3), {"tokens": np.ones((3, 4, 5))})
    assert calls == [(6, 2)]


@pytest.mark.parametrize("null", [300, -1, np.int64(70_000), np.uint16(999)])
def test_a_null_class_beyond_the_conditions_dtype_is_itself(null):
    seen, cond = [], jnp.zeros(3, jnp.uint8)
    x, t = jnp.ones((3, 2)), jnp.ones(3)

    def velocity(x, t, cond):
        seen.append(jnp.asarray(cond))
        return x * cond[:, None]

    guided = flows.classifier_free_guidance(velocity, 2.0, null)
    found = jax.jit(guided)(x, t, cond)
    np.testing.assert_allclose(found, -float(null))
    guided(x, t, cond)
    np.testing.assert_array_equal(seen[-1], [0, 0, 0, null, null, null])
    dropped = flows.drop_condition(keys_of(3), cond, null, 1.0)
    np.testing.assert_array_equal(dropped, [null] * 3)


def test_a_null_that_the_condition_cannot_hold_is_refused(refused):
    labels, floats = np.zeros(3, np.int32), np.zeros((3, 2), np.float16)
    given = (9.7, labels), (np.nan, labels), (1e6, floats), (2, labels > 0)
    for null, cond in (*given, (2049, floats)):  # an id that float16 would round
        refused("cannot hold it", flows.drop_condition, keys_of(3), cond, null, 0.5)
    x, t = np.ones((3, 2), np.float32), np.ones(3, np.float32)
    guided = flows.classifier_free_guidance(lambda x, t, c: x, 2.0, 9.7)
    for call in (guided, jax.jit(guided)):
        refused("null condition is float.*int32, which cannot", call, x, t, labels)
    for shape in ((1,), (3,), (3, 2)):  # one with a batch axis, or of other features
        words = rf"null condition has shape \({shape[0]},.* of the condition \(2,\)"
        drop = flows.drop_condition, keys_of(3), floats
        refused(words, *drop, np.zeros(shape, np.float16), 0.5)


def test_drop_condition_rate():
    keys, cond = keys_of(10_000), np.arange(10_000, dtype=np.int32) % 10
    drop = jax.jit(flows.drop_condition, static_argnums=3)
    dropped = np.asarray(drop(keys, cond, 10, 0.1))
    assert abs((dropped == 10).mean() - 0.1) < 0.012
    np.testing.assert_array_equal(dropped[dropped != 10], cond[dropped != 10])
    np.testing.assert_array_equal(drop(keys, cond, 10, 0.0), cond)
    assert (np.asarray(drop(keys, cond, 10, 1.0)) == 10).all()


def test_loss_of_the_exact_velocity_is_the_conditional_variance():
    # One Gaussian: given x_t the target has variance
    # (1 + s^2) - (t - (1-t) s^2)^2 / ((1-t)^2 s^2 + t^2) in each dimension.
    std, n = 0.5, 200_000
    mixture = flows.gaussian_mixture([1.0], [[0.3, -0.4]], [std])
    x = jax.jit(mixture.sample, static_argnums=1)(jax.random.key(0), n)
    velocity = lambda params, *inputs: mixture.velocity(*inputs)  # noqa: E731
    loss, metrics = jax.device_get(loss_of({}, velocity, x, keys_of(n, 1)))
    t = np.linspace(0, 1, 20_001)
    variance = (1 - t) ** 2 * std**2 + t**2
    exact = np.mean(1 + std**2 - (t - (1 - t) * std**2) ** 2 / variance)
    assert loss.shape == (n,)
    assert abs(float(loss.mean()) - exact) < 4 * float(loss.std()) / np.sqrt(n)
    halves = metrics["loss_near_data"].mean() + metrics["loss_near_noise"].mean()
    np.testing.assert_allclose(halves / 2, loss.mean(), rtol=1e-5)


def test_per_example_randomness_is_per_key():
    def apply_fn(params, x, t, cond):
        return x * t[:, None]

    keys, x = keys_of(6, 3), np.ones((6, 2), np.float32)
    whole, _ = loss_of({}, apply_fn, x, keys)
    part, _ = loss_of({}, apply_fn, x[2:4], keys[2:4])
    np.testing.assert_allclose(np.asarray(whole)[2:4], part, rtol=1e-6)


@pytest.mark.parametrize(
    "sampler, mean",
    [
        (flows.uniform_time(), 0.5),
        (flows.logit_normal_time(), 0.5),
        (flows.beta_time(), 1 - 0.999 * 0.4),  # the mean of Beta(1.5, 1) is 0.6
        (flows.logit_normal_time(-1.0, 0.5), 0.279419),  # quadrature of the density
        (flows.shifted_time(flows.uniform_time(), 3.0), 0.67604),  # 1.5 - 0.75 ln 3
    ],
)
def test_time_samplers(sampler, mean):
    t = np.asarray(jax.jit(sampler)(keys_of(100_000)))
    assert t.shape == (100_000,) and t.min() >= 0 and t.max() <= 1
    assert abs(t.mean() - mean) < 4 * t.std() / np.sqrt(len(t))


def test_bad_inputs(refused):
    keys = keys_of(2)
    given = (flows.flow_matching_loss, {}, lambda *a: a[1], jnp.ones((2, 2)), keys)
    refused("needs both cond and null_cond", *given, drop_rate=0.1)
    refused("x_noise has shape", *given, x_noise=np.zeros((2, 1)))
    refused("std=0", flows.logit_normal_time, 0.0, 0.0)
    refused("alpha=0", flows.beta_time, 0.0)
    drop, words = flows.drop_condition, r"rate=1.5 is outside \[0, 1\]"
    refused(words, drop, keys, np.zeros(2, np.int32), 10, 1.5)
    outside = r"times has 1 value.*outside \[0, 1\]"
    refused(outside, flows.discrete_time, [0.5, 1.5])
    refused("Did you mean 'velocity'", flows.as_velocity, affine, "velocty")
    guide = functools.partial(flows.classifier_free_guidance, affine, null_cond=0.0)
    refused("guidance scale has 1 non-finite", guide, float("nan"))
    refused("guidance scale is '2'; give a number", guide, "2", error=TypeError)
    traced = jax.jit(lambda scale: guide(scale)(jnp.ones((1, 1)), *jnp.ones((2, 1))))
    refused("scale is .*; give a number that is known", traced, 2.0, error=TypeError)


def test_facts_pass_our_wrappers_and_are_unknown_behind_a_lambda():
    plain = lambda x, t, c: x  # noqa: E731
    guided = flows.classifier_free_guidance(plain, 3, 0)
    wrapped = conventions.flip_velocity(flows.as_velocity(guided, "noise"))
    wrapped = flows.OnGrid(flows.as_pytree(wrapped), (1.0, 0.0))
    for known in (guided, flows.as_pytree(guided), wrapped):
        assert flows.guidance_scale(known) == 3.0
    assert flows.around(wrapped, flows.Guided).scale == 3.0
    assert flows.around(guided, flows.OnGrid) is None
    for unknown in (plain, lambda *at: guided(*at), functools.partial(guided)):
        assert flows.guidance_scale(unknown) is None


def test_facts_stay_known_in_compiled_programs():
    guided = flows.classifier_free_guidance(affine, 3, 0.0)
    carried = flows.OnGrid(flows.as_pytree(guided), (1.0, 1 / 3, 0.0))
    seen = []

    def look(velocity, x):
        facts = flows.around(velocity, flows.OnGrid).times
        seen.append((flows.guidance_scale(velocity), facts))
        return velocity(x, x[:, 0], x[:, 0]).sum()

    x = jnp.ones((4, 3, 2))
    jax.jit(jax.vmap(look, (None, 0)))(carried, x)
    jax.eval_shape(jax.grad(look, 1), carried, x[0])
    assert seen == [(3.0, (1.0, 1 / 3, 0.0))] * 2


def test_an_unknown_scale_may_be_one_and_nothing_else():
    for a, b, differs in (
        (None, None, False),
        (None, 1.0, False),
        (2.0, 2.0, False),
        (None, 2.0, True),
        (None, 0.0, True),
        (1.0, 2.0, True),
    ):
        assert flows.guidance_differs(a, b) == flows.guidance_differs(b, a) == differs


def test_as_pytree_keeps_values_and_exposes_parameters(refused):
    def apply_fn(params, x, t, cond, power=1):
        return params["w"] * x**power

    params = {"w": jnp.arange(2.0)}
    x, t = jnp.ones((3, 2)) * 2, jnp.ones(3)
    velocity = flows.as_pytree(functools.partial(apply_fn, params))
    assert jax.tree.leaves(velocity)[0] is params["w"]
    np.testing.assert_array_equal(velocity(x, t, None), params["w"] * x)
    # options stay static beside parameters that do not
    call = jax.jit(lambda velocity, x: velocity(x, t, None))
    for power in (2, 3):
        other = flows.as_pytree(functools.partial(apply_fn, params, power=power))
        assert len(jax.tree.leaves(other)) == 1
        np.testing.assert_array_equal(call(other, x), params["w"] * x**power)
    held = jax.tree_util.Partial(apply_fn, params)
    again = flows.as_pytree(held)
    assert jax.tree.structure(again) == jax.tree.structure(held)
    listed = functools.partial(apply_fn, params, power={1})
    refused(r"holds \{1\}, which a compiled", flows.as_pytree, listed, error=TypeError)


def test_as_pytree_compiles_once_for_other_parameters(count_compiles):
    def apply_fn(params, x, t, cond, *, train, scale):
        return x * params if train and scale == 2.0 else x

    def velocity(value):
        inner = functools.partial(apply_fn, np.float32(value), train=True, scale=2.0)
        outer = flows.as_velocity(conventions.flip_velocity(inner), "velocity")
        return flows.as_pytree(outer)

    x, t = jnp.ones((3, 2)), jnp.ones(3)
    call = jax.jit(lambda velocity, x: velocity(x, t, None))
    first = call(velocity(1.0), x)
    with count_compiles() as compiled:
        second = call(velocity(3.0), x)
    assert not compiled
    np.testing.assert_array_equal(second, 3 * first)


def test_discrete_times_are_uniform_over_the_choices():
    sampler = flows.discrete_time([1.0, 0.75, 0.5, 0.25])
    values, counts = np.unique(jax.jit(sampler)(keys_of(4000)), return_counts=True)
    np.testing.assert_allclose(values, [0.25, 0.5, 0.75, 1.0])
    assert np.abs(counts - 1000).max() < 4 * np.sqrt(1000 * 0.75)


def test_reflow_regresses_onto_the_line_between_pairs():
    """A network that knows the pair's line has no loss, at any time."""
    x_data, x_noise = np.random.default_rng(0).normal(size=(2, 6, 2)).astype(np.float32)

    def line(params, x, t, cond):
        return x_noise - x_data + params["offset"]

    for offset in (0.0, 2.0):
        given = ({"offset": offset}, line, x_data, keys_of(6))
        loss, _ = loss_of(*given, x_noise=x_noise)
        np.testing.assert_allclose(loss, offset**2, rtol=1e-6, atol=1e-12)
