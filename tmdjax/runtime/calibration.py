"""The clip range of an objective, calibrated by a pass in exact arithmetic."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from tmdjax import rl
from tmdjax.core.types import Array, Params
from tmdjax.rl import TokenBatch
from tmdjax.runtime.packing import TokenObjective, UpdateBatch

TextLogProbs = Callable[[Params, TokenBatch], Array]
"""``(params, texts) -> log-probs [microbatch, sequence, token]`` of responses."""


class ClipCalibration:
    """Makes as many tokens be clipped as exact arithmetic would clip.

    An iteration that is due computes the ratios of its minibatches twice, in the
    arithmetic of training and in exact arithmetic (the shadow), each minibatch as its
    update meets it: under the weights before that update, around those before the
    first. The ratios of the first minibatch are 1 and say nothing. What is found holds
    from the next iteration on.
    """

    def __init__(self, objective: Any, log_probs: TextLogProbs, shadow: TextLogProbs):
        """Of an objective.

        Args:
            objective: a :class:`TokenObjective` with 'shadow' among its needs.
            log_probs: in the arithmetic of training.
            shadow: in exact arithmetic.
        """
        self._objective: Any = objective
        self._log_probs, self._shadow = log_probs, shadow
        self._log_ratio = jax.jit(jax.vmap(objective.log_ratio))

    def start(self) -> np.ndarray:
        """The clip range before anything is known: the objective's, float32 [2]."""
        return np.array(rl.check_clip_range(self._objective.clip_range), np.float32)

    def begin(
        self, iteration: int, params: Params, batches: Iterable[UpdateBatch]
    ) -> tuple[Iterable[UpdateBatch], list[Array]]:
        """The minibatches of an iteration, and what :meth:`see` needs of each.

        Args:
            iteration: from 0.
            params: before the first update.
            batches: in the order of the updates.

        Returns:
            The minibatches; and the shadow's log-probs of them, or an empty list where
            no calibration is due.
        """
        if iteration % self._objective.calibrate_every:
            return batches, []
        batches = list(batches)
        return batches, [self._shadow(params, batch.texts) for batch in batches]

    def see(
        self, params: Params, batch: UpdateBatch, before: Array
    ) -> tuple[np.ndarray, ...]:
        """Log-ratios of a minibatch twice, advantages, and which tokens count; [token].

        Args:
            params: before its update.
            batch: the minibatch.
            before: of :meth:`begin`.
        """
        ours = self._log_ratio(self._log_probs(params, batch.texts), batch)
        exact = self._log_ratio(
            self._shadow(params, batch.texts),
            dataclasses.replace(batch, proximal=before),
        )
        weight = np.asarray(batch.weight)
        advantage = np.broadcast_to(
            np.asarray(batch.advantage)[..., None], weight.shape
        )
        return tuple(np.ravel(x) for x in (ours, exact, advantage, weight > 0))

    def finish(
        self, seen: Iterable[tuple[np.ndarray, ...]], current: Array
    ) -> tuple[np.ndarray, dict[str, float]]:
        """The clip range from the next iteration on, and metrics.

        Args:
            seen: of :meth:`see`, of all minibatches but the first.
            current: clip range so far, float32 [2].

        Returns:
            float32 [2]; and which share of the tokens has no gradient under the
            objective's own clip range: 'negative_clipped' of those of negative
            advantage, 'positive_clipped' of the others, in the arithmetic of training,
            and with '_exact' after the name in that of the shadow.
        """
        ours, exact, advantage, live = map(np.concatenate, zip(*seen, strict=True))
        nominal = self._objective.clip_range
        found = rl.calibrate_clip_range(
            ours, exact, advantage, nominal, current=tuple(current), mask=live
        )
        told = {}
        for suffix, ratios in (("", ours), ("_exact", exact)):
            shares = rl.clipped_shares(ratios, advantage, nominal, mask=live)
            for name, share in zip(("negative", "positive"), shares):
                told[f"{name}_clipped{suffix}"] = share
        return np.array(found, np.float32), told


def check_calibration(objective: TokenObjective, updates: int) -> None:
    """Refuses to calibrate where no ratio moves.

    Args:
        objective: of an iteration; one that does not calibrate passes.
        updates: of an iteration, epochs x minibatches.

    Raises:
        ValueError: it calibrates, and there is a single update.
    """
    if "shadow" in objective.needs and updates < 2:
        raise ValueError(
            f"calibrate_every={getattr(objective, 'calibrate_every', '')} with one "
            f"update an iteration: its ratios are 1 and nothing is ever clipped; use "
            f"minibatches or epochs of 2 or more, or calibrate_every=0."
        )
