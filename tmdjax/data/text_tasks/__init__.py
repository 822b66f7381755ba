"""Text tasks with exact rewards, for reinforcement learning of language models."""

from tmdjax.data.text_tasks.chain_sum import ChainSum
from tmdjax.data.text_tasks.countdown import Countdown
from tmdjax.data.text_tasks.list_operations import ListOperations
from tmdjax.data.text_tasks.math_files import MathProblems
from tmdjax.data.text_tasks.problems import (
    SPLITS,
    Problem,
    TextTask,
    sample,
    scorer,
    split_of,
)
from tmdjax.data.text_tasks.reasoning_gym import ReasoningGym

__all__ = [
    "SPLITS",
    "ChainSum",
    "Countdown",
    "ListOperations",
    "MathProblems",
    "Problem",
    "ReasoningGym",
    "TextTask",
    "sample",
    "scorer",
    "split_of",
]
