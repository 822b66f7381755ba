"""RL on flow models as experiments: every stage, tasks, resuming, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tmdjax
from experiments import alignment, alignment_tasks
from tmdjax.data import rendered_text
from tmdjax.harness import load_config

TINY_SHAPES = (
    "task.prompts=8 task.held_out=2 model.hidden=32 model.depth=1 model.heads=2 "
    "model.text_width=16 model.patch_size=4 train.steps=8 train.images=64 "
    "train.batch_size=8 train.log_every=4 optimizer.warmup_steps=2 rollout.steps=4 "
    "rl.iterations=3 rl.prompts=4 rl.lora_rank=2 rl.guidance=2.0 rl.chunks=2 "
    "rl.microbatches=2 evaluate.count=4 evaluate.steps=2 evaluate.shown=2"
).split()


def shapes_config(*changes, arm="flow_grpo"):
    config = load_config("configs/flow_grpo.py:cpu", [*TINY_SHAPES, *changes])
    with config.unlocked():
        config.claims = {}
        config.arms = {arm: config.arms[arm]}
    return config


@pytest.mark.slow
def test_shapes_with_text_guidance_adapters_and_chunks(tmp_path, ran):
    config, workdir = shapes_config(), tmp_path / "run"
    found = ran(alignment, config)
    assert found["flow_grpo/first_ratio_error"] < 1e-5
    assert 0 <= found["flow_grpo/aligned.held_out.strict"] <= 1
    assert (workdir / "figures" / "samples.png").stat().st_size > 1000
    apply_fn, params, _ = tmdjax.load(workdir, arm="flow_grpo")
    prompts = alignment_tasks.build(config).held_out
    cond = {name: prompts[name] for name in ("ids", "mask")}
    x = jnp.zeros((2, 16, 16, 3))
    v = apply_fn(params, x, jnp.ones(2), cond)
    assert v.shape == x.shape and np.isfinite(v).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "system, arm, learns, noise",
    [
        ("flow_grpo", "flow_grpo", "bf16", (1e-4, 1e-1)),
        ("branchgrpo", "branch", "fp8_block", (0, 1e-4)),
    ],
)
def test_rollouts_of_8_bits_train_in_16_and_in_8(system, arm, learns, noise, ran):
    """Of the same parameters: in one precision log-probs agree, in two they do not."""
    changes = [f"arms={arm}", "rl.iterations=3", "precision.rollout=fp8_block"]
    changes.append(f"precision.train={learns}")
    found = ran(alignment, load_config(f"configs/{system}.py:smoke", changes))
    assert found[f"{arm}/first_ratio_error"] < 1e-5
    low, high = noise
    assert low < found[f"{arm}/behaviour_ratio_error"] < high
    assert found[f"{arm}/skipped_updates"] == 0


def test_held_out_prompts_are_in_no_training_set():
    task = alignment_tasks.build(shapes_config("task.prompts=16", "task.held_out=4"))

    def meanings(prompts):
        names = ("count", "colour", "shape", "relation")
        columns = [
            np.asarray(prompts[n]).reshape(len(prompts["ids"]), -1) for n in names
        ]
        return {tuple(row) for row in np.concatenate(columns, 1)}

    assert not meanings(task.prompts) & meanings(task.held_out)
    assert len(meanings(task.prompts)) == 16


def test_words_are_read_by_the_real_model():
    for package in ("onnxruntime", "rapidocr_onnxruntime"):
        pytest.importorskip(package, reason="needs tmdjax[ocr]")
    config = shapes_config()
    with config.unlocked():
        config.task = {"name": "words", "size": 48, "prompts": 4, "held_out": 2}
        config.task.timeout = 60.0
    task = alignment_tasks.build(config)
    words = rendered_text.decode(task.prompts["ids"])
    images = rendered_text.render(words, jax.random.split(jax.random.key(0), 4), 48)
    rows = [{k: v[i] for k, v in task.prompts.items()} for i in range(4)]
    assert np.mean(task.reward.fn(np.asarray(images), rows)) > 0.8
    assert set(task.measure(images, task.prompts)) == {"score", "exact"}


def test_bad_inputs(refused):
    config = shapes_config()
    with config.unlocked():
        config.arms.flow_grpo.method.name = "flow_grpo:dance_grp"
    refused("Did you mean 'dance_grpo'", alignment.describe, config)
    refused("rl.updates=0", shapes_config, "rl.updates=0")
    config = shapes_config("task.name=shape")
    refused(
        "task.name='shape' is not one of .*Did you mean", alignment.describe, config
    )
    config = shapes_config("optimizer.name=adamm")
    refused("optimizer.name='adamm' is not one of", alignment.describe, config)
    config = shapes_config("rl.prompts=4", "rl.chunks=3")
    refused("does not divide|do not divide", alignment.describe, config)
    for change, words in (  # of the last arm
        ("precision.rollout=fp23", "precision.rollout: unknown GEMM recipe 'fp23'"),
        ("rl.lora_rank=2", "target .* matches no kernel"),
        ("rl.chunks=3", "do not divide into rl.chunks=3"),
        ("rl.memory_limit_gb=1e-9", "arms.mix_grpo would store"),
    ):
        spec = "configs/flow_grpo.py:smoke"
        config = load_config(spec, [f"arms.mix_grpo.{change}"])
        refused(words, alignment.describe, config)
