"""AReaL: a decoder writes while it trains, by responses of bounded staleness.

    python -m experiments.run --config=configs/areal.py:smoke
    python -m experiments.run --config=configs/areal.py:cpu --seeds=0..4
    python -m experiments.run --config=configs/areal.py:gpu --seeds=0..4
    python -m experiments.run --config=configs/areal.py:paper --dry_run

All arms start from one supervised policy and make as many updates, each in four
minibatches, at four times GRPO's learning rate: what goes wrong with stale responses is
to show. 'decoupled' arms clip around the policy before the update and weigh by the one
that wrote, 'naive' clips around the latter; the number is eta, the versions that the
weights may be ahead of a token that trains them. 'loop' is the synchronous iteration
without workers, from which 'sync' must not differ by a bit.

The clock is virtual ('sim'), its costs are chosen and not measured: with all slots
occupied a batch is written in two thirds of the time of an update, so that writing runs
ahead as far as eta lets it, and without a bound (decoupled_inf) further with every
update. --config.runtime.executor=threads takes real time, and =ray too, in processes
(docs/ray.md).

In GRPO's cpu tier accuracies after training had a standard deviation of 0.023 over
seeds, so that five seeds tell arms apart that differ by some 0.04. Hence the margin of
"not worse", 0.05: a quarter of what the naive loss lost at eta 4 in the paper. No size
has been tried out.

smoke  an almost untrained decoder: mechanics only.
cpu    0.1 M parameters, sums of 4 to 14 digits; 16 prompts x 8 responses, 60 updates.
       No claim compares eta 1, 2 and 8, the log-linear proximal policy, M2PO and
       generators that finish their texts before they take weights: first seed alone.
gpu    3.9 M parameters, sums of 3 to 40 digits; 32 prompts x 8, 100 updates.
paper  the sizes of Qwen2.5-1.5B, 512 prompts x 16, responses of up to 8192 tokens: the
       published setting in which eta was varied.

The cpu and gpu tiers have not been run yet.

    --config.arms.decoupled_8.schedule.eta=16            another bound
    --config.arms.decoupled_4.schedule.on_stale=keep     and mask, for what is too old
    --config.runtime.costs.learn.tokens=4e-5             a slower trainer
"""

import math
from typing import Any

from ml_collections import ConfigDict

from configs.grpo import RANGES as GRPO_RANGES
from configs.grpo import base as grpo_base

EXPERIMENT = "asynchronous_rl"
TIERS = ("smoke", "cpu", "gpu", "paper")

COST = {
    "smoke": "15 s of CPU once compiled",
    "cpu": "estimated: 30 min on 2 cores, 5 seeds; not run yet",
    "gpu": "meant for an hour on one H100, 5 seeds; not run yet",
    "paper": "sizes only",
}
RANGES = GRPO_RANGES | {
    "curve.level": "[0, 1]",
    "runtime.generators": "[1, 1000]",
    "runtime.scorers": "[1, 1000]",
    "runtime.checkpoint_every": "[1, 1000000]",
    "runtime.*": "[0, 1000000]",
    "schedule.*": "[0, inf]",
}
LEARNING_RATE = {"smoke": 3e-4, "paper": 2e-5}
MARGIN = 0.05
"""Of accuracy, within which an arm is not worse than another."""


def base(config: Any, tier: str) -> None:
    """Everything but 'system', method, schedule, arms and claims; APRIL's too."""
    small = tier == "smoke"
    grpo_base(config, tier)
    config.sft.recipe = "fp32"  # arms of any precision start from one policy
    if tier == "cpu":
        sizes = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16}
        config.model.update(sizes)
        config.task.update({"low": 4, "high": 14, "log_mean": 1.9})
        config.sft.update({"length": 64, "steps": 6000})
        sizes = {"max_new_tokens": 52, "length": 72, "slots": 128}
        config.rl.update(sizes | {"iterations": 60, "warmup": 10})
        config.judge.update({"problems": 512, "samples": 2})
    if small:  # rewards of its texts, none of which is right, differ by their lengths
        config.rl.overlong_buffer = config.rl.max_new_tokens
    else:
        config.rl.minibatches = 4
    config.curve = ConfigDict(
        {"every": 1 if small else 5, "problems": 8 if small else 128, "level": 0.5}
    )
    config.runtime = ConfigDict(
        {
            "executor": "sim",
            "generators": 1,
            "scorers": 1,
            "interruptible": True,
            "recompute": True,
            "checkpoint_every": 1 if small else 10,
            "equal_to": "",  # the arm from which parameters must not differ
            # seconds an amount, by step
            "costs": {
                "decode": {"slot_steps": 1e-5, "drawn": 1e-5, "prefilled": 2e-6},
                "weights": {"swaps": 1e-3, "prefilled": 2e-6},
                "learn": {"tokens": 2.2e-5},
                "judge": {"responses": 0.0},
            },
            # where the processes of executor 'ray' are, and GPUs by role
            "ray": {
                "address": "local",
                "options": {role: {"num_gpus": 0.0} for role in ("generate", "train")},
            },
        }
    )


