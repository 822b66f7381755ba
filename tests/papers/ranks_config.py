"""Ranks on sums."""

from ml_collections import ConfigDict

EXPERIMENT = "ranks_experiment"
TIERS = ("smoke",)


def get_config(tier):
    """The config of a tier."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_layers": 1}
    heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    sft = {"pairs": 16, "length": 48, "batch": 8, "steps": 2, "learning_rate": 1e-3}
    rl = {"iterations": 2, "prompts": 2, "samples": 2, "max_new_tokens": 8}
    rl |= {"length": 24, "slots": 4, "chunk": 8, "microbatch": 4}
    return ConfigDict(
        {
            "system": "ranks",
            "task": {"name": "chain_sum", "high": 5},
            "model": {"name": "decoder", **sizes, **heads},
            "method": {"name": "ranks"},
            "precision": {"rollout": "fp32", "train": "fp32"},
            "sft": {**sft, "look_every": 2, "problems": 4, "gate": 0.5},
            "rl": {**rl, "learning_rate": 1e-3},
            "judge": {"problems": 4, "samples": 2},
        }
    )
