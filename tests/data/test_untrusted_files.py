"""Files and answers of strangers: their sizes are bounded before work starts."""

import json
import os
import struct
import time

import numpy as np
import pytest

from tmdjax.data import load
from tmdjax.models import load_decoder
from tmdjax.models.checkpoints.gguf import open_gguf
from tmdjax.models.checkpoints.safetensors import read_safetensors, write_safetensors


def test_more_layers_than_tensors_are_refused_at_once(tmp_path, refused):
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
    sizes |= {"num_hidden_layers": 10**9, "num_attention_heads": 2}
    text = json.dumps({"model_type": "llama", **sizes})
    (tmp_path / "config.json").write_text(text)
    write_safetensors(tmp_path / "model.safetensors", {"a": np.zeros(2, np.float32)})
    began = time.monotonic()
    refused("1000000000 layers, the checkpoint 1 tensors", load_decoder, tmp_path)
    assert time.monotonic() - began < 10


def test_pipes_are_not_read(tmp_path, refused):
    for name in ("config.json", "a.safetensors", "video.npy"):
        os.mkfifo(tmp_path / name)
    refused("config.json is no plain file", load_decoder, tmp_path)
    pipe = tmp_path / "a.safetensors"
    refused("is no plain file", read_safetensors, pipe)
    refused("absent", open_gguf, pipe, error=FileNotFoundError)
    refused("holds no", load, "video_files", folder=tmp_path, error=FileNotFoundError)


def test_lengths_in_a_gguf_file_are_checked(tmp_path, refused):
    pytest.importorskip("gguf")
    path, key = tmp_path / "a.gguf", struct.pack("<Q", 1) + b"k"
    head = struct.pack("<II", 0x46554747, 3)
    for counts, rest in (
        ((0, 1), key + struct.pack("<IIQ", 9, 0, 10**12)),  # a list of bytes
        ((10**12, 0), b""),
        ((0, 10**12), b""),
        ((0, 1), key + struct.pack("<IQ", 8, 10**12)),  # a text
    ):
        path.write_bytes(head + struct.pack("<QQ", *counts) + rest)
        refused("a.gguf .*is cut off or no GGUF file: it says", open_gguf, path)


def test_labels_do_not_wrap(tmp_path, refused):
    np.save(tmp_path / "video.npy", np.zeros((2, 1, 2, 2, 1), np.uint8))
    np.save(tmp_path / "label.npy", np.array([0, 2**32 + 1]))
    words = "greatest label of .*=4294967297 is outside"
    refused(words, load, "video_files", folder=tmp_path)
