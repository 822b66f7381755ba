import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tmdjax.data import Batches, BatchPlan, array_record, in_memory, write_array_record


def arrays(n):
    return {"image": np.arange(n, dtype=np.float32)[:, None], "label": np.arange(n)}


def take(batches, count):
    return list(itertools.islice(batches, count))


def labels(batches, count):
    return [batch["label"].tolist() for batch in take(batches, count)]


def write_rows(path, rows):
    examples = arrays(11)
    write_array_record(path, ({k: v[i] for k, v in examples.items()} for i in rows))


@pytest.fixture
def records(tmp_path):
    """Eleven records in two files."""
    paths = [tmp_path / "a.array_record", tmp_path / "b.array_record"]
    for path, rows in zip(paths, (range(7), range(7, 11))):
        write_rows(path, rows)
    return paths


def test_an_epoch_is_a_permutation_and_epochs_differ():
    batches = in_memory(arrays(12), 4, seed=3)
    epochs = [np.concatenate(labels(batches, 3)).tolist() for _ in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_first_places_are_uniform():
    # Every sample is equally likely to come first, over seeds and epochs alike.
    plans = [BatchPlan(count=5, batch_size=1, seed=seed) for seed in range(40)]
    first = [plan.indices(5 * epoch)[0] for plan in plans for epoch in range(40)]
    counts = np.bincount(first, minlength=5)
    assert np.abs(counts - 320).max() < 5 * np.sqrt(320 * 0.8)


def test_the_order_is_fixed_across_versions():
    # Recorded: a change here would break the resumption of every older run.
    plan = BatchPlan(count=8, batch_size=8, seed=0)
    assert plan.indices(0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert plan.indices(1).tolist() == [5, 3, 7, 2, 4, 1, 0, 6]


def test_rows_stay_together_and_dtypes_stay():
    half = np.arange(9, dtype=np.float16)
    data = {**arrays(9), "half": half, "jax": jnp.arange(9.0)}
    batch = next(in_memory(data, 5, seed=1))
    for name, rows in batch.items():
        assert isinstance(rows, np.ndarray) and rows.dtype == data[name].dtype
        np.testing.assert_array_equal(np.ravel(rows), batch["label"])
    assert batch.keys() == data.keys()


def test_without_shuffle_the_order_is_given():
    batches = in_memory(arrays(5), 2, shuffle=False, drop_remainder=False)
    assert labels(batches, 4) == [[0, 1], [2, 3], [4], [0, 1]]
    batches = in_memory(arrays(5), 2, shuffle=False)
    assert labels(batches, 3) == [[0, 1], [2, 3], [0, 1]]
    short = in_memory(arrays(3), 8, shuffle=False, drop_remainder=False)
    assert labels(short, 2) == [[0, 1, 2]] * 2


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
        options = {"shuffle": shuffle, "drop_remainder": False}
        return in_memory(arrays(n), batch_size, seed, **options)

    straight = labels(make(), stop + 5)
    first, resumed = make(), make()
    assert labels(first, stop) == straight[:stop]
    take(resumed, ahead)  # an iterator that has already been used
    resumed.set_state(json.loads(json.dumps(first.get_state())))
    assert labels(resumed, 5) == straight[stop:]
    assert labels(first, 5) == straight[stop:]  # taking a state disturbs nothing


def test_another_state_is_refused(refused):
    base = {"batch_size": 4, "seed": 7}
    state = in_memory(arrays(12), **base).get_state()
    for message, change in (
        ("batch_size was 4, is 3", {"batch_size": 3}),
        ("seed was 7, is 8", {"seed": 8}),
        ("shuffle was True, is False", {"shuffle": False}),
        ("drop_remainder was True, is False", {"drop_remainder": False}),
        ("shard_count was 1, is 2", {"shard_count": 2}),
    ):
        other = in_memory(arrays(12), **base | change)
        refused(f"another pipeline: {message}. Rebuild", other.set_state, state)
    batches, changed = in_memory(arrays(12), **base), arrays(12)
    changed["image"][5] = -1
    refused("data was '", in_memory(changed, **base).set_state, state)
    refused("count was 12, is 13", in_memory(arrays(13), **base).set_state, state)
    refused(r"keys 'step' and 'fingerprint', got \[\]", batches.set_state, {})
    refused("step=-1 is outside", batches.set_state, {**state, "step": -1})


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_are_disjoint_and_equally_long(shards):
    options, steps = {"count": 11, "batch_size": 1, "seed": 2}, 11 // shards
    plans = [
        BatchPlan(**options, shard_index=i, shard_count=shards) for i in range(shards)
    ]
    assert {plan.steps_per_epoch for plan in plans} == {steps}
    left_out = set()
    for epoch in range(8):
        places = range(epoch * steps, (epoch + 1) * steps)
        seen = [int(plan.indices(place)[0]) for plan in plans for place in places]
        assert len(seen) == len(set(seen)) == steps * shards
        left_out |= set(range(11)) - set(seen)
    assert len(left_out) > 11 % shards  # not always the same ones


def test_shards_stay_in_step_with_short_batches():
    # Seven samples over two shards: three each, batches of two and one.
    for i in range(2):
        options = {"drop_remainder": False, "shard_index": i, "shard_count": 2}
        shard = in_memory(arrays(7), 2, **options)
        assert [len(batch) for batch in labels(shard, 4)] == [2, 1, 2, 1]


def test_bad_data_and_plans_are_refused(refused):
    refused("the data are empty", in_memory, {}, 1)
    refused("the data are empty", in_memory, arrays(0), 1)
    ragged = {"a": np.zeros(2), "b": np.zeros(3)}
    refused(r"arrays\['b'\] has shape \(3,\).*batch, 2", in_memory, ragged, 1)
    larger = r"batch_size=9 is larger than the 8 sample\(s\).*smaller"
    for message, batch_size, options in (
        (larger, 9, {}),
        (r"larger than the 4 sample\(s\)", 5, {"shard_count": 2}),
        (r"batch_size=0 is outside \[1", 0, {}),
        (r"seed=-1 must be at least 0", 1, {"seed": -1}),
        (r"shard_index=1 is outside \[0, 0\]", 1, {"shard_index": 1}),
        (r"shard_count=9 is outside \[1, 8\]", 1, {"shard_count": 9}),
        (r"batch_size=2\.0 .*give an integer", 2.0, {"error": TypeError}),
    ):
        refused(message, in_memory, arrays(8), batch_size, **options)


def test_integers_of_numpy_are_accepted(as_shipped):
    state = in_memory(arrays(8), np.int64(2), np.uint32(1)).get_state()
    in_memory(arrays(8), 2, 1).set_state(json.loads(json.dumps(state)))


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
    first, resumed = (array_record(path, 2, seed=1) for _ in range(2))
    assert labels(first, stop) == straight[:stop]
    next(resumed)
    resumed.set_state(json.loads(json.dumps(first.get_state())))
    assert labels(resumed, 3) == straight[stop:]
    first.close()
    resumed.close()


def test_a_state_survives_a_move_of_the_files_but_not_another_content(records, refused):
    state = array_record(records, 3).get_state()
    moved = [path.rename(path.with_name("moved-" + path.name)) for path in records]
    array_record(moved, 3).set_state(state)
    write_rows(moved[0], range(1, 8))
    refused("data was '", array_record(moved, 3).set_state, state)


def test_custom_records(records):
    def decode(record):
        return {"size": np.array(len(record))}

    batches = array_record(records, 2, shuffle=False, decode=decode)
    assert set(next(batches)) == {"size"}
    batches.close()


def test_truncated_and_missing_records_are_named(records, refused):
    content = records[1].read_bytes()
    for size in (len(content) - 1, len(content) // 2, 100, 0):
        records[1].write_bytes(content[:size])
        refused(r"b\.array_record is truncated or not an", array_record, records, 2)
    records[0].unlink()
    absent = r"a\.array_record does not exist"
    refused(absent, array_record, records, 2, error=FileNotFoundError)
    refused("paths is empty", array_record, [], 2)


def test_damaged_records_are_named(records, refused):
    content = bytearray(records[1].read_bytes())
    # The payload of the first record's chunk, past the 64 byte file signature.
    for i in range(64 + 60, 64 + 80):
        content[i] ^= 255
    records[1].write_bytes(content)
    batches = array_record(records, 11, threads=0)
    refused(r"cannot read records of .*b\.array_record", next, batches)


def test_writing_is_all_or_nothing(tmp_path, refused):
    path, two = tmp_path / "x.array_record", {"x": np.zeros(2)}
    assert write_array_record(path, [two] * 3) == 3
    before = path.read_bytes()
    shapes, ragged = (
        r"example 1 is .*\[3\].* but example 0 is",
        [two, {"x": np.ones(3)}],
    )
    refused(shapes, write_array_record, path, ragged)
    dtype, text = r"example 0\['x'\] has dtype <U2", [{"x": np.array("no")}]
    refused(dtype, write_array_record, path, text, error=TypeError)
    refused("no examples to write", write_array_record, path, [])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path, other = tmp_path / "x.array_record", tmp_path / "x.array_record.partial"
    other.write_text("of somebody else")

    def slow():
        yield {"x": np.zeros(2)}
        assert write_array_record(path, [{"x": np.ones(2)}] * 3) == 3
        assert len(list(tmp_path.iterdir())) == 3  # and the folder of the outer writer
        yield {"x": np.zeros(2)}

    assert write_array_record(path, slow()) == 2
    batch = next(array_record(path, 2, threads=0))
    np.testing.assert_array_equal(batch["x"], np.zeros((2, 2)))
    assert {p.name for p in tmp_path.iterdir()} == {path.name, other.name}
    assert other.read_text() == "of somebody else"


def test_bfloat16_and_scalars_survive_the_file(tmp_path):
    example = {"w": np.asarray(jnp.ones(2, jnp.bfloat16)), "n": 3, "flag": True}
    write_array_record(tmp_path / "r", [example])
    batch = next(array_record(tmp_path / "r", 1, threads=0))
    assert batch["w"].dtype == jnp.bfloat16 and batch["w"].shape == (1, 2)
    assert batch["n"].tolist() == [3] and batch["flag"].dtype == np.bool_


@pytest.mark.parametrize("kind", [">f4", ">i4", ">u2", ">f8", ">i8", "<f2", ">c8"])
def test_both_byte_orders_are_records_of_the_same_numbers(tmp_path, kind):
    example = {"x": np.array([1, 2, 300], kind), "n": np.array(7, kind)}
    same = {
        name: value.astype(value.dtype.newbyteorder("="))
        for name, value in example.items()
    }
    write_array_record(tmp_path / "r", [example, same])
    batch = next(array_record(tmp_path / "r", 2, threads=0))
    for name, value in same.items():
        assert batch[name].dtype == value.dtype and batch[name].dtype.isnative
        np.testing.assert_array_equal(batch[name], np.stack([value, value]))
    # and in memory, where jax takes the native order alone
    batch = next(in_memory({"x": np.array([[1, 2, 300]] * 3, kind)}, 2))
    assert batch["x"].dtype.isnative and batch["x"].tolist() == [[1, 2, 300]] * 2


def test_records_of_named_fields_are_refused(tmp_path, refused):
    example = {"x": np.zeros(2, [("a", "i4"), ("b", "f4")])}
    message = r"example 0\['x'\] has dtype \[\('a'"
    refused(message, write_array_record, tmp_path / "r", [example], error=TypeError)
