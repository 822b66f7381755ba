"""TMD: the invariants of its sheet, section 6, by number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax import flows, models
from tmdjax.core import prng, trees
from tmdjax.systems import dmd2, meanflow, tmd

MU, VARIANCE = 0.7, 0.25


def gaussian(x, t, cond=None, *, method):
    """The exact backbone for data N(MU, VARIANCE): the law of y given x_t."""
    assert method == "backbone"
    total = (1 - t) ** 2 * VARIANCE + t**2
    slope = (t - (1 - t) * VARIANCE) / total
    mean = -MU + slope[:, None] * (x - (1 - t)[:, None] * MU)
    return {"mean": mean, "variance": (VARIANCE / total)[:, None]}


def jump(y, s, r, law):
    """Where the exact inner flow carries y from s to r."""
    s, r = s[:, None], r[:, None]
    spread = lambda s: jnp.sqrt((1 - s) ** 2 * law["variance"] + s**2)  # noqa: E731
    return (1 - r) * law["mean"] + spread(r) / spread(s) * (y - (1 - s) * law["mean"])


def exact(average, y1=None):
    """Backbone and head that know everything; 'y1' needs the rollout's own noise."""

    def network(*inputs, method):
        if method == "backbone":
            return gaussian(*inputs, method=method)
        y, s, r, law = inputs
        average_velocity = (y - jump(y, s, r, law)) / (s - r)[:, None]
        return (
            y1 - average_velocity
            if average == "y1"
            else y - s[:, None] * average_velocity
        )

    return network


def plan_of(outer=2, inner=2, **options):
    return tmd.make_plan(outer, inner, 1, 4, **options)


KEYS = jax.random.split(jax.random.key(0), 100_000)
NOISE = prng.normal(jax.random.split(jax.random.key(1), 100_000), (1,))


def moments(x):
    return float(x.mean()), float(x.var())


@pytest.mark.parametrize("outer, inner", [(1, 1), (2, 2), (4, 4)])
def test_3_sampler_returns_the_data_with_the_exact_head(outer, inner):
    plan = plan_of(outer, inner, average="ys")
    apply_fn = lambda params, *inputs, method: exact("ys")(*inputs, method=method)  # noqa: E731
    x = tmd.sample(apply_fn, {}, NOISE, None, KEYS, plan)
    np.testing.assert_allclose(moments(x), (MU, VARIANCE), atol=5e-3)


def walk(plan):
    """The sampler's steps with a head that is told its y1."""
    x = plan.outer_times[0] * NOISE
    for i, (t, t_next) in enumerate(zip(plan.outer_times, plan.outer_times[1:])):
        y1 = prng.normal(prng.fold_in(KEYS, i), (1,))
        network = exact(plan.average, y1)
        law = network(x, jnp.full(len(x), t), method="backbone")
        x = x - (t - t_next) * tmd.inner_flow(network, law, y1, plan)
    return x


@pytest.mark.parametrize("average", tmd.AVERAGES)
@pytest.mark.parametrize("outer, inner", [(1, 2), (2, 1), (2, 2)])
def test_3_both_averages_with_the_exact_head(outer, inner, average):
    plan = plan_of(outer, inner, average=average)
    np.testing.assert_allclose(moments(walk(plan)), (MU, VARIANCE), atol=5e-3)


@pytest.mark.parametrize("average", tmd.AVERAGES)
def test_3_the_printed_sign_fails(average):
    mean, variance = moments(walk(plan_of(average=average, sign="plus")))
    assert abs(mean - MU) > 0.5 and variance > 4 * VARIANCE


def outputs(form):
    plan = plan_of(2, 2, average="ys", output=form)
    apply_fn = lambda params, *inputs, method: exact("ys")(*inputs, method=method)  # noqa: E731
    x_data = MU + VARIANCE**0.5 * NOISE
    return tmd.generate(apply_fn, plan, {}, {"x_data": x_data}, KEYS), x_data, plan


def test_3_training_samples_have_the_data_law_and_the_printed_form_has_not():
    state, _x_data, _plan = outputs("state")
    np.testing.assert_allclose(moments(state), (MU, VARIANCE), atol=5e-3)
    # the printed form: 0.25 at t = 1 and 0.305 at t = 0.908, in equal shares
    _, variance = moments(outputs("noise")[0])
    assert variance == pytest.approx((0.25 + 0.305) / 2, abs=6e-3)


