"""What is known of the groups of a run, by what they need next.

    asked for --> waiting <--> at a generator --> judged --> complete --> trained on

A group may be discarded from anywhere before it is trained on. Every change is written
to the account (:class:`tmdjax.runtime.TrajectoryStore`), and all that stands here is
made of it again after a kill. What is decided about groups stands in
:mod:`tmdjax.runtime.control`.
"""

import dataclasses
from collections.abc import Callable, Iterable

from tmdjax import rl
from tmdjax.core.checks import brief
from tmdjax.rl import TokenRecord
from tmdjax.runtime.roles import Judged
from tmdjax.runtime.rounds import Group
from tmdjax.runtime.settings import Prompt
from tmdjax.runtime.staleness import spans_of
from tmdjax.runtime.trajectories import Trajectory, TrajectoryStore


@dataclasses.dataclass
class OpenGroup:
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
        """Responses that are to be written further, or at all."""
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


class Groups:
    """The groups that were asked for, and their account.

    Attributes:
        open: by number, those that are not all written and scored.
        complete: by number, those that may train.
        waiting: numbers of the open ones to hand out.
        blank: of the waiting, those without a token.
        written: of the open, those that are only judged.
        trained: how many were trained on.
        asked: how many were asked for, ever.
        no_more_prompts: whether that is all there are.
    """

    def __init__(
        self,
        store: TrajectoryStore,
        samples: int,
        prompt_of: Callable[[int], Prompt | None],
    ):
        """Takes over what the account has of earlier runs; nothing of it is settled.

        Raises:
            ValueError: an account of other prompts or of another number of responses to
                each.
        """
        self._store, self._samples, self._prompt_of = store, samples, prompt_of
        self.open: dict[int, OpenGroup] = {}
        self.complete: dict[int, OpenGroup] = {}
        self.waiting: set[int] = set()
        self.blank: set[int] = set()
        self.written: set[int] = set()
        self.asked, self.no_more_prompts = 0, False
        rows = store.select()
        self.trained = len({row.group for row in rows if row.state == "consumed"})
        for known in rows:
            self._take_over(known)

    def _take_over(self, known: Trajectory) -> None:
        """Makes the record of a request again."""
        number, group = known.number, known.group
        if number // self._samples != group:
            raise ValueError(
                f"request {number} is one of group {group} in the account, so not "
                f"of samples={self._samples} responses to each prompt; go on with the "
                f"settings that it was begun with."
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
            return min([*group.away, *unscored])
        return None

    def ask(self) -> OpenGroup | None:
        """Asks for the next group; None where there is no prompt for it."""
        number, samples = self.asked, self._samples
        prompt = self._prompt_of(number)
        if prompt is None:
            self.no_more_prompts = True
            return None
        self.asked += 1
        numbers = range(number * samples, (number + 1) * samples)
        self._store.submit(numbers, number)
        records = {n: _blank(n, number, prompt) for n in numbers}
        self.open[number] = OpenGroup(number, prompt, records)
        return self.open[number]

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
            group.away.add(record.number)
        return records

    def take_back(self, writer: str, record: TokenRecord) -> OpenGroup | None:
        """The group of a record that a generator had.

        None if it had it no more, as one that was taken for dead and whose work another
        has by now: its report is not heard.
        """
        group = self.open.get(record.group)
        if group is None or record.number not in group.away or group.writer != writer:
            return None
        group.away.remove(record.number)
        group.records[record.number] = record
        return group

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

    def settle(self, group: OpenGroup) -> bool:
        """Notes what an open group needs next, once no generator has any of it.

        Returns:
            Whether that is nothing: all of it is written and scored.
        """
        number, records = group.number, group.records
        for numbers in (self.waiting, self.blank, self.written):
            numbers.discard(number)
        if not records:  # none could be scored
            del self.open[number]
            return False
        if group.unfinished:
            self.waiting.add(number)
            if group.began is None:
                self.blank.add(number)
            return False
        if any(record.reward is None for record in records.values()):
            self.written.add(number)
            return False
        return True

    def admit(self, group: OpenGroup) -> None:
        """Notes that a group may train."""
        self.complete[group.number] = self.open.pop(group.number)

    def discard(self, group: OpenGroup, version: int, reason: str) -> None:
        """Notes that a group will not train, at a version, and why in a word or two."""
        self._store.discard(list(group.records), version, reason)
        self.open.pop(group.number, None)
        self.complete.pop(group.number, None)
        for numbers in (self.waiting, self.blank, self.written):
            numbers.discard(group.number)

    def train(self, numbers: Iterable[int], version: int) -> list[Group]:
        """Complete groups, which the update of a version trains on; in this order."""
        numbers = list(numbers)
        groups = [self.complete.pop(number).whole for number in numbers]
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
