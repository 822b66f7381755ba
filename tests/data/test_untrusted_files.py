"""Files and answers of strangers: their sizes are bounded before work starts."""

import importlib.util
import json
import os
import struct
import time

import numpy as np
import pytest
from PIL import Image

from tmdjax.data import convert, load, pde, tfds_sets
from tmdjax.data.image_folders import files_below
from tmdjax.generation import load_tokenizer
from tmdjax.models import load_decoder
from tmdjax.models.checkpoints.gguf import open_gguf
from tmdjax.models.checkpoints.safetensors import read_safetensors, write_safetensors


def test_more_layers_than_tensors_are_refused_at_once(tmp_path, refused):
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
    sizes |= {"num_hidden_layers": 9_999, "num_attention_heads": 2}
    text = json.dumps({"model_type": "llama", **sizes})
    (tmp_path / "config.json").write_text(text)
    write_safetensors(tmp_path / "model.safetensors", {"a": np.zeros(2, np.float32)})
    began = time.monotonic()
    refused("9999 layers, the checkpoint 1 tensors", load_decoder, tmp_path)
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


def test_links_in_a_ring_have_an_end(tmp_path):
    folders = [tmp_path / "in" / "class" / str(i) for i in range(9)]
    for folder in folders:
        folder.mkdir(parents=True)
    Image.new("RGB", (2, 2)).save(folders[0] / "a.png")
    for folder in folders:  # 9! ways through them
        for other in folders:
            (folder / f"to{other.name}").symlink_to(other)
    found = files_below(tmp_path / "in")
    assert [path.name for path in found] == ["a.png"]


def test_what_is_no_plain_or_too_large_a_file_is_not_opened(tmp_path, refused):
    for name in ("a.png", "b.npy", "b.json", "tokenizer.json"):
        os.mkfifo(tmp_path / name)
    refused("a.png is no image .*no plain file", convert.image_columns, tmp_path)
    for name in ("b.npy", "b.json"):
        words = f"{name} is no array .*no plain file"
        refused(words, convert.array_columns, [tmp_path / name])
    if importlib.util.find_spec("tokenizers"):
        words = "tokenizer.json cannot be read .*no plain file"
        refused(words, load_tokenizer, tmp_path, eos="e")
    with open(tmp_path / "c.png", "wb") as file:
        file.truncate(10**9 + 1)  # sparse
    (tmp_path / "a.png").unlink()
    refused("c.png is no image .*has at most", convert.image_columns, tmp_path)
    (tmp_path / "c.txt").write_bytes(b"x" * (10**6 + 1))
    Image.new("RGB", (2, 2)).save(tmp_path / "c.png")
    read = convert.image_columns(tmp_path)["text"].read
    refused("c.txt has 1000001 bytes; .*at most 1000000", read, 0)


def test_few_bytes_do_not_ask_for_many(tmp_path, refused):
    np.save(tmp_path / "label.npy", np.array([0, 2**62]))
    words = "greatest label of .*=4611686018427387904 is outside"
    refused(words, convert.array_columns, [tmp_path / "label.npy"])
    texts = ["x"] * 10**5 + ["y" * 10**6]
    refused("shorten text 100000", tfds_sets.encode_texts, texts)
    np.savez(tmp_path / "video.npz", a=np.zeros(2))
    (tmp_path / "video.npz").rename(tmp_path / "video.npy")
    words = "it holds several arrays"
    refused(words, load, "video_files", folder=tmp_path)
    refused(words, convert.array_columns, [tmp_path / "video.npy"])
    refused(words, pde.read_apebench, tmp_path / "video.npy")


def test_a_header_takes_no_longer_than_it_is_long(tmp_path, refused):
    path = tmp_path / "a.safetensors"
    many = ",".join(f'"{i}":{{}}' for i in range(10**5))
    words = ",".join(f'"{i}":""' for i in range(10**5))
    for text, message in (
        ('{"a":' + "[" * 10**5, "is no safetensors file"),
        (f'{{{many},"99999":{{}}}}', "'99999' stands in it twice"),
        (f'{{"__metadata__":{{{words}}},"a":{{}}}}', "entry of tensor 'a' is damaged"),
    ):
        path.write_bytes(struct.pack("<Q", len(text)) + text.encode())
        began = time.process_time()
        refused(message, read_safetensors, path)
        assert time.process_time() - began < 5
