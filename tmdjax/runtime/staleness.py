"""How old the weights behind a text may be, where it is asked for and where it trains.

A text that is under way while weights change has tokens of several versions: spans
``(version, tokens)`` in the order they were drawn, in which versions never fall. Its
lag, where it trains the weights ``version``, is ``version`` minus the oldest of them.
AReaL bounds the lag by eta twice: :func:`capacity` refuses work that could only be
trained on too late, :func:`is_stale` what is too old all the same, such as a straggler
that began long ago.

References:
    AReaL, arXiv 2505.24298: at most ``(eta + version + 1) batch`` texts are asked for
    before update number ``version``.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tmdjax.core.checks import check_count, check_range

Spans = Sequence[tuple[int, int]]
"""``(version, tokens)`` in the order tokens were drawn; versions rise."""


def spans_of(versions: Iterable[int]) -> list[tuple[int, int]]:
    """Runs of equal versions, such as those of the tokens of a record."""
    return [(v, len(list(run))) for v, run in itertools.groupby(versions)]


def capacity(
    version: int, accepted: int, running: int, *, batch: int, ahead: float
) -> float:
    """How many more groups may be asked for; below 0 where there are too many.

    Args:
        version: updates done so far.
        accepted: groups that were accepted so far, whether trained on or not. After a
            restart it counts those that the restored weights were trained on, or
            ``(version + 1) batch`` groups more than allowed would be asked for.
        running: groups that were asked for and are neither accepted nor rejected. A
            rejected group is in neither count: its place is free again.
        batch: groups an update, >= 1.
        ahead: groups that may be there beyond those that ``version`` updates take, >=
            batch: ``(eta + 1) batch`` in AReaL, the over-provisioned number of a round
            in APRIL, ``math.inf`` for no bound.

    Returns:
        ``version batch + ahead - accepted - running``.

    Raises:
        TypeError: a count that is no integer.
        ValueError: a negative count, or ``ahead`` below ``batch``: no batch would ever
            be full.
    """
    check_count("version", version, 0)
    check_count("accepted", accepted, 0)
    check_count("running", running, 0)
    check_range("ahead", ahead, check_count("batch", batch))
    return version * batch + ahead - accepted - running


class Lag(NamedTuple):
    """How many versions passed over a text.

    Attributes:
        in_flight: while it was written: the version of its last token minus that of its
            first.
        in_queue: from its last token until it trains.
    """

    in_flight: int
    in_queue: int

    @property
    def total(self) -> int:
        """Versions from the first token until it trains."""
        return self.in_flight + self.in_queue


def lag(spans: Spans, version: int) -> Lag:
    """The lag of a text where it trains the weights ``version``.

    Args:
        spans: of the text; without tokens there is no lag.
        version: of the weights that it trains, >= 0.

    Raises:
        ValueError: versions that fall, or a token of a version above ``version``.
    """
    if not spans:
        return Lag(0, 0)
    versions = [v for v, _ in spans]
    if any(a >= b for a, b in itertools.pairwise(versions)):
        raise ValueError(
            f"spans {list(spans)} have versions that do not rise; tokens come in the "
            f"order they were drawn."
        )
    if versions[-1] > version:
        raise ValueError(
            f"a text has tokens of version {versions[-1]}, but the trainer is at "
            f"{version}; publish weights before they write, and restore generation and "
            f"training to one checkpoint."
        )
    return Lag(versions[-1] - versions[0], version - versions[-1])


def is_stale(spans: Spans, version: int, eta: float) -> bool:
    """Whether the oldest token is more than ``eta`` versions behind the weights.

    Args:
        spans: of the text.
        version: of the weights that it would train.
        eta: >= 0; ``math.inf`` for no bound.

    Raises:
        ValueError: ``eta`` below 0, or what :func:`lag` refuses.
    """
    check_range("eta", eta, 0)
    return lag(spans, version).total > eta


def tokens_by_lag(texts: Iterable[Spans], version: int) -> dict[int, int]:
    """Tokens by how many versions they are behind the weights that they train.

    Args:
        texts: spans of each.
        version: of the weights that they train.
    """
    found: dict[int, int] = {}
    for spans in texts:
        lag(spans, version)
        for written, tokens in spans:
            found[version - written] = found.get(version - written, 0) + tokens
    return dict(sorted(found.items()))


def notes_of_batch(
    versions: Iterable[Iterable[int]], version: int, eta: float
) -> dict[str, Any]:
    """How stale a batch is, for the log.

    Args:
        versions: of the tokens of each response.
        version: of the weights that it trains.
        eta: bound of the lag.

    Returns:
        'lags' (tokens by lag), 'beyond_eta' (the share of them whose lag is above eta),
        and the mean 'in_flight' and 'in_queue' of responses, see :func:`lag`.
    """
    spans = [spans_of(each) for each in versions]
    by_lag = tokens_by_lag(spans, version)
    lags = [lag(each, version) for each in spans]
    beyond = sum(count for behind, count in by_lag.items() if behind > eta)
    return {
        "beyond_eta": beyond / max(1, sum(by_lag.values())),
        "lags": {str(behind): count for behind, count in by_lag.items()},
        "in_flight": float(np.mean([each.in_flight for each in lags])),
        "in_queue": float(np.mean([each.in_queue for each in lags])),
    }
