"""Class-conditional flow matching: the base that papers start from.

    python -m experiments.run --config=configs/flow_matching.py:smoke
    python -m experiments.run --config=configs/flow_matching.py:cpu
    python -m experiments.run --config=configs/flow_matching.py:gpu --seeds=0..4
    python -m experiments.run --config=configs/flow_matching.py:paper --dry_run

smoke  8x8 sprites, mechanics only.
cpu    8x8 handwritten digits (pip install 'tmdjax[demo]'), 1.3 M parameters.
gpu    32x32 sprites.
paper  DiT-XL/2 on 32x32x4 latents of 256x256 images: sizes only, unless you register
       a source named 'imagenet_latents'.
"""

from ml_collections import ConfigDict

TIERS = ("smoke", "cpu", "gpu", "paper")

COST = {
    "smoke": "10 s of CPU once compiled",
    "cpu": "4 min a seed on 2 cores",
    "gpu": "meant for an hour on one H100, 5 seeds; not run yet",
    "paper": "sizes only",
}

RANGES = dict.fromkeys(("euler_nfe", "heun_nfe", "midpoint_nfe"), "[1, 10000]")


def get_config(tier: str) -> ConfigDict:
    """The config of a tier."""
    config = ConfigDict()
    config.system = "flow_matching"
    config.data = ConfigDict(
        {
            "name": "digits",
            "options": {},
            "shape": (8, 8, 1),
            "num_classes": 10,
        }
    )
    config.model = ConfigDict(
        {
            "name": "dit",
            "patch_size": 2,
            "hidden": 128,
            "depth": 4,
            "heads": 4,
        }
    )
    config.precision = ConfigDict({"rollout": "fp32", "train": "fp32"})
    config.optimizer = ConfigDict(
        {
            "name": "adamw",
            "learning_rate": 1e-3,
            "schedule": "cosine",
            "warmup_steps": 100,
            "weight_decay": 0.0,
            "clip_norm": 1.0,
        }
    )
    config.train = ConfigDict(
        {
            "steps": 1500,
            "batch_size": 128,
            "microbatches": 1,
            "drop_rate": 0.1,
            "ema_decay": 0.995,
            "log_every": 50,
        }
    )
    config.features = ConfigDict(
        {
            "width": 16,
            "feature_dim": 64,
            "steps": 400,
            "batch_size": 128,
            "learning_rate": 2e-3,
        }
    )
    config.sample = ConfigDict(
        {
            "count": 597,
            "guidance": 1.0,
            "euler_nfe": (2, 4, 8, 16, 50),
            "heun_nfe": (4, 8, 16),
            "midpoint_nfe": (8,),
        }
    )
    config.evaluate = ConfigDict({"projections": 256})
    config.claims = ConfigDict(
        {
            "F1": {
                "statement": "50 Euler steps come closer to held-out images than an "
                "untrained network (sliced Wasserstein)",
                "statistic": "ratio",
                "direction": "less",
                "threshold": 0.5,
                "ours": "euler50.sliced_wasserstein",
                "baseline": "untrained.sliced_wasserstein",
            },
            "F2": {
                "statement": "... and in the Frechet distance of the named net",
                "statistic": "ratio",
                "direction": "less",
                "threshold": 0.1,
                "ours": "euler50.frechet",
                "baseline": "untrained.frechet",
            },
            "F3": {
                "statement": "samples show the class that was asked for (fraction)",
                "statistic": "difference",
                "direction": "greater",
                "threshold": 0.8,
                "ours": "euler50.label_agreement",
            },
            "F4": {
                "statement": "at 8 NFE Heun beats Euler in Frechet distance",
                "statistic": "ratio",
                "direction": "less",
                "threshold": 1.0,
                "ours": "heun8.frechet",
                "baseline": "euler8.frechet",
            },
        }
    )
    if tier == "smoke":
        config.data.update(
            name="sprites",
            options={"size": 8, "train_count": 512, "test_count": 128},
            shape=(8, 8, 3),
            num_classes=8,
        )
        config.model.update(hidden=32, depth=2, heads=2)
        config.train.update(steps=60, batch_size=32, log_every=10)
        config.optimizer.warmup_steps = 10
        config.features.update(steps=40, batch_size=32, width=8, feature_dim=16)
        config.sample.update(
            count=64, euler_nfe=(2, 4), heun_nfe=(4,), midpoint_nfe=(4,)
        )
        config.claims = ConfigDict()
    elif tier == "gpu":
        config.data.update(
            name="sprites",
            options={"size": 32, "train_count": 20_000, "test_count": 2_000},
            shape=(32, 32, 3),
            num_classes=8,
        )
        config.model.update(patch_size=4, hidden=256, depth=12, heads=8)
        config.precision.update(rollout="bf16", train="bf16")
        config.train.update(
            steps=20_000, batch_size=256, ema_decay=0.9995, log_every=500
        )
        config.optimizer.update(learning_rate=5e-4, warmup_steps=1000)
        config.features.update(steps=2000, width=32, feature_dim=128)
        config.sample.count = 2000
    elif tier == "paper":
        config.data.update(name="imagenet_latents", shape=(32, 32, 4), num_classes=1000)
        config.model.update(patch_size=2, hidden=1152, depth=28, heads=16)
        config.precision.update(rollout="bf16", train="bf16")
        config.train.update(
            steps=7_000_000, batch_size=256, ema_decay=0.9999, log_every=1000
        )
        config.optimizer.update(learning_rate=1e-4, schedule="constant", warmup_steps=0)
        config.sample.update(count=10_000, guidance=1.5)
        config.claims = ConfigDict()
    return config
