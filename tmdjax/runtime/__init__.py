"""How generation, scoring and training take turns."""

from tmdjax.runtime.lm_rl import (
    LMState,
    Objective,
    Prompt,
    Rollout,
    Score,
    Settings,
    UpdateBatch,
    collect,
    make_iteration,
    make_update,
    update_batches,
)

__all__ = [
    "LMState",
    "Objective",
    "Prompt",
    "Rollout",
    "Score",
    "Settings",
    "UpdateBatch",
    "collect",
    "make_iteration",
    "make_update",
    "update_batches",
]
