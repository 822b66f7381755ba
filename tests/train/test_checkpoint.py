import json
import logging
import os
import resource
import signal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from numpy.testing import assert_array_equal

from tmdjax import models, train


def tree(value=1.0):
    return {
        "a": {"w": jnp.full((8, 4), value), "h": jnp.ones(3, jnp.bfloat16)},
        "n": jnp.int32(7),
    }


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
    jax.tree.map(assert_array_equal, restored.tree, tree())
    assert restored.tree["a"]["h"].dtype == ml_dtypes.bfloat16


def test_train_state_round_trip(tmp_path):
    params = {"w": jnp.arange(6.0).reshape(2, 3)}
    optimizer = train.make_optimizer(train.OptimizerConfig(warmup_steps=3))
    state = train.create_state(params, optimizer, ema=True)
    checkpoints = train.Checkpoints(tmp_path)
    checkpoints.save(1, state)
    fresh = train.create_state(
        jax.tree.map(jnp.zeros_like, params), optimizer, ema=True
    )
    restored = checkpoints.restore(like=fresh).tree
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(assert_array_equal, restored, state)


def test_arrays_without_elements(tmp_path):
    """A simulator's state has some; orbax refuses them."""
    tree = {"a": {"none": jnp.zeros((2, 0), jnp.int32)}, "b": jnp.arange(3.0)}
    checkpoints = train.Checkpoints(tmp_path)
    checkpoints.save(1, tree)
    for like in (tree, None):
        found = checkpoints.restore(like).tree
        assert found["a"]["none"].shape == (2, 0)
        assert found["a"]["none"].dtype == jnp.int32
        assert_array_equal(found["b"], tree["b"])
    with pytest.raises(train.CheckpointError, match="another model"):
        checkpoints.restore(tree | {"a": {"none": jnp.zeros((3, 0), jnp.int32)}})


def test_nothing_but_extras(tmp_path):
    checkpoints = train.Checkpoints(tmp_path)
    checkpoints.save(1, {}, {"accuracy": 0.5})
    assert checkpoints.restore() == (1, {}, {"accuracy": 0.5})


def test_keeps_the_last_two_and_the_best(tmp_path):
    checkpoints = train.Checkpoints(tmp_path, best="min")
    for step, score in [(1, 5.0), (2, 1.0), (3, 4.0), (4, float("nan")), (5, 3.0)]:
        checkpoints.save(step, tree(step), score=score)
    assert checkpoints.steps() == [2, 4, 5] and checkpoints.best_step() == 2
    assert_array_equal(checkpoints.restore(step=2).tree["a"]["w"], 2.0)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_damaged_checkpoint_falls_back(tmp_path, caplog, damage):
    checkpoints = train.Checkpoints(tmp_path)
    checkpoints.save(1, tree(1.0))
    checkpoints.save(2, tree(2.0))
    folder = tmp_path / "step_0000000002"
    victim = arrays_of(folder)[-1]
    if damage == "flip":
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(bytes(data))
    elif damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-5])
    elif damage == "remove":
        victim.unlink()
    else:
        (folder / "manifest.json").write_text('{"body": {"step": 2, "fi')
    with caplog.at_level(logging.WARNING, "tmdjax"):
        restored = checkpoints.restore()
    assert restored.step == 1 and float(restored.tree["a"]["w"][0, 0]) == 1
    assert "is damaged" in caplog.text and "the one before it, step 1" in caplog.text
    assert (tmp_path / "damaged_step_0000000002").exists()  # nothing is thrown away


def test_a_given_damaged_step_is_an_error(tmp_path):
    checkpoints = train.Checkpoints(tmp_path)
    checkpoints.save(1, tree())
    arrays_of(tmp_path / "step_0000000001")[-1].unlink()
    with pytest.raises(
        train.CheckpointError, match=r"step 1 in .* is damaged.*missing"
    ):
        checkpoints.restore(step=1)
    with pytest.raises(train.CheckpointError, match="no checkpoint of step 9"):
        checkpoints.restore(step=9)


def test_interrupted_save_is_ignored_and_replaced(tmp_path):
    checkpoints = train.Checkpoints(tmp_path)
    checkpoints.save(1, tree(1.0))
    checkpoints.save(2, tree(2.0))
    new = tmp_path / "new_0000000002"
    (tmp_path / "step_0000000002").rename(new)
    (new / "manifest.json").unlink()  # killed before the manifest
    assert checkpoints.restore().step == 1 and not new.exists()
    checkpoints.save(2, tree(3.0))
    assert_array_equal(checkpoints.restore().tree["a"]["w"], 3.0)