@pytest.mark.parametrize(
    "numbers, expected",
    [
        ((2, 2, 5, 30), 2.3333), ((2, 4, 5, 30), 3.0), ((1, 2, 5, 30), 1.1667),
        ((1, 4, 5, 30), 1.5), ((2, 4, 5, 40), 2.75), ((1, 4, 5, 40), 1.375),
    ],
)  # fmt: skip
def test_2_effective_evaluations(numbers, expected):
    assert tmd.effective_nfe(*numbers) == pytest.approx(expected, abs=1e-4)
    outer, inner, head, depth = numbers
    assert tmd.make_plan(outer, inner, head, depth).nfe == tmd.effective_nfe(*numbers)


SPLIT = {
    "name": "split_dit",
    "shared": {
        "name": "video_dit",
        "patch_size": (1, 2, 2),
        "heads": 2,
        "head_dim": 12,
        "depth": 4,
        "mlp_width": 20,
        "text_width": 8,
        "frequency_dim": 16,
    },
    "head_blocks": 1,
    "initial_gate": 0.3,
}
EVENT = (2, 4, 4, 3)
TEXT = jax.random.normal(jax.random.key(9), (4, 3, 8))
BATCH = {"x_data": jax.random.normal(jax.random.key(8), (4, *EVENT)), "cond": TEXT}
FEW = KEYS[:4]
NULL = np.zeros((3, 8), np.float32)


@functools.cache
def student(**options):
    module = models.build({**SPLIT, **options})
    x, t = BATCH["x_data"], jnp.full(4, 0.5)
    params = models.init_params(module, jax.random.key(1), x, t, TEXT)
    params = jax.tree.map(
        lambda leaf: leaf + 0.05 * jax.random.normal(jax.random.key(2), leaf.shape),
        params,
    )
    return module, models.functional(module), params


def block_calls(fn, *args):
    """How often a block runs: products with an MLP's first kernel, loops multiplied."""
    found = 0

    def walk(jaxpr, times):
        nonlocal found
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                found += times * (eqn.invars[1].aval.shape == (24, 20))
            repeats = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
            for value in eqn.params.values():
                for inner in value if isinstance(value, list | tuple) else [value]:
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        walk(inner, times * repeats)

    walk(jax.make_jaxpr(fn)(*args).jaxpr, 1)
    return found


@pytest.mark.parametrize("outer, inner", [(1, 1), (2, 2), (2, 4), (4, 1)])
def test_2_blocks_that_run(outer, inner):
    # a fusion of another width is not counted
    _, apply_fn, params = student(fusion_width=16)
    plan = plan_of(outer, inner)
    noise = jnp.zeros((4, *EVENT))
    sample = lambda p: tmd.sample(apply_fn, p, noise, TEXT, FEW, plan)  # noqa: E731
    assert block_calls(sample, params) == round(4 * plan.nfe)


def small(params, *inputs, method):
    """A backbone of one number and a head of three."""
    if method == "backbone":
        x, t, _ = inputs
        return jnp.tanh(params["backbone"] * x + t[:, None])
    y, s, _, features = inputs
    a, b, c = params["head"]
    return jnp.tanh(a * y + b * features) + c * s[:, None]


@pytest.mark.parametrize("average", tmd.AVERAGES)
def test_6_rows_without_a_jump_regress_the_head_onto_the_transition(average):
    """u = y1 - head and v = y1 - y: the head's target is y, also for the gradient."""
    params = {"backbone": jnp.float32(0.8), "head": jnp.array([0.7, -0.4, 0.3])}
    batch = {"x_data": jax.random.normal(jax.random.key(5), (32, 3))}
    config = flows.FlowMapConfig(
        map_rate=0.0, guidance=1.0, drop_rate=0.0, loss_constant=0.5
    )
    asked = {}

    def spying(params, *inputs, method):
        asked.setdefault(method, inputs)
        return small(params, *inputs, method=method)

    plan, keys = plan_of(average=average), KEYS[:32]

    def loss(params):
        return tmd.pretraining_loss(params, spying, batch, keys, plan, config)[0]

    found, value = jax.grad(lambda params: loss(params).sum())(params), loss(params)
    (x_t, t, _), (y_s, s, r, _) = asked["backbone"], asked["head"]
    np.testing.assert_array_equal(s, r)
    # the noises that the loss drew
    keys = jax.vmap(lambda key: jax.random.split(key, 5))(keys)
    noise, y1 = (prng.normal(keys[:, i], (3,)) for i in (3, 4))
    y = noise - batch["x_data"]
    np.testing.assert_allclose(x_t, flows.interpolate(batch["x_data"], noise, t))
    np.testing.assert_allclose(y_s, flows.interpolate(y, y1, s))

    def regression(params):
        features = small(params, x_t, t, None, method="backbone")
        error = jnp.square(small(params, y_s, s, r, features, method="head") - y)
        return error.sum(1) / (1.0 if average == "y1" else s**2)

    each = regression(params)
    np.testing.assert_allclose(value, each / (each + 1.5), rtol=1e-4)
    expected = jax.grad(lambda p: (regression(p) / (each + 1.5)).sum())(params)
    for name in ("backbone", "head"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3)


