"""Which responses are worth an update, and what their length costs."""

from collections.abc import Sequence

import numpy as np

from tmdjax.core.checks import check_count, check_range
from tmdjax.rl.advantages import TIED_STD


def is_informative(rewards: Sequence[float]) -> bool:
    """Whether rewards of a group differ: equal ones give no advantage to anyone.

    The rule is that of :func:`tmdjax.rl.group_advantages` for tied groups.
    """
    values = np.asarray(rewards, np.float64)
    return bool(values.std() >= TIED_STD * max(1.0, abs(values.mean())))


def overlong_penalty(
    length: int, *, longest: int, buffer: int, factor: float = 1.0
) -> float:
    """What is added to the reward of a response that comes near the longest.

    0 up to ``longest - buffer`` tokens, then falling linearly to ``-factor`` at the
    longest.

    Args:
        length: of the response, in tokens (not characters).
        longest: the most tokens a response may have, at least 1.
        buffer: how many tokens before ``longest`` the penalty begins, in [1, longest].
        factor: >= 0.

    Returns:
        A number in [-factor, 0] for lengths up to the longest.

    Raises:
        ValueError: a number out of range.

    References:
        DAPO, arXiv 2503.14476, eq. 13.
    """
    check_count("longest", longest)
    check_range("buffer", check_count("buffer", buffer), 1, longest)
    check_range("factor", factor, 0)
    exceeding = length - (longest - buffer)
    return min(-exceeding / buffer * factor, 0.0)