@pytest.mark.parametrize("killed", ["before the swap", "inside", "after"])
def test_replacing_a_checkpoint_survives_a_kill(tmp_path, killed):
    train.Checkpoints(tmp_path / "b").save(0, tree(2.0))
    new = tmp_path / "b" / "step_0000000000"
    here = tmp_path / "a"
    checkpoints = train.Checkpoints(here)
    checkpoints.save(0, tree(1.0))
    if killed == "before the swap":
        new.rename(here / "new_0000000000")
    elif killed == "inside":
        (here / "step_0000000000").rename(here / "old_0000000000")
        new.rename(here / "new_0000000000")
    else:
        (here / "step_0000000000").rename(here / "old_0000000000")
        new.rename(here / "step_0000000000")
    assert_array_equal(checkpoints.restore().tree["a"]["w"], 2.0)
    assert [p.name for p in here.iterdir()] == ["step_0000000000"]


def test_only_the_old_one_left(tmp_path):
    checkpoints = train.Checkpoints(tmp_path)
    checkpoints.save(0, tree(1.0))
    (tmp_path / "step_0000000000").rename(tmp_path / "old_0000000000")
    (tmp_path / "new_0000000000").mkdir()  # not whole
    assert_array_equal(checkpoints.restore().tree["a"]["w"], 1.0)


def test_every_bit_of_the_manifest_counts(tmp_path):
    checkpoints = train.Checkpoints(tmp_path)
    checkpoints.save(7, tree(), {"data": {"step": 1200}})
    manifest = tmp_path / "step_0000000007" / "manifest.json"
    whole = manifest.read_bytes()
    meaning = json.loads(whole)
    for i in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[i] ^= 1 << (i % 7)
        manifest.write_bytes(bytes(flipped))
        try:
            same = json.loads(flipped) == meaning  # white space alone
        except ValueError:
            same = False
        if not same:
            with pytest.raises(train.CheckpointError, match="damaged"):
                checkpoints.restore(step=7)


def test_full_disk_loses_nothing(tmp_path):
    checkpoints = train.Checkpoints(tmp_path)
    checkpoints.save(1, tree())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    noise = np.random.default_rng(0).normal(size=200_000)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(
            train.CheckpointError, match=r"step 2.*intact: step 1.*Free space"
        ):
            checkpoints.save(2, {"big": noise})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoints.steps() == [1] and checkpoints.restore().step == 1
    assert not (tmp_path / "step_0000000002").exists()


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    checkpoints = train.Checkpoints(tmp_path / "file" / "inside")
    with pytest.raises(train.CheckpointError, match="intact: none"):
        checkpoints.save(1, tree())


def test_another_models_checkpoint_is_refused(tmp_path):
    checkpoints = train.Checkpoints(tmp_path)
    checkpoints.save(1, tree())
    other = tree()
    other["a"]["w"] = jnp.zeros((8, 5))
    with pytest.raises(train.CheckpointError, match=r"another model.*a/w"):
        checkpoints.restore(like=other)


def test_extra_must_be_json(tmp_path):
    checkpoints = train.Checkpoints(tmp_path)
    checkpoints.save(1, tree())
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoints.save(1, tree(), {"key": object()})
    assert checkpoints.restore().step == 1


def test_manifest_covers_every_file(tmp_path):
    train.Checkpoints(tmp_path).save(1, tree())
    folder = tmp_path / "step_0000000001"
    listed = set(json.loads((folder / "manifest.json").read_text())["body"]["files"])
    present = {
        os.path.relpath(os.path.join(root, name), folder)
        for root, _, names in os.walk(folder)
        for name in names
    }
    assert present - listed == {"manifest.json"} and listed <= present


def test_exported_model_loads(tmp_path):
    spec = {"name": "mlp", "hidden": 8, "depth": 1}
    module = models.build(spec)
    x, t = jnp.ones((2, 3)), jnp.full(2, 0.5)
    params = models.init_params(module, jax.random.key(0), x, t, None)
    train.save_model(tmp_path, spec, params, {"note": "four"})
    apply_fn, loaded, meta = train.load_model(tmp_path)
    assert_array_equal(
        apply_fn(loaded, x, t, None), models.functional(module)(params, x, t, None)
    )
    assert meta["note"] == "four" and meta["spec"] == spec
    with pytest.raises(train.CheckpointError, match="no whole model in"):
        train.load_model(tmp_path / "absent")


def test_restores_onto_a_sharding(tmp_path):
    mesh = train.make_mesh(devices=jax.devices()[:1])
    params = jax.device_put({"w": jnp.ones((4, 4))}, train.replicated(mesh))
    checkpoints = train.Checkpoints(tmp_path)
    checkpoints.save(1, params)
    restored = checkpoints.restore(like=params).tree
    assert restored["w"].sharding == train.replicated(mesh)
    optax.global_norm(restored)
