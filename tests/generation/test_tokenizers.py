"""Tokenizers: round trips, the libraries' own results, special tokens, damage."""

import datetime
import importlib.util
import json
import re

import numpy as np
import pytest

from tmdjax.generation import (
    CharTokenizer,
    ChatTemplate,
    gguf_tokenizer,
    load_chat_template,
    load_tokenizer,
    render_chat,
)
from tmdjax.generation.byte_pairs import PATTERNS

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # of Qwen2 and later
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
    specials = enumerate(SPECIALS, len(vocab))
    added = {str(index): {"content": name} for index, name in specials}
    names = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}}
    names["tokenizer_class"] = "Qwen2TokenizerFast"
    for name, content in {
        "vocab.json": json.dumps(vocab),
        "merges.txt": "\n".join(["#version: 0.2", *MERGES]),
        "tokenizer_config.json": json.dumps(names | {"added_tokens_decoder": added}),
    }.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    return tmp_path


def test_characters(refused):
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
    refused("character 'x' at 1 of '1x' is not in the alp", dollar.encode, "1x")
    refused(r"given twice: \['1'\]", CharTokenizer, "11")
    # whatever was drawn has a text: rows of a padded embedding add nothing to it
    assert dollar.decode([1, 4, -1, 2**40, 2]) == "01"
    assert dollar.decode([1, 3], skip_special=True) == "0"
    assert dollar.stop_ids == (3,) and dollar.stop_strings == ()
    refused("'<bos>' is no special token", dollar.special_id, "<bos>")


def test_checkpoint_by_parts_and_whole(checkpoint):
    library = pytest.importorskip("tokenizers")
    parts = load_tokenizer(checkpoint)
    specials = [parts.special_id(name) for name in SPECIALS]
    assert specials == [264, 265, 266]
    assert (parts.eos_id, parts.pad_id, parts.vocab_size) == (266, 264, 267)
    ids = parts.encode(TEXT + "<|im_end|>")
    assert ids[-1] == 266 and parts.decode(ids) == TEXT + "<|im_end|>"
    assert parts.encode("the") == [vocabulary()["the"]]
    # digits are never merged under this pattern
    assert parts.encode("12") == [vocabulary()["1"], vocabulary()["2"]]
    # the same tokenizer as one file, as the library makes it
    merges = [tuple(merge.split()) for merge in MERGES]
    whole = library.Tokenizer(library.models.BPE(vocab=vocabulary(), merges=merges))
    pieces = library.pre_tokenizers
    split = pieces.Split(library.Regex(PATTERNS["qwen2"]), "isolated")
    letters = pieces.ByteLevel(add_prefix_space=False, use_regex=False)
    whole.pre_tokenizer = pieces.Sequence([split, letters])
    whole.decoder = library.decoders.ByteLevel()
    whole.add_special_tokens(list(SPECIALS))
    whole.save(str(checkpoint / "tokenizer.json"))
    assert load_tokenizer(checkpoint).encode(TEXT) == parts.encode(TEXT)


def test_merges_give_the_ids_of_another_library(checkpoint):
    """tiktoken merges by rank, here the order of the vocabulary."""
    pytest.importorskip("tokenizers")
    tiktoken = pytest.importorskip("tiktoken")
    letters = {letter: byte for byte, letter in byte_letters().items()}
    ranks = {bytes(letters[c] for c in t): rank for t, rank in vocabulary().items()}
    theirs = tiktoken.Encoding(
        "test",
        pat_str=PATTERNS["qwen2"],
        mergeable_ranks=ranks,
        special_tokens={name: len(ranks) + i for i, name in enumerate(SPECIALS)},
    )
    ours = load_tokenizer(checkpoint)
    for text in (TEXT, "<|im_start|>the"):
        assert ours.encode(text) == theirs.encode(text, allowed_special="all")
    # what was composed of two code points is one
    assert ours.encode("cafe\u0301") == theirs.encode("café")
    assert ours.decode(ours.encode("é")[:1]) == "\ufffd"


