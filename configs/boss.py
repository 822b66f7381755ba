"""BOSS: Bellman-optimal step sizes for a flow model, then straightening.

    python -m experiments.run --config=configs/boss.py:smoke
    python -m experiments.run --config=configs/boss.py:cpu               (make demo)
    python -m experiments.run --config=configs/boss.py:gpu --seeds=0..4
    python -m experiments.run --config=configs/boss.py:paper --dry_run

smoke  a Gaussian mixture whose velocity is known exactly; a small network learns
       corrections to it.
cpu    8x8 handwritten digits (pip install 'tmdjax[demo]'), the DiT of
       configs/flow_matching.py:cpu, whose training it shares.
gpu    two arms, U-Nets of 7 M parameters: Fashion-MNIST (Debian package
       dataset-fashion-mnist) and sparse sprites, whose flow is strongly curved.
paper  the network and settings of CelebA-HQ 256; sizes only, unless TFDS has prepared
       celeb_a_hq/256 on your disk (pip install 'tmdjax[tfds]').
"""

from typing import Any

from ml_collections import ConfigDict

from configs import flow_matching

TIERS = ("smoke", "cpu", "gpu", "paper")

COST = {
    "smoke": "12 s of CPU once compiled",
    "cpu": "7 min a seed on 2 cores",
    "gpu": "meant for an hour on one H100, 5 seeds; not run yet",
    "paper": "sizes only",
}

RANGES = {
    **flow_matching.RANGES,
    "search.budgets": "[1, 10000]",
    "search.knots": "[1, 10000]",
}


def get_config(tier: str) -> ConfigDict:
    """The config of a tier."""
    config: Any = flow_matching.get_config("cpu")
    config.system = "boss"
    config.arms = ConfigDict()
    # Step-size search: one cost matrix, all budgets.
    config.search = ConfigDict(
        {
            "samples": 100,
            "knots": 100,
            "budgets": (2, 4, 6, 8),
            "future_weight": 1.0,
            "memory_limit_gb": 4.0,
        }
    )
    # Straightening and its baselines, all with the same steps and batch.
    config.fine_tune = ConfigDict(
        {
            "noises": 512,
            "eval_fraction": 0.1,
            "weight": "unit",
            "lora_rank": 0,
            "steps": 125,
            "batch_size": 64,
            "learning_rate": 5e-4,
            "warmup_steps": 20,
            "ema_half_life": 0.05,
            "log_every": 25,
        }
    )
    config.sample = ConfigDict({"count": 597, "guidance": 1.0})
    config.claims = claims("")
    if tier == "smoke":
        config.data.update(name="mixture", shape=(2,), num_classes=4)
        config.data.options = ConfigDict({"train_count": 2048, "test_count": 1024})
        config.model = ConfigDict({"name": "mlp", "hidden": 64, "depth": 2})
        config.search.update(samples=100, budgets=(2, 4))
        config.fine_tune.update(noises=512, steps=100, log_every=20)
        config.sample.count = 512
        config.claims = ConfigDict()
    elif tier == "gpu":
        config.arms = ConfigDict(
            {
                "fashion": {
                    "data": {
                        "name": "fashion_mnist",
                        "options": {},
                        "shape": (28, 28, 1),
                        "num_classes": 10,
                    }
                },
                "sprites": {
                    "data": {
                        "name": "sparse_sprites",
                        "options": {
                            "size": 32,
                            "train_count": 40_000,
                            "test_count": 5_000,
                        },
                        "shape": (32, 32, 3),
                        "num_classes": 8,
                    }
                },
            }
        )
        config.model = ConfigDict({"name": "unet", "width": 64, "blocks": 2})
        config.precision.update(rollout="bf16", train="bf16")
        config.train.update(steps=8000, batch_size=256, ema_decay=0.999, log_every=500)
        config.optimizer.update(learning_rate=3e-4, warmup_steps=500)
        config.features.update(steps=2000, width=32, feature_dim=128)
        config.fine_tune.update(
            noises=2000,
            steps=1000,
            batch_size=128,
            learning_rate=2e-4,
            warmup_steps=250,
            log_every=200,
        )
        config.sample.count = 2000
        config.claims = ConfigDict({**claims("fashion"), **claims("sprites")})
    elif tier == "paper":
        config.data.update(name="celeb_a_hq", shape=(256, 256, 3), num_classes=1)
        config.data.options = ConfigDict(
            {"test_count": 10_000, "memory_limit_gb": 32.0}
        )
        config.model = ConfigDict(
            {
                "name": "unet",
                "width": 128,
                "multipliers": (1, 1, 2, 2, 2, 2, 2),
                "attention_levels": (4,),
                "blocks": 2,
                "heads": 4,
            }
        )
        config.precision.update(rollout="bf16", train="bf16")
        config.train.update(steps=1_000_000, batch_size=64, ema_decay=0.999)
        config.search.memory_limit_gb = 2.0
        config.fine_tune.update(
            noises=5000,
            steps=12_000,
            batch_size=15,
            learning_rate=2e-4,
            warmup_steps=5000,
        )
        config.sample.count = 10_000
        config.claims = ConfigDict()
    return config