def get_config(tier: str) -> ConfigDict:
    """The config of a tier."""
    config: Any = ConfigDict()
    config.system = "areal"
    base(config, tier)
    config.rl.learning_rate = LEARNING_RATE.get(tier, 4e-4)
    if tier == "paper":
        sizes = {"prompts": 512, "samples": 16, "max_new_tokens": 8192}
        config.rl.update(sizes | {"length": 10240, "iterations": 1000})
    config.method = ConfigDict({"name": "areal"})
    config.schedule = ConfigDict({"name": "areal", "eta": 0.0, "on_stale": "drop"})

    def arm(eta: float, method: str = "areal", **groups: Any) -> dict[str, Any]:
        own = {"method": {"name": method}, "schedule": {"eta": eta}}
        return own | groups

    arms: dict[str, Any] = {
        "sync": arm(0.0, runtime={"equal_to": "sync"}),
        "naive_4": arm(4.0, "areal:naive"),
        "decoupled_4": arm(4.0),
        "decoupled_inf": arm(math.inf),
        "decoupled_1": arm(1.0),
        "decoupled_2": arm(2.0),
        "decoupled_8": arm(8.0),
        "loglinear_4": arm(4.0, rl={"proximal": "loglinear"}),
        "m2po_4": arm(4.0, "areal:m2po"),
        "uninterrupted_4": arm(4.0, runtime={"interruptible": False}),
        "loop": arm(0.0, runtime={"executor": "none", "equal_to": "sync"}),
    }
    if tier == "smoke":
        arms = {name: arms[name] for name in ("sync", "naive_4", "loop")}
        arms["naive_4"]["runtime"] = {"generators": 2}
    else:
        config.one_seed_arms = tuple(arms)[4:]
    config.arms = ConfigDict(arms)
    config.claims = ConfigDict(_claims(arms) if tier in ("cpu", "gpu") else {})
    return config


def not_worse(statement: str, ours: str, baseline: str, **other: Any) -> dict[str, Any]:
    """A claim that held-out accuracy of an arm is not below another's by MARGIN."""
    return {
        "statement": f"held-out accuracy, {statement}: above -{MARGIN}",
        "statistic": "difference",
        "direction": "greater",
        "threshold": -MARGIN,
        "ours": f"{ours}/accuracy_after",
        "baseline": f"{baseline}/accuracy_after",
        **other,
    }


def sooner(ours: str, baseline: str) -> dict[str, Any]:
    """A claim about the virtual clock when held-out accuracy reaches curve.level."""
    return {
        "statement": f"virtual seconds until held-out accuracy is that of curve.level, "
        f"{ours} over {baseline}",
        "statistic": "ratio",
        "direction": "less",
        "threshold": 1.0,
        "ours": f"{ours}/clock_to_level",
        "baseline": f"{baseline}/clock_to_level",
        "simulated": True,
    }


def reports(arm: str, apart: bool = True) -> dict[str, dict[str, Any]]:
    """What is told of an arm without a threshold.

    Args:
        arm: its name.
        apart: whether it has workers, and a clock.
    """
    names = ["accuracy_before", "accuracy_after", "score_last"]
    if apart:
        names += ["staleness_mean", "off_policy_share", "length_ratio"]
        names += ["clock_seconds", "clock_to_level"]
    return {
        f"r_{arm}_{what}": {
            "statement": f"{what.replace('_', ' ')}, {arm}",
            "statistic": "report",
            "ours": f"{arm}/{what}",
            "simulated": what.startswith("clock"),
        }
        for what in names
    }


def _claims(arms: Any) -> dict[str, dict[str, Any]]:
    found = {
        "C3a": not_worse(
            "decoupled at eta 4 less synchronous",
            "decoupled_4",
            "sync",
            published="0.002 (AIME24, 1.5B)",
        ),
        "C3b": not_worse(
            "decoupled less naive, both at eta 4",
            "decoupled_4",
            "naive_4",
            published="0.189 (AIME24, 1.5B)",
        )
        | {
            "statement": "held-out accuracy, decoupled less naive, both at eta 4",
            "threshold": 0.0,
        },
        "C3c": not_worse(
            "decoupled at eta 4 less decoupled without a bound",
            "decoupled_4",
            "decoupled_inf",
            published="0.053 (AIME24, 1.5B)",
        ),
        "C3d": sooner("decoupled_4", "sync"),
        "C4": {
            "statement": "largest difference of a parameter after all updates, workers "
            "at eta 0 from the synchronous iteration",
            "statistic": "exact",
            "direction": "equal",
            "threshold": 0.0,
            "ours": "loop/parameters_difference",
            "baseline": "sync/parameters_difference",
        },
    }
    for arm in arms:
        found |= reports(arm, apart=arm != "loop")
    return found
