"""How generation, scoring and training take turns."""

from tmdjax.runtime import events as events
from tmdjax.runtime import executors as executors
from tmdjax.runtime.activity import Activity as Activity
from tmdjax.runtime.asynchronous import fit_asynchronously as fit_asynchronously
from tmdjax.runtime.calibration import check_calibration as check_calibration
from tmdjax.runtime.control import Controller as Controller
from tmdjax.runtime.group_objective import (
    GroupRelativeObjective as GroupRelativeObjective,
)
from tmdjax.runtime.learner import Learner as Learner
from tmdjax.runtime.learner import LMState as LMState
from tmdjax.runtime.learner import make_learner as make_learner
from tmdjax.runtime.lengths import length_bias as length_bias
from tmdjax.runtime.lm_rl import make_iteration as make_iteration
from tmdjax.runtime.packing import TokenObjective as TokenObjective
from tmdjax.runtime.packing import UpdateBatch as UpdateBatch
from tmdjax.runtime.packing import update_batches as update_batches
from tmdjax.runtime.roles import Batch as Batch
from tmdjax.runtime.roles import Generator as Generator
from tmdjax.runtime.roles import Scorer as Scorer
from tmdjax.runtime.roles import Trainer as Trainer
from tmdjax.runtime.rounds import Ask as Ask
from tmdjax.runtime.rounds import Group as Group
from tmdjax.runtime.rounds import OneRound as OneRound
from tmdjax.runtime.rounds import Planner as Planner
from tmdjax.runtime.rounds import Rollout as Rollout
from tmdjax.runtime.rounds import Turn as Turn
from tmdjax.runtime.schedule import Schedule as Schedule
from tmdjax.runtime.scheduling import collect as collect
from tmdjax.runtime.settings import LanguageSettings as LanguageSettings
from tmdjax.runtime.settings import Prompt as Prompt
from tmdjax.runtime.settings import Score as Score
from tmdjax.runtime.simulated_engine import SimulatedEngine as SimulatedEngine
from tmdjax.runtime.trajectories import Trajectory as Trajectory
from tmdjax.runtime.trajectories import TrajectoryStore as TrajectoryStore
from tmdjax.runtime.update import LogProbs as LogProbs
from tmdjax.runtime.update import make_update as make_update
from tmdjax.runtime.watchdog import Watchdog as Watchdog
