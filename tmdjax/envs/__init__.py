"""Environments: pure-JAX ones, and adapters of simulators."""

from tmdjax.envs.base import Environment as Environment
from tmdjax.envs.base import Transition as Transition
from tmdjax.envs.base import Vector as Vector
from tmdjax.envs.base import VectorState as VectorState
from tmdjax.envs.base import VectorStep as VectorStep
from tmdjax.envs.base import check_environment as check_environment
from tmdjax.envs.block_room import BlockRoom as BlockRoom
from tmdjax.envs.chunked import Chunked as Chunked
from tmdjax.envs.diagnostic import PROBES as PROBES
from tmdjax.envs.host import GymnasiumVector as GymnasiumVector
from tmdjax.envs.multi_goal import MultiGoal as MultiGoal
from tmdjax.envs.multi_goal import goal_counts as goal_counts
from tmdjax.envs.multi_goal import goal_entropy as goal_entropy
from tmdjax.envs.point_maze import PointMaze as PointMaze
from tmdjax.envs.push import Push as Push
from tmdjax.envs.simulators import Brax as Brax
from tmdjax.envs.simulators import Playground as Playground
