"""Tokenizers: round trips, the libraries' own results, special tokens, damage."""

import base64
import json

import numpy as np
import pytest

from tmdjax.generation import (
    CharTokenizer,
    gguf_tokenizer,
    load_tokenizer,
    render_chat,
    tiktoken_tokenizer,
)
from tmdjax.generation.byte_pairs import PATTERNS, QWEN_SPECIALS

TEXT = "It's 12 o'clock,\n  and the naïve café\r\n\n has 3 €  "
MERGES = ["t h", "th e", "Ġ the", "1 2", "Ġ Ġ", "a n", "an d", "Ċ Ċ"]


def byte_letters():
    """The printable letter that byte-pair vocabularies have for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    for byte in range(256):
        letters.setdefault(byte, chr(256 + len(letters) - len(plain)))
    return letters


def vocabulary():
    tokens = [*byte_letters().values(), *(merge.replace(" ", "") for merge in MERGES)]
    return {token: index for index, token in enumerate(tokens)}


@pytest.fixture
def checkpoint(tmp_path):
    vocab = vocabulary()
    added = {
        str(len(vocab) + i): {"content": name} for i, name in enumerate(QWEN_SPECIALS)
    }
    for name, content in {
        "vocab.json": json.dumps(vocab),
        "merges.txt": "\n".join(["#version: 0.2", *MERGES]),
        "tokenizer_config.json": json.dumps(
            {
                "eos_token": "<|im_end|>",
                "pad_token": {"content": "<|endoftext|>"},
                "added_tokens_decoder": added,
            }
        ),
    }.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    return tmp_path


def ranks_file(path):
    """The same vocabulary as ranks: merged tokens come in the order of merging."""
    letters = {letter: byte for byte, letter in byte_letters().items()}
    lines = []
    for token, rank in vocabulary().items():
        raw = bytes(letters[letter] for letter in token)
        lines.append(f"{base64.b64encode(raw).decode()} {rank}")
    path.write_text("\n".join(lines))
    return path


def test_characters():
    tokenizer = CharTokenizer("0123456789+=", specials=["<bos>"])
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 15)
    ids = tokenizer.encode("<bos>1+2=3<eos><pad>")
    assert ids == [2, 4, 13, 5, 14, 6, 1, 0]
    assert tokenizer.decode(np.array(ids)) == "<bos>1+2=3<eos><pad>"
    assert tokenizer.special_id("<bos>") == 2
    ends = CharTokenizer("<x", specials=["<x", "<x>"])  # no name hides a longer one
    assert ends.encode("<x><x<") == [ends.special_id("<x>"), ends.special_id("<x"), 4]
    dollar = CharTokenizer("01$", eos="$")
    assert dollar.encode("10$") == [2, 1, 3] and dollar.eos_id == 3
    assert dollar.special_id("$") == 3
    with pytest.raises(
        ValueError, match="character 'x' at 1 of '1x' is not in the alp"
    ):
        dollar.encode("1x")
    with pytest.raises(ValueError, match=r"given twice: \['1'\]"):
        CharTokenizer("11")
    with pytest.raises(ValueError, match=r"ids \(a token\)=4 is outside \[0, 3\]"):
        dollar.decode([1, 4])
    with pytest.raises(ValueError, match="'<bos>' is no special token"):
        dollar.special_id("<bos>")


def test_checkpoint_by_parts_and_whole(checkpoint):
    library = pytest.importorskip("tokenizers")
    parts = load_tokenizer(checkpoint)
    specials = [parts.special_id(name) for name in QWEN_SPECIALS]
    assert specials == [264, 265, 266]
    assert (parts.eos_id, parts.pad_id, parts.vocab_size) == (266, 264, 267)
    ids = parts.encode(TEXT + "<|im_end|>")
    assert ids[-1] == 266 and parts.decode(ids) == TEXT + "<|im_end|>"
    assert parts.encode("the") == [vocabulary()["the"]]
    # digits are never merged under this pattern
    assert parts.encode("12") == [vocabulary()["1"], vocabulary()["2"]]
    # the same tokenizer as one file, as the library makes it
    whole = library.Tokenizer(
        library.models.BPE(
            vocab=vocabulary(), merges=[tuple(m.split()) for m in MERGES]
        )
    )
    pieces = library.pre_tokenizers
    whole.pre_tokenizer = pieces.Sequence(
        [
            pieces.Split(library.Regex(PATTERNS["qwen2"]), "isolated"),
            pieces.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    whole.decoder = library.decoders.ByteLevel()
    whole.add_special_tokens(list(QWEN_SPECIALS))
    whole.save(str(checkpoint / "tokenizer.json"))
    assert load_tokenizer(checkpoint).encode(TEXT) == parts.encode(TEXT)


def test_ranks_and_merges_agree(checkpoint, tmp_path):
    pytest.importorskip("tokenizers")
    pytest.importorskip("tiktoken")
    ranks = tiktoken_tokenizer(ranks_file(tmp_path / "ranks.tiktoken"))
    parts = load_tokenizer(checkpoint)
    assert ranks.encode(TEXT) == parts.encode(TEXT)
    assert ranks.decode(ranks.encode(TEXT)) == TEXT
    assert ranks.encode("<|im_start|>the") == [265, vocabulary()["the"]]
    assert (ranks.eos_id, ranks.pad_id, ranks.vocab_size) == (266, 264, 267)
    # what was composed of two code points is one
    assert (
        ranks.encode("cafe\u0301") == parts.encode("cafe\u0301") == ranks.encode("café")
    )
    assert ranks.decode(ranks.encode("é")[:1]) == "\ufffd"


def test_the_real_qwen_ranks():
    pytest.importorskip("tiktoken")
    package = pytest.importorskip("importlib.util").find_spec("dashscope")
    if package is None:
        pytest.skip("dashscope, which holds Qwen's ranks, is not installed")
    from pathlib import Path

    folder = Path(package.submodule_search_locations[0])
    tokenizer = tiktoken_tokenizer(folder / "resources/qwen.tiktoken")
    assert tokenizer.encode("The answer is ") == [785, 4226, 374, 220]
    assert tokenizer.special_id("<|endoftext|>") == 151643
    assert tokenizer.eos_id == 151645 and tokenizer.vocab_size == 151646
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def write_gguf(path, change=None):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    vocab = vocabulary()
    tokens = [*vocab, *QWEN_SPECIALS]
    writer.add_tokenizer_model((change or {}).get("model", "gpt2"))
    writer.add_tokenizer_pre((change or {}).get("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(vocab) + [3] * 3)
    writer.add_token_merges(MERGES)
    if not (change or {}).get("no_eos"):
        writer.add_eos_token_id(266)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf(tmp_path):
    pytest.importorskip("tokenizers")
    tokenizer = gguf_tokenizer(write_gguf(tmp_path / "a.gguf"))
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (266, 266, 267)
    ids = tokenizer.encode("<|im_start|>" + TEXT)
    assert ids[0] == 265 and tokenizer.decode(ids) == "<|im_start|>" + TEXT
    # digits stand alone
    assert tokenizer.encode("12") == [vocabulary()["1"], vocabulary()["2"]]
    with pytest.raises(ValueError, match="tokenizer of kind 'llama'; 'gpt2'"):
        gguf_tokenizer(write_gguf(tmp_path / "b.gguf", dict(model="llama")))
    with pytest.raises(ValueError, match="pattern='viking' is not one of"):
        gguf_tokenizer(write_gguf(tmp_path / "c.gguf", dict(pre="viking")))
    with pytest.raises(ValueError, match=r"d.gguf lacks the key .*eos_token_id"):
        gguf_tokenizer(write_gguf(tmp_path / "d.gguf", dict(no_eos=True)))


def test_special_tokens_that_are_not_there(checkpoint, tmp_path):
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match="'<|im_ende|>' is no special .* Did you mean"):
        load_tokenizer(checkpoint, eos="<|im_ende|>")
    with pytest.raises(ValueError, match="'<think>' is no special token"):
        load_tokenizer(checkpoint).special_id("<think>")
    (checkpoint / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no eos_token; pass eos="):
        load_tokenizer(checkpoint)
    pytest.importorskip("tiktoken")
    with pytest.raises(ValueError, match=r"'<\|eot_id\|>' is no special token"):
        tiktoken_tokenizer(ranks_file(tmp_path / "r.tiktoken"), eos="<|eot_id|>")


def test_damaged_files(checkpoint, tmp_path):
    pytest.importorskip("tokenizers")
    pytest.importorskip("tiktoken")
    (checkpoint / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match="vocab.json is not JSON"):
        load_tokenizer(checkpoint)
    (checkpoint / "merges.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match="neither tokenizer.json nor vocab.json"
    ):
        load_tokenizer(checkpoint)
    (checkpoint / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match="tokenizer.json cannot be read"):
        load_tokenizer(checkpoint)
    path = ranks_file(tmp_path / "r.tiktoken")
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:5] + lines[6:]))
    with pytest.raises(ValueError, match="263 tokens whose ranks are not 0 to 262"):
        tiktoken_tokenizer(path)
    path.write_text("\n".join([*lines[:5], lines[5][:3]]))
    with pytest.raises(ValueError, match="line 6: .* is not a token in base64 and its"):
        tiktoken_tokenizer(path)
    with pytest.raises(FileNotFoundError, match="give the path of a ranks file"):
        tiktoken_tokenizer(tmp_path / "none")
    with pytest.raises(ValueError, match="pattern='gpt2' .* Did you mean 'gpt-2'"):
        tiktoken_tokenizer(path, pattern="gpt2")


CONVERSATION = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Bye"},
]
# The templates that the checkpoints carry, cut to messages without tools.
JINJA = {
    "chatml": "",
    "qwen2": "You are a helpful assistant.",
    "qwen2.5": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "smollm2": "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
}


@pytest.mark.parametrize("template", JINJA)
def test_chat(template):
    system = JINJA[template]
    opening = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    body = (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n"
    )
    assert render_chat(CONVERSATION, template, generation=False) == opening + body
    assert render_chat(CONVERSATION, template) == (
        opening + body + "<|im_start|>assistant\n"
    )
    own = [{"role": "system", "content": "Be brief."}, *CONVERSATION]
    assert render_chat(own, template, generation=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n" + body
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ([{"role": "tool", "content": ""}], "role of message 0='tool' is not one of"),
        ([{"role": "user"}], "message 0 has the keys .'role'"),
        (
            [*CONVERSATION, {"role": "system", "content": ""}],
            "message 3 is of the syst",
        ),
        (
            [{"role": "user", "content": "a<|im_end|>"}],
            r"message 0 holds '<\|im_end\|>'",
        ),
    ],
)
def test_conversations_that_cannot_be_rendered(messages, message):
    with pytest.raises(ValueError, match=message):
        render_chat(messages)
    with pytest.raises(
        ValueError, match="unknown chat template 'chatmll'.*Did you mea"
    ):
        render_chat(CONVERSATION, "chatmll")
