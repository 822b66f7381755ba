import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tmdjax.data import (
    Batches,
    BatchPlan,
    array_record,
    in_memory,
    write_array_record,
)


def arrays(n):
    return {"image": np.arange(n, dtype=np.float32)[:, None], "label": np.arange(n)}


def take(batches, count):
    return list(itertools.islice(batches, count))


def labels(batches, count):
    return [batch["label"].tolist() for batch in take(batches, count)]


@pytest.fixture
def records(tmp_path):
    """Eleven records in two files."""
    data = arrays(11)
    paths = [tmp_path / "a.array_record", tmp_path / "b.array_record"]
    for path, rows in zip(paths, (range(7), range(7, 11))):
        write_array_record(path, ({k: v[i] for k, v in data.items()} for i in rows))
    return paths


def test_an_epoch_is_a_permutation_and_epochs_differ():
    batches = in_memory(arrays(12), 4, seed=3)
    epochs = [np.concatenate(labels(batches, 3)).tolist() for _ in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_first_places_are_uniform():
    # Every sample is equally likely to come first, over seeds and epochs alike.
    first = [
        BatchPlan(count=5, batch_size=1, seed=seed).indices(5 * epoch)[0]
        for seed in range(40)
        for epoch in range(40)
    ]
    counts = np.bincount(first, minlength=5)
    assert np.abs(counts - 320).max() < 5 * np.sqrt(320 * 0.8)


def test_the_order_is_fixed_across_versions():
    # Recorded: a change here would break the resumption of every older run.
    plan = BatchPlan(count=8, batch_size=8, seed=0)
    assert plan.indices(0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert plan.indices(1).tolist() == [5, 3, 7, 2, 4, 1, 0, 6]


def test_rows_stay_together_and_dtypes_stay():
    data = {**arrays(9), "half": np.arange(9, dtype=np.float16)}
    batch = next(in_memory(data, 5, seed=1))
    np.testing.assert_array_equal(batch["image"][:, 0], batch["label"])
    np.testing.assert_array_equal(batch["half"], batch["label"])
    assert {k: v.dtype for k, v in batch.items()} == {
        k: v.dtype for k, v in data.items()
    }


def test_without_shuffle_the_order_is_given():
    batches = in_memory(arrays(5), 2, shuffle=False, drop_remainder=False)
    assert labels(batches, 4) == [[0, 1], [2, 3], [4], [0, 1]]
    batches = in_memory(arrays(5), 2, shuffle=False)
    assert labels(batches, 3) == [[0, 1], [2, 3], [0, 1]]


def test_jax_arrays_are_accepted():
    batch = next(in_memory({"x": jnp.arange(4.0)}, 2, shuffle=False))
    assert isinstance(batch["x"], np.ndarray)
    np.testing.assert_array_equal(batch["x"], [0, 1])


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 20),
    batch_size=st.integers(1, 6),
    seed=st.integers(0, 2**64 - 1),
    shuffle=st.booleans(),
    stop=st.integers(0, 30),
    ahead=st.integers(0, 5),
)
def test_resume_at_any_step_is_exact(n, batch_size, seed, shuffle, stop, ahead):
    def make():
        return in_memory(
            arrays(n), batch_size, seed, shuffle=shuffle, drop_remainder=False
        )

    straight = labels(make(), stop + 5)
    first = make()
    assert labels(first, stop) == straight[:stop]
    state = json.loads(json.dumps(first.get_state()))
    resumed = make()
    take(resumed, ahead)  # an iterator that has already been used
    resumed.set_state(state)
    assert labels(resumed, 5) == straight[stop:]
    assert labels(first, 5) == straight[stop:]  # taking a state disturbs nothing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 3}, "batch_size was 4, is 3"),
        ({"seed": 8}, "seed was 7, is 8"),
        ({"shuffle": False}, "shuffle was True, is False"),
        ({"drop_remainder": False}, "drop_remainder was True, is False"),
        ({"shard_count": 2}, "shard_count was 1, is 2"),
    ],
)
def test_a_state_of_other_settings_is_refused(change, message):
    base = {"batch_size": 4, "seed": 7}
    state = in_memory(arrays(12), **base).get_state()
    with pytest.raises(ValueError, match=f"another pipeline: {message}. Rebuild"):
        in_memory(arrays(12), **base | change).set_state(state)


