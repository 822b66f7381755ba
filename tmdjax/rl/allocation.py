"""How many further responses each prompt gets: where one more tells most.

On the host, in float64: what is planned are requests to an engine.

References:
    XRPO, arXiv 2510.06672. The paper's text was not at hand: the rule is the one that
    its reviews and two independent descriptions agree on, and where these leave it open
    (what T counts, the form of the bonus, how counts follow from priorities) it is an
    option.
"""

import math
from typing import Any

import numpy as np
from scipy.special import stdtrit

from tmdjax.core.checks import check_choice, check_count, check_finite, check_range

BONUSES = ("sqrt", "linear")
RULES = ("greedy", "proportional", "uniform")


def half_width(count: Any, std: Any, alpha: float = 0.05) -> np.ndarray:
    """Half the width of Student's interval of a mean reward.

    h(n) = t_{1 - alpha / 2, n - 1} s / sqrt(n).

    Args:
        count: integers [...], responses so far, n >= 2.
        std: [...], their sample standard deviation s (ddof 1), >= 0.
        alpha: 1 - coverage, inside (0, 1).

    Returns:
        float64 [...], in units of the reward; exactly 0 where the std is 0.

    Raises:
        TypeError: counts that are no integers.
        ValueError: a count below 2, a negative or non-finite std, or alpha out of
            range.
    """
    check_range("alpha", alpha, 0, 1, open_low=True, open_high=True)
    count, std = np.asarray(count), np.asarray(std, np.float64)
    if not np.issubdtype(count.dtype, np.integer):
        raise TypeError(f"count has dtype {count.dtype}; give numbers of responses.")
    if (count < 2).any():
        raise ValueError(
            f"a count of {count.min()} response(s): Student's half width needs at "
            f"least 2 responses a prompt; raise those of the first round."
        )
    check_finite(std, "std", "Mend the rewards it comes from.")
    if (std < 0).any():
        raise ValueError(f"std={std.min()} is negative.")
    # of the lower tail: 1 - alpha / 2 rounds away what is left of a small alpha
    return -stdtrit(count - 1.0, alpha / 2) * std / np.sqrt(count)


def priority(
    count: Any,
    std: Any,
    trials: float,
    *,
    alpha: float = 0.05,
    exploration: float = 0.05,
    bonus: str = "sqrt",
) -> np.ndarray:
    """What one more response to a prompt is worth: certainty gained, and a bonus.

    Pi = h(n) - h(n + 1) + phi, with h of :func:`half_width` at the same std, and
    phi = exploration * sqrt(log(1 + T) / n), or exploration * log(1 + T) / n. It falls
    with n.

    Args:
        count: integers [...], responses so far, n >= 2.
        std: [...], sample standard deviation of their rewards, >= 0.
        trials: T > 0: all responses of the iteration so far, or the number of the
            iteration, counted from 1.
        alpha: 1 - coverage of the interval, inside (0, 1).
        exploration: weight of the bonus, >= 0.
        bonus: 'sqrt' or 'linear'.

    Returns:
        float64 [...], in units of the reward.

    Raises:
        TypeError, ValueError: as :func:`half_width`; an option out of range.
    """
    check_range("trials", trials, 0, math.inf, open_low=True, open_high=True)
    check_range("exploration", exploration, 0, math.inf, open_high=True)
    check_choice("bonus", bonus, BONUSES)
    count = np.asarray(count)
    gain = half_width(count, std, alpha) - half_width(count + 1, std, alpha)
    share = math.log1p(trials) / count
    return gain + exploration * (np.sqrt(share) if bonus == "sqrt" else share)


