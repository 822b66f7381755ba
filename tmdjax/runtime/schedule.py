"""How far generation may be ahead of training, as numbers.

One rule covers the schedules of the literature, ``Schedule`` their numbers:

    synchronous      eta = 0: nothing is asked for until it can be trained on at once
    asynchronous     eta >= 1 (AReaL), generators and trainer side by side
    partial rollouts more groups than an update takes are asked for; a full batch stops
                     the others, which go on after the update (APRIL)
"""

import dataclasses
import math
from typing import Any

from tmdjax.core.checks import check_choice, check_count, check_fields, check_range
from tmdjax.runtime.settings import LanguageSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How far generation may be ahead of training.

    Attributes:
        batch: groups an update, >= 1.
        samples: responses to each prompt, >= 1; on average where a planner says how
            many (:class:`tmdjax.runtime.Controller`).
        max_new_tokens: of a response, >= 1.
        updates: at which version the run ends, >= 1.
        eta: most versions that the weights are ahead of a token that trains them, >= 0;
            ``math.inf`` for no bound.
        ahead: groups that may be there beyond those trained on, >= batch. None takes
            ``(eta + 1) batch``; APRIL's is the number that it over-provisions.
        slots: a generator is handed a group as long as it has fewer responses than this
            under way, >= 1.
        when_full: what happens to the responses under way once a batch is full. They
            'continue'; or generators stop until the update is done, and the responses
            go on after it ('resume', APRIL) or are discarded ('discard').
        on_stale: what happens to a group with a token that is more than eta versions
            behind the weights. It is discarded ('drop'), or trains: with all its tokens
            ('keep'), or with those that are not older than eta ('mask', see
            :attr:`max_lag`). Other responses to its prompt are discarded with it; they
            do not serve as its baseline.
        max_resume: how often a response may be resumed, that is, go on under later
            weights than those of its last token, >= 0; None for no bound. Of
            'resume' alone: no response then has tokens of more than ``max_resume + 1``
            versions.
        on_exceed: what happens to a response that would be resumed once more. It ends
            where it is ('truncate'), as if it had come to max_new_tokens; or its group
            is discarded ('drop'); or, a version earlier, its group is handed out before
            all others, and the next batch waits until it is written ('first').
        priority: of unfinished groups, all of which go before fresh ones. The group
            that was asked for first ('fifo'), that has the 'oldest' token, or that has
            the 'longest' unfinished response; of equal ones the first asked for.
        max_waiting: most unfinished groups that a full batch may leave behind, >= 0;
            ``math.inf`` for no bound but that of ``ahead``. It holds because nothing
            fresh is begun beyond it.
        max_rejected: after how many groups in a row that may not train the run is given
            up, >= 1; ``math.inf`` for never.
        max_unscored: after how many responses in a row that cannot be scored the run is
            given up, >= 1; ``math.inf`` for never.
        allow_repeats: whether a batch may have two groups of the same prompt. If not,
            the second waits for a later batch, and as many others as the next batch
            lacks are begun, if need be up to ``batch`` more than ``ahead``. A run ends
            where twice ``batch`` groups are complete, or all there will be, and cannot
            fill one.
        rounds: in which a planner may ask for the responses to a prompt, >= 1.
        most_samples: responses that it may ask for of one prompt in one round, >=
            samples; None takes ``samples``. Both give requests their numbers: response
            j of round r to prompt g is ``(g rounds + r) most_samples + j``.
    """

    batch: int
    samples: int
    max_new_tokens: int
    updates: int
    eta: float = 0
    ahead: int | None = None
    slots: int = 64
    when_full: str = "continue"
    on_stale: str = "drop"
    max_resume: int | None = None
    on_exceed: str = "truncate"
    priority: str = "fifo"
    max_waiting: float = math.inf
    max_rejected: float = math.inf
    max_unscored: float = 100
    allow_repeats: bool = True
    rounds: int = 1
    most_samples: int | None = None

    def __post_init__(self) -> None:
        counts = ("batch", "samples", "max_new_tokens", "updates", "slots", "rounds")
        for name in counts:
            check_count(name, getattr(self, name))
        if self.most_samples is not None:
            check_count("most_samples", self.most_samples)
            check_range("most_samples", self.most_samples, self.samples)
        bounds = {"eta": 0, "max_waiting": 0, "max_rejected": 1, "max_unscored": 1}
        for name, low in bounds.items():
            value = getattr(self, name)
            check_range(name, value, low)
            if value != math.inf:
                check_count(name, value, low)
        if self.ahead is not None:
            check_count("ahead", self.ahead)
            check_range("ahead", self.ahead, self.batch)
        check_choice("when_full", self.when_full, ("continue", "resume", "discard"))
        check_choice("on_stale", self.on_stale, ("drop", "keep", "mask"))
        check_choice("on_exceed", self.on_exceed, ("truncate", "drop", "first"))
        check_choice("priority", self.priority, ("fifo", "oldest", "longest"))
        if self.when_full == "resume" and not self.eta and self.on_stale == "drop":
            raise ValueError(
                f"when_full='resume' trains on what earlier weights began, but "
                f"eta={self.eta} allows none; raise eta (math.inf for no bound), or "
                f"on_stale='mask' to train on the tokens of the latest weights alone."
            )
        if self.on_stale == "mask" and self.eta == math.inf:
            raise ValueError(
                "on_stale='mask' leaves out tokens that are older than eta, but with "
                "eta=math.inf none is; give a finite eta, or on_stale='keep'."
            )
        if self.max_resume is not None:
            check_count("max_resume", self.max_resume, 0)
            if self.when_full != "resume":
                raise ValueError(
                    f"max_resume={self.max_resume} bounds what when_full='resume' "
                    f"does, but when_full={self.when_full!r} resumes nothing; leave it "
                    f"None."
                )
            if self.on_exceed == "first" and not self.max_resume:
                raise ValueError(
                    "max_resume=0 with on_exceed='first': a response would have to be "
                    "finished in the round that it is begun in, and every batch wait "
                    "for all; use max_resume=1 or more, or on_exceed='truncate'."
                )
        if self.when_full != "continue" and self.ahead is None:
            raise ValueError(
                f"when_full={self.when_full!r} stops generators at a full batch, which "
                f"makes sense for more groups than batch={self.batch} alone; say how "
                f"many with ahead=."
            )

    @property
    def most_ahead(self) -> float:
        """Groups that may be there beyond those trained on."""
        return (self.eta + 1) * self.batch if self.ahead is None else self.ahead

    @property
    def most_requests(self) -> int:
        """Responses that may be asked for of one prompt in one round."""
        return self.samples if self.most_samples is None else self.most_samples

    @property
    def max_lag(self) -> float:
        """Versions that a token may be behind the weights and still train.

        It is eta where older ones are masked (``on_stale='mask'``), and else
        ``math.inf``: what came into a batch trains. The learner needs it.
        """
        return self.eta if self.on_stale == "mask" else math.inf

    def settings(self, **changes: Any) -> LanguageSettings:
        """The sizes of the updates of a run, in agreement with this schedule.

        Args:
            **changes: fields of :class:`tmdjax.runtime.LanguageSettings`. Prompts,
                samples, max_new_tokens and max_lag follow from the schedule.

        Raises:
            ValueError: one of these is given and is not the schedule's, or a number out
                of range.
            TypeError: an unknown field.
        """
        check_fields(LanguageSettings, changes)
        own = {
            "prompts": self.batch,
            "samples": self.samples,
            "max_new_tokens": self.max_new_tokens,
            "max_lag": self.max_lag,
        }
        for name, value in own.items():
            if changes.get(name, value) != value:
                raise ValueError(
                    f"{name}={changes[name]}, but the schedule has {value}; change the "
                    f"schedule, and leave {name} out here."
                )
        return LanguageSettings(**changes | own)
