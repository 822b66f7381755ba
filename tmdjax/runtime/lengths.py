"""How much shorter trained responses are than those that were begun."""

from collections.abc import Iterable

import numpy as np

from tmdjax.core.types import Bool, Int
from tmdjax.runtime.trajectories import Trajectory


def length_bias(account: Iterable[Trajectory]) -> dict[str, float]:
    """Lengths of trained responses, beside those of all that were begun.

    The first groups to be complete are those of short responses. Where the others are
    resumed they train later; where they are discarded, or too stale by then, never.

    Args:
        account: of a run, such as ``store.select()``.

    Returns:
        'length_trained' and 'length_all', means in tokens, and 'length_ratio', the
        first over the second. Of what was stopped or is under way, the second takes
        what is known, see :func:`mean_length`; a response without a score counts as one
        that was stopped.

    Raises:
        ValueError: nothing was trained on.
    """
    begun = [known for known in account if known.length]
    trained = [known.length for known in begun if known.state == "consumed"]
    if not trained:
        raise ValueError(
            f"none of {len(begun)} responses was trained on; ask after an update."
        )
    lengths = np.array([known.length for known in begun])
    ended = np.array([known.score is not None for known in begun])
    mean, everything = float(np.mean(trained)), mean_length(lengths, ended)
    return {
        "length_trained": mean,
        "length_all": everything,
        "length_ratio": mean / everything,
    }


def mean_length(
    lengths: Int[np.ndarray, " response"], ended: Bool[np.ndarray, " response"]
) -> float:
    """Mean length of responses of which some were stopped before their end.

    The product-limit estimate: the share of responses of more than n tokens is the
    product, over m <= n, of the shares that go on after m tokens among those that came
    to m. One that was stopped goes on after the tokens it has.

    Args:
        lengths: tokens so far, >= 1.
        ended: which of the responses are whole.

    Returns:
        In tokens. What would be longer than the longest response counts as long as
        that.

    References:
        Kaplan and Meier, Journal of the American Statistical Association 53, 1958.
    """
    size = int(lengths.max()) + 1
    came_to = np.cumsum(np.bincount(lengths, minlength=size)[::-1])[::-1]
    goes_on = 1 - np.bincount(lengths[ended], minlength=size) / came_to
    return float(np.sum(np.cumprod(goes_on)[:-1]))
