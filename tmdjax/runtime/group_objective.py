"""The objective of group-relative methods, with the switches that tell them apart.

:mod:`tmdjax.systems.grpo` has the published settings.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from tmdjax import rl
from tmdjax.core.checks import check_choice, check_count, check_range
from tmdjax.core.types import Array
from tmdjax.rl import TokenRecord, ratios
from tmdjax.rl.advantages import BASELINES, SCALES
from tmdjax.rl.importance_weights import METRICS, REJECTED_OVER
from tmdjax.rl.kl import KINDS
from tmdjax.runtime.packing import UpdateBatch

SURROGATES = ("token", "sequence", "cispo", "sapo")
CORRECTIONS = ("none", "truncate", "sequence", "reject")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupRelativeObjective:
    """A :class:`tmdjax.runtime.TokenObjective`.

    Attributes:
        surrogate: ratio of each 'token', or the geometric mean of the 'sequence'
            (GSPO), clipped; 'cispo' clips the weight and not the gradient; 'sapo' has
            a soft gate.
        clip_range: a number or (low, high), in units of that ratio.
        dual_clip: bound of the loss where the advantage is negative, > 1, or None.
        aggregation: of the tokens' losses, see :func:`tmdjax.rl.aggregate`.
        length: constant length of 'seq-mean-token-sum-norm'; None takes the largest
            response of the iteration, its max_new_tokens. Other modes take none.
        baseline: of advantages: 'mean' of the group, or 'leave_one_out'.
        scale: their unit: std of the 'group', of the 'batch', or 'none'.
        correction: weights of the proximal policy against the one that wrote, which
            multiply the loss: 'none', 'truncate' each token's ratio at the bounds, or
            the whole 'sequence's, or 'reject' what is beyond them.
        max_weight: the bound, > 0.
        min_weight: a lower bound, below max_weight, or None.
        reject_by: what is compared with the bounds of 'reject': the 'ratio', or an
            estimate 'k1', 'k2' or 'k3' of the KL from the policy that wrote to the
            proximal one, in nats, see :func:`tmdjax.rl.rejecting_weights`.
        reject_over: what is rejected: a 'token' by itself, or a whole response by the
            'mean', the 'sum' or the 'max' over its tokens. Of ratios these are of their
            logarithms, and each token then weighs the geometric mean of its response.
        max_second_moment: in the whole iteration, tokens of the largest squared
            log-ratios of these two policies do not train until the others' mean is
            below this, > 0 (M2PO, :func:`tmdjax.rl.within_second_moment`); None lets
            all train. It goes with any correction.
        kl_coefficient: >= 0, of the KL to a reference policy in the loss.
        kl_estimator: of it, see :func:`tmdjax.rl.kl_estimate`.
        calibrate_every: iterations from one calibration of the clip range to the next,
            the first of them calibrated; 0 for never. As many tokens are then clipped
            as exact arithmetic would clip by ``clip_range``:
            :func:`tmdjax.rl.calibrate_clip_range`.
    """

    surrogate: str = "token"
    clip_range: Any = 0.2
    dual_clip: float | None = None
    aggregation: str = "seq-mean-token-mean"
    length: int | None = None
    baseline: str = "mean"
    scale: str = "group"
    correction: str = "none"
    max_weight: float = 2.0
    min_weight: float | None = None
    reject_by: str = "ratio"
    reject_over: str = "token"
    max_second_moment: float | None = None
    kl_coefficient: float = 0.0
    kl_estimator: str = "k3"
    calibrate_every: int = 0

    def __post_init__(self) -> None:
        check_choice("surrogate", self.surrogate, SURROGATES)
        check_choice("correction", self.correction, CORRECTIONS)
        check_choice("aggregation", self.aggregation, rl.AGGREGATIONS)
        check_range("kl_coefficient", self.kl_coefficient, 0)
        rl.check_clip_range(self.clip_range)
        check_range("max_weight", self.max_weight, 0, math.inf, open_low=True)
        check_choice("reject_by", self.reject_by, METRICS)
        check_choice("reject_over", self.reject_over, ("token", *REJECTED_OVER))
        for name, off in (("reject_by", "ratio"), ("reject_over", "token")):
            value = getattr(self, name)
            if value != off and self.correction != "reject":
                raise ValueError(
                    f"{name}={value!r} has no meaning for correction="
                    f"{self.correction!r}; use {off!r}, or correction='reject'."
                )
        if self.min_weight is not None:
            least = 0 if self.reject_by == "ratio" else -math.inf
            between = least, self.max_weight
            check_range("min_weight", self.min_weight, *between, open_high=True)
        if self.max_second_moment is not None:
            bound = self.max_second_moment
            check_range("max_second_moment", bound, 0, open_low=True)
        check_choice("baseline", self.baseline, BASELINES)
        check_choice("scale", self.scale, SCALES)
        check_choice("kl_estimator", self.kl_estimator, KINDS)
        if self.dual_clip is not None:
            check_range("dual_clip", self.dual_clip, 1, open_low=True)
        if self.length is not None:
            check_range("length", self.length, 0, open_low=True)
            if self.aggregation != "seq-mean-token-sum-norm":
                raise ValueError(
                    f"length={self.length} with aggregation={self.aggregation!r}: only "
                    f"'seq-mean-token-sum-norm' divides by a length; use None."
                )
        check_count("calibrate_every", self.calibrate_every, 0)
        for name, off in (("dual_clip", None), ("calibrate_every", 0)):
            value = getattr(self, name)
            if value != off and self.surrogate not in ("token", "sequence"):
                raise ValueError(
                    f"{name}={value} has no meaning for surrogate={self.surrogate!r}; "
                    f"use {off}."
                )

    @property
    def needs(self) -> tuple[str, ...]:
        """What its correction, its KL term and its calibration read."""
        compares = self.correction != "none" or self.max_second_moment is not None
        found = {
            "proximal": compares,
            "reference": self.kl_coefficient > 0,
            "shadow": self.calibrate_every > 0,
        }
        return tuple(name for name, needed in found.items() if needed)

    def log_ratio(self, log_prob: Array, batch: UpdateBatch) -> Array:
        """Logarithm of the clipped ratio, [sequence, token]; 0 where masked out."""
        mask = batch.texts.mask
        if self.surrogate == "sequence":
            return rl.sequence_log_ratio(log_prob, batch.proximal, mask)
        return ratios.log_ratio(log_prob, batch.proximal, mask)

    def advantages(self, records: Sequence[TokenRecord]) -> Array:
        """Advantages, float32 [sequence]; 0 where a group's rewards are equal."""
        group = np.array([record.group for record in records])
        return rl.group_advantages(
            jnp.asarray([record.reward for record in records], jnp.float32),
            jnp.asarray(group),
            num_groups=int(group.max()) + 1,
            baseline=self.baseline,
            scale=self.scale,
        )

    def kept(self, proximal: Array, behaviour: Array, mask: Array) -> Array | None:
        """The tokens of an iteration that train, bool [sequence, token], or None."""
        if self.max_second_moment is None:
            return None
        return rl.within_second_moment(
            proximal, behaviour, mask, threshold=self.max_second_moment
        )

    def loss(
        self, log_prob: Array, batch: UpdateBatch
    ) -> tuple[Array, dict[str, Array]]:
        """Loss and metrics of every token, [sequence, token]."""
        mask, proximal = batch.texts.mask, batch.proximal
        clip_range = batch.clip_range(self.clip_range)
        own, options = log_prob, {"clip_range": clip_range, "mask": mask}
        if self.surrogate == "cispo":
            loss = rl.clipped_policy_gradient(
                log_prob, proximal, batch.advantage, **options
            )
        elif self.surrogate == "sapo":
            loss = rl.sigmoid_surrogate(log_prob, proximal, batch.advantage, mask=mask)
        else:
            if self.surrogate == "sequence":
                log_prob = self.log_ratio(log_prob, batch)
                proximal = jnp.zeros_like(log_prob)
            loss = rl.clipped_surrogate(
                log_prob,
                proximal,
                batch.advantage,
                dual_clip=self.dual_clip,
                **options,
            )
        metrics = {}
        if self.correction != "none":
            weight = self._weights(batch)
            loss, metrics = loss * weight, {"behaviour_weight": weight}
        if self.kl_coefficient:
            if batch.reference is None:
                raise ValueError(
                    f"kl_coefficient={self.kl_coefficient} needs a reference policy; "
                    f"give make_iteration(reference=params), or use 0."
                )
            kl = rl.kl_estimate(own, batch.reference, self.kl_estimator, mask=mask)
            loss, metrics = loss + self.kl_coefficient * kl, metrics | {"kl": kl}
        return loss, metrics

    def _weights(self, batch: UpdateBatch) -> Array:
        given = batch.proximal, batch.texts.log_prob, batch.texts.mask
        if self.correction == "reject":
            return rl.rejecting_weights(
                *given,
                low=self.min_weight,
                high=self.max_weight,
                metric=self.reject_by,
                reduction=None if self.reject_over == "token" else self.reject_over,
            )
        is_whole = self.correction == "sequence"
        weights = rl.sequence_weights if is_whole else rl.truncated_weights
        return weights(*given, low=self.min_weight or 0.0, high=self.max_weight)
