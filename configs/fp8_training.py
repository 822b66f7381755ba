"""Supervised training in 8 bits beside bfloat16: a DiT and a decoder.

    python -m experiments.run --config=configs/fp8_training.py:smoke
    python -m experiments.run --config=configs/fp8_training.py:cpu --seeds=0..2
    python -m experiments.run --config=configs/fp8_training.py:gpu --seeds=0..4

Attention and MLPs of the 8-bit arms multiply float8 numbers, forward and backward; what
lies between two products, and every other layer, is bfloat16 in all arms. On a CPU the
8-bit numbers are multiplied in float32 (emulated): this is about quality, not speed.

smoke  8x8 sprites and sums of few digits, mechanics only.
cpu    the digits of configs/flow_matching.py, a third of its updates (500) at half its
       batch (64), 1.3 M parameters; chain-sum as in configs/grpo.py, 500 updates of 32,
       0.4 M parameters. Three seeds; no claim compares the row-wise arms, which run
       under the first alone.
gpu    32x32 sprites, 12 blocks of 256; chain-sum of up to 40 digits, 4.3 M parameters.

The cpu and gpu tiers have not been run yet.
"""

from typing import Any

from ml_collections import ConfigDict

from configs import flow_matching, grpo
from configs.flow_matching import RANGES as RANGES

TIERS = ("smoke", "cpu", "gpu")

COST = {
    "smoke": "80 s of CPU, most of it compilation",
    "cpu": "meant for 20 min on 2 idle cores, 3 seeds; not run yet",
    "gpu": "meant for an hour on one H100, 5 seeds; not run yet",
}

KEPT = 0.95
"""Of the gain of bf16: 'not worse' is at most 5 % of the gain over the start."""


def get_config(tier: str) -> ConfigDict:
    """The config of a tier."""
    config: Any = flow_matching.get_config(tier)
    config.system = "fp8_training"
    config.task = ConfigDict({"name": "images"})
    config.precision.update(rollout="bf16", train="bf16")
    config.sample.update(heun_nfe=(), midpoint_nfe=())
    config.evaluate.update(draws=8, texts=512)
    large = tier == "gpu"
    config.texts = ConfigDict(
        {"pairs": 40_000 if large else 20_000, "length": 160 if large else 48}
    )
    decoder: dict[str, Any] = {
        "task": {"name": "chain_sum", "high": {"smoke": 5, "cpu": 8}.get(tier, 40)},
        "model": {
            "name": "decoder",
            **grpo.MODELS[tier],
            **grpo.HEADS[tier],
            "tied_embedding": True,
            "remat": large,
        },
        "train": {"batch_size": 128 if large else 32},
    }
    if tier == "smoke":
        config.train.update(steps=20, batch_size=16, log_every=5)
        config.sample.euler_nfe = (2,)
        config.evaluate.update(draws=1, texts=64)
        config.texts.pairs = 256
        decoder["train"] = {"batch_size": 16}
    elif tier == "cpu":
        config.model.remat = False
        config.train.update(steps=500, batch_size=64)
        config.sample.euler_nfe = (20,)
        config.one_seed_arms = ("dit_fp8_rowwise", "decoder_fp8_rowwise")
    else:
        config.sample.euler_nfe = (50,)
        config.train.steps = 3000
        config.optimizer.warmup_steps = 300
    recipes = ("bf16", "fp8_block") + ("fp8_rowwise",) * (tier != "smoke")
    arms: dict[str, Any] = {}
    for network, own in (("dit", {}), ("decoder", decoder)):
        for recipe in recipes:
            both = {"precision": {"rollout": recipe, "train": recipe}}
            arms[f"{network}_{recipe}"] = own | (both if recipe != "bf16" else {})
    config.arms = ConfigDict(arms)
    config.claims = ConfigDict(_claims(tier) if tier != "smoke" else {})
    return config


def _claims(tier: str) -> dict[str, dict[str, Any]]:
    recipes = ["fp8_block"] + ["fp8_rowwise"] * (tier == "gpu")
    gains = {
        "dit": {"gain": "held-out loss", "log_frechet_gain": "log Frechet distance"},
        "decoder": {"gain": "held-out loss", "accuracy": "held-out accuracy"},
    }
    claims: dict[str, dict[str, Any]] = {}
    for recipe in recipes:
        for network, measures in gains.items():
            for what, title in measures.items():
                claims[f"{network}_{what}_{recipe}"] = {
                    "statement": f"{network}: what training gains in {title}, {recipe} "
                    f"over bf16 (not worse: at least {KEPT})",
                    "statistic": "ratio",
                    "direction": "greater",
                    "threshold": KEPT,
                    "ours": f"{network}_{recipe}/{what}",
                    "baseline": f"{network}_bf16/{what}",
                }
    for network, measures in gains.items():
        if tier == "cpu":
            for what, title in measures.items():
                claims[f"r_{network}_{what}_fp8_rowwise"] = {
                    "statement": f"{network}: what training gains in {title}, "
                    f"fp8_rowwise (one seed)",
                    "statistic": "report",
                    "ours": f"{network}_fp8_rowwise/{what}",
                    "baseline": f"{network}_bf16/{what}",
                }
    return claims
