"""SmallActions in MultiGoal."""

from ml_collections import ConfigDict

EXPERIMENT = "small_actions_experiment"
TIERS = ("smoke",)


def get_config(tier):
    """The config of a tier."""
    train = {"seeds": (0,), "envs": 4, "iterations": 2, "iterations_per_call": 1}
    return ConfigDict(
        {
            "system": "small_actions",
            "env": {"name": "multi_goal"},
            "precision": {"rollout": "fp32", "train": "fp32"},
            "method": {"name": "small_actions", "hidden": (8,), "pull": 0.1},
            "train": {**train, "unroll": 4, "minibatches": 2, "critic_hidden": (8,)},
            "evaluate": {"agents": 16},
        }
    )