def test_a_state_of_other_data_is_refused(refused):
    state = in_memory(arrays(12), 4).get_state()
    changed = arrays(12)
    changed["image"][5] = -1
    refused("data was '", in_memory(changed, 4).set_state, state)
    refused("count was 12, is 13", in_memory(arrays(13), 4).set_state, state)
    with pytest.raises(ValueError, match=r"keys 'step' and 'fingerprint', got \[\]"):
        in_memory(changed, 4).set_state({})
    with pytest.raises(ValueError, match="step=-1 is outside"):
        in_memory(arrays(12), 4).set_state({**state, "step": -1})


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_are_disjoint_and_equally_long(shards):
    plans = [
        BatchPlan(count=11, batch_size=1, seed=2, shard_index=i, shard_count=shards)
        for i in range(shards)
    ]
    steps = {plan.steps_per_epoch for plan in plans}
    assert steps == {11 // shards}
    left_out = set()
    for epoch in range(8):
        seen = [
            int(plan.indices(epoch * plan.steps_per_epoch + step)[0])
            for plan in plans
            for step in range(plan.steps_per_epoch)
        ]
        assert len(seen) == len(set(seen)) == 11 // shards * shards
        left_out |= set(range(11)) - set(seen)
    assert len(left_out) > 11 % shards  # not always the same ones


def test_shards_stay_in_step_with_short_batches():
    # Seven samples over two shards: three each, batches of two and one.
    sizes = [
        [len(batch["label"]) for batch in take(shard, 4)]
        for shard in (
            in_memory(arrays(7), 2, drop_remainder=False, shard_index=i, shard_count=2)
            for i in range(2)
        )
    ]
    assert sizes == [[2, 1, 2, 1]] * 2


def test_empty_or_ragged_data_are_refused(refused):
    refused("the data are empty", in_memory, {}, 1)
    refused("the data are empty", in_memory, arrays(0), 1)
    with pytest.raises(ValueError, match=r"arrays\['b'\] has shape \(3,\).*batch, 2"):
        in_memory({"a": np.zeros(2), "b": np.zeros(3)}, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 9}, r"batch_size=9 is larger than the 8 sample\(s\).*smaller"),
        ({"batch_size": 5, "shard_count": 2}, r"larger than the 4 sample\(s\)"),
        ({"batch_size": 0}, r"batch_size=0 is outside \[1"),
        ({"batch_size": 1, "seed": -1}, r"seed=-1 must be at least 0"),
        ({"batch_size": 1, "shard_index": 1}, r"shard_index=1 is outside \[0, 0\]"),
        ({"batch_size": 1, "shard_count": 9}, r"shard_count=9 is outside \[1, 8\]"),
    ],
)
def test_bad_plans_are_refused(options, message, refused):
    refused(message, in_memory, arrays(8), **options)


def test_numbers_must_be_integers(as_shipped):
    with pytest.raises(TypeError, match=r"batch_size=2\.0 .*give an integer"):
        in_memory(arrays(8), 2.0)
    state = in_memory(arrays(8), np.int64(2), np.uint32(1)).get_state()
    in_memory(arrays(8), 2, 1).set_state(json.loads(json.dumps(state)))


def test_a_batch_larger_than_the_data_may_be_short():
    assert len(next(in_memory(arrays(3), 8, drop_remainder=False))["label"]) == 3


@pytest.mark.parametrize("threads", [0, 2])
def test_records_give_the_batches_of_memory(records, threads):
    # Same plan, same samples: the two readers share one order.
    from_files = array_record(records, 3, seed=5, threads=threads)
    for ours, theirs in zip(take(from_files, 9), in_memory(arrays(11), 3, seed=5)):
        for key in ("image", "label"):
            np.testing.assert_array_equal(ours[key], theirs[key])
            assert ours[key].dtype == theirs[key].dtype
    from_files.close()


