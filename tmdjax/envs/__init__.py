"""Environments: pure-JAX ones, and adapters of simulators."""

from tmdjax.envs.base import (
    Environment,
    Transition,
    Vector,
    VectorState,
    VectorStep,
    check_environment,
)
from tmdjax.envs.diagnostic import PROBES
from tmdjax.envs.host import GymnasiumVector
from tmdjax.envs.multi_goal import MultiGoal, goal_counts, goal_entropy
from tmdjax.envs.point_maze import PointMaze
from tmdjax.envs.push import Push
from tmdjax.envs.simulators import Brax, Playground

__all__ = [
    "PROBES",
    "Brax",
    "Environment",
    "GymnasiumVector",
    "MultiGoal",
    "Playground",
    "PointMaze",
    "Push",
    "Transition",
    "Vector",
    "VectorState",
    "VectorStep",
    "check_environment",
    "goal_counts",
    "goal_entropy",
]
