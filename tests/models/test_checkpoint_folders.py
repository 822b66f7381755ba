"""Folders of checkpoints: saves that fail, two checkpoints in one, dtypes of a stack."""

import contextlib
import errno
import functools
import json
import os

import ml_dtypes
import numpy as np
import pytest
from model_helpers import checkpoint, equal

from tmdjax import models
from tmdjax.core import files
from tmdjax.models import load_decoder, save_decoder
from tmdjax.models.checkpoints.decoder import params_from_hf
from tmdjax.models.checkpoints.layout import cast_tensor, read_weights, write_checkpoint
from tmdjax.models.checkpoints.safetensors import read_safetensors, write_safetensors

CASE = "llama_grouped_tied"
SMALL = 10**9, 4000, 2000
"""Sizes of files: one, several, more."""


@pytest.fixture
def saved():
    config, weights = checkpoint(CASE)
    params = params_from_hf(config, weights)
    return config, params, {**params, "norm": {"scale": params["norm"]["scale"] + 1}}


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Disk:
    """A disk that is full, or refuses names, after a number of calls."""

    def __init__(self, monkeypatch, call, good):
        self.left, self.call = good, getattr(os, call)
        monkeypatch.setattr(files.os, call, self)

    def __call__(self, *arguments):
        if not self.left:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.left -= 1
        return self.call(*arguments)


@pytest.mark.parametrize("before", SMALL)
@pytest.mark.parametrize("after", SMALL)
def test_a_save_that_fails_leaves_what_was_there(
    tmp_path, saved, refused, before, after
):
    config, params, other = saved
    save_decoder(tmp_path, config, params, max_shard_bytes=before)
    mine = ("model.fp16.safetensors", "average.safetensors", "model_ema.safetensors")
    mine += ("model-00001-of-00009.safetensors",)  # of no index: another's
    for name in mine:
        (tmp_path / name).write_bytes(name.encode())
    there = content(tmp_path)
    save = dict(max_shard_bytes=after)
    wide = {**params, "embedding": params["embedding"].astype("f8") + 1e39}
    big = {**params, "embedding": params["embedding"].astype("f4") + 70000}
    half = models.DecoderConfig(**vars(config) | {"dtype": "float16"})
    complex_ = {"a": np.zeros(2, np.complex64)}
    write = (write_checkpoint, tmp_path, "model", complex_, {}, after)
    refused("'a' has dtype complex64", *write, error=TypeError)
    refused("beyond 65504, the largest of float16", save_decoder, tmp_path, half, big)
    refused("number.s. beyond 3.4.*e.38", save_decoder, tmp_path, config, wide, **save)
    less = {name: leaf for name, leaf in params.items() if name != "norm"}
    refused("norm/scale: None", save_decoder, tmp_path, config, less, **save)
    odd = dict(extra={"stop": {1, 2}}, **save)
    refused(
        "not JSON ser", save_decoder, tmp_path, config, other, **odd, error=TypeError
    )
    for good in range(2):  # full at the first file, and at the second
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, "fsync", good)
            call = (save_decoder, tmp_path, config, other)
            refused("cannot write .*Free space", *call, **save, error=OSError)
    assert content(tmp_path) == there
    # and one that does not fail leaves nothing of the old, and all that is another's
    save_decoder(tmp_path, config, other, **save)
    equal(load_decoder(tmp_path)[1], other)
    index = tmp_path / "model.safetensors.index.json"
    own = {"model.safetensors"}
    if index.exists():
        own = {index.name, *json.loads(index.read_text())["weight_map"].values()}
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", *own, *mine}
    assert {name: there[name] for name in mine} == {
        name: (tmp_path / name).read_bytes() for name in mine
    }


@pytest.mark.parametrize("before", [999, 8, 4])
@pytest.mark.parametrize("after", [999, 8, 4])
def test_a_save_cut_off_between_names_is_no_mixture(tmp_path, before, after):
    """Whatever the moment, a reader meets the old weights, the new ones, or an error."""
    old, new = ({name: np.full(1, i, "f4") for name in "abc"} for i in range(2))
    seen = set()
    for good in range(7):
        folder = tmp_path / str(good)
        write_checkpoint(folder, "model", old, {}, before)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, "replace", good)
            with contextlib.suppress(OSError):
                write_checkpoint(folder, "model", new, {}, after)
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        try:
            found = read_weights(folder, "model")
        except (ValueError, FileNotFoundError) as error:
            # of shards that have the names of the old ones, neither is whole meanwhile
            same = before == after < 999
            assert ("neither" if same else "two checkpoints") in str(error)
            continue
        expected = old if found["a"] == old["a"] else new
        equal(found, expected)
        seen.add(float(found["a"][0]))
    assert 1 in seen


