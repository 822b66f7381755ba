"""What the experiment measures of world models, where the answer is known."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from experiments import flow_equivariant, world_tasks
from experiments.arms import of_arm
from tmdjax.harness import load_config
from tmdjax.systems.flow_equivariant import preset

SPEC = "configs/flow_equivariant.py:smoke"


@pytest.fixture
def config():
    return load_config(SPEC)


def test_errors_are_those_of_rollouts_that_held(config):
    """The first is wrong by 0.1 more a frame, the second breaks at frame 7 of 18."""
    length, context = config.evaluate.length, config.data.context
    frames = np.full((2, context + length, 8, 8, 1), 0.5, np.float32)
    frames[:, :context] = np.nan  # what was seen does not count
    unseen = np.zeros((2, length, 8, 8), bool)
    unseen[:, 3:5, 2] = True
    steps = np.arange(length).reshape(-1, 1, 1, 1, 1)
    predicted = 0.5 + 0.1 * steps + np.zeros((1, 2, 8, 8, 1))
    predicted[3:5, :, 2, ::2] = 0.5
    predicted[6:, 1] = np.nan
    made = {"frames": frames, "unseen": unseen}
    found = flow_equivariant.judged(config, predicted, made)
    assert flow_equivariant.measures(config, "full") > {*found}
    assert found["failed"] == 0.5 == found["failed_4_9"] and found["failed_1_3"] == 0
    assert_allclose(found["mean_1_3"], 0.05 / 3, rtol=1e-5)
    late = np.square(0.1 * np.arange(12, 18)).mean()
    assert_allclose([found["mean_late"], found["median_late"]], late, rtol=1e-5)
    assert_allclose(found["unseen"], (0.3**2 + 0.4**2) / 4, rtol=1e-5)
    assert_allclose(found["psnr_late"], -10 * np.log10(0.25), rtol=1e-5)
    everything = flow_equivariant.judged(config, np.nan * predicted, made)
    assert everything["failed"] == 1 and np.isnan(everything["mean_late"])
    assert np.isnan([everything[k] for k in ("unseen", "psnr_late", "growth")]).all()


def test_a_clipped_state_cannot_break_and_is_told():
    """Of four rollouts one stays below 5, two reach it, and one breaks on the way."""
    amplitude = np.array([[1, 5, 2, 3], [4.5, 2, 3, np.nan], [4, 1, 5, np.nan]])
    found = flow_equivariant.state_measures(amplitude, 5.0)
    assert found == {"largest_state": 5, "saturated": 0.5}
    free = flow_equivariant.state_measures(10 * amplitude[:, 3:], None)
    assert free == {"largest_state": 0}
    clipped, paper = load_config(SPEC), load_config(SPEC.replace("smoke", "paper"))
    assert "saturated" in flow_equivariant.measures(clipped, "full")
    assert "saturated" not in flow_equivariant.measures(paper, "full")


def test_rows_are_arms_and_what_needs_no_learning(config):
    found = {"full/mean_late": 0.1, "dfot/zero.mean_late": 0.2, "rssm/mean_1_3": 0.3}
    with config.unlocked():
        config.arms.still = {"data": {"speed": 0}}
    rows = flow_equivariant.summary_rows(config, found)
    named = {row["predictor"]: row for row in rows}
    assert len(rows) == 5 + 3 * 3 and {"blocks", "zero, blocks"} <= named.keys()
    assert named["full"]["mean late"] == 0.1 and named["rssm"]["error 1-3"] == 0.3
    assert named["zero, torus"]["mean late"] == 0.2  # of the first arm of their world
    assert named["zero, torus, speed=0"]["mean late"] is None


def test_horizons_grow_for_closed_loops_alone(config):
    by_arm = {arm: world_tasks.horizons_of(of_arm(config, arm)) for arm in config.arms}
    assert by_arm == {"full": (2, 3), "dfot": (3,), "rssm": (3,), "blocks": (3,)}
    assert world_tasks.spans(config) == [(0, 3), (3, 9)]
    assert flow_equivariant.evaluated(of_arm(config, "blocks")).teacher_forcing == 0


@pytest.mark.parametrize("arm, name", [("full", "torus"), ("blocks", "blocks")])
def test_the_paper_tier_has_the_published_settings(arm, name):
    own, published = (
        of_arm(load_config(SPEC.replace("smoke", "paper")), arm),
        preset(name),
    )
    horizon = published.world.predicted
    assert world_tasks.network_of(own) == published.module
    assert world_tasks.world_of(own, horizon) == published.world
    assert world_tasks.rollout_of(own) == published.config
    assert world_tasks.horizons_of(own) == (horizon,)
    assert own.train.batch_size == published.batch_size
    for setting in (
        "name",
        "learning_rate",
        "schedule",
        "b2",
        "weight_decay",
        "clip_norm",
    ):
        assert own.optimizer[setting] == getattr(published.optimizer, setting)


def test_bad_settings_are_refused_before_anything_is_compiled(refused):
    for change, words in (
        ("data.window=13", "window=13 is larger than world=12"),
        ("data.side=13", "images of 13 x 13 do not fit into world=12"),
        ("data.context=3", "cannot pass over a world of 12 in 3 frames; raise camera"),
        ("train.horizons=(3,2)", r"horizons=\(3, 2\) must not decrease"),
        ("evaluate.horizons=(9,3)", r"evaluate.horizons=\(9, 3\) must rise"),
        ("evaluate.length=8", "and end within evaluate.length=8"),
        ("train.batch_size=100", "batch_size=100 is larger than the 64 sample"),
        ("rollout.feedback_clip=(1.0,0.0)", "feedback_clip, upper=0.0 is outside"),
        ("model.name=rsm", "model.name under data.name=torus='rsm'.*'rssm'"),
        ("model.self_motion=shfit", "self_motion='shfit'"),
        ("arms.dfot.model.frames=12", "no part of frames=12; give"),
    ):
        config = load_config(SPEC, [change])
        arm = "dfot" if "dfot" in change else "full"
        with config.unlocked():
            config.arms = {arm: config.arms[arm]}
        refused(words, flow_equivariant.describe, config)
    config = load_config(SPEC)
    with config.unlocked():
        config.model.world = 10
    refused("has world=10, the data world=12", world_tasks.network_of, config)


def test_images_that_are_not_those_of_the_config_are_refused(config, refused):
    with config.unlocked():
        config.data.side = 7
    refused(
        "data.side=7, but images .* have 8 pixels",
        world_tasks.drawn,
        config,
        "train",
        2,
    )