def test_7_one_inner_step_from_one_is_the_heads_answer():
    _, apply_fn, params = student()
    network = functools.partial(apply_fn, params)
    t = jnp.full(4, 0.999)
    features = network(BATCH["x_data"], t, TEXT, method="backbone")
    y1 = prng.normal(FEW, EVENT)
    one = tmd.inner_flow(network, features, y1, plan_of(1, 1, start=1.0))
    head = network(y1, jnp.ones(4), jnp.zeros(4), features, method="head")
    np.testing.assert_allclose(one, head, atol=1e-6)


def test_7_first_student_step_is_a_step_of_the_teacher():
    module, apply_fn, params = student(initial_gate=0.0)
    params = {**params, "joint": {**params["joint"], "gate": jnp.zeros(())}}
    params["interval"] = jax.tree.map(jnp.zeros_like, params["interval"])
    plan, noise = plan_of(1, 1, average="ys"), prng.normal(FEW, EVENT)
    found = tmd.sample(apply_fn, params, noise, TEXT, FEW, plan)
    teacher = functools.partial(models.functional(module.shared), params["shared"])
    expected = flows.endpoints(teacher, 0.999 * noise, np.array(plan.outer_times), TEXT)
    # the head's answer is the velocity; inside, y1 keeps the thousandth left of s
    np.testing.assert_allclose(found, expected, atol=1e-5)


def gradient_norms(grads):
    return {
        name: float(jnp.abs(leaf).max()) for name, leaf in trees.flatten(grads).items()
    }


@pytest.mark.parametrize("stage", ["pretraining", "rollout"])
def test_9_gradient_reaches_backbone_and_every_head_block(stage):
    _, apply_fn, params = student()

    def loss(params):
        if stage == "pretraining":
            config = flows.FlowMapConfig(map_rate=0.9, drop_rate=0.0, guidance=3.0)
            return tmd.pretraining_loss(
                params, apply_fn, BATCH, FEW, plan_of(), config, NULL
            )[0].sum()
        return jnp.square(tmd.generate(apply_fn, plan_of(), params, BATCH, FEW)).sum()

    grads = jax.grad(loss)(params)
    for name, leaf in trees.flatten(grads["shared"]["blocks"]).items():
        if not name.endswith("key/bias"):
            assert (np.abs(leaf).reshape(4, -1).max(1) > 0).all(), name
    norms = gradient_norms(grads)
    for name in (
        "shared/patch_embedding/kernel",
        "joint/gate",
        "interval/hidden/kernel",
    ):
        assert norms[name] > 0, name


def test_9_gradient_through_the_rollout_is_right(x64):
    """Against finite differences, a head of two numbers."""
    y1 = jax.random.normal(jax.random.key(3), (5, 2), jnp.float64)

    def total(theta):
        def network(y, s, r, features, method):
            return jnp.tanh(theta[0] * y + theta[1] * (s - r)[:, None])

        return jnp.sum(jnp.sin(tmd.inner_flow(network, None, y1, plan_of(1, 4))))

    theta = jnp.array([0.7, -0.4], jnp.float64)
    for i in range(2):
        step = jnp.zeros(2).at[i].set(1e-5)
        slope = (total(theta + step) - total(theta - step)) / 2e-5
        np.testing.assert_allclose(jax.grad(total)(theta)[i], slope, rtol=1e-4)


def test_11_loss_lies_in_zero_to_one():
    _, apply_fn, params = student()
    loss, _ = tmd.pretraining_loss(
        params, apply_fn, BATCH, FEW, plan_of(), tmd.PRETRAINING, NULL
    )
    assert loss.shape == (4,) and (loss >= 0).all() and (loss < 1).all()


