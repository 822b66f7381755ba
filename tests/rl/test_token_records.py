"""Records of responses, their batches, and which of them are worth an update."""

import dataclasses

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from tmdjax import rl
from tmdjax.rl import TokenRecord, batch_records


def record(number, prompt, tokens, reward=0.5, group=0):
    count, given = len(tokens), {"number": number, "group": group, "reward": reward}
    given |= {"prompt": tuple(prompt), "tokens": list(tokens), "status": "stop"}
    log_probs = [-0.1 * (i + 1) for i in range(count)]
    return TokenRecord(log_probs=log_probs, versions=[number] * count, **given)


RECORDS = [
    record(0, [1, 2, 3], [4, 5], 1.0, 2),
    record(1, [6], [7, 8, 9, 1], -1.0, 3),
    record(2, [5, 5], [3]),
]


@pytest.mark.parametrize("rows", [None, 2])
def test_a_every_token_stands_where_it_belongs(rows):
    batch = batch_records(RECORDS, length=8, response_length=5, rows=rows)
    assert batch.tokens.shape == ((3 if rows is None else 2), 8)
    tokens = batch.responses(batch.tokens)
    places = batch.responses(batch.positions)
    seen = np.zeros(batch.tokens.shape, bool)
    for i, r in enumerate(RECORDS):
        count = len(r)
        assert tokens[i][batch.mask[i]].tolist() == r.tokens
        assert_array_equal(places[i][batch.mask[i]], len(r.prompt) + np.arange(count))
        assert_allclose(batch.log_prob[i, :count], r.log_probs)
        assert batch.version[i].tolist() == [r.number] * count + [-1] * (5 - count)
        begin = batch.start[i] - len(r.prompt)
        row = batch.tokens[batch.row[i], begin : begin + len(r.prompt) + count]
        assert row.tolist() == [*r.prompt, *r.tokens]
        where = slice(begin, begin + len(row))
        assert not seen[batch.row[i], where].any()
        assert len(set(batch.segments[batch.row[i], where])) == 1
        seen[batch.row[i], where] = True
    assert_array_equal(seen, batch.segments > 0)
    assert batch.mask.sum() == 7
    assert batch.reward.tolist() == [1.0, -1.0, 0.5]
    assert batch.group.tolist() == [2, 3, 0]
    if rows:  # neighbours in a row are told apart
        assert batch.segments.max() == 2


def test_padding_sequences_and_bad_records(refused):
    batch = batch_records(RECORDS, length=8, response_length=4, sequences=5, pad=9)
    assert batch.mask.shape == (5, 4) and not batch.mask[3:].any()
    assert (batch.tokens[3:] == 9).all() and (batch.segments[3:] == 0).all()
    given = {"length": 8, "response_length": 5}
    refused("nothing to batch", batch_records, [], **given)
    for changes, options, message in (
        ({}, {"length": 4}, r"record 0 has 3 \+ 2 tokens; the batch holds 4"),
        ({}, {"response_length": 3}, r"record 1 .* 3 of the response"),
        ({}, {"rows": 1}, "3 texts of 13 tokens do not fit into 1 rows of 8"),
        ({}, {"sequences": 2}, "3 records do not fit into sequences=2"),
        ({"reward": None}, {}, "record 0 has reward None; score it first"),
        ({"reward": float("nan")}, {}, "record 0 has reward nan"),
        ({"versions": [3, 2]}, {}, r"versions \[3, 2\], which fall"),
        ({"log_probs": [0.0]}, {}, "2 tokens, 1 log-probs and 2 versions"),
        (
            {"log_probs": [0.0, 0.1]},
            {},
            "record 0 has log-prob 0.1 at token 1, .* of version 0",
        ),
        ({"log_probs": [float("nan"), 0.0]}, {}, "has log-prob nan at token 0"),
        ({"log_probs": [-float("inf"), 0.0]}, {}, "has log-prob -inf at token 0"),
        ({"prompt": ()}, {}, "record 0 has no prompt"),
    ):
        first = dataclasses.replace(RECORDS[0], **changes)
        refused(message, batch_records, [first, *RECORDS[1:]], **given | options)


def test_d_overlong_penalty(refused):
    """DAPO's numbers: 16384 tokens are free, 20480 cost 1."""
    options = {"longest": 20480, "buffer": 4096}
    for length, expected in ((5, 0), (16384, 0), (18432, -0.5), (20480, -1)):
        assert rl.overlong_penalty(length, **options) == expected
    assert rl.overlong_penalty(20480, **options, factor=2.0) == -2
    refused("buffer=30", rl.overlong_penalty, 5, longest=20, buffer=30)


