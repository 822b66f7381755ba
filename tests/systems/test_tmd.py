"""TMD: the invariants of its sheet, section 6, by number; DMD2 and MeanFlow beside it."""

import dataclasses
import functools
import json

import jax
import jax.extend
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from checks import same
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import flows, models, train
from tmdjax.core import prng, trees
from tmdjax.systems import dmd2, meanflow, tmd

MU, VARIANCE = 0.7, 0.25
KEYS = jax.random.split(jax.random.key(0), 100_000)
NOISE = prng.normal(jax.random.split(jax.random.key(1), 100_000), (1,))
PLANS = {"ys": [(1, 1), (2, 2), (4, 4)], "y1": [(1, 2), (2, 1), (2, 2)]}


def moments(x):
    return float(x.mean()), float(x.var())


def plan_of(outer=2, inner=2, **options):
    return tmd.make_plan(outer, inner, 1, 4, **options)


# A network that knows everything: data N(MU, VARIANCE)


def exact(params, *inputs, method, y1=None):
    """The law of y given x_t; its map, for 'ys', or for 'y1' if told the noise y1."""
    if method == "backbone":
        x, t, _ = inputs
        total = (1 - t) ** 2 * VARIANCE + t**2
        slope = (t - (1 - t) * VARIANCE) / total
        mean = -MU + slope[:, None] * (x - (1 - t)[:, None] * MU)
        return {"mean": mean, "variance": (VARIANCE / total)[:, None]}
    y, s, r, law = inputs
    s, r = s[:, None], r[:, None]
    spread = lambda s: jnp.sqrt((1 - s) ** 2 * law["variance"] + s**2)  # noqa: E731
    # where the exact inner flow carries y from s to r
    scaled = (y - (1 - s) * law["mean"]) / spread(s)
    average = (y - (1 - r) * law["mean"] - spread(r) * scaled) / (s - r)
    return y - s * average if y1 is None else y1 - average


@functools.partial(jax.jit, static_argnums=0)
def walk(plan):
    """The sampler's steps with a head that is told its y1, as 'y1' needs."""
    x = plan.outer_times[0] * NOISE
    for i, (t, t_next) in enumerate(zip(plan.outer_times, plan.outer_times[1:])):
        y1 = prng.normal(prng.fold_in(KEYS, i), (1,))
        told = y1 if plan.average == "y1" else None
        network = functools.partial(exact, {}, y1=told)
        law = network(x, jnp.full(len(x), t), None, method="backbone")
        x = x - (t - t_next) * tmd.inner_flow(network, law, y1, plan)
    return x


@pytest.mark.parametrize("average", tmd.AVERAGES)
def test_3_sampler_returns_the_data_with_the_exact_head(average):
    """For 'y1' by the steps above: the sampler tells the head nothing of its noise."""
    sample = functools.partial(tmd.sample, exact, {}, NOISE, None, KEYS)
    for numbers in PLANS[average]:
        plan = plan_of(*numbers, average=average)
        x = sample(plan) if average == "ys" else walk(plan)
        assert_allclose(moments(x), (MU, VARIANCE), atol=5e-3, err_msg=str(numbers))


@pytest.mark.parametrize("average", tmd.AVERAGES)
def test_3_the_printed_sign_fails(average):
    mean, variance = moments(walk(plan_of(average=average, sign="plus")))
    assert abs(mean - MU) > 0.5 and variance > 4 * VARIANCE


# the printed form: 0.25 at t = 1 and 0.305 at t = 0.908, in equal shares
@pytest.mark.parametrize("output, variance", [("state", 0.25), ("noise", 0.555 / 2)])
def test_3_law_of_training_samples_and_of_the_printed_form(output, variance):
    plan = plan_of(2, 2, average="ys", output=output)
    generate = jax.jit(functools.partial(tmd.generate, exact, plan, {}))
    x = generate({"x_data": MU + VARIANCE**0.5 * NOISE}, KEYS)
    assert_allclose(moments(x), (MU, variance), atol=6e-3)


def test_16_deterministic_transfer():
    """With the exact prediction the states stay on a straight line to it."""
    times = flows.truncated_grid(4, 5.0)
    noise, target = NOISE[:4], jnp.full((4, 1), 0.3)
    velocity = lambda x, t, cond: (x - target) / t[:, None]  # noqa: E731
    found = dmd2.sample(lambda params, *at: velocity(*at), {}, noise, None, times)
    assert_allclose(found, target, atol=1e-6)
    table = flows.make_table("ode", times)
    states = flows.rollout(None, velocity, noise, table, None).states
    line = np.asarray(target) + times[:, None, None] / times[0] * (noise - target)
    assert_allclose(states, line, atol=1e-6)


