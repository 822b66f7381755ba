"""Jet-RL: one precision flow for rollout and training, beside flows that differ.

    python -m experiments.run --config=configs/jet_rl.py:smoke
    python -m experiments.run --config=configs/jet_rl.py:cpu --seeds=1..5
    python -m experiments.run --config=configs/jet_rl.py:gpu --seeds=0..4
    python -m experiments.run --config=configs/jet_rl.py:paper --dry_run

All arms start from one policy, supervised in float32. Stage 'mismatch' compares,
without training, the log-probs that rollout and training give to the same tokens, once
as the policy is and once under stress (values of the attention with channels of 32
times another, which the next product subtracts again). Reinforcement learning is under
stress.

Products give float32 in all arms that are trained, and activations are carried in it:
results rounded to bfloat16, as kernels round them, differ between two programs, and put
a floor under the mismatch of every arm, which in 8 bits is not low. Two arms have
bfloat16 results; these, and one scale a tensor, are compared and not trained. The head
is float32 in every arm. On a CPU 8-bit products are emulated: the same numbers, no
speed.

All seeds start from one supervised policy, and an arm is judged under the recipe of its
rollouts. In GRPO's cpu tier, judged by as many responses, accuracies after training had
a standard deviation of 0.023 over seeds (0.014 before it: that of judging), so that
five seeds tell arms apart that differ by some 0.04. Hence the margin of C2a, "not
worse", 0.05: far less than an FP8 rollout alone lost in the paper, and more than what
is contested of the unified flow, which five seeds of this size cannot decide.

smoke  an almost untrained decoder: mechanics only.
cpu    0.4 M parameters, all widths multiples of 128: 25 iterations of 16 prompts x 8
       responses. Seed 0 does not count: it was tried.
gpu    4.3 M parameters, responses of up to 130 tokens; 100 iterations.
paper  the sizes of Qwen2.5-7B, responses of up to 8192 tokens. Group size, prompts and
       learning rate of the published runs are not known; GRPO's defaults stand in.

The cpu and gpu tiers have not been run yet.

    --config.arms= --config.precision.rollout=fp8_rowwise     and other pairs of recipes
    --config.stress.channels=0                                without stress
    --config.arms.calibrated.method.calibrate_every=20
    --config.arms.unified_tensor.rl.iterations=25             trained too
    --config.rl.iterations=0 --config.claims=C1a,C1b,C3a      none is trained
"""

import itertools
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs.grpo import RANGES as GRPO_RANGES
from configs.grpo import base

EXPERIMENT = "grpo"
TIERS = ("smoke", "cpu", "gpu", "paper")

COST = {
    "smoke": "20 s of CPU once compiled",
    "cpu": "by the pace of 5 iterations 55 min on 2 cores, 5 seeds; not run yet",
    "gpu": "meant for an hour on one H100, 5 seeds; not run yet",
    "paper": "sizes only",
}
RANGES = GRPO_RANGES | {
    "rl.iterations": "[0, 1000000000]",  # 0: compared and not trained
    "stress.channels": "[0, 1000]",
    "stress.factor": "[-1000000, 1000000]",
}

ARMS = {
    "bf16": ("bf16", "bf16"),
    "fp8_rollout": ("fp8_rollout_only", "bf16"),
    "truncated": ("fp8_rollout_only", "bf16"),
    "unified": ("fp8_block", "fp8_block"),
    "unified_tensor": ("fp8_tensor", "fp8_tensor"),
    "calibrated": ("fp8_block", "fp8_block"),
}
"""Recipes of rollout and training by arm; the method is the preset of that name."""
OUT_FP32 = {
    "bf16": "bf16_out_fp32",
    "fp8_rollout_only": "fp8_block_out_fp32",
    "fp8_block": "fp8_block_out_fp32",
    "fp8_tensor": "fp8_tensor_out_fp32",
}
"""The recipes whose products read the same numbers and give float32."""
AS_KERNELS = {f"{name}_bf16_results": name for name in ("fp8_rollout", "unified")}
"""Arms with bfloat16 results, and which they are with float32 ones."""
COMPARED = ("unified_tensor", *AS_KERNELS)
"""Arms that are compared before training, and not trained."""
SIZES = {
    "cpu": {"num_kv_heads": 4},
    "gpu": {"num_kv_heads": 4},
    "paper": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_layers": 28,
        "num_heads": 28,
        "num_kv_heads": 4,
        "tied_embedding": False,
    },
}
"""What differs from GRPO's models: widths that are multiples of 128."""


