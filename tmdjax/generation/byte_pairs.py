"""Byte-pair encoding: of a checkpoint, or of a GGUF file."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

from tmdjax.core.checks import check_choice
from tmdjax.core.optional import import_optional
from tmdjax.generation.tokenizers import Tokenizer, check_ids, special_of
from tmdjax.models.checkpoints.gguf import gguf_value, open_gguf

# How a text is cut before merging, by the names llama.cpp has for them.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "gpt-2": (
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ),
    "qwen2": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",
    "llama-bpe": (
        rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
    ),
    "smollm": "",  # digits one by one, then as gpt-2
}
_CONTROL = 3  # token type of a special token in GGUF


class _BytePairs:
    """A tokenizer of the tokenizers library as :class:`Tokenizer`."""

    def __init__(self, backend: Any, eos: str | int, pad: str | int | None):
        # What a training script left switched on would cut or fill up every text.
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None) is not None:
            backend.model.dropout = None
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._specials = {token.content: index for index, token in added.items()}
        self.vocab_size = 1 + max(backend.get_vocab().values())
        self.eos_id = self._id(eos)
        self.pad_id = self.eos_id if pad is None else self._id(pad)

    def _id(self, token: str | int) -> int:
        return token if isinstance(token, int) else self.special_id(token)

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        plain = check_ids(ids, self.vocab_size)
        return self._backend.decode(plain, skip_special_tokens=False)

    def special_id(self, token: str) -> int:
        return special_of(self._specials, token)


def load_tokenizer(
    folder: str | os.PathLike[str],
    *,
    eos: str | None = None,
    pad: str | None = None,
    pattern: str = "qwen2",
) -> Tokenizer:
    """The tokenizer of a checkpoint in the Hugging Face layout.

    Truncation, padding and dropout of merges stored in tokenizer.json are what a
    training script had switched on, and are left out: a text is encoded whole, and
    always to the same ids.

    Args:
        folder: with tokenizer.json, or with vocab.json and merges.txt;
            tokenizer_config.json names the special tokens.
        eos: special token that ends a response; None reads the configuration.
        pad: padding; None reads the configuration, and takes ``eos`` if it has none.
        pattern: a key of ``PATTERNS``, how vocab.json and merges.txt cut a text;
            tokenizer.json says it itself.

    Raises:
        ImportError: the tokenizers package is absent.
        FileNotFoundError: neither is in the folder.
        ValueError: a file that cannot be read; an unknown pattern; a special token
            that is not there, by name.
    """
    library = import_optional("tokenizers", "reading a tokenizer", "llm")
    folder = Path(folder)
    config = {}
    if (folder / "tokenizer_config.json").exists():
        config = _json(folder / "tokenizer_config.json")
    eos, pad = (
        _token_name(config.get(key)) if given is None else given
        for key, given in (("eos_token", eos), ("pad_token", pad))
    )
    if eos is None:
        raise ValueError(
            f"{folder / 'tokenizer_config.json'} names no eos_token; pass eos=, "
            f"such as '<|im_end|>'."
        )
    path = folder / "tokenizer.json"
    if path.exists():
        try:
            backend = library.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare exceptions
            raise ValueError(
                f"{path} cannot be read ({error}). Copy it again."
            ) from error
        return _BytePairs(backend, eos, pad)
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocab.exists() and merges.exists()):
        raise FileNotFoundError(
            f"{folder} has neither tokenizer.json nor vocab.json and merges.txt."
        )
    lines = merges.read_text(encoding="utf-8").splitlines()
    pairs = [line for line in lines if line and not line.startswith("#version")]
    added = config.get("added_tokens_decoder", {})
    names = [added[key]["content"] for key in sorted(added, key=int)]
    backend = _byte_pairs(_json(vocab), pairs, pattern, names)
    return _BytePairs(backend, eos, pad)


def gguf_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in a GGUF file, byte-pair encoding alone.

    Raises:
        ImportError: the gguf or the tokenizers package is absent.
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or its tokenizer of another kind, by name.
    """
    reader = open_gguf(path)
    kind = gguf_value(reader, "tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(
            f"{os.fspath(path)} has a tokenizer of kind {kind!r}; 'gpt2' (byte-pair "
            f"encoding) is read."
        )
    tokens = gguf_value(reader, "tokenizer.ggml.tokens")
    types = gguf_value(reader, "tokenizer.ggml.token_type", [1] * len(tokens))
    eos = gguf_value(reader, "tokenizer.ggml.eos_token_id")
    if eos is None:
        raise ValueError(
            f"{os.fspath(path)} lacks the key tokenizer.ggml.eos_token_id."
        )
    backend = _byte_pairs(
        {token: index for index, token in enumerate(tokens)},
        gguf_value(reader, "tokenizer.ggml.merges", []),
        gguf_value(reader, "tokenizer.ggml.pre", "gpt-2"),
        [token for token, kind in zip(tokens, types) if kind == _CONTROL],
    )
    pad = gguf_value(reader, "tokenizer.ggml.padding_token_id")
    return _BytePairs(backend, int(eos), None if pad is None else int(pad))


def _byte_pairs(
    vocab: Mapping[str, int],
    merges: Sequence[str],
    pattern: str,
    specials: Sequence[str],
) -> Any:
    """A tokenizer of the tokenizers library from its parts."""
    library = import_optional("tokenizers", "reading a tokenizer", "llm")
    check_choice("pattern", pattern, PATTERNS)
    pairs = [tuple(merge.split(" ")) for merge in merges]
    backend = library.Tokenizer(library.models.BPE(vocab=dict(vocab), merges=pairs))
    cut = library.pre_tokenizers
    if pattern == "smollm":
        parts = [
            cut.Digits(individual_digits=True),
            cut.ByteLevel(add_prefix_space=False),
        ]
    else:
        split = cut.Split(library.Regex(PATTERNS[pattern]), behavior="isolated")
        parts = [split, cut.ByteLevel(add_prefix_space=False, use_regex=False)]
    backend.pre_tokenizer = cut.Sequence(parts)
    if pattern == "qwen2":
        backend.normalizer = library.normalizers.NFC()
    backend.decoder = library.decoders.ByteLevel()
    backend.add_special_tokens(
        [library.AddedToken(name, special=True, normalized=False) for name in specials]
    )
    return backend


def _token_name(token: Any) -> str | None:
    return token["content"] if isinstance(token, Mapping) else token


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}). Copy it again.") from None
