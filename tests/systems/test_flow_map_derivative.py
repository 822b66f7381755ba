"""The network that du/ds is taken of: in stage 1 of TMD, and in MeanFlow."""

import dataclasses
import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from tmdjax import flows, models, train
from tmdjax.core import trees
from tmdjax.flows import flow_maps
from tmdjax.systems import meanflow, tmd

SHARED = {
    "name": "video_dit",
    "patch_size": (1, 2, 2),
    "heads": 2,
    "head_dim": 16,
    "depth": 2,
    "mlp_width": 40,
    "text_width": 8,
    "frequency_dim": 16,
    "time_scale": 4.0,
    "remat": False,
}
EVENT = (2, 4, 4, 3)
TEXT = jax.random.normal(jax.random.key(9), (4, 4, 8))
BATCH = {"x_data": jax.random.normal(jax.random.key(8), (4, *EVENT)), "cond": TEXT}
KEYS = jax.random.split(jax.random.key(3), 4)
PLAN = tmd.make_plan(2, 2, 1, 2)
JUMPS = flows.FlowMapConfig(map_rate=1.0, drop_rate=0.0)


def network(system, recipe="fp32", attention="xla", **options):
    shared = {**SHARED, "recipe": recipe, "attention_implementation": attention}
    shared |= options
    if system == "meanflow":
        return models.build({"name": "two_time_dit", "shared": shared})
    spec = {"name": "split_dit", "shared": shared, "head_blocks": 1}
    return models.build({**spec, "initial_gate": 0.5})


@functools.cache
def parameters(system):
    """Far from the start, where u would not depend on the times."""
    x, t = BATCH["x_data"], jnp.full(4, 0.5)
    inputs = (x, t, t, TEXT) if system == "meanflow" else (x, t, TEXT)
    params = models.init_params(network(system), jax.random.key(1), *inputs)
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda p: p + 0.2 * rng.normal(size=p.shape), params)


def make_loss(system, module, derivative, clone=None, **options):
    """``loss(params, batch, keys)`` [batch] and metrics, in which every row jumps."""
    config = dataclasses.replace(JUMPS, derivative=derivative, **options)
    apply_fn = models.functional(module)
    other = None if clone is None else models.functional(clone)

    def loss(params, batch, keys):
        if system == "meanflow":
            return meanflow.meanflow_loss(
                params, apply_fn, batch, keys, config, derivative_apply_fn=other
            )
        return tmd.pretraining_loss(
            params, apply_fn, batch, keys, PLAN, config, derivative_apply_fn=other
        )

    return loss


def gradient(loss):
    return jax.grad(lambda params: loss(params, BATCH, KEYS)[0].sum())


@pytest.mark.parametrize(
    "system, derivative", [("tmd", "jvp"), ("tmd", "difference"), ("meanflow", "jvp")]
)
def test_clone_of_a_float32_network_changes_nothing(system, derivative):
    """Nor does any gradient pass through it."""
    module, clone = network(system, attention="auto"), network(system)
    params = parameters(system)
    expected, found = (
        trees.flatten(
            jax.jit(gradient(make_loss(system, module, derivative, c)))(params)
        )
        for c in (None, clone)
    )
    largest = max(np.abs(leaf).max() for leaf in expected.values())
    assert largest > 1e-2
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, atol=1e-6 * largest, err_msg=name)


@pytest.mark.parametrize("derivative", flows.DERIVATIVES)
def test_backbone_runs_once_and_the_derivatives_head_in_float32(derivative):
    calls = []

    def spied(name, apply_fn):
        def spy(params, *inputs, method):
            out = apply_fn(params, *inputs, method=method)
            features = out if method == "backbone" else inputs[-1]
            calls.append((name, method, str(features["hidden"].dtype)))
            return out

        return spy

    module, clone = network("tmd", "bf16"), network("tmd")
    config = dataclasses.replace(JUMPS, derivative=derivative)

    def loss(params):
        return tmd.pretraining_loss(
            params,
            spied("trained", models.functional(module)),
            BATCH,
            KEYS,
            PLAN,
            config,
            derivative_apply_fn=spied("derivative", models.functional(clone)),
        )[0].sum()

    jax.eval_shape(jax.grad(loss), parameters("tmd"))
    assert calls == [
        ("trained", "backbone", "bfloat16"),
        ("trained", "head", "bfloat16"),
        *[("derivative", "head", "float32")] * (1 if derivative == "jvp" else 2),
    ]


