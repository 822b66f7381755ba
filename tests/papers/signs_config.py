"""Signs on points of a Gaussian mixture."""

from ml_collections import ConfigDict

from configs.flow_grpo import base

EXPERIMENT = "signs_experiment"
TIERS = ("smoke",)


def get_config(tier):
    """The config of a tier."""
    config = ConfigDict({"system": "signs", "method": {"name": "signs"}})
    base(config, tier)
    config.model.hidden = 8
    config.rl.update(iterations=2, prompts=4)
    config.rollout = ConfigDict({"steps": 3, "shift": 1.0})
    config.objective = ConfigDict({"clip_range": 0.05})
    config.evaluate.update(count=8, steps=2)
    return config
