"""Records of an iteration as minibatches of fixed shape, weighed as a whole."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import struct

from tmdjax import rl
from tmdjax.core.types import Array
from tmdjax.rl import TokenBatch, TokenRecord
from tmdjax.runtime.settings import LanguageSettings

MIN_LENGTH = 32


@struct.dataclass
class UpdateBatch:
    """Responses of one microbatch.

    Attributes:
        texts: see :class:`tmdjax.rl.TokenBatch`.
        advantage: float32 [sequence].
        weight: float32 [sequence, token], of each token in the loss of the minibatch,
            see :func:`tmdjax.rl.aggregation_weights`.
        proximal: float32 [sequence, token], log-probs to clip around.
        reference: float32 [sequence, token], log-probs of the policy to stay near, or
            None.
        share: float32 scalar, 1 / tokens of the minibatch.
        as_written: bool [sequence], read as the rollout wrote it: behind the same
            prompt, by the weights before the update alone, and not from keys and values
            of older ones. Of these alone log-probs of rollout and training can be
            compared.
        calibrated: float32 [2], a clip range (low, high) that stands in the place of
            the objective's own, see :meth:`clip_range`; or None.
        version: int32 scalar, of the weights before the first update, where the
            proximal policy is estimated from it (``proximal`` then holds what the
            rollout recorded); else None.
        keep: bool [sequence, token], the tokens that train, where not all of them do;
            ``weight`` is 0 at the others. Else None.
    """

    texts: TokenBatch
    advantage: Any
    weight: Any
    proximal: Any
    reference: Any
    share: Any
    as_written: Any
    calibrated: Any = None
    version: Any = None
    keep: Any = None

    def clip_range(self, nominal: rl.ClipRange) -> rl.ClipRange:
        """Where ratios are clipped: the calibrated range, or the objective's own.

        Args:
            nominal: the objective's.
        """
        return nominal if self.calibrated is None else tuple(self.calibrated)


@runtime_checkable
class TokenObjective(Protocol):
    """What the update of a language model optimises, token by token."""

    @property
    def needs(self) -> tuple[str, ...]:
        """What the iteration must have for it.

        'proximal', log-probs that are not the behaviour's; 'reference', those of a
        policy to stay near; 'shadow', those of exact arithmetic, by which its clip
        range is calibrated at every ``calibrate_every``-th iteration.
        """
        ...

    @property
    def clip_range(self) -> Any:
        """Where ratios are clipped: the first one is checked by it, others counted."""
        ...

    @property
    def aggregation(self) -> str:
        """How tokens' losses become one, a mode of :func:`tmdjax.rl.aggregate`."""
        ...

    @property
    def length(self) -> int | None:
        """The constant length of an aggregation that divides by one.

        None takes the settings' max_new_tokens there.
        """
        ...

    def log_ratio(self, log_prob: Array, batch: "UpdateBatch") -> Array:
        """Logarithm of the clipped ratio, [sequence, token]; 0 where masked out."""
        ...

    def advantages(self, records: Sequence[TokenRecord]) -> Any:
        """Advantages of all responses of an iteration, [sequence].

        Groups may differ in size; whether one of a single response may train is the
        objective's to say.
        """
        ...

    def kept(self, proximal: Any, behaviour: Any, mask: Any) -> Any:
        """Which of all tokens of an iteration train, bool [sequence, token].

        None, where all that ``mask`` has do.
        """
        ...

    def loss(
        self, log_prob: Array, batch: "UpdateBatch"
    ) -> tuple[Array, dict[str, Array]]:
        """Loss and metrics of every token, [sequence, token]."""
        ...


