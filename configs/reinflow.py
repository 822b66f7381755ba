"""ReinFlow beside DPPO and PPO: fine-tuning of policies cloned from demonstrations.

    python -m experiments.run --config=configs/reinflow.py:smoke
    python -m experiments.run --config=configs/reinflow.py:cpu --seeds=0..4
    python -m experiments.run --config=configs/reinflow.py:gpu --seeds=0..4
    python -m experiments.run --config=configs/reinflow.py:paper --dry_run

Demonstrations are episodes of two PPO policies of our own, one of them stopped early
(``expert.medium_iterations``); ``--config.demonstrations.folder=PATH`` takes yours
(``data.load_demonstrations``). All seeds of an arm are cloned and trained side by side
(``train.seeds``); every arm of an environment takes as many environment steps, but for
dppo_time, which has fewer (``EQUAL_TIME``).

smoke  a maze of 3 x 3 cells, one seed, a few iterations: mechanics.
cpu    the maze with all arms; pushing with sparse reward, from states and from 32x32
       pixels; brax's inverted pendulum (pip install 'tmdjax[brax]').
gpu    PointMaze-lite's medium maze, pushing from 64x64 pixels, brax's hopper and ant.
paper  hopper at the published sizes: sizes only.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

TIERS = ("smoke", "cpu", "gpu", "paper")

COST = {
    "smoke": "30 s on 2 cores",
    "cpu": "81 min on 2 cores beside other work, 5 seeds side by side",
    "gpu": "meant for an hour on one H100, 5 seeds; not run yet",
    "paper": "sizes only",
}

RANGES = {
    "method.frequencies": "(0, 100000]",
    "method.steps": "[1, 10000]",
    "expert.method.entropy_coefficient": "[0, 1000000000]",
    "expert.seed": "[0, 4294967295]",
    "cloning.ema_decay": "[0, 1) or none",
    "train.learning_rate_cycle": "[0, 1000000000]",
    "expert.train.learning_rate_cycle": "[0, 1000000000]",
    "train.critic_warmup": "[0, 1000000000]",
    "train.discount": "[0, 1]",
    "expert.train.discount": "[0, 1]",
}

RING = ("11111", "1r0g1", "10101", "1g0g1", "11111")
"""Cells around a block: two ways to the far corner, and a goal on each."""

CHUNK = 4
IMAGE = "reinflow:image"
"""The published settings for pixels: noise held, no entropy bonus, a clip of 0.001."""
EQUAL_TIME = {"maze": 85, "push": 15, "pendulum": 25}
"""Iterations of DPPO in about the seconds of ReinFlow's with 4 steps, by pilots."""

Settings = dict[str, Any]
ENVIRONMENTS: dict[str, Settings] = {
    "maze": {
        "env": {"name": "point_maze", "maze": RING, "horizon": 160, "chunk": CHUNK},
        "expert": {"iterations": 120, "medium_iterations": 30},
        "train": {"iterations": 200, "learning_rate": 1e-3},
    },
    "push": {
        "env": {"name": "push", "chunk": CHUNK},
        "expert": {"iterations": 120, "medium_iterations": 40},
    },
    "pixels": {
        "env": {
            "name": "push",
            "observation": "pixels",
            "side": 32,
            "chunk": CHUNK,
        },
        "expert": {"iterations": 120, "medium_iterations": 40},
        # half as many, and 3000 updates, make a clone that succeeds half as often
        "demonstrations": {"episodes": 1000},
        "cloning": {"steps": 8000},
        "train": {"normalise": "none", "iterations": 100},
    },
    "pendulum": {
        "env": {
            "name": "brax",
            "task": "inverted_pendulum",
            "backend": "positional",
            "horizon": 200,
            "chunk": CHUNK,
        },
        "expert": {
            "iterations": 60,
            "medium_iterations": 20,
            "train": {"envs": 64, "normalise": "running"},
        },
        "train": {"envs": 64, "iterations": 40},
    },
}
"""By the prefix of their arms: the environment, and what its arms change."""


def _sizes(tier: str) -> dict[str, Any]:
    """Networks of a tier: the flow's, the expert's, the critic's."""
    width = {"smoke": 32, "cpu": 64}.get(tier, 512)
    return {
        "flow": {
            "hidden": (width,) * 3,
            "time_hidden": 32,
            "noise_hidden": (32, 32) if width < 512 else (64, 64),
        },
        "dppo": {"hidden": (width,) * 3, "time_hidden": 32},
        "ppo": {"hidden": (width, width)},
        "critic": (64, 64) if width < 512 else (256, 256, 256),
    }