def test_dmd2_generates_the_posterior_mean():
    flow = flows.gaussian_mixture([1.0], [[MU]], [VARIANCE**0.5])
    apply_fn = lambda params, x, t, cond: flow.velocity(x, t)  # noqa: E731
    times = flows.truncated_grid(2, 10.0)
    generate = jax.jit(functools.partial(dmd2.generate, apply_fn, times, {}))
    mean, variance = moments(generate({"x_data": MU + VARIANCE**0.5 * NOISE}, KEYS))
    assert abs(mean - MU) < 5e-3 and variance < 0.1 * VARIANCE


def test_renoised_states_lie_on_the_path():
    """The second network answers with its state, so that is what comes out."""

    def apply_fn(params, x, t, cond):
        return jnp.where(t[:, None] > 0.95, (x - 0.3) / 0.999, 0.0 * x)

    given = (apply_fn, {}, NOISE, None, np.array([0.999, 0.6, 0.0]))
    renoised = functools.partial(dmd2.sample, *given, transfer="renoise")
    x, y = renoised(keys=KEYS), renoised(keys=KEYS[::-1])
    assert_allclose(moments(x), (0.4 * 0.3, 0.6**2), atol=5e-3)
    assert np.abs(np.asarray(x) - y).mean() > 0.1


@pytest.mark.parametrize("steps", [1, 3])
def test_meanflow_reaches_the_data_with_the_exact_map(steps):
    spread = lambda t: jnp.sqrt((1 - t) ** 2 * VARIANCE + t**2)[:, None]  # noqa: E731

    def apply_fn(params, x, t, r, cond):
        scaled = (x - (1 - t)[:, None] * MU) / spread(t)
        return (x - (1 - r)[:, None] * MU - spread(r) * scaled) / (t - r)[:, None]

    x = meanflow.sample(apply_fn, {}, NOISE, None, flows.truncated_grid(steps, 5.0))
    assert_allclose(moments(x), (MU, VARIANCE), atol=5e-3)


# A network of four numbers
TOY = {"backbone": np.float32(0.8), "head": np.float32([0.7, -0.4, 0.3])}
DATA = np.random.default_rng(5).normal(size=(2000, 3)).astype(np.float32)
ROWS = {"x_data": jnp.asarray(DATA)}
CONDITIONED = {**ROWS, "cond": jnp.ones((2000, 1))}
ROW_KEYS = KEYS[:2000]
CONFIG = functools.partial(flows.FlowMapConfig, drop_rate=0.0, derivative="difference")
NO_JUMPS = CONFIG(map_rate=0.0, guidance=1.0, loss_constant=0.5)


def toy(params, *inputs, method):
    """A backbone of one number and a head of three."""
    if method == "backbone":
        x, t, cond = inputs
        hidden = jnp.tanh(params["backbone"] * x + t[:, None])
        return hidden if cond is None else hidden + cond
    y, s, r, features = inputs
    a, b, c = params["head"]
    return jnp.tanh(a * y + b * features) + c * (s - 0.5 * r)[:, None]


def toy_average(params, x, t, r, cond):
    a, b, c = params["head"]
    u = jnp.tanh(params["backbone"] * a * x + c * t[:, None]) + b * r[:, None]
    return u if cond is None else u + cond


LOSSES = {
    "tmd": (toy, lambda *a, **k: tmd.pretraining_loss(*a[:4], PLAN, *a[4:], **k)),
    "meanflow": (toy_average, meanflow.meanflow_loss),
}
PLAN = plan_of()


def asked_by(system, config, rows=ROWS, null_cond=None, plan=PLAN):
    """The loss, its gradient, and all that the network is asked, in one program."""
    network, loss_of = LOSSES[system]
    if system == "tmd":
        loss_of = lambda *a, **k: tmd.pretraining_loss(*a[:4], plan, *a[4:], **k)  # noqa: E731

    def run(params, keys):
        asked = []

        def spying(params, *inputs, **method):
            asked.append((method.get("method", "whole"), inputs))
            return network(params, *inputs, **method)

        loss, _ = loss_of(params, spying, rows, keys, config, null_cond)
        names[:] = [name for name, _ in asked]
        return loss, [inputs for _, inputs in asked]

    def gradient(params, keys):
        total = lambda p: loss_of(p, network, rows, keys, config, null_cond)[0].sum()  # noqa: E731
        return jax.grad(total)(params)

    names = []
    loss, inputs = jax.jit(run)(TOY, ROW_KEYS)
    grads = jax.jit(gradient)(TOY, ROW_KEYS)
    return np.asarray(loss), grads, list(zip(names, jax.tree.map(np.asarray, inputs)))