def test_a_name_that_a_folder_has(tmp_path, saved, refused):
    config, params, _ = saved
    save_decoder(tmp_path, config, params, max_shard_bytes=2000)
    (tmp_path / "model-00002-of-00004.safetensors").mkdir()
    there = {p.name for p in tmp_path.iterdir()}
    tensors = {name: np.zeros(2, "f4") for name in "abcd"}
    write = (write_checkpoint, tmp_path, "model", tensors, {}, 8)
    refused("00002-of-00004.* a folder has that name", *write, error=OSError)
    assert {p.name for p in tmp_path.iterdir()} == there
    equal(load_decoder(tmp_path)[1], params)


def test_an_old_index_removes_nothing_outside_its_folder(tmp_path, saved):
    config, params, _ = saved
    folder, outside = tmp_path / "in", tmp_path / "out.safetensors"
    outside.write_bytes(b"mine")
    for old in (
        {"weight_map": {"a": "../out.safetensors", "b": "config.json"}},
        {"weight_map": {"a": str(outside), "b": 3}},
        {"weight_map": ["a"]},
        [],
    ):
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors.index.json").write_text(json.dumps(old))
        save_decoder(folder, config, params)
        assert outside.read_bytes() == b"mine"
        equal(load_decoder(folder)[1], params)


def test_adapters_that_cannot_be_saved_leave_the_old_ones(tmp_path, refused):
    made = {"blocks": {"mlp": {"up": {"kernel": {}}}}}
    kernel = made["blocks"]["mlp"]["up"]["kernel"]
    kernel |= {"a": np.ones((2, 16, 3), "f4"), "b": np.ones((2, 3, 24), "f4")}
    models.save_adapters(tmp_path, made, 4.0)
    there = content(tmp_path)
    save = (models.save_adapters, tmp_path, made)
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, "fsync", 1)
        refused("cannot write .*adapter_config", *save, 8.0, error=OSError)
    kernel["a"] = kernel["a"].astype(complex)
    refused("dtype complex128", *save, 8.0, error=TypeError)
    assert content(tmp_path) == there
    # adapters in shards go once the new ones are whole: nobody finds two sets
    kernel["a"] = kernel["a"].real
    weights = there["adapter_model.safetensors"]
    where = {"weight_map": {"a": "adapter_model-1.safetensors"}}
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model-1.safetensors").write_bytes(weights)
    index = tmp_path / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps(where))
    models.save_adapters(tmp_path, made, 4.0)
    assert content(tmp_path).keys() == there.keys()


def test_two_checkpoints_in_a_folder_are_refused(tmp_path, refused):
    ours = "diffusion_pytorch_model"
    for stem in ("model", ours):
        old, new = {"a": np.zeros(3, "f4")}, {"a": np.ones(3, "f4")}
        write_checkpoint(tmp_path, stem, {**new, "b": new["a"]}, {}, 12)
        index = tmp_path / f"{stem}.safetensors.index.json"
        shards = read_weights(tmp_path, stem)
        write_safetensors(tmp_path / f"{stem}.safetensors", old)
        message = f"two checkpoints, {stem}.safetensors and .*Remove {stem}.safetens"
        refused(message, read_weights, tmp_path, stem)
        # either remedy of the message helps
        text = index.read_text()
        index.unlink()
        equal(read_weights(tmp_path, stem), old)
        (tmp_path / f"{stem}.safetensors").unlink()
        index.write_text(text)
        equal(read_weights(tmp_path, stem), shards)
    # an index of one file, of that very name, is one checkpoint
    write_safetensors(tmp_path / "model.safetensors", old)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    equal(read_weights(tmp_path, "model"), old)
    for odd in ({}, {"weight_map": {"a": 3}}, {"weight_map": []}):
        index.write_text(json.dumps(odd))
        refused("index.json lacks 'weight_map'", read_weights, tmp_path, "model")


def test_a_tensor_is_read_from_the_file_that_the_index_names(tmp_path):
    """A shard that was left from an earlier save may hold the same name."""
    for number in (1, 2):
        tensors = {"a": np.full(2, number, "f4"), f"own{number}": np.zeros(1, "f4")}
        write_safetensors(tmp_path / f"{number}.safetensors", tensors)
    for number in (1, 2):
        places = {"a": f"{number}.safetensors"}
        places |= {f"own{n}": f"{n}.safetensors" for n in (1, 2)}
        index = json.dumps({"weight_map": places})
        (tmp_path / "model.safetensors.index.json").write_text(index)
        assert (read_weights(tmp_path, "model")["a"] == number).all()


