"""How far generation may be ahead of training, as numbers.

One rule covers the schedules of the literature, ``Schedule`` their numbers:

    synchronous      eta = 0: nothing is asked for until it can be trained on at once
    asynchronous     eta >= 1 (AReaL), generators and trainer side by side
    partial rollouts more groups than an update takes are asked for; a full batch stops
                     the others, which go on after the update (APRIL)
"""

import dataclasses
import math

from tmdjax.core.checks import check_choice, check_count, check_range


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """How far generation may be ahead of training.

    Attributes:
        batch: groups an update, >= 1.
        samples: responses to each prompt, >= 1.
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
    """

    batch: int
    samples: int
    max_new_tokens: int
    updates: int
    eta: float = 0
    ahead: int | None = None
    slots: int = 64
    when_full: str = "continue"

    def __post_init__(self) -> None:
        for name in ("batch", "samples", "max_new_tokens", "updates", "slots"):
            check_count(name, getattr(self, name))
        check_range("eta", self.eta, 0)
        if self.eta != math.inf:
            check_count("eta", self.eta, 0)
        if self.ahead is not None:
            check_count("ahead", self.ahead)
            check_range("ahead", self.ahead, self.batch)
        check_choice("when_full", self.when_full, ("continue", "resume", "discard"))
        if self.when_full == "resume" and not self.eta:
            raise ValueError(
                f"when_full='resume' trains on what earlier weights began, but "
                f"eta={self.eta} allows none; raise eta (math.inf for no bound)."
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