def check_regression(residual, value, found):
    """Value and gradient of |residual|^2 over its own size, c = 0.5 an element."""

    @jax.jit
    def expected(params):
        each = jnp.square(residual(params)).sum(1)
        loss = lambda p: jnp.square(residual(p)).sum(1) / (each + 1.5)  # noqa: E731
        return loss(params), jax.grad(lambda p: loss(p).sum())(params)

    loss, grads = expected(TOY)
    assert_allclose(value, loss, rtol=1e-4)
    same(found, grads, rtol=1e-4)


@pytest.mark.parametrize("average", tmd.AVERAGES)
def test_6_rows_without_a_jump_regress_the_head_onto_the_transition(average):
    """u = y1 - head and v = y1 - y: the head's target is y, also for the gradient."""
    value, found, asked = asked_by("tmd", NO_JUMPS, plan=plan_of(average=average))
    (x_t, t, _), (y_s, s, r, _) = (inputs for _, inputs in asked[:2])
    assert_array_equal(s, r)
    noise = (x_t - (1 - t[:, None]) * DATA) / t[:, None]
    y, inner = noise - DATA, s[:, None]
    # both noises are standard normal, and independent
    y1 = ((y_s - (1 - inner) * y) / inner)[s > 0.2]
    for drawn in (noise, y1):
        assert_allclose(moments(drawn), (0, 1), atol=0.08)
    assert abs(np.mean(noise[s > 0.2] * y1)) < 0.06

    def residual(params):
        features = toy(params, x_t, t, None, method="backbone")
        answer = toy(params, y_s, s, r, features, method="head")
        return (answer - y) / (1.0 if average == "y1" else inner)

    check_regression(residual, value, found)


def test_meanflow_jumps_as_told_and_without_is_flow_matching():
    config = CONFIG(map_rate=0.4, guidance=2.0)
    loss, _, asked = asked_by("meanflow", config, CONDITIONED, np.zeros(1))
    assert (loss >= 0).all() and (loss < 1).all()
    (_, (_, t, same_t, null)), (_, (_, _, r, cond)) = asked[:2]
    assert_array_equal(t, same_t)
    assert (null == 0).all() and (cond == 1).all()
    assert 0.36 < np.mean(r < t) < 0.44 and (r <= t).all()
    value, found, asked = asked_by("meanflow", NO_JUMPS)
    _, (x_t, t, r, _) = asked[0]
    assert_array_equal(t, r)
    v = (x_t - DATA) / t[:, None]
    assert_allclose(moments((v + DATA)[t > 0.2]), (0, 1), atol=0.08)
    check_regression(lambda p: toy_average(p, x_t, t, r, None) - v, value, found)


def test_pretraining_asks_at_the_times_of_the_plan():
    plan = plan_of(2, 4)
    config = CONFIG(map_rate=0.6, guidance=3.0, drop_rate=0.1)
    loss, _, asked = asked_by("tmd", config, CONDITIONED, np.zeros(1), plan)
    assert loss.shape == (2000,) and (loss >= 0).all() and (loss < 1).all()  # 11
    null, trained = (inputs for name, inputs in asked if name == "backbone")
    starts = np.unique(null[1])[::-1]
    assert_array_equal(starts, np.float32(plan.outer_times[:-1]))
    assert (null[2] == 0).all() and 0.06 < (trained[2] == 0).mean() < 0.14
    (_, s, r, _), (_, same_s, end, _) = [i for name, i in asked if name == "head"][:2]
    # guidance is that of the velocity, not of a jump
    assert_array_equal(s, r)
    assert_array_equal(s, same_s)
    jumps = end < s
    assert 0.55 < jumps.mean() < 0.65
    inner = np.float32(plan.inner_times)[::-1]
    below = np.searchsorted(inner, s[jumps], side="right") - 1
    assert_array_equal(end[jumps], inner[below])


