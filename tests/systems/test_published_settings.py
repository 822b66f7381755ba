"""The numbers of every preset, as the papers' sheets have them.

They were typed from the papers and their released code, not from the presets.
"""

import inspect

import numpy as np
import pytest
from numpy.testing import assert_allclose

from tmdjax import flows, train
from tmdjax.systems import (
    boss,
    branchgrpo,
    dppo,
    flow_grpo,
    fpo,
    grpo,
    pde_refiner,
    policyflow,
    ppo,
    reinflow,
    tmd,
)

# Advantages of one prompt's group: torch's sample deviation, eps 1e-8.
GROUP = {"scale": "group", "ddof": 1, "eps": 1e-8, "advantage_clip": 5}
FLOWS = {
    # config/base.py and config/grpo.py of Flow-GRPO: SD3.5-M
    "flow_grpo": dict(
        steps=10, preset="flow_grpo", strength=0.7, group_size=24, final=None,
        same_noise=False, window=None, trained="first", fraction=0.99,
        scale="batch", ddof=0, eps=1e-4, advantage_clip=5,
        drop_tied=True, clip_range=1e-4, kl_coefficient=0.04,
        kl_kind="flow_grpo_code", updates=2,
    ),
    # its fast variant: a window of 3 in the first half
    "flow_grpo_fast": dict(
        steps=10, preset="flow_grpo", strength=0.7, group_size=24, same_noise=True,
        window={"schedule": "random", "size": 3, "high": 5}, scale="batch", ddof=0,
        eps=1e-4, clip_range=1e-4, kl_coefficient=0.04, updates=2,
    ),
    # finetune_flux_grpo.sh of DanceGRPO: an update every 4 of 12 samples
    "dance_grpo": dict(
        steps=16, preset="dance_grpo", strength=0.3, group_size=12, same_noise=True,
        window=None, trained="random", fraction=0.6, clip_range=1e-4,
        kl_coefficient=0.0, updates=3, **GROUP,
    ),
    # finetune_flux_grpo_MixGRPO.sh: gradients of 3 samples an update
    "mix_grpo": dict(
        steps=25, preset="flow_grpo", strength=0.7, group_size=12, same_noise=True,
        window={"schedule": "progressive", "size": 4, "iterations": 25},
        clip_range=1e-4, kl_coefficient=0.0, updates=4, **GROUP,
    ),
}  # fmt: skip
# finetune_flux_branchgrpo_8gpus.sh: an update every 12 of 218 edges
TREE = dict(
    steps=20, splits=(0, 3, 6, 9), branches=2, group_size=16, strength=0.3,
    correlation=None, fusion="mean", baseline="depth",
    std_scope="depth", advantage_clip=5, prune_depths=(), prune_width=1, mix=None,
    clip_range=1e-3, kl_coefficient=0.0, updates=18,
)  # fmt: skip
TREES = {
    "branchgrpo": TREE | {"split_scale": 1, "split_log_prob": "proposal"},
    "branchgrpo_released": TREE | {"split_scale": 4, "split_log_prob": "policy"},
}
# the MultiGoal runner of PolicyFlow, and PPO beside it
MULTI_GOAL = dict(
    unroll=32, epochs=5, minibatches=4, learning_rate=2e-4, target_kl=0.01,
    learning_rate_bounds=(1e-6, 1e-2), weight_decay=1e-5, clip_norm=1.0,
    discount=0.99, gae_lambda=0.95, advantages="batch", value_coefficient=1.0,
    value_clip=0.2, reward_scale=1.0, normalise="none",
    critic_hidden=(256, 128, 64), critic_activation="mish",
    hidden=(256, 128, 64), activation="mish", initial_std=1.0, clip_range=0.2,
    entropy_coefficient=0.001,
)  # fmt: skip
# FpoConfig of the JAX code
FPO = dict(
    unroll=30, epochs=16, minibatches=32, learning_rate=3e-4, target_kl=None,
    weight_decay=0.0, clip_norm=None, discount=0.995, gae_lambda=0.95,
    advantages="minibatch", value_coefficient=0.25, value_clip=None,
    reward_scale=10.0, critic_hidden=(256,) * 5, critic_activation="silu",
    hidden=(32,) * 4, activation="silu", frequencies=(1, 8, 4), output_scale=0.25,
    steps=10, pairs=8, error="noise", ratio="mean", squash=True, clip_range=0.05,
)  # fmt: skip
FLOW = dict(
    log_std_bounds=(-5, 2), steps=10, path="rectified_flow", times=1,
    brownian_coefficient=0.25, brownian_reduction="mean",
)  # fmt: skip
RELEASED = {"gae": "per_minibatch", "normalise": fpo.RELEASED_NORMALISER}
# cfg/gym of ReinFlow for hopper, with what its paper corrects
CHAIN = dict(
    unroll=500, epochs=5, minibatches=4, target_kl=1.0, kl_rule="stop",
    weight_decay=0.0, clip_norm=None, discount=0.99, gae_lambda=0.95,
    advantages="minibatch", value_coefficient=0.25, value_clip=None, scale_rewards=True,
    truncation="final", normalise="fixed", critic_hidden=(256,) * 3,
    critic_activation="mish", hidden=(512,) * 3, activation="relu", time_hidden=32,
    clip_noise=3.0, clip_last=1.0, clip_range=0.01,
)  # fmt: skip
HOPPER = CHAIN | dict(
    learning_rate=4.5e-5, critic_learning_rate=6.5e-4, critic_warmup=0,
    learning_rate_cycle=(100, 10, 4 / 9), critic_cycle_share=6 / 13,  # 2e-5, 3e-4
    variant="rectified", steps=4, noise_hidden=(64, 64), noise_input="observation_time",
    std_lower=0.10, std_upper=0.24, decay_iterations=1000, learned_noise_steps=None,
    clip_mean=1.0, log_prob_reduction="mean", log_prob_range=(-1, 1), count_start=True,
    entropy_coefficient=0.03, w2_coefficient=0.0, w2_noise="normal", legacy_grid=False,
    cloning_times="uniform",
)  # fmt: skip
HELD = {"decay_iterations": None, "entropy_coefficient": 0.0}
NARROW = {"std_lower": 0.08, "std_upper": 0.16}
REINFLOW = {
    "reinflow": {},
    "hopper": {},
    "walker": dict(
        learning_rate=4.5e-4, learning_rate_cycle=(100, 10, 8 / 9),  # to 4e-4
        critic_learning_rate=4e-3, critic_cycle_share=1.0, critic_warmup=5,
    ),
    "halfcheetah": dict(
        learning_rate=3e-5, critic_learning_rate=3e-4, critic_warmup=10,
        learning_rate_cycle=(100, 10, 0.5), critic_cycle_share=0.5,  # 1.5e-5, 1.5e-4
    ),
    "ant": NARROW,
    "humanoid": NARROW,
    # kitchen-complete-v0/ft_ppo_shortcut_mlp.yaml: 8000 chunks, ten times in 5600
    "kitchen": HELD | dict(
        variant="shortcut", std_lower=0.05, std_upper=0.12, unroll=200, epochs=10,
        minibatches=16, hidden=(256,) * 3, activation="mish",
    ),
    # can/ft_ppo_reflow_mlp_img.yaml: 15000 chunks, ten times in 15 x 500
    "image": HELD | dict(
        std_lower=0.08, std_upper=0.14, steps=1, clip_range=0.001, discount=0.999,
        epochs=10, target_kl=0.01, unroll=300, minibatches=20, learning_rate=2e-5,
        critic_warmup=2, noise_hidden=(256,) * 3,
    ),
}  # fmt: skip
DPPO = CHAIN | dict(
    learning_rate=1e-4, critic_learning_rate=1e-3, learning_rate_cycle=None,
    critic_warmup=0, steps=20, fine_tuned_steps=10, std_floor=0.1,
    log_prob_range=(-5, 2), advantage_quantiles=(0, 1), denoising_discount=0.99,
    clip_base=0.01,
)  # fmt: skip
CONTROL = {
    (ppo, "ppo"): MULTI_GOAL | {"log_std_bounds": (-20, 4)},
    (policyflow, "policyflow"): MULTI_GOAL | FLOW,
    (fpo, "fpo"): FPO | {"gae": "once", "normalise": "running"},
    (fpo, "released"): FPO | RELEASED,
    **{(reinflow, name): HOPPER | changes for name, changes in REINFLOW.items()},
    (dppo, "dppo"): DPPO,
}
PLAIN = {"surrogate": "token", "correction": "none", "kl_coefficient": 0.0}
PLAIN |= {"baseline": "mean", "scale": "group", "dual_clip": None}
LANGUAGE = {
    "grpo": PLAIN | {"clip_range": 0.2},
    "dr_grpo": PLAIN | {"clip_range": 0.2, "scale": "none"},
    "rloo": PLAIN | {"baseline": "leave_one_out", "scale": "none"},
    "dapo": PLAIN | {"clip_range": (0.2, 0.28)},
    "gspo": PLAIN | {"surrogate": "sequence", "clip_range": (3e-4, 4e-4)},
    "cispo": PLAIN | {"surrogate": "cispo"},
    "sapo": PLAIN | {"surrogate": "sapo"},
    "decoupled": PLAIN | {"clip_range": 0.2, "correction": "reject", "max_weight": 5.0},
}


