"""RL on flow models: what plugs into it, and its iteration."""

from tmdjax.train.flow_rl.contracts import (
    Credit,
    FlowMethod,
    FlowObjective,
    HostReward,
    Policy,
    Rollout,
    Setup,
    initial_noise,
    make_setup,
)
from tmdjax.train.flow_rl.iteration import make_iteration

__all__ = [
    "Credit",
    "FlowMethod",
    "FlowObjective",
    "HostReward",
    "Policy",
    "Rollout",
    "Setup",
    "initial_noise",
    "make_iteration",
    "make_setup",
]