def update_batches(
    records: Sequence[TokenRecord],
    objective: TokenObjective,
    settings: LanguageSettings,
    order: np.random.Generator,
    *,
    length: int,
    pad: int = 0,
    version: int | None = None,
    proximal: Callable[[TokenBatch], Array] | None = None,
    reference: Callable[[TokenBatch], Array] | None = None,
    calibrated: Array | None = None,
) -> Iterator[UpdateBatch]:
    """Minibatches for :func:`make_update`, [microbatch, ...] each.

    Texts are padded to the smallest power of two that holds the longest, so that
    programs are few; a microbatch that is not full is padded with texts that weigh
    nothing.

    Args:
        records: of an iteration, with rewards.
        objective: gives advantages and the aggregation.
        settings: sizes and rules.
        order: shuffles responses, anew in every epoch.
        length: the longest a text may be.
        pad: id of padding.
        version: of the weights before the update, by which ``as_written`` is decided,
            and from which ``settings.max_lag`` and settings.proximal='loglinear' count;
            None where these weights wrote all tokens.
        proximal: log-probs [microbatch, sequence, token] of stacked microbatches,
            for settings.proximal='recompute'; 'auto' recomputes where it is given.
        reference: the same of a reference policy, or None.
        calibrated: float32 [2], the clip range (low, high), or None for that of the
            objective.

    Raises:
        ValueError: fewer responses than minibatches, a response without a finite
            reward, a group with more than one prompt, no ``proximal`` or no ``version``
            where the settings ask for it, or no token that may train.
    """
    _check(records, settings, version)
    advantage = np.asarray(objective.advantages(records), np.float32)
    as_written = np.array(
        [
            not record.kv_mixed and (version is None or {*record.versions} <= {version})
            for record in records
        ]
    )
    if settings.train_prompt == "question":
        as_written &= [record.question is None for record in records]
        records = [
            dataclasses.replace(record, prompt=record.own_prompt, question=None)
            for record in records
        ]
    count, size = len(records), settings.microbatch
    longest = max(len(record.prompt) + len(record) for record in records)
    shape = {
        "length": min(_power_of_two(longest), length),
        "response_length": min(
            _power_of_two(max(map(len, records))), settings.max_new_tokens
        ),
        "pad": pad,
    }
    if settings.pack_rows is not None:
        shape |= {"length": length}

    def parts(which: np.ndarray, **rows: int) -> list[TokenBatch]:
        return [
            rl.batch_records(
                [records[i] for i in which[j : j + size]],
                sequences=size,
                **shape,
                **rows,
            )
            for j in range(0, len(which), size)
        ]

    def stacked(which: np.ndarray) -> TokenBatch:
        found = None
        if settings.pack_rows is not None:
            with contextlib.suppress(rl.DoesNotFitError):
                found = parts(which, rows=settings.pack_rows)
        return jax.tree.map(lambda *x: np.stack(x), *(found or parts(which)))

    def spread(values: np.ndarray, which: np.ndarray, like: np.ndarray) -> np.ndarray:
        """Values of some records, 0 for padding, in the shape of their microbatches."""
        found = np.zeros((like.shape[0] * size, *values.shape[1:]), values.dtype)
        found[: len(which)] = values[which]
        return found.reshape(like.shape)

    everything = stacked(np.arange(count))
    tokens = everything.mask.shape[-1]
    target = everything.log_prob
    if settings.proximal == "recompute" or (settings.proximal == "auto" and proximal):
        if proximal is None:
            raise ValueError(
                "settings.proximal='recompute' needs proximal=, which computes "
                "log-probs; give it, or use proximal='behaviour'."
            )
        target = np.asarray(proximal(everything))
    target, anchor = target.reshape(-1, tokens), None
    if reference is not None:
        anchor = np.asarray(reference(everything)).reshape(-1, tokens)
    norm = objective.length
    if norm is None and objective.aggregation == "seq-mean-token-sum-norm":
        norm = settings.max_new_tokens
    kept = _kept(records, everything, target, objective, settings, version)

    def minibatch(which: np.ndarray) -> UpdateBatch:
        texts = stacked(which)
        mask = texts.mask.reshape(-1, tokens)
        keep = None if kept is None else spread(kept, which, texts.mask)
        weight = rl.aggregation_weights(
            mask,
            objective.aggregation,
            length=norm,
            keep=None if keep is None else keep.reshape(mask.shape),
        )
        parts = len(texts.row)
        return UpdateBatch(
            texts=texts,
            advantage=spread(advantage, which, texts.group),
            weight=np.asarray(weight).reshape(texts.mask.shape),
            proximal=spread(target, which, texts.mask),
            reference=None if anchor is None else spread(anchor, which, texts.mask),
            share=np.full(parts, 1 / max(1, mask.sum()), np.float32),
            as_written=spread(as_written, which, texts.group),
            calibrated=None
            if calibrated is None
            else np.tile(np.asarray(calibrated, np.float32), (parts, 1)),
            version=np.full(parts, version, np.int32)
            if settings.proximal == "loglinear"
            else None,
            keep=keep,
        )

    return (
        minibatch(which)
        for _ in range(settings.epochs)
        for which in np.array_split(order.permutation(count), settings.minibatches)
    )