@pytest.mark.parametrize("derivative", flows.DERIVATIVES)
@pytest.mark.parametrize("system", LOSSES)
def test_only_the_derivative_is_taken_of_another_network(system, derivative):
    """The network itself changes nothing, nor does a gradient pass through it."""
    network, loss_of = LOSSES[system]
    config = CONFIG(map_rate=1.0, derivative=derivative)

    @jax.jit
    def gradients(params):
        def total(params, other=None):
            options = {"derivative_apply_fn": other}
            return loss_of(params, network, ROWS, ROW_KEYS, config, **options)[0].sum()

        doubled = lambda *inputs, **method: 2 * network(*inputs, **method)  # noqa: E731
        return [jax.value_and_grad(total)(params, o) for o in (None, network, doubled)]

    plain, itself, other = gradients(TOY)
    same(plain, itself, rtol=1e-5)
    assert abs(other[0] / plain[0] - 1) > 0.01


@pytest.mark.parametrize("derivative", flows.DERIVATIVES)
def test_backbone_runs_once_and_the_derivatives_head_in_float32(derivative):
    calls = []

    def half(name, params, *inputs, method):
        *given, last = inputs
        if method == "head":
            calls.append((name, method, str(last["hidden"].dtype)))
            return toy(params, *given, jnp.float32(last["hidden"]), method=method)
        calls.append((name, method, "bfloat16"))
        return {"hidden": jnp.bfloat16(toy(params, *inputs, method=method))}

    trained = functools.partial(half, "trained")
    other = functools.partial(half, "derivative")
    config = CONFIG(map_rate=1.0, derivative=derivative)

    def total(params):
        given = (params, trained, ROWS, ROW_KEYS, PLAN, config)
        return tmd.pretraining_loss(*given, derivative_apply_fn=other)[0].sum()

    jax.eval_shape(jax.grad(total), TOY)
    assert calls == [
        ("trained", "backbone", "bfloat16"),
        ("trained", "head", "bfloat16"),
        *[("derivative", "head", "float32")] * (1 if derivative == "jvp" else 2),
    ]


def test_stage_one_and_sampling_compile_once(count_compiles):
    rule = train.make_optimizer(train.OptimizerConfig())
    config = flows.FlowMapConfig(drop_rate=0.0)
    loss = lambda params, rows, keys: LOSSES["tmd"][1](params, toy, rows, keys, config)  # noqa: E731
    step = jax.jit(train.make_train_step(loss, rule))
    state, key = train.create_state(TOY, rule), jax.random.key(0)
    state, first = step(state, ROWS, key)
    draw = functools.partial(tmd.sample, toy, cond=None, keys=KEYS[:4], plan=PLAN)
    x = draw(noise=ROWS["x_data"][:4], params=TOY)
    with count_compiles() as compiled:
        state, metrics = step(state, ROWS, key)
        y = draw(noise=ROWS["x_data"][:4], params=state.params)
    assert not compiled
    assert int(state.step) == 2 and metrics["loss"] != first["loss"]
    assert not np.array_equal(x, y)


def test_7_one_inner_step_from_one_is_the_heads_answer():
    network = functools.partial(toy, TOY)
    y1, ones = ROWS["x_data"][:4], jnp.ones(4)
    features = network(y1[::-1], 0.999 * ones, None, method="backbone")
    one = tmd.inner_flow(network, features, y1, plan_of(1, 1, start=1.0))
    head = network(y1, ones, 0 * ones, features, method="head")
    assert_allclose(one, head, atol=1e-6)


def test_9_gradient_through_the_rollout_is_right(x64):
    """Against finite differences, a head of two numbers."""
    y1 = jnp.asarray(np.random.default_rng(3).normal(size=(5, 2)))

    @jax.jit
    def total(theta):
        def network(y, s, r, features, method):
            return jnp.tanh(theta[0] * y + theta[1] * (s - r)[:, None])

        return jnp.sum(jnp.sin(tmd.inner_flow(network, None, y1, plan_of(1, 4))))

    theta = jnp.array([0.7, -0.4], jnp.float64)
    jax.test_util.check_grads(total, (theta,), 1, ["rev"], rtol=1e-4)


def test_9_gradient_of_the_rollout_reaches_backbone_and_head():
    made = lambda params: tmd.generate(toy, PLAN, params, ROWS, ROW_KEYS)  # noqa: E731
    grads = jax.jit(jax.grad(lambda params: jnp.square(made(params)).mean()))(TOY)
    assert all((np.abs(leaf) > 1e-4).all() for leaf in jax.tree.leaves(grads))