def test_all_that_ends_a_response_is_read(checkpoint, refused):
    pytest.importorskip("tokenizers")
    path = checkpoint / "generation_config.json"
    # <|im_end|> by the configuration, <|endoftext|> by its name
    assert load_tokenizer(checkpoint).stop_ids == (266, 264)
    for ids, texts, expected in (
        (7, None, ((266, 7, 264), ())),
        ([264, 9, 266], ["\n\nQ:"], ((266, 264, 9), ("\n\nQ:",))),
        (None, "###", ((266, 264), ("###",))),
    ):
        path.write_text(json.dumps({"eos_token_id": ids, "stop_strings": texts}))
        found = load_tokenizer(checkpoint)
        assert (found.stop_ids, found.stop_strings) == expected
    ids = [*found.encode("the"), 266, 264, 300, -1]
    assert found.decode(ids, skip_special=True) == "the"
    assert found.decode(ids) == "the<|im_end|><|endoftext|>"
    path.write_text('{"eos_token_id": ["</s>"]}')
    refused("generation_config.json has eos_token_id", load_tokenizer, checkpoint)
    path.rename(checkpoint / "config.json")  # as of Llama 3.1, where there is no other
    refused("config.json has eos_token_id", load_tokenizer, checkpoint)
    (checkpoint / "config.json").write_text('{"eos_token_id": [266, 9]}')
    assert load_tokenizer(checkpoint).stop_ids == (266, 9, 264)


def test_a_text_is_cut_as_the_class_of_its_tokenizer_cuts_it(checkpoint, refused):
    """Ids of GPT-2's class are those of transformers 5.24 on this folder."""
    pytest.importorskip("tokenizers")
    path = checkpoint / "tokenizer_config.json"
    config = json.loads(path.read_text())

    def loaded(**changes):
        path.write_text(json.dumps(config | changes))
        return load_tokenizer(checkpoint)

    vocab = vocabulary()
    gpt2 = loaded(tokenizer_class="GPT2Tokenizer")
    assert gpt2.encode("12") == [vocab["12"]]  # Qwen's takes digits one by one
    assert gpt2.decode(gpt2.encode("cafe\u0301")) == "cafe\u0301"
    for changes, message in (
        ({"tokenizer_class": "RobertaTokenizer"}, "class='RobertaTokenizer'; .* Pass"),
        ({"tokenizer_class": None}, "tokenizer_class='None'; how Qwen2Tokenizer"),
        ({"add_prefix_space": True}, "has add_prefix_space=True, which is not read"),
    ):
        refused(message, loaded, **changes)
    assert load_tokenizer(checkpoint, pattern="qwen2").encode("the") == [vocab["the"]]
    (checkpoint / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 266}))
    assert loaded().eos_id == 266
    del config["added_tokens_decoder"]
    refused(r"has added_tokens.json, .*\.save_pretrained", loaded)


def test_added_tokens_have_the_ids_and_kinds_of_the_configuration(checkpoint, refused):
    pytest.importorskip("tokenizers")
    path = checkpoint / "tokenizer_config.json"
    config = json.loads(path.read_text())
    added = config["added_tokens_decoder"]
    added["267"] = {"content": "<think>", "special": False, "lstrip": True}
    path.write_text(json.dumps(config))
    found = load_tokenizer(checkpoint)
    assert found.encode("a  <think>") == [vocabulary()["a"], 267]
    assert found.decode([267, 266], skip_special=True) == "<think>"
    added["299"] = added.pop("267")
    path.write_text(json.dumps(config))
    refused("'<think>' the id 299, but .* it is 267", load_tokenizer, checkpoint)


WORD, THOUGHT, BLANKS = "hello", "<think>", "    "


