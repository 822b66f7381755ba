"""Text tasks with exact rewards, for reinforcement learning of language models."""

from tmdjax.data.text_tasks.chain_sum import ChainSum as ChainSum
from tmdjax.data.text_tasks.countdown import Countdown as Countdown
from tmdjax.data.text_tasks.list_operations import ListOperations as ListOperations
from tmdjax.data.text_tasks.math_files import MathProblems as MathProblems
from tmdjax.data.text_tasks.problems import SPLITS as SPLITS
from tmdjax.data.text_tasks.problems import Problem as Problem
from tmdjax.data.text_tasks.problems import TextTask as TextTask
from tmdjax.data.text_tasks.problems import sample as sample
from tmdjax.data.text_tasks.problems import sample_splits as sample_splits
from tmdjax.data.text_tasks.problems import split_of as split_of
from tmdjax.data.text_tasks.program_by_example import (
    ProgramByExample as ProgramByExample,
)
from tmdjax.data.text_tasks.reasoning_gym import ReasoningGym as ReasoningGym
