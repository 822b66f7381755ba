"""TMD: transition matching distillation of a text-to-video model, beside its baselines.

    python -m experiments.run --config=configs/tmd.py:smoke
    python -m experiments.run --config=configs/tmd.py:cpu --seeds=0..4
    python -m experiments.run --config=configs/tmd.py:gpu --seeds=0..4
    python -m experiments.run --config=configs/tmd.py:paper --dry_run

smoke  4 x 6 x 6 videos, judged by their exact flow: mechanics.
cpu    the same videos, a trained teacher: do students of two steps beat it at two?
gpu    16 x 32 x 32 videos, 12 blocks: the claims C1 to C7 and the ablations.
paper  Wan 2.1 of 1.3 B: sizes and what a device needs.
"""

from ml_collections import ConfigDict

TIERS = ("smoke", "cpu", "gpu", "paper")

COST = {
    "smoke": "30 s on 2 cores",
    "cpu": "25 min on 2 cores, 5 seeds",
    "gpu": "meant for 8 min a shard on one H100; not measured yet",
    "paper": "sizes only",
}


def get_config(tier: str) -> ConfigDict:
    """The config of a tier."""
    config = ConfigDict()
    config.system = "tmd"
    config.data = ConfigDict(
        {"scale": "tiny", "levels": 5, "train_count": 4096, "test_count": 512}
    )
    config.model = ConfigDict(
        {
            "patch_size": (2, 2, 2),
            "heads": 4,
            "head_dim": 16,
            "depth": 6,
            "mlp_width": 192,
            "frequency_dim": 64,
            "recipe": "fp32",
            "remat": False,
        }
    )
    config.teacher = ConfigDict(
        {
            "exact": False,
            "steps": 2500,
            "batch_size": 64,
            "learning_rate": 3e-3,
            "drop_rate": 0.1,
            "time_mean": 0.4,
            "ema_decay": 0.998,
            "sample_shift": 3.0,
            "log_every": 100,
        }
    )
    config.student = ConfigDict(
        {
            "kind": "tmd",
            "outer": 2,
            "inner": 2,
            "head_blocks": 1,
            "fusion": "gated",
            "initial_gate": 0.0,
            "average": "y1",
            "outer_shift": 10.0,
            "inner_shift": 10.0,
            "rollout": True,
            "warm_up": False,
        }
    )
    config.pretrain = ConfigDict(
        {
            "steps": 400,
            "batch_size": 64,
            "learning_rate": 1e-3,
            "ema_decay": 0.99,
            "map_rate": 0.25,
            "guidance": 1.0,
            "drop_rate": 0.1,
            "shift": 3.0,
            "derivative": "jvp",
            "loss_constant": 1.0,
            "log_every": 50,
        }
    )
    config.distill = ConfigDict(
        {
            "cycles": 200,
            "batch_size": 32,
            "learning_rate": 3e-4,
            "critic_learning_rate": 3e-4,
            "ema_decay": 0.98,
            "guidance": 1.0,
            "critic_updates": 4,
            "shift": 5.0,
            "normalisation": "distance",
            "adversarial_weight": 0.0,
            "features": "teacher",
            "discriminator_width": 16,
            "log_every": 20,
        }
    )
    config.pairs = ConfigDict(
        {
            "count": 2048,
            "teacher_steps": 50,
            "steps": 400,
            "batch_size": 64,
            "learning_rate": 1e-3,
            "ema_decay": 0.99,
            "log_every": 50,
        }
    )
    config.sample = ConfigDict(
        {"count": 512, "teacher_steps": (50, 2, 1), "projections": 128}
    )
    config.arms = ConfigDict(
        {
            "teacher": {"kind": "teacher"},
            "tmd": {"kind": "tmd"},
            "tmd_one": {"kind": "tmd", "outer": 1},
            "dmd2": {"kind": "dmd2"},
            "dmd2_one": {"kind": "dmd2", "outer": 1},
        }
    )
    config.claims = ConfigDict()
    if tier == "smoke":
        config.arms = ConfigDict(
            {name: config.arms[name] for name in ("teacher", "tmd", "dmd2")}
        )
        config.model.update(head_dim=8, depth=3, mlp_width=48)
        config.data.update(train_count=512, test_count=128)
        config.teacher.update(
            exact=True, steps=40, batch_size=16, ema_decay=0.9, log_every=20
        )
        config.pretrain.update(steps=20, batch_size=16, log_every=10)
        config.distill.update(
            cycles=8, batch_size=8, guidance=2.0, adversarial_weight=0.03, log_every=4
        )
        config.distill.features = "critic"  # the exact flow has none
        config.distill.discriminator_width = 4
        config.sample.update(count=120, teacher_steps=(8, 2), projections=16)
    return config
