"""What generation leaves for the update: a record a response, and batches of them.

Log-probs, masks and versions are aligned with the token they belong to, never shifted.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import struct

from tmdjax.core.checks import check_choice, check_count
from tmdjax.core.types import ArrayLike
from tmdjax.rl.bin_packing import first_fit_decreasing

STATUSES = ("running", "stop", "length", "aborted")
ROUNDING = 1e-4
"""A log-prob may be so far above 0."""


class DoesNotFitError(ValueError):
    """Texts that do not fit into the rows they were to be packed into."""


@dataclasses.dataclass(kw_only=True)
class TokenRecord:
    """One response to one prompt, on the host.

    Attributes:
        number: identifies the request; its randomness is keyed by this number.
        group: number of the prompt; responses to one prompt share it.
        prompt: token ids.
        tokens: ids of the response so far, over all its segments.
        log_probs: one a token of the response, under the distribution that it was
            drawn from.
        versions: one a token of the response, of the weights that drew it.
        status: 'running', or how it ended: by a 'stop' token, at its largest 'length',
            'aborted' (it may be resumed).
        segments: how many times it was handed to an engine.
        kv_mixed: whether tokens were drawn from keys and values of older weights.
        score: of the finished response, as the scorer gave it, or None.
        reward: what is learned from: the score, with penalties; or None.
        question: the prompt that the group shares, where worked examples stand before
            it in ``prompt``; None where it is ``prompt``.
    """

    number: int
    group: int
    prompt: tuple[int, ...]
    tokens: list[int] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)
    status: str = "running"
    segments: int = 1
    kv_mixed: bool = False
    score: float | None = None
    reward: float | None = None
    question: tuple[int, ...] | None = None

    def __len__(self) -> int:
        """Number of tokens in the response."""
        return len(self.tokens)

    @property
    def own_prompt(self) -> tuple[int, ...]:
        """The prompt that its group shares, without examples before it."""
        return self.prompt if self.question is None else self.question

    @property
    def finished(self) -> bool:
        """Whether it ended by itself or at its length."""
        return self.status in ("stop", "length")

    def extend(
        self, tokens: Sequence[int], log_probs: Sequence[float], version: int
    ) -> None:
        """Appends tokens drawn by one version of the weights."""
        self.tokens += tokens
        self.log_probs += log_probs
        self.versions += [version] * len(tokens)

    def cut(self, length: int) -> None:
        """Leaves the first tokens of the response alone, ``length`` of them."""
        for values in (self.tokens, self.log_probs, self.versions):
            del values[length:]

    def copy(self) -> "TokenRecord":
        """Another record of the same, with lists of its own."""
        return dataclasses.replace(
            self,
            tokens=[*self.tokens],
            log_probs=[*self.log_probs],
            versions=[*self.versions],
        )

    def check(self, *, scored: bool = False) -> None:
        """Refuses a record whose parts do not fit together.

        Args:
            scored: whether it must have a reward, and a finite one.

        Raises:
            ValueError: lengths that differ, versions that fall, a log-prob that is no
                finite number <= 0 (rounding apart), an unknown status, an empty prompt,
                or no reward where there must be one.
        """
        check_choice("status", self.status, STATUSES)
        lengths = [len(x) for x in (self.tokens, self.log_probs, self.versions)]
        if len(set(lengths)) != 1:
            raise ValueError(
                f"record {self.number} has {lengths[0]} tokens, {lengths[1]} log-probs "
                f"and {lengths[2]} versions; every token needs one of each."
            )
        if not self.prompt:
            raise ValueError(f"record {self.number} has no prompt.")
        if any(a > b for a, b in zip(self.versions, self.versions[1:])):
            raise ValueError(
                f"record {self.number} has versions {self.versions}, which fall; "
                f"tokens are appended in the order they were drawn."
            )
        log_probs = np.asarray(self.log_probs, np.float64)
        bad = ~(np.isfinite(log_probs) & (log_probs <= ROUNDING))
        if bad.any():
            at = int(bad.argmax())
            raise ValueError(
                f"record {self.number} has log-prob {self.log_probs[at]} at token "
                f"{at}, which weights of version {self.versions[at]} drew; a token "
                f"that was drawn has a finite one, <= 0. Look for weights that are not "
                f"finite (models.first_non_finite), or compute rollouts in more bits."
            )
        if scored and (self.reward is None or not math.isfinite(self.reward)):
            raise ValueError(
                f"record {self.number} has reward {self.reward}; score it first, with "
                f"a finite number."
            )


def pack_records(records: Sequence[TokenRecord]) -> np.ndarray:
    """Records as an array that a checkpoint holds: JSON in bytes, uint8 [n].

    No record is an array without elements.
    """
    text = json.dumps([vars(record) for record in records])
    return np.frombuffer(text.encode() if records else b"", np.uint8)


def unpack_records(packed: ArrayLike) -> list[TokenRecord]:
    """The records of :func:`pack_records`, equal in every field."""
    found = json.loads(np.asarray(packed, np.uint8).tobytes() or "[]")
    for fields in found:
        for name in ("prompt", "question"):
            if fields.get(name) is not None:
                fields[name] = tuple(fields[name])
    return [TokenRecord(**fields) for fields in found]


@struct.dataclass
class TokenBatch:
    """Responses for one update: texts as a network reads them, and responses alone.

    Attributes:
        tokens: int32 [row, position]; several texts may share a row.
        positions: int32 [row, position], from 0 in every text.
        segments: int32 [row, position], from 1 in every row; 0 is padding.
        row: int32 [sequence], where each text stands.
        start: int32 [sequence], where its response begins.
        mask: bool [sequence, token], the tokens of the responses.
        log_prob: float32 [sequence, token], of the behaviour.
        version: int32 [sequence, token], -1 where masked out.
        group: int32 [sequence], 0 for padding.
        reward: float32 [sequence], 0 for padding.
    """

    tokens: Any
    positions: Any
    segments: Any
    row: Any
    start: Any
    mask: Any
    log_prob: Any
    version: Any
    group: Any
    reward: Any

    def responses(self, per_token: Any) -> Any:
        """[sequence, token] of an array [row, position]; garbage where masked out."""
        last = per_token.shape[1] - 1
        at = self.start[:, None] + np.arange(self.mask.shape[1])
        return per_token[self.row[:, None], at.clip(0, last)]


def batch_records(
    records: Sequence[TokenRecord],
    *,
    length: int,
    response_length: int,
    rows: int | None = None,
    sequences: int | None = None,
    pad: int = 0,
) -> TokenBatch:
    """A batch of fixed shape.

    Args:
        records: finished, with rewards.
        length: positions of a row; at least the longest text (prompt and response).
        response_length: positions of a response; at least the longest one.
        rows: how many rows texts are packed into, longest first into the first row
            with room; None gives each text its own.
        sequences: fixed number of sequences; the rest is padding. None means as many
            as there are.
        pad: token id of padding.

    Returns:
        numpy arrays.

    Raises:
        ValueError: no records, one that does not fit, is malformed, or has no reward,
            or rows or sequences that do not suffice.
    """
    check_count("length", length)
    check_count("response_length", response_length)
    if not records:
        raise ValueError("nothing to batch: give at least one record.")
    for record in records:
        record.check(scored=True)
        size = len(record.prompt) + len(record)
        if size > length or len(record) > response_length:
            raise ValueError(
                f"record {record.number} has {len(record.prompt)} + {len(record)} "
                f"tokens; the batch holds {length} in all and {response_length} of "
                f"the response: raise these, or lower max_new_tokens."
            )
    count = len(records) if sequences is None else check_count("sequences", sequences)
    if count < len(records):
        raise ValueError(f"{len(records)} records do not fit into sequences={count}.")
    places = _places(records, length, rows)
    height = count if rows is None else rows
    shape, response = (height, length), (count, response_length)
    batch = TokenBatch(
        tokens=np.full(shape, pad, np.int32),
        positions=np.zeros(shape, np.int32),
        segments=np.zeros(shape, np.int32),
        row=np.zeros(count, np.int32),
        start=np.zeros(count, np.int32),
        mask=np.zeros(response, bool),
        log_prob=np.zeros(response, np.float32),
        version=np.full(response, -1, np.int32),
        group=np.zeros(count, np.int32),
        reward=np.zeros(count, np.float32),
    )
    for i, (record, (row, begin, segment)) in enumerate(zip(records, places)):
        text = [*record.prompt, *record.tokens]
        where = slice(begin, begin + len(text))
        batch.tokens[row, where] = text
        batch.positions[row, where] = np.arange(len(text))
        batch.segments[row, where] = segment
        batch.row[i], batch.start[i] = row, begin + len(record.prompt)
        batch.mask[i, : len(record)] = True
        batch.log_prob[i, : len(record)] = record.log_probs
        batch.version[i, : len(record)] = record.versions
        batch.group[i], batch.reward[i] = record.group, record.reward
    return batch


def _places(
    records: Sequence[TokenRecord], length: int, rows: int | None
) -> list[tuple[int, int, int]]:
    """Row, first position and segment of every text."""
    if rows is None:
        return [(i, 0, 1) for i in range(len(records))]
    sizes = [len(record.prompt) + len(record) for record in records]
    found = first_fit_decreasing(sizes, length)
    if len(found) > check_count("rows", rows):
        raise DoesNotFitError(
            f"{len(records)} texts of {sum(sizes)} tokens do not fit into {rows} "
            f"rows of {length}; give more rows, or fewer texts a batch."
        )
    places: list[tuple[int, int, int]] = [(0, 0, 0)] * len(records)
    for row, members in enumerate(found):
        begin = 0
        for segment, i in enumerate(members, 1):
            places[i] = (row, begin, segment)
            begin += sizes[i]
    return places
