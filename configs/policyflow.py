"""PolicyFlow beside Gaussian PPO and FPO.

    python -m experiments.run --config=configs/policyflow.py:smoke
    python -m experiments.run --config=configs/policyflow.py:cpu --seeds=0..4
    python -m experiments.run --config=configs/policyflow.py:gpu --seeds=0..4
    python -m experiments.run --config=configs/policyflow.py:paper --dry_run

All seeds of an arm are trained side by side (``train.seeds``); every arm takes as many
environment steps.

smoke  MultiGoal, 64 environments, one seed: mechanics, and reward rises.
cpu    MultiGoal, 256 environments x 32 steps: does a policy find several of six goals?
gpu    MultiGoal as released (4096 environments x 32 steps, 2000 iterations), and in
       arms named maze_, hopper_ and cheetah_ PointMaze-lite, brax's hopper and
       Playground's CheetahRun (2048 environments; extras brax and playground).
paper  the same: sizes only.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

EXPERIMENT = "control"
TIERS = ("smoke", "cpu", "gpu", "paper")

COST = {
    "smoke": "15 s of CPU once compiled",
    "cpu": "10 min on 2 cores, 5 seeds side by side",
    "gpu": "meant for an hour on one H100, 5 seeds; not run yet",
    "paper": "sizes only",
}

RANGES = {"method.frequencies": "(0, 100000]", "method.steps": "[1, 10000]"}

PHYSICS = {
    "envs": 2048,
    "iterations": 150,
    "iterations_per_call": 10,
    "normalise": "running",
    "learning_rate": 1e-3,
}
TASKS = {
    "maze": {
        "env": {"name": "point_maze"},
        "train": {"envs": 2048, "iterations": 600, "learning_rate": 1e-4},
        # the shipped script has no Brownian term: that is the arm policyflow_plain
        "method": {"entropy_coefficient": 0.01},
    },
    "hopper": {
        "env": {"name": "brax", "task": "hopper", "backend": "spring"},
        "train": PHYSICS,
        "evaluate": {"agents": 128},
        "method": {"brownian_coefficient": 0.005},
    },
    "cheetah": {
        "env": {"name": "playground", "task": "CheetahRun", "implementation": "jax"},
        "train": PHYSICS,
        "evaluate": {"agents": 128},
        "method": {"brownian_coefficient": 0.005},
    },
}
"""Other environments of the large tiers, by the prefix of their arms. As many
environment steps for every method of one; the gpu tier takes ``GPU_ITERATIONS``."""

GPU_ITERATIONS = {"maze": 300, "hopper": 80, "cheetah": 80}
FPO_TRAIN = ("envs", "iterations", "iterations_per_call")
"""FPO keeps its own learning rate and statistics everywhere."""


def _moved(arm: dict, task: dict, iterations: int) -> dict:
    """An arm in another environment; what it has of its own stays."""
    method, train = {**task["method"], **arm["method"]}, dict(task["train"])
    if method["name"] == "ppo":
        method.pop("brownian_coefficient", None)
    if method["name"].startswith("fpo"):
        method = {**arm["method"], "bound": 1.0}
        train = {k: v for k, v in train.items() if k in FPO_TRAIN}
    train = {**arm.get("train", {}), **train, "iterations": iterations}
    return {**task, "method": method, "train": train}


HIDDEN = {"smoke": (32, 32), "cpu": (128, 64)}
"""Widths of the networks of the small tiers; those of the large ones are published."""


def base(config: Any, tier: str) -> None:
    """Everything but 'system', arms and claims; other methods of control share it.

    An arm is then ``{"method": {"name": ...}}``; one method alone is ``config.method``.
    """
    config.env = ConfigDict({"name": "multi_goal"})
    config.precision = ConfigDict({"rollout": "fp32", "train": "fp32"})
    config.train = ConfigDict(
        {
            "seeds": (0,) if tier == "smoke" else (0, 1, 2, 3, 4),
            "envs": {"smoke": 64, "cpu": 256}.get(tier, 4096),
            "iterations": {"smoke": 40, "cpu": 150, "gpu": 600}.get(tier, 2000),
            "iterations_per_call": {"smoke": 8, "cpu": 5}.get(tier, 25),
            "diagnosed_samples": 0,
            # none: as the preset of an arm's method has it
            "unroll": placeholder(int),
            "epochs": placeholder(int),
            "minibatches": placeholder(int),
            "learning_rate": placeholder(float),
            "normalise": placeholder(str),
            "critic_hidden": placeholder(tuple),
            "max_ratio_error": placeholder(float),  # above 1e-4 in two precisions
        }
    )
    config.evaluate = ConfigDict({"agents": 1000})
    config.train.critic_hidden = HIDDEN.get(tier)
    if tier == "smoke":
        config.train.update(unroll=16, learning_rate=1e-3)
        config.evaluate.agents = 200


def get_config(tier: str) -> ConfigDict:
    """The config of a tier."""
    large = tier in ("gpu", "paper")
    config = ConfigDict()
    config.system = "policyflow"
    base(config, tier)
    ppo, flow = {"name": "ppo"}, {"name": "policyflow"}
    if not large:
        ppo |= {"hidden": HIDDEN[tier]}
        flow |= {"hidden": HIDDEN[tier], "frequencies": (1.0, 100.0, 8)}
    look = {"train": {"diagnosed_samples": 256}}
    arms: dict[str, dict] = {
        "ppo": {"method": ppo},
        "policyflow": {"method": flow, **look},
        "policyflow_plain": {"method": {**flow, "brownian_coefficient": 0.0}, **look},
    }
    if large:
        for name, preset in (("fpo", "fpo"), ("fpo_released", "fpo:released")):
            arms[name] = {
                "method": {"name": preset, "bound": 5.0},
                "train": {"unroll": 32},  # as many steps as the others, not its 30
            }
        here = dict(arms)
        for prefix, task in TASKS.items():
            length = task["train"]["iterations"]
            length = GPU_ITERATIONS[prefix] if tier == "gpu" else length
            arms |= {
                f"{prefix}_{name}": _moved(arm, task, length)
                for name, arm in here.items()
            }
    config.arms = ConfigDict(arms)
    config.claims = ConfigDict(_claims(tier) if tier in ("cpu", "gpu") else {})
    return config


def _claims(tier: str) -> dict[str, dict[str, object]]:
    def claim(
        statement: str, statistic: str, threshold: float, **fields: object
    ) -> dict:
        return {
            "statement": statement,
            "statistic": statistic,
            "direction": "greater",
            "threshold": threshold,
            **fields,
        }

    entropy, reward = "goal_entropy", "training_reward"
    # cpu: from seeds 10 to 14, which are not counted; gpu: the sheet's guesses
    least, most, share = (0.25, 0.4, 0.7) if tier == "cpu" else (0.5, 0.2, 0.9)
    claims = {
        "1a": claim(
            "goal entropy H / ln 6 of PolicyFlow",
            "difference",
            least,
            ours=f"policyflow/{entropy}",
        ),
        "1a_ppo": claim(
            "... of Gaussian PPO",
            "difference",
            most,
            ours=f"ppo/{entropy}",
        )
        | {"direction": "less"},
        "1a_gap": claim(
            "goal entropy, PolicyFlow less Gaussian PPO",
            "difference",
            0.0,
            ours=f"policyflow/{entropy}",
            baseline=f"ppo/{entropy}",
        ),
        "2a": claim(
            "training reward, PolicyFlow over Gaussian PPO",
            "ratio",
            share,
            ours=f"policyflow/{reward}",
            baseline=f"ppo/{reward}",
        ),
        "2b": claim(
            "... without the Brownian term",
            "ratio",
            0.95,
            ours=f"policyflow_plain/{reward}",
            baseline=f"ppo/{reward}",
        ),
    }
    for name, what in (
        ("policyflow_plain", entropy),
        ("ppo", "reached"),
        ("policyflow", "reached"),
        ("policyflow", "ratio_correlation"),
        ("policyflow", "ratio_rms_error"),
    ):
        claims[f"1r_{name}_{what}"] = {
            "statement": f"{what.replace('_', ' ')}, {name}",
            "statistic": "report",
            "ours": f"{name}/{what}",
        }
    # all seeds of an arm share one clock; benchmarks/control.py compares the arms
    for name in ("ppo", "policyflow"):
        claims[f"3_{name}"] = {
            "statement": f"seconds an iteration and seed of {name}",
            "published": "PolicyFlow 1.34 to 1.82 times PPO, with physics",
            "statistic": "report",
            "ours": f"{name}/seconds_per_iteration",
        }
    if tier == "gpu":
        claims["1b"] = claim(
            "goals covered, PolicyFlow less the same without the Brownian term",
            "difference",
            0.0,
            ours="policyflow/covered_goals",
            baseline="policyflow_plain/covered_goals",
        )
        for task in TASKS:
            for flow, least in (("policyflow", 0.9), ("policyflow_plain", 0.95)):
                claims[f"2_{task}_{flow}"] = claim(
                    f"training reward in {task}, {flow} over Gaussian PPO",
                    "ratio",
                    least,
                    ours=f"{task}_{flow}/{reward}",
                    baseline=f"{task}_ppo/{reward}",
                )
            for rival in ("fpo", "fpo_released"):
                claims[f"2_{task}_{rival}"] = claim(
                    f"training reward in {task}, PolicyFlow over {rival}",
                    "ratio",
                    1.0,
                    ours=f"{task}_policyflow/{reward}",
                    baseline=f"{task}_{rival}/{reward}",
                )
    return claims
