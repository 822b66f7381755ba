import functools
import json
import logging
import multiprocessing
import resource
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checks import same
from numpy.testing import assert_array_equal

from tmdjax import models, train


def tree(value=1.0, width=4):
    leaves = {"w": jnp.full((8, width), value), "h": jnp.ones(3, jnp.bfloat16)}
    return {"a": leaves, "n": jnp.int32(7)}


@pytest.fixture
def checkpoints(tmp_path):
    return train.Checkpoints(tmp_path)


@pytest.fixture
def refused(refused):
    return functools.partial(refused, error=train.CheckpointError)


def arrays_of(folder):
    """The files that hold the data of one checkpoint, largest last."""
    files = [p for p in folder.rglob("d/*") if p.is_file()]
    return sorted(files, key=lambda p: p.stat().st_size)


def test_round_trip(tmp_path):
    checkpoints = train.Checkpoints(tmp_path / "new" / "deep")
    assert checkpoints.restore() is None
    checkpoints.save(3, tree(), {"data": {"epoch": 2}})
    restored = checkpoints.restore()
    assert restored.step == 3 and restored.extra == {"data": {"epoch": 2}}
    same(restored.tree, tree())
    assert restored.tree["a"]["h"].dtype == ml_dtypes.bfloat16
    checkpoints.save(4, {}, {"accuracy": 0.5})
    assert checkpoints.restore() == (4, {}, {"accuracy": 0.5})


def test_train_state_and_sharding_round_trip(checkpoints):
    """A sharding is that of the tree to restore like."""
    everywhere = train.replicated(train.make_mesh(devices=jax.devices()[:1]))
    params = jax.device_put({"w": jnp.arange(6.0).reshape(2, 3)}, everywhere)
    optimizer = train.make_optimizer(train.OptimizerConfig(warmup_steps=3))
    state = train.create_state(params, optimizer, ema=True)
    checkpoints.save(1, state)
    restored = checkpoints.restore(like=jax.tree.map(jnp.zeros_like, state)).tree
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    same(restored, state)
    assert restored.params["w"].sharding == everywhere


def test_arrays_without_elements_and_another_model(checkpoints, refused):
    """A simulator's state has some; orbax refuses them."""
    given = {"a": {"none": jnp.zeros((2, 0), jnp.int32)}, "b": jnp.arange(3.0)}
    checkpoints.save(1, given)
    for like in (given, None):
        found = checkpoints.restore(like).tree
        assert found["a"]["none"].shape == (2, 0)
        assert found["a"]["none"].dtype == jnp.int32
        assert_array_equal(found["b"], given["b"])
    other = {"a": {"none": jnp.zeros((3, 0), jnp.int32)}}
    refused("another model", checkpoints.restore, given | other)
    checkpoints.save(2, tree())
    refused(r"another model.*a/w", checkpoints.restore, like=tree(width=5))


def test_keeps_the_last_two_and_the_best(tmp_path):
    checkpoints = train.Checkpoints(tmp_path, best="min")
    for step, score in enumerate((5.0, 1.0, 4.0, float("nan"), 3.0), 1):
        checkpoints.save(step, tree(step), score=score)
    assert checkpoints.steps() == [2, 4, 5] and checkpoints.best_step() == 2
    assert_array_equal(checkpoints.restore(step=2).tree["a"]["w"], 2.0)


def flipped(data, at=None, bit=0):
    """With one bit changed, in the middle unless told elsewhere."""
    at = len(data) // 2 if at is None else at
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


