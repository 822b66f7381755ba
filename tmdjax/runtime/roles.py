"""The workers that write, score and train; :mod:`tmdjax.runtime.control` directs them.

    control  -- write, abort, weights -->  generate  -- ended, aborted -->  control
    control  -- judge                 -->  reward    -- judged         -->  control
    control  -- batch                 -->  train     -- weights        -->  control

Each is a :data:`tmdjax.runtime.executors.Worker`: a function of one message at a time.
"""

import collections
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from tmdjax.core import trees
from tmdjax.core.checks import check_choice, check_count, first_few
from tmdjax.core.types import Params
from tmdjax.rl import TokenRecord
from tmdjax.runtime.events import CONTROL
from tmdjax.runtime.executors import Message, Send, Step
from tmdjax.runtime.rounds import Group

AMOUNTS = ("chunks", "slot_steps", "drawn", "prefilled")
"""Counts of an engine that a chunk of decoding costs by."""


class WritingEngine(Protocol):
    """What a generator needs of :class:`tmdjax.generation.Engine`."""

    version: int
    counts: collections.Counter[str]

    @property
    def active(self) -> int:
        """Texts in slots."""
        ...

    @property
    def queued(self) -> int:
        """Texts that wait for a slot."""
        ...

    def resume(self, record: TokenRecord, *, max_new_tokens: int) -> None:
        """Goes on with an aborted record, or begins one without tokens."""
        ...

    def advance(self) -> list[TokenRecord]:
        """Draws one chunk and returns the texts that ended in it."""
        ...

    def abort(self, numbers: Iterable[int] | None = None) -> list[TokenRecord]:
        """Stops some texts, or all, and returns their records."""
        ...

    def update_weights(
        self, params: Params, version: int, *, recompute: bool = True
    ) -> None:
        """Goes on with other weights."""
        ...


class Batch(NamedTuple):
    """What one update trains on.

    Attributes:
        version: of the weights that the update begins with.
        groups: responses to one prompt each, with rewards, in the order of their
            numbers.
    """

    version: int
    groups: Sequence[Group]


class Judged(NamedTuple):
    """What a scorer says of a response.

    Attributes:
        number: of the response.
        group: of its prompt.
        score: None where it failed.
        reward: what is learned from: the score with penalties; None where it failed.
        error: why it failed, or ''.
    """

    number: int
    group: int
    score: float | None
    reward: float | None
    error: str


class Generator:
    """Writes what it is handed, a chunk at a time.

    Messages: 'write' ``(records, max_new_tokens)``, aborted or without tokens;
    'weights' ``(params, version)``; 'abort' numbers, or None for all, which is answered
    by 'aborted' with the records. What ends is sent as 'ended', as soon as it does.
    """

    def __init__(
        self,
        engine: WritingEngine,
        *,
        interruptible: bool = True,
        recompute: bool = True,
    ):
        """Of an engine, which nobody else uses.

        Args:
            engine: without texts.
            interruptible: new weights are taken between two chunks, in the middle of
                texts; False first writes all that is under way to its end, and begins
                nothing else meanwhile.
            recompute: see :meth:`tmdjax.generation.Engine.update_weights`.
        """
        self._engine, self._recompute = engine, recompute
        self._interruptible = interruptible
        self._weights: tuple[Params, int] | None = None  # that wait to be taken
        self._layout: dict[str, str] | None = None  # of those that were taken
        self._held: list[tuple[TokenRecord, int]] = []  # until they are taken

    def __call__(self, message: Message | None) -> Step | None:
        """One step."""
        if message is None:
            return self._work()
        check_choice("message", message.kind, ("write", "weights", "abort"))
        if message.kind == "weights":
            self._weights = message.body
            if self._interruptible or not self._is_writing:
                return self._take_weights()
            return Step(what="drain", version=self._engine.version)
        if message.kind == "write":
            records, max_new_tokens = message.body
            self._held += [(record, max_new_tokens) for record in records]
            self._begin()
            numbers = [record.number for record in records]
            return Step(what="write", requests=numbers, version=self._engine.version)
        wanted = message.body
        found = self._engine.abort(wanted)
        found += [r for r, _ in self._held if wanted is None or r.number in wanted]
        gone = {record.number for record in found}
        self._held = [held for held in self._held if held[0].number not in gone]
        return Step(
            what="abort",
            sends=[Send(CONTROL, "aborted", found)],
            requests=sorted(gone),
            version=self._engine.version,
        )

    @property
    def _is_writing(self) -> bool:
        return bool(self._engine.active or self._engine.queued)

    def _begin(self) -> None:
        """Hands to the engine what is held, unless new weights wait."""
        if self._weights is None:
            for record, max_new_tokens in self._held:
                self._engine.resume(record, max_new_tokens=max_new_tokens)
            self._held = []

    def _work(self) -> Step | None:
        if self._weights is not None and not self._is_writing:
            return self._take_weights()
        if not self._is_writing:
            return None
        before = dict(self._engine.counts)
        ended = self._engine.advance()
        amounts = {n: self._engine.counts[n] - before.get(n, 0) for n in AMOUNTS}
        return Step(
            what="decode",
            sends=[Send(CONTROL, "ended", ended)] if ended else [],
            amounts=amounts,
            requests=[record.number for record in ended],
            version=self._engine.version,
        )

    def _take_weights(self) -> Step:
        assert self._weights is not None
        (params, version), self._weights = self._weights, None
        layout = trees.layout(params)
        if self._layout not in (None, layout):
            differing = sorted({*layout.items()} ^ {*self._layout.items()})
            raise ValueError(
                f"weights of version {version} are another tree than those before; "
                f"first differences: {first_few(f'{n} {x}' for n, x in differing)}. "
                f"Publish the same arrays, in shape and dtype, after every update."
            )
        self._layout = layout
        before = self._engine.counts["prefilled"]
        self._engine.update_weights(params, version, recompute=self._recompute)
        self._begin()
        prefilled = self._engine.counts["prefilled"] - before
        amounts = {"swaps": 1, "prefilled": prefilled}
        return Step(what="weights", amounts=amounts, version=version)


