"""How generation, scoring and training take turns."""

from tmdjax.runtime.lm_rl import LMState, make_iteration
from tmdjax.runtime.packing import TokenObjective, UpdateBatch, update_batches
from tmdjax.runtime.scheduling import Group, Rollout, collect
from tmdjax.runtime.scoring import Scoring
from tmdjax.runtime.settings import LanguageSettings, Prompt, Score
from tmdjax.runtime.update import make_update

__all__ = [
    "Group",
    "LMState",
    "LanguageSettings",
    "Prompt",
    "Rollout",
    "Score",
    "Scoring",
    "TokenObjective",
    "UpdateBatch",
    "collect",
    "make_iteration",
    "make_update",
    "update_batches",
]
