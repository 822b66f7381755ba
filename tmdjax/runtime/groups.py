"""What is known of the groups of a run, by what they need next.

    asked for --> waiting <--> at a generator --> judged --> complete --> trained on

A group may be discarded from anywhere before it is trained on. Every change is written
to the account (:class:`tmdjax.runtime.TrajectoryStore`), and all that stands here is
made of it again after a kill. What is decided about groups stands in
:mod:`tmdjax.runtime.control`.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence

from tmdjax import rl
from tmdjax.core.checks import brief, first_few
from tmdjax.rl import TokenRecord
from tmdjax.runtime.cohorts import Cohorts
from tmdjax.runtime.roles import Judged
from tmdjax.runtime.rounds import Group
from tmdjax.runtime.schedule import Schedule
from tmdjax.runtime.settings import Prompt
from tmdjax.runtime.staleness import spans_of
from tmdjax.runtime.trajectories import Trajectory, TrajectoryStore

NOT_ACCEPTED = "not accepted"
"""Reason for which a group is discarded that is written and scored."""


@dataclasses.dataclass
class OpenGroup:
    """A prompt that was asked for and has been neither trained on nor discarded.

    Attributes:
        number: of the group.
        prompt: with its problem.
        records: by number, of responses that no generator has; those that could not be
            scored are taken out.
        away: those that a generator has, by number, as they were handed out.
        writer: that generator; meaningless without them.
        began: version of the oldest token that may be in it; None if there is none.
        asked: how many responses were asked for, those included that were taken out.
        round: in which the last of them were, from 0.
        is_final: whether nothing more will be asked for.
        undone: requests of later rounds that a restore has undone; the account has
            them, and they are asked for again or discarded.
    """

    number: int
    prompt: Prompt
    records: dict[int, TokenRecord]
    away: dict[int, TokenRecord] = dataclasses.field(default_factory=dict)
    writer: str = ""
    began: int | None = None
    asked: int = 0
    round: int = 0
    is_final: bool = True
    undone: set[int] = dataclasses.field(default_factory=set)

    @property
    def unfinished(self) -> list[TokenRecord]:
        """Responses that are to be written further, or at all."""
        return [record for record in self.records.values() if not record.finished]

    @property
    def is_scored(self) -> bool:
        """Whether all of ``records`` are written and scored."""
        return all(record.reward is not None for record in self.records.values())

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


class Groups:
    """The groups that were asked for, and their account.

    Attributes:
        open: by number, those that are not all written and scored.
        complete: by number, those that may train.
        waiting: numbers of the open ones to hand out.
        blank: of the waiting, those without a token.
        written: of the open, those that are only judged.
        between: of the open, those whose rounds so far are scored, but not those of all
            that are planned with them.
        trained: how many were trained on.
        asked: how many were asked for, ever.
        no_more_prompts: whether that is all there are.
    """

    def __init__(
        self,
        store: TrajectoryStore,
        schedule: Schedule,
        prompt_of: Callable[[int], Prompt | None],
        cohorts: Cohorts,
    ):
        """Takes over what the account has of earlier runs; nothing of it is settled.

        A cohort is final, and each of its groups goes on alone, once ``samples``
        responses a prompt were asked for, or its planner has no more rounds.

        Raises:
            ValueError: an account of other prompts or of other numbers of requests.
        """
        self._store, self._schedule, self._prompt_of = store, schedule, prompt_of
        self._cohorts, self._stride = cohorts, schedule.rounds * schedule.most_requests
        self.open: dict[int, OpenGroup] = {}
        self.complete: dict[int, OpenGroup] = {}
        self.waiting: set[int] = set()
        self.blank: set[int] = set()
        self.written: set[int] = set()
        self.between: set[int] = set()
        self.asked, self.no_more_prompts = 0, False
        self._prompts: collections.Counter[tuple[int, ...]] = collections.Counter()
        rows = store.select()
        self.trained = len({row.group for row in rows if row.state == "consumed"})
        final: set[int] = set()
        for known in rows:
            self._take_over(known)
            if known.state == "consumed" or known.reason == NOT_ACCEPTED:
                final.add(known.group // cohorts.size)
        for known in rows:  # those too that could not be scored
            if (group := self.open.get(known.group)) is not None:
                group.asked, group.round = group.asked + 1, self._round(known.number)
                cohort = group.number // cohorts.size
                group.is_final = not cohorts.are_planned or cohort in final
        self._undo_early_rounds()

    def _round(self, number: int) -> int:
        """In which a request was asked for."""
        return number // self._schedule.most_requests % self._schedule.rounds

    def _undo_early_rounds(self) -> None:
        """Takes back requests that were planned by what a restore has undone."""
        size, cohorts = self._cohorts.size, collections.defaultdict(list)
        for group in self.open.values():
            if not group.is_final:
                cohorts[group.number // size].append(group)
        for members in cohorts.values():
            records = [r for group in members for r in group.records.values()]
            unscored = [self._round(r.number) for r in records if r.reward is None]
            last = min(unscored, default=self._schedule.rounds)
            for group in members:
                early = [r.number for r in group.records.values() if not r.tokens]
                group.undone = {n for n in early if self._round(n) > last}
                for number in group.undone:
                    del group.records[number]
                group.asked -= len(group.undone)
                group.round = min(group.round, last)

    def _take_over(self, known: Trajectory) -> None:
        """Makes the record of a request again."""
        number, group = known.number, known.group
        if number // self._stride != group:
            raise ValueError(
                f"request {number} is one of group {group} in the account, so not "
                f"of samples={self._schedule.samples} responses to each prompt "
                f"(rounds={self._schedule.rounds} of at most "
                f"{self._schedule.most_requests}); go on with the settings that it was "
                f"begun with."
            )
        self.asked = max(self.asked, group + 1)
        if known.state in ("consumed", "discarded"):
            return
        if group not in self.open:
            self.open[group] = OpenGroup(group, self._known_prompt(group), {})
        prompt = self.open[group].prompt
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
        finished = known.state in ("done", "scored")
        record.status = record.status if finished else "aborted"
        if finished:
            record.score, record.reward = known.score, known.reward
        self.open[group].records[number] = record

    def _known_prompt(self, group: int) -> Prompt:
        prompt = self._prompt_of(group)
        if prompt is None:
            raise ValueError(
                f"the account has requests of group {group}, for which there is no "
                f"prompt any more; give the same prompts whenever asked again."
            )
        return prompt

    @property
    def oldest_request(self) -> int | None:
        """Number of the first request that is not both written and scored; or None."""
        for group in self.open.values():  # in the order they were asked for
            unscored = [r.number for r in group.records.values() if r.reward is None]
            if group.away or unscored:
                return min([*group.away, *unscored])
        return None

    def is_begun(self, number: int) -> bool:
        """Whether any group of a cohort was begun, so that the others must be too."""
        size = self._cohorts.size
        first = number - number % size
        group_numbers = range(first, min(first + size, self.asked))
        return any(n not in self.blank for n in group_numbers)

    def ask(self) -> OpenGroup | None:
        """Asks for the next group; None where there is no prompt for it."""
        number = self.asked
        prompt = self._prompt_of(number)
        if prompt is None:
            self.no_more_prompts = True
            return None
        count = self._cohorts.first_count(number)
        self.asked += 1
        group = OpenGroup(number, prompt, {}, is_final=not self._cohorts.are_planned)
        self.open[number] = group
        self._submit(group, 0, count)
        return group

    def _submit(self, group: OpenGroup, round_number: int, count: int) -> None:
        """Asks for so many responses of a group."""
        place = group.number * self._schedule.rounds + round_number
        first = place * self._schedule.most_requests
        numbers = range(first, first + count)
        self._store.submit(numbers, group.number)
        fresh = [n for n in numbers if n not in group.records]
        group.records |= {n: _blank(n, group.number, group.prompt) for n in fresh}
        group.undone.difference_update(numbers)
        group.asked, group.round = group.asked + len(fresh), round_number

    def next_rounds(self, version: int) -> list[OpenGroup]:
        """Asks for the next round of each cohort whose rounds so far are scored.

        Args:
            version: of the weights of now.

        Returns:
            Groups that are final by now and have all that was asked for; to be settled.
        """
        over, size = [], self._cohorts.size
        for cohort in sorted({number // size for number in self.between}):
            numbers = range(cohort * size, (cohort + 1) * size)
            if self.asked <= numbers[-1] and not self.no_more_prompts:
                continue
            members = [self.open[n] for n in numbers if n in self.open]
            is_over = self._is_spent(members)
            while not is_over and self.between.issuperset(g.number for g in members):
                is_over = not self._next_round(cohort, members)
                is_over = is_over or self._is_spent(members)
            for group in members if is_over else ():
                group.is_final = True
                self._store.discard(group.undone, version, "not asked for again")
                group.undone.clear()
                if group.number in self.between:
                    over.append(group)
        return over

    def _is_spent(self, members: Sequence[OpenGroup]) -> bool:
        """Whether as many responses were asked for as groups have on average."""
        asked = sum(group.asked for group in members)
        return asked >= self._schedule.samples * len(members)

    def _next_round(self, cohort: int, members: Sequence[OpenGroup]) -> bool:
        """Asks for another round; False where there is none."""
        number = 1 + max(group.round for group in members)
        prompts = [group.prompt for group in members]
        written = [group.whole for group in members]
        counts = self._cohorts.counts(cohort, number, prompts, written)
        for group, count in zip(members, counts or ()):
            self._submit(group, number, count)
            if count:
                self.between.discard(group.number)
                self.waiting.add(group.number)
        return counts is not None

    def hand_out(
        self, group: OpenGroup, writer: str, version: int
    ) -> list[TokenRecord]:
        """The unfinished responses of a group, which a generator has from now on.

        Args:
            group: an open one, none of which is away.
            writer: name of the generator.
            version: of the weights that go on with it.
        """
        self.waiting.discard(group.number)
        self.blank.discard(group.number)
        group.writer = writer
        group.began = version if group.began is None else group.began
        records = group.unfinished
        for record in records:
            del group.records[record.number]
            group.away[record.number] = record.copy()
        return records

    def take_back(self, writer: str, record: TokenRecord) -> OpenGroup | None:
        """The group of a record that a generator had.

        None if it had it no more, as one that was taken for dead and whose work another
        has by now: its report is not heard.
        """
        group = self.open.get(record.group)
        if group is None or record.number not in group.away or group.writer != writer:
            return None
        del group.away[record.number]
        group.records[record.number] = record
        return group

    def take_all_back(self, writer: str) -> list[OpenGroup]:
        """Groups of which a generator had responses, which died with what it wrote.

        These responses are again what they were when it was handed them.
        """
        lost = [g for g in self.open.values() if g.away and g.writer == writer]
        for group in lost:
            group.records.update(group.away)
            group.away.clear()
        return lost

    def write(self, record: TokenRecord) -> None:
        """Notes in the account what was written of a response."""
        arrays = None
        if self._store.folder is not None:
            arrays = {"record": rl.pack_records([record])}
        self._store.write(
            record.number,
            spans_of(record.versions),
            finished=record.finished,
            arrays=arrays,
        )

    def judge(self, judged: Judged, version: int) -> OpenGroup | None:
        """The group of a response that was judged; None if it was discarded meanwhile.

        A response that could not be scored is discarded, at ``version``.
        """
        group = self.open.get(judged.group)
        if group is None or judged.number not in group.records:
            return None
        record = group.records[judged.number]
        if judged.score is None or judged.reward is None:
            reason = f"no reward: {judged.error}"
            self._store.discard([record.number], version, reason)
            del group.records[record.number]
        else:
            record.score, record.reward = judged.score, judged.reward
            self._store.score(record.number, judged.score, judged.reward)
        return group

    def has(self, record: TokenRecord) -> bool:
        """Whether a response is of an open group, and no generator has it."""
        group = self.open.get(record.group)
        return group is not None and record.number in group.records

    def settle(self, group: OpenGroup) -> bool:
        """Notes what an open group needs next, once no generator has any of it.

        Returns:
            Whether that is nothing: all of it is written and scored, and nothing more
            will be asked for.
        """
        number = group.number
        self._forget(number)
        if group.unfinished:
            self.waiting.add(number)
            if group.began is None:
                self.blank.add(number)
            return False
        if not group.is_scored:
            self.written.add(number)
            return False
        if not group.is_final:
            self.between.add(number)
        return group.is_final

    def _forget(self, number: int) -> None:
        """Forgets what a group needs next."""
        for numbers in (self.waiting, self.blank, self.written, self.between):
            numbers.discard(number)

    def admit(self, group: OpenGroup) -> None:
        """Notes that a group may train."""
        self.complete[group.number] = self.open.pop(group.number)
        self._prompts[tuple(group.prompt.tokens)] += 1

    def _take(self, number: int) -> OpenGroup:
        """A complete group, which is so no more."""
        group = self.complete.pop(number)
        prompt = tuple(group.prompt.tokens)
        self._prompts[prompt] -= 1
        if not self._prompts[prompt]:
            del self._prompts[prompt]
        return group

    @property
    def ready(self) -> int:
        """How many of the complete groups one batch may have."""
        repeats = self._schedule.allow_repeats
        return len(self.complete if repeats else self._prompts)

    def by_age(self) -> list[int]:
        """Numbers of the complete groups that one batch may have, the oldest first.

        The oldest have the oldest tokens. Where a batch may not have a prompt twice, it
        has the oldest group of each.
        """
        groups = self.complete.values()
        by_age = sorted(groups, key=lambda group: (group.began or 0, group.number))
        if not self._schedule.allow_repeats:
            first: dict[tuple[int, ...], OpenGroup] = {}
            for group in by_age:
                first.setdefault(tuple(group.prompt.tokens), group)
            by_age = list(first.values())
        return [group.number for group in by_age]

    def check_prompts(self) -> None:
        """Refuses complete groups that fill no batch, of which too many are repeats.

        Raises:
            ValueError: they would be enough, but have too few different prompts, and no
                others will come, or two batches of groups have come.
        """
        size, count = self._schedule.batch, len(self.complete)
        is_over = self.no_more_prompts and not self.open
        if self.ready < size <= count and (is_over or count >= 2 * size):
            raise ValueError(
                f"{count} groups are complete, but they have {self.ready} different "
                f"prompts, fewer than batch={size}, and no batch may have one twice: "
                f"{first_few(map(brief, sorted(self._prompts)))}. Give more prompts, "
                f"lower batch, or set allow_repeats=True."
            )

    def discard(self, group: OpenGroup, version: int, reason: str) -> None:
        """Notes that a group will not train, at a version, and why in a word or two."""
        self._store.discard([*group.records, *group.undone], version, reason)
        self.open.pop(group.number, None)
        if group.number in self.complete:
            self._take(group.number)
        self._forget(group.number)

    def train(self, numbers: Iterable[int], version: int) -> list[Group]:
        """Complete groups, which the update of a version trains on; in this order."""
        numbers = list(numbers)
        groups = [self._take(number).whole for number in numbers]
        requests = [record.number for group in groups for record in group.records]
        self._store.consume(requests, version)
        self.trained += len(numbers)
        return groups


def _blank(number: int, group: int, prompt: Prompt) -> TokenRecord:
    """A record that nothing was written to; an engine begins it like an aborted one."""
    return TokenRecord(
        number=number,
        group=group,
        prompt=tuple(prompt.tokens),
        status="aborted",
        segments=0,
    )
