"""APRIL: rounds that ask for more than they train on, and go on with what is left.

    python -m experiments.run --config=configs/april.py:smoke
    python -m experiments.run --config=configs/april.py:cpu --seeds=0..4
    python -m experiments.run --config=configs/april.py:gpu --seeds=0..4
    python -m experiments.run --config=configs/april.py:paper --dry_run

All arms start from AReaL's supervised policy (configs/areal.py) and make as many
updates by as many responses. A round ends once N groups are complete; '4n' arms ask for
4 N, and what is unfinished then is resumed under the next weights, or thrown away
('discard'). An arm is named after what its older tokens mean: 'ignore' takes them for
tokens of now, as the paper's code does; 'mask', 'truncate' and 'decoupled' do not.

The clock is AReaL's, virtual, its costs chosen and not measured. A generator has as
many slots as N groups have responses, and begins no group that it has no slot for: how
throughput follows from 2 N and 4 N is told by configs/scheduling.py, not here. Scores
of rollouts do not compare arms, since the first groups to be complete have short
responses; held-out problems do, tried every fifth update.

The margin of "not worse" is that of configs/areal.py, for the reasons given there. No
size has been tried out.

smoke  an almost untrained decoder: mechanics only; and APRIL under XRPO's allocation
       with rollouts and training in fp8_block.
cpu    0.1 M parameters, sums of 4 to 14 digits; N of 16 groups x 8 responses, 60
       updates. No claim compares mask, truncate, DAPO, GSPO and 2 N: they run under the
       first seed alone.
gpu    3.9 M parameters, sums of 3 to 40 digits; N of 32 groups x 8, 100 updates.
paper  the sizes of Qwen2.5-1.5B; N of 32 groups x 8, responses of up to 16384 tokens.

The cpu and gpu tiers have not been run yet.

    --config.arms.april_4n_ignore.schedule.max_resume=1   no response of three versions
    --config.arms.april_4n_ignore.method.name=grpo:rloo   another objective
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs.areal import RANGES as AREAL_RANGES
from configs.areal import base, not_worse, reports, sooner

EXPERIMENT = "asynchronous_rl"
TIERS = ("smoke", "cpu", "gpu", "paper")

COST = {
    "smoke": "30 s of CPU",
    "cpu": "estimated: 30 min on 2 cores, 5 seeds; not run yet",
    "gpu": "meant for an hour on one H100, 5 seeds; not run yet",
    "paper": "sizes only",
}
RANGES = AREAL_RANGES | {
    "schedule.max_resume": "[0, 1000000] or none",
    "schedule.most_samples": "[1, 1000000] or none",
}
LEARNING_RATE = {"smoke": 3e-4, "paper": 1e-6}


def get_config(tier: str) -> ConfigDict:
    """The config of a tier."""
    config: Any = ConfigDict()
    config.system = "april"
    base(config, tier)
    config.rl.learning_rate = LEARNING_RATE.get(tier, 2e-4)
    if tier == "paper":
        sizes = {"prompts": 32, "max_new_tokens": 16384, "length": 18432}
        config.rl.update(sizes | {"slots": 256, "microbatch": 16})
    config.method = ConfigDict({"name": "grpo"})
    n = config.rl.prompts
    config.schedule = ConfigDict(
        {
            "name": "april",
            "over_provisioned": n,
            "off_policy": "ignore",
            "recycle": True,
            "max_resume": placeholder(int),  # None: no bound
            "rounds": 1,  # of an objective that plans how many responses prompts get
            "most_samples": placeholder(int),  # of a prompt in one; None: rl.samples
        }
    )

    def arm(rule: str, times: int = 4, **groups: Any) -> dict[str, Any]:
        own = {"over_provisioned": times * n, "off_policy": rule}
        return {"schedule": own | groups.pop("schedule", {})} | groups

    arms: dict[str, Any] = {
        "sync": arm("ignore", 1),
        "april_4n_ignore": arm("ignore"),
        "april_4n_decoupled": arm("decoupled"),
        "discard_4n": arm("ignore", schedule={"recycle": False}),
        "april_4n_mask": arm("mask"),
        "april_4n_truncate": arm("truncate"),
        "april_4n_dapo": arm(
            "ignore", method={"name": "grpo:dapo"}, rl={"dynamic_sampling": True}
        ),
        "april_4n_gspo": arm("ignore", method={"name": "grpo:gspo"}),
        "april_2n_ignore": arm("ignore", 2),
    }
    if tier == "smoke":
        planned = {"name": "xrpo", "rounds": 2, "first_samples": 2, "examples": 0}
        arms = {
            "april_4n_decoupled": arms["april_4n_decoupled"],
            "xrpo_fp8_block": arm(
                "decoupled",
                schedule={"rounds": 2, "most_samples": 4 * config.rl.samples},
                method=planned,
                precision={"rollout": "fp8_block", "train": "fp8_block"},
            ),
        }
    else:
        config.one_seed_arms = tuple(arms)[4:]
    config.arms = ConfigDict(arms)
    longest = {"cpu": "T3"}.get(tier, "T4")
    config.claims = ConfigDict(_claims(arms, longest) if tier in ("cpu", "gpu") else {})
    return config


def _claims(arms: Any, longest: str) -> dict[str, dict[str, Any]]:
    def less(statement: str, what: str) -> dict[str, Any]:
        return {
            "statement": f"{statement}, rounds that discard less those that resume",
            "statistic": "difference",
            "direction": "less",
            "threshold": 0.0,
            "ours": f"discard_4n/{what}",
            "baseline": f"april_4n_ignore/{what}",
        }

    found = {
        "C2a": not_worse(
            "APRIL at 4 N less synchronous, as many updates",
            "april_4n_ignore",
            "sync",
            published="0.021 in the mean, up to 0.08",
        ),
        "C2b": sooner("april_4n_ignore", "sync"),
        "C3a": less("tokens of a response that is trained on", "length_trained"),
        "C3b": less(
            "held-out accuracy on the longest problems", f"accuracy_{longest}_after"
        ),
        "C5": not_worse(
            "decoupled less ignore, both at 4 N",
            "april_4n_decoupled",
            "april_4n_ignore",
        ),
    }
    for arm in arms:
        found |= reports(arm)
        found |= {
            f"r_{arm}_length_trained": {
                "statement": f"tokens of a response that is trained on, {arm}",
                "statistic": "report",
                "ours": f"{arm}/length_trained",
            }
        }
    return found
