"""How far generation may run ahead, and how old a text may be where it trains."""

import math

import numpy as np
import pytest

from tmdjax.runtime.staleness import (
    Lag,
    capacity,
    is_stale,
    lag,
    spans_of,
    tokens_by_lag,
)


def test_areal_2_hand_cases_of_the_capacity(refused):
    """Batches of 4, eta = 0."""
    sync = {"batch": 4, "ahead": 4}
    assert [capacity(0, 0, running, **sync) for running in range(5)] == [4, 3, 2, 1, 0]
    assert capacity(0, 1, 3, **sync) == 0  # accepted: its place is taken
    assert capacity(0, 1, 2, **sync) == 1  # rejected: it is given back
    assert capacity(1, 4, 0, **sync) == 4
    # restored at version 3 with a count that began anew, it would be all of 16
    assert capacity(3, 12, 0, **sync) == 4
    assert capacity(0, 0, 8, batch=4, ahead=12) == 4  # eta = 2
    assert capacity(0, 9, 8, batch=4, ahead=12) == -5
    assert capacity(5, 20, 999, batch=4, ahead=math.inf) == math.inf
    for message, given, options in (
        ("ahead=3 is outside", (0, 0, 0), {"batch": 4, "ahead": 3}),
        ("batch=0 must be at least 1", (0, 0, 0), {"batch": 0, "ahead": 3}),
        ("running=-1 must be at least 0", (0, 0, -1), sync),
    ):
        refused(message, capacity, *given, **options)


def test_areal_2_and_12_the_bound_holds_on_random_traces():
    rng = np.random.default_rng(0)
    for _ in range(200):
        batch, eta = int(rng.integers(1, 5)), int(rng.integers(0, 4))
        submitted = accepted = rejected = version = 0
        for _ in range(60):
            running = submitted - accepted - rejected
            left = capacity(
                version, accepted, running, batch=batch, ahead=(eta + 1) * batch
            )
            assert left >= 0  # the first token of a text is at most eta versions old
            kind = rng.integers(4)
            if kind == 0 and left:
                submitted += 1
            elif kind == 1 and running:
                accepted += 1
            elif kind == 2 and running:
                rejected += 1
            elif kind == 3 and accepted >= (version + 1) * batch:
                version += 1
            assert math.floor((submitted - rejected - 1) / batch) <= version + eta


def test_the_lag_of_a_text_is_that_of_its_oldest_token(refused):
    versions = [2, 2, 4, 4, 4, 5]
    spans = spans_of(versions)
    assert spans == [(2, 2), (4, 3), (5, 1)] and spans_of([]) == []
    assert lag(spans, 7) == Lag(in_flight=3, in_queue=2) and lag(spans, 7).total == 5
    assert lag([], 7).total == 0
    assert [is_stale(spans, 7, eta) for eta in (4, 5, math.inf)] == [True, False, False]
    by_lag = tokens_by_lag([spans, [(7, 2)], []], 7)
    assert by_lag == {0: 2, 2: 1, 3: 3, 5: 2}
    expected = np.bincount(7 - np.array([*versions, 7, 7]))
    assert by_lag == {i: n for i, n in enumerate(expected) if n}
    refused("tokens of version 5, but the trainer is at 4", lag, spans, 4)
    refused("versions that do not rise", lag, [(2, 1), (1, 1)], 4)
    refused("eta=-1 is outside", is_stale, spans, 7, -1)
    with pytest.raises(TypeError, match="version=1.5"):
        capacity(1.5, 0, 0, batch=1, ahead=1)