def claims(arm: str) -> ConfigDict:
    """O1 to O5 of the paper's comparison, for one arm ('' is the only one)."""
    where, mark = (f"{arm}/", f"-{arm}") if arm else ("", "")
    found = {
        f"O1{mark}": {
            "statement": "the Bellman grid's objective is at most the uniform one's, "
            "for every budget (how many budgets break this)",
            "statistic": "exact",
            "direction": "equal",
            "threshold": 0.0,
            "ours": f"{where}search.uniform_cheaper",
        }
    }
    for letter, budget, published in (
        ("a", 4, "158.95 / 92.03"),
        ("b", 6, "127.01 / 72.54"),
        ("c", 8, "109.42 / 49.80"),
    ):
        found[f"O2{letter}{mark}"] = {
            "statement": f"Bellman against uniform at {budget} NFE, terminal error",
            "published": f"FID uniform / Bellman {published} (CelebA-HQ 256)",
            "statistic": "ratio",
            "direction": "less",
            "threshold": 1.0,
            "ours": f"{where}bellman{budget}.terminal_error",
            "baseline": f"{where}uniform{budget}.terminal_error",
        }
    found |= {
        f"O3a{mark}": {
            "statement": "straightened against Distill-6 at 6 NFE, Frechet distance",
            "published": "FID 18.67 / 34.56 (CelebA-HQ 256), 4.80 / 4.35 (CIFAR-10)",
            "statistic": "ratio",
            "direction": "less",
            "threshold": 1.0,
            "ours": f"{where}straightened6.frechet",
            "baseline": f"{where}distilled6.frechet",
        },
        f"O3b{mark}": {
            "statement": "straightened against untuned Bellman at 6 NFE, Frechet "
            "distance",
            "published": "FID 18.67 / 72.54 (CelebA-HQ 256)",
            "statistic": "ratio",
            "direction": "less",
            "threshold": 1.0,
            "ours": f"{where}straightened6.frechet",
            "baseline": f"{where}bellman6.frechet",
        },
        f"O4a{mark}": {
            "statement": "straightening lowers the objective on the model's own new "
            "trajectories, 6 steps, by 5 times",
            "statistic": "ratio",
            "direction": "less",
            "threshold": 0.2,
            "ours": f"{where}straightened6.objective",
            "baseline": f"{where}bellman6.objective",
        },
        f"O4b{mark}": {
            "statement": "... and the terminal error to the teacher's fine samples",
            "statistic": "ratio",
            "direction": "less",
            "threshold": 1.0,
            "ours": f"{where}straightened6.terminal_error",
            "baseline": f"{where}bellman6.terminal_error",
        },
        f"O4c{mark}": {
            "statement": "the objective with the straightened velocity on the "
            "teacher's new trajectories, 6 steps, as a fraction of the teacher's",
            "statistic": "report",
            "ours": f"{where}straightened6.chord_error_ratio",
        },
        f"O5{mark}": {
            "statement": "a grid of another model, here of a Gaussian with the data's "
            "covariance, at 6 steps: 0 is as good as the model's own, 1 as uniform",
            "published": "another data set's grid lies in between (table 6)",
            "statistic": "report",
            "ours": f"{where}gaussian6.position",
        },
    }
    return ConfigDict(found)