def get_config(tier: str) -> ConfigDict:
    """The config of a tier."""
    small = tier == "smoke"
    config: Any = ConfigDict()
    config.system = "jet_rl"
    base(config, tier)
    config.model.update(SIZES.get(tier, {}))
    config.model.head_recipe = "fp32"
    config.sft.recipe = "fp32"
    config.rl.update(
        {
            "iterations": {"smoke": 3, "cpu": 25}.get(tier, 100),
            "minibatches": {"smoke": 2, "paper": 2}.get(tier, 4),
            "warmup": 0 if small else 10,
        }
    )
    if tier == "paper":
        config.rl.update({"max_new_tokens": 8192, "length": 10240})
    config.stress = ConfigDict({"channels": 1, "factor": 32.0})
    config.mismatch = ConfigDict({"problems": 8 if small else 128, "samples": 2})
    config.method = ConfigDict({"name": "jet_rl:unified"})
    every = {"smoke": 1, "cpu": 5}.get(tier, 20)
    usual = {} if tier == "paper" else OUT_FP32

    def precision(name: str, recipes: Mapping[str, str]) -> dict[str, str]:
        rollout, train = (recipes.get(recipe, recipe) for recipe in ARMS[name])
        return {"rollout": rollout, "train": train}

    def arm(name: str, recipes: Mapping[str, str] = usual) -> dict[str, Any]:
        found: dict[str, Any] = {"method": {"name": f"jet_rl:{name}"}}
        if name == "calibrated":
            found["method"]["calibrate_every"] = every
        own = precision(name, recipes)
        return found | ({} if own == config.precision.to_dict() else {"precision": own})

    config.precision = ConfigDict(precision("unified", usual))

    arms = {name: arm(name) for name in ARMS}
    if small:
        arms = {name: arms[name] for name in ("fp8_rollout", "calibrated")}
    elif tier != "paper":
        arms |= {name: arm(own, {}) for name, own in AS_KERNELS.items()}
        for name in COMPARED:
            arms[name]["rl"] = {"iterations": 0}
    config.arms = ConfigDict(arms)
    config.claims = ConfigDict(_claims() if tier in ("cpu", "gpu") else {})
    return config


def _claims() -> dict[str, dict[str, Any]]:
    claims: dict[str, dict[str, Any]] = {}
    results = (("", "", "float32"), ("k", "_bf16_results", "bfloat16"))
    for (mark, arms, dtype), when, (name, label, what) in itertools.product(
        results,
        ("stress", "plain"),
        (
            ("C1a", "KL(rollout || training), nats a token", "mismatch_kl"),
            ("C1b", "largest |d log-prob|", "mismatch_max"),
        ),
    ):
        claims[name + mark + "p" * (when == "plain")] = {
            "statement": f"{label}, {when}, results of products in {dtype}: unified "
            f"over FP8 rollout alone",
            "statistic": "ratio",
            "direction": "less",
            "threshold": 1 / 3,
            "ours": f"unified{arms}/{what}_{when}",
            "baseline": f"fp8_rollout{arms}/{what}_{when}",
        }
    claims["C1c"] = {
        "statement": "|d log-prob| in the last third of a response over that in the "
        "first, FP8 rollout alone, plain",
        "statistic": "difference",
        "direction": "greater",
        "threshold": 1.0,
        "ours": "fp8_rollout/mismatch_growth_plain",
    }

    def reward(statement: str, ours: str, baseline: str, margin: float = 0.0) -> dict:
        return {
            "statement": f"held-out accuracy after training under stress, {statement}",
            "statistic": "difference",
            "direction": "greater",
            "threshold": -margin,
            "ours": f"{ours}/accuracy_after",
            "baseline": f"{baseline}/accuracy_after",
        }

    claims["C2a"] = reward("unified less BF16", "unified", "bf16", 0.05) | {
        "published": "-0.010 (MATH, 7B)"
    }
    claims["C2b"] = reward("unified less FP8 rollout alone", "unified", "fp8_rollout")
    claims["C2c"] = reward(
        "truncated weights less FP8 rollout alone", "truncated", "fp8_rollout"
    )
    claims["C2d"] = reward("unified less truncated weights", "unified", "truncated")
    claims["C2e"] = reward(
        "unified with calibrated clipping less without", "calibrated", "unified"
    ) | {"published": "0.045 (8B)"}
    for name, arm in (("C3a", "bf16"), ("C3b", "unified")):
        claims[name] = {
            "statement": f"share of tokens that the first minibatch would clip, {arm}",
            "statistic": "exact",
            "direction": "equal",
            "threshold": 0.0,
            "ours": f"{arm}/mismatch_clipped_plain",
        }
    claims["C3c"] = {
        "statement": "share of tokens that the first minibatch would clip, FP8 rollout "
        "alone",
        "statistic": "difference",
        "direction": "greater",
        "threshold": 0.0,
        "ours": "fp8_rollout/mismatch_clipped_plain",
    }
    claims["r_publish"] = {
        "statement": "C4: seconds to publish weights over those to quantise kernels",
        "statistic": "report",
        "ours": "unified/publish_ratio",
    }
    for arm in (*ARMS, *AS_KERNELS):
        names = ["mismatch_kl_plain", "mismatch_kl_stress", "mismatch_clipped_stress"]
        names += ["mismatch_length_plain", "mismatch_growth_stress"]
        if arm not in COMPARED:
            names += ["accuracy_before", "accuracy_after", "score_last"]
        for what in names:
            claims[f"r_{arm}_{what}"] = {
                "statement": f"{what.replace('_', ' ')}, {arm}",
                "statistic": "report",
                "ours": f"{arm}/{what}",
            }
    for what in ("clip_low", "clip_high"):
        claims[f"r_{what}"] = {
            "statement": f"calibrated {what.replace('_', ' ')}, after training",
            "statistic": "report",
            "ours": f"calibrated/{what}",
        }
    return claims