def test_blocks_of_a_float32_head_stay_in_float32():
    """From a bfloat16 backbone, whose own dtype the fusion would hand on."""
    params = parameters("tmd")
    backbone = models.functional(network("tmd", "bf16"))
    head = models.functional(network("tmd"))
    t = jnp.full(4, 0.5)

    def answer(x):
        features = tmd._in_float32(backbone(params, x, t, TEXT, method="backbone"))
        features = jax.lax.optimization_barrier(features)
        return head(params, x, t, t, features, method="head")

    text = str(jax.make_jaxpr(answer)(BATCH["x_data"]))
    before, after = text.split("optimization_barrier")
    assert "bf16" in before and "bf16" not in after


def slopes(system, module, derivative, clone=None):
    """du/ds inside the loss, where s - r leaves room for both sides."""
    seen = {}

    def watched(*inputs, **options):
        seen["s"], seen["r"] = inputs[2:4]
        seen["slope"] = flows.total_derivative(*inputs, **options)
        return seen["slope"]

    def recorded(params):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flow_maps, "total_derivative", watched)
            make_loss(system, module, derivative, clone)(params, BATCH, KEYS)
        return seen

    found = jax.jit(recorded)(parameters(system))
    inside = (found["s"] - found["r"] > 0.01) & (found["s"] < 0.99)
    assert inside.sum() >= 2
    return np.asarray(found["slope"], np.float64)[inside]


@pytest.mark.parametrize("system", ["tmd", "meanflow"])
def test_differences_drown_in_bfloat16_but_not_with_the_clone(system):
    full, half = network(system), network(system, "bf16")
    exact = slopes(system, full, "jvp")

    def error(slope):
        return np.linalg.norm(slope - exact) / np.linalg.norm(exact)

    assert np.sqrt(np.square(exact).mean()) > 0.1
    assert error(slopes(system, full, "difference")) < 0.01
    assert error(slopes(system, half, "difference", full)) < 0.02
    assert error(slopes(system, half, "difference")) > 0.1


@pytest.mark.parametrize("system", ["tmd", "meanflow"])
def test_fused_attention_needs_another_network_for_the_derivative(
    system, traceable_cudnn
):
    fused = network(system, "bf16", "cudnn", remat=True)
    params = parameters(system)
    with pytest.raises(ValueError, match=r"'xla'.*derivative='difference'"):
        jax.make_jaxpr(gradient(make_loss(system, fused, "jvp")))(params)
    for derivative, clone in (
        ("jvp", network(system, "bf16", remat=True)),
        ("difference", network(system, remat=True)),
    ):
        loss = make_loss(system, fused, derivative, clone)
        exported = jax.export.export(
            jax.jit(gradient(loss)),
            platforms=["cuda"],
            disabled_checks=traceable_cudnn,
        )(params)
        assert "__cudnn$fmha" in exported.mlir_module()


@functools.cache
def stage_one(derivative):
    """The compiled update, and the state it starts from."""
    loss = make_loss(
        "tmd", network("tmd", "bf16"), derivative, network("tmd"), map_rate=0.25
    )
    rule = train.make_optimizer(train.OptimizerConfig())
    step = jax.jit(train.make_train_step(loss, rule))
    return step, lambda: train.create_state(parameters("tmd"), rule)


@pytest.mark.parametrize("derivative", flows.DERIVATIVES)
def test_stage_one_lowers_for_cuda_and_tpu(derivative):
    step, initial = stage_one(derivative)
    exported = jax.export.export(step, platforms=["cuda", "tpu"])(
        jax.eval_shape(initial), BATCH, jax.random.key(0)
    )
    assert exported.platforms == ("cuda", "tpu")


def test_stage_one_compiles_once(count_compiles):
    step, initial = stage_one("jvp")
    state, key = initial(), jax.random.key(0)
    state, first = step(state, BATCH, key)
    with count_compiles() as compiled:
        for _ in range(2):
            state, metrics = step(state, BATCH, key)
    assert not compiled
    assert int(state.step) == 3 and int(state.skipped) == 0
    assert metrics["loss"] != first["loss"]


def test_sampling_compiles_once_for_other_parameters(count_compiles):
    apply_fn, params = models.functional(network("tmd")), parameters("tmd")
    draw = functools.partial(
        tmd.sample, apply_fn, noise=BATCH["x_data"], cond=TEXT, keys=KEYS, plan=PLAN
    )
    others = jax.tree.map(lambda leaf: 1.1 * leaf, params)
    first = draw(params=params)
    with count_compiles() as compiled:
        second = draw(params=others)
    assert not compiled
    assert np.abs(first - second).max() > 1e-3
