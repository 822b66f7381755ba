"""The network that du/ds is taken of, on video networks; its rules are in test_tmd.py."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from checks import lowered

from tmdjax import flows, models, train
from tmdjax.core import trees
from tmdjax.flows import flow_maps
from tmdjax.systems import meanflow, tmd

SHARED = {
    "name": "video_dit", "patch_size": (1, 2, 2), "heads": 2, "head_dim": 16,
    "depth": 2, "mlp_width": 40, "text_width": 8, "frequency_dim": 16,
    "time_scale": 4.0, "remat": False,
}  # fmt: skip
TEXT = jax.random.normal(jax.random.key(9), (4, 4, 8))
VIDEO = jax.random.normal(jax.random.key(8), (4, 2, 4, 4, 3))
BATCH = {"x_data": VIDEO, "cond": TEXT}
KEYS = jax.random.split(jax.random.key(3), 4)
PLAN = tmd.make_plan(2, 2, 1, 2)


def network(system, recipe="fp32", attention="xla", **options):
    shared = {**SHARED, "recipe": recipe, "attention_implementation": attention}
    if system == "meanflow":
        return models.build({"name": "two_time_dit", "shared": shared | options})
    spec = {"name": "split_dit", "shared": shared | options, "head_blocks": 1}
    return models.build({**spec, "initial_gate": 0.5})


@functools.cache
def parameters(system):
    """Far from the start, where u would not depend on the times."""
    t = jnp.full(4, 0.5)
    inputs = (VIDEO, t, t, TEXT) if system == "meanflow" else (VIDEO, t, TEXT)
    params = models.init_params(network(system), jax.random.key(1), *inputs)
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda p: p + np.float32(rng.normal(0, 0.2, p.shape)), params)


def make_loss(system, module, derivative, clone=None, map_rate=1.0):
    """``loss(params, batch, keys)`` [batch] and metrics, in which every row jumps."""
    options = {"map_rate": map_rate, "drop_rate": 0.0, "derivative": derivative}
    config, apply_fn = flows.FlowMapConfig(**options), models.functional(module)
    other = {"derivative_apply_fn": clone and models.functional(clone)}

    def loss(params, *given):
        if system == "meanflow":
            return meanflow.meanflow_loss(params, apply_fn, *given, config, **other)
        return tmd.pretraining_loss(params, apply_fn, *given, PLAN, config, **other)

    return loss


def test_blocks_of_a_float32_head_stay_in_float32():
    """From a bfloat16 backbone, whose own dtype the fusion would hand on."""
    params = parameters("tmd")
    modules, t = (network("tmd", "bf16"), network("tmd")), jnp.full(4, 0.5)
    backbone, head = map(models.functional, modules)

    def answer(x):
        features = trees.in_float32(backbone(params, x, t, TEXT, method="backbone"))
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

    found = jax.tree.map(np.asarray, jax.jit(recorded)(parameters(system)))
    inside = (found["s"] - found["r"] > 0.01) & (found["s"] < 0.99)
    assert inside.sum() >= 2
    return found["slope"].astype(np.float64)[inside]


@pytest.mark.parametrize(
    "system", ["tmd", pytest.param("meanflow", marks=pytest.mark.nightly)]
)
def test_differences_drown_in_bfloat16_but_not_with_the_clone(system):
    full, half = network(system), network(system, "bf16")
    exact = slopes(system, full, "jvp")

    norm = np.linalg.norm
    error = lambda slope: norm(slope - exact) / norm(exact)  # noqa: E731
    assert np.sqrt(np.square(exact).mean()) > 0.1
    assert error(slopes(system, half, "difference", full)) < 0.02
    assert error(slopes(system, half, "difference")) > 0.1


def test_fused_attention_needs_another_network(traceable_cudnn, refused):
    fused, params = network("tmd", "bf16", "cudnn", remat=True), parameters("tmd")

    def gradient(*settings):
        loss = make_loss("tmd", fused, *settings)
        return jax.grad(lambda params: loss(params, BATCH, KEYS)[0].sum())

    message = r"'xla'.*derivative='difference'"
    refused(message, jax.eval_shape, gradient("jvp"), params)
    program = jax.jit(gradient("jvp", network("tmd", "bf16", remat=True)))
    options = {"platforms": ["cuda"], "disabled_checks": traceable_cudnn}
    assert "__cudnn$fmha" in jax.export.export(program, **options)(params).mlir_module()


def test_stage_one_lowers_for_cuda_and_tpu():
    loss = make_loss("tmd", network("tmd", "bf16"), "jvp", network("tmd"), 0.25)
    rule = train.make_optimizer(train.OptimizerConfig())
    step = jax.jit(train.make_train_step(loss, rule))
    state = jax.eval_shape(lambda: train.create_state(parameters("tmd"), rule))
    lowered(step, state, BATCH, jax.random.key(0))