def base(config: Any, tier: str) -> None:
    """Everything but 'system', arms and claims; methods of fine-tuning share it."""
    small = tier in ("smoke", "cpu")
    sizes = _sizes(tier)
    config.env = ConfigDict(ENVIRONMENTS["maze"]["env"])
    config.precision = ConfigDict({"rollout": "fp32", "train": "fp32"})
    config.start = ConfigDict({"cloned": True, "tuned": True})
    config.expert = ConfigDict(
        {
            "seed": 0,
            "iterations": 120,
            "medium_iterations": 30,
            "method": {"name": "ppo", **sizes["ppo"], "entropy_coefficient": 0.001},
            "train": {
                "envs": 128 if small else 2048,
                "iterations_per_call": 10,
                "unroll": 32,
                "learning_rate": 1e-3,
                "normalise": "running",
                "critic_hidden": sizes["critic"],
            },
        }
    )
    config.demonstrations = ConfigDict({"folder": "", "episodes": 100})
    config.cloning = ConfigDict(
        {
            "steps": 3000,
            "batch_size": 256,
            "learning_rate": 1e-3,
            "weight_decay": 1e-6,
            "ema_decay": 0.995,
            "log_every": 100,
        }
    )
    config.train = ConfigDict(
        {
            "seeds": (0,) if tier == "smoke" else (0, 1, 2, 3, 4),
            "envs": 128 if small else 2048,
            "iterations": 30,
            "iterations_per_call": 5,
            "unroll": 32,
            "epochs": 5,
            "minibatches": 4,
            "learning_rate": 3e-4,
            "critic_learning_rate": 1e-3,
            "critic_warmup": 2,
            "scale_rewards": True,
            "normalise": "fixed",
            "critic_hidden": sizes["critic"],
            "diagnosed_samples": 0,
            # none: as the preset of an arm's method has it
            "learning_rate_cycle": placeholder(tuple),
            "discount": placeholder(float),
            "target_kl": placeholder(float),
            "max_ratio_error": placeholder(float),
        }
    )
    config.evaluate = ConfigDict({"agents": 128})
    if tier == "smoke":
        few = {"envs": 16, "iterations_per_call": 2, "unroll": 16}
        config.expert.update(iterations=4, medium_iterations=2, train=few)
        config.demonstrations.episodes = 4
        config.cloning.update(steps=100, batch_size=64, log_every=20)
        config.train.update(**few, iterations=4, critic_warmup=1)
        config.evaluate.agents = 16


def _moved(prefix: str, arm: Settings) -> Settings:
    """An arm in an environment; what it changes itself stays."""
    task = ENVIRONMENTS[prefix]
    changed = {k: v for k, v in task.items() if k != "train"}
    train = {**task.get("train", {}), **arm.get("train", {})}
    return {**changed, **arm, **({"train": train} if train else {})}


def get_config(tier: str) -> ConfigDict:
    """The config of a tier."""
    config: Any = ConfigDict()
    config.system = "reinflow"
    base(config, tier)
    sizes = _sizes(tier)
    flow = {"name": "reinflow", **sizes["flow"]}
    dppo = {"name": "dppo", **sizes["dppo"]}
    ppo = {"name": "ppo", **sizes["ppo"]}
    fresh = {"cloned": False, "tuned": True}
    arms: dict[str, Settings] = {
        "bc": {"method": flow, "start": {"cloned": True, "tuned": False}},
        "reinflow4": {"method": {**flow, "steps": 4}},
        "dppo": {"method": dppo},
    }
    whole = {
        **arms,
        "reinflow2": {"method": {**flow, "steps": 2}},
        "reinflow1": {"method": {**flow, "steps": 1}},
        "ppo": {
            "method": ppo,
            "start": fresh,
            "train": {"normalise": "running", "critic_warmup": 0},
        },
        "fixed_noise": {"method": {**flow, "noise_input": "none"}},
        "no_entropy": {"method": {**flow, "entropy_coefficient": 0.0}},
        "w2": {
            "method": {**flow, "entropy_coefficient": 0.0, "w2_coefficient": 0.1},
        },
    }
    if tier == "smoke":
        few = {"steps": 6, "fine_tuned_steps": 3}  # every step is compiled by itself
        arms["dppo"] = {"method": {**dppo, **few}}
        found = {f"maze_{name}": arm for name, arm in arms.items()}
    elif tier == "cpu":
        found = {f"maze_{name}": _moved("maze", arm) for name, arm in whole.items()}
        for prefix in ("push", "pendulum"):
            found |= {f"{prefix}_{n}": _moved(prefix, arm) for n, arm in arms.items()}
        for prefix, length in EQUAL_TIME.items():
            short = {"method": dppo, "train": {"iterations": length}}
            found[f"{prefix}_dppo_time"] = _moved(prefix, short)
        image = {"bc": arms["bc"], "reinflow1": whole["reinflow1"]}
        one = {"method": {**flow, "name": IMAGE, "steps": 1}}
        found |= {
            f"pixels_{n}": _moved("pixels", {**arm, **one}) for n, arm in image.items()
        }
        config.one_seed_arms = ("maze_fixed_noise", "maze_no_entropy")
    else:
        found = _large(tier, flow, dppo)
    for arm in found.values():  # the bound of the noise falls over the whole training
        if arm["method"]["name"] == "reinflow":
            length = arm.get("train", {}).get("iterations", config.train.iterations)
            arm["method"] = {**arm["method"], "decay_iterations": length}
    config.arms = ConfigDict(found)
    config.claims = ConfigDict(_claims() if tier == "cpu" else {})
    return config


