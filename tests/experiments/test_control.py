"""Policies in environments as an experiment: stages, judging, resuming, refusals."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import control, control_tasks
from tmdjax.harness import check_experiment, load_config

TINY = (
    "train.envs=8 train.unroll=8 train.iterations=4 train.iterations_per_call=2 "
    "train.epochs=2 train.minibatches=2 train.critic_hidden=(16,16) evaluate.agents=20"
).split()


def tiny(*changes, env=None, arm="policyflow", **train):
    config = load_config("configs/policyflow.py:smoke", [*TINY, *changes])
    with config.unlocked():
        config.arms = {arm: config.arms[arm]}
        config.arms[arm].method.hidden = (16,)
        config.train.update(train)
        config.env = env or config.env
    return config


@pytest.mark.slow
def test_seeds_side_by_side_are_judged_one_by_one(tmp_path, ran, refused):
    config = tiny(seeds=(3, 5))
    ran(control, config, seeds=(3, 5))
    units = [
        json.loads((tmp_path / f"run/units/policyflow-seed{s}.json").read_text())
        for s in (3, 5)
    ]
    rewards = [unit["unit"]["metrics"]["training_reward"] for unit in units]
    assert rewards[0] != rewards[1]
    words = "--seeds has 4, but arm 'policyflow' trains only 3, 5"
    refused(words, ran, control, config, seeds=(3, 4))


PIXELS = {"name": "push", "horizon": 5, "observation": "pixels", "side": 16}


@pytest.mark.nightly
@pytest.mark.parametrize(
    "env, measured",
    [
        ({"name": "point_maze", "horizon": 20}, {"cells_visited", "success"}),
        (PIXELS, {"success"}),
    ],
)
def test_other_environments(env, measured, ran):
    config = tiny(env=env, arm="ppo")
    found = ran(control, config)
    assert measured(check_experiment(control), config) <= found.keys()
    assert all(0 <= found[f"ppo/{name}"] <= 1 for name in measured)


def test_pixels_are_trained_on():
    config = tiny(env=PIXELS, arm="ppo")
    rows = control.describe(config)  # traces an iteration
    assert rows["ppo: environment steps"] == 4 * 8 * 8
    assert "success" in control.measures(config, "ppo")


def test_judging_multi_goal_by_a_policy_that_knows():
    """Agents that go straight to the two goals on the x axis, half to each."""
    env = {"name": "multi_goal"}

    def act(policy, seen, key):
        side = jnp.where(jnp.arange(100) % 2 == 0, 5.0, -5.0)
        to = jnp.stack([side, jnp.zeros(100)], 1) - seen[:, :2]
        return 2 * to - 2.5 * seen[:, 2:]

    found, shown = control_tasks.judge(env, 100, act, None, jax.random.key(0))
    paths = shown["paths"]
    assert found["covered_goals"] == 2 and found["reached"] == 1
    assert found["goal_entropy"] == pytest.approx(np.log(2) / np.log(6))
    assert paths.shape == (100, 50, 2) and np.isfinite(paths).all()

    def away(policy, seen, key):
        return jnp.full((100, 2), 5.0)

    found, shown = control_tasks.judge(env, 100, away, None, jax.random.key(0))
    assert found["reached"] == 0 and found["goal_entropy"] == 0
    assert np.isnan(shown["paths"][:, -1]).all()  # out of the square, and not shown


def test_bad_inputs(refused):
    for change, words in (
        ("train.iterations_per_call=3", "iterations=4 is no multiple of"),
        ("train.minibatches=5", "64 transitions do not divide into minibatches=5"),
        ("train.iterations=0", "train.iterations=0"),
        ("evaluate.agents=0", "evaluate.agents=0"),
        ("arms.policyflow.method.recipe=bf16", "recipe='bf16' would be without effect"),
    ):
        refused(words, lambda change=change: control.describe(tiny(change)))
    config = tiny()
    with config.unlocked():
        config.arms.policyflow.method.name = "policy_flow"
    refused("Did you mean 'policyflow'", control.describe, config)
    other = tiny(env={"name": "multigoal"})
    refused("Did you mean 'multi_goal'", control.describe, other)
    for seeds in ((), (1, 1)):
        refused("train.seeds=.*each once", control.describe, tiny(seeds=seeds))