def holds(published, *parts):
    for name, value in published.items():
        (part,) = (part for part in parts if hasattr(part, name))
        assert getattr(part, name) == value, name


@pytest.mark.filterwarnings("ignore:.*is biased")
@pytest.mark.parametrize("name", [*FLOWS, *TREES])
def test_flow_models(name):
    system = flow_grpo if name in FLOWS else branchgrpo
    assert set(system.PRESETS) == set(FLOWS if name in FLOWS else TREES)
    setup = system.preset(name, (2,))
    published = dict((FLOWS | TREES)[name])
    u = np.linspace(1, 0, published.pop("steps") + 1)
    assert_allclose(setup.method.grid, 3 * u / (1 + 2 * u), rtol=1e-12)
    assert setup.updates == published.pop("updates")
    assert setup.objective.reduction == setup.method.reduction == "mean"
    holds(published, setup.method, setup.objective)


@pytest.mark.parametrize("system, name", CONTROL)
def test_control(system, name):
    setup = system.preset(name)
    holds(CONTROL[system, name], setup.method, setup.settings)
    for of in (fpo, reinflow):
        assert set(of.PRESETS) == {name for other, name in CONTROL if other is of}


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models(name):
    assert set(grpo.PRESETS) == set(LANGUAGE)
    holds(LANGUAGE[name], grpo.preset(name))


