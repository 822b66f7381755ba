"""The controller: what is asked for, what is trained on, and when.

It alone knows how far generation is ahead of training. It hands prompts to generators,
responses to scorers and batches to the trainer. What is known of the groups it decides
about stands in :mod:`tmdjax.runtime.groups`, which writes the account of every request
(:class:`tmdjax.runtime.TrajectoryStore`), so that it survives the controller.
"""

import collections
import math
from collections.abc import Callable, Sequence
from typing import Any

from tmdjax.core.checks import check_choice, check_count
from tmdjax.rl import TokenRecord
from tmdjax.runtime.cohorts import Cohorts
from tmdjax.runtime.executors import Message, Send, Step
from tmdjax.runtime.executors.deaths import AGAIN, LOST
from tmdjax.runtime.groups import NOT_ACCEPTED, Groups, OpenGroup
from tmdjax.runtime.roles import Batch, Judged
from tmdjax.runtime.rounds import Planner, histogram_of_scores
from tmdjax.runtime.schedule import Schedule
from tmdjax.runtime.settings import Prompt
from tmdjax.runtime.staleness import capacity, is_stale, notes_of_batch
from tmdjax.runtime.trajectories import TrajectoryStore


class Controller:
    """The worker 'control', see :mod:`tmdjax.runtime.roles` for its messages.

    The message 'stop' ends the run before its last update: an update that is under way
    is waited for, and what generators have written is kept in the account.

    A generator or scorer that dies ('lost') is made anew ('again'), see
    :mod:`tmdjax.runtime.executors.deaths`; the death of the trainer ends the run.
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
        least_scored: int = 1,
        planner: Planner | None = None,
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
            least_scored: a group of which fewer responses than these could be scored is
                discarded, >= 1. Where fewer were asked for, all of them must be.
            planner: how many responses each prompt gets, in ``schedule.rounds``; None
                asks for ``schedule.samples`` of each, at once. ``schedule.batch``
                prompts in a row are planned together; once one of them is begun, the
                others are whatever the schedule lets be ahead. Batches are formed of
                groups of any of these.

        Raises:
            ValueError: no generator or no scorer; a planner that shows worked examples;
                several rounds without one; or an account of other prompts or of other
                numbers of responses to each.
        """
        if not generators or not scorers:
            raise ValueError(
                f"generators={list(generators)} and scorers={list(scorers)}: name at "
                f"least one of each."
            )
        self._schedule, self._store = schedule, store
        cohorts = Cohorts(schedule, prompt_of, planner)
        self._groups = Groups(store, schedule, prompt_of, cohorts)
        self._trainer, self._accept = trainer, accept
        self._least_scored = check_count("least_scored", least_scored)
        self._under_way = dict.fromkeys(generators, 0)  # responses
        self._judging: dict[str, dict[int, TokenRecord]] = {s: {} for s in scorers}
        # by generator, those that it has not answered yet
        self._aborts: collections.Counter[str] = collections.Counter()
        self._due: set[int] = set()  # groups that the next batch waits for
        self._rejected: list[float] = []  # mean scores, since a group was accepted
        self._unscored = 0  # responses, since one was scored
        self._version: int | None = None
        self._params: Any = None  # of that version, for a generator that is made anew
        self._is_training = self._is_ending = False
        self._handlers = {
            "weights": self._weights,
            "ended": self._ended,
            "judged": self._judged,
            "aborted": self._aborted,
            LOST: self._lost,
            "stop": self._end,
        }

    def _go_on(self) -> list[Send]:
        """Goes on with what was taken over, now that weights have come."""
        groups = list(self._groups.open.values())
        records = [r for group in groups for r in group.records.values()]
        unjudged = [r for r in records if r.finished and r.reward is None]
        sends = [send for group in groups for send in self._look_at(group)]
        still = [r for r in unjudged if r.group in self._groups.open]
        return sends + [self._judge(record) for record in still]

    def __call__(self, message: Message | None) -> Step | None:
        """One step: what a message changes, and what follows from that."""
        if message is None:
            return None
        check_choice("message", message.kind, self._handlers)
        notes, numbers = {}, []
        with self._store.transaction():
            sends = self._handlers[message.kind](message)
            if self._groups.between:
                for group in self._groups.next_rounds(self._now):
                    sends += self._look_at(group)
            if batch := self._full_batch():
                records = [r for group in batch.groups for r in group.records]
                numbers = [record.number for record in records]
                versions = [record.versions for record in records]
                notes = notes_of_batch(versions, batch.version, self._schedule.eta)
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
            last=self._is_ending and not self._is_training and not self._aborts.total(),
        )

    def _weights(self, message: Message) -> list[Send]:
        params, version = message.body
        trained = self._groups.trained
        if trained != version * self._schedule.batch:
            raise ValueError(
                f"the trainer has weights of version {version}, but the account says "
                f"that {trained} groups were trained on, {self._schedule.batch} an "
                f"update; restore both to one checkpoint (TrajectoryStore.restore)."
            )
        follow = self._go_on if self._version is None else self._look_again
        self._version, self._params, self._is_training = version, params, False
        sends = [Send(to, "weights", (params, version)) for to in self._under_way]
        if version >= self._schedule.updates:
            return sends + self._end(message)
        return sends + follow()

    def _look_again(self) -> list[Send]:
        """What later weights change for the groups that are there."""
        sends = self._drop_stale()
        for number in sorted(self._groups.waiting):
            sends += self._look_at(self._groups.open[number])
        return sends

    def _drop_stale(self) -> list[Send]:
        """Discards what is too old, and takes back what may be."""
        sends = []
        for group in [*self._groups.open.values(), *self._groups.complete.values()]:
            if not self._is_stale(group.began):
                continue
            if group.away:
                self._aborts[group.writer] += 1
                sends.append(Send(group.writer, "abort", sorted(group.away)))
            else:
                self._discard(group, "stale")
        return sends

    def _is_stale(self, began: int | None) -> bool:
        """Whether a token of this version is too old for its group to train now."""
        if self._schedule.on_stale != "drop":
            return False
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
                self._groups.write(record)
                sends.append(self._judge(record))
                sends += self._look_at(group)
        return sends

    def _take_back(self, worker: str, record: TokenRecord) -> OpenGroup | None:
        """The group of a record that a generator had; None if it had it no more."""
        group = self._groups.take_back(worker, record)
        if group is not None:
            self._under_way[worker] -= 1
        return group

    def _judge(self, record: TokenRecord) -> Send:
        scorer = min(self._judging, key=lambda name: len(self._judging[name]))
        self._judging[scorer][record.number] = record
        problem = self._groups.open[record.group].prompt.problem
        return Send(scorer, "judge", (record, problem))

    def _judged(self, message: Message) -> list[Send]:
        judged: Judged = message.body
        self._judging[message.sender].pop(judged.number, None)
        self._unscored = self._unscored + 1 if judged.score is None else 0
        if self._unscored >= self._schedule.max_unscored:
            raise RuntimeError(
                f"max_unscored={self._schedule.max_unscored} responses in a row could "
                f"not be scored, at last {judged.number}: {judged.error}. Mend that."
            )
        group = self._groups.judge(judged, self._now)
        return [] if group is None else self._look_at(group)

    def _lost(self, message: Message) -> list[Send]:
        """Has a worker made anew that died, and does without what it held.

        A generator's responses are again what they were when it was handed them. Of a
        scorer's, the one that it was at cannot be scored: it may be what killed it.
        """
        worker, (last, why) = message.sender, message.body
        if worker == self._trainer:
            raise RuntimeError(
                f"{worker} died ({why}), and with it what it learned since its last "
                f"checkpoint; the weights were of version {self._version}. Restore the "
                f"trainer to that checkpoint and the account to its version "
                f"(TrajectoryStore.restore), and run again: what generators and "
                f"scorers reported is in the account."
            )
        sends = [] if self._is_ending else [Send(worker, AGAIN)]
        if worker in self._judging:
            held, self._judging[worker] = self._judging[worker], {}
            if last is not None:
                record, _ = last.body
                del held[record.number]
                error = f"{worker} died: {why}"
                judged = Judged(record.number, record.group, None, None, error)
                sends += self._judged(message._replace(body=judged))
            for record in held.values():
                if self._groups.has(record):
                    sends.append(self._judge(record))
            return sends
        self._aborts.pop(worker, None)
        self._under_way[worker] = 0
        if self._version is not None:
            sends.append(Send(worker, "weights", (self._params, self._version)))
        for group in self._groups.take_all_back(worker):
            sends += self._look_at(group)
        return sends

    def _aborted(self, message: Message) -> list[Send]:
        self._aborts[message.sender] -= 1
        touched: dict[int, OpenGroup] = {}
        for record in message.body:
            group = self._take_back(message.sender, record)
            if group is not None:
                touched[group.number] = group
                if record.tokens:
                    self._groups.write(record)
        sends = []
        for group in touched.values():
            sends += self._look_at(group)
            discards = self._schedule.when_full == "discard" and not self._is_ending
            if discards and group.number in self._groups.open:
                self._discard(group, "unfinished")
        return sends

    def _look_at(self, group: OpenGroup) -> list[Send]:
        """Notes what an open group needs next."""
        if group.away:
            return []
        group.began, count = group.oldest, len(group.records)
        if self._is_stale(group.began):
            self._discard(group, "stale")
        elif group.is_scored and count < min(group.asked, self._least_scored):
            self._discard(group, "too few responses could be scored")
        elif self._groups.settle(group):
            if self._accept(group.whole.scores):
                self._groups.admit(group)
                self._rejected.clear()
            else:
                self._discard(group, NOT_ACCEPTED)
                self._reject(group.whole.mean_score)
        elif group.unfinished:
            return self._limit_resumes(group)
        return []

    def _limit_resumes(self, group: OpenGroup) -> list[Send]:
        """Ends, drops or brings forward what may not be resumed, of a group that waits.

        Under the weights of now a response would have tokens of so many versions.
        'first' acts a version earlier, so that it need not be stopped once more.
        """
        most, on_exceed = self._schedule.max_resume, self._schedule.on_exceed
        if most is None:
            return []
        most += on_exceed != "first"
        exceeding = [
            record
            for record in group.unfinished
            if len({*record.versions, self._now}) > most
        ]
        if not exceeding:
            return []
        if on_exceed == "first":
            self._due.add(group.number)
            return []
        if on_exceed == "drop":
            self._discard(group, "resumed too often")
            return []
        for record in exceeding:
            record.status = "length"
            self._groups.write(record)
        self._groups.settle(group)
        return [self._judge(record) for record in exceeding]

    @property
    def _awaits_due(self) -> bool:
        """Whether the next batch waits for responses that may not be stopped again."""
        if self._schedule.max_resume is None or self._schedule.on_exceed != "first":
            return False
        self._due &= self._groups.open.keys()
        return bool(self._due) or self._aborts.total() > 0

    def _reject(self, mean_score: float) -> None:
        """Counts groups in a row that may not train; gives up after too many."""
        self._rejected.append(mean_score)
        if len(self._rejected) >= self._schedule.max_rejected:
            raise RuntimeError(
                f"max_rejected={self._schedule.max_rejected} groups in a row may not "
                f"train. {histogram_of_scores(self._rejected)}. Choose easier or "
                f"harder problems, more samples a prompt, or accept other scores."
            )

    def _discard(self, group: OpenGroup, reason: str) -> None:
        self._groups.discard(group, self._now, reason)

    def _full_batch(self) -> Batch | None:
        """The oldest groups that may train, once they are enough and it is time."""
        groups, size = self._groups, self._schedule.batch
        if self._version is None or self._is_training or self._is_ending:
            return None
        if self._awaits_due:
            return None
        if groups.ready < size:
            groups.check_prompts()
            return None
        chosen = sorted(groups.by_age()[:size])
        self._is_training = True
        return Batch(self._version, groups.train(chosen, self._version))

    def _abort_all(self) -> list[Send]:
        busy = [name for name, count in self._under_way.items() if count]
        self._aborts.update(busy)
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
        them than the weights allow, which were asked for by later ones. As many as the
        next batch lacks are begun though repeats of prompts, up to ``batch``, have
        their place.
        """
        schedule, groups = self._schedule, self._groups
        complete, begun = len(groups.complete), len(groups.open) - len(groups.blank)
        missing = max(0, schedule.batch - groups.ready)
        most = capacity(
            self._version or 0,
            groups.trained + complete,
            begun,
            batch=schedule.batch,
            ahead=schedule.most_ahead,
        )
        repeats = min(complete - groups.ready, schedule.batch)
        most = max(most, min(most + repeats, missing - begun))
        return min(most, missing + schedule.max_waiting - begun)

    @property
    def _is_paused(self) -> bool:
        """Whether generators stand still until the update is done."""
        stops = self._schedule.when_full != "continue"
        return stops and (self._is_training or self._aborts.total() > 0)

    def _order(self, number: int) -> tuple[float, ...]:
        """Of a group that waits: it is handed out before those of larger ones."""
        group, rank = self._groups.open[number], 0.0
        if self._schedule.priority == "oldest":
            rank = math.inf if group.began is None else group.began
        if self._schedule.priority == "longest":
            rank = -max(len(record) for record in group.unfinished)
        return number not in self._due, rank, number

    def _hand_out(self) -> list[Send]:
        """Responses to generators with room; those that wait go before fresh ones."""
        if self._version is None or self._is_ending or self._is_paused:
            return []
        if min(self._under_way.values()) >= self._schedule.slots:
            return []  # for which thousands of groups need no order
        handed: dict[str, list[TokenRecord]] = {}
        waiting = sorted(self._groups.waiting, key=self._order, reverse=True)
        while True:
            worker = min(self._under_way, key=lambda name: self._under_way[name])
            if self._under_way[worker] >= self._schedule.slots:
                break
            while waiting and not self._may_begin(waiting[-1]):
                waiting.pop()  # its turn comes with later weights
            group = self._groups.open[waiting.pop()] if waiting else self._fresh()
            if group is None:
                break
            records = self._groups.hand_out(group, worker, self._version)
            self._under_way[worker] += len(records)
            handed.setdefault(worker, []).extend(records)
        limit = self._schedule.max_new_tokens
        return [Send(to, "write", (records, limit)) for to, records in handed.items()]

    def _fresh(self) -> OpenGroup | None:
        """A group that is asked for now, if one may be and there is a prompt."""
        if self._groups.no_more_prompts or not self._may_begin(self._groups.asked):
            return None
        return self._groups.ask()

    def _may_begin(self, number: int) -> bool:
        """Whether a group may be handed out: begun before, or to be begun."""
        groups = self._groups
        if number in groups.open and number not in groups.blank:
            return True
        return self._capacity >= 1 or groups.is_begun(number)

    def _notes(self) -> dict[str, Any]:
        """Why each role waits from now on, and the counts behind it."""
        groups, under_way = self._groups, sum(self._under_way.values())
        free = self._capacity
        nothing_more = groups.waiting <= groups.blank and free < 1
        generate, train = "requests", "batch not full"
        if nothing_more:
            generate = "throttled"
            if under_way < self._schedule.slots * len(self._under_way):
                train = "straggler"
        if groups.no_more_prompts:
            generate = "no more prompts"
        if len(groups.complete) + len(groups.written) >= self._schedule.batch:
            lacks = groups.ready < self._schedule.batch <= len(groups.complete)
            train = "other prompts" if lacks else "scores"
            train = "straggler" if self._awaits_due else train
        if self._is_paused:
            generate = "training"
        if self._version is None:
            generate = "weights"
        if self._is_ending:
            generate = train = "end"
        return {
            "waits": {"generate": generate, "train": train, "reward": "responses"},
            "groups": {
                "asked for": groups.asked,
                "open": len(groups.open),
                "complete": len(groups.complete),
                "trained": groups.trained,
                "capacity": None if free == math.inf else int(free),
            },
            "responses": under_way,
            "oldest": groups.oldest_request,
        }
