"""Byte-pair encoding: of a checkpoint, or of a GGUF file."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

from tmdjax.core.checks import check_choice, check_range
from tmdjax.core.files import read_bounded, text_of
from tmdjax.core.optional import import_optional
from tmdjax.generation.tokenizers import Tokenizer, known_ids, special_of
from tmdjax.models.checkpoints.gguf import gguf_value, open_gguf
from tmdjax.models.checkpoints.layout import read_json

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
_ALIKE = {
    **dict.fromkeys(("llama3", "llama-v3"), "llama-bpe"),
    "deepseek-r1-qwen": "qwen2",
}
"""Other names that GGUF files have for these."""
_WHOLE_WORDS = ("llama-bpe",)  # a piece in the vocabulary is a token, unmerged
_LONGEST_FILE = 100_000_000
_CLASSES = {"Qwen2Tokenizer": "qwen2", "GPT2Tokenizer": "gpt-2"}
"""Patterns of classes of transformers whose files are vocab.json and merges.txt."""
# Types in GGUF: of added tokens, and of rows of the embedding that name no token.
CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
TURN_ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>"),
    *("<|end_of_text|>", "<|endoftext|>", "<EOT>"),
)
"""Special tokens that end a turn or a text where they exist, as llama.cpp has them."""


class _BytePairs:
    """A tokenizer of the tokenizers library as :class:`Tokenizer`.

    Args:
        backend: the library's.
        eos: ends a response.
        pad: padding; None takes ``eos``.
        stop: more ids that end a response.
        stop_strings: texts that end one.
    """

    def __init__(
        self,
        backend: Any,
        eos: str | int,
        pad: str | int | None,
        stop: Iterable[int] = (),
        stop_strings: Sequence[str] = (),
    ):
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
        ends = [self._specials[name] for name in TURN_ENDS if name in self._specials]
        self.stop_ids = tuple(dict.fromkeys((self.eos_id, *stop, *ends)))
        self.stop_strings = tuple(stop_strings)

    def _id(self, token: str | int) -> int:
        return token if isinstance(token, int) else self.special_id(token)

    def encode(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def decode(
        self, ids: Iterable[SupportsIndex], *, skip_special: bool = False
    ) -> str:
        known = known_ids(ids, self.vocab_size)
        return self._backend.decode(known, skip_special_tokens=skip_special)

    def special_id(self, token: str) -> int:
        return special_of(self._specials, token)


def load_tokenizer(
    folder: str | os.PathLike[str],
    *,
    eos: str | None = None,
    pad: str | None = None,
    pattern: str | None = None,
) -> Tokenizer:
    """The tokenizer of a checkpoint in the Hugging Face layout.

    Truncation, padding and dropout of merges stored in tokenizer.json are what a
    training script had switched on, and are left out: a text is encoded whole, and
    always to the same ids.

    Args:
        folder: with tokenizer.json, or with vocab.json and merges.txt;
            tokenizer_config.json names the special tokens, and generation_config.json,
            or config.json where there is none, the ids (``eos_token_id``, one or
            several) and texts (``stop_strings``) that end a response.
        eos: special token that ends a response, the first of ``stop_ids``; None reads
            the configuration.
        pad: padding; None reads the configuration, and takes ``eos`` if it has none.
        pattern: a key of ``PATTERNS``, how vocab.json and merges.txt cut a text; None
            goes by the tokenizer_class of the configuration. tokenizer.json says it
            itself.

    Raises:
        ImportError: the tokenizers package is absent.
        FileNotFoundError: neither is in the folder.
        ValueError: a file that cannot be read; a pattern or a class that is not known;
            a special token that is not there, by name, or has another id than the
            configuration says.
    """
    library = import_optional("tokenizers", "reading a tokenizer", "llm")
    folder = Path(folder)
    config = read_json(folder / "tokenizer_config.json", optional=True)
    eos, pad = (
        token_name(config.get(key)) if given is None else given
        for key, given in (("eos_token", eos), ("pad_token", pad))
    )
    if eos is None:
        raise ValueError(
            f"{folder / 'tokenizer_config.json'} names no eos_token; pass eos=, "
            f"such as '<|im_end|>'."
        )
    generation = folder / "generation_config.json"
    ends = _ends(generation if generation.exists() else folder / "config.json")
    path = folder / "tokenizer.json"
    if path.exists():
        try:
            backend = library.Tokenizer.from_buffer(read_bounded(path, _LONGEST_FILE))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare ones, and panics
            raise ValueError(
                f"{path} cannot be read ({error}). Copy it again."
            ) from error
        return _BytePairs(backend, eos, pad, *ends)
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    if not (vocab.exists() and merges.exists()):
        raise FileNotFoundError(
            f"{folder} has neither tokenizer.json nor vocab.json and merges.txt."
        )
    if pattern is None:
        pattern = _pattern_of(folder, config)
    lines = text_of(merges).splitlines()
    pairs = [line for line in lines if line and not line.startswith("#version")]
    added = config.get("added_tokens_decoder", {})
    try:
        by_id = {int(key): _added_token(**token) for key, token in added.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: added_tokens_decoder maps ids to "
            f"tokens ({error}). Copy it again."
        ) from None
    tokens = [by_id[key] for key in sorted(by_id)]
    backend = _byte_pairs(read_json(vocab), pairs, pattern, tokens)
    for key, token in by_id.items():
        found = backend.token_to_id(token.content)
        if found != key:
            raise ValueError(
                f"{folder / 'tokenizer_config.json'} gives {token.content!r} the id "
                f"{key}, but behind {vocab.name} it is {found}; take both files of one "
                f"checkpoint."
            )
    return _BytePairs(backend, eos, pad, *ends)


def _pattern_of(folder: Path, config: Mapping[str, Any]) -> str:
    """How a tokenizer of transformers cuts a text, by its class."""
    kind = str(config.get("tokenizer_class")).removesuffix("Fast")
    remedy = (
        "Have transformers write tokenizer.json, which says it all: "
        "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
    )
    if kind not in _CLASSES:
        raise ValueError(
            f"{folder / 'tokenizer_config.json'} has tokenizer_class={kind!r}; how "
            f"{', '.join(_CLASSES)} cut a text is known. Pass pattern=, one of "
            f"{', '.join(PATTERNS)}. {remedy}"
        )
    odd = "add_prefix_space=True" if config.get("add_prefix_space") else None
    if (folder / "added_tokens.json").exists() and "added_tokens_decoder" not in config:
        odd = "added_tokens.json"
    if odd:
        raise ValueError(f"{folder} has {odd}, which is not read. {remedy}")
    return _CLASSES[kind]


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

    def needed(key: str) -> Any:
        found = gguf_value(reader, f"tokenizer.ggml.{key}")
        if found is None:
            raise ValueError(
                f"{os.fspath(path)} lacks the key tokenizer.ggml.{key}; take another "
                f"file of the same model."
            )
        return found

    tokens = needed("tokens")
    pattern: str = needed("pre")
    types = gguf_value(reader, "tokenizer.ggml.token_type", [1] * len(tokens))
    if len(types) != len(tokens):
        raise ValueError(
            f"{os.fspath(path)} has {len(tokens)} tokens and types of {len(types)}: "
            f"the file is damaged. Copy it again."
        )
    kinds = zip(tokens, types)
    backend = _byte_pairs(
        {t: index for index, (t, kind) in enumerate(kinds) if kind != _UNUSED},
        gguf_value(reader, "tokenizer.ggml.merges", []),
        _ALIKE.get(pattern, pattern),
        [
            _added_token(token, special=kind == CONTROL)
            for token, kind in zip(tokens, types)
            if kind in (CONTROL, _USER_DEFINED)
        ],
    )
    needed("eos_token_id")
    eos, pad, *ends = (
        gguf_id(reader, name, path) for name in ("eos", "padding", "eot", "eom")
    )
    assert eos is not None
    return _BytePairs(backend, eos, pad, [end for end in ends if end is not None])


def gguf_id(reader: Any, name: str, path: str | os.PathLike[str]) -> int | None:
    """The id of a special token such as 'eos' in a GGUF file, or None.

    Raises:
        ValueError: the file has no such token.
    """
    key = f"tokenizer.ggml.{name}_token_id"
    index = gguf_value(reader, key)
    if index is None:
        return None
    tokens = reader.fields.get("tokenizer.ggml.tokens")
    count = 0 if tokens is None else len(tokens.data)
    check_range(f"{os.fspath(path)}: {key}", int(index), 0, count - 1)
    return int(index)


def _byte_pairs(
    vocab: Mapping[str, int],
    merges: Sequence[str],
    pattern: str,
    added: Sequence[Any],
) -> Any:
    """A tokenizer of the tokenizers library from its parts."""
    library = import_optional("tokenizers", "reading a tokenizer", "llm")
    check_choice("pattern", pattern, PATTERNS)
    if not all(type(index) is int and index >= 0 for index in vocab.values()):
        raise ValueError("the vocabulary maps tokens to ids, integers from 0.")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for merge, pair in zip(merges, pairs):  # of others the library panics
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise ValueError(
                f"the merge {merge!r} does not make a token of the vocabulary of two "
                f"others; take vocabulary and merges of one checkpoint."
            )
    backend = library.Tokenizer(
        library.models.BPE(
            vocab=dict(vocab), merges=pairs, ignore_merges=pattern in _WHOLE_WORDS
        )
    )
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
    backend.add_tokens(list(added))
    return backend


def _added_token(
    content: str, *, special: bool = True, normalized: bool = False, **flags: Any
) -> Any:
    """A token that is found whole in a text, before it is cut; special or not."""
    library = import_optional("tokenizers", "reading a tokenizer", "llm")
    return library.AddedToken(content, special=special, normalized=normalized, **flags)


def _ends(path: Path) -> tuple[list[int], list[str]]:
    """Ids and texts that end a response, of a generation_config.json if it exists."""
    config = read_json(path, optional=True)
    ids, texts = config.get("eos_token_id"), config.get("stop_strings")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    texts = [] if texts is None else texts if isinstance(texts, list) else [texts]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"{path} has eos_token_id={ids}; it holds ids alone.")
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"{path} has stop_strings={texts}; it holds texts alone.")
    return ids, texts


def token_name(token: Any) -> str | None:
    """The text of a special token as a tokenizer_config.json has it, or None.

    Raises:
        ValueError: it is neither a text nor a mapping with the text as 'content'.
    """
    found = token.get("content", token) if isinstance(token, Mapping) else token
    if found is None or isinstance(found, str):
        return found
    raise ValueError(
        f"tokenizer_config.json or tokenizer.json has the token {token!r}; it is a "
        f"text, or a mapping with the text as 'content'. Copy the file again."
    )
