"""Problems and scores of the package reasoning-gym; runs inside a worker process.

Some of its scorers hand the answer to sympy's ``parse_expr``, which evaluates Python,
and 9**9**9 is an answer too: neither belongs into the process that trains.
"""

from collections.abc import Mapping
from typing import Any


def call(request: str, *arguments: Any) -> Any:
    """Answers 'names', 'check', 'problem' or 'score', the functions below."""
    return {"names": names, "check": check, "problem": problem, "score": score}[
        request
    ](*arguments)


def names() -> list[str]:
    """All generators."""
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS)


def check(name: str, options: Mapping[str, Any]) -> str:
    """What is wrong with the options, or ''."""
    from reasoning_gym.factory import create_dataset

    try:
        create_dataset(name, seed=0, size=1, **options)
    except Exception as error:
        return str(error) or type(error).__name__
    return ""


def problem(name: str, options: Mapping[str, Any], seed: int) -> tuple[str, str]:
    """Question and gold answer ('' where the generator gives none)."""
    _, entry = _made(name, options, seed)
    answer = entry["answer"]
    return entry["question"], "" if answer is None else str(answer)


def score(name: str, options: Mapping[str, Any], seed: int, answer: str) -> float:
    """The generator's own score of an answer to the problem of the seed."""
    dataset, entry = _made(name, options, seed)
    return float(dataset.score_answer(answer=answer, entry=entry))


def _made(name: str, options: Mapping[str, Any], seed: int) -> tuple[Any, Any]:
    from reasoning_gym.factory import create_dataset

    dataset = create_dataset(name, seed=seed, size=1, **options)
    return dataset, dataset[0]