def check_log_linear(objective: TokenObjective, settings: LanguageSettings) -> None:
    """Refuses to estimate the proximal policy where its log-probs are needed.

    Args:
        objective: of an iteration.
        settings: of it; those without ``proximal='loglinear'`` pass.

    Raises:
        ValueError: the estimate, which follows from versions, is made during an update,
            but the objective chooses tokens or calibrates its clip range before; or
            prompts are read without the worked examples that log-probs were recorded
            behind, so that versions do not tell how far these are from the policy.
    """
    if settings.proximal != "loglinear":
        return
    chooses = getattr(objective, "max_second_moment", None) is not None
    for name, is_set in (
        ("max_second_moment", chooses),
        ("calibrate_every", "shadow" in objective.needs),
        ("train_prompt='question'", settings.train_prompt == "question"),
    ):
        if is_set:
            raise ValueError(
                f"{name} needs log-probs of the policy before the update, but "
                f"proximal='loglinear' estimates them while it goes on; use "
                f"proximal='recompute', or leave {name} at its default."
            )


def _kept(
    records: Sequence[TokenRecord],
    texts: TokenBatch,
    proximal: np.ndarray,
    objective: TokenObjective,
    settings: LanguageSettings,
    version: int | None,
) -> np.ndarray | None:
    """Which tokens of all records train, bool [sequence, token]; None where all do."""
    mask, behaviour, versions = (
        x.reshape(proximal.shape) for x in (texts.mask, texts.log_prob, texts.version)
    )
    keep = mask
    if settings.mask_truncated:
        whole = np.zeros((len(mask), 1), bool)
        whole[: len(records), 0] = [record.status != "length" for record in records]
        keep = keep & whole
    if settings.max_lag < math.inf:
        recent = keep & rl.within_lag(versions, version, settings.max_lag)
        if keep.any() and not recent.any():
            raise ValueError(
                f"no token of {len(records)} responses may train: the newest is of "
                f"version {versions[keep].max()}, more than max_lag={settings.max_lag} "
                f"behind the weights of version {version}. Raise max_lag, or lower eta "
                f"of the schedule."
            )
        keep = recent
    chosen = objective.kept(proximal, behaviour, keep)
    if chosen is not None:
        keep = np.asarray(chosen)
    return None if keep is mask else keep


def _check(
    records: Sequence[TokenRecord], settings: LanguageSettings, version: int | None
) -> None:
    counts = settings.max_lag < math.inf or settings.proximal == "loglinear"
    if counts and version is None:
        raise ValueError(
            f"max_lag={settings.max_lag} and proximal={settings.proximal!r} count from "
            f"the version of the weights before the update; give version=, or use "
            f"max_lag=math.inf and proximal='recompute'."
        )
    if len(records) < settings.minibatches:
        raise ValueError(
            f"{len(records)} responses do not fill minibatches={settings.minibatches}; "
            f"collect more, or lower it."
        )
    prompts: dict[int, tuple[int, ...]] = {}
    for record in records:
        record.check(scored=True)
        own = record.own_prompt
        if prompts.setdefault(record.group, own) != own:
            raise ValueError(
                f"group {record.group} holds responses to several prompts; number the "
                f"groups anew where rollouts are joined."
            )


def _power_of_two(n: int) -> int:
    return max(MIN_LENGTH, 1 << (n - 1).bit_length())