def test_transition_matching_distillation():
    """arXiv 2601.09881, table 7 and appendix A, for 1.3 B parameters."""
    holds(
        dict(
            guidance=3.0, map_rate=0.25, drop_rate=0.1, shift=3.0,
            time_range=(0.001, 0.999), delta=5e-3, loss_constant=1.0,
        ),
        tmd.PRETRAINING,
    )  # fmt: skip
    holds(
        dict(
            guidance=5.0, critic_updates=4, shift=5.0, time_range=(0.001, 0.999),
            normalisation="distance", adversarial_weight=0.03, features="teacher",
            same_noise=True, r1_weight=0.0,
        ),
        train.DistillationConfig(),
    )  # fmt: skip
    plan = tmd.make_plan(2, 4, 5, 30)
    assert_allclose(plan.outer_times, [0.999, 0.908, 0], atol=1e-3)
    assert_allclose(plan.inner_times, [0.999, 0.967, 0.908, 0.769, 0], atol=1e-3)
    times = [0.999, 0.937, 0.833, 0.624, 0]
    assert_allclose(flows.truncated_grid(4, 5.0, 0.999), times, atol=1e-3)


def defaults(function):
    found = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in found}


def test_bellman_optimal_steps():
    """The configs of BOSS: 100 noises, 100 Euler steps, squared distances."""
    found = defaults(boss.search)
    assert (found["samples"], found["knots"], found["method"]) == (100, 100, "euler")
    assert found["metric"] is flows.squared_l2 and found["future_weight"] == 1
    assert defaults(boss.split)["eval_fraction"] == 0.1
    assert defaults(boss.straighten)["weight"] == "unit"
    assert defaults(train.fine_tune)["steps"] == 12_000


def test_pde_refiner():
    """configs/kuramotosivashinsky1d.yaml of PDEArena; its 'std' is a variance."""
    published = dict(refinements=3, min_variance=4e-7, difference_weight=0.3)
    published |= dict(history=1, initial_input="noise", variant="reference")
    holds(published, pde_refiner.preset("pde_refiner"))
