"""Rewards of groups of responses, in threads beside the engine."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tmdjax import rl
from tmdjax.rewards import host
from tmdjax.rl import TokenRecord
from tmdjax.runtime.settings import LanguageSettings, Score


class Scoring:
    """Scores groups as they end, a few at a time.

    Args:
        score: ``(problem, response ids) -> reward``; it is called from several threads
            where ``settings.scored_at_once`` is above 1.
        settings: time limit, how many at once, and the penalty of long responses.
    """

    def __init__(self, score: Score, settings: LanguageSettings):
        self._score, self._settings = score, settings
        self._running: list[tuple[Sequence[TokenRecord], host.Pending, list]] = []
        self._failed = threading.Event()

    def submit(self, problem: Any, records: Sequence[TokenRecord]) -> None:
        """Starts to score a group; waits while too many are being scored."""
        while len(self._running) >= self._settings.scored_at_once:
            self._finish_first()
        responses = [tuple(record.tokens) for record in records]
        exact: list[float] = []  # what comes back is float32

        def scored(which: np.ndarray, problems: Sequence[Any]) -> list[float]:
            found = []
            for i, own in zip(which, problems):
                if self._failed.is_set():  # nobody waits for these any more
                    raise RuntimeError("another group could not be scored")
                found.append(self._score(own, responses[i]))
            exact[:] = found
            return found

        pending = host.submit(
            scored,
            np.arange(len(records)),
            [problem] * len(records),
            records[0].number,
            timeout=self._settings.score_timeout,
        )
        self._running.append((records, pending, exact))

    def finish(self) -> None:
        """Waits until every record that was submitted has its score and reward.

        Raises:
            RewardError: the scorer raised, took too long, or gave what is no finite
                number; the message names the request and the problem.
        """
        while self._running:
            self._finish_first()

    def _finish_first(self) -> None:
        records, pending, exact = self._running.pop(0)
        try:
            pending.result()
        except BaseException:
            self._failed.set()
            raise
        for record, score in zip(records, exact):
            record.score = float(score)
            record.reward = record.score + _penalty(record, self._settings)


def judge_of(
    score: Score, settings: LanguageSettings
) -> Callable[[TokenRecord, Any], tuple[float, float]]:
    """What a :class:`tmdjax.runtime.Scorer` calls: one response, within its time.

    Args:
        score: of a response.
        settings: time limit and penalty.

    Returns:
        ``(record, problem) -> (score, reward)``, the penalty of long responses in the
        latter. It raises RewardError where the score raises, takes longer than
        ``settings.score_timeout`` or is not finite. The record is left as it is.
    """

    def judge(record: TokenRecord, problem: Any) -> tuple[float, float]:
        own, scoring = dataclasses.replace(record), Scoring(score, settings)
        scoring.submit(problem, [own])
        scoring.finish()
        assert own.score is not None and own.reward is not None
        return own.score, own.reward

    return judge


def _penalty(record: TokenRecord, settings: LanguageSettings) -> float:
    if settings.overlong_buffer is None:
        return 0.0
    return rl.overlong_penalty(
        len(record),
        longest=settings.max_new_tokens,
        buffer=settings.overlong_buffer,
        factor=settings.overlong_factor,
    )
