"""Chain-sum: the running sums of n digits, whose length is long-tailed.

The prompt '>589=' asks for '505813922#22$': each digit followed by the sum so far,
modulo 97 in two characters. A response's length is proportional to its difficulty and,
as n is log-normal, long-tailed: the workload of rollout engines in small.

The bare running sums (without the digits between them) are not learnt by small
networks; the interleaved form is. Modulo 10, a tenth of all answers is guessed right,
so the reward asks for the whole trace; modulo 97 a policy that copies the digits but
cannot add earns less than 1.1 %, whether it guesses each sum or knows only that sums
rise by 0 to 9 (0.1^(n-1), hence n >= 3 by default).
"""

import dataclasses

import numpy as np

from tmdjax.core.checks import check_count, check_range
from tmdjax.data.text_tasks.problems import Problem
from tmdjax.data.text_tasks.vocabulary import GIVEN, START
from tmdjax.domains.arithmetic.written_work import (
    MODULI,
    chain_sum_response,
    exact_reward,
    split_response,
)

TIERS = {"T1": 6, "T2": 12, "T3": 24}
"""The most digits of each tier; T4 has more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainSum:
    """Running sums of n digits; n = round(exp(N(log_mean, log_std))), clipped.

    Attributes:
        modulus: of the sums: 97, or 10.
        low: fewest digits.
        high: most digits; 14 suits two CPU cores.
        log_mean: of the logarithm of n, before the clip.
        log_std: its standard deviation, >= 0.

    Raises:
        TypeError: low or high is no integer.
        ValueError: another modulus, low < 1, high < low, a negative log_std.
    """

    modulus: int = 97
    low: int = 3
    high: int = 40
    log_mean: float = 2.2
    log_std: float = 0.65

    name = "chain_sum"

    def __post_init__(self):
        if self.modulus not in MODULI:
            raise ValueError(f"modulus={self.modulus} is not one of {MODULI}.")
        check_count("high", self.high, check_count("low", self.low))
        check_range("log_std", self.log_std, 0)

    def problem(self, rng: np.random.Generator) -> Problem:
        """Draws a number of digits, then the digits."""
        drawn = np.round(np.exp(rng.normal(self.log_mean, self.log_std)))
        count = int(np.clip(drawn, self.low, self.high))
        terms = rng.integers(0, 10, count).tolist()
        response = chain_sum_response(terms, self.modulus)
        _, answer = split_response(response) or ("", "")
        return Problem(
            prompt=f"{START}{''.join(map(str, terms))}{GIVEN}",
            response=response,
            answer=answer,
            tier=tier_of(count),
            facts={"terms": terms},
        )

    def verify(self, problem: Problem, response: str) -> float:
        """1.0 if every digit, every sum and the answer are right, else 0.0."""
        gold = chain_sum_response(problem.facts["terms"], self.modulus)
        return exact_reward(response, gold)


def tier_of(count: int) -> str:
    """The tier of a problem of so many digits."""
    return next((tier for tier, most in TIERS.items() if count <= most), "T4")
