"""Prompts, scorers, and the sizes and rules of an iteration."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tmdjax import rl
from tmdjax.core.checks import check_choice, check_count, check_range

PROXIMAL = (*rl.PROXIMAL, "loglinear")
"""Whose log-probs the ratios of tokens are clipped around."""


class Prompt(NamedTuple):
    """A prompt as ids, and the problem behind it, for the scorer."""

    tokens: Sequence[int]
    problem: Any


Draw = Callable[[int, int], Sequence[Prompt]]
"""``(iteration, attempt) -> prompts``: the same ones whenever asked again."""

Score = Callable[[Any, Sequence[int]], float]
"""``(problem, response ids) -> reward``. It is called in a thread beside the engine,
for one group at a time unless ``LanguageSettings.scored_at_once`` says otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageSettings:
    """Sizes and rules of an iteration.

    Attributes:
        prompts: groups an iteration.
        samples: responses to each, at least 2.
        max_new_tokens: of a response.
        epochs: passes over the responses.
        minibatches: updates a pass; they divide prompts x samples.
        microbatch: responses in memory at a time; divides those of a minibatch.
        pack_rows: rows a microbatch is packed into, or None for one row a response;
            where texts do not fit, that minibatch is not packed.
        proximal: the policy ratios are clipped around: 'behaviour', the log-probs that
            the engine recorded, or 'recompute' them with the weights before the update
            (where engine and training differ in precision, or in weights). 'auto' takes
            'recompute' where the recipe of either is not exact (such as 'bf16', see
            :class:`tmdjax.quant.Recipe`) or the objective corrects for the behaviour,
            and 'behaviour' elsewhere. 'loglinear' estimates what 'recompute' computes
            from the versions of the tokens, without a pass of the network:
            :func:`tmdjax.rl.log_linear_proximal`.
        max_lag: tokens of weights that are more than so many versions behind those that
            are trained do not train; they still count in every denominator.
            ``math.inf`` trains on all.
        train_prompt: where worked examples stood before a prompt, the update reads the
            response behind them, as it was 'sampled' (the first ratio is 1), or behind
            the 'question' alone: then the plain prompt learns, and the objective must
            correct for the policy that wrote, which had the examples.
        dynamic_sampling: groups whose scores are all equal are replaced by others;
            penalties of long responses do not make scores differ.
        max_attempts: batches of prompts that may be drawn for that.
        overlong_buffer: tokens before max_new_tokens where
            :func:`tmdjax.rl.overlong_penalty` begins, or None for no penalty.
        overlong_factor: of the penalty.
        mask_truncated: responses that were cut off are not trained on; they still count
            in their group and in every denominator.
        scored_at_once: groups that are scored at the same time, each in a thread of its
            own; above 1 the scorer must bear that.
        score_timeout: seconds that the scorer may take for one group, waiting for other
            groups included where it lets only one in.
        check_ratio: stop where the first ratio of an iteration is not 1 (only with
            'behaviour').
        max_mismatch_kl: a warning is given, once in a process, when the KL of rollout
            and training under equal weights, in nats a token, is above this.
        min_effective_sample_fraction: the same when the weights proximal / behaviour
            leave fewer effective tokens than this part of those that train, in [0, 1].
        frozen_after: the same when so many iterations in a row change no 8-bit value of
            what the engine is given.
    """

    prompts: int
    samples: int
    max_new_tokens: int
    epochs: int = 1
    minibatches: int = 1
    microbatch: int = 8
    pack_rows: int | None = None
    proximal: str = "auto"
    max_lag: float = math.inf
    train_prompt: str = "sampled"
    dynamic_sampling: bool = False
    max_attempts: int = 10
    overlong_buffer: int | None = None
    overlong_factor: float = 1.0
    mask_truncated: bool = False
    scored_at_once: int = 1
    score_timeout: float = 600.0
    check_ratio: bool = True
    max_mismatch_kl: float = 1e-3
    min_effective_sample_fraction: float = 0.3
    frozen_after: int = 5

    def __post_init__(self) -> None:
        counts = ("prompts", "max_new_tokens", "epochs", "minibatches", "microbatch")
        for name in (*counts, "max_attempts", "scored_at_once", "frozen_after"):
            check_count(name, getattr(self, name))
        check_count("samples", self.samples, 2)
        check_choice("proximal", self.proximal, PROXIMAL)
        check_choice("train_prompt", self.train_prompt, ("sampled", "question"))
        check_range("overlong_factor", self.overlong_factor, 0)
        check_range("max_mismatch_kl", self.max_mismatch_kl, 0)
        least = "min_effective_sample_fraction"
        check_range(least, self.min_effective_sample_fraction, 0, 1)
        check_range(
            "score_timeout",
            self.score_timeout,
            0,
            math.inf,
            open_low=True,
            open_high=True,
        )
        if self.overlong_buffer is not None:
            check_range("overlong_buffer", self.overlong_buffer, 1, self.max_new_tokens)
        if self.pack_rows is not None:
            check_count("pack_rows", self.pack_rows)
        check_range("max_lag", self.max_lag, 0)
        if self.max_lag != math.inf:
            check_count("max_lag", self.max_lag, 0)
        total = self.prompts * self.samples
        if total % self.minibatches:
            raise ValueError(
                f"prompts={self.prompts} x samples={self.samples} = {total} responses "
                f"do not divide into minibatches={self.minibatches}; choose a divisor."
            )
        if total // self.minibatches % self.microbatch:
            raise ValueError(
                f"{total // self.minibatches} responses a minibatch do not divide into "
                f"microbatches of microbatch={self.microbatch}; choose a divisor."
            )
