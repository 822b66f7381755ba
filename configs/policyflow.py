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

from ml_collections import ConfigDict

EXPERIMENT = "control"
TIERS = ("smoke", "cpu", "gpu", "paper")

COST = {
    "smoke": "40 s on 2 cores",
    "cpu": "10 min on 2 cores, 5 seeds side by side",
    "gpu": "meant for an hour on one H100, 5 seeds; not run yet",
    "paper": "sizes only",
}


PHYSICS = {"envs": 2048, "iterations": 150, "iterations_per_call": 10}
TASKS = {
    "maze": {
        "env": {"name": "point_maze"},
        "train": {"envs": 2048, "iterations": 600, "learning_rate": 1e-4},
        "entropy_coefficient": 0.01,
        "bound": 1.0,
    },
    "hopper": {
        "env": {"name": "brax", "task": "hopper", "backend": "spring"},
        "train": {**PHYSICS, "normalise": "running", "learning_rate": 1e-3},
        "evaluate": {"agents": 128},
        "brownian_coefficient": 0.005,
        "bound": 1.0,
    },
    "cheetah": {
        "env": {"name": "playground", "task": "CheetahRun", "implementation": "jax"},
        "train": {**PHYSICS, "normalise": "running", "learning_rate": 1e-3},
        "evaluate": {"agents": 128},
        "brownian_coefficient": 0.005,
        "bound": 1.0,
    },
}
"""Other environments of the large tiers, by the prefix of their arms. As many
environment steps for every method of one; the gpu tier takes ``GPU_ITERATIONS``."""

GPU_ITERATIONS = {"maze": 300, "hopper": 80, "cheetah": 80}


def _changed(arm: dict, changes: dict) -> dict:
    """An arm in another environment."""
    found, train = dict(arm), dict(changes["train"])
    if arm["method"] == "fpo":  # keeps its own learning rate and statistics
        found["bound"] = changes["bound"]
        train = {
            k: train[k]
            for k in ("envs", "iterations", "iterations_per_call")
            if k in train
        }
    elif "entropy_coefficient" in changes:
        found["entropy_coefficient"] = changes["entropy_coefficient"]
    if arm.get("brownian_coefficient"):
        default = arm["brownian_coefficient"]
        found["brownian_coefficient"] = changes.get("brownian_coefficient", default)
    found |= {k: changes[k] for k in ("env", "evaluate") if k in changes}
    return found | {"train": {**arm.get("train", {}), **train}}


def get_config(tier: str) -> ConfigDict:
    """The config of a tier."""
    large = tier in ("gpu", "paper")
    hidden = {"smoke": (32, 32), "cpu": (128, 64)}.get(tier, (256, 128, 64))
    config = ConfigDict()
    config.system = "policyflow"
    config.env = ConfigDict({"name": "multi_goal"})
    config.train = ConfigDict(
        {
            "seeds": (0,) if tier == "smoke" else (0, 1, 2, 3, 4),
            "envs": {"smoke": 64, "cpu": 256}.get(tier, 4096),
            "unroll": 16 if tier == "smoke" else 32,
            "iterations": {"smoke": 40, "cpu": 150, "gpu": 600}.get(tier, 2000),
            "iterations_per_call": {"smoke": 8, "cpu": 5}.get(tier, 25),
            "epochs": 5,
            "minibatches": 4,
            "learning_rate": 1e-3 if tier == "smoke" else 2e-4,
            "target_kl": 0.01,
            "critic_hidden": hidden,
        }
    )
    config.evaluate = ConfigDict({"agents": 1000})
    if tier == "smoke":
        config.evaluate.agents = 200
    velocity = {"frequencies": (1.0, 100.0, 32 if large else 8)}
    flow = {
        "method": "policyflow",
        "hidden": hidden,
        **velocity,
        "train": {"diagnosed_samples": 256},
    }
    fpo = {
        "method": "fpo",
        "bound": 5.0,
        "train": {
            "unroll": 32,
            "epochs": 16,
            "minibatches": 32,
            "learning_rate": 3e-4,
            "target_kl": None,
            "weight_decay": 0.0,
            "clip_norm": None,
            "discount": 0.995,
            "reward_scale": 10.0,
            "advantages": "minibatch",
            "value_coefficient": 0.25,
            "value_clip": None,
            "normalise": "running",
            "critic_hidden": (256,) * 5,
            "critic_activation": "silu",
        },
    }
    released = {
        "normalise": "released",
        "gae": "per_minibatch",
        "max_ratio_error": None,
    }
    arms: dict[str, dict] = {
        "ppo": {"method": "ppo", "hidden": hidden},
        "policyflow": {**flow, "brownian_coefficient": 0.25},
        "policyflow_plain": {**flow, "brownian_coefficient": 0.0},
    }
    if large:
        arms["fpo"] = fpo
        arms["fpo_released"] = {**fpo, "train": {**fpo["train"], **released}}
        for prefix, changes in TASKS.items():
            if tier == "gpu":
                shorter = {**changes["train"], "iterations": GPU_ITERATIONS[prefix]}
                changes = {**changes, "train": shorter}
            arms |= {
                f"{prefix}_{name}": _changed(arms[name], changes)
                for name in (
                    "ppo",
                    "policyflow",
                    "policyflow_plain",
                    "fpo",
                    "fpo_released",
                )
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
            "published": "",
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
            baseline=None,
        ),
        "1a_ppo": claim(
            "... of Gaussian PPO",
            "difference",
            most,
            ours=f"ppo/{entropy}",
            baseline=None,
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
            "published": "",
            "statistic": "report",
            "ours": f"{name}/{what}",
            "baseline": None,
        }
    # all seeds of an arm share one clock; benchmarks/control.py compares the arms
    for name in ("ppo", "policyflow"):
        claims[f"3_{name}"] = {
            "statement": f"seconds an iteration and seed of {name}",
            "published": "PolicyFlow 1.34 to 1.82 times PPO, with physics",
            "statistic": "report",
            "ours": f"{name}/seconds_per_iteration",
            "baseline": None,
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
