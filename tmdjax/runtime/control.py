"""The controller: what is asked for, what is trained on, and when.

It alone knows how far generation is ahead of training. It hands prompts to generators,
responses to scorers and batches to the trainer, and writes the account of every request
(:class:`tmdjax.runtime.TrajectoryStore`), so that what it knows survives it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from tmdjax import rl
from tmdjax.core.checks import brief, check_choice
from tmdjax.rl import TokenRecord
from tmdjax.runtime.executors import Message, Send, Step
from tmdjax.runtime.roles import Batch, Judged
from tmdjax.runtime.rounds import Group
from tmdjax.runtime.schedule import Schedule
from tmdjax.runtime.settings import Prompt
from tmdjax.runtime.staleness import capacity, is_stale, lag, spans_of, tokens_by_lag
from tmdjax.runtime.trajectories import TrajectoryStore


@dataclasses.dataclass
class _Group:
    """A prompt that was asked for and has been neither trained on nor discarded.

    Attributes:
        number: of the group.
        prompt: with its problem.
        records: by number, of responses that no generator has; those that could not be
            scored are taken out.
        away: numbers of those that a generator has.
        writer: that generator; meaningless without them.
        began: version of the oldest token that may be in it; None if there is none.
    """

    number: int
    prompt: Prompt
    records: dict[int, TokenRecord]
    away: set[int] = dataclasses.field(default_factory=set)
    writer: str = ""
    began: int | None = None

    @property
    def unfinished(self) -> list[TokenRecord]:
        return [record for record in self.records.values() if not record.finished]

    @property
    def whole(self) -> Group:
        """It as it trains, once all of it is written and scored; by number."""
        records = [self.records[number] for number in sorted(self.records)]
        return Group(self.prompt.problem, records)

    @property
    def oldest(self) -> int | None:
        """Version of the oldest token in ``records``."""
        first = [r.versions[0] for r in self.records.values() if r.versions]
        return min(first, default=None)


class Controller:
    """The worker 'control', see :mod:`tmdjax.runtime.roles` for its messages.

    The message 'stop' ends the run before its last update: an update that is under way
    is waited for, and what generators have written is kept in the account.
    """

    def __init__(
        self,
        schedule: Schedule,
        store: TrajectoryStore,
        prompt_of: Callable[[int], Prompt | None],
        generators: Sequence[str],
        scorers: Sequence[str],
        *,
        trainer: str = "train",
        accept: Callable[[Sequence[float]], bool] = lambda scores: True,
    ):
        """Goes on from an account.

        Args:
            schedule: the numbers.
            store: the account, restored to the weights that the trainer begins with;
                nobody else writes it.
            prompt_of: the prompt of a group by its number, from 0; the same whenever
                asked again; None where there are no more. Response j to it is request
                ``group samples + j``, by which its randomness is keyed.
            generators: names of the workers that write, at least one.
            scorers: of those that judge, at least one.
            trainer: of the one that trains.
            accept: whether a group may train, by the scores of its responses, without
                penalties, such as :func:`tmdjax.rl.is_informative`; one that may not is
                discarded.

        Raises:
            ValueError: no generator or no scorer, or an account of other prompts or of
                another number of responses to each.
        """
        if not generators or not scorers:
            raise ValueError(
                f"generators={list(generators)} and scorers={list(scorers)}: name at "
                f"least one of each."
            )
        self._schedule, self._store, self._prompt_of = schedule, store, prompt_of
        self._trainer, self._accept = trainer, accept
        self._under_way = dict.fromkeys(generators, 0)  # responses
        self._judging = dict.fromkeys(scorers, 0)
        self._aborts = 0  # that no generator has answered yet
        self._open: dict[int, _Group] = {}
        self._complete: dict[int, _Group] = {}  # they may train
        self._waiting: set[int] = set()  # of the open: those to hand out
        self._blank: set[int] = set()  # of the waiting: those without a token
        self._written: set[int] = set()  # of the open: those that are only judged
        self._trained: set[int] = set()
        self._version: int | None = None
        self._is_training = self._is_ending = self._no_more_prompts = False
        self._next = 0
        self._handlers = {
            "weights": self._weights,
            "ended": self._ended,
            "judged": self._judged,
            "aborted": self._aborted,
            "stop": self._end,
        }
        self._load()

    def _load(self) -> None:
        """Takes over what the account has of earlier runs."""
        samples = self._schedule.samples
        for known in self._store.select():
            number, group = known.number, known.group
            if number // samples != group:
                raise ValueError(
                    f"request {number} is one of group {group} in the account, so not "
                    f"of samples={samples} responses to each prompt; go on with the "
                    f"settings that it was begun with."
                )
            self._next = max(self._next, group + 1)
            if known.state == "consumed":
                self._trained.add(group)
            if known.state in ("consumed", "discarded"):
                continue
            if group not in self._open:
                self._open[group] = _Group(group, self._prompt(group), {})
            prompt = self._open[group].prompt
            record = _blank(number, group, prompt)
            if known.length and self._store.folder is not None:
                stored = self._store.arrays(number)["record"]
                (record,) = rl.unpack_records(stored)
                if record.prompt != tuple(prompt.tokens):
                    raise ValueError(
                        f"request {number} answers {brief(record.prompt)}, but the "
                        f"prompt of group {group} is now {brief(prompt.tokens)}; give "
                        f"the same prompts whenever asked again."
                    )
                record.cut(known.length)
            elif known.length:
                raise ValueError(
                    f"request {number} was written in part, but its tokens are gone "
                    f"with the run that had its account in memory; give the store a "
                    f"folder, or begin with an empty one."
                )
            record.status = record.status if known.state in _FINISHED else "aborted"
            if known.state in _FINISHED:
                record.score, record.reward = known.score, known.reward
            self._open[group].records[number] = record

    def _go_on(self) -> list[Send]:
        """Goes on with what was taken over, now that weights have come."""
        for group in list(self._open.values()):
            self._look_at(group)
        records = [r for group in self._open.values() for r in group.records.values()]
        return [self._judge(r) for r in records if r.finished and r.reward is None]

    def _prompt(self, group: int) -> Prompt:
        prompt = self._prompt_of(group)
        if prompt is None:
            raise ValueError(
                f"the account has requests of group {group}, for which there is no "
                f"prompt any more; give the same prompts whenever asked again."
            )
        return prompt

    def __call__(self, message: Message | None) -> Step | None:
        """One step: what a message changes, and what follows from that."""
        if message is None:
            return None
        check_choice("message", message.kind, self._handlers)
        notes, numbers = {}, []
        with self._store.transaction():
            sends = self._handlers[message.kind](message)
            if batch := self._full_batch():
                records = [r for group in batch.groups for r in group.records]
                numbers = [record.number for record in records]
                notes = _staleness(records, batch.version)
                sends.append(Send(self._trainer, "batch", batch))
                if self._schedule.when_full != "continue":
                    sends += self._abort_all()
            sends += self._hand_out()
        return Step(
            what="batch" if numbers else message.kind,
            sends=sends,
            requests=numbers,
            version=self._version,
            notes=notes | self._notes(),
            last=self._is_ending and not self._is_training and not self._aborts,
        )

    def _weights(self, message: Message) -> list[Send]:
        params, version = message.body
        trained = len(self._trained)
        if trained != version * self._schedule.batch:
            raise ValueError(
                f"the trainer has weights of version {version}, but the account says "
                f"that {trained} groups were trained on, {self._schedule.batch} an "
                f"update; restore both to one checkpoint (TrajectoryStore.restore)."
            )
        follow = self._go_on if self._version is None else self._drop_stale
        self._version, self._is_training = version, False
        sends = [Send(to, "weights", (params, version)) for to in self._under_way]
        if version >= self._schedule.updates:
            return sends + self._end(message)
        return sends + follow()

    def _drop_stale(self) -> list[Send]:
        """Discards what is too old, and takes back what may be."""
        sends = []
        for group in [*self._open.values(), *self._complete.values()]:
            if not self._is_stale(group.began):
                continue
            if group.away:
                self._aborts += 1
                sends.append(Send(group.writer, "abort", sorted(group.away)))
            else:
                self._discard(group, "stale")
        return sends

    def _is_stale(self, began: int | None) -> bool:
        """Whether a token of this version would be too old where it trains now."""
        spans = [] if began is None else [(began, 1)]
        return is_stale(spans, self._now, self._schedule.eta)

    @property
    def _now(self) -> int:
        """Version of the weights; before the first nothing is judged or discarded."""
        assert self._version is not None
        return self._version

    def _ended(self, message: Message) -> list[Send]:
        sends = []
        for record in message.body:
            group = self._take_back(message.sender, record)
            if group is not None:
                self._write(record)
                sends.append(self._judge(record))
                self._look_at(group)
        return sends

    def _take_back(self, worker: str, record: TokenRecord) -> _Group | None:
        """The group of a record that a generator had; None if it had it no more."""
        group = self._open.get(record.group)
        if group is None or record.number not in group.away:
            return None
        self._under_way[worker] -= 1
        group.away.remove(record.number)
        group.records[record.number] = record
        return group

    def _write(self, record: TokenRecord) -> None:
        arrays = None
        if self._store.folder is not None:
            arrays = {"record": rl.pack_records([record])}
        self._store.write(
            record.number,
            spans_of(record.versions),
            finished=record.finished,
            arrays=arrays,
        )

    def _judge(self, record: TokenRecord) -> Send:
        scorer = min(self._judging, key=lambda name: self._judging[name])
        self._judging[scorer] += 1
        return Send(scorer, "judge", (record, self._open[record.group].prompt.problem))

    def _judged(self, message: Message) -> list[Send]:
        judged: Judged = message.body
        self._judging[message.sender] -= 1
        group = self._open.get(judged.group)
        if group is None or judged.number not in group.records:
            return []  # it was discarded meanwhile
        record = group.records[judged.number]
        if judged.score is None or judged.reward is None:
            reason = f"no reward: {judged.error}"
            self._store.discard([record.number], self._now, reason)
            del group.records[record.number]
        else:
            record.score, record.reward = judged.score, judged.reward
            self._store.score(record.number, judged.score, judged.reward)
        self._look_at(group)
        return []

    def _aborted(self, message: Message) -> list[Send]:
        self._aborts -= 1
        touched: dict[int, _Group] = {}
        for record in message.body:
            group = self._take_back(message.sender, record)
            if group is not None:
                touched[group.number] = group
                if record.tokens:
                    self._write(record)
        for group in touched.values():
            self._look_at(group)
            discards = self._schedule.when_full == "discard" and not self._is_ending
            if discards and group.number in self._open:
                self._discard(group, "unfinished")
        return []

    def _look_at(self, group: _Group) -> None:
        """Notes what an open group needs next."""
        if group.away:
            return
        group.began = group.oldest
        if self._is_stale(group.began):
            self._discard(group, "stale")
        elif not group.records:  # none could be scored
            del self._open[group.number]
            self._written.discard(group.number)
        elif group.unfinished:
            self._waiting.add(group.number)
            if group.began is None:
                self._blank.add(group.number)
        elif any(record.reward is None for record in group.records.values()):
            self._written.add(group.number)
        elif self._accept(group.whole.scores):
            self._complete[group.number] = self._open.pop(group.number)
            self._written.discard(group.number)
        else:
            self._discard(group, "not accepted")

    def _discard(self, group: _Group, reason: str) -> None:
        self._store.discard(list(group.records), self._now, reason)
        self._open.pop(group.number, None)
        self._complete.pop(group.number, None)
        for numbers in (self._waiting, self._blank, self._written):
            numbers.discard(group.number)

    def _full_batch(self) -> Batch | None:
        """The oldest groups that may train, once they are enough and it is time."""
        enough = len(self._complete) >= self._schedule.batch
        if not enough or self._version is None or self._is_training or self._is_ending:
            return None
        by_age = sorted(self._complete.values(), key=lambda g: (g.began or 0, g.number))
        chosen = sorted(g.number for g in by_age[: self._schedule.batch])
        groups = [self._complete.pop(number).whole for number in chosen]
        numbers = [record.number for group in groups for record in group.records]
        self._store.consume(numbers, self._version)
        self._trained.update(chosen)
        self._is_training = True
        return Batch(self._version, groups)

    def _abort_all(self) -> list[Send]:
        busy = [name for name, count in self._under_way.items() if count]
        self._aborts += len(busy)
        return [Send(name, "abort") for name in busy]

    def _end(self, message: Message) -> list[Send]:
        del message
        sends = [] if self._is_ending else self._abort_all()
        self._is_ending = True
        return sends

    @property
    def _capacity(self) -> float:
        """How many more groups may be begun.

        Those without a token are yet to be begun: after a restore there may be more of
        them than the weights allow, which were asked for by later ones.
        """
        return capacity(
            self._version or 0,
            len(self._trained) + len(self._complete),
            len(self._open) - len(self._blank),
            batch=self._schedule.batch,
            ahead=self._schedule.most_ahead,
        )

    @property
    def _is_paused(self) -> bool:
        """Whether generators stand still until the update is done."""
        stops = self._schedule.when_full != "continue"
        return stops and (self._is_training or self._aborts > 0)

    def _hand_out(self) -> list[Send]:
        """Responses to generators with room; first those that were asked for before."""
        if self._version is None or self._is_ending or self._is_paused:
            return []
        handed: dict[str, list[TokenRecord]] = {}
        waiting = sorted(self._waiting, reverse=True)
        while True:
            worker = min(self._under_way, key=lambda name: self._under_way[name])
            if self._under_way[worker] >= self._schedule.slots:
                break
            while waiting and waiting[-1] in self._blank and self._capacity < 1:
                waiting.pop()  # its turn comes with later weights
            group = self._open[waiting.pop()] if waiting else self._fresh()
            if group is None:
                break
            self._waiting.discard(group.number)
            self._blank.discard(group.number)
            group.writer = worker
            group.began = self._version if group.began is None else group.began
            for record in group.unfinished:
                del group.records[record.number]
                group.away.add(record.number)
                self._under_way[worker] += 1
                handed.setdefault(worker, []).append(record)
        limit = self._schedule.max_new_tokens
        return [Send(to, "write", (records, limit)) for to, records in handed.items()]

    def _fresh(self) -> _Group | None:
        """A group that is asked for now, if one may be and there is a prompt."""
        if self._capacity < 1 or self._no_more_prompts:
            return None
        number, samples = self._next, self._schedule.samples
        prompt = self._prompt_of(number)
        if prompt is None:
            self._no_more_prompts = True
            return None
        self._next += 1
        numbers = range(number * samples, (number + 1) * samples)
        self._store.submit(numbers, number)
        records = {n: _blank(n, number, prompt) for n in numbers}
        self._open[number] = _Group(number, prompt, records)
        return self._open[number]

    def _notes(self) -> dict[str, Any]:
        """Why each role waits from now on, and the counts behind it."""
        under_way = sum(self._under_way.values())
        nothing_more = self._waiting <= self._blank and self._capacity < 1
        generate, train = "requests", "batch not full"
        if nothing_more:
            generate = "throttled"
            if under_way < self._schedule.slots * len(self._under_way):
                train = "straggler"
        if self._no_more_prompts:
            generate = "no more prompts"
        if len(self._complete) + len(self._written) >= self._schedule.batch:
            train = "scores"
        if self._is_paused:
            generate = "training"
        if self._version is None:
            generate = "weights"
        if self._is_ending:
            generate = train = "end"
        return {
            "waits": {"generate": generate, "train": train, "reward": "responses"},
            "groups": {"open": len(self._open), "complete": len(self._complete)},
            "responses": under_way,
        }


_FINISHED = ("done", "scored")


def _blank(number: int, group: int, prompt: Prompt) -> TokenRecord:
    """A record that nothing was written to; an engine begins it like an aborted one."""
    return TokenRecord(
        number=number,
        group=group,
        prompt=tuple(prompt.tokens),
        status="aborted",
        segments=0,
    )


def _staleness(records: Iterable[TokenRecord], version: int) -> dict[str, Any]:
    """Of a batch, for the log: tokens by lag, and mean lags of its responses."""
    spans = [spans_of(record.versions) for record in records]
    by_lag = tokens_by_lag(spans, version)
    lags = [lag(each, version) for each in spans]
    return {
        "lags": {str(behind): count for behind, count in by_lag.items()},
        "in_flight": float(np.mean([each.in_flight for each in lags])),
        "in_queue": float(np.mean([each.in_queue for each in lags])),
    }