def test_ids_of_a_gguf_file_are_those_of_its_source(tmp_path):
    """User-defined tokens stay whole, and llama-bpe takes a piece it knows unmerged."""
    pytest.importorskip("tokenizers")
    tiktoken = pytest.importorskip("tiktoken")
    letters = {letter: byte for byte, letter in byte_letters().items()}
    names = [*vocabulary(), WORD]  # which no merge makes
    ranks = {bytes(letters[c] for c in t): rank for rank, t in enumerate(names)}
    extra = [THOUGHT, BLANKS, *SPECIALS]
    numbers = {name: len(names) + i for i, name in enumerate(extra)}
    same = {"llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
    for named in ("llama-bpe", "qwen2", *same):
        pre = same.get(named, named)
        theirs = tiktoken.Encoding(
            "test", pat_str=PATTERNS[pre], mergeable_ranks=ranks, special_tokens=numbers
        )
        types = [1] * len(names) + [4, 4, 3, 3, 3]
        given = {"pre": named, "tokens": [*names, *extra], "types": types}
        path = write_gguf(
            tmp_path / f"{named}.gguf", **given, eos=numbers["<|im_end|>"]
        )
        ours = gguf_tokenizer(path)
        for text in (f"the{THOUGHT}12", f"a{BLANKS}b<|im_end|>", "and 12 \u20ac"):
            expected = theirs.encode(text, allowed_special="all")
            assert ours.encode(text) == expected, (pre, text)
        # tiktoken takes known pieces whole, as Llama 3 does; Qwen2 merges them
        whole = [names.index(WORD)]
        assert theirs.encode(WORD) == whole
        assert (ours.encode(WORD) == whole) is (pre == "llama-bpe")
        assert ours.decode([numbers[THOUGHT], numbers["<|im_end|>"]], skip_special=True)
        assert ours.stop_ids == (numbers["<|im_end|>"], numbers["<|endoftext|>"])


def write_gguf(path, model="gpt2", pre="smollm", eos=266, tokens=(), types=()):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens or [*vocabulary(), *SPECIALS])
    writer.add_token_types(types or [1] * len(vocabulary()) + [3] * 3)
    writer.add_chat_template("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    writer.add_bos_token_id(264)
    writer.add_token_merges(MERGES)
    if eos:
        writer.add_eos_token_id(eos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf(tmp_path, refused):
    pytest.importorskip("tokenizers")
    tokenizer = gguf_tokenizer(write_gguf(tmp_path / "a.gguf"))
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (266, 266, 267)
    ids = tokenizer.encode("<|im_start|>" + TEXT)
    assert ids[0] == 265 and tokenizer.decode(ids) == "<|im_start|>" + TEXT
    # digits stand alone
    assert tokenizer.encode("12") == [vocabulary()["1"], vocabulary()["2"]]
    path = write_gguf(tmp_path / "b.gguf", model="llama")
    refused("tokenizer of kind 'llama'; 'gpt2'", gguf_tokenizer, path)
    path = write_gguf(tmp_path / "c.gguf", pre="viking")
    refused("pattern='viking' is not one of", gguf_tokenizer, path)
    path = write_gguf(tmp_path / "d.gguf", eos=False)
    refused(r"d.gguf lacks the key .*eos_token_id", gguf_tokenizer, path)
    path = write_gguf(tmp_path / "e.gguf", eos=267)
    for read in (gguf_tokenizer, load_chat_template):
        refused(r"e.gguf: .*eos_token_id=267 is outside \[0, 266\]", read, path)
    path = write_gguf(tmp_path / "e.gguf", pre=None)
    refused(r"e.gguf lacks the key tokenizer.ggml.pre", gguf_tokenizer, path)
    types = [1] * len(vocabulary()) + [3] * 3
    path = write_gguf(tmp_path / "f.gguf", types=types[:-1])
    refused("267 tokens and types of 266", gguf_tokenizer, path)
    # rows that pad the embedding are no tokens, and so never drawn
    padded = [*vocabulary(), *SPECIALS, "[PAD267]", "[PAD268]"]
    path = write_gguf(tmp_path / "g.gguf", tokens=padded, types=[*types, 5, 5])
    assert gguf_tokenizer(path).vocab_size == 267


def test_special_tokens_that_are_not_there(checkpoint, refused):
    pytest.importorskip("tokenizers")
    end = "<|im_ende|>"
    refused(f"'{end}' is no special .* Did you", load_tokenizer, checkpoint, eos=end)
    tokenizer = load_tokenizer(checkpoint)
    refused("'<think>' is no special token", tokenizer.special_id, "<think>")
    (checkpoint / "tokenizer_config.json").write_text("{}")
    refused("names no eos_token; pass eos=", load_tokenizer, checkpoint)


def test_damaged_files(checkpoint, refused):
    pytest.importorskip("tokenizers")
    absent = dict(error=FileNotFoundError)
    (checkpoint / "vocab.json").write_text("{")
    refused("vocab.json is not JSON", load_tokenizer, checkpoint)
    config = (checkpoint / "tokenizer_config.json").read_text()
    (checkpoint / "tokenizer_config.json").write_text("[]")
    refused("tokenizer_config.json holds list", load_tokenizer, checkpoint)
    refused("tokenizer_config.json holds list", load_chat_template, checkpoint)
    (checkpoint / "tokenizer_config.json").write_text(config)
    (checkpoint / "merges.txt").unlink()
    refused("neither tokenizer.json nor vocab", load_tokenizer, checkpoint, **absent)
    (checkpoint / "tokenizer.json").write_text("[]")
    refused("tokenizer.json cannot be read", load_tokenizer, checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    (checkpoint / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    for merge in ("a c", "a b c", "b a", "ab"):
        (checkpoint / "merges.txt").write_text(f"a b\n{merge}\n")
        refused(f"the merge '{merge}' does not make", load_tokenizer, checkpoint)
    (checkpoint / "vocab.json").write_text('{"a": "0"}')
    refused("the vocabulary maps tokens to ids", load_tokenizer, checkpoint)
    (checkpoint / "vocab.json").write_text("{}")
    (checkpoint / "merges.txt").write_text("")
    refused("gpt2' .* Did you mean 'gpt-2'", load_tokenizer, checkpoint, pattern="gpt2")


def test_what_a_configuration_holds_of_another_kind_is_told(checkpoint, refused):
    """An eos_token of 3 was the id 3."""
    pytest.importorskip("tokenizers")
    path = checkpoint / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for change, message in (
        ({"eos_token": 3}, "has the token 3; it is a text"),
        ({"pad_token": {"content": 3}}, "has the token .*3"),
        ({"added_tokens_decoder": []}, "added_tokens_decoder maps ids to tokens"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "maps ids to tokens"),
    ):
        path.write_text(json.dumps(config | change))
        refused(message, load_tokenizer, checkpoint)
    for given in (3, ["x"], [{"name": "default"}], {"default": 3}):
        path.write_text(json.dumps(config | {"chat_template": given}))
        refused("has a chat_template that is neither", load_chat_template, checkpoint)
    tokens = {"chat_template": "x", "added_tokens_decoder": {"264": {"special": True}}}
    path.write_text(json.dumps(config | tokens))
    refused("has the token .*'special': True", load_chat_template, checkpoint)
    path.write_text(json.dumps(config))
    for name, value in (("eos_token_id", [-1]), ("stop_strings", [3])):
        (checkpoint / "generation_config.json").write_text(json.dumps({name: value}))
        refused(f"config.json has {name}=", load_tokenizer, checkpoint)


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
    turns = ("user\nHello", "assistant\nHi", "user\nBye")
    body = "".join(f"<|im_start|>{turn}<|im_end|>\n" for turn in turns)
    assert render_chat(CONVERSATION, template, generation=False) == opening + body
    asked = opening + body + "<|im_start|>assistant\n"
    assert render_chat(CONVERSATION, template) == asked
    own = [{"role": "system", "content": "Be brief."}, *CONVERSATION]
    brief = "<|im_start|>system\nBe brief.<|im_end|>\n" + body
    assert render_chat(own, template, generation=False) == brief


# The template of Qwen3, without the parts about tools.
QWEN3 = """
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if '</think>' in message.content %}
            {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
            {%- set reasoning_content = message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def said(*contents):
    """Messages of user and assistant in turns, the user's first; or with roles."""
    roles = ("user", "assistant")
    return [
        {"role": roles[i % 2], "content": c} if isinstance(c, str) else c
        for i, c in enumerate(contents)
    ]


def test_chat_of_qwen3_is_that_of_its_template():
    pytest.importorskip("jinja2")
    theirs, thought = ChatTemplate(QWEN3), "<think>\nWell,\n</think>\n\nHi"
    again = {"role": "assistant", "content": "And more."}
    for messages in (
        said("Hello"),
        said("Hello", "Hi"),
        said("Hello", thought),
        said("Hello", thought, "Bye"),
        said("Hello", "\n\nHi", "Bye", "\n\nBye"),
        [*said("Hello", thought), again],
        [*said("Hello", "Hi"), again],
        [{"role": "system", "content": "Be brief."}, *said("Hello", "Hi")],
        [again],
    ):
        for generation in (True, False):
            ours = render_chat(messages, "qwen3", generation=generation)
            assert ours == theirs(messages, generation=generation), messages
    pair = "<|im_start|>assistant\n<think>\n\n</think>\n\nHi<|im_end|>\n"
    assert render_chat(said("Hello", "Hi"), "qwen3", generation=False).endswith(pair)


def test_the_template_of_a_checkpoint(checkpoint, tmp_path, refused):
    pytest.importorskip("jinja2")
    refused("has no chat template; name one", load_chat_template, checkpoint)
    path = checkpoint / "tokenizer_config.json"
    config = json.loads(path.read_text())
    both = [
        {"name": "default", "template": "{{ eos_token }}{{ messages[0]['content'] }}"},
        {"name": "rag", "template": "{% for i in range(9) %}{% break %}{% endfor %}R"},
    ]
    path.write_text(json.dumps(config | {"chat_template": both}))
    assert load_chat_template(checkpoint)(said("Hello")) == "<|im_end|>Hello"
    assert load_chat_template(checkpoint, "rag")(said("Hello")) == "R"
    refused("Did you mean 'rag'", load_chat_template, checkpoint, "rug")
    # a file of its own comes before the key
    own = "{% generation %}{{ messages | tojson }}{% endgeneration %}{{ x }}"
    (checkpoint / "chat_template.jinja").write_text(own, encoding="utf-8")
    template = load_chat_template(checkpoint)
    shown = '[{"role": "user", "content": "\u00e9<"}]y'
    assert template(said("\u00e9<"), x="y") == shown
    for mark in SPECIALS:  # all that the tokenizer makes one token of
        refused(f"message 0 holds {re.escape(repr(mark))}", template, said(f"a{mark}"))
    refused("messages is empty", template, [])
    if importlib.util.find_spec("gguf"):
        types = [1] * len(vocabulary()) + [3, 4, 1]
        for kinds, marks in (((), SPECIALS), (types, [SPECIALS[0], SPECIALS[2]])):
            template = load_chat_template(
                write_gguf(tmp_path / "chat.gguf", types=kinds)
            )
            assert template(said("Hello")) == "<|endoftext|>Hello<|im_end|>"
            assert template.marks == tuple(sorted(marks))
    absent = dict(error=FileNotFoundError)
    refused("absent; give a checkpoint", load_chat_template, tmp_path / "x", **absent)


def test_templates_run_in_a_sandbox(refused):
    pytest.importorskip("jinja2")
    for source, message in (
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{% set _ = messages.append(1) %}", "SecurityError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
        ("{{ 'a' * 10 ** 10 }}", r"\* of \[1, 10+\] is too large"),
        ("{{ 10 ** 10 * messages }}", r"\* of \[10+, 1\] is too large"),
        ("{{ 9 ** 9 ** 9 }}", r"\*\* of \[387420489, 9\] is too large"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ strftime_now('%Y') }}", "strftime_now.* give date="),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ messages[0].content.split('') }}", "cannot render .* empty separator"),
        ("{% continue %}", "SyntaxError"),
        ("{{ lipsum(n=3) }}", "'lipsum' is undefined"),
    ):
        refused(message, ChatTemplate(source), said("Hello"))
    kept = ChatTemplate("{{ '=' * 20 }} {{ -1700000000 * 1000 }} {{ -2 ** 10 }}")
    assert kept(said("Hello")) == f"{'=' * 20} -1700000000000 1024"
    # what transformers hands to every template, and the options of its filter
    asked = "{{ 'no tools' if tools is none }}{{ documents is none }}"
    assert ChatTemplate(asked)(said("Hello")) == "no toolsTrue"
    asked = "{{ [{'b': 'é', 'a': 1}] | tojson(sort_keys=true, separators=(',', ':')) }}"
    assert ChatTemplate(asked)(said("Hello")) == '[{"a":1,"b":"é"}]'
    day = datetime.datetime(2024, 7, 26)
    dated = ChatTemplate("{{ strftime_now('%d %b %Y') }}")
    assert dated(said("Hello"), date=day) == "26 Jul 2024"


def test_conversations_that_cannot_be_rendered(refused):
    late = [*CONVERSATION, {"role": "system", "content": ""}]
    ended = [{"role": "user", "content": "a<|im_end|>"}]
    tool = [{"role": "tool", "content": ""}]
    for messages, message in (
        ([], "messages is empty"),
        (tool, "role of message 0='tool' is not one of"),
        ([{"role": "user"}], "message 0 has the keys .'role'"),
        (late, "message 3 is of the syst"),
        (ended, r"message 0 holds '<\|im_end\|>'"),
    ):
        refused(message, render_chat, messages)
    refused("'chatmll'.*Did you mean", render_chat, CONVERSATION, "chatmll")


def test_what_training_left_in_tokenizer_json_is_no_setting(checkpoint):
    """Truncation, padding and dropout of merges stored there change no text."""
    library = pytest.importorskip("tokenizers")
    text = "the and the 12 the and " * 9
    expected = load_tokenizer(checkpoint).encode(text)
    vocab = json.loads((checkpoint / "vocab.json").read_text(encoding="utf-8"))
    pairs = [tuple(merge.split(" ")) for merge in MERGES]

    def stored(change):
        model = library.models.BPE(vocab=vocab, merges=pairs)
        backend = library.Tokenizer(model)
        split = library.Regex(PATTERNS["qwen2"])
        cut = library.pre_tokenizers
        byte_level = cut.ByteLevel(add_prefix_space=False, use_regex=False)
        parts = [cut.Split(split, behavior="isolated"), byte_level]
        backend.pre_tokenizer = cut.Sequence(parts)
        backend.decoder = library.decoders.ByteLevel()
        backend.add_special_tokens(list(SPECIALS))
        change(backend)
        backend.save(str(checkpoint / "tokenizer.json"))
        return load_tokenizer(checkpoint)

    def both(backend):
        backend.enable_truncation(4, stride=1, direction="left")
        backend.enable_padding(length=300, pad_token="<|endoftext|>", direction="left")

    def drops(backend):
        backend.model.dropout = 0.9

    for change in (
        lambda backend: backend.enable_truncation(3),
        lambda backend: backend.enable_padding(pad_to_multiple_of=512),
        both,
        drops,
    ):
        tokenizer = stored(change)
        assert tokenizer.encode(text) == expected
        assert tokenizer.decode(expected) == text
        assert tokenizer.encode("") == []
