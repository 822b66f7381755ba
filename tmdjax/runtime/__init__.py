"""How generation, scoring and training take turns."""

from tmdjax.runtime.lm_rl import LMState, make_iteration
from tmdjax.runtime.packing import Objective, UpdateBatch, update_batches
from tmdjax.runtime.scheduling import Group, Rollout, collect
from tmdjax.runtime.scoring import Scoring
from tmdjax.runtime.settings import Prompt, Score, Settings
from tmdjax.runtime.update import make_update

__all__ = [
    "Group",
    "LMState",
    "Objective",
    "Prompt",
    "Rollout",
    "Score",
    "Scoring",
    "Settings",
    "UpdateBatch",
    "collect",
    "make_iteration",
    "make_update",
    "update_batches",
]
