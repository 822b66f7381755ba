"""Claims about time: schedules of generation and training, on a virtual clock.

    python -m experiments.run --config=configs/scheduling.py:smoke
    python -m experiments.run --config=configs/scheduling.py:cpu --seeds=0..4
    python -m experiments.run --config=configs/scheduling.py:gpu --seeds=0..4
    python -m experiments.run --config=configs/scheduling.py:paper --dry_run

Nothing is learned: responses have lengths, and work takes what a small decoder was
measured to take where this runs. Every arm is a schedule on equally many devices. Those
that take turns (synchronous, APRIL) generate and train on all of them; the others
(AReaL) train on ``devices.train`` and generate on the rest, 3 to 1.

An arm runs through cases. 'constant' to 'heavy': all lengths equal, and log-normal ones
of equal mean before they are cut, of growing tails. 'constant_unread': what is resumed
is read again for nothing. 'middle_fixed' and 'middle_busy': a step of decoding takes
the same however few slots have a text, or goes with the texts alone; published gains
are to lie between the two. In all of these generating takes three quarters of a
synchronous update of equal lengths, so that 3 to 1 keeps both roles busy;
'heavy_measured' has what training was measured to take in place of that.

smoke  8 devices, a decoder that is measured but whose costs are not used: those of the
       config are, so that every machine finds the same.
cpu    8 devices; costs of a decoder of 0.4 M parameters on this machine. The arms
       'sync_64' and so on are the same schedules on 64 to 1,024 devices, one seed.
       Run --stage=calibrate first, on an idle machine: two shards share what it finds.
gpu    the same schedules, costs of a decoder of 4.3 M parameters on the GPU.
paper  batches, lengths and devices as published for 1.5 B parameters: sizes only.

The cpu and gpu tiers have not been run yet.
"""

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import grpo

TIERS = ("smoke", "cpu", "gpu", "paper")

COST = {
    "smoke": "20 s of CPU, most of it compilation",
    "cpu": "meant for 20 min on 2 idle cores, 5 seeds; not run yet",
    "gpu": "meant for 40 min on one GPU, most of it simulation on a CPU; not run yet",
    "paper": "sizes only",
}
RANGES = {
    "schedule.eta": "[0, inf]",
    "schedule.factor": "[1, 1000]",
    "sigma": "[0, 5]",
    "occupancy": "[0, 1]",
    "prefill": "[0, 1000]",
    "rollout_share": "(0, 1)",
    "costs.*": "[0, 1000]",
    "devices.count": "[2, 100000]",
    "calibrate.warm": "[1, 1000]",
}

SYNC = {"name": "areal", "eta": 0, "interruptible": True}
AREAL = {"name": "areal", "eta": 4}
WHOLE = {"name": "areal", "eta": 4, "interruptible": False}
APRIL = {"name": "april", "factor": 2}
DISCARD = {"name": "april", "factor": 2, "recycle": False}
SCHEDULES: dict[str, dict[str, Any]] = {
    "sync": SYNC,
    "overlap": {"name": "areal", "eta": 1, "interruptible": False},
    "areal_2": {"name": "areal", "eta": 2},
    "areal_4": AREAL,
    "areal_8": {"name": "areal", "eta": 8},
    "areal_2_whole": {"name": "areal", "eta": 2, "interruptible": False},
    "areal_4_whole": WHOLE,
    "areal_8_whole": {"name": "areal", "eta": 8, "interruptible": False},
    "april_2": APRIL,
    "april_4": {"name": "april", "factor": 4},
    "discard_2": DISCARD,
}
"""'whole': generators write what is under way to its end before they take new weights.
'april_2' begins twice as many groups as it trains on and resumes the rest; 'discard_2'
throws it away."""
TAILS = {"constant": 0.0, "light": 0.3, "middle": 0.65, "heavy": 1.0}
"""Standard deviations of log lengths."""
OF_SMOKE = ("sync", "areal_4", "areal_4_whole", "april_2", "discard_2")

SCALED = {"sync": SYNC, "areal_4": AREAL, "april_2": APRIL}
"""What the study of many devices runs."""
SCALES = {"smoke": (4, 16), "cpu": (64, 256, 1024), "gpu": (64, 256, 1024)}
"""Its devices; all of a tier share one size of the batch."""