def test_weights_of_another_format_are_named_with_what_turns_them(tmp_path, refused):
    (tmp_path / "training_args.bin").write_bytes(b"")
    missing = functools.partial(refused, error=FileNotFoundError)
    missing("in the safetensors format.$", read_weights, tmp_path, "model")
    for name, remedy in (
        ("pytorch_model-00001-of-00002.bin", "load it with its own library and save"),
        ("flax_model.msgpack", "load it with its own library and save it there with s"),
        ("model-q4.gguf", "models.load_gguf reads it"),
        ("consolidated.safetensors", "rename it if it is the whole checkpoint"),
    ):
        (tmp_path / name).write_bytes(b"")
        missing(f"It holds {name}: {remedy}", read_weights, tmp_path, "model")
        (tmp_path / name).unlink()


FLOATS = {
    **{"f2": np.float16, "bf": ml_dtypes.bfloat16, "f4": np.float32, "f8": np.float64},
    **{"e4": ml_dtypes.float8_e4m3fn, "e5": ml_dtypes.float8_e5m2, ">f4": ">f4"},
}
UP = "model.layers.{}.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "kinds, expected",
    [
        *((f"{kind} {kind}", FLOATS[kind]) for kind in ("f2", "bf", "f4", "f8", "e4")),
        *((pair, np.float32) for pair in ("e4 f2", "f2 bf", "bf f2", "e5 e4", "f2 f4")),
        ("e4 f8", np.float64),
        ("f8 bf", np.float64),
        (">f4 >f4", np.float32),
        (">f4 e4", np.float32),
    ],
)
def test_layers_of_several_dtypes_keep_their_numbers(kinds, expected):
    config, weights = checkpoint(CASE)
    kinds = [np.dtype(FLOATS[kind]) for kind in kinds.split()]
    rng = np.random.default_rng(0)
    layers = [(300 * rng.normal(size=(24, 16))).clip(-440, 440) for _ in kinds]
    if kinds[1] == FLOATS["bf"]:
        layers[1][0, 0] = 1e30  # beyond float16 and float8
    layers = [layer.astype(kind) for layer, kind in zip(layers, kinds)]
    weights |= {UP.format(i): layer for i, layer in enumerate(layers)}
    params = params_from_hf(config, weights, dtype=None)
    found = params["blocks"]["mlp"]["up"]["kernel"]
    assert found.dtype == expected and found.dtype.isnative
    for row, layer in zip(found, layers):
        np.testing.assert_array_equal(row.astype("f8"), layer.T.astype("f8"))
    # the leaves beside them keep their own dtype
    assert params["blocks"]["mlp"]["down"]["kernel"].dtype == np.float32


def test_numbers_that_a_dtype_cannot_hold_are_named(refused):
    config, weights = checkpoint(CASE)
    name = UP.format(1)
    for value, dtype, message in (
        (7.0e4, np.float16, "has 1 number.s. beyond 65504, the largest of float16"),
        (65536.0, np.float16, "up to 65536"),
        (500.0, ml_dtypes.float8_e4m3fn, "beyond 448, the largest of float8_e4m3fn"),
    ):
        weights[name] = weights[name].astype(ml_dtypes.bfloat16)
        weights[name][3, 2] = value
        refused(f"{name} {message}|{message}", params_from_hf, config, weights, dtype)
        params_from_hf(config, weights, np.float32)
    # what is infinite stays so, and small numbers round
    odd = np.array([np.inf, -np.inf, np.nan, 1e-9, 65504], np.float32)
    np.testing.assert_array_equal(
        cast_tensor("odd", odd, np.float16),
        np.array([np.inf, -np.inf, np.nan, 0, 65504], np.float16),
    )
    weights[name] = np.ones((24, 16), np.int8)
    refused(f"{name} is int8, expected floating", params_from_hf, config, weights)


def test_both_byte_orders_are_written_as_the_same_file(tmp_path):
    numbers = np.arange(6, dtype="f4").reshape(2, 3)
    write_safetensors(tmp_path / "a", {"a": numbers, "i": np.array(7, "i4")})
    write_safetensors(
        tmp_path / "b", {"a": numbers.astype(">f4"), "i": np.array(7, ">i4")}
    )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    equal(read_safetensors(tmp_path / "b")["a"], numbers)