def allocate(
    count: Any,
    std: Any,
    budget: int,
    *,
    most: int,
    trials: float | None = None,
    rule: str = "greedy",
    last: Any = None,
    **options: Any,
) -> np.ndarray:
    """Spends a budget of responses, exactly, on the prompts where they are worth most.

    'greedy' gives one response at a time to the highest :func:`priority`, computed
    anew with what was given; as priorities fall, the sum of the priorities bought is
    the largest possible. Equal priorities go to the prompt with the fewest responses,
    then to the first. 'proportional' shares the budget in proportion to the priorities
    of the start, rounded by largest remainders. 'uniform' makes counts as equal as can
    be, whatever the rewards.

    Args:
        count: integers [prompt], responses so far, >= 2.
        std: [prompt], sample standard deviation of their rewards, >= 0.
        budget: responses to give, >= 0.
        most: responses that a prompt may have in all.
        trials: T of the priority; None takes the sum of ``count``.
        rule: 'greedy', 'proportional' or 'uniform'.
        last: bool [prompt], prompts that get something only where all others have
            ``most``; None for no prompt.
        **options: ``alpha``, ``exploration`` and ``bonus`` of :func:`priority`.

    Returns:
        int64 [prompt], further responses; their sum is the budget.

    Raises:
        TypeError: counts that are no integers.
        ValueError: what :func:`priority` refuses, an unknown rule, no prompt, shapes
            that disagree, a count above ``most``, or a budget that does not fit below
            ``most``.
    """
    check_choice("rule", rule, RULES)
    check_count("budget", budget, 0)
    check_count("most", most, 2)
    count, std = np.asarray(count), np.asarray(std, np.float64)
    last = np.zeros(count.shape, bool) if last is None else np.asarray(last, bool)
    if count.ndim != 1 or not count.size or not count.shape == std.shape == last.shape:
        raise ValueError(
            f"count has shape {count.shape}, std {std.shape} and last {last.shape}; "
            f"give one number a prompt each, and at least one prompt."
        )
    room = most - count
    if (room < 0).any() or budget > room.sum():
        raise ValueError(
            f"budget={budget} does not fit: prompts have {count.min()} to "
            f"{count.max()} responses and may have most={most}, so there is room for "
            f"{int(room.clip(0).sum())}; raise most, or give fewer."
        )
    room = np.minimum(room, budget)  # of a cap far above, rows that nobody can use
    trials = float(count.sum()) if trials is None else trials
    worth = priority(count, std, trials, **options)
    given = np.zeros(count.shape, np.int64)
    if rule == "proportional":
        for group in (~last, last):  # a cap that is met leaves a rest to share again
            while given.sum() < budget and (group & (given < room)).any():
                given += _shares(
                    np.where(group & (given < room), worth, 0),
                    group & (given < room),
                    budget - int(given.sum()),
                    room - given,
                )
        return given
    # one row for each response that could be given: the best ones of all
    prompt = np.repeat(np.arange(count.size), room)
    step = np.arange(prompt.size) - np.repeat(np.cumsum(room) - room, room)
    at = count[prompt] + step
    if rule == "greedy":
        worth = priority(at, std[prompt], trials, **options)
    else:
        worth = np.zeros(prompt.size)
    best = np.lexsort((prompt, at, -worth, last[prompt]))[:budget]
    np.add.at(given, prompt[best], 1)
    return given


def _shares(
    worth: np.ndarray, may: np.ndarray, budget: int, room: np.ndarray
) -> np.ndarray:
    """Parts of a budget in proportion to ``worth``, at most ``room``: at least 1."""
    if not worth.sum():
        worth = may.astype(np.float64)
    exact = budget * worth / worth.sum()
    whole = np.floor(exact).astype(np.int64)
    rest = np.lexsort((np.arange(len(worth)), whole - exact))
    whole[rest[: budget - int(whole.sum())]] += 1
    return np.minimum(whole, np.where(may, room, 0))


def posterior_std(right: Any, count: Any) -> np.ndarray:
    """Standard deviation of one more 0/1 reward, never 0: by Jeffreys' prior.

    sqrt(p (1 - p)) with p = (right + 1/2) / (count + 1), the mean of the posterior
    under Beta(1/2, 1/2). It keeps a prompt whose first rewards happen to be equal from
    counting as certain: by the sample's std alone, such prompts get so little that
    means are known worse than by equal counts where half of all prompts are mixed.

    Args:
        right: [...], responses of reward 1, in [0, count].
        count: [...], responses, >= 0.

    Returns:
        float64 [...] in (0, 1/2].

    Raises:
        ValueError: right outside [0, count].
    """
    right, count = np.asarray(right, np.float64), np.asarray(count, np.float64)
    if not ((right >= 0) & (right <= count)).all():
        raise ValueError(f"right={right} is outside [0, count], count={count}.")
    p = (right + 0.5) / (count + 1)
    return np.sqrt(p * (1 - p))