def test_informative_groups_are_those_with_advantages():
    for rewards, expected in (
        ([0.0, 0.0, 1.0], True),
        ([1.0, 1.0, 1.0], False),
        ([0.3, 0.3 + 1e-9], False),
        ([100.0, 100.001], True),
    ):
        assert rl.is_informative(rewards) is expected
        advantages = rl.group_advantages(rewards, [0] * len(rewards), num_groups=1)
        assert (np.asarray(advantages) != 0).any() == expected


@pytest.mark.parametrize("mode", rl.AGGREGATIONS)
@pytest.mark.parametrize("kept", [False, True])
def test_c_weights_of_an_aggregation(mode, kept):
    rng = np.random.default_rng(0)
    loss = rng.normal(size=(4, 6)).astype(np.float32)
    mask = rng.random((4, 6)) > 0.4
    mask[2] = False
    keep = rng.random((4, 6)) > 0.3 if kept else None
    length = 6 if mode.endswith("norm") else None
    weights = rl.aggregation_weights(mask, mode, length=length, keep=keep)
    expected = rl.aggregate(loss, mask, mode, length=length, keep=keep)
    assert_allclose((weights * loss).sum(), expected, rtol=1e-5)
    assert (np.asarray(weights)[~mask] == 0).all()


def test_packed_records_are_equal_in_every_field():
    again = dataclasses.replace(RECORDS[1], status="aborted", reward=None, score=0.1)
    given = [RECORDS[0], dataclasses.replace(again, kv_mixed=True, segments=3)]
    packed = rl.pack_records(given)
    assert packed.dtype == np.uint8 and packed.ndim == 1
    assert rl.unpack_records(packed) == given
    assert rl.unpack_records(rl.pack_records([])) == [] == rl.unpack_records(packed[:0])


def fewest_bins(sizes, capacity):
    """By trying every placement."""
    best = len(sizes)

    def place(i, room):
        nonlocal best
        if len(room) >= best:
            return
        if i == len(sizes):
            best = len(room)
            return
        for r, left in enumerate(room):
            if left >= sizes[i]:
                place(i + 1, [*room[:r], left - sizes[i], *room[r + 1 :]])
        place(i + 1, [*room, capacity - sizes[i]])

    place(0, [])
    return best


def test_areal_8_first_fit_decreasing_against_every_placement(refused):
    rng = np.random.default_rng(0)
    for n in (0, 1, 2, 3, *[7] * 40):
        capacity = int(rng.integers(5, 20))
        sizes = rng.integers(0, capacity + 1, n).tolist()
        bins = rl.first_fit_decreasing(sizes, capacity)
        assert sorted(i for members in bins for i in members) == list(range(n))
        assert all(members for members in bins)
        assert all(sum(sizes[i] for i in members) <= capacity for members in bins)
        best = fewest_bins(sizes, capacity)
        assert -(-sum(sizes) // capacity) <= len(bins) <= 11 / 9 * best + 2 / 3
        for least, multiple_of in ((3, 1), (0, 4), (2, 3)):
            options = {"least": least, "multiple_of": multiple_of}
            more = rl.first_fit_decreasing(sizes, capacity, **options)
            assert sorted(i for members in more for i in members) == list(range(n))
            assert all(sum(sizes[i] for i in members) <= capacity for members in more)
            assert len(more) % multiple_of == 0
            assert sum(map(bool, more)) >= min(n, least)
    # by hand: 7 | 5 3 | 4 ; of the two 5s the earlier comes first
    assert rl.first_fit_decreasing([3, 5, 7, 4], 8) == [[2], [1, 0], [3]]
    assert rl.first_fit_decreasing([5, 5, 3], 8) == [[0, 2], [1]]
    assert rl.first_fit_decreasing([1, 1, 1], 8, least=2) == [[0, 2], [1]]
    assert rl.first_fit_decreasing([1], 8, multiple_of=2) == [[0], []]
    for message, sizes, options in (
        (r"sizes\[1\]=9 is above capacity=8", [1, 9], {}),
        (r"sizes\[0\]=-1 must be at least 0", [-1], {}),
        ("multiple_of=0 must be at least 1", [1], {"multiple_of": 0}),
    ):
        refused(message, rl.first_fit_decreasing, sizes, 8, **options)