class Scorer:
    """Judges responses: 'judge' ``(record, problem)`` is answered by 'judged'."""

    def __init__(self, judge: Callable[[TokenRecord, Any], tuple[float, float]]):
        """Of a function ``(record, problem) -> (score, reward)``.

        Where it raises, or the record is malformed (a log-prob that is not finite, see
        :meth:`tmdjax.rl.TokenRecord.check`), that response is lost, and the message
        says why; the run goes on.
        """
        self._judge = judge

    def __call__(self, message: Message | None) -> Step | None:
        """One step."""
        if message is None:
            return None
        check_choice("message", message.kind, ("judge",))
        record, problem = message.body
        score = reward = None
        error = ""
        try:
            record.check()
            score, reward = map(float, self._judge(record, problem))
            if not (math.isfinite(score) and math.isfinite(reward)):
                raise ValueError(f"score {score} and reward {reward} are not finite")
        except Exception as fault:
            score = reward = None
            error = f"{type(fault).__name__}: {fault}"
        judged = Judged(record.number, record.group, score, reward, error)
        return Step(
            what="judge",
            sends=[Send(CONTROL, "judged", judged)],
            amounts={"responses": 1, "tokens": len(record)},
            requests=[record.number],
            notes={"error": error} if error else {},
        )


class Trainer:
    """Updates by batches: 'batch' is answered by 'weights' ``(params, version)``."""

    def __init__(
        self,
        publish: Callable[[], Params],
        learn: Callable[[Batch], Mapping[str, float]],
        version: int = 0,
        *,
        save: Callable[[], None] | None = None,
        save_every: int = 1,
    ):
        """Of the state that two functions share.

        Args:
            publish: what generators read of the parameters. It is called before the
                first batch and after each: arrays that no later update may change or
                give back.
            learn: all updates by a batch; gives metrics, which stand in the log.
            version: of the weights at first: how many batches they were trained on.
            save: writes a checkpoint. It is called after the weights were sent and
                their step was logged, so that generators need not wait for it; at the
                latest before the next batch. None saves nothing.
            save_every: batches from one call to the next, counted from version 0, >= 1.
        """
        self._publish, self._learn, self._version = publish, learn, version
        self._save, self._save_every = save, check_count("save_every", save_every)
        self._is_new, self._is_unsaved = True, False

    def __call__(self, message: Message | None) -> Step | None:
        """One step."""
        if message is None and self._is_unsaved:
            self._save_now()
            return Step(what="save", version=self._version)
        if message is None:
            if not self._is_new:
                return None
            self._is_new = False
            sends = [Send(CONTROL, "weights", (self._publish(), self._version))]
            return Step(what="publish", sends=sends, version=self._version)
        check_choice("message", message.kind, ("batch",))
        batch: Batch = message.body
        if batch.version != self._version:
            raise ValueError(
                f"a batch of version {batch.version} came to weights of version "
                f"{self._version}; restore the account of trajectories and the trainer "
                f"to one checkpoint."
            )
        self._save_now()
        records = [record for group in batch.groups for record in group.records]
        metrics = self._learn(batch)
        self._version += 1
        due = self._save is not None and self._version % self._save_every == 0
        self._is_unsaved = due
        return Step(
            what="learn",
            sends=[Send(CONTROL, "weights", (self._publish(), self._version))],
            amounts={
                "updates": 1,
                "tokens": sum(len(r.prompt) + len(r) for r in records),
            },
            requests=[record.number for record in records],
            version=batch.version,
            notes={"metrics": dict(metrics)},
        )

    def _save_now(self) -> None:
        if self._save is not None and self._is_unsaved:
            self._save()
        self._is_unsaved = False