@pytest.mark.parametrize("threads", [0, 2])
def test_a_failed_read_loses_no_batch(threads, refused):
    fail = {"once": True}

    def gather(indices):
        if indices[0] == 4 and fail.pop("once", False):
            raise OSError("the disk hiccups")
        return {"label": indices}

    plan = BatchPlan(count=10, batch_size=2, shuffle=False)
    batches = Batches(plan, gather, lambda: "data", threads=threads)
    assert labels(batches, 2) == [[0, 1], [2, 3]]
    refused("hiccups", next, batches, error=OSError)
    assert labels(batches, 2) == [[4, 5], [6, 7]]
    assert batches.get_state()["step"] == 4
    batches.close()


@settings(max_examples=8, deadline=None)
@given(stop=st.integers(0, 12))
def test_records_resume_exactly_despite_reading_ahead(stop, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "resume.array_record"
    if not path.exists():
        write_array_record(path, ({"label": np.array(i)} for i in range(7)))
    straight = labels(in_memory({"label": np.arange(7)}, 2, seed=1), stop + 3)
    first = array_record(path, 2, seed=1)
    assert labels(first, stop) == straight[:stop]
    state = json.loads(json.dumps(first.get_state()))
    resumed = array_record(path, 2, seed=1)
    next(resumed)
    resumed.set_state(state)
    assert labels(resumed, 3) == straight[stop:]
    first.close()
    resumed.close()


def test_a_state_survives_a_move_of_the_files_but_not_another_content(records, refused):
    state = array_record(records, 3).get_state()
    moved = [path.rename(path.with_name("moved-" + path.name)) for path in records]
    batches = array_record(moved, 3)
    batches.set_state(state)
    write_array_record(
        moved[0], ({k: v[i] for k, v in arrays(8).items()} for i in range(1, 8))
    )
    refused("data was '", array_record(moved, 3).set_state, state)


def test_custom_records(tmp_path):
    write_array_record(tmp_path / "r", ({"x": np.full(2, i)} for i in range(4)))
    batches = array_record(
        tmp_path / "r",
        2,
        shuffle=False,
        decode=lambda record: {"size": np.array(len(record))},
    )
    assert set(next(batches)) == {"size"}
    batches.close()


@pytest.mark.parametrize("keep", [-1, 0.5, 100, 0])
def test_truncated_records_are_named(records, keep, refused):
    content = records[1].read_bytes()
    size = {-1: len(content) - 1, 0.5: len(content) // 2}.get(keep, keep)
    records[1].write_bytes(content[:size])
    refused(r"b\.array_record is truncated or not an", array_record, records, 2)


def test_missing_records_are_named(records, refused):
    records[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.array_record does not exist"):
        array_record(records, 2)
    refused("paths is empty", array_record, [], 2)


def test_damaged_records_are_named(records):
    content = bytearray(records[1].read_bytes())
    # The payload of the first record's chunk, past the 64 byte file signature.
    for i in range(64 + 60, 64 + 80):
        content[i] ^= 255
    records[1].write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read records of .*b\.array_record"):
        take(array_record(records, 11, threads=0), 1)


def test_writing_is_all_or_nothing(tmp_path, refused):
    path = tmp_path / "x.array_record"
    assert write_array_record(path, [{"x": np.zeros(2)}] * 3) == 3
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"example 1 is .*\[3\].* but example 0 is"):
        write_array_record(path, [{"x": np.zeros(2)}, {"x": np.zeros(3)}])
    with pytest.raises(TypeError, match=r"example 0\['x'\] has dtype <U2"):
        write_array_record(path, [{"x": np.array("no")}])
    refused("no examples to write", write_array_record, path, [])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_bfloat16_and_scalars_survive_the_file(tmp_path):
    example = {"w": np.asarray(jnp.ones(2, jnp.bfloat16)), "n": 3, "flag": True}
    write_array_record(tmp_path / "r", [example])
    batch = next(array_record(tmp_path / "r", 1, threads=0))
    assert batch["w"].dtype == jnp.bfloat16 and batch["w"].shape == (1, 2)
    assert batch["n"].tolist() == [3] and batch["flag"].dtype == np.bool_