def test_15_samples_depend_on_keys_and_one_step_uses_no_data(refused):
    x = ROWS["x_data"]
    draw = functools.partial(tmd.sample, toy, TOY, x[:4], None, plan=PLAN)
    first, again, other = (np.asarray(draw(KEYS[i : i + 4])) for i in (0, 0, 4))
    assert_array_equal(first, again)
    assert np.abs(first - other).min(1).max() > 1e-4
    generate = jax.jit(functools.partial(tmd.generate, toy, plan_of(1, 2), TOY))
    assert_array_equal(*(generate({"x_data": y}, ROW_KEYS) for y in (x, 100 + x)))
    # what other code drew, in place of keys
    steps = len(PLAN.outer_times) - 1
    inner = [prng.normal(prng.fold_in(KEYS[:4], i), x.shape[1:]) for i in range(steps)]
    assert_allclose(draw(jnp.stack(inner)), first, rtol=1e-5, atol=1e-6)
    for wrong in (inner[:1], [y[:3] for y in inner]):
        refused("shape", draw, jnp.stack(wrong))
    starts, inner_keys = prng.split(ROW_KEYS).T
    _, t, noise = flows.noised_start(x, starts, PLAN.outer_times)
    given = {
        "t": t,
        "noise": noise,
        "inner_noise": prng.normal(inner_keys, x.shape[1:]),
    }
    generate = jax.jit(functools.partial(tmd.generate, toy, PLAN, TOY))
    keyed, other = (generate({"x_data": x}, k) for k in (ROW_KEYS, ROW_KEYS[::-1]))
    replayed = generate({"x_data": x}, ROW_KEYS[::-1], **given)
    assert_allclose(replayed, keyed, rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(other) - keyed).max() > 1e-2
    refused("noise", flows.noised_start, x, starts, (1.0, 0.0), noise=noise[:1])


def test_plans_travel_with_a_model(recwarn, refused):
    assert tmd.StudentPlan.from_dict(json.loads(json.dumps(PLAN.to_dict()))) == PLAN
    given = (toy, TOY, ROWS["x_data"][:4], None, KEYS[:4])
    draw = functools.partial(tmd.sample, *given, trained_plan=PLAN.to_dict())
    draw(plan=PLAN)
    assert not recwarn.list
    refused(r"outer_times=.*allow_mismatch=True", draw, plan=plan_of(1, 2))
    refused("head_blocks=2, trained with 1", draw, plan=tmd.make_plan(2, 2, 2, 4))
    with pytest.warns(UserWarning, match="inner_times"):
        draw(plan=plan_of(2, 1), allow_mismatch=True)


# A video network
SHARED = {
    "name": "video_dit", "patch_size": (1, 2, 2), "heads": 2, "head_dim": 12, "depth": 4,
    "mlp_width": 20, "text_width": 8, "frequency_dim": 16, "remat": False,
}  # fmt: skip
SPLIT = {"name": "split_dit", "shared": SHARED, "head_blocks": 1, "initial_gate": 0.3}
SPLIT["fusion_width"] = 16  # another than the blocks': not counted as one
RNG = np.random.default_rng(8)
BATCH = {
    "x_data": jnp.asarray(RNG.normal(size=(4, 2, 4, 4, 3)), jnp.float32),
    "cond": jnp.asarray(RNG.normal(size=(4, 3, 8)), jnp.float32),
}
FEW = KEYS[:4]


@pytest.fixture(scope="module")
def student():
    module = models.build(SPLIT)
    inputs = (BATCH["x_data"], jnp.full(4, 0.5), BATCH["cond"])
    params = models.init_params(module, jax.random.key(1), *inputs)
    noisy = lambda p: p + np.float32(0.05 * RNG.normal(size=p.shape))  # noqa: E731
    params = jax.tree.map(noisy, params)
    return module, models.functional(module), params


def test_2_effective_evaluations():
    for numbers, expected in (
        ((2, 2, 5, 30), 2.3333), ((2, 4, 5, 30), 3.0), ((1, 2, 5, 30), 1.1667),
        ((1, 4, 5, 30), 1.5), ((2, 4, 5, 40), 2.75), ((1, 4, 5, 40), 1.375),
    ):  # fmt: skip
        assert tmd.effective_nfe(*numbers) == pytest.approx(expected, abs=1e-4)
        assert tmd.make_plan(*numbers).nfe == tmd.effective_nfe(*numbers)


