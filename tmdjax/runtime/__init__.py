"""How generation, scoring and training take turns."""

from tmdjax.runtime.lm_rl import LMState as LMState
from tmdjax.runtime.lm_rl import make_iteration as make_iteration
from tmdjax.runtime.packing import TokenObjective as TokenObjective
from tmdjax.runtime.packing import UpdateBatch as UpdateBatch
from tmdjax.runtime.packing import update_batches as update_batches
from tmdjax.runtime.scheduling import Group as Group
from tmdjax.runtime.scheduling import Rollout as Rollout
from tmdjax.runtime.scheduling import collect as collect
from tmdjax.runtime.settings import LanguageSettings as LanguageSettings
from tmdjax.runtime.settings import Prompt as Prompt
from tmdjax.runtime.settings import Score as Score
from tmdjax.runtime.update import make_update as make_update