def test_15_samples():
    _, apply_fn, params = student()
    noise = prng.normal(FEW, EVENT)
    draw = functools.partial(tmd.sample, apply_fn, params, noise, TEXT, plan=plan_of())
    np.testing.assert_array_equal(draw(FEW), draw(FEW))
    assert np.abs(draw(FEW) - draw(KEYS[4:8])).max() > 1e-4


def test_15_one_step_uses_no_data():
    _, apply_fn, params = student()
    made = [
        tmd.generate(apply_fn, plan_of(1, 2), params, {**BATCH, "x_data": x}, FEW)
        for x in (BATCH["x_data"], 100 + BATCH["x_data"])
    ]
    np.testing.assert_array_equal(*made)


def test_16_deterministic_transfer():
    """With the exact prediction the states stay on a straight line to it."""
    times = flows.truncated_grid(4, 5.0)
    x_data = jnp.full((4, 1), 0.3)
    exact = lambda params, x, t, cond: (x - x_data) / t[:, None]  # noqa: E731
    found = dmd2.sample(exact, {}, NOISE[:4], None, times)
    np.testing.assert_allclose(found, x_data, atol=1e-6)
    half = flows.rollout(
        None,
        functools.partial(exact, {}),
        NOISE[:4],
        flows.make_table("ode", times),
        None,
    )
    line = x_data + times[:, None, None] / times[0] * (NOISE[:4] - x_data)
    np.testing.assert_allclose(half.states, line, atol=1e-6)


def test_dmd2_generates_and_renoises():
    x_data = MU + VARIANCE**0.5 * NOISE
    flow = flows.gaussian_mixture([1.0], [[MU]], [VARIANCE**0.5])
    apply_fn = lambda params, x, t, cond: flow.velocity(x, t)  # noqa: E731
    times = flows.truncated_grid(2, 10.0)
    made = dmd2.generate(apply_fn, times, {}, {"x_data": x_data}, KEYS)
    assert abs(moments(made)[0] - MU) < 5e-3  # the posterior mean
    walked = [
        dmd2.sample(apply_fn, {}, NOISE[:9], None, times, transfer="renoise", keys=k)
        for k in (KEYS[:9], KEYS[9:18])
    ]
    assert np.abs(walked[0] - walked[1]).min() > 0


def test_meanflow_reaches_the_data_with_the_exact_map():
    spread = lambda t: jnp.sqrt((1 - t) ** 2 * VARIANCE + t**2)[:, None]  # noqa: E731

    def apply_fn(params, x, t, r, cond):
        scaled = (x - (1 - t)[:, None] * MU) / spread(t)
        return (x - (1 - r)[:, None] * MU - spread(r) * scaled) / (t - r)[:, None]

    for steps in (1, 3):
        x = meanflow.sample(apply_fn, {}, NOISE, None, flows.truncated_grid(steps, 5.0))
        np.testing.assert_allclose(moments(x), (MU, VARIANCE), atol=5e-3)


def test_meanflow_loss_trains_a_network():
    module = models.build({"name": "two_time_dit", "shared": SPLIT["shared"]})
    apply_fn = models.functional(module)
    t = jnp.full(4, 0.5)
    params = models.init_params(module, jax.random.key(0), BATCH["x_data"], t, t, TEXT)
    config = flows.FlowMapConfig(guidance=2.0)
    step = jax.grad(
        lambda p: meanflow.meanflow_loss(p, apply_fn, BATCH, FEW, config, NULL)[0].sum()
    )
    assert gradient_norms(step(params))["shared/final/projection/kernel"] > 0