DAMAGES = {
    "flip": lambda path: path.write_bytes(flipped(path.read_bytes())),
    "truncate": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "remove": lambda path: path.unlink(),
    "manifest": lambda path: path.write_text('{"body": {"step": 2, "fi'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_falls_back(tmp_path, checkpoints, caplog, damage):
    checkpoints.save(1, tree(1.0))
    checkpoints.save(2, tree(2.0))
    folder = tmp_path / "step_0000000002"
    manifest = folder / "manifest.json"
    DAMAGES[damage](manifest if damage == "manifest" else arrays_of(folder)[-1])
    before = everything(tmp_path)
    with caplog.at_level(logging.WARNING, "tmdjax"):
        restored = checkpoints.restore()
    assert restored.step == 1 and float(restored.tree["a"]["w"][0, 0]) == 1
    assert "is damaged" in caplog.text and "the one before it, step 1" in caplog.text
    assert everything(tmp_path) == before
    checkpoints.save(2, tree(3.0))
    assert_array_equal(checkpoints.restore().tree["a"]["w"], 3.0)
    assert (tmp_path / "damaged_step_0000000002").exists()  # nothing is thrown away


def test_errors_of_a_damaged_step_a_place_and_extras(tmp_path, checkpoints, refused):
    checkpoints.save(1, tree())
    arrays_of(tmp_path / "step_0000000001")[-1].unlink()
    for _ in range(2):
        refused(r"step 1 in .* is damaged.*missing", checkpoints.restore, step=1)
    refused("no checkpoint of step 9", checkpoints.restore, step=9)
    (tmp_path / "file").write_text("")
    unwritable = train.Checkpoints(tmp_path / "file" / "inside")
    refused("intact: none", unwritable.save, 1, tree())
    extra, error = {"key": object()}, TypeError
    refused("not JSON serializable", checkpoints.save, 2, tree(), extra, error=error)
    assert checkpoints.steps() == [1]


def everything(folder):
    """All that a write could change: names, files behind them, and when."""
    return {
        (path.relative_to(folder).as_posix(), path.stat().st_ino, path.stat().st_mtime)
        for path in [folder, *folder.rglob("*")]
    }


def test_interrupted_save_is_ignored_and_replaced(tmp_path, checkpoints):
    checkpoints.save(1, tree(1.0))
    checkpoints.save(2, tree(2.0))
    new = tmp_path / "new_0000000002"
    (tmp_path / "step_0000000002").rename(new)
    (new / "manifest.json").unlink()  # killed before the manifest
    before = everything(tmp_path)
    assert checkpoints.restore().step == 1 and everything(tmp_path) == before
    checkpoints.save(2, tree(3.0))
    assert_array_equal(checkpoints.restore().tree["a"]["w"], 3.0)
    assert not new.exists()


@pytest.mark.parametrize(
    "old_is, new_is, kept",
    [
        ("step", "new", 2.0),
        ("old", "new", 2.0),
        ("old", "step", 2.0),
        ("old", None, 1.0),
    ],
)
def test_replacing_a_checkpoint_survives_a_kill(tmp_path, old_is, new_is, kept):
    """Wherever it falls in renaming old and new; a new one is whole or no checkpoint."""
    here, there = tmp_path / "a", tmp_path / "b"
    checkpoints = train.Checkpoints(here)
    checkpoints.save(0, tree(1.0))
    train.Checkpoints(there).save(0, tree(2.0))
    (here / "step_0000000000").rename(here / f"{old_is}_0000000000")
    if new_is:
        (there / "step_0000000000").rename(here / f"{new_is}_0000000000")
    else:
        (here / "new_0000000000").mkdir()
    before = everything(here)
    assert_array_equal(checkpoints.restore().tree["a"]["w"], kept)
    assert checkpoints.steps() == [0] and checkpoints.peek() == {}
    assert everything(here) == before  # a reader leaves it to the writer
    checkpoints.save(1, tree(4.0))
    assert_array_equal(checkpoints.restore(step=0).tree["a"]["w"], kept)
    names = {path.name for path in here.iterdir()}
    assert names == {"step_0000000000", "step_0000000001"}


@pytest.mark.parametrize(
    "name",
    ["step_0000000001.bak", "step_1", "step_best", "new_0000000001 (copy)", "old_mine"],
)
def test_folders_of_others_beside_checkpoints_stay(tmp_path, checkpoints, name):
    checkpoints.save(1, tree())
    shutil.copytree(tmp_path / "step_0000000001", tmp_path / name)
    for step in (2, 3, 4):
        checkpoints.save(step, tree(float(step)))
    assert checkpoints.steps() == [3, 4] and checkpoints.restore().step == 4
    assert len([p for p in (tmp_path / name).rglob("*") if p.is_file()]) > 2
    checkpoints.discard()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def _save_again_and_again(folder, seconds):
    """Every other save replaces the one before it, the others drop it."""
    checkpoints, end = (
        train.Checkpoints(folder, keep_last=1),
        time.monotonic() + seconds,
    )
    number = 0
    while time.monotonic() < end:
        number += 1
        leaves = {f"w{i}": np.full(500, number) for i in range(4)}
        checkpoints.save(number // 2 % 2, leaves, {"number": number})


# orbax closes its event loop under reads that fail beside the one it raises for
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_reader_beside_a_writer_finds_one_whole_checkpoint(tmp_path, caplog):
    """Whatever the writer replaces, moves or drops meanwhile."""
    train.Checkpoints(tmp_path).save(0, {"w": np.zeros(500)}, {"number": 0})
    context = multiprocessing.get_context("forkserver")
    writer = context.Process(target=_save_again_and_again, args=(tmp_path, 4.0))
    writer.start()
    numbers = set()
    while writer.is_alive():
        restored = train.Checkpoints(tmp_path).restore()
        number = restored.extra["number"]
        for leaf in restored.tree.values():
            assert_array_equal(leaf, number)
        numbers.add(number)
    assert writer.exitcode == 0 and len(numbers) > 3
    assert "is damaged" not in caplog.text


def test_every_bit_of_the_manifest_counts(tmp_path, checkpoints, refused):
    checkpoints.save(7, tree(), {"data": {"step": 1200}})
    folder = tmp_path / "step_0000000007"
    manifest = folder / "manifest.json"
    whole = manifest.read_bytes()
    meaning = json.loads(whole)
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert present == {"manifest.json", *meaning["body"]["files"]}
    for i in range(0, len(whole), 3):
        damaged = flipped(whole, i, i % 7)
        manifest.write_bytes(damaged)
        try:
            unchanged = json.loads(damaged) == meaning  # white space alone
        except ValueError:
            unchanged = False
        if not unchanged:
            refused("damaged", checkpoints.restore, step=7)


def test_a_queue_may_have_any_length(checkpoints, refused):
    """A vector of length 0 takes what was saved, whatever its length."""
    queue = np.arange(5, dtype=np.uint8)
    for step, saved in enumerate((queue, queue[:0])):
        checkpoints.save(step, {"queue": saved, "w": jnp.ones(2)})
        like = {"queue": np.zeros(0, np.uint8), "w": jnp.zeros(2)}
        found = checkpoints.restore(like=like).tree
        assert found["queue"].dtype == np.uint8
        same(found, {"queue": saved, "w": jnp.ones(2)})
    like = {"queue": queue, "w": jnp.zeros(2)}
    refused("another model", checkpoints.restore, like=like, step=1)


def test_full_disk_loses_nothing(tmp_path, checkpoints, refused):
    checkpoints.save(1, tree())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    noise = np.random.default_rng(0).normal(size=200_000)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        message = r"step 2.*intact: step 1.*Free space"
        refused(message, checkpoints.save, 2, {"big": noise})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoints.steps() == [1] and checkpoints.restore().step == 1
    assert not (tmp_path / "step_0000000002").exists()


def test_exported_model_loads(tmp_path, refused):
    spec = {"name": "mlp", "hidden": 8, "depth": 1}
    module, inputs = models.build(spec), (jnp.ones((2, 3)), jnp.full(2, 0.5), None)
    params = models.init_params(module, jax.random.key(0), *inputs)
    train.save_model(tmp_path, spec, params, {"note": "four"})
    apply_fn, loaded, meta = train.load_model(tmp_path)
    expected = models.functional(module)(params, *inputs)
    assert_array_equal(apply_fn(loaded, *inputs), expected)
    assert meta["note"] == "four" and meta["spec"] == spec
    refused("no whole model in", train.load_model, tmp_path / "absent")
