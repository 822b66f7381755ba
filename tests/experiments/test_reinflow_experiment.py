"""Fine-tuning of clones as an experiment: what arms share, demonstrations, refusals."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from experiments import cloning, control_tasks, reinflow
from experiments.arms import of_arm
from tmdjax import data, envs
from tmdjax.harness import load_config
from tmdjax.harness.stages import stage_hashes

MAZE = {"name": "point_maze", "maze": ["1111", "1rg1", "1111"], "horizon": 6}


def hashes(config, arm):
    return stage_hashes(reinflow.stages(config, arm), 0)


def test_what_arms_have_in_common_is_made_once():
    config = load_config("configs/reinflow.py:cpu")
    bc, *tuned = (
        hashes(config, f"maze_{name}")
        for name in ("bc", "reinflow4", "reinflow2", "reinflow1", "w2", "fixed_noise")
    )
    assert {found["clone"] for found in tuned} == {bc["clone"]}
    assert len({found["train"] for found in tuned}) == 5 and "train" not in bc
    dppo, push, pixels = (
        hashes(config, name) for name in ("maze_dppo", "push_bc", "pixels_bc")
    )
    assert dppo["demonstrations"] == bc["demonstrations"]
    assert dppo["clone"] != bc["clone"] and push["expert"] != bc["expert"]
    # both see what the same experts did, each in its own way
    assert push["expert"] == pixels["expert"]
    assert push["demonstrations"] != pixels["demonstrations"]
    assert set(hashes(config, "maze_ppo")) == {"train", "judge"}


def pushing(policy, seen, key):
    """Towards the object, far beyond the bound."""
    return 9 * seen[:, 2:4]


def test_recorded_episodes_are_what_was_seen_and_done(refused):
    env = {"name": "push", "distance": 0.4, "horizon": 40}
    pixels = env | {"observation": "pixels", "side": 16}
    key = jax.random.key(0)
    states, images = (
        data.Demonstrations(
            **control_tasks.record(env, 30, pushing, None, key, shown=shown)
        )
        for shown in (None, pixels)
    )
    assert len(states.returns) == 30 and np.abs(states.action).max() == 1
    assert states.terminated.any() and states.truncated.any()
    assert_array_equal(states.terminated, states.reward == 1)
    lengths = np.diff(np.concatenate([[-1], np.flatnonzero(states.ends)]))
    assert lengths.max() == 40 and (lengths[states.returns == 1] < 40).any()
    # the next state follows from the action, unless an episode ended between
    moved = states.observation[1:, :2] - states.observation[:-1, :2]
    inside = ~states.ends[:-1] & (np.abs(states.observation[1:, :2]).max(1) < 0.9)
    free = inside & (np.linalg.norm(states.observation[:-1, 2:4], axis=1) > 0.4)
    assert_allclose(moved[free], 0.08 * states.action[:-1][free], atol=1e-6)
    # the same episodes as pictures
    assert_array_equal(images.action, states.action)
    assert images.observation.shape == (len(states.action), 16, 16, 3)
    x, y = states.observation[0, :2]
    column, row = (int((z + 1) / 2 * 16) for z in (x, -y))
    assert images.observation[0, row, column].argmax() == 2  # the pusher is blue
    words = r"multi_goal are in \+-5.0; policies are cloned from"
    refused(words, control_tasks.record, {"name": "multi_goal"}, 2, pushing, None, key)


def test_chunks_are_judged_as_steps_are():
    """The disc is driven to its goal, four forces at a time."""

    def act(policy, seen, key, count=1):
        force = 4 * (seen[:, 4:6] - seen[:, :2]) - 2 * seen[:, 2:4]
        return jnp.tile(jnp.clip(force, -1, 1), (1, count))

    env = {"name": "point_maze", "maze": MAZE["maze"], "horizon": 120}
    found = {}
    for chunk in (1, 4):
        given = env | {"chunk": chunk}
        driver = functools.partial(act, count=chunk)
        found[chunk], shown = control_tasks.judge(
            given, 20, driver, None, jax.random.key(0)
        )
        assert shown["paths"].shape == (20, 120 // chunk, 2)
    assert found[1]["success"] == found[4]["success"] == 1
    assert_allclose(found[4]["reward"], 4 * found[1]["reward"], rtol=0.1)
    assert isinstance(control_tasks.build(env), envs.PointMaze)


@pytest.fixture
def folder(tmp_path):
    """Demonstrations of a maze: to the right, always."""
    rng = np.random.default_rng(0)
    count, ends = 400, np.arange(400) % 20 == 19
    action = np.float32(rng.normal([0.6, 0], 0.01, (count, 2)))
    given = data.Demonstrations(
        observation=np.float32(rng.uniform(-1, 1, (count, 6))),
        action=action,
        reward=np.zeros(count, np.float32),
        terminated=ends & False,
        truncated=ends,
    )
    data.write_demonstrations(tmp_path / "set", given)
    return tmp_path / "set"


def tiny(folder, *changes):
    small = (
        f"demonstrations.folder={folder} cloning.steps=150 "
        "cloning.learning_rate=0.01 cloning.batch_size=64 evaluate.agents=8"
    ).split()
    config = load_config("configs/reinflow.py:smoke", [*small, *changes])
    with config.unlocked():
        config.arms, config.train.seeds = {"maze_bc": config.arms.maze_bc}, (3, 5)
        config.arms.maze_bc.method.hidden = (16,)
        config.arms.maze_bc.method.steps = 1
    return config


@pytest.mark.slow  # .ci/run makes clones and judges them in the smoke of one seed
def test_clones_of_all_seeds_do_what_was_demonstrated(tmp_path, ran, folder):
    config = tiny(folder)
    found = ran(reinflow, config, seeds=(3, 5))
    assert reinflow.measures(config, "maze_bc") <= {
        name.partition("/")[2] for name in found
    }
    units = [
        json.loads((tmp_path / f"run/units/maze_bc-seed{s}.json").read_text())["unit"]
        for s in (3, 5)
    ]
    rewards = [unit["metrics"]["reward"] for unit in units]
    assert rewards[0] != rewards[1]  # each seed its own clone
    # to the right of the start lies a goal, above or below it two of three
    assert found["maze_bc/success"] > 0
    assert found["maze_bc/demonstrated_steps"] == 400
    names = [stage.name for stage in reinflow.stages(config, "maze_bc")]
    assert names == ["demonstrations", "clone", "judge"]


def test_demonstrations_of_something_else_are_refused(folder, refused):
    config = load_config("configs/reinflow.py:smoke")
    config.demonstrations.folder = str(folder)
    config = of_arm(config, "maze_bc")

    def read():
        return cloning.stages(config)[0].run(None)

    assert len(read().outputs["action"]) == 400
    with config.unlocked():
        config.method.bound = 0.5
        refused(r"reach 0.6.*, beyond \+-0.5, where the policy's end", read)
        config.env = {"name": "multi_goal"}
        words = r"\(6,\) and actions \(2,\); those of multi_goal are \(4,\) and"
        refused(words, read)


def test_bad_inputs(folder, refused):
    config = load_config("configs/reinflow.py:smoke")
    with config.unlocked():
        config.arms = {"ppo": {"method": {"name": "ppo", "hidden": (8,)}}}
    refused("'ppo' begins from a clone, and 'ppo' cannot", reinflow.describe, config)
    whole = load_config("configs/reinflow.py:smoke", ["expert.iterations=3"])
    expert = cloning.expert_config(whole, "expert")
    assert expert.train.iterations == 3 and "chunk" not in expert.env
    refused("iterations=3 is no multiple of", reinflow.describe, whole)
    for change, words in (
        ("arms.maze_bc.start.cloned=false", "'maze_bc' is neither cloned nor tuned"),
        ("demonstrations.folder=absent", "folder=absent is not there; give a folder"),
        (
            "train.normalise=none",
            "'maze_dppo' has train.normalise='none', and its",
        ),
    ):
        config = load_config("configs/reinflow.py:smoke", [change])
        refused(words, reinflow.describe, config)