def test_plans_travel_with_a_model(recwarn):
    plan = plan_of()
    assert tmd.Plan.from_dict(plan.to_dict()) == plan
    import json

    assert tmd.Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    _, apply_fn, params = student()
    noise = prng.normal(FEW, EVENT)
    draw = functools.partial(
        tmd.sample, apply_fn, params, noise, TEXT, FEW, trained_plan=plan.to_dict()
    )
    draw(plan=plan)
    assert not recwarn.list
    with pytest.raises(ValueError, match=r"outer_times=.*allow_mismatch=True"):
        draw(plan=plan_of(1, 2))
    with pytest.raises(ValueError, match="head_blocks=2, trained with 1"):
        draw(plan=tmd.make_plan(2, 2, 2, 4))
    with pytest.warns(UserWarning, match="inner_times"):
        draw(plan=plan_of(2, 1), allow_mismatch=True)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: tmd.make_plan(2, 2, 4, 4), r"must lie in 1..L-1 = 1..3"),
        (lambda: tmd.make_plan(2, 2, 0, 4), "head_blocks=0"),
        (lambda: tmd.make_plan(0, 2, 1, 4), "steps=0"),
        (lambda: tmd.make_plan(2, 0, 1, 4), "steps=0"),
        (lambda: tmd.make_plan(2, 2, 1, 4, outer_shift=0.5), "shift=0.5"),
        (lambda: tmd.Plan(outer_times=(0.9, 0.95, 0), inner_times=(1.0, 0), head_blocks=1, depth=2), "strictly decrease"),
        (lambda: tmd.Plan(outer_times=(0.9, 0.1), inner_times=(1.0, 0), head_blocks=1, depth=2), "end at 0"),
        (lambda: plan_of(average="x"), "average='x'"),
        (lambda: plan_of(output="x1"), "output='x1'"),
        (lambda: plan_of(sign="+"), "sign='\\+'"),
        (lambda: tmd.effective_nfe(1, 0, 1, 4), "inner steps N=0"),
        (lambda: dmd2.sample(print, {}, NOISE, None, (1.0, 0.0), transfer="renoise"), "give keys"),
        (lambda: dmd2.sample(print, {}, NOISE, None, (1.0, 0.0), transfer="ode"), "transfer='ode'"),
        (lambda: tmd.pretraining_loss({}, lambda *a, **k: None, BATCH, FEW, plan_of()), "need null_cond"),
    ],
)  # fmt: skip
def test_bad_inputs(call, message, as_shipped):
    with pytest.raises(ValueError, match=message):
        call()


def recording(calls):
    """A network of one number that notes what it is asked."""

    def network(params, *inputs, method="whole"):
        calls.append((method, inputs))
        return inputs[0] if method == "backbone" else params["a"] * inputs[0]

    return network


ROWS = {"x_data": NOISE[:600], "cond": jnp.ones((600, 1))}


def test_pretraining_asks_at_the_times_of_the_plan():
    calls, plan = [], plan_of(2, 4)
    config = flows.FlowMapConfig(
        map_rate=0.6, guidance=3.0, drop_rate=0.1, derivative="difference"
    )
    tmd.pretraining_loss(
        {"a": jnp.float32(0.5)},
        recording(calls),
        ROWS,
        KEYS[:600],
        plan,
        config,
        np.zeros(1),
    )
    starts = np.unique(calls[0][1][1])[::-1]
    np.testing.assert_array_equal(starts, np.float32(plan.outer_times[:-1]))
    (_, s, r, _), (_, same_s, end, _) = [i for m, i in calls if m == "head"][:2]
    # guidance is that of the velocity, not of a jump
    np.testing.assert_array_equal(s, r)
    np.testing.assert_array_equal(s, same_s)
    s, end = np.asarray(s), np.asarray(end)
    jumps = end < s
    assert 0.5 < jumps.mean() < 0.7
    inner = np.float32(plan.inner_times)[::-1]
    np.testing.assert_array_equal(
        end[jumps], inner[np.searchsorted(inner, s[jumps], side="right") - 1]
    )


def test_meanflow_jumps_as_often_as_it_is_told():
    calls = []
    config = flows.FlowMapConfig(
        map_rate=0.4, guidance=1.0, drop_rate=0.0, derivative="difference"
    )
    meanflow.meanflow_loss(
        {"a": jnp.float32(0.5)}, recording(calls), ROWS, KEYS[:600], config, np.zeros(1)
    )
    _, (_, t, r, _) = calls[0]
    assert 0.34 < float(jnp.mean(r < t)) < 0.46 and (r <= t).all()


def test_renoised_states_lie_on_the_path():
    """The second network answers with its state, so that is what comes out."""

    def apply_fn(params, x, t, cond):
        return jnp.where(t > 0.95, (x - 0.3) / 0.999, 0.0 * x)

    times = np.array([0.999, 0.6, 0.0])
    x = dmd2.sample(
        lambda p, x, t, c: apply_fn(p, x, t[:, None], c),
        {}, NOISE, None, times, transfer="renoise", keys=KEYS,
    )  # fmt: skip
    np.testing.assert_allclose(moments(x), (0.4 * 0.3, 0.6**2), atol=5e-3)
