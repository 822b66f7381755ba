"""The BOSS experiment: every stage, resuming, the model it hands out, its claims."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tmdjax
from experiments import boss as experiment
from experiments import run
from tmdjax import flows
from tmdjax.harness import load_config
from tmdjax.systems import boss

SMOKE = "--config=configs/boss.py:smoke"
TINY_IMAGES = (
    "model.hidden=32 model.depth=2 model.heads=2 train.steps=60 train.batch_size=32 "
    "train.log_every=20 optimizer.warmup_steps=10 features.steps=30 features.batch_size=32 search.samples=10 "
    "search.knots=20 fine_tune.noises=64 fine_tune.steps=20 "
    "fine_tune.batch_size=32 fine_tune.warmup_steps=2 fine_tune.lora_rank=2 "
    "sample.count=100 evaluate.projections=16"
).split()


@pytest.mark.slow
def test_images_and_adapters_and_the_model_that_comes_out(tmp_path, ran, refused):
    config = load_config("configs/boss.py:cpu", TINY_IMAGES)
    with config.unlocked():
        config.claims = {}
        config.search.budgets = (2, 4)
    found = ran(experiment, config)
    assert found["straightened4.trained_parameters"] < 0.5 * 40_000
    assert 0 <= found["bellman4.recall"] <= 1
    workdir = tmp_path / "run"
    assert (workdir / "figures" / "samples.png").stat().st_size > 1000
    apply_fn, params, meta = tmdjax.load(workdir)
    assert len(meta["grid"]) == 5 and meta["grid"][0] == 1 and meta["grid"][-1] == 0
    noise = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    velocity, labels = functools.partial(apply_fn, params), jnp.arange(3)
    assert meta["guidance_absorbed"] == 1.0
    velocity = boss.on_grid(velocity, meta["grid"])
    x = boss.sample(velocity, noise, cond=labels)
    assert x.shape == noise.shape and np.isfinite(x).all()
    given = (velocity, noise, flows.uniform_grid(3), labels)
    refused("straightened on the times", boss.sample, *given)


EIGHT_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from tmdjax import data, flows, train
from tmdjax.train import fine_tuning
from tmdjax.core import prng
from tmdjax.systems import boss

flow = flows.gaussian_mixture(**data.MIXTURE)
keys = prng.sample_keys(jax.random.key(0), 64)
grid = boss.search(flow.velocity, keys[:8], (2,), (4,), knots=20).schedules[4]
fine = boss.fine_states(flow.velocity, keys, (2,), [grid])
chords = boss.chords(fine, grid)

def apply_fn(params, x, t, cond):
    h = jnp.concatenate([x, t[:, None]], -1)
    return jnp.tanh(h @ params["a"]) @ params["b"]

a, b = jax.random.split(jax.random.key(1))
params = {"a": jax.random.normal(a, (3, 16)), "b": jax.random.normal(b, (16, 2))}
make_mesh = fine_tuning.make_mesh
def tuned(devices):
    fine_tuning.make_mesh = lambda: make_mesh(devices=jax.devices()[:devices])
    return boss.straighten(
        params, apply_fn, chords, grid, key=jax.random.key(2), steps=20, batch_size=32,
        optimizer=train.OptimizerConfig(name="sgd", learning_rate=0.05))

one, eight = tuned(1), tuned(8)
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, eight)
print("same")
"""


@pytest.mark.slow  # its fit is the one of tests/train/test_sharding.py
def test_eight_devices_equal_one(run_python):
    assert run_python(EIGHT_DEVICES, devices=8).strip().endswith("same")


def test_claims_about_budgets_that_are_not_run_stop_at_once(tmp_path, refused):
    command = ["--config=configs/boss.py:cpu", f"--workdir={tmp_path / 'run'}"]
    command.append("--config.search.budgets=(2,3,4,8)")
    refused("claim 'O2b' is about 'bellman6.terminal", run.main, command)


@pytest.mark.parametrize(
    "override, message",
    [
        ("search.budgets=(2,200)", r"budget K=200 must be in \[1, K_max=100\]"),
        ("search.samples=0", "search.samples=0 is outside"),
        ("fine_tune.steps=0", "fine_tune.steps=0"),
        ("search.memory_limit_gb=0.000001", "raise it or take fewer knots"),
        ("fine_tune.weight=width", "weight='width'.*Did you mean 'width2'"),
        ("fine_tune.eval_fraction=1.0", "eval_fraction=1"),
        ("fine_tune.eval_fraction=0.001", "holds out nothing"),
        ("search.budgets=(4,2)", "must increase"),
    ],
)
def test_impossible_settings(override, message, tmp_path, as_shipped):
    with pytest.raises(ValueError, match=message):
        run.main([SMOKE, f"--config.{override}", f"--workdir={tmp_path / 'run'}"])
