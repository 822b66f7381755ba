r"""XRPO beside GRPO, GSPO and DAPO, on countdown of mixed difficulty.

    python -m experiments.run --config=configs/xrpo.py:smoke
    python -m experiments.run --config=configs/xrpo.py:cpu --seeds=0..4
    python -m experiments.run --config=configs/xrpo.py:gpu --seeds=0..4
    python -m experiments.run --config=configs/xrpo.py:paper --dry_run

All arms start from one supervised policy, which learnt texts of three problems, one
after the other: prompts behind none, one and two solved ones. All but DAPO write as
many responses; DAPO, whose discarded ones count, has half of the iterations, and what
each arm wrote is reported. Held-out problems are tried during RL too (the group
``curve``): ``accuracy_at_tokens`` (C1d) compares arms where as many tokens are written,
and C2 counts what an arm needs to reach the end of GRPO's curve under the same seed.

smoke  an almost untrained decoder: mechanics only.
cpu    0.4 M parameters, three or four numbers; 16 prompts x 8 responses, 100
       iterations. No claim compares GSPO, DAPO, XRPO with equal counts and XRPO without
       examples: they run under the first seed alone.
gpu    4.3 M parameters, three to five numbers; 32 prompts x 8, 100 iterations.
paper  the sizes of Qwen2.5-1.5B, 16 responses a prompt.

The cpu and gpu tiers have not been run yet. The cpu tier's time is added up from pieces
of its shape that were timed on two busy cores: in seconds of CPU, 0.5 a supervised
step, 1.5 an iteration of GRPO, 1.8 one of XRPO (of which the update is 1.1; it is 2.2
where texts are not packed), 0.4 for 128 responses of a look or of the judge.

    --config.arms.xrpo.method.std_prior=true   and other fields of systems.xrpo.XRPO
    --config.rl.train_prompt=question --config.method.correction=truncate

The gate alone (C0 and C4, in the line that begins with [examples]); the run of all arms
finds its stages made:

    python -m experiments.run --config=configs/xrpo.py:cpu --seeds=0..4 \
        --config.arms=xrpo --stage=examples --workdir=runs/xrpo-gate

A switch that takes away what a claim is about needs the ids of the claims that stay:

    --config.arms.xrpo.method.examples=0 --config.claims=C1,C2,C3

How much each setting of XRPO matters, one at a time, as SWEEP below has them:

    python -m experiments.sweep --config=configs/xrpo.py:cpu --config.arms=grpo,xrpo
"""

from typing import Any

from ml_collections import ConfigDict

from configs.grpo import RANGES as GRPO_RANGES
from configs.grpo import base

EXPERIMENT = "grpo"
TIERS = ("smoke", "cpu", "gpu", "paper")

COST = {
    "smoke": "20 s of CPU once compiled",
    "cpu": "estimated: 45 min on 2 cores, 5 seeds; not run yet",
    "gpu": "meant for an hour on one H100, 5 seeds; not run yet",
    "paper": "sizes only",
}
RANGES = GRPO_RANGES | {"sft.examples": "[0, 16]"}
SWEEP = tuple(
    f"arms.xrpo.method.{values}"
    for values in (
        "rounds=2,5",
        "first_samples=2,6",
        "rule=proportional",
        "alpha=0.01,0.2",
        "exploration=0.0,0.2",
        "bonus=linear",
        "trials=iterations",
        "stop_if_right=true",
        "std_prior=true",
        "examples=1",
        "memory_size=32",
        "novelty=1.0,5.0",
        "most_novelty=0.25,1.0",
        "average=right",
        "equal_prompts=true",
    )
)
"""Values beside the defaults of :class:`tmdjax.systems.xrpo.XRPO`, each tried alone."""