def _large(tier: str, flow: Settings, dppo: Settings) -> dict[str, Settings]:
    """Arms of the gpu tier, and those of published sizes."""
    tasks: dict[str, Settings] = {
        name: {
            "env": {"name": "brax", "task": name, "chunk": CHUNK},
            "expert": {"iterations": 300, "medium_iterations": 100},
            "train": {"iterations": 100, "unroll": 64},
        }
        for name in ("hopper", "ant")
    }
    tasks["maze"] = {
        "env": {"name": "point_maze", "chunk": CHUNK},
        "expert": {"iterations": 600, "medium_iterations": 200},
        "train": {"iterations": 150},
    }
    pixels = {"name": "push", "observation": "pixels", "side": 64, "chunk": CHUNK}
    tasks["pixels"] = {
        "env": pixels,
        "expert": {"iterations": 300, "medium_iterations": 100},
        "train": {"normalise": "none", "envs": 256, "iterations": 200},
    }
    methods = {"bc": flow, "reinflow4": {**flow, "steps": 4}}
    methods["reinflow1"] = {**flow, "steps": 1}
    methods["dppo"] = dppo
    if tier == "paper":
        tasks = {"hopper": tasks["hopper"]}
        tasks["hopper"]["train"] = {"iterations": 1000, "envs": 40, "unroll": 500}
        rates = {"reinflow": (4.5e-5, 6.5e-4), "dppo": (1e-4, 1e-3)}
    found = {}
    for prefix, task in tasks.items():
        for name, method in methods.items():
            if prefix == "pixels" and method.get("steps", 0) == 4:
                continue  # published with one step
            arm = {**task, "method": method}
            if tier == "paper":
                policy, critic = rates[method["name"]]
                own = {"learning_rate": policy, "critic_learning_rate": critic}
                arm["train"] = {**task["train"], **own, "critic_warmup": 0}
            if prefix == "pixels" and name != "dppo":
                arm["method"] = {**method, "name": IMAGE, "steps": 1}
            if name == "bc":
                arm["start"] = {"cloned": True, "tuned": False}
            found[f"{prefix}_{name}"] = arm
    return found


MEASURES = {
    "maze": "reward",
    "push": "success",
    "pendulum": "judged_return",
    "pixels": "success",
}


def _claims() -> dict[str, Settings]:
    def claim(
        statement: str, statistic: str, threshold: float, ours: str, baseline: str
    ) -> Settings:
        return {
            "statement": statement,
            "statistic": statistic,
            "direction": "greater",
            "threshold": threshold,
            "ours": ours,
            "baseline": baseline,
        }

    claims: dict[str, Settings] = {}
    for name in ("maze", "push", "pendulum"):
        what = MEASURES[name]
        claims[f"a_{name}"] = claim(
            f"{name}: {what.replace('_', ' ')}, ReinFlow with 4 steps less the clone",
            "difference",
            0.0,
            f"{name}_reinflow4/{what}",
            f"{name}_bc/{what}",
        )
        clock = "seconds_per_iteration"
        claims[f"b_{name}"] = claim(
            f"{name}: seconds an iteration and seed, ReinFlow with 4 steps over DPPO",
            "ratio",
            0.5,
            f"{name}_reinflow4/{clock}",
            f"{name}_dppo/{clock}",
        ) | {"direction": "less", "published": "0.12, hopper, 20 and 10 steps"}
        for arm, equal in (("dppo", "steps"), ("dppo_time", "time, about")):
            claims[f"r_{name}_{arm}"] = {
                "statement": f"{name}: {what.replace('_', ' ')} of DPPO, at equal "
                f"{equal}",
                "statistic": "report",
                "ours": f"{name}_{arm}/{what}",
            }
    claims["c"] = claim(
        "maze: reward, ReinFlow with 1 step over 4",
        "ratio",
        0.9,
        "maze_reinflow1/reward",
        "maze_reinflow4/reward",
    )
    claims["d"] = claim(
        "maze: reward, the entropy over the W2 regulariser",
        "ratio",
        1.0,
        "maze_reinflow4/reward",
        "maze_w2/reward",
    )
    claims["e"] = claim(
        "pushing from pixels: success, ReinFlow with 1 step less its clone",
        "difference",
        0.0,
        "pixels_reinflow1/success",
        "pixels_bc/success",
    )
    for name in ("maze_ppo", "maze_reinflow2"):
        claims[f"r_{name}"] = {
            "statement": f"reward of {name.replace('_', ', ')}, at equal steps",
            "statistic": "report",
            "ours": f"{name}/reward",
        }
    return claims