def block_calls(jaxpr, times=1):
    """How often a block runs: products with an MLP's first kernel, loops multiplied."""
    found = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found += times * (eqn.invars[1].aval.shape == (24, 20))
        repeats = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            found += block_calls(inner, times * repeats)
    return found


@pytest.mark.parametrize("outer, inner", [(2, 4), (4, 1)])
def test_2_blocks_that_run(student, outer, inner):
    (_, apply_fn, params), plan = student, plan_of(outer, inner)
    given = (BATCH["x_data"], BATCH["cond"], FEW, plan)
    sample = jax.make_jaxpr(lambda params: tmd.sample(apply_fn, params, *given))
    assert block_calls(sample(params).jaxpr) == round(4 * plan.nfe)


def test_7_first_student_step_is_a_step_of_the_teacher(student):
    module, apply_fn, params = student
    params = {**params, "joint": {**params["joint"], "gate": jnp.zeros(())}}
    params["interval"] = jax.tree.map(np.zeros_like, params["interval"])
    plan, noise, text = plan_of(1, 1, average="ys"), BATCH["x_data"], BATCH["cond"]
    found = tmd.sample(apply_fn, params, noise, text, FEW, plan)
    teacher = functools.partial(models.functional(module.shared), params["shared"])
    expected = flows.endpoints(teacher, 0.999 * noise, np.array(plan.outer_times), text)
    # the head's answer is the velocity; inside, y1 keeps the thousandth left of s
    assert_allclose(found, expected, atol=1e-5)


def test_9_gradient_reaches_backbone_and_every_head_block(student):
    _, apply_fn, params = student
    config = flows.FlowMapConfig(map_rate=0.9, drop_rate=0.0)

    def total(params):
        # the target's derivative carries no gradient: any other will do
        other = {"derivative_apply_fn": lambda params, y, *rest, method: jnp.sin(y)}
        given = (params, apply_fn, BATCH, FEW, PLAN, config)
        return tmd.pretraining_loss(*given, **other)[0].sum()

    grads = jax.tree.map(np.asarray, jax.jit(jax.grad(total))(params))
    for name, leaf in trees.flatten(grads["shared"]["blocks"]).items():
        if not name.endswith("key/bias"):
            assert (np.abs(leaf).reshape(4, -1).max(1) > 0).all(), name
    grads = trees.flatten(grads)
    others = ("shared/patch_embedding/kernel", "joint/gate", "interval/hidden/kernel")
    for name in others:
        assert np.abs(grads[name]).max() > 0, name


def test_bad_inputs(refused):
    refused(r"must lie in 1..L-1 = 1..3", tmd.make_plan, 2, 2, 4, 4)
    refused("head_blocks=0", tmd.make_plan, 2, 2, 0, 4)
    refused("steps=0", tmd.make_plan, 0, 2, 1, 4)
    refused("steps=0", tmd.make_plan, 2, 0, 1, 4)
    changed = functools.partial(dataclasses.replace, PLAN)
    refused("strictly decrease", changed, outer_times=(0.9, 0.95, 0))
    refused("end at 0", changed, outer_times=(0.9, 0.1))
    refused("shift=0.5", plan_of, outer_shift=0.5)
    refused("average='x'", plan_of, average="x")
    refused("output='x1'", plan_of, output="x1")
    refused("sign='\\+'", plan_of, sign="+")
    refused("inner steps N=0", tmd.effective_nfe, 1, 0, 1, 4)
    draw = functools.partial(dmd2.sample, print, {}, NOISE, None, (1.0, 0.0))
    refused("give keys", draw, transfer="renoise")
    refused("transfer='ode'", draw, transfer="ode")
    refused("need null_cond", tmd.pretraining_loss, {}, print, BATCH, FEW, PLAN)


def test_renoised_steps_may_be_given_their_noise(refused):
    def network(params, x, t, cond):
        return x * t[:, None]

    grid, keys = flows.truncated_grid(3, 2.0), KEYS[:5]
    draw = functools.partial(
        dmd2.sample, network, {}, NOISE[:5], None, grid, transfer="renoise"
    )
    noise = jnp.stack([prng.normal(prng.fold_in(keys, i), (1,)) for i in range(3)])
    assert_allclose(draw(step_noise=noise), draw(keys=keys), rtol=1e-6)
    refused("give one a step, .3, 5, 1", draw, step_noise=noise[:2])