def get_config(tier: str) -> ConfigDict:
    """The config of a tier."""
    small = tier == "smoke"
    config: Any = ConfigDict()
    config.system = "xrpo"
    base(config, tier)
    counts = {"smoke": (3,), "cpu": (3, 4)}.get(tier, (3, 4, 5))
    config.task = ConfigDict({"name": "countdown", "counts": counts})
    length = {"smoke": 96, "cpu": 160}.get(tier, 240)
    config.sft.update({"length": length, "gate": 0.1})
    config.sft.examples = 2
    if tier == "cpu":  # three responses a text
        config.sft.update({"batch": 24, "look_every": 50})
    config.rl.update(
        {
            "iterations": 3 if small else 100,
            "samples": 16 if tier == "paper" else 8,
            "length": length,
            "max_new_tokens": {"smoke": 30, "cpu": 44}.get(tier, 60),
            # most texts are a third of the length of those with two examples
            "pack_rows": 16 if tier == "cpu" else 0,
        }
    )
    config.rl.train_prompt = "sampled"
    config.judge.update({"samples": 2 if small else 8})
    looks = {"every": 1, "problems": 8} if small else {"every": 5, "problems": 256}
    config.curve = ConfigDict({**looks, "baseline": "grpo"})
    tries = {"memory_batches": 1, "batches": 1}
    config.examples = ConfigDict(
        tries if small else {"memory_batches": 8, "batches": 24}
    )
    config.method = ConfigDict({"name": "grpo"})
    methods: dict[str, dict[str, Any]] = {
        "grpo": {"name": "grpo"},
        "xrpo": {"name": "xrpo"},
        "no_sharpening": {"name": "xrpo", "novelty": 0.0},
        "no_allocation": {"name": "xrpo", "rule": "uniform"},
        "no_examples": {"name": "xrpo", "examples": 0},
        "gspo": {"name": "grpo:gspo"},
        "dapo": {"name": "grpo:dapo"},
    }
    if small:
        methods = {name: methods[name] for name in ("grpo", "xrpo")}
    arms: dict[str, Any] = {name: {"method": m} for name, m in methods.items()}
    if "dapo" in arms:
        half = config.rl.iterations // 2
        arms["dapo"]["rl"] = {"dynamic_sampling": True, "iterations": half}
        config.one_seed_arms = ("no_allocation", "no_examples", "gspo", "dapo")
    config.arms = ConfigDict(arms)
    config.claims = ConfigDict(_claims() if tier in ("cpu", "gpu") else {})
    return config


def _claims() -> dict[str, dict[str, Any]]:
    def more(statement: str, what: str, than: str = "grpo", **other: Any) -> dict:
        return {
            "statement": statement,
            "statistic": "difference",
            "direction": "greater",
            "threshold": 0.0,
            "ours": f"xrpo/{what}",
            "baseline": f"{than}/{other.pop('baseline', what)}",
            **other,
        }

    def fewer(statement: str, what: str, statistic: str, threshold: float) -> dict:
        given = {"direction": "less", "statistic": statistic, "threshold": threshold}
        return more(statement, what) | given

    claims: dict[str, dict[str, Any]] = {
        "C0": more(
            "the gate: share of right responses before RL, with worked examples less "
            "without",
            "accuracy_with_examples",
            "xrpo",
            baseline="accuracy_without",
        ),
        "C1": more(
            "held-out accuracy (pass@1), XRPO less GRPO",
            "accuracy_after",
            published="up to 0.04",
        ),
        "C1b": more(
            "share of held-out problems with any of eight responses right (pass@8), "
            "XRPO less GRPO",
            "solved_after",
        ),
        "C1c": more(
            "share of held-out problems whose most frequent of eight answers is right "
            "(cons@8), XRPO less GRPO",
            "consensus_after",
            published="up to 0.06 (of 32)",
        ),
        "C1d": more(
            "accuracy on problems tried during RL, where GRPO's number of tokens is "
            "written, XRPO less GRPO",
            "accuracy_at_tokens",
        ),
        "C2": fewer(
            "iterations until accuracy during RL reaches what GRPO ends at, XRPO over "
            "GRPO",
            "steps_to_level",
            "ratio",
            1.0,
        )
        | {"published": "up to 1 / 2.7"},
        "C2b": fewer(
            "tokens written until accuracy during RL reaches what GRPO ends at, XRPO "
            "over GRPO",
            "tokens_to_level",
            "ratio",
            1.0,
        ),
        "C3": fewer(
            "share of groups with equal scores, XRPO less GRPO",
            "tied_fraction",
            "difference",
            0.0,
        ),
        "C4": more(
            "unsolved problems that further tries solve: with worked examples less "
            "without, before RL",
            "flipped_with_examples",
            "xrpo",
            baseline="flipped_without",
        ),
        "C5": more(
            "different right answers to a held-out problem, with sharpening less "
            "without",
            "distinct_after",
            "no_sharpening",
        ),
        "C6": {
            "statement": "planning of rollouts, share of an iteration's seconds",
            "statistic": "difference",
            "direction": "less",
            "threshold": 0.02,
            "ours": "xrpo/allocation_share",
        },
    }
    arms = ("grpo", "xrpo", "no_sharpening", "no_allocation", "no_examples")
    for arm in (*arms, "gspo", "dapo"):
        for what in ("accuracy_after", "accuracy_at_tokens", "responses", "tokens"):
            claims[f"r_{arm}_{what}"] = {
                "statement": f"{what.replace('_', ' ')}, {arm}",
                "statistic": "report",
                "ours": f"{arm}/{what}",
            }
        if arm != "grpo":  # whose tokens say where
            than = {"baseline": "grpo/accuracy_at_tokens"}
            claims[f"r_{arm}_accuracy_at_tokens"].update(than)
    return claims