def get_config(tier: str) -> ConfigDict:
    """The config of a tier."""
    small, paper = tier == "smoke", tier == "paper"
    config = ConfigDict()
    config.system = "scheduling"
    config.model = ConfigDict(
        {
            "name": "decoder",
            **grpo.MODELS[tier],
            **grpo.HEADS[tier],
            "tied_embedding": True,
            "remat": tier in ("gpu", "paper"),
        }
    )
    config.precision = ConfigDict({"rollout": "fp32", "train": "fp32"})
    config.engine = ConfigDict(
        {
            "slots": {"smoke": 4, "cpu": 16}.get(tier, 64),
            "chunk": 4 if small else 16,
            "length": 32 if small else 64,
            "temperature": 1.0,
        }
    )
    config.calibrate = ConfigDict(
        {
            "updates": 4 if small else 12,
            "warm": 2,  # updates in which programs compile
            "prompts": {"smoke": 2, "cpu": 8}.get(tier, 32),
            "samples": 4,
            "prompt": 12,
            "max_new_tokens": 20 if small else 52,
            "microbatch": 8 if small else 32,
            "learning_rate": 1e-5,
        }
    )
    # seconds on one device, where they are not measured
    config.costs = ConfigDict(
        {
            "measured": not small,
            "step": 0.02,
            "occupancy": 0.4,
            "prefill": 1e-4,
            "learn": 1e-3,
            "swap": 0.05,
        }
    )
    cases = {name: _case(sigma) for name, sigma in TAILS.items()}
    cases["constant_unread"] = _case(TAILS["constant"], prefill=0.0)
    cases["middle_fixed"] = _case(TAILS["middle"], occupancy=0.0)
    cases["middle_busy"] = _case(TAILS["middle"], occupancy=1.0)
    cases["heavy_measured"] = _case(TAILS["heavy"], rollout_share=None)
    config.cases = ConfigDict(cases)
    config.workload = ConfigDict(
        {
            "cases": ("constant", "heavy") if small else tuple(cases),
            "batch": {"smoke": 8, "cpu": 32, "gpu": 128}.get(tier, 512),
            "samples": 16 if paper else 4,
            "updates": {"smoke": 4, "paper": 1000}.get(tier, 64),
            "mean": {"smoke": 24, "paper": 2048}.get(tier, 256),
            "longest": {"smoke": 160, "paper": 8192}.get(tier, 2048),
            "prompt": 8 if small else 64,
        }
    )
    config.devices = ConfigDict({"count": 8, "train": 2})
    if paper:
        config.devices.update(count=128, train=32)
    config.schedule = ConfigDict(SYNC)
    config.compare = ConfigDict({"baseline": "sync"})
    names = OF_SMOKE if small else tuple(SCHEDULES)
    arms: dict[str, Any] = {name: {"schedule": SCHEDULES[name]} for name in names}
    alone: dict[str, Any] = {}
    for count in SCALES.get(tier, ()):
        workload: dict[str, Any] = {"cases": ("heavy",)}
        if not small:
            workload |= {"batch": 512, "updates": 20}
        for name, schedule in SCALED.items():
            alone[f"{name}_{count}"] = {
                "schedule": schedule,
                "devices": {"count": count, "train": count // 4},
                "workload": workload,
                "compare": {"baseline": f"sync_{count}"},
            }
    config.one_seed_arms = tuple(alone)
    config.arms = ConfigDict(arms | alone)
    config.claims = ConfigDict(_claims() if tier in ("cpu", "gpu") else {})
    return config


def _case(sigma: float, **own: float | None) -> dict[str, Any]:
    """A case of a tail; rates that it does not have are as measured (None)."""
    given = {"occupancy": None, "prefill": None, "rollout_share": 0.75} | own
    none = {name: placeholder(float) for name, x in given.items() if x is None}
    return {"sigma": sigma} | given | none


def _claim(statement: str, ours: str, baseline: str | None = None, **more: Any) -> Any:
    """A claim from a simulated clock; a difference, where not said otherwise."""
    claim = {"statement": statement, "ours": ours, "statistic": "difference"}
    claim |= {"simulated": True} | more
    return claim if baseline is None else claim | {"baseline": baseline}


def _claims() -> dict[str, dict[str, Any]]:
    above = {"direction": "greater", "threshold": 0.0}
    below = {"direction": "less", "threshold": 0.0}
    ratio = {"statistic": "ratio", "threshold": 1.0}
    exact = {"statistic": "exact", "direction": "equal", "threshold": 0.0}
    gain = "april_2/{}.rollout_gain".format
    return {
        "areal_C1": _claim(
            "AReaL, eta = 4: hours of the synchronous loop over its own, heavy tail",
            "areal_4/heavy.speedup",
            published="up to 2.57",
            direction="greater",
            threshold=1.5,
        ),
        "areal_C1_order": _claim(
            "hours, AReaL at eta = 4 over one-step overlap, heavy tail",
            "areal_4/heavy.hours",
            "overlap/heavy.hours",
            **ratio,
            direction="less",
        ),
        "areal_C1_overlap": _claim(
            "hours, one-step overlap over the synchronous loop, heavy tail",
            "overlap/heavy.hours",
            "sync/heavy.hours",
            **ratio,
            direction="less",
        ),
        "areal_C1_control": _claim(
            "AReaL's speed-up, constant lengths less heavy tail",
            "areal_4/constant.speedup",
            "areal_4/heavy.speedup",
            **below,
        ),
        "areal_C1_high": _claim(
            "AReaL's speed-up where idle slots cost as much as busy ones",
            "areal_4/middle_fixed.speedup",
            published="above 2.57",
            direction="greater",
            threshold=2.57,
        ),
        "areal_C1_low": _claim(
            "AReaL's speed-up where idle slots cost nothing",
            "areal_4/middle_busy.speedup",
            published="below 2.57",
            direction="less",
            threshold=2.57,
        ),
        "areal_C2": _claim(
            "tokens written a simulated second at eta = 4, interruptible over not",
            "areal_4/heavy.generated",
            "areal_4_whole/heavy.generated",
            published="1.12 (1.5B), 1.17 (7B)",
            **ratio,
            direction="greater",
        ),
        "areal_C2_control": _claim(
            "hours until the first batch, interruptible less not: no weights changed",
            "areal_4/heavy.first_batch",
            "areal_4_whole/heavy.first_batch",
            **exact,
        ),
        "april_C1": _claim(
            "APRIL, 2 N: throughput of rollouts over the synchronous one, heavy tail",
            gain("heavy"),
            published="1.225 on average, up to 1.44",
            direction="greater",
            threshold=1.0,
        ),
        "april_C1_heavy": _claim(
            "APRIL's gain, sigma 1 less sigma 0.65",
            gain("heavy"),
            gain("middle"),
            **above,
        ),
        "april_C1_middle": _claim(
            "APRIL's gain, sigma 0.65 less sigma 0.3",
            gain("middle"),
            gain("light"),
            **above,
        ),
        "april_C1_not_less": _claim(
            "APRIL's gain with constant lengths, reading free",
            gain("constant_unread"),
            direction="greater",
            threshold=0.98,
        ),
        "april_C1_not_more": _claim(
            "APRIL's gain with constant lengths, reading free",
            gain("constant_unread"),
            direction="less",
            threshold=1.02,
        ),
        "april_C1_high": _claim(
            "APRIL's gain where idle slots cost as much as busy ones",
            gain("middle_fixed"),
            published="above 1.44",
            direction="greater",
            threshold=1.44,
        ),
        "april_C1_low": _claim(
            "APRIL's gain where idle slots cost nothing",
            gain("middle_busy"),
            published="below 1.225",
            direction="less",
            threshold=1.225,
        ),
        "r_april_constant": _claim(
            "APRIL's gain with constant lengths, resumed responses read again",
            gain("constant"),
            statistic="report",
        ),
        "r_areal_measured": _claim(
            "AReaL's speed-up where training takes what was measured, heavy tail",
            "areal_4/heavy_measured.speedup",
            statistic="report",
        ),
        "r_april_measured": _claim(
            "APRIL's speed-up where training takes what was measured, heavy tail",
            "april_2/heavy_measured.speedup",
            statistic="report",
        ),
        "april_C3_lengths": _claim(
            "length of trained responses over all, unfinished discarded less resumed",
            "discard_2/heavy.length_ratio",
            "april_2/heavy.length_ratio",
            **below,
        ),
        "april_C4": _claim(
            "share of tokens of earlier weights, 4 N less 2 N, heavy tail",
            "april_4/heavy.off_policy",
            "april_2/heavy.off_policy",
            **above,
        ),
        "april_C4_sync": _claim(
            "share of tokens of earlier weights in the synchronous loop",
            "sync/heavy.off_policy",
            **exact,
        ),
    }
